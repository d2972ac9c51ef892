"""A long run: mixed load, faults at random, and nothing that grows, leaks or breaks a law.

It goes in generations. Each has fresh aggregates and a history of its own, is judged by the
checker, and is erased: so what still grows from one to the next is a leak.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import random
import resource
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncstore
from asyncstore import AsyncStoreError, OutcomeUnknown, Store, StoreFull, StoreUnavailable
from tests.faults import preload
from tests.faults.checker import check
from tests.faults.faults import FAULTS, Fault
from tests.faults.history import PLACES, History, prepare
from tests.faults.run import load, look_at_the_rest, play_once
from tests.faults.stage import FSYNC, Node, Size, Stage, staged
from tests.polling import eventually

MAX_GROWTH = 16 << 20
"""Bytes that the process may grow by after the warm-up, without what the allocator has free."""
MAX_OWN_GROWTH = 1 << 20
"""Bytes that may be held more by lines of asyncstore itself, by tracemalloc."""

WARM_UP = 2  # generations
_FAULTS_A_GENERATION = 3
_MIXERS = 4
# Too long, of another level, or too slow for the time that calls have here.
_NOT_HERE = {"LOADING", "import killed", "disk full, everysec", "one byte at a time"}
_SIZE = Size(
    name="soak",
    writers=32,
    rounds=1,
    appends=200,
    silence=3.0,
    timeout=1.0,
    events=0,
    load_delay=0,
    slots=0,
)
_PACKAGE = str(Path(asyncstore.__file__).parent / "*")


@dataclass
class Soak:
    """What came of it."""

    seed: int
    seconds: float = 0.0
    generations: int = 0
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    unknown: int = 0
    calls: int = 0  # of other kinds than appends
    faults: dict[str, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)  # bytes, after each generation
    own_growth: int = 0
    top: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    def growth(self) -> int:
        """Return how much larger the process got after the warm-up, but for a passing peak."""
        after = self.memory[WARM_UP:]
        return min(after[-3:]) - min(after[:3]) if after else 0


def suitable() -> list[Fault]:
    """Return the faults of one server that loses nothing: with `always` they are all strict."""
    return [
        fault
        for fault in FAULTS
        if not (fault.may_lose or fault.replica or fault.name in _NOT_HERE or fault.missing())
    ]


def _deck(dice: random.Random) -> Iterator[Fault]:
    """Deal faults at random, each as often as the others; the dice are used for nothing else."""
    while True:
        faults = suitable()
        dice.shuffle(faults)
        yield from faults


async def soak(binary: str, seconds: float, seed: int, say: Callable[[str], None]) -> Soak:
    """Play faults at random for so long, at least until there is something to compare."""
    result = Soak(seed)
    started = time.monotonic()
    tasks_before = len(asyncio.all_tasks())
    deck, dice, memory = _deck(random.Random(seed)), random.Random(seed), _Memory()
    settings = itertools.chain.from_iterable(fault.settings for fault in suitable())
    async with staged(
        binary,
        FSYNC,
        _SIZE,
        seed,
        settings=list(settings),
        preload=preload.missing() is None,
        patience=_SIZE.timeout,
    ) as stage:
        try:
            while time.monotonic() < started + seconds or result.generations <= WARM_UP:
                await _generation(stage, deck, dice, result, memory)
                say(_line(result, time.monotonic() - started))
            result.why += await _leaks(stage)
            memory.compare(result)
        finally:
            tracemalloc.stop()
    left = len(asyncio.all_tasks()) - tasks_before
    if left > 0:
        result.why.append(f"{left} tasks are left after the stores were closed")
    if result.growth() > MAX_GROWTH:
        result.why.append(f"the process has grown by {result.growth():,} bytes")
    if result.own_growth > MAX_OWN_GROWTH:
        result.why.append(f"asyncstore holds {result.own_growth:,} bytes more: {result.top}")
    result.seconds = time.monotonic() - started
    return result


async def _generation(
    stage: Stage, deck: Iterator[Fault], dice: random.Random, result: Soak, memory: _Memory
) -> None:
    history = stage.history = History()
    await prepare(stage.stores[0], history)
    async with load(stage, may_lose=False), _mixed(stage, dice, result):
        for fault in itertools.islice(deck, _FAULTS_A_GENERATION):
            result.faults[fault.name] = result.faults.get(fault.name, 0) + 1
            await play_once(stage, fault)
    async with asyncstore.open(stage.node.url) as direct:
        verdict = await check(direct, history)
        await look_at_the_rest(direct, history, verdict)
        await _erase(direct, history)
    result.acknowledged += verdict.acknowledged
    result.lost += verdict.lost
    result.doubled += verdict.doubled
    result.unknown += verdict.unknown
    result.why += verdict.why
    result.generations += 1
    stage.history = History()
    memory.measure(result)


async def _erase(store: Store, history: History) -> None:
    """Erase all, editions before what they diverge from."""
    places = {attempt.place for attempt in history.attempts} | set(PLACES)
    for place in sorted(places, key=lambda place: place.edition == "main"):
        await store.events.delete(place)


# Other calls


@asynccontextmanager
async def _mixed(stage: Stage, dice: random.Random, result: Soak) -> AsyncIterator[None]:
    """Snapshots, positions and loads go on besides, until the end of the block."""
    stop = asyncio.Event()

    async def mix(store: Store) -> None:
        while not stop.is_set():
            try:
                await _call_something(store, dice)
            except (StoreUnavailable, OutcomeUnknown, StoreFull):
                pass
            except AsyncStoreError as error:
                stage.history.wrong.append(f"{type(error).__name__}: {error}")
            result.calls += 1
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        for number in range(_MIXERS):
            tasks.create_task(mix(stage.stores[number % 2]))
        try:
            yield
        finally:
            stop.set()


async def _call_something(store: Store, dice: random.Random) -> None:
    place, kind = dice.choice(PLACES[:6]), dice.randrange(5)
    if kind == 0:
        end = await store.events.next_sequence(place)
        await store.snapshots.put(place, sequence=end - 1, state={"end": end})
    elif kind == 1:
        end = await store.events.next_sequence(place)
        await store.positions.advance("projector", place, dice.randrange(end))
    elif kind == 2:
        await store.snapshots.get(place)
    elif kind == 3:
        await store.load(place)
    else:
        await store.events.read(place, reverse=True, limit=10)


# What may leak


class _Memory:
    """What the process has in memory, and what the package's own lines hold of it."""

    def __init__(self) -> None:
        self._first: tracemalloc.Snapshot | None = None

    def measure(self, result: Soak) -> None:
        gc.collect()
        _give_back()
        result.memory.append(_resident())
        if result.generations == WARM_UP:
            tracemalloc.start()
            self._first = _own()

    def compare(self, result: Soak) -> None:
        """Hold what is held now against what was held after the warm-up."""
        gc.collect()
        assert self._first is not None
        changes = _own().compare_to(self._first, "lineno")
        result.own_growth = sum(change.size_diff for change in changes)
        result.top = [str(change) for change in changes[:5]]


def _own() -> tracemalloc.Snapshot:
    return tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, _PACKAGE)])


def _give_back() -> None:
    """Have the C library return what it has free: its free lists grow for many minutes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Return the bytes that the process has in memory; the most it ever had, but on Linux."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def _leaks(stage: Stage) -> list[str]:
    """With no load, each store has one connection, and no task but the link's for it."""
    for store in stage.stores:
        await store.events.next_sequence(PLACES[0])

    async def is_alone() -> bool:
        return len(await _clients(stage.node)) == len(stage.stores) + 1  # and the one that asks

    try:
        await eventually(is_alone, "connections were closed")
    except AssertionError:
        clients = await _clients(stage.node)
        return [f"{len(clients) - 1} connections for {len(stage.stores)} stores: {clients}"]
    return []


async def _clients(node: Node) -> list[str]:
    answer: bytes = await node.ask("CLIENT", "LIST", "TYPE", "normal")
    return answer.decode().splitlines()


def _line(result: Soak, seconds: float) -> str:
    return (
        f"{seconds:6.0f} s  generation {result.generations}: {result.acknowledged:,} events, "
        f"{result.lost} lost, {result.doubled} doubled, {len(result.why)} wrong, "
        f"{result.unknown} unknown, {result.memory[-1] >> 20} MiB"
    )
