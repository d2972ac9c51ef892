"""Listening and subscriptions on a cluster whose slots move and whose primaries fail."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio.from_thread
import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    FIRST,
    NEW,
    NOW,
    Aggregate,
    Durability,
    LeaseLost,
    Listener,
    ListenerLagged,
    OutcomeUnknown,
    Start,
    Store,
    StoreUnavailable,
    Subscription,
    embedded_cluster,
    slots,
)
from asyncstore.embedded_cluster import Cluster, Node
from asyncstore.slots import slot_of_tag
from asyncstore.sweeping import Sweeper
from tests.builders import numbered, sequences
from tests.polling import eventually
from tests.test_subscription_faults import Line, wrong

Fault = Callable[[Cluster], Awaitable[set[int]]]

SECONDS = 30
ROOTS = 60
ORDER = Aggregate("orders", "1")


@asynccontextmanager
async def running() -> AsyncIterator[Cluster]:
    """A cluster that a test may break."""
    async with embedded_cluster.running(primaries=3, replicas=1, node_timeout=1.0) as cluster:
        yield cluster


def opened(cluster: Cluster, **options: Any) -> Store:
    return asyncstore.open(urls=cluster.urls[:2], **options)


def ask(node: Node, *words: str | int) -> Any:
    with redis.Redis.from_url(node.url) as client:
        return client.execute_command(*words)


def primaries(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if node.is_primary]


def slots_at(node: Node) -> list[int]:
    spans = ask(node, "CLUSTER", "SLOTS")
    return [s for a, b, (_, port, *_), *_ in spans for s in range(a, b + 1) if port == node.port]


def owner_of(cluster: Cluster, slot: int) -> Node:
    return next(node for node in primaries(cluster) if slot in slots_at(node))


def roots() -> list[str]:
    return [f"r{n}" for n in range(ROOTS)]


# What is done to a cluster. Returned are slots in which what was acknowledged last may be lost.


def move_key_by_key(cluster: Cluster, slots: list[int], source: Node, target: Node) -> None:
    for slot in slots:
        ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        while found := ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 3):
            ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *found)
        others = [node for node in primaries(cluster) if node not in (source, target)]
        for node in (target, source, *others):
            ask(node, "CLUSTER", "SETSLOT", slot, "NODE", target.id)


def move_at_once(slots: list[int], source: Node, target: Node) -> None:
    spans = [word for slot in slots for word in (slot, slot)]
    ask(source, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *spans, "NODE", target.id)
    deadline = time.monotonic() + SECONDS
    while set(slots) & set(slots_at(source)):
        assert time.monotonic() < deadline, ask(source, "CLUSTER", "GETSLOTMIGRATIONS")


async def keys_move(cluster: Cluster) -> set[int]:
    source, target, *_ = primaries(cluster)
    mine = set(slots_at(source))
    slots = sorted({slot_of_tag(root) for root in roots()} & mine)
    await asyncio.to_thread(move_key_by_key, cluster, slots, source, target)
    return set()


async def slots_move(cluster: Cluster) -> set[int]:
    source, target, *_ = primaries(cluster)
    mine = set(slots_at(source))
    slots = sorted({slot_of_tag(root) for root in roots()} & mine)
    await asyncio.to_thread(move_at_once, slots, source, target)
    return set()


async def a_primary_dies(cluster: Cluster) -> set[int]:
    victim = primaries(cluster)[0]
    slots = set(slots_at(victim))
    others = [node for node in cluster.nodes if node is not victim]
    await victim.kill()
    await eventually(lambda: victim.port not in ports_of_primaries(others), "another takes over")
    return slots


async def a_primary_steps_down(cluster: Cluster) -> set[int]:
    replica = next(node for node in cluster.nodes if not node.is_primary)
    await asyncio.to_thread(ask, replica, "CLUSTER", "FAILOVER")
    await eventually(lambda: replica.port in ports_of_primaries(cluster.nodes), "it is promoted")
    return set()


def ports_of_primaries(asked: list[Node]) -> set[int]:
    """The primaries that all of some nodes agree on."""
    views = [{span[2][1] for span in ask(node, "CLUSTER", "SLOTS")} for node in asked]
    return set.union(*views) if all(view == views[0] for view in views) else set()


# Workers, while that happens


class Run:
    """Writers and workers of one handler, and what workers noted."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.last = dict.fromkeys(roots(), -1)
        self.is_over = False

    async def write(self, store: Store, own: list[str]) -> None:
        level = Durability.replicas(1)
        for root in itertools.cycle(own):
            if self.is_over:
                return
            place = Aggregate("orders", root)
            try:
                done = await store.events.append(place, numbered(1), expected=ANY, durability=level)
                self.last[root] = max(self.last[root], done.last_sequence)
            except asyncstore.AsyncStoreError:
                await asyncio.sleep(0.01)

    async def work(self, store: Store) -> None:
        options: Any = {"lease": 0.5, "retries": None, "sweep": 0.5}
        async with store.subscribe("projector", "orders", **options) as sub:
            async for delivery in sub:
                event = delivery.event
                self._note("delivered", event.aggregate.root, event.sequence)
                await asyncio.sleep(random.random() / 200)
                try:
                    await delivery.ack()
                except (LeaseLost, StoreUnavailable, OutcomeUnknown):
                    sub.give_up(delivery)
                    continue
                self._note("acked", event.aggregate.root, event.sequence)

    def _note(self, what: str, root: str, sequence: int) -> None:
        self.lines.append((time.monotonic_ns(), what, root, sequence))

    def acked(self) -> set[tuple[str, int]]:
        return {(root, sequence) for _, what, root, sequence in self.lines if what == "acked"}

    def is_done(self) -> bool:
        return {(root, end) for root, end in self.last.items() if end >= 0} <= self.acked()


FAULTS: list[Fault] = [
    keys_move, slots_move, a_primary_steps_down, a_primary_dies,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_nobody_misses_an_event(fault: Fault) -> None:
    run = Run()
    async with (
        running() as cluster,
        opened(cluster, timeout=3) as store,
        opened(cluster, timeout=3) as other,
    ):
        workers = [asyncio.ensure_future(run.work(one)) for one in (store, store, other, other)]
        writers = [asyncio.ensure_future(run.write(store, roots()[start::6])) for start in range(6)]
        await eventually(lambda: len(run.acked()) > 500, "work is done")
        began = time.monotonic_ns() - 10**9
        may_lose = await fault(cluster)
        ended = time.monotonic_ns()
        done = len(run.acked())
        await eventually(lambda: len(run.acked()) > done + 500, "work goes on")
        run.is_over = True
        await asyncio.gather(*writers)
        await eventually(run.is_done, "all was handled")
        for worker in workers:
            worker.cancel()
        ends = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
        for root in roots():
            assert await store.events.next_sequence(Aggregate("orders", root)) > run.last[root]
    # An ack waits for no replica: where a primary dies, the last ones may have to come again.
    lines = [
        line
        for line in run.lines
        if line[1] != "acked" or not began < line[0] < ended or slot_of_tag(line[2]) not in may_lose
    ]
    assert wrong(lines, run.last) == []


# Listeners


async def heard(live: Listener, count: int) -> list[int]:
    """The next sequences."""
    async with asyncio.timeout(SECONDS):
        return sequences([await anext(live) for _ in range(count)])


async def is_told(live: Listener) -> None:
    """A listener hears that it may have missed something."""
    async with asyncio.timeout(SECONDS):
        with pytest.raises(ListenerLagged) as lagged:
            await anext(live)
    assert lagged.value.missed is None


async def appended_and_heard(store: Store, places: list[Aggregate]) -> bool:
    """Whether a new listener hears what is appended, or is told that it may not have: then again.

    A silence would end in a timeout.
    """
    for _ in range(10):
        with suppress(ListenerLagged):
            async with store.listen("orders") as live:
                done = [await store.events.append(p, numbered(1), expected=ANY) for p in places]
                expected = sorted(one.last_sequence for one in done)
                return sorted(await heard(live, len(places))) == expected
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_listeners_go_along(fault: Fault) -> None:
    async with running() as cluster, opened(cluster) as store:
        source = primaries(cluster)[0]
        mine = set(slots_at(source))
        root = next(root for root in roots() if slot_of_tag(root) in mine)
        place = Aggregate("orders", root)
        other = Aggregate("orders", next(r for r in roots() if slot_of_tag(r) not in mine))
        async with store.listen("orders") as live:
            await store.events.append(place, numbered(2), expected=NEW)
            assert await heard(live, 2) == [0, 1]
            await fault(cluster)
            await is_told(live)
            assert await appended_and_heard(store, [place, other])


async def test_what_is_appended_wakes_a_worker_after_a_move() -> None:
    async with (
        running() as cluster,
        opened(cluster) as store,
        store.subscribe("projector", "orders", sweep=600) as sub,
    ):
        bell = store._doorbell
        await eventually(lambda: not bell._silent, "all is heard")
        for fault in (slots_move, a_primary_steps_down):
            await fault(cluster)
            await asyncio.gather(
                *(
                    store.events.append(Aggregate("orders", root), numbered(1), expected=ANY)
                    for root in roots()
                )
            )
            async with asyncio.timeout(SECONDS):
                for _ in roots():
                    await (await anext(sub)).ack()


# What it costs, and what it leaves


def keys_of(cluster: Cluster, prefix: str) -> set[str]:
    found: set[str] = set()
    for node in primaries(cluster):
        with redis.Redis.from_url(node.url) as client:
            found |= {key.decode() for key in client.scan_iter(match=f"{prefix}*", count=10_000)}
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster that stays as it is."""
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded_cluster.running(node_timeout=30)) as cluster,
    ):
        yield cluster


@pytest.mark.parametrize("start", [FIRST, NOW])
async def test_a_handler_leaves_keys_only_where_something_is(
    cluster: Cluster, prefix: str, start: Start
) -> None:
    async with opened(cluster, key_prefix=prefix) as store:
        for domain in ("orders", None):
            async with store.subscribe("projector", domain, start=start):
                pass
        assert {key.removeprefix(prefix).split(":")[0] for key in keys_of(cluster, prefix)} == {
            "layout", "subscribed", "subscriptions",
        }  # fmt: skip
        before = len(keys_of(cluster, prefix))
        async with store.subscribe("projector", "orders", start=start) as sub:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            async with asyncio.timeout(SECONDS):
                await (await anext(sub)).ack()
        assert len(keys_of(cluster, prefix)) - before < 12


async def test_a_silent_primary_keeps_nobody_from_the_others(cluster: Cluster, prefix: str) -> None:
    places = [Aggregate("orders", f"{n}") for n in range(300)]
    acked: set[Aggregate] = set()

    async def work(sub: Subscription) -> None:
        async for delivery in sub:
            with suppress(StoreUnavailable, OutcomeUnknown, LeaseLost):
                await delivery.ack()
                acked.add(delivery.event.aggregate)

    async with opened(cluster, key_prefix=prefix, timeout=5) as store:
        for place in places:
            await store.events.append(place, numbered(1), expected=NEW)
        sub = store.subscribe("projector", "orders", sweep=0.1, lease=0.3)
        async with sub, asyncio.TaskGroup() as tasks:
            await eventually(lambda: len(sub._worker._ready) > 10, "it has leased some")
            # The one that is looked at now: much of it is still to be looked at.
            silent = owner_of(cluster, slot_of_tag(sub._worker._ready[-1].aggregate.root))
            mine = set(slots_at(silent))
            others = {place for place in places if slot_of_tag(place.root) not in mine}
            await silent.pause()
            try:
                began = time.monotonic()
                for _ in places:  # who got something of the silent one is stuck with it
                    tasks.create_task(work(sub))
                await eventually(lambda: acked >= others, "the others are handled")
                assert time.monotonic() - began < 3
            finally:
                await silent.resume()
            await eventually(lambda: acked >= set(places), "all are handled")
            sub.stop()


async def test_idle_subscriptions_cost_next_to_nothing(
    cluster: Cluster, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0  # slots, by all sweeps
    read = Sweeper._read

    async def counted(sweeper: Sweeper, node: Any, places: list[int]) -> None:
        nonlocal asked
        asked += len(places)
        await read(sweeper, node, places)

    monkeypatch.setattr(Sweeper, "_read", counted)
    async with opened(cluster, key_prefix=prefix) as store, AsyncExitStack() as stack:
        for n in range(10):
            await stack.enter_async_context(store.subscribe(f"h{n}", "orders", sweep=0.5))
        await eventually(lambda: not store._doorbell._silent, "all is heard")
        await eventually(lambda: asked > 2 * slots.COUNT, "what comes first is done")
        began, before, asked_before = time.monotonic(), commands(cluster), asked
        await eventually(lambda: asked > asked_before + 3 * slots.COUNT, "there are more sweeps")
        done, seconds = commands(cluster) - before, time.monotonic() - began
    # A sweep asks once for each slot, however many subscriptions there are; one may be under way.
    assert asked - asked_before <= (2 * seconds + 2) * slots.COUNT
    assert done < asked - asked_before + slots.COUNT + 1_000


def commands(cluster: Cluster) -> int:
    return sum(ask(node, "INFO")["total_commands_processed"] for node in primaries(cluster))
