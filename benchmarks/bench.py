"""Measure the store beside plain redis-py, both on one embedded server and in one run.

    python benchmarks/bench.py [--output results.json]

The two sides take turns, so that a slow moment of the machine meets both. What counts is the
ratio. Prints a table and saves a JSON file that says where it was measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import platform
import statistics
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import redis.asyncio
import typer
from rich.console import Console
from rich.table import Table

import asyncstore
from asyncstore import NEW, Aggregate, Event, RecordedEvent, Store, codec, embedded, scripts
from asyncstore.keys import Keys

ROUNDS = 20
CALLS = 200
WRITERS = 128
BODY = {"text": "x" * 189}  # 200 bytes as JSON

console = Console(highlight=False)
Call = Callable[[], Awaitable[object]]


@dataclass
class Row:
    """Two sides of one measurement; `ratio` is ours by theirs."""

    what: str
    unit: str
    ours: float
    theirs: float
    ratio: float


def fresh() -> Aggregate:
    return Aggregate("bench", uuid.uuid4())


class Bare:
    """The same work on redis-py alone: the same scripts, keys and members."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self.client = client
        self.keys = keys

    async def append(self) -> object:
        """Append one event to a new aggregate."""
        aggregate = fresh()
        keys = [
            self.keys.commits(),
            self.keys.roots("bench", "main"),
            self.keys.editions("bench"),
            self.keys.domains(),
            self.keys.events(aggregate),
        ]
        member = codec.encode_event(Event("Benched", BODY))
        arguments = ("", "bench", "main", aggregate.root, "0", 1, *member)
        return await self.client.evalsha(scripts.APPEND.sha, len(keys), *keys, *arguments)

    async def load(self, aggregate: Aggregate) -> object:
        """Read the newest snapshot, then the events after it."""
        snapshot = await self.client.hgetall(self.keys.snapshots(aggregate)[0])
        start = int(snapshot[b"sequence"]) + 1
        members = await self.client.zrange(
            self.keys.events(aggregate),
            start,
            "+inf",
            byscore=True,
        )
        key = self.keys.events(aggregate)
        return [RecordedEvent.of_member(aggregate, key, member) for member in members]


async def one_at_a_time(call: Call) -> list[float]:
    latencies = []
    for _ in range(CALLS):
        started = time.perf_counter()
        await call()
        latencies.append(1e6 * (time.perf_counter() - started))
    return latencies


async def rate_at_once(call: Call) -> list[float]:
    async def writer() -> None:
        for _ in range(CALLS // 20):
            await call()

    started = time.perf_counter()
    await asyncio.gather(*(writer() for _ in range(WRITERS)))
    return [WRITERS * (CALLS // 20) / (time.perf_counter() - started)]


async def compare(
    what: str,
    unit: str,
    ours: Call,
    theirs: Call,
    measure: Callable[[Call], Awaitable[list[float]]],
) -> Row:
    """Measure both sides, turn by turn, and return the medians."""
    measured: tuple[list[float], list[float]] = ([], [])
    for turn, side in itertools.product(range(ROUNDS), (0, 1)):
        figures = await measure((ours, theirs)[side])
        if turn:  # the first is for warming up
            measured[side].extend(figures)
    mine, other = (statistics.median(figures) for figures in measured)
    return Row(what, unit, mine, other, mine / other)


async def memory_row(store: Store, client: redis.asyncio.Redis) -> Row:
    """Measure the server's bytes an event, above its data and type."""
    count = 200
    before = (await client.info("memory"))["used_memory"]
    for _ in range(count):
        await store.events.append(fresh(), [Event("Benched", BODY)] * 100, expected=NEW)
    after = (await client.info("memory"))["used_memory"]
    total = (after - before) / (100 * count)
    overhead = total - len("Benched") - 200
    return Row(
        "server memory an event of 200 bytes, above data and type", "B", overhead, 96, overhead / 96
    )


async def measure_all() -> tuple[list[Row], dict[str, Any]]:
    async with (
        embedded.running(None) as url,
        asyncstore.open(url) as store,
    ):
        pool = redis.asyncio.ConnectionPool.from_url(url, max_connections=WRITERS, protocol=2)
        async with redis.asyncio.Redis(connection_pool=pool) as client:
            bare = Bare(client, Keys())

            async def append() -> object:
                return await store.events.append(fresh(), [Event("Benched", BODY)], expected=NEW)

            loaded = fresh()
            await store.events.append(loaded, [Event("Benched", BODY)] * 20, expected=NEW)
            await store.snapshots.put(loaded, sequence=9, state={"n": 10})
            rows = [
                await memory_row(store, client),
                await compare(
                    "append, one at a time, p50", "µs", append, bare.append, one_at_a_time
                ),
                await compare(
                    f"append, {WRITERS} at once", "1/s", append, bare.append, rate_at_once
                ),
                await compare(
                    "load of a snapshot and 10 events, p50",
                    "µs",
                    lambda: store.load(loaded),
                    lambda: bare.load(loaded),
                    one_at_a_time,
                ),
            ]
            info = await client.info("server")
    return rows, {"server": f"{info.get('server_name', 'redis')} {info.get('valkey_version')}"}


def describe_machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "machine": platform.platform(),
        "python": platform.python_version(),
        "rounds": ROUNDS,
    }


def main(output: Annotated[Path, typer.Option()] = Path("build/bench.json")) -> None:
    """Measure, print, save."""
    rows, server = asyncio.run(measure_all())
    table = Table("what", "unit", "asyncstore", "redis-py (memory: budget)", "ratio")
    for row in rows:
        table.add_row(
            row.what, row.unit, f"{row.ours:,.1f}", f"{row.theirs:,.1f}", f"{row.ratio:.2f}"
        )
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {**describe_machine(), **server, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
