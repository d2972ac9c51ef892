"""The commands of the command line.

Results go to the standard output, everything said about them to the standard error. Exit codes:
0 all done, 1 something was left out or the store can't be used, 2 the configuration is wrong.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import anyio.to_thread
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from asyncstore import transfer
from asyncstore.errors import AsyncStoreError, ConfigurationError, CorruptEvent
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from asyncstore.settings import Options
    from asyncstore.transfer import ImportReport

_PIPE = Path("-")
_SHOWN_BAD_LINES = 20
_GZIP_MAGIC = b"\x1f\x8b"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_say = Console(stderr=True, highlight=False)

Url = Annotated[
    str | None,
    typer.Option(help="Where the store is. Default: REDIS_URL, asyncstore.toml, or embedded."),
]
KeyPrefix = Annotated[str | None, typer.Option(help="What stands in front of every key.")]


@app.callback()
def _asyncstore() -> None:
    """The event store you await: events of Redis, Valkey or an embedded server."""


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON lines, .gz too; - for the standard input.")],
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Load events: each once, in order per aggregate. Run again, it adds nothing.

    A bad line is named, and nothing after it in its aggregate is loaded.
    """
    _run(lambda: _import(file, _options(url, key_prefix)))


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="JSON lines, .gz too; - for the output.")] = _PIPE,
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    skip_corrupt: Annotated[
        bool, typer.Option(help="Name events that can't be read, and go on.")
    ] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Write all events, or those of some domains, as JSON lines that `import` takes."""
    _run(lambda: _export(file, domain, skip_corrupt, _options(url, key_prefix)))


def _options(url: str | None, key_prefix: str | None) -> Options:
    options: Options = {}
    if url is not None:
        options["url"] = url
    if key_prefix is not None:
        options["key_prefix"] = key_prefix
    return options


def _run(command: Callable[[], Coroutine[Any, Any, int]]) -> None:
    try:
        code = asyncio.run(command())
    except ConfigurationError as error:
        _say.print(f"error: {error}", style="red", markup=False)
        code = 2
    except (AsyncStoreError, OSError, EOFError) as error:
        _say.print(f"error: {error}", style="red", markup=False)
        code = 1
    except KeyboardInterrupt:
        _say.print("interrupted; what was stored is stored, run it again to go on")
        code = 130
    raise typer.Exit(code)


# Import


async def _import(path: Path, options: Options) -> int:
    started = time.perf_counter()
    async with open_store(**options) as store:
        loading = transfer.Import(store)
        with _reading(path) as source, _progress("importing", source.size) as advance:
            while not loading.report.stopped:
                chunk = await anyio.to_thread.run_sync(source.chunk)
                if not chunk:
                    break
                await loading.load(chunk)
                advance(source.position(), loading.report.stored + loading.report.present)
    _print_report(loading.report, time.perf_counter() - started)
    return 1 if loading.report.bad_lines else 0


def _print_report(report: ImportReport, seconds: float) -> None:
    for line in report.bad_lines[:_SHOWN_BAD_LINES]:
        _say.print(f"line {line.number}: {line.why}", style="red", markup=False)
    if len(report.bad_lines) > _SHOWN_BAD_LINES:
        _say.print(f"… and {len(report.bad_lines) - _SHOWN_BAD_LINES} more bad lines")
    if report.stopped:
        last = report.bad_lines[-1].number
        _say.print(f"stopped: line {last} names no aggregate, so what follows may belong after it")
    if report.held_back:
        _say.print(f"{report.held_back:,} events held back: they follow a bad line")
    rate = (report.stored + report.present) / seconds
    _say.print(
        f"{report.stored:,} events stored, {report.present:,} were there, "
        f"{report.aggregates:,} aggregates, {seconds:.1f} s, {rate:,.0f} events/s"
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
        return list(itertools.islice(self._lines, transfer.CHUNK_LINES))

    def position(self) -> int | None:
        """Return how many bytes of the file have been read; None for a pipe."""
        return self._raw.tell() if self.size is not None else None


@contextmanager
def _reading(path: Path) -> Iterator[_Source]:
    if path == _PIPE:
        yield _Source(cast(IO[bytes], sys.stdin.buffer), None)
    else:
        with path.open("rb", buffering=0) as file:
            yield _Source(cast(IO[bytes], file), path.stat().st_size)


# Export


async def _export(path: Path, domains: list[str] | None, skip: bool, options: Options) -> int:
    corrupt: list[CorruptEvent] = []

    def note(error: CorruptEvent) -> None:
        corrupt.append(error)
        _say.print(f"left out: {error}", style="red", markup=False)

    async with open_store(**options) as store:
        with _writing(path) as target, _progress("exporting", None) as advance:
            count = 0
            async for line in transfer.export_lines(store, domains, note if skip else None):
                target.write(line)
                count += 1
                if count % 1000 == 0:
                    advance(None, count)
    _say.print(f"{count:,} events exported" + (f", {len(corrupt)} left out" if corrupt else ""))
    return 1 if corrupt else 0


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """Write to the output, or to a file that has its name only once it is complete."""
    if path == _PIPE:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = path.with_name(path.name + ".part")
    try:
        with gzip.open(part, "wb") if path.suffix == ".gz" else part.open("wb") as file:
            yield cast(IO[bytes], file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
