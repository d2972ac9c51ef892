"""Plays a fault under load, and has the checker judge."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import asyncstore
from asyncstore import Store, verify
from tests.faults.checker import Verdict, check
from tests.faults.faults import Fault
from tests.faults.history import History, Reader, Writer, prepare
from tests.faults.stage import PATIENT, Level, Scene, Size, Stage, staged

READERS = 2


@dataclass
class Row:
    """What became of one fault on one server: a line of the table."""

    fault: str
    server: str
    level: str
    writers: int
    rounds: int
    acknowledged: int
    lost: int
    doubled: int
    wrong: int
    unknown: int
    refused: int
    recovery: list[float]  # seconds, of each round
    may_lose: bool
    why: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    p99: float | None = None  # milliseconds, of appends answered while the fault was played
    p99_others: float | None = None  # the same, on nodes that were left alone

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@asynccontextmanager
async def load(stage: Scene, *, may_lose: bool) -> AsyncIterator[None]:
    """Writers write and readers read until the end of the block; then each ends its last call."""
    stop = asyncio.Event()
    workers: list[Writer | Reader] = []
    for number in range(stage.size.writers):
        store = stage.stores[number % len(stage.stores)]
        dice = random.Random(stage.dice.random())
        workers.append(Writer(number, store, stage.history, dice, stage.level.options))
    for number in range(READERS):
        store = stage.stores[number % len(stage.stores)]
        dice = random.Random(stage.dice.random())
        workers.append(Reader(store, stage.history, dice, may_lose))
    async with asyncio.TaskGroup() as tasks:
        for worker in workers:
            tasks.create_task(worker.work(stop))
        try:
            yield
        finally:
            stop.set()


async def play(fault: Fault, server: str, binary: str, size: Size, seed: int) -> Row:
    """Play a fault in rounds, and judge what is stored afterwards."""
    patience = size.timeout if fault.is_short_of_time else PATIENT
    async with staged(
        binary,
        fault.level,
        size,
        seed,
        settings=fault.settings,
        replica=fault.replica,
        preload=fault.preload,
        patience=patience,
    ) as stage:
        rounds = 1 if fault.once else size.rounds
        await prepare(stage.stores[0], stage.history)
        async with load(stage, may_lose=fault.may_lose):
            for _ in range(rounds):
                await play_once(stage, fault)
        async with asyncstore.open(stage.node.url) as direct:
            verdict = await check(direct, stage.history, may_lose=fault.may_lose)
            await look_at_the_rest(direct, stage.history, verdict)
    return row_of(fault, server, size, rounds, stage.history, verdict)


async def look_at_the_rest(store: Store, history: History, verdict: Verdict) -> None:
    """Have indexes, claims and all else that hangs on the events looked at, too."""
    domains = {attempt.place.domain for attempt in history.attempts}
    async for problem in verify.problems(store, domains):
        if not problem.is_note:
            verdict.why.append(f"verify: {problem.kind} {problem.key}: {problem.text}")


async def play_once(stage: Stage, fault: Fault) -> None:
    """Wait for load, strike, and wait for the load to come back."""
    await stage.more()
    with stage.history.disturbed():
        await fault.strike(stage)
    await stage.until(stage.history.is_recovered, "an append was acknowledged again")
    await stage.more()


class Played(Protocol):
    """What a row tells of a fault."""

    @property
    def name(self) -> str: ...
    @property
    def level(self) -> Level: ...
    @property
    def may_lose(self) -> bool: ...


def row_of(
    fault: Played, server: str, size: Size, rounds: int, history: History, verdict: Verdict
) -> Row:
    return Row(
        fault=fault.name,
        server=server,
        level=fault.level.name,
        writers=size.writers,
        rounds=rounds,
        acknowledged=verdict.acknowledged,
        lost=verdict.lost,
        doubled=verdict.doubled,
        wrong=verdict.wrong,
        unknown=verdict.unknown,
        refused=verdict.refused,
        recovery=history.recoveries,
        may_lose=fault.may_lose,
        why=verdict.why,
        errors=dict(history.errors),
    )
