"""Any git repository's history as events: each file an aggregate, each commit to it an event.

    python examples/git_history.py [REPO] [--url redis://localhost:6379]

Loads the history with one append an event, each at the sequence it must get, many files at once;
then asks the store which files changed most, what one was as of a date, and loads one from a
snapshot in a single round trip.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import statistics
import subprocess
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import asyncstore
from asyncstore import Aggregate, Event, RecordedEvent, Store

DOMAIN = "files"
LONGEST_ROOT = 512  # bytes
WRITERS = 16
LOG_OPTIONS = (
    "--reverse",
    "--root",
    "--no-renames",
    "-z",
    "--raw",
    "--numstat",
    "--format=%x00%x01%x00%H%x00%an%x00%cI%x00%s",
)
COMMIT = re.compile(rb"(?:^|\0)\0\x01\0(?=[0-9a-f]{40,64}\0)")
TYPES = {"A": "FileAdded", "D": "FileDeleted"}

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


# From git to events


def read_history(repository: Path) -> dict[Aggregate, list[Event]]:
    """Return the events of each file, oldest first."""
    command = ["git", "-C", str(repository), "log", *LOG_OPTIONS]
    try:
        log = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        raise SystemExit("git is needed, and it is not installed") from None
    if log.returncode != 0:
        raise SystemExit(f"{repository} has no history to read: {log.stderr.decode().strip()}")
    history: defaultdict[Aggregate, list[Event]] = defaultdict(list)
    for commit in COMMIT.split(log.stdout)[1:]:
        for path, event in changes_of(commit):
            history[Aggregate(DOMAIN, root_of(path))].append(event)
    return dict(history)


def changes_of(commit: bytes) -> Iterator[tuple[bytes, Event]]:
    """Parse a commit of `git log -z`: four fields, `:… M` and a path a file, then the counts."""
    digest, author, when, subject, *rest = commit.split(b"\0")
    about = {"commit": text(digest), "author": text(author), "subject": text(subject)}
    kinds: dict[bytes, str] = {}
    counts: dict[bytes, dict[str, int]] = {}
    parts = iter(part for part in b"\0".join(rest).lstrip(b"\n").split(b"\0") if part)
    for part in parts:
        if part.startswith(b":"):
            kinds[next(parts)] = text(part)[-1]
        else:
            added, deleted, path = part.split(b"\t", 2)
            counts[path] = {"added": number(added), "deleted": number(deleted)}
    for path, kind in kinds.items():
        data = {**about, **counts.get(path, {})}
        yield (
            path,
            Event(TYPES.get(kind, "FileChanged"), data, time=datetime.fromisoformat(text(when))),
        )


def text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def number(raw: bytes) -> int:
    return 0 if raw == b"-" else int(raw)  # git has no count for binary files


def root_of(path: bytes) -> str:
    """Return the path as a root: what a root can't hold is written as %XX, as in a URL."""
    name = path.decode(errors="surrogateescape")
    root = "".join(char if can_stand(char) else escape(char) for char in name)
    if len(root.encode()) <= LONGEST_ROOT:
        return root
    return f"{root[:100]}…{hashlib.sha256(path).hexdigest()}"


def can_stand(char: str) -> bool:
    return char not in "%{}" and unicodedata.category(char) not in ("Cc", "Cs")


def escape(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogateescape"))


# What a file was


@dataclass
class File:
    """The state of a file, folded from its events."""

    exists: bool = False
    lines: int = 0
    commits: int = 0
    last_author: str = ""

    def apply(self, event: RecordedEvent) -> None:
        """Take in what happened next."""
        self.exists = event.type != "FileDeleted"
        self.lines += event.data.get("added", 0) - event.data.get("deleted", 0)
        self.commits += 1
        self.last_author = event.data["author"]


def fold(events: Iterable[RecordedEvent], start: dict[str, Any] | None = None) -> File:
    file = File(**(start or {}))
    for event in events:
        file.apply(event)
    return file


# Loading and asking


async def load(store: Store, history: dict[Aggregate, list[Event]]) -> None:
    """Append every event at the sequence it must get, and print how long that took."""
    latencies: list[float] = []
    free = asyncio.Semaphore(WRITERS)
    columns = (TextColumn("loading"), BarColumn(), MofNCompleteColumn(), TextColumn("events"))

    async def load_file(file: Aggregate, events: list[Event]) -> None:
        async with free:
            there = await store.events.next_sequence(file)
            bar.advance(task, min(there, len(events)))
            for sequence, event in enumerate(events[there:], start=there):
                started = time.perf_counter()
                await store.events.append(file, [event], expected=sequence)
                latencies.append(time.perf_counter() - started)
                bar.advance(task)

    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=sum(map(len, history.values())))
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for file, events in history.items():
                tasks.create_task(load_file(file, events))
        seconds = time.perf_counter() - started

    console.print(f"{len(latencies):,} events of {len(history):,} files in {seconds:.2f} s", end="")
    console.print(f": {len(latencies) / seconds:,.0f} events/s with up to {WRITERS} at once")
    if len(latencies) > 1:
        cuts = statistics.quantiles(latencies, n=100, method="inclusive")
        p50, p95, p99 = (1000 * cuts[n - 1] for n in (50, 95, 99))
        console.print(f"append: p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms")


async def most_changed(store: Store) -> Aggregate:
    """Print the files with the most events, and return the first."""
    files = [Aggregate(DOMAIN, root) async for root in store.events.roots(DOMAIN)]
    counts = await asyncio.gather(*(store.events.next_sequence(file) for file in files))
    ranking = sorted(zip(counts, files, strict=True), key=lambda row: (-row[0], row[1].root))
    table = Table("commits", "file", title="The files that changed most", title_justify="left")
    for count, file in ranking[:5]:
        table.add_row(str(count), Text(file.root))
    console.print(table)
    return ranking[0][1]


async def as_of(store: Store, file: Aggregate, moment: datetime) -> None:
    then, now = (
        fold(await store.events.read(file, until=moment)),
        fold(await store.events.read(file)),
    )
    console.print(f"{file.root} as of {moment:%Y-%m-%d %H:%M:%S} UTC: {describe(then)}")
    console.print(f"{file.root} now: {describe(now)}")


def describe(file: File) -> str:
    if not file.exists:
        return "it does not exist"
    return f"{file.lines:,} lines, commit {file.commits} of it, by {file.last_author}"


async def from_snapshot(store: Store, file: Aggregate, events: list[RecordedEvent]) -> None:
    """Put a snapshot at two thirds of the history, and load from it."""
    older = events[: max(1, 2 * len(events) // 3)]
    await store.snapshots.put(file, sequence=older[-1].sequence, state=asdict(fold(older)))
    started = time.perf_counter()
    loaded = await store.load(file)
    milliseconds = 1000 * (time.perf_counter() - started)
    assert loaded.snapshot is not None
    state = fold(loaded.events, loaded.snapshot.state)
    console.print(
        f"loaded {file.root} in one round trip, {milliseconds:.2f} ms: snapshot as of sequence "
        f"{loaded.snapshot.sequence} and {len(loaded.events)} events after it; "
        f"{describe(state)}; the next sequence is {loaded.next_sequence}"
    )
    assert state == fold(events), "a snapshot and what follows is the same as everything"


async def run(repository: Path, url: str) -> None:
    history = await asyncio.to_thread(read_history, repository)
    if not history:
        raise SystemExit(f"{repository} has no commits")
    async with asyncstore.open(url) as store:
        console.print(f"the git history of {repository} into {store}")
        await load(store, history)
        file = await most_changed(store)
        events = await store.events.read(file)
        await as_of(store, file, events[(len(events) - 1) // 2].time)
        await from_snapshot(store, file, events)


def main(
    repository: Annotated[Path, typer.Argument(metavar="[REPO]")] = Path(),
    url: Annotated[str, typer.Option(help="Where to load it to.")] = "embedded://",
) -> None:
    """Load a git repository's history into a store and ask it questions."""
    asyncio.run(run(repository, url))


if __name__ == "__main__":
    typer.run(main)
