"""Subscriptions when things break: nobody misses an event, and order per aggregate holds."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    RecordedEvent,
    Store,
    UnexpectedReply,
    doorbell,
    embedded,
    feeding,
    running,
)
from asyncstore.keys import TYPES
from asyncstore.testing import FaultProxy
from tests.builders import numbered
from tests.faults import preload
from tests.faults.handling import CROWDS, Crowd, Workers, play_crowd, starved
from tests.faults.handling import Line as Line  # others look for it here
from tests.faults.handling import wrong as wrong
from tests.faults.stage import SHORT
from tests.faults.worker import HANDLER
from tests.polling import eventually
from tests.proxy import proxy_to
from tests.servers import Server, as_user, redis_server

VALKEY = str(embedded.find_binary())
ROOTS, EVENTS, WORKERS, KILLS = 60, 30, 3, 8
SECONDS = 60
UNSETTLED = 4  # acks of a handler that may get no answer

# The laws


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([(1, "delivered", "a", 0), (2, "acked", "a", 0), (3, "delivered", "a", 1)], []),
        ([(1, "delivered", "a", 0), (3, "delivered", "a", 0), (4, "delivered", "a", 1)], []),
        ([(1, "delivered", "a", 1), (2, "delivered", "a", 0)], ["before the one before it"]),
        ([(1, "delivered", "a", 0)], ["a 1 never came"]),
        (
            [(1, "delivered", "a", 0), (2, "acked", "a", 0), (3, "delivered", "a", 0)],
            ["again after its ack", "a 1 never came"],
        ),
    ],
)
def test_the_laws_can_be_broken(lines: list[Line], says: list[str]) -> None:
    found = wrong(lines, {"a": 1})
    assert len(found) == len(says)
    assert all(part in text for part, text in zip(says, found, strict=True))


@pytest.mark.parametrize(
    ("before", "seconds", "gone", "is_seen"),
    [
        (3, 9, "", 0),
        (2000, 9, "", 1),
        (2000, 0.5, "", 1),
        (2000, 0.5, "killed", 0),
        (2000, 0.5, "blocked", 0),
        (2000, 9, "killed", 1),
    ],
)
def test_who_starves_is_seen(before: int, seconds: float, gone: str, is_seen: int) -> None:
    moment = int(seconds * 1e9)
    lines = [(n, "delivered", "large", n) for n in range(before)]
    lines += [(moment, gone, "", 0)] if gone else []
    lines += [(moment + n, "delivered", f"{n}", 0) for n in range(200)]
    assert len(starved(lines, "large", 200)) == is_seen


# Workers


@pytest.mark.parametrize("crowd", CROWDS, ids=lambda crowd: crowd.name)
async def test_workers_that_are_killed_and_misbehave(crowd: Crowd) -> None:
    row = await play_crowd(crowd, "Valkey", VALKEY, SHORT, 20)
    assert row.why == []
    assert row.acknowledged > 200


async def test_those_that_waited_behind_a_killer_come_before_it(
    one_server: Server, prefix: str
) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        for root in "abcde":
            await store.events.append(Aggregate("orders", root), numbered(1), expected=NEW)

        async def killed_after(count: int) -> list[str]:
            """What a worker gets that is gone then: nothing is acked or given back."""
            sub = store.subscribe("projector", "orders", retries=1, lease=0.5, sweep=0.05)
            await sub.__aenter__()
            async with asyncio.timeout(SECONDS):
                held = [await anext(sub) for _ in range(count)]
            for task in sub._worker._tasks:
                task.cancel()
            await asyncio.gather(*sub._worker._tasks, return_exceptions=True)
            return [delivery.event.aggregate.root for delivery in held]

        (killer,) = await killed_after(1)
        *others, last = await killed_after(5)
    assert (last, sorted([killer, *others])) == (killer, list("abcde"))


async def test_workers_that_are_killed(one_server: Server, prefix: str, tmp_path: Path) -> None:
    dice = random.Random(11)
    workers = Workers(one_server.url, prefix, tmp_path)
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        for _ in range(WORKERS):
            workers.start()
        try:
            writing = asyncio.ensure_future(write(store))
            for number in range(KILLS):
                count = (number + 1) * ROOTS * EVENTS // (KILLS + 2)
                await eventually(lambda: len(workers.lines()) > count, "work goes on")  # noqa: B023
                workers.kill(dice.randrange(WORKERS))
                workers.start()
            await writing
            await store.subscriptions.wait_until_caught_up(HANDLER, "orders", timeout=SECONDS)
        finally:
            while workers.running:
                workers.kill(0)
    lines = workers.lines()
    assert wrong(lines, {f"r{n}": EVENTS - 1 for n in range(ROOTS)}) == []
    assert sum(line[1] == "delivered" for line in lines) < ROOTS * EVENTS + 20 * KILLS


@pytest.mark.skipif(preload.missing() is not None, reason=str(preload.missing()))
async def test_workers_whose_clocks_are_a_minute_apart(
    one_server: Server, prefix: str, tmp_path: Path
) -> None:
    """Leases are much shorter than that: by a worker's clock they would end at once, or never."""
    clocks = [with_clock(tmp_path / f"{seconds}", seconds) for seconds in (-60, 0, 60)]
    assert time_under(clocks[2]) - time_under(clocks[0]) > 90
    workers = Workers(one_server.url, prefix, tmp_path)
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        for clock in clocks:
            workers.start(clock)
        try:
            writing = asyncio.ensure_future(write(store))
            for number, clock in enumerate(clocks):  # each gives up its leases once
                count = (number + 1) * ROOTS * EVENTS // 5
                await eventually(lambda: len(workers.lines()) > count, "work goes on")  # noqa: B023
                workers.kill(0)
                workers.start(clock)
            await writing
            await store.subscriptions.wait_until_caught_up(HANDLER, "orders", timeout=SECONDS)
        finally:
            while workers.running:
                workers.kill(0)
    lines = workers.lines()
    assert wrong(lines, {f"r{n}": EVENTS - 1 for n in range(ROOTS)}) == []
    assert sum(line[1] == "delivered" for line in lines) < ROOTS * EVENTS + 20 * len(clocks)


def with_clock(directory: Path, seconds: int) -> dict[str, str]:
    """Return the environment of a process whose clock is wrong by so much."""
    directory.mkdir()
    library = preload.Preload.build(directory)
    library.tell(clock=seconds)
    return library.environment()


def time_under(environment: dict[str, str]) -> float:
    """Return what a process takes the time for."""
    command = [sys.executable, "-c", "import time; print(time.time())"]
    return float(subprocess.check_output(command, env={**os.environ, **environment}))


async def write(store: Store) -> None:
    async def one(root: str) -> None:
        for n in range(EVENTS):
            await store.events.append(Aggregate("orders", root), numbered(1, n), expected=n)
            await asyncio.sleep(0.02)

    await asyncio.gather(*(one(f"r{n}") for n in range(ROOTS)))


# The server and its connections


async def test_a_server_that_is_killed_and_comes_back() -> None:
    with redis_server(VALKEY, "--appendonly", "yes", "--appendfsync", "always") as server:
        seen = [0] * ROOTS
        async with (
            asyncstore.open(server.url) as store,
            store.subscribe(HANDLER, "orders", lease=2, sweep=0.1) as sub,
        ):

            async def work() -> None:
                async for delivery in sub:
                    n = int(delivery.event.aggregate.root)
                    assert delivery.event.sequence in (seen[n] - 1, seen[n])
                    seen[n] = delivery.event.sequence + 1
                    await delivery.ack()

            async def append(n: int, first: int) -> None:
                for sequence in range(first, first + 10):
                    place = Aggregate("orders", f"{n}")
                    await store.events.append(place, numbered(1), expected=sequence)

            working = asyncio.ensure_future(work())
            for first in (0, 10):
                writing = asyncio.gather(*(append(n, first) for n in range(ROOTS)))
                await eventually(lambda: sum(seen) > first * ROOTS + 50, "work goes on")  # noqa: B023
                server.stop()
                server.start()
                await writing
            await eventually(lambda: seen == [20] * ROOTS, "all has come")
        await working


async def test_handlers_wait_for_a_server_whose_memory_is_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said() -> list[str]:
        waits = "can't settle an event yet"
        return [record.levelname for record in caplog.records if waits in record.getMessage()]

    caplog.set_level("DEBUG", "asyncstore.running")
    place = Aggregate("orders", "1")
    with redis_server(VALKEY) as server, redis.Redis.from_url(server.url) as client:
        async with asyncstore.open(server.url) as store:

            @store.handler(HANDLER, "orders")
            async def fill_up(event: RecordedEvent) -> None:
                client.config_set("maxmemory", 1)

            task = asyncio.ensure_future(store.run_handlers())
            await store.events.append(place, numbered(1), expected=NEW)
            await eventually(lambda: len(said()) > 2, "it has tried again and again")
            assert said() == ["WARNING"] + ["DEBUG"] * (len(said()) - 1)
            client.config_set("maxmemory", 0)
            await store.positions.wait(HANDLER, place, 0, timeout=SECONDS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


@dataclass
class Ahead:
    """A handler that has gone on as far as it may while its acks get no answer."""

    store: Store
    proxy: FaultProxy
    function: Callable[[], None]
    seen: list[Aggregate] = field(default_factory=list)
    running: asyncio.Task[None] = field(init=False)

    async def handle(self, event: RecordedEvent) -> None:
        self.function()
        self.seen.append(event.aggregate)

    async def turns(self) -> None:
        """Give it time to do what it should not."""
        for _ in range(100):
            await asyncio.sleep(0)

    async def is_recorded(self, place: Aggregate) -> bool:
        return await self.store.positions.get(HANDLER, place) == 0


@pytest.fixture
async def ahead(
    one_server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Ahead]:
    monkeypatch.setattr(running, "_MOST_UNSETTLED", UNSETTLED)
    async with (
        asyncstore.open(one_server.url, key_prefix=prefix) as store,
        proxy_to(Path(urlsplit(one_server.url).path)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.5) as slow,
    ):
        for n in range(3 * UNSETTLED):
            await store.events.append(Aggregate("orders", f"{n}"), numbered(2), expected=NEW)
        ahead = Ahead(store, proxy, proxy.replies.hold)
        slow.handler(HANDLER, "orders", concurrency=1)(ahead.handle)
        ahead.running = asyncio.create_task(slow.run_handlers())
        await eventually(lambda: len(ahead.seen) > UNSETTLED, "it goes on")
        yield ahead
        proxy.release()
        ahead.running.cancel()
        await asyncio.wait([ahead.running])


async def test_so_much_is_handled_ahead_of_the_answers_to_acks(ahead: Ahead) -> None:
    await ahead.turns()
    assert len(ahead.seen) == len(set(ahead.seen)) == 1 + UNSETTLED


async def test_functions_that_only_compute_let_others_run(ahead: Ahead) -> None:
    turn, turns = 0, Counter[int]()

    def compute() -> None:
        turns[turn] += 1
        ends = time.perf_counter() + 2 * running._LONGEST_TURN
        while time.perf_counter() < ends:
            pass

    ahead.function = compute
    ahead.proxy.release()  # all acks are answered in one turn of the event loop
    async with asyncio.timeout(SECONDS):
        while turns.total() < UNSETTLED:
            turn += 1
            await asyncio.sleep(0)
    assert max(turns.values()) <= 2  # where the time of one turn ends, and that of the next begins


async def test_handlers_that_are_stopped_wait_for_the_answers_to_acks(ahead: Ahead) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await ahead.turns()
    assert not ahead.running.done()
    ahead.proxy.release()
    async with asyncio.timeout(SECONDS):
        await ahead.running
    assert len(ahead.seen) == 1 + UNSETTLED
    assert all([await ahead.is_recorded(place) for place in ahead.seen])


async def test_handlers_that_are_cancelled_leave_no_ack_behind(
    ahead: Ahead, caplog: pytest.LogCaptureFixture
) -> None:
    ahead.running.cancel()
    async with asyncio.timeout(5):  # half of what leaving waits for what is in progress
        with pytest.raises(asyncio.CancelledError):
            await ahead.running
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert not [task for task in asyncio.all_tasks() if running.__file__ in repr(task)]


async def test_leases_that_are_refused_are_told_and_tried_again() -> None:
    readable = [f"~test-1:{word}:*" for word in TYPES if word != "dead-letters"]
    with redis_server(VALKEY) as server, redis.Redis.from_url(server.url) as admin:
        async with asyncstore.open(as_user(server.url), key_prefix="test-1:") as store:
            order = Aggregate("orders", "o")
            async with asyncio.timeout(SECONDS), store.subscribe(HANDLER, "orders") as sub:
                admin.execute_command("ACL", "SETUSER", "app", "resetkeys", *readable)
                await store.events.append(order, numbered(1), expected=NEW)
                for _ in range(3):
                    sub._worker._look_by(order, 0)  # which is granted, and no reason to hurry
                    with pytest.raises(UnexpectedReply, match="NOPERM"):
                        await anext(sub)
                (feeder,) = sub._worker._feeders.values()
                assert feeder._pause == 4 * feeding._FIRST_PAUSE
                admin.execute_command("ACL", "SETUSER", "app", "~test-1:*")
                while True:
                    with contextlib.suppress(UnexpectedReply):  # those that were refused before
                        delivery = await anext(sub)
                        break
                assert (delivery.event.sequence, delivery.attempt) == (0, 1)
                await delivery.ack()


async def test_leaving_waits_for_no_later_look_at_a_server_that_has_left(
    one_server: Server, prefix: str
) -> None:
    order = Aggregate("orders", "o")
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        async with store.subscribe(HANDLER, "orders", close_timeout=10) as sub:
            sub._worker._look_by(order, 0)
            ((node, feeder),) = sub._worker._feeders.items()
            await eventually(lambda: math.isinf(feeder._agenda.next_moment()), "it has looked")
            sub._worker._look_by(order, SECONDS)
            del sub._worker._feeders[node]
            sub._worker._feeders[copy.copy(node)] = feeder  # as of one that is none of the nodes
            sub._worker._look_by(order, SECONDS)
            assert feeder._is_retired
            await eventually(lambda: not feeder._wake.is_set(), "it waits for that moment")
            left = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - left < 5


async def test_without_hearing_anything() -> None:
    with redis_server(VALKEY) as server:
        with redis.Redis.from_url(server.url) as client:
            client.acl_setuser("mute", enabled=True, nopass=True, keys="*", categories=["+@all"])
        async with (
            asyncstore.open(server.url.replace("://", "://mute:x@", 1)) as store,
            store.subscribe(HANDLER, "orders", sweep=0.05) as sub,
        ):
            for n in range(20):
                await store.events.append(Aggregate("orders", f"{n}"), numbered(2), expected=NEW)
            async with asyncio.timeout(SECONDS):
                for _ in range(40):
                    await (await anext(sub)).ack()


async def test_a_half_open_doorbell(
    one_server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "_HEARTBEAT", 0.05)
    place = Aggregate("orders", "1")
    async with (
        asyncstore.open(one_server.url, key_prefix=prefix) as writer,
        proxy_to(Path(urlsplit(one_server.url).path)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.5) as store,
        store.subscribe(HANDLER, "orders", sweep=600) as sub,
    ):
        await writer.events.append(place, numbered(1), expected=NEW)
        async with asyncio.timeout(SECONDS):
            await (await anext(sub)).ack()
            proxy.replies.swallow()
            await writer.events.append(place, numbered(1, 1), expected=1)
            before = proxy.connections
            await eventually(lambda: proxy.connections > before, "it is dialled again")
            proxy.replies.pass_on()
            await (await anext(sub)).ack()  # though no sweep was due: it looks when it is back


async def test_lost_replies(one_server: Server, prefix: str) -> None:
    seen: defaultdict[str, list[int]] = defaultdict(list)
    async with (
        asyncstore.open(one_server.url, key_prefix=prefix) as writer,
        proxy_to(Path(urlsplit(one_server.url).path)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
        store.subscribe(HANDLER, "orders", sweep=0.1) as sub,
    ):
        places = [Aggregate("orders", f"r{n}") for n in range(20)]
        await asyncio.gather(*(writer.events.append(p, numbered(10), expected=ANY) for p in places))
        proxy.replies.cut_at_random(0.05)
        async with asyncio.timeout(SECONDS):
            while sum(map(len, seen.values())) < 200:
                delivery = await anext(sub)
                await delivery.ack()
                seen[delivery.event.aggregate.root].append(delivery.event.sequence)
        assert proxy.cuts > 5
        proxy.replies.mend()
    assert all(found == list(range(10)) for found in seen.values())


# Many, and large


async def test_many_aggregates_of_one_event(one_server: Server, prefix: str) -> None:
    count = 20_000
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        for first in range(0, count, 1000):
            places = [Aggregate("orders", f"{n}") for n in range(first, first + 1000)]
            await asyncio.gather(
                *(store.events.append(place, numbered(1), expected=NEW) for place in places)
            )
        seen: set[str] = set()
        async with asyncio.timeout(SECONDS), store.subscribe(HANDLER, "orders") as sub:
            for _ in range(count):
                delivery = await anext(sub)
                seen.add(delivery.event.aggregate.root)
                await delivery.ack()
        assert len(seen) == count
        (status,) = await store.subscriptions.status()
        assert status.events_behind == 0
        await store.events.delete_edition("orders", "other")


async def test_small_ones_do_not_starve_beside_a_large_one(one_server: Server, prefix: str) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        large = Aggregate("orders", "large")
        for n in range(4):
            await store.events.append(large, numbered(5000), expected=n * 5000)
        small = [Aggregate("orders", f"{n}") for n in range(300)]
        await asyncio.gather(*(store.events.append(p, numbered(1), expected=NEW) for p in small))
        left, of_large = {place.root for place in small}, 0
        async with asyncio.timeout(SECONDS), store.subscribe(HANDLER, "orders") as sub:
            while left:
                delivery = await anext(sub)
                left.discard(delivery.event.aggregate.root)
                of_large += delivery.event.aggregate == large
                await delivery.ack()
        assert of_large < 600


def test_time_is_shared_by_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import time; print(time.monotonic_ns())"],
        capture_output=True,
        check=True,
    )
    assert abs(time.monotonic_ns() - int(done.stdout)) < 10e9
