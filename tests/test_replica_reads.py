"""Reads from the replicas of a cluster: where they go, and what if a replica can't serve."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

import asyncstore
from asyncstore import NEW, Aggregate, ConfigurationError, Settings, Store, embedded_cluster
from asyncstore.embedded_cluster import Cluster, Node
from tests.builders import listed, numbered
from tests.polling import eventually

PLACES = [Aggregate("orders", f"{n}") for n in range(12)]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with embedded_cluster.running(primaries=3, replicas=1) as running:
        yield running


def scripts_run(node: Node) -> int:
    with redis.Redis.from_url(node.url) as client:
        calls: Any = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})
    return int(calls["calls"])


def replicas_of(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if not node.is_primary]


async def read_all(store: Store) -> None:
    for place in PLACES:
        events = await store.events.read(place)
        assert [event.sequence for event in events] == list(range(len(events)))


async def all_by_replicas(store: Store, cluster: Cluster) -> bool:
    before = sum(map(scripts_run, replicas_of(cluster)))
    await read_all(store)
    return sum(map(scripts_run, replicas_of(cluster))) - before >= len(PLACES)


async def fill(store: Store) -> None:
    for place in PLACES:
        await store.events.append(place, numbered(3), expected=NEW)


async def test_reads_go_to_replicas_when_asked(cluster: Cluster) -> None:
    async with asyncstore.open(urls=cluster.urls[:1], read_from="replica") as store:
        await fill(store)
        await eventually(lambda: all_by_replicas(store, cluster), "replicas are read from")
        before = sum(map(scripts_run, replicas_of(cluster)))
        for place in PLACES:
            await store.events.append(place, numbered(1), expected=3)
        assert sum(map(scripts_run, replicas_of(cluster))) == before
        assert await listed(store.events.domains()) == ["orders"]
    async with asyncstore.open(urls=cluster.urls[:1]) as store:
        before = sum(map(scripts_run, replicas_of(cluster)))
        await read_all(store)
        assert sum(map(scripts_run, replicas_of(cluster))) == before


async def test_a_replica_that_is_down_or_hangs_is_passed_over(cluster: Cluster) -> None:
    options: dict[str, Any] = {"read_from": "replica", "timeout": 5}
    async with asyncstore.open(urls=cluster.urls[:1], **options) as store:
        await fill(store)
        await eventually(lambda: all_by_replicas(store, cluster), "replicas are read from")
        down, hanging, _ = replicas_of(cluster)
        await down.kill()
        await hanging.pause()
        await read_all(store)  # each of them within its time
        await hanging.resume()
        await down.restart()
        await eventually(lambda: all_by_replicas(store, cluster), "they are read from again")


async def test_a_replica_that_is_behind_is_passed_over(cluster: Cluster) -> None:
    options: dict[str, Any] = {"read_from": "replica", "max_replica_lag": 10_000}
    async with asyncstore.open(urls=cluster.urls[:1], **options) as store:
        await fill(store)
        await eventually(lambda: all_by_replicas(store, cluster), "replicas are read from")
        for node in replicas_of(cluster):  # its link is up, and it goes nowhere
            with redis.Redis.from_url(node.url) as client:
                client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
        large = asyncstore.Event("Large", "x" * 20_000)
        for place in PLACES:
            await store.events.append(place, [large], expected=3)

        async def none_by_replicas() -> bool:
            before = sum(map(scripts_run, replicas_of(cluster)))
            lengths = {len(await store.events.read(place)) for place in PLACES}
            return lengths == {4} and sum(map(scripts_run, replicas_of(cluster))) == before

        await eventually(none_by_replicas, "what is behind is not read from")


@pytest.mark.parametrize("value", ["", "Replica", "any"])
def test_another_word_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="read_from"):
        Settings(url="redis://h", read_from=value)


@pytest.mark.parametrize("value", [0, -1, True, "1"])
def test_another_lag_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_replica_lag"):
        Settings(url="redis://h", max_replica_lag=value)
