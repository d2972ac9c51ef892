"""How a cluster's load is spread over nodes and slots: what `asyncstore cluster stats` does.

Goes through all keys with SCAN, so it is for operators, and needs a user who may do that. In memory
are a page of keys and three numbers for each slot. Keys of slots that move meanwhile may be counted
twice, or not at all.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncstore.checks import ask_info
from asyncstore.errors import ConfigurationError, UnexpectedReply
from asyncstore.looking import Looker
from asyncstore.sharing import all_of
from asyncstore.slots import slot_of, slot_of_tag

if TYPE_CHECKING:
    from asyncstore.nodes import Node
    from asyncstore.store import Store


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What a primary has, and takes.

    `memory` is that of the server in bytes, whoever uses it; None where an ACL hides it.
    """

    where: str
    slots: int
    aggregates: int
    events: int
    memory: int | None
    appends_a_second: float


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """What a slot has, and takes; `where` is its node."""

    slot: int
    where: str
    aggregates: int
    events: int
    appends_a_second: float


@dataclass(frozen=True, slots=True)
class Balance:
    """How the load is spread. Appends were counted for `seconds`; an append is one to an aggregate.

    `hottest` are the slots with the most appends, and of those with as many, the most events.
    """

    seconds: float
    nodes: list[NodeLoad]
    hottest: list[SlotLoad]


@dataclass(frozen=True, slots=True)
class _Counts:
    """What was counted, by slot."""

    aggregates: Counter[int]
    events: Counter[int]
    appends: Counter[int]


async def measure(store: Store, seconds: float = 2.0, hottest: int = 10) -> Balance:
    """Count what an open store has on each node and in each slot, for `seconds` at least."""
    if not store._keys.by_slot:
        why = (
            "it is one server, and there is nothing to balance; `asyncstore doctor` says how it is"
        )
        raise ConfigurationError("url", why, "the settings")
    listing = store.events._listing
    before, started = await listing.commits(), time.perf_counter()
    aggregates, events = await _count_events(store)
    await asyncio.sleep(started + seconds - time.perf_counter())
    after, elapsed = await listing.commits(), time.perf_counter() - started
    grown = {slot_of_tag(tag): number - before.get(tag, 0) for tag, number in after.items()}
    # After a failover a number may be less than it was.
    appends = Counter({slot: count for slot, count in grown.items() if count > 0})
    counts = _Counts(aggregates, events, appends)
    nodes = await all_of(_node_load(store, node, counts, elapsed) for node in _nodes(store))
    return Balance(elapsed, list(nodes), _hottest(store, counts, elapsed, hottest))


def _nodes(store: Store) -> list[Node]:
    return sorted(store._router.nodes(), key=lambda node: node.where)


async def _count_events(store: Store) -> tuple[Counter[int], Counter[int]]:
    """Return how many aggregates and events there are in each slot."""
    aggregates: Counter[int] = Counter()
    events: Counter[int] = Counter()
    async for page in Looker(store._router).keys(store._keys.beginning("events")):
        for key, count in zip(page, await all_of(_size(store, key) for key in page), strict=True):
            slot = slot_of(key)
            aggregates[slot] += count > 0
            events[slot] += count
    return aggregates, events


async def _size(store: Store, key: str) -> int:
    try:
        return await Looker(store._router).size(key)
    except UnexpectedReply:  # it is something else, of which `verify` tells
        return 0


async def _node_load(store: Store, node: Node, counts: _Counts, seconds: float) -> NodeLoad:
    slots = {slot for slot in store._router.servers().slots_of(node) if slot is not None}
    aggregates, events, appends = (
        sum(count for slot, count in counted.items() if slot in slots)
        for counted in (counts.aggregates, counts.events, counts.appends)
    )
    info = await ask_info(node.transport)
    memory = info.fields.get("used_memory", "")
    return NodeLoad(
        node.where,
        len(slots),
        aggregates,
        events,
        int(memory) if memory.isdigit() else None,
        appends / seconds,
    )


def _hottest(store: Store, counts: _Counts, seconds: float, most: int) -> list[SlotLoad]:
    servers = store._router.servers()
    found = heapq.nlargest(
        most,
        counts.appends.keys() | counts.aggregates.keys(),
        key=lambda slot: (counts.appends[slot], counts.events[slot], -slot),
    )
    return [
        SlotLoad(
            slot,
            servers.node_of(slot).where,
            counts.aggregates[slot],
            counts.events[slot],
            counts.appends[slot] / seconds,
        )
        for slot in found
    ]
