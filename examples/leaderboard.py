"""A leaderboard that is kept by a subscription, whose worker is killed in the middle.

    python examples/leaderboard.py [HISTORY.jsonl.gz --domain incidents --field org_group]

A writer appends a history, game by game: the half of it first, the rest while a worker in another
process counts who is named how often. The worker is killed without warning, and another one goes on
where it was. In the end the numbers are those of a plain fold over all events.

Events come at least once, so the worker keeps the sequence that it has counted beside the numbers,
in one transaction of its own database: what comes again is not counted again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import asyncstore
from asyncstore import Aggregate, Delivery, Event, Store

HANDLER = "leaderboard"
LEASE = 2.0  # seconds after which the aggregates of a dead worker go to the next one
GAMES, PLAYERS, SCORES = 300, 12, 20
WRITERS = 32

console = Console(highlight=False, soft_wrap=True)


# The worker: a process of its own


async def work(url: str, database: str, domain: str, field: str) -> None:
    """Count until somebody ends this process."""
    board = sqlite3.connect(database)
    board.execute("PRAGMA synchronous = OFF")  # a process that is killed loses nothing by that
    board.execute("CREATE TABLE IF NOT EXISTS points (name TEXT PRIMARY KEY, points INT)")
    board.execute("CREATE TABLE IF NOT EXISTS counted (root TEXT PRIMARY KEY, sequence INT)")
    async with (
        asyncstore.open(url) as store,
        store.subscribe(HANDLER, domain, lease=LEASE) as sub,
    ):
        async for delivery in sub.batches():
            count(board, delivery, field)
            await delivery.ack()


def count(board: sqlite3.Connection, delivery: Delivery, field: str) -> None:
    """Count the events of a delivery that were not counted before, all of them or none."""
    root = delivery.event.aggregate.root
    with board:
        row = board.execute("SELECT sequence FROM counted WHERE root = ?", [root]).fetchone()
        new = [event for event in delivery.events if row is None or event.sequence > row[0]]
        for event in new:
            board.execute(
                "INSERT INTO points VALUES (?, 1) ON CONFLICT DO UPDATE SET points = points + 1",
                [event.data[field]],
            )
        if new:
            board.execute("REPLACE INTO counted VALUES (?, ?)", [root, new[-1].sequence])


def start_worker(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--work", *arguments])


# The writer


def games() -> Iterator[tuple[str, Event]]:
    """Return a history of games that were never played."""
    dice = random.Random(7)  # noqa: S311
    for _ in range(SCORES * GAMES):
        player = f"player {min(dice.randrange(PLAYERS), dice.randrange(PLAYERS)):02}"
        yield f"game {dice.randrange(GAMES)}", Event("Scored", {"player": player})


def lines(path: Path) -> Iterator[tuple[str, Event]]:
    """Return a history of JSON lines, as `asyncstore import` takes them."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        for line in file:
            fields: dict[str, Any] = json.loads(line)
            yield fields["root"], Event(fields["type"], fields["data"])


async def write(store: Store, domain: str, history: list[tuple[str, Event]]) -> None:
    """Append events, in order for each aggregate, many aggregates at once."""
    waiting: defaultdict[str, list[Event]] = defaultdict(list)
    for root, event in history:
        waiting[root].append(event)
    roots = iter(waiting.items())

    async def writer() -> None:
        for root, events in roots:
            for event in events:
                aggregate = Aggregate(domain, root)
                await store.events.append(aggregate, [event], expected=asyncstore.ANY)

    await asyncio.gather(*(writer() for _ in range(WRITERS)))


# Both together


async def play(history: list[tuple[str, Event]], domain: str, field: str, directory: str) -> bool:
    """Return whether the leaderboard is right in the end."""
    url, database = f"embedded://{directory}/store", f"{directory}/board.sqlite"
    half = len(history) // 2
    async with asyncstore.open(url) as store:
        await write(store, domain, history[:half])
        console.print(f"{half:,} events are there when the first worker starts")
        worker = start_worker(url, database, domain, field)
        writing = asyncio.ensure_future(write(store, domain, history[half:]))
        while (counted := total(database)) < half // 2:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)
        worker.kill()
        worker.wait()
        console.print(f"killed it after about {counted:,} events; {await behind(store)}")
        started = time.perf_counter()
        worker = start_worker(url, database, domain, field)
        try:
            await writing
            await store.subscriptions.wait_until_caught_up(HANDLER, domain, timeout=300)
        finally:
            worker.terminate()
            worker.wait()
        console.print(f"another one caught up in {time.perf_counter() - started:.1f} s")
        expected = await fold(store, domain, field)
    found = Counter(dict(rows(database, "SELECT name, points FROM points")))
    show(found, is_right=found == expected)
    return found == expected


async def behind(store: Store) -> str:
    (status,) = await store.subscriptions.status(HANDLER)
    return f"{status.events_behind:,} events of {status.aggregates_behind:,} aggregates are left"


async def fold(store: Store, domain: str, field: str) -> Counter[str]:
    """Return what a plain reading of everything gives."""
    expected: Counter[str] = Counter()
    async for root in store.events.roots(domain):
        async for event in store.events.stream(Aggregate(domain, root)):
            expected[event.data[field]] += 1
    return expected


def total(database: str) -> int:
    return sum(points for _, points in rows(database, "SELECT name, points FROM points"))


def rows(database: str, query: str) -> list[Any]:
    """Return what the worker has counted; nothing before it has begun."""
    board = sqlite3.connect(database)
    try:
        return board.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []
    finally:
        board.close()


def show(found: Counter[str], *, is_right: bool) -> None:
    table = Table("", "points")
    for name, points in found.most_common(10):
        table.add_row(name, f"{points:,}")
    console.print(table)
    verdict = "the same as" if is_right else "[red]not what[/red] was expected:"
    console.print(f"{found.total():,} points, {verdict} a fold over all events")


def main(
    history: Annotated[Path | None, typer.Argument(help="JSON lines, .gz too.")] = None,
    domain: Annotated[str, typer.Option(help="Where the events go.")] = "games",
    field: Annotated[str, typer.Option(help="Whose points they are.")] = "player",
) -> None:
    """Keep a leaderboard, kill its worker in the middle, and compare the numbers in the end."""
    events = list(lines(history) if history else games())
    with TemporaryDirectory(prefix="leaderboard-") as directory:
        if not asyncio.run(play(events, domain, field, directory)):
            raise typer.Exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        asyncio.run(work(*sys.argv[2:]))
    else:
        typer.run(main)
