"""Workers of one handler that are killed at random, over many aggregates and large ones."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncstore
from asyncstore import NEW, Aggregate, Event, Store
from tests.faults.run import Row
from tests.faults.stage import LONG, Size
from tests.faults.worker import BUNDLES, EVENTS, HANDLER, LEASE
from tests.polling import eventually
from tests.servers import redis_server

ROOT = Path(__file__).parent.parent.parent
WORKERS = 3
PART = 5_000  # events in one append
SLACK = 600  # events of a large one: what workers have in hand, also those that are killed
LEASES = int(2e9 * LEASE)  # nanoseconds in which what a worker had is somebody else's
GONE = "killed", "blocked"  # what is noted of a worker whose leases nobody renews
LINE = 24  # bytes of a note, at least

Line = tuple[int, str, str, int]


# The laws


def wrong(lines: list[Line], last: dict[str, int]) -> list[str]:
    """What the laws have against what workers noted; `last` are the last sequences of each root."""
    found = []
    acked: defaultdict[str, int] = defaultdict(lambda: -1)
    delivered: defaultdict[str, set[int]] = defaultdict(set)
    for _, what, root, sequence in sorted(lines):
        if what == "acked":
            acked[root] = max(acked[root], sequence)
        if what != "delivered":
            continue
        if sequence <= acked[root]:
            found.append(f"{root} {sequence} came again after its ack")
        elif sequence and sequence - 1 not in delivered[root]:
            found.append(f"{root} {sequence} came before the one before it")
        delivered[root].add(sequence)
    for root, end in last.items():
        missing = set(range(end + 1)) - delivered[root]
        found += [f"{root} {sequence} never came" for sequence in sorted(missing)]
    return found


def starved(lines: list[Line], large: str, small: int) -> list[str]:
    """What there is against a large aggregate that kept so many small ones waiting.

    If a worker was killed or blocked right before the last of them had its turn, others had nothing
    but the large one until its leases had ended, and what came meanwhile is not counted.
    """
    first: dict[str, int] = {}
    for moment, what, root, _ in sorted(lines):
        if what == "delivered":
            first.setdefault(root, moment)
    last = max(first.values(), default=0)
    if any(what in GONE and last - LEASES <= moment <= last for moment, what, _, _ in lines):
        last -= LEASES
    of_large = sum(
        root == large and what == "delivered" and moment < last for moment, what, root, _ in lines
    )
    if of_large <= 2 * small + SLACK:
        return []
    return [f"{of_large} events of {large} came before {small} small aggregates had their turn"]


# Workers


class Workers:
    """Worker processes that are killed and started again."""

    def __init__(self, url: str, prefix: str, directory: Path, *how: str) -> None:
        self._arguments = [url, prefix]
        self._how = how
        self._directory = directory
        self._started = 0
        self._kills: list[Line] = []
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, environment: dict[str, str] | None = None) -> None:
        self._started += 1
        log = self._directory / f"worker-{self._started}.log"
        command = [sys.executable, "-m", "tests.faults.worker", *self._arguments, str(log)]
        if self._how:
            manner, seed = self._how
            command += [manner, seed and f"{seed}.{self._started}"]
        self.running.append(
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})})
        )

    def kill(self, number: int) -> None:
        worker = self.running.pop(number)
        self._kills.append((time.monotonic_ns(), "killed", "", 0))
        worker.kill()
        worker.wait()

    def kill_all(self) -> None:
        while self.running:
            self.kill(0)

    def noted(self) -> int:
        """About how many lines there are."""
        logs = self._directory.glob("worker-*.log")
        return sum(log.stat().st_size for log in logs) // LINE

    def lines(self) -> list[Line]:
        found = list(self._kills)
        for log in self._directory.glob("worker-*.log"):
            for line in log.read_text().splitlines():
                moment, what, root, sequence = line.split()
                found.append((int(moment), what, root, int(sequence)))
        return found


# Playing


@dataclass(frozen=True, slots=True)
class Crowd:
    """What workers have to handle: small aggregates of one event, and a large one beside them."""

    name: str
    small: int
    large: int  # events
    manner: str

    def sizes(self, size: Size) -> dict[str, int]:
        """Return how many events each root has."""
        is_long = size is LONG
        large = {"large": self.large // (1 if is_long else 400)} if self.large else {}
        return large | {f"small-{n}": 1 for n in range(self.small // (1 if is_long else 100))}


CROWDS = [
    Crowd("workers killed, many small", 100_000, 0, EVENTS),
    Crowd("the same, in bundles", 100_000, 0, BUNDLES),
    Crowd("workers killed, one large", 1_000, 100_000, EVENTS),
    Crowd("the same, bundles", 1_000, 100_000, BUNDLES),
]


async def play_crowd(crowd: Crowd, server: str, binary: str, size: Size, seed: int) -> Row:
    """Have workers handle all there is while they are killed, and judge what they noted."""
    sizes, dice = crowd.sizes(size), random.Random(seed)
    total, kills = sum(sizes.values()), 2 * size.rounds
    with ExitStack() as stack:
        url = stack.enter_context(redis_server(binary)).url
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = Workers(url, "crowd:", directory, crowd.manner, f"{seed}")
        stack.callback(workers.kill_all)
        async with asyncstore.open(url, key_prefix="crowd:") as store:
            await fill(store, sizes)
            for _ in range(WORKERS):
                workers.start()
            for number in range(kills):
                count = (number + 1) * total // (kills + 2)
                await eventually(lambda: workers.noted() > count, "work goes on", 600)  # noqa: B023
                workers.kill(dice.randrange(WORKERS))
                workers.start()
            await store.subscriptions.wait_until_caught_up(HANDLER, "orders", timeout=600)
        workers.kill_all()
        lines = workers.lines()
    why = wrong(lines, {root: count - 1 for root, count in sizes.items()})
    if crowd.large:
        why += starved(lines, "large", len(sizes) - 1)
    return row_of(crowd, server, kills, lines, why)


async def fill(store: Store, sizes: dict[str, int]) -> None:
    roots = sorted(sizes)
    for first in range(0, len(roots), 500):
        await asyncio.gather(*(append(store, root, sizes[root]) for root in roots[first:][:500]))


async def append(store: Store, root: str, count: int) -> None:
    for first in range(0, count, PART):
        batch = [Event("Counted", {"n": n}) for n in range(first, min(first + PART, count))]
        await store.events.append(Aggregate("orders", root), batch, expected=first or NEW)


def row_of(crowd: Crowd, server: str, kills: int, lines: Sequence[Line], why: list[str]) -> Row:
    """Return a line of the table: `acknowledged` are acks that were answered."""
    acks = sum(what == "acked" for _, what, _, _ in lines)
    return Row(
        fault=crowd.name,
        server=server,
        level="memory",
        writers=WORKERS,
        rounds=kills,
        acknowledged=acks,
        lost=sum("never came" in text for text in why),
        doubled=sum("came again" in text for text in why),
        wrong=len(why),
        unknown=0,
        refused=0,
        recovery=[],
        may_lose=False,
        why=why,
    )
