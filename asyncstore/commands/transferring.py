"""`import` and `export`: JSON lines, from files and to files."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import stat
import sys
import time
import zlib
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, cast

import anyio.to_thread
import typer

from asyncstore import transfer
from asyncstore.commands.exits import run
from asyncstore.commands.options import (
    AsJson,
    Domains,
    KeyPrefix,
    Url,
    options_at,
    settings_of_a_store,
)
from asyncstore.commands.output import RED, json_of, print_json, progress, say, say_if_typed
from asyncstore.errors import CorruptEvent
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asyncstore.settings import Options
    from asyncstore.transfer import ImportReport

_PIPE = Path("-")
_SHOWN_BAD_LINES = 20
_GO_ON = "interrupted; what was stored is stored, run it again to go on"
_GZIP_MAGIC = b"\x1f\x8b"

app = typer.Typer()


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON lines, .gz too; - for the standard input.")],
    as_json: AsJson = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Load events, branches, snapshots, positions: once each. Run again, it adds nothing.

    A bad line is named, and nothing after it in its aggregate is loaded.
    """
    options = options_at(url, key_prefix)
    run(lambda: _import(file, as_json, options), interrupted=_GO_ON)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="JSON lines, .gz too; - for the output.")] = _PIPE,
    domain: Domains = None,
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
    run(lambda: _export(file, domain, skip_corrupt, options_at(url, key_prefix)))


async def _import(path: Path, as_json: bool, options: Options) -> int:
    started = time.perf_counter()
    async with _reading(path) as source, open_store(**options) as store:
        if path == _PIPE:
            say_if_typed("JSON lines")
        loading = transfer.Import(store)
        try:
            await _load_all(source, loading)
        finally:
            _print_report(loading.report, time.perf_counter() - started)
            if as_json:
                print_json(asdict(loading.report))
    return 1 if loading.report.bad_lines or loading.report.held_back else 0


async def _load_all(source: _Source, loading: transfer.Import) -> None:
    with progress("importing", source.size) as advance:
        while not loading.report.stopped:
            chunk = await anyio.to_thread.run_sync(source.chunk, abandon_on_cancel=True)
            if not chunk:
                break
            await loading.load(chunk)
            advance(source.position(), loading.report.stored + loading.report.present)


def _print_report(report: ImportReport, seconds: float) -> None:
    for line in report.bad_lines[:_SHOWN_BAD_LINES]:
        say(f"line {line.number}: {line.why}", RED)
    if len(report.bad_lines) > _SHOWN_BAD_LINES:
        say(f"… and {len(report.bad_lines) - _SHOWN_BAD_LINES} more bad lines")
    if report.stopped:
        last = report.bad_lines[-1].number
        say(f"stopped: line {last} names no aggregate, so what follows may belong after it")
    if report.held_back:
        say(
            f"{report.held_back:,} lines held back: they follow a bad line, "
            f"or the rest of their append is missing"
        )
    rate = f", {report.stored / seconds:,.0f} events/s" if report.stored else ""
    branches = f"{report.branches:,} branches made, " if report.branches else ""
    beside = f"{report.snapshots:,} snapshots, " if report.snapshots else ""
    beside += f"{report.positions:,} positions, " if report.positions else ""
    say(
        f"{report.stored:,} events stored, {branches}{beside}{report.present:,} were there, "
        f"{report.aggregates:,} aggregates, {seconds:.1f} s{rate}"
    )


class _Source:
    """A file or pipe of JSON lines, compressed or not, read in chunks of numbered lines."""

    def __init__(self, raw: IO[bytes], size: int | None) -> None:
        self.size = size
        self._raw = raw
        self._buffered = io.BufferedReader(cast(io.RawIOBase, raw))
        self._lines = enumerate(self._unpacked(), start=1)

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

    def _unpacked(self) -> Iterator[bytes]:
        """Iterate over the lines. The first look waits for a pipe, too: not in the event loop."""
        buffered = self._buffered
        compressed = buffered.peek(2)[:2] == _GZIP_MAGIC
        try:
            yield from gzip.GzipFile(fileobj=buffered) if compressed else buffered
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(f"what is compressed is damaged or cut off: {error}") from error


@asynccontextmanager
async def _reading(path: Path) -> AsyncIterator[_Source]:
    if path == _PIPE:
        yield _Source(cast(IO[bytes], sys.stdin.buffer), None)
    else:
        with await _opened(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
            yield _Source(file, size)


async def _export(path: Path, domains: list[str] | None, skip: bool, options: Options) -> int:
    corrupt: list[transfer.Corrupt] = []

    def note(error: transfer.Corrupt) -> None:
        corrupt.append(error)
        what = str(error)
        if isinstance(error, CorruptEvent):
            what = f"{error.key}, sequence {error.sequence}: {error.why}"
        say(f"left out: {what}", RED)

    settings = settings_of_a_store(options)
    count = 0
    async with _writing(path) as target, open_store(settings) as store:
        with progress("exporting", None) as advance:
            async for line in transfer.export_lines(store, domains, note if skip else None):
                target.write(line)
                count += 1
                if count % 1000 == 0:
                    advance(None, count)
    say(f"{count:,} lines exported" + (f", {len(corrupt)} left out" if corrupt else ""))
    return 1 if corrupt else 0


@asynccontextmanager
async def _writing(path: Path) -> AsyncIterator[IO[bytes]]:
    """Write to the output, or to a file that has its name only once it is complete."""
    if path == _PIPE:
        yield cast(IO[bytes], _Terminal()) if sys.stdout.isatty() else sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with _until_complete(path) as place:
        try:
            file = await _opened(place, "wb")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        with file, _packed(file, path) as packed:
            yield packed


@contextmanager
def _until_complete(path: Path) -> Iterator[Path]:
    """Give where a file is written until it gets its name."""
    if path.exists() and not path.is_file():  # a device or a named pipe; a directory says no
        yield path
        return
    target = path.resolve()
    part = target.with_name(target.name + ".part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class _Terminal:
    """Writes lines of JSON so that the terminal does not act on what is in them."""

    def write(self, line: bytes) -> None:
        """Write a line."""
        print(json_of(json.loads(line)))


async def _opened(path: Path, mode: str, buffering: int = -1) -> IO[bytes]:
    """Open a file. A named pipe waits for whoever opens its other end: not in the event loop."""
    return await anyio.to_thread.run_sync(path.open, mode, buffering, abandon_on_cancel=True)


@contextmanager
def _packed(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """Give what compresses on its way to a file, if that is how the user calls it."""
    if not path.name.endswith(".gz"):
        yield file
        return
    with gzip.GzipFile(fileobj=file, mode="wb") as packed:
        yield cast(IO[bytes], packed)
