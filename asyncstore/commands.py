"""The commands of the command line.

Results go to the standard output, everything said about them to the standard error. Exit codes:
0 all done, 1 something was left out or the store can't be used, 2 the configuration is wrong.
`doctor` has its own: 0 all good, 1 warnings only, 2 something is bad, a server that does not answer
and a wrong configuration included.
`verify` and `compare` tell apart what scripts need: 0 nothing is wrong, 1 something is, 2 they
could not look.
`cluster start` stays until a signal says stop, and that is all done: 0.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import json
import os
import signal
import stat
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import anyio
import anyio.to_thread
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from asyncstore import (
    __version__,
    acl,
    balance,
    comparing,
    embedded_cluster,
    migrating,
    transfer,
    verify,
)
from asyncstore.errors import AsyncStoreError, ConfigurationError, CorruptEvent, InvalidName
from asyncstore.names import MAIN
from asyncstore.settings import EMBEDDED, PRIMARY, URLS_VARIABLE, Settings
from asyncstore.store import examine
from asyncstore.store import open as open_store
from asyncstore.values import Start

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from asyncstore import progress
    from asyncstore.balance import Balance
    from asyncstore.checks import Finding, Report
    from asyncstore.comparing import Difference
    from asyncstore.embedded_cluster import Cluster
    from asyncstore.settings import Options
    from asyncstore.transfer import ImportReport
    from asyncstore.verify import Problem

_PIPE = Path("-")
_SHOWN_BAD_LINES = 20
_WATCH_SECONDS = 2.0
_FOLLOW_SECONDS = 0.5
_GZIP_MAGIC = b"\x1f\x8b"
_PIPED_WIDTH = 120
_ABOUT_SETTINGS = (
    "A setting behind → is one for CONFIG SET, and for the configuration file (CONFIG REWRITE)."
)
_DOCTOR_CODES = {"good": 0, "warning": 1, "bad": 2}
_COLOURS = {"good": "green", "warning": "yellow", "bad": "red"}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_clusters = typer.Typer(
    no_args_is_help=True, help="A cluster on this machine, and what is where on any."
)
app.add_typer(_clusters, name="cluster")
_say = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Url = Annotated[
    str | None,
    typer.Option(help="Where the store is. Default: REDIS_URL, asyncstore.toml, or embedded."),
]
KeyPrefix = Annotated[str | None, typer.Option(help="What stands in front of every key.")]
NewKeyPrefix = Annotated[str | None, typer.Option(help="The same of the new store, if another.")]
_ONE_PLACE = "A store's URL; of a cluster, URLs of some nodes with commas in between."


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"asyncstore {__version__}")
        raise typer.Exit


@app.callback()
def _asyncstore(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """The event store you await: events of Redis, Valkey or an embedded server."""


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON lines, .gz too; - for the standard input.")],
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Load events, branches, snapshots, positions: once each. Run again, it adds nothing.

    A bad line is named, and nothing after it in its aggregate is loaded.
    """
    _run(lambda: _import(file, _options(url, key_prefix)))


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="JSON lines, .gz too; - for the output.")] = _PIPE,
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    skip_corrupt: Annotated[
        bool,
        typer.Option(
            help="Name events that can't be read, and go on; what follows loses its sequence."
        ),
    ] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Write all there is, or some domains, as JSON lines that `import` takes.

    That is events, branches, snapshots and positions; not the dead letters and the progress of
    subscriptions beside their positions.
    """
    _run(lambda: _export(file, domain, skip_corrupt, _options(url, key_prefix)))


@app.command("compare")
def compare_(
    old: Annotated[str, typer.Argument(help=_ONE_PLACE)],
    new: Annotated[str, typer.Argument(help="The other one.")],
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    most: Annotated[int, typer.Option(min=1, help="How many differences are told.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, one for each difference.")
    ] = False,
    key_prefix: KeyPrefix = None,
    new_key_prefix: NewKeyPrefix = None,
) -> None:
    """Say whether two stores hold the same: events, branches, positions, snapshots.

    Exit code: 0 they do; 1 they do not; 2 it could not look. Nothing is changed. What is written
    meanwhile may show as a difference.
    """
    places = _places(old, new, key_prefix, new_key_prefix)
    _run(lambda: _compare(places, domain, most, as_json), failed=2)


@app.command("migrate")
def migrate_(
    old: Annotated[str, typer.Argument(help=_ONE_PLACE)],
    new: Annotated[str, typer.Argument(help="Where all of it goes: an empty store.")],
    stopped: Annotated[
        bool, typer.Option(help="Nobody writes to the old one any more: switch without asking.")
    ] = False,
    key_prefix: KeyPrefix = None,
    new_key_prefix: NewKeyPrefix = None,
) -> None:
    """Move a store to another one, such as one server to a cluster, while it is written to.

    It copies all there is and goes on with what changes, until you have stopped all that writes to
    the old store and press Enter. Then it copies the rest, compares both, and says how long that
    took. If it is cut off, run it again. The exit code is 0 once the new store has everything.
    """
    places = _places(old, new, key_prefix, new_key_prefix)
    _run(lambda: _migrate(places, stopped))


@app.command("doctor")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say whether the server is fit for events, what is not, and the setting that mends it.

    The exit code is 0 if all is good, 1 if there are warnings, 2 if something is bad. Nothing is
    changed.
    """
    _run(lambda: _doctor(as_json, _options(url, key_prefix)))


@app.command("verify")
def verify_(
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    repair_indexes: Annotated[
        bool,
        typer.Option(help="Mend indexes and claims by what the events say; never the events."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, one for each problem.")
    ] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Look whether the history is sound, and all that belongs to it. Others may write meanwhile.

    Exit code: 0 nothing is wrong, or all of it was repaired; 1 something is; 2 it could not look.
    It walks through all keys (SCAN), so it needs a user who may do that.
    """
    _run(lambda: _verify(domain, repair_indexes, as_json, _options(url, key_prefix)), failed=2)


@app.command("acl")
def acl_(
    user: Annotated[str, typer.Argument(help="The user's name on the server.")],
    waitaof: Annotated[
        bool,
        typer.Option(help="WAITAOF too, for fsync_and_replicas(n); Redis has it from 7.2 on."),
    ] = False,
    key_prefix: KeyPrefix = None,
) -> None:
    """Print the ACL SETUSER command for a user who may do what a store needs, and nothing else."""
    try:
        prefix = Settings(key_prefix=key_prefix or "").key_prefix
        print(acl.line(user, prefix, waitaof=waitaof))
    except (ConfigurationError, InvalidName) as error:
        _say.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    _say.print("give the user a password, too: ACL SETUSER … '>the password'", markup=False)


@_clusters.command("start")
def cluster_start(
    primaries: Annotated[int, typer.Option(help="How many share the slots.")] = 3,
    replicas: Annotated[int, typer.Option(help="How many each primary has.")] = 1,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the data last; without it, they go with the cluster."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Run a cluster of embedded servers on free local ports, until Ctrl-C.

    Started again in the same directory, the same cluster comes back.
    """
    _run(lambda: _cluster_start(primaries, replicas, directory, as_json))


@_clusters.command("stats")
def cluster_stats(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds to count appends.")] = 2.0,
    hottest: Annotated[int, typer.Option(min=0, help="How many slots are shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say how events, memory and appends are spread over the nodes of a cluster, and its slots.

    Walks through all keys (SCAN), so it needs a user who may do that. Nothing is changed.
    """
    options = _options(None, key_prefix) if url is None else _options_at(url, key_prefix)
    _run(lambda: _cluster_stats(interval, hottest, as_json, options))


@app.command("subscriptions")
def subscriptions_(
    handler: Annotated[str | None, typer.Option(help="Only this handler.")] = None,
    watch: Annotated[bool, typer.Option(help="Again every two seconds, until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, one for each handler and domain.")
    ] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say how far handlers are: what they are behind, since when, retries and dead letters."""
    _run(lambda: _subscriptions(handler, watch, as_json, _options(url, key_prefix)))


@app.command("dead-letters")
def dead_letters_(
    handler: Annotated[str, typer.Argument(help="The handler that could not handle them.")],
    domain: Annotated[str | None, typer.Option(help="Only this domain.")] = None,
    edition: Annotated[str, typer.Option(help="The edition.")] = MAIN,
    retry: Annotated[bool, typer.Option(help="Have each of them handled once more.")] = False,
    drop: Annotated[bool, typer.Option(help="Forget them for good; the events stay.")] = False,
    root: Annotated[str | None, typer.Option(help="Only this aggregate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """List the events that a handler could not handle; have them handled again, or forget them."""
    if retry and drop:
        raise typer.BadParameter("--retry and --drop exclude each other")
    which = _Letters(handler, domain, edition, root)
    _run(lambda: _dead_letters(which, retry, drop, as_json, _options(url, key_prefix)))


@app.command("reset")
def reset_(
    handler: Annotated[str, typer.Argument(help="The handler that is put back.")],
    domain: Annotated[str, typer.Argument(help="The domain.")],
    edition: Annotated[str, typer.Option(help="The edition.")] = MAIN,
    to: Annotated[
        str, typer.Option(help="first, now, or a time such as 2026-01-31T12:00:00+00:00.")
    ] = "first",
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Put a handler back: it handles all events of a domain anew, or those from a time on."""
    try:
        start = Start(to) if to in ("first", "now") else datetime.fromisoformat(to)
    except ValueError:
        raise typer.BadParameter(f"--to {to!r} is neither first, now nor a time") from None
    _run(lambda: _reset(handler, domain, edition, start, _options(url, key_prefix)))


def _options(url: str | None, key_prefix: str | None) -> Options:
    options: Options = {}
    if url is not None:
        options["url"] = url
    if key_prefix is not None:
        options["key_prefix"] = key_prefix
    return options


def _places(
    old: str, new: str, key_prefix: str | None, new_key_prefix: str | None
) -> tuple[Options, Options]:
    """Return the options of two stores."""
    new_key_prefix = key_prefix if new_key_prefix is None else new_key_prefix
    return _options_at(old, key_prefix), _options_at(new, new_key_prefix)


def _options_at(place: str, key_prefix: str | None) -> Options:
    if "," not in place:
        return _options(place, key_prefix)
    options = _options(None, key_prefix)
    options["urls"] = place.split(",")
    return options


def _run(command: Callable[[], Coroutine[Any, Any, int]], failed: int = 1) -> None:
    try:
        code = asyncio.run(command())
    except ConfigurationError as error:
        _say.print(f"error: {error}", style="red", markup=False)
        code = 2
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is left of it must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (AsyncStoreError, OSError, EOFError, zlib.error) as error:
        _say.print(f"error: {error}", style="red", markup=False)
        code = failed
    except KeyboardInterrupt:
        _say.print("interrupted; what was stored is stored, run it again to go on")
        os._exit(130)  # a thread may still wait for a pipe, and nothing else is left to do
    raise typer.Exit(code)


def _settings_of_a_store(options: Options) -> Settings:
    """Return the settings, unless they name an embedded store that would have to be made.

    What is said of a store must not be old: nothing is read from replicas.
    """
    settings = replace(Settings.resolve(options), read_from=PRIMARY)
    directory = settings.embedded_directory()
    if settings.backend == EMBEDDED and directory is not None and not directory.exists():
        raise ConfigurationError("path", f"there is no store in {directory}", "the settings")
    return settings


# Import


async def _import(path: Path, options: Options) -> int:
    started = time.perf_counter()
    with _reading(path) as source:
        async with open_store(**options) as store:
            loading = transfer.Import(store)
            try:
                await _load_all(source, loading)
            finally:
                _print_report(loading.report, time.perf_counter() - started)
    return 1 if loading.report.bad_lines or loading.report.held_back else 0


async def _load_all(source: _Source, loading: transfer.Import) -> None:
    with _progress("importing", source.size) as advance:
        while not loading.report.stopped:
            chunk = await anyio.to_thread.run_sync(source.chunk, abandon_on_cancel=True)
            if not chunk:
                break
            await loading.load(chunk)
            advance(source.position(), loading.report.stored + loading.report.present)


def _print_report(report: ImportReport, seconds: float) -> None:
    for line in report.bad_lines[:_SHOWN_BAD_LINES]:
        _say.print(f"line {line.number}: {line.why}", style="red", markup=False)
    if len(report.bad_lines) > _SHOWN_BAD_LINES:
        _say.print(f"… and {len(report.bad_lines) - _SHOWN_BAD_LINES} more bad lines")
    if report.stopped:
        last = report.bad_lines[-1].number
        _say.print(f"stopped: line {last} names no aggregate, so what follows may belong after it")
    if report.held_back:
        _say.print(
            f"{report.held_back:,} lines held back: they follow a bad line, "
            f"or the rest of their append is missing"
        )
    rate = f", {report.stored / seconds:,.0f} events/s" if report.stored else ""
    branches = f"{report.branches:,} branches made, " if report.branches else ""
    beside = f"{report.snapshots:,} snapshots, " if report.snapshots else ""
    beside += f"{report.positions:,} positions, " if report.positions else ""
    _say.print(
        f"{report.stored:,} events stored, {branches}{beside}{report.present:,} were there, "
        f"{report.aggregates:,} aggregates, {seconds:.1f} s{rate}"
    )


class _Source:
    """A file or pipe of JSON lines, compressed or not, read in chunks of numbered lines."""

    def __init__(self, raw: IO[bytes], size: int | None) -> None:
        self.size = size
        self._raw = raw
        buffered = io.BufferedReader(cast(io.RawIOBase, raw))
        compressed = buffered.peek(2)[:2] == _GZIP_MAGIC
        lines = gzip.GzipFile(fileobj=buffered) if compressed else buffered
        self._lines = enumerate(lines, start=1)

    def chunk(self) -> list[tuple[int, bytes]]:
        """Return the next lines with their numbers; [] at the end."""
        chunk: list[tuple[int, bytes]] = []
        size = 0
        for numbered_line in itertools.islice(self._lines, transfer.CHUNK_LINES):
            chunk.append(numbered_line)
            size += len(numbered_line[1])
            if size > transfer.CHUNK_BYTES:
                break
        return chunk

    def position(self) -> int | None:
        """Return how many bytes of the file have been read; None for a pipe."""
        return self._raw.tell() if self.size is not None else None


@contextmanager
def _reading(path: Path) -> Iterator[_Source]:
    if path == _PIPE:
        yield _Source(cast(IO[bytes], sys.stdin.buffer), None)
    else:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
            yield _Source(cast(IO[bytes], file), size)


# Export


async def _export(path: Path, domains: list[str] | None, skip: bool, options: Options) -> int:
    corrupt: list[transfer.Corrupt] = []

    def note(error: transfer.Corrupt) -> None:
        corrupt.append(error)
        what = str(error)
        if isinstance(error, CorruptEvent):
            what = f"{error.key}, sequence {error.sequence}: {error.why}"
        _say.print(f"left out: {what}", style="red", markup=False)

    settings = _settings_of_a_store(options)
    count = 0
    with _writing(path) as target:
        async with open_store(settings) as store:
            with _progress("exporting", None) as advance:
                async for line in transfer.export_lines(store, domains, note if skip else None):
                    target.write(line)
                    count += 1
                    if count % 1000 == 0:
                        advance(None, count)
    _say.print(f"{count:,} lines exported" + (f", {len(corrupt)} left out" if corrupt else ""))
    return 1 if corrupt else 0


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """Write to the output, or to a file that has its name only once it is complete."""
    if path == _PIPE:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and not path.is_file():  # a device or a named pipe; a directory says no
        with _opened(path, path) as file:
            yield file
        return
    target = path.resolve()
    part = target.with_name(target.name + ".part")
    try:
        with _opened(part, path) as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _opened(place: Path, path: Path) -> Iterator[IO[bytes]]:
    """Open `place` for writing, compressed if that is how the user calls it: `path`."""
    try:
        file = place.open("wb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    with file:
        if not path.name.endswith(".gz"):
            yield file
            return
        with gzip.GzipFile(fileobj=file, mode="wb") as packed:
            yield cast(IO[bytes], packed)


# Compare


async def _compare(
    places: tuple[Options, Options], domains: list[str] | None, most: int, as_json: bool
) -> int:
    old, new = map(_settings_of_a_store, places)
    count = 0
    async with open_store(old) as one, open_store(new) as other:
        with _counting("comparing") as on_events:
            async for difference in comparing.differences(one, other, domains, on_events):
                print(_show_difference(difference, as_json), flush=True)
                count += 1
                if count == most:
                    break
    _say.print(_summary(count, most))
    return 1 if count else 0


def _summary(count: int, most: int) -> str:
    if not count:
        return "they hold the same"
    return f"{count:,} differences" + (", and maybe more" if count == most else "")


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int], None]]:
    """Show how many events have been looked at; the call takes how many there are more."""
    read = 0
    with _progress(what, None) as advance:

        def on_events(count: int) -> None:
            nonlocal read
            read += count
            advance(None, read)

        yield on_events


def _show_difference(difference: Difference, as_json: bool) -> str:
    place = difference.aggregate
    if as_json:
        fields = {
            "kind": difference.kind,
            "domain": place.domain,
            "edition": place.edition,
            "root": place.root,
            "sequence": difference.sequence,
            "text": difference.text,
        }
        return json.dumps(fields)
    where = str(place) if difference.sequence is None else f"{place}, {difference.sequence}"
    return f"{difference.kind}: {where}: {difference.text}"


# Migrate


async def _migrate(places: tuple[Options, Options], stopped: bool) -> int:
    old, new = places
    async with open_store(_settings_of_a_store(old)) as one, open_store(**new) as other:
        with _counting("copying") as on_events:
            migration = migrating.Migration(one, other, on_events)
            if await migration.begin():
                _say.print("going on with what was begun")
            await _caught_up(migration)
        if not stopped and not await _follow(migration):
            _say.print("not switched: run it again to go on")
            return 1
        switch = await migration.finish()
    _print_switch(switch)
    return 0 if switch.is_done else 1


async def _follow(migration: migrating.Migration) -> bool:
    """Copy what changes until somebody presses Enter; return False if nobody can any more."""
    _say.print("Stop all that writes to the old store, handlers too; then press Enter to switch.")
    pressed = asyncio.create_task(_enter())
    try:
        while not pressed.done():
            await _caught_up(migration)
            await asyncio.wait([pressed], timeout=_FOLLOW_SECONDS)
        return await pressed
    finally:
        pressed.cancel()


async def _enter() -> bool:
    """Wait for a line on the standard input; return False at its end."""
    loop, is_there = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(sys.stdin.fileno(), is_there.set)
    except PermissionError:  # a file, which nobody presses Enter in
        return False
    try:
        await is_there.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return sys.stdin.readline() != ""


async def _caught_up(migration: migrating.Migration) -> None:
    started = time.perf_counter()
    caught = await migration.catch_up()
    if caught.aggregates:
        seconds = time.perf_counter() - started
        what = f"{caught.events:,} events of {caught.aggregates:,} aggregates"
        _say.print(f"copied {what} in {seconds:.2f} s")


def _print_switch(switch: migrating.Switch) -> None:
    for difference in switch.differences:
        print(_show_difference(difference, as_json=False))
    if not switch.is_quiet:
        _say.print("somebody has appended to the old store meanwhile: stop it and run this again")
    parts = f"catching up {switch.catching_up:.2f} s, comparing {switch.comparing:.2f} s"
    again = f"; {switch.mended:,} aggregates were copied again" if switch.mended else ""
    _say.print(f"the switch took {switch.seconds:.2f} s: {parts}{again}")
    _say.print("the new store has everything" if switch.is_done else "not switched")


# Verify


async def _verify(domains: list[str] | None, repair: bool, as_json: bool, options: Options) -> int:
    bad = notes = repaired = read = 0
    with _progress("verifying", None) as advance:

        def on_events(count: int) -> None:
            nonlocal read
            read += count
            advance(None, read)

        async with open_store(_settings_of_a_store(options)) as store:
            async for problem in verify.problems(store, domains, on_events):
                is_repaired = repair and await verify.repair(store, problem)
                bad += not (problem.is_note or is_repaired)
                notes += problem.is_note
                repaired += is_repaired
                print(_show(problem, is_repaired, as_json), flush=True)
    _say.print(
        f"{read:,} events read: {bad:,} problems"
        + (f", {repaired:,} repaired" if repair else "")
        + (f", {notes:,} notes" if notes else "")
    )
    return 1 if bad else 0


def _show(problem: Problem, is_repaired: bool, as_json: bool) -> str:
    severity = "note" if problem.is_note else "repaired" if is_repaired else "bad"
    if as_json:
        fields = {
            "severity": severity,
            "kind": problem.kind,
            "key": problem.key,
            "sequence": problem.sequence,
            "text": problem.text,
            "repairable": bool(problem.mending),
        }
        return json.dumps(fields)
    where = problem.key if problem.key.isprintable() else repr(problem.key)
    if problem.sequence is not None:
        where += f", sequence {problem.sequence}"
    line = f"{severity}: {problem.kind}: {where}: {problem.text}"
    return line.encode(errors="backslashreplace").decode()  # names may be no text


@contextmanager
def _progress(what: str, size: int | None) -> Iterator[Callable[[int | None, int], None]]:
    """Show a bar, where somebody is there to see it, and give the function that moves it."""
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.fields[events]:,} events"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_say, transient=True, disable=not _say.is_terminal) as bar:
        task = bar.add_task(what, total=size, events=0)
        yield lambda position, events: bar.update(task, completed=position, events=events)


# Subscriptions


async def _subscriptions(handler: str | None, watch: bool, as_json: bool, options: Options) -> int:
    async with open_store(_settings_of_a_store(options)) as store:
        while True:
            found = await store.subscriptions.status(handler)
            if as_json:
                for one in found:
                    print(json.dumps(asdict(one), default=str), flush=True)
            else:
                _print_progress(found)
            if not watch:
                return 0
            await asyncio.sleep(_WATCH_SECONDS)


def _print_progress(found: list[progress.Progress]) -> None:
    screen = _screen()
    table = Table("handler", "domain", "edition", "aggregates behind", "events", "since")
    for column in ("retrying", "dead letters"):
        table.add_column(column)
    for one in found:
        since = "" if one.oldest is None else f"{one.oldest:%Y-%m-%d %H:%M:%S}"
        counts = (f"{one.aggregates_behind:,}", f"{one.events_behind:,}", since)
        rest = (f"{one.retrying:,}", f"{one.dead_letters:,}")
        table.add_row(one.handler, one.domain, one.edition, *counts, *rest)
    screen.print(table)


@dataclass(frozen=True)
class _Letters:
    """Which dead letters are meant."""

    handler: str
    domain: str | None
    edition: str
    root: str | None


async def _dead_letters(
    which: _Letters, retry: bool, drop: bool, as_json: bool, options: Options
) -> int:
    count = 0
    async with open_store(_settings_of_a_store(options)) as store:
        letters = store.subscriptions.dead_letters(
            which.handler, which.domain, edition=which.edition
        )
        async for letter in letters:
            if which.root not in (None, letter.aggregate.root):
                continue
            if retry:
                count += await store.subscriptions.retry(letter)
            elif drop:
                count += await store.subscriptions.drop(letter)
            else:
                count += 1
            print(_show_letter(letter, as_json), flush=True)
    done = "are handled again" if retry else "were dropped" if drop else "dead letters"
    _say.print(f"{count:,} {done}")
    return 0


def _show_letter(letter: progress.DeadLetter, as_json: bool) -> str:
    place = letter.aggregate
    if as_json:
        fields = {
            "handler": letter.handler,
            "domain": place.domain,
            "edition": place.edition,
            "root": place.root,
            "sequence": letter.sequence,
            "id": letter.event_id,
            "attempts": letter.attempts,
            "time": letter.time.isoformat(),
            "reason": letter.reason,
        }
        return json.dumps(fields)
    when = f"{letter.time:%Y-%m-%d %H:%M:%S}"
    why = letter.reason or "no reason given"
    return f"{place}, event {letter.sequence}: {why}, {letter.attempts} attempts until {when}"


async def _reset(
    handler: str, domain: str, edition: str, start: Start | datetime, options: Options
) -> int:
    async with open_store(_settings_of_a_store(options)) as store:
        await store.subscriptions.reset(handler, domain, edition=edition, to=start)
    _say.print(f"{handler} begins anew in {domain}", markup=False)
    return 0


# Doctor


async def _doctor(as_json: bool, options: Options) -> int:
    report = await examine(_settings_of_a_store(options))
    if as_json:
        typer.echo(json.dumps({"level": report.level, **asdict(report)}, indent=2))
    else:
        _print_findings(report)
    return _DOCTOR_CODES[report.level]


def _print_findings(report: Report) -> None:
    screen = _screen()
    table = Table(title=Text(report.server), title_justify="left")
    for column, share in (("", 1), ("what", 2), ("found", 4), ("what it means for events", 6)):
        table.add_column(column, ratio=share)
    for finding in report.findings:
        table.add_row(*_cells(finding))
    screen.print(table)
    if report.level != "good":
        screen.print(_ABOUT_SETTINGS)


def _screen() -> Console:
    """Return what tables are printed on; wide enough where it is no terminal."""
    screen = Console(highlight=False, emoji=False)
    return (
        screen if screen.is_terminal else Console(highlight=False, emoji=False, width=_PIPED_WIDTH)
    )


def _cells(finding: Finding) -> tuple[Text, ...]:
    """Return the line of a finding; as Text, for what a server says is no markup."""
    meaning = Text(finding.meaning)
    if finding.remedy:
        meaning.append(f"\n→ {finding.remedy}", style="bold")
    level = Text(finding.level, style=_COLOURS[finding.level])
    return level, Text(finding.name), Text(finding.found), meaning


# Cluster


async def _cluster_start(
    primaries: int, replicas: int, directory: Path | None, as_json: bool
) -> int:
    started = time.perf_counter()
    with _until_stopped():
        async with embedded_cluster.running(
            primaries=primaries, replicas=replicas, directory=directory
        ) as cluster:
            print(_described(cluster, as_json), flush=True)
            _say.print(f"ready in {time.perf_counter() - started:.1f} s; Ctrl-C stops it")
            await anyio.sleep_forever()
    _say.print("stopped")
    return 0


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Leave the block in good order when a signal says stop, also when it comes again and again."""
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, scope.cancel)
        yield


def _described(cluster: Cluster, as_json: bool) -> str:
    nodes = cluster.nodes
    if as_json:
        shown = [
            {
                "url": node.url,
                "pid": node.pid,
                "directory": str(node.directory),
                "primary": node.is_primary,
            }
            for node in nodes
        ]
        return json.dumps({"urls": cluster.urls, "nodes": shown})
    urls = ", ".join(f'"{url}"' for url in cluster.urls)
    roles = (("primary" if node.is_primary else "replica", node) for node in nodes)
    return "\n".join(
        [
            *(f"{role}  {node.url}  pid {node.pid}  {node.directory}" for role, node in roles),
            "",
            f"asyncstore.open(urls=[{urls}])",
            f"export {URLS_VARIABLE}={','.join(cluster.urls)}",
        ]
    )


async def _cluster_stats(interval: float, hottest: int, as_json: bool, options: Options) -> int:
    async with open_store(_settings_of_a_store(options)) as store:
        found = await balance.measure(store, interval, hottest)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print_balance(found)
    return 0


def _print_balance(found: Balance) -> None:
    nodes = _table("node", "slots", "aggregates", "events", "memory", "appends/s")
    for node in found.nodes:
        memory = "not known" if node.memory is None else f"{node.memory / 2**20:,.1f} MiB"
        counts = (f"{node.slots:,}", f"{node.aggregates:,}", f"{node.events:,}", memory)
        nodes.add_row(node.where, *counts, f"{node.appends_a_second:,.1f}")
    slots = _table("hottest slots", "node", "aggregates", "events", "appends/s")
    for slot in found.hottest:
        sizes = (f"{slot.aggregates:,}", f"{slot.events:,}")
        slots.add_row(f"{slot.slot}", slot.where, *sizes, f"{slot.appends_a_second:,.1f}")
    screen = _screen()
    screen.print(nodes)
    if found.hottest:
        screen.print(slots)
    _say.print(f"appends were counted for {found.seconds:.1f} s")


def _table(first: str, *others: str) -> Table:
    """Return a table with a column of names, and others of numbers."""
    table = Table(first)
    for name in others:
        table.add_column(name, justify="left" if name == "node" else "right")
    return table
