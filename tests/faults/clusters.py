"""The faults of clusters: 3 primaries with a replica each, and writers on the slots of all."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from asyncio import gather
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncstore
from asyncstore import Aggregate, embedded_cluster
from asyncstore.embedded_cluster import Cluster, Node
from asyncstore.slots import slot_of_tag
from tests.faults import bus
from tests.faults.admin import move_at_once, move_by_keys, owners, promote, replica_of, tell
from tests.faults.bus import Bus, bus_of
from tests.faults.checker import check
from tests.faults.history import History, prepare
from tests.faults.run import Row, load, look_at_the_rest, row_of
from tests.faults.stage import FSYNC, MEMORY, REPLICA, Level, Scene, Size
from tests.polling import eventually

_NODE_TIMEOUT = 1.0  # seconds after which the nodes replace a primary
_ROOTS = 48
_BRANCHES = 8
_CUTS = 10


@dataclass(kw_only=True)
class ClusterStage(Scene):
    """All that a fault may touch. `struck` are the places whose node it is."""

    cluster: Cluster
    bus: Bus | None
    struck: set[Aggregate] = field(default_factory=set)

    async def primaries(self) -> dict[Node, list[int]]:
        """Return the primaries, those first that have most of the places, and their slots."""
        found = await owners(self.cluster.nodes[0], self.cluster.nodes)
        return dict(sorted(found.items(), key=lambda item: -len(self.places_in(item[1]))))

    def places_in(self, slots: Iterable[int]) -> list[Aggregate]:
        those = set(slots)
        return [place for place in self.history.places if slot_of_tag(place.root) in those]

    async def choose(self) -> Node:
        """Choose a primary to strike, and note which places are its."""
        found = await self.primaries()
        node = self.dice.choice(sorted(found, key=lambda node: node.port))
        self.struck.update(self.places_in(found[node]))
        return node

    async def replaced(self, node: Node) -> None:
        """Wait until another node has the slots of one that is down."""
        (asked, *_) = [other for other in self.cluster.nodes if other is not node]

        async def is_replaced() -> bool:
            return node not in await owners(asked, self.cluster.nodes)

        await eventually(is_replaced, f"{node} was replaced")

    def p99(self, since: float, *, others: bool = False) -> float | None:
        """Return the 99th percentile, in milliseconds, of how long appends took since then."""
        took = sorted(
            seconds
            for place, when, seconds in self.history.answers
            if when >= since and not (others and place in self.struck)
        )
        return took[len(took) * 99 // 100] * 1000 if took else None


Strike = Callable[[ClusterStage], Awaitable[None]]


@dataclass(frozen=True)
class ClusterFault:
    """One thing that can happen to a cluster, and what it may cost: see `Fault`.

    `may_see_unproven`: readers may see an event before its level is reached, and it is gone with
    the primary that showed it. `no_call_fails`: the application hears nothing of it but how long
    it takes.
    """

    name: str
    strike: Strike
    level: Level = MEMORY
    may_lose: bool = False
    may_see_unproven: bool = False
    no_call_fails: bool = False
    needs: str = ""  # a command that not every server has
    on_bus: bool = False
    is_long: bool = False  # left out of the short form
    once: bool = False  # it is not repeated
    is_of_the_server: bool = False  # servers may differ, so it is played on each

    def missing(self) -> str | None:
        """Say why it can't be played on this machine; None if it can."""
        return bus.missing() if self.on_bus else None


# Nodes


async def kill_primary(stage: ClusterStage) -> None:
    """A primary dies, its replica takes its place, and later it comes back as one."""
    node = await stage.choose()
    await node.kill()
    stage.history.mended(stage.struck)
    await stage.replaced(node)
    await node.restart()
    await stage.cluster.until_whole()


async def pause_primary(stage: ClusterStage) -> None:
    """A primary does nothing for so long that it is replaced, and then goes on as before."""
    node = await stage.choose()
    await node.pause()
    stage.history.mended(stage.struck)
    await stage.replaced(node)
    await node.resume()
    await stage.cluster.until_whole()


async def isolate_primary(stage: ClusterStage) -> None:
    """A primary and the other nodes can't hear each other; the application hears all of them."""
    assert stage.bus is not None
    node = await stage.choose()
    await stage.bus.isolate(node)

    async def has_given_up() -> bool:
        return b"cluster_state:fail" in await tell(node, "CLUSTER", "INFO")

    await eventually(has_given_up, f"{node} takes no more changes")
    stage.history.mended(stage.struck)
    await stage.replaced(node)
    await stage.bus.heal(node)
    await stage.cluster.until_whole()


async def fail_over(stage: ClusterStage) -> None:
    """An operator lets a replica take its primary's place."""
    await _promote(stage)
    await stage.cluster.until_whole()


async def _promote(stage: ClusterStage) -> None:
    node = await stage.choose()
    await promote(await replica_of(stage.cluster, node))


async def cut_connections(stage: ClusterStage) -> None:
    node = await stage.choose()
    for _ in range(_CUTS):
        await tell(node, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await stage.more(30)


async def cut_and_fail_over(stage: ClusterStage) -> None:
    """Answers are lost with their connections, and when those are back, another node has to say."""
    node = await stage.choose()
    replica = await replica_of(stage.cluster, node)
    taking_over = asyncio.ensure_future(promote(replica))
    while not taking_over.done():
        _cut_from_here(stage)
        await asyncio.sleep(0.005)
    await taking_over
    await stage.cluster.until_whole()


def _cut_from_here(stage: ClusterStage) -> None:
    """Cut the stores' connections, while what they have sent is read at the other end."""
    for store in stage.stores:
        for node in store._router.nodes():
            if node.transport._wire is not None and node.transport._wire.waiting:
                node.transport._wire.abort("it was cut on purpose")


async def restart_all(stage: ClusterStage) -> None:
    await gather(*(node.kill() for node in stage.cluster.nodes))
    await gather(*(node.restart() for node in stage.cluster.nodes))
    stage.history.mended()
    await stage.cluster.until_whole()


# Slots


async def migrate_by_keys(stage: ClusterStage) -> None:
    source, *_, target = primaries = await stage.primaries()
    await move_some(stage, source, target, primaries[source])


async def move_some(stage: ClusterStage, source: Node, target: Node, slots: list[int]) -> list[int]:
    """Move slots of places, key by key, and return them."""
    most = stage.size.slots
    used = sorted({slot_of_tag(place.root) for place in stage.places_in(slots)})
    chosen = stage.dice.sample(used, min(most, len(used)))
    stage.struck.update(stage.places_in(chosen))
    assert await move_by_keys(stage.cluster.nodes, source, target, chosen) > 0
    return chosen


async def migrate_at_once(stage: ClusterStage) -> None:
    source, *_, target = primaries = await stage.primaries()
    slots = sorted(primaries[source])
    last = slots[len(slots) // 2]
    first = next(slot for slot in range(last, -1, -1) if slot - 1 not in slots)
    stage.struck.update(stage.places_in(range(first, last + 1)))
    await move_at_once(source, target, first, last)


async def add_and_remove(stage: ClusterStage) -> None:
    """A node comes, gets slots, gives them back, and is forgotten."""
    node = await stage.cluster.add_node()
    source, *_ = primaries = await stage.primaries()
    slots = await move_some(stage, source, node, primaries[source])
    await stage.more()
    await move_by_keys(stage.cluster.nodes, node, source, slots)
    await stage.cluster.until_whole()
    await stage.cluster.remove_node(node)
    await stage.more()


async def turn_round(stage: ClusterStage) -> None:
    """Each second for a minute something changes."""
    changes = (_promote, migrate_by_keys, cut_connections)
    loop = asyncio.get_running_loop()
    end = loop.time() + 60
    while loop.time() < end:
        following = loop.time() + 1
        await stage.dice.choice(changes)(stage)
        await asyncio.sleep(following - loop.time())  # the pace is the fault
    await stage.cluster.until_whole()


_MIGRATESLOTS = "cluster|migrateslots"

CLUSTER_FAULTS = [
    ClusterFault("primary killed", kill_primary, may_lose=True),
    ClusterFault(
        "primary killed", kill_primary, REPLICA, may_see_unproven=True, is_of_the_server=True
    ),
    ClusterFault("primary paused", pause_primary, may_lose=True),
    ClusterFault("primary isolated", isolate_primary, may_lose=True, on_bus=True),
    ClusterFault(
        "primary isolated",
        isolate_primary,
        REPLICA,
        may_see_unproven=True,
        on_bus=True,
        is_long=True,
    ),
    ClusterFault("CLUSTER FAILOVER", fail_over, no_call_fails=True, is_of_the_server=True),
    ClusterFault("connections to a node cut", cut_connections, no_call_fails=True),
    ClusterFault("cut, and failed over", cut_and_fail_over),
    ClusterFault(
        "slots moved key by key", migrate_by_keys, no_call_fails=True, is_of_the_server=True
    ),
    ClusterFault("slots moved at once", migrate_at_once, no_call_fails=True, needs=_MIGRATESLOTS),
    ClusterFault("node added and removed", add_and_remove, no_call_fails=True, is_long=True),
    ClusterFault("all nodes killed, always", restart_all, FSYNC, is_of_the_server=True),
    ClusterFault("another topology each second", turn_round, is_long=True, once=True),
]


# Playing


@dataclass
class Theatre:
    """A running cluster that faults are played on, one after the other."""

    server: str
    cluster: Cluster
    bus: Bus | None

    async def has(self, command: str) -> bool:
        found: list[object] = await tell(self.cluster.nodes[0], "COMMAND", "INFO", command or "get")
        return bool(found[0])


@asynccontextmanager
async def theatre(
    server: str, binary: str, level: Level, *, with_bus: bool = False
) -> AsyncIterator[Theatre]:
    names, values = level.settings[::2], level.settings[1::2]
    settings = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
    settings["cluster-allow-replica-migration"] = "no"  # a node without slots stays a primary
    async with AsyncExitStack() as stack:
        running = embedded_cluster.running(
            binary=Path(binary), node_timeout=_NODE_TIMEOUT, settings=settings
        )
        cluster = await stack.enter_async_context(running)
        lines = await stack.enter_async_context(bus_of(cluster.nodes)) if with_bus else None
        await cluster.until_whole()
        yield Theatre(server, cluster, lines)


async def play_on(place: Theatre, fault: ClusterFault, size: Size, seed: int) -> Row:
    """Play a fault in rounds on a cluster, and judge what is stored afterwards."""
    prefix, dice = f"faults-{uuid.uuid4().hex}:", random.Random(seed)
    main = tuple(Aggregate(domain, f"{n}") for domain in ("orders", "carts") for n in range(_ROOTS))
    branches = tuple(aggregate.on("what-if") for aggregate in main[:_BRANCHES])
    rounds = 1 if fault.once else max(1, size.rounds // 2)
    urls = place.cluster.urls
    async with AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(asyncstore.open(urls=seeds, key_prefix=prefix))
            for seeds in (urls[:2], urls[-1:])
        ]
        stage = ClusterStage(
            history=History(main=main, branches=branches),
            stores=stores,
            size=size,
            dice=dice,
            level=fault.level,
            cluster=place.cluster,
            bus=place.bus,
        )
        await prepare(stores[0], stage.history)
        by_epoch = fault.may_lose or fault.may_see_unproven
        async with load(stage, may_lose=by_epoch):
            slow = [await _play_once(stage, fault) for _ in range(rounds)]
        async with asyncstore.open(urls=urls, key_prefix=prefix) as direct:
            verdict = await check(
                direct,
                stage.history,
                may_lose=fault.may_lose,
                may_see_unproven=fault.may_see_unproven,
            )
            await look_at_the_rest(direct, stage.history, verdict)
    failed = {name for name in stage.history.errors if not name.startswith("SequenceConflict")}
    if fault.no_call_fails and failed:
        verdict.why.append(f"calls failed: {sorted(failed)}")
    row = row_of(fault, place.server, size, rounds, stage.history, verdict)
    row.p99 = max((one for one, _ in slow if one is not None), default=None)
    row.p99_others = max((one for _, one in slow if one is not None), default=None)
    return row


async def _play_once(stage: ClusterStage, fault: ClusterFault) -> tuple[float | None, float | None]:
    """Strike under load; return the p99 of all appends meanwhile, and of those not struck."""
    await stage.more()
    stage.struck.clear()
    since = time.monotonic()
    with stage.history.disturbed():
        await fault.strike(stage)
    slow = stage.p99(since), stage.p99(since, others=True)
    await stage.until(stage.history.is_recovered, "an append was acknowledged again")
    await stage.more()
    return slow
