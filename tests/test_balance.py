"""How the load of a cluster is spread: counted on a real one."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator

import pytest

import asyncstore
from asyncstore import ANY, NEW, Aggregate, ConfigurationError, Store, balance
from asyncstore.slots import slot_of_tag
from tests.builders import numbered
from tests.fix_clusters import SmallCluster
from tests.servers import Server
from tests.test_transfer import run


@pytest.fixture
async def store(small_cluster: SmallCluster) -> AsyncIterator[Store]:
    prefix = f"test-{uuid.uuid4().hex}:"
    async with asyncstore.open(urls=small_cluster.urls, key_prefix=prefix) as opened:
        yield opened


async def fill(store: Store) -> Counter[int]:
    """Put in aggregates of 1 to 5 events; return how many events each slot has."""
    events: Counter[int] = Counter()
    for n in range(100):
        await store.events.append(Aggregate("orders", f"{n}"), numbered(n % 5 + 1), expected=NEW)
        events[slot_of_tag(f"{n}")] += n % 5 + 1
    await store.events.append(Aggregate("orders", "7", "what-if"), numbered(3), expected=1)
    events[slot_of_tag("7")] += 3
    return events


async def test_events_and_aggregates_of_each_node(store: Store) -> None:
    events = await fill(store)
    found = await balance.measure(store, 0.0, hottest=20_000)
    assert len(found.nodes) == 3
    assert sum(node.slots for node in found.nodes) == 16_384
    assert sum(node.aggregates for node in found.nodes) == 101
    assert all(node.memory is not None and node.memory > 500_000 for node in found.nodes)
    assert {slot.slot: slot.events for slot in found.hottest} == events
    servers = store._router.servers()
    for node in found.nodes:
        own = [count for slot, count in events.items() if servers.node_of(slot).where == node.where]
        assert (node.events, node.appends_a_second) == (sum(own), 0)


async def test_the_hottest_slots(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(store)
    count_events = balance._count_events

    async def and_write(of: Store) -> tuple[Counter[int], Counter[int]]:
        for root, times in (("3", 30), ("5", 20), ("new", 10)):
            for _ in range(times):
                await of.events.append(Aggregate("orders", root), numbered(2), expected=ANY)
        return await count_events(of)

    monkeypatch.setattr(balance, "_count_events", and_write)
    found = await balance.measure(store, 0.0, hottest=4)
    slots = [(slot.slot, round(slot.appends_a_second * found.seconds)) for slot in found.hottest]
    wanted = [(slot_of_tag("3"), 30), (slot_of_tag("5"), 20), (slot_of_tag("new"), 10)]
    assert slots[:3] == wanted
    assert slots[3][1] == 0
    first = found.hottest[0]
    assert first.where == store._router.servers().node_of(first.slot).where
    assert first.events == 64
    rates = [node.appends_a_second * found.seconds for node in found.nodes]
    assert round(sum(rates)) == 60


async def test_the_command_line(store: Store, small_cluster: SmallCluster) -> None:
    await fill(store)
    arguments = ("cluster", "stats", "--key-prefix", store._keys.prefix, "--interval", "0.1")
    place = ("--url", ",".join(small_cluster.urls))
    done = run(*arguments, *place, "--json", "--hottest", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(node["events"] for node in found["nodes"]) == 303
    assert len(found["hottest"]) == 2
    assert run(*arguments, *place, "--interval", "inf").returncode == 2
    done = run(*arguments, "--url", f"{small_cluster.urls[0]}?cluster=true")
    assert done.returncode == 0
    for node in found["nodes"]:
        lines = done.stdout.decode().splitlines()
        row = next(line for line in lines if node["where"] in line)
        cells = row.split("\t")
        assert cells[1:4] == [f"{node[name]:,}" for name in ("slots", "aggregates", "events")]
    assert b"appends were counted for " in done.stderr


async def test_of_one_server_there_is_nothing_to_say(one_server: Server, prefix: str) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as one:
        with pytest.raises(ConfigurationError, match="it is one server"):
            await balance.measure(one)
