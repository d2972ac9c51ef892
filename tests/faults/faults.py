"""The faults. Each is a function that strikes once and mends, and an entry in the list below."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import redis

from asyncstore import Aggregate, Appended
from asyncstore.testing import Cut, Way
from tests.faults import preload
from tests.faults.history import Attempt
from tests.faults.stage import EVERYSEC, FSYNC, MEMORY, REPLICA, Level, Node, Stage, follow
from tests.polling import eventually

Strike = Callable[[Stage], Awaitable[None]]

_CUT_ODDS = 0.3  # of a chunk to be the one at which a connection is cut
_CUTS = 10
_SLOW_SECONDS = 0.03
_HOUR = 3600
_IMPORTED = 9000
_IMPORTED_ROOTS = 20


@dataclass(frozen=True)
class Fault:
    """One thing that can happen, and what it may cost.

    `strike` plays it once, under load, and mends it. `may_lose`: the level is weaker than the
    fault, so acknowledged events at the end of a stream may be gone, and are counted.
    `is_short_of_time`: calls have the size's timeout, so that they run into it.
    """

    name: str
    strike: Strike
    level: Level = MEMORY
    may_lose: bool = False
    settings: tuple[str, ...] = ()
    replica: bool = False
    preload: bool = False
    is_short_of_time: bool = False
    once: bool = False  # it takes long, and is not repeated
    is_of_the_server: bool = False  # servers may differ, so it is played on each

    def missing(self) -> str | None:
        """Say why it can't be played on this machine; None if it can."""
        return preload.missing() if self.preload else None


# The server


async def kill_server(stage: Stage) -> None:
    stage.node.kill()
    stage.node.start()
    stage.history.mended()
    await stage.node.ready()


async def cut_power(stage: Stage) -> None:
    node = stage.node
    assert node.preload is not None
    node.kill()
    node.preload.lose_power(node.directory)
    node.start()
    stage.history.mended()
    await node.ready()


async def fill_memory(stage: Stage) -> None:
    used = (await stage.node.info("memory"))["used_memory"]
    await stage.node.ask("CONFIG", "SET", "maxmemory", used + 100_000)
    await stage.until_error("StoreFull")
    await stage.read_more()
    await stage.node.ask("CONFIG", "SET", "maxmemory", 0)


async def fill_disk(stage: Stage) -> None:
    """With `everysec` the server refuses changes until there is room."""
    assert stage.node.preload is not None
    stage.node.preload.tell(disk_full=True)
    await stage.until_error("StoreUnavailable: it can't write to its disk")
    await stage.read_more()
    stage.node.preload.tell()


async def fill_disk_always(stage: Stage) -> None:
    """With `always` the server ends, and has to be started again."""
    assert stage.node.preload is not None
    stage.node.preload.tell(disk_full=True)
    await stage.until(stage.node.has_ended, "the server ended")
    stage.node.preload.tell()
    stage.node.start()
    stage.history.mended()
    await stage.node.ready()


async def restart_with_much_to_load(stage: Stage) -> None:
    """Give the server much to load, kill it, and see it load while they write."""
    await _write_much(stage)
    await _compact(stage.node)
    # Slow at first: what there is to load may be little, and has to be seen being loaded.
    stage.node.settings += ["--key-load-delay", f"{10 * stage.size.load_delay}"]
    stage.node.kill()
    stage.node.start()
    stage.history.mended()
    await eventually(partial(_is_loading, stage.node), "the server was loading")
    await stage.node.ask("CONFIG", "SET", "key-load-delay", stage.size.load_delay)
    await stage.node.ready()


async def _compact(node: Node) -> None:
    """Have the append-only file rewritten: its new form is what answers best while it is loaded."""
    await node.ask("BGREWRITEAOF")

    async def is_compact() -> bool:
        state = await node.info("persistence")
        return not (state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])

    await eventually(is_compact, "the append-only file was rewritten")


async def _write_much(stage: Stage) -> None:
    """Write, as one more writer, the events that are to be loaded; they are checked, too."""
    batch = 500
    for _ in range(stage.size.events // batch):
        attempt = stage.history.begin(Aggregate("ledgers", "much"), batch, 1000, None)
        done = await stage.stores[0].events.append(
            attempt.place, attempt.events(), expected=_end_of_much(stage), **stage.level.options
        )
        stage.history.acknowledge(attempt, done)


def _end_of_much(stage: Stage) -> int:
    """Return where the ledger goes on: it has one writer."""
    for attempt in reversed(stage.history.attempts[:-1]):
        if attempt.place.domain == "ledgers":
            return attempt.first + len(attempt.ids)
    return 0


async def _is_loading(node: Node) -> bool:
    try:
        return bool((await node.info("persistence"))["loading"] == 1)
    except redis.BusyLoadingError:
        return True
    except redis.ConnectionError:
        return False


async def keep_busy(stage: Stage) -> None:
    """Somebody else's script runs without end, until an operator stops it."""
    with stage.node.client() as client:
        running = asyncio.create_task(
            asyncio.to_thread(client.execute_command, "EVAL", "while true do end", 0)
        )
        await stage.until_error("StoreUnavailable: another client's script")
        await stage.node.ask("SCRIPT", "KILL")
        with contextlib.suppress(redis.ResponseError):
            await running


async def kill_clients(stage: Stage) -> None:
    wanted = stage.history.acknowledged + stage.size.appends
    while stage.history.acknowledged < wanted:
        await stage.node.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await stage.more(20)


async def flush_scripts(stage: Stage) -> None:
    wanted = stage.history.acknowledged + stage.size.appends
    while stage.history.acknowledged < wanted:
        await stage.node.ask("SCRIPT", "FLUSH")


async def put_clock_back(stage: Stage) -> None:
    """The server's clock jumps an hour back, and later on again; recorded times do not."""
    assert stage.node.preload is not None
    place = Aggregate("clocks", f"{uuid.uuid4()}")
    await _write_one(stage, place)
    stage.node.preload.tell(clock=-_HOUR)
    await _write_one(stage, place)
    await stage.more()
    await _write_one(stage, place)
    stage.node.preload.tell()
    times = [event.time for event in await stage.stores[0].events.read(place)]
    if times != sorted(times):
        stage.history.wrong.append(f"{place}: its times run back: {times}")


async def _write_one(stage: Stage, place: Aggregate) -> None:
    attempt = stage.history.begin(place, 1, 1001, None)
    end = await stage.stores[0].events.next_sequence(place)
    done = await stage.stores[0].events.append(place, attempt.events(), expected=end)
    stage.history.acknowledge(attempt, done)


# The link


def _cut(choose: Callable[[Stage], Way], how: Cut) -> Strike:
    async def strike(stage: Stage) -> None:
        way, wanted = choose(stage), stage.link.cuts + _CUTS
        way.cut_at_random(_CUT_ODDS, how)
        await stage.until(lambda: stage.link.cuts >= wanted, "connections were cut")
        way.mend()

    return strike


def _requests(stage: Stage) -> Way:
    return stage.link.requests


def _replies(stage: Stage) -> Way:
    return stage.link.replies


def _hold(*ways: Callable[[Stage], Way]) -> Strike:
    """What is under way is held, longer than calls wait, and then arrives."""

    async def strike(stage: Stage) -> None:
        for way in ways:
            way(stage).hold()
        await stage.until_error("OutcomeUnknown", 1)
        await stage.until_error("StoreUnavailable", 1)
        stage.link.release()

    return strike


async def fall_silent(stage: Stage) -> None:
    stage.link.hold()
    await asyncio.sleep(stage.size.silence)  # the fault itself, which has a length
    stage.link.release()


async def slow_down(stage: Stage) -> None:
    for way in (stage.link.requests, stage.link.replies):
        way.delay = _SLOW_SECONDS
    await stage.more(100)
    for way in (stage.link.requests, stage.link.replies):
        way.delay = 0.0


async def chop(stage: Stage) -> None:
    """Every byte is a packet of its own."""
    for way in (stage.link.requests, stage.link.replies):
        way.piece = 1
    await stage.more(100)
    for way in (stage.link.requests, stage.link.replies):
        way.piece = 0


# The replica


async def fail_over(stage: Stage) -> None:
    """The primary dies and its replica takes its place; then the dead one comes back as replica."""
    stage.node.kill()
    await _promote(stage)
    await stage.more()
    await _restart_as_replica(stage)


async def fail_over_and_follow(stage: Stage) -> None:
    """The primary dies, its replica takes its place, and the dead one comes back to follow it."""
    stage.node.kill()
    await _promote(stage)
    await _restart_as_replica(stage)
    await stage.more()


async def fail_over_cut_off(stage: Stage) -> None:
    """The same, but the replica has heard nothing of the last appends."""
    stage.replication.replies.hold()
    await stage.more()
    stage.node.kill()
    await _promote(stage)
    stage.replication.release()
    await stage.more()
    await _restart_as_replica(stage)


async def come_back_stale(stage: Stage) -> None:
    """A replica is promoted while the primary lives on, and all still write there."""
    await _spare(stage).ask("REPLICAOF", "NO", "ONE")
    await stage.more()  # on the old one, which nobody follows any more
    await _promote(stage)
    await stage.more()
    await follow(_spare(stage), stage.node, stage.replication)


async def send_to_replica(stage: Stage) -> None:
    """The address leads to the replica, which is none that takes changes, and back."""
    stage.link.switch(f"unix://{_spare(stage).socket}")
    await stage.until_error("StoreUnavailable: it is a replica")
    stage.link.switch(f"unix://{stage.node.socket}")


def _spare(stage: Stage) -> Node:
    assert stage.spare is not None
    return stage.spare


async def _promote(stage: Stage) -> None:
    """Let the replica serve, at the same address."""
    old, new = stage.node, _spare(stage)
    await new.ask("REPLICAOF", "NO", "ONE")
    stage.link.switch(f"unix://{new.socket}")
    stage.history.mended()
    stage.node, stage.spare = new, old


async def _restart_as_replica(stage: Stage) -> None:
    spare = _spare(stage)
    spare.start()
    await spare.ready()
    await follow(spare, stage.node, stage.replication)


# The application


async def kill_import(stage: Stage) -> None:
    """`asyncstore import` is killed in the middle, twice, and then completes."""
    domain = f"imported-{uuid.uuid4().hex}"
    places = [Aggregate(domain, f"{n}") for n in range(_IMPORTED_ROOTS)]
    attempts = [
        stage.history.begin(place, 1, 1002, None)
        for _ in range(_IMPORTED // _IMPORTED_ROOTS)
        for place in places
    ]
    lines = [_line_of(attempt) for attempt in attempts]
    for part in (1, 2):
        # The pipe stays open, so the import is in the middle of its file when it is killed.
        begun = b"".join(lines[: part * len(lines) // 3])
        await _import(stage, begun, places[-1], (part - 1) * len(attempts) // 4)
    assert await _import(stage, b"".join(lines), None, 0) == 0
    for number, attempt in enumerate(attempts):
        sequence = number // _IMPORTED_ROOTS
        stage.history.acknowledge(attempt, Appended(sequence, sequence))


def _line_of(attempt: Attempt) -> bytes:
    (event,) = attempt.events()
    place = {"domain": attempt.place.domain, "root": attempt.place.root}
    line = {**place, "type": event.type, "id": str(event.id), "data": event.data}
    return json.dumps(line).encode() + b"\n"


async def _import(stage: Stage, text: bytes, place: Aggregate | None, until: int) -> int:
    """Run an import; with a place, kill it when it has more events. Return how it ended."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "asyncstore", "import", "-", "--url", stage.link.url),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(text)
    if place is None:
        process.stdin.close()
        return await process.wait()

    async def is_far_enough() -> bool:
        return await stage.stores[0].events.next_sequence(place) > until / _IMPORTED_ROOTS

    await eventually(is_far_enough, "the import came so far")
    process.kill()
    ended = await process.wait()
    process.stdin.close()
    return ended


_BUSY = ("--busy-reply-threshold", "50")
_TALKATIVE = ("--loading-process-events-interval-bytes", "4096")  # answers while it loads

FAULTS = [
    Fault("kill -9, no AOF", kill_server, MEMORY, may_lose=True, is_of_the_server=True),
    Fault("kill -9, everysec", kill_server, EVERYSEC, may_lose=True, is_of_the_server=True),
    Fault("kill -9, always", kill_server, FSYNC, is_of_the_server=True),
    Fault(
        "power cut, everysec",
        cut_power,
        EVERYSEC,
        may_lose=True,
        preload=True,
        is_of_the_server=True,
    ),
    Fault("power cut, always", cut_power, FSYNC, preload=True, is_of_the_server=True),
    Fault("cut before a request", _cut(_requests, Cut.BEFORE)),
    Fault("cut in a request", _cut(_requests, Cut.IN)),
    Fault("cut after a request", _cut(_requests, Cut.AFTER)),
    Fault("cut before a reply", _cut(_replies, Cut.BEFORE)),
    Fault("cut in a reply", _cut(_replies, Cut.IN)),
    Fault("cut after a reply", _cut(_replies, Cut.AFTER)),
    Fault("half-open, requests held", _hold(_requests), is_short_of_time=True),
    Fault("half-open, replies held", _hold(_replies), is_short_of_time=True),
    Fault("slow link", slow_down),
    Fault("silence", fall_silent, is_short_of_time=True, once=True),
    Fault("one byte at a time", chop),
    Fault("failover", fail_over, may_lose=True, replica=True, is_of_the_server=True),
    Fault("failover, followed", fail_over_and_follow, REPLICA, replica=True, is_of_the_server=True),
    Fault(
        "failover, replica cut off",
        fail_over_cut_off,
        may_lose=True,
        replica=True,
        is_of_the_server=True,
    ),
    Fault("stale primary", come_back_stale, may_lose=True, replica=True),
    Fault("READONLY replica", send_to_replica, replica=True),
    Fault("maxmemory", fill_memory, is_of_the_server=True),
    Fault("disk full, everysec", fill_disk, EVERYSEC, preload=True, is_of_the_server=True),
    Fault("disk full, always", fill_disk_always, FSYNC, preload=True, is_of_the_server=True),
    Fault(
        "LOADING",
        restart_with_much_to_load,
        FSYNC,
        settings=_TALKATIVE,
        once=True,
        is_of_the_server=True,
    ),
    Fault("busy server", keep_busy, settings=_BUSY, is_of_the_server=True),
    Fault("CLIENT KILL storm", kill_clients),
    Fault("SCRIPT FLUSH", flush_scripts),
    Fault("import killed", kill_import, once=True),
    Fault("clock back an hour", put_clock_back, preload=True),
]
