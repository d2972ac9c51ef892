"""The least that the driver's user needs on a cluster, where each node has users of its own."""

from __future__ import annotations

from collections.abc import Iterator

import anyio.from_thread
import pytest
import redis

import asyncstore
from asyncstore import ANY, NEW, Aggregate, Durability, Source, embedded_cluster, slots
from asyncstore.embedded_cluster import Cluster
from tests.builders import listed, numbered
from tests.polling import eventually
from tests.servers import Server, as_user

# The contract of events, under that user.
from tests.test_contract_events import *  # noqa: F403


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded_cluster.running(node_timeout=1.0)) as running,
    ):
        for node in running.nodes:
            as_user(node.url)
        yield running


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Server:
    url = f"{cluster.urls[0]}?cluster=true"
    return Server("cluster-acl", url.replace("://", "://app:s3cret@"), url)


async def test_all_that_belongs_to_aggregates(server: Server, prefix: str) -> None:
    async with asyncstore.open(server.url, key_prefix=prefix) as store:
        for n in range(20):
            order = Aggregate("orders", f"{n}")
            source = Source("carts", f"{n}", "main", 0)
            for durability in (Durability.MEMORY, Durability.replicas(1)):
                await store.events.append(
                    order,
                    numbered(2),
                    expected=ANY,
                    durability=durability,
                    idempotency_key=f"{durability}",
                    correlation_id="all",
                    source=source,
                )
            await store.events.branch(order.on("what-if"), at=1)
            await store.events.append(order.on("what-if"), numbered(1), expected=1)
            await store.positions.advance("projector", order, 1)
            await store.snapshots.put(order, sequence=1, state={})
            assert len((await store.load(order)).events) == 2
            assert len(await store.events.find_source(order, source)) == 4
        assert len(await store.events.correlated("all")) == 20
        assert await store.events.delete_edition("orders", "what-if") == 20
        report = await store.check()
        assert [finding for finding in report.findings if "hidden" in finding.found] == []
        for n in range(20):
            assert await store.events.delete(Aggregate("orders", f"{n}")) == 4


async def test_slots_that_are_on_their_way(
    cluster: Cluster, server: Server, prefix: str, order: Aggregate
) -> None:
    slot = slots.slot_of_tag(order.root)
    source = cluster.nodes[slot * 3 // slots.COUNT]
    target = cluster.nodes[(slot * 3 // slots.COUNT + 1) % 3]
    with (
        redis.Redis.from_url(source.url) as here,
        redis.Redis.from_url(target.url) as there,
    ):
        there.cluster("SETSLOT", slot, "IMPORTING", source.id)
        here.cluster("SETSLOT", slot, "MIGRATING", target.id)
        there.script_flush()
        async with asyncstore.open(server.url, key_prefix=prefix) as store:
            there.config_resetstat()
            # An append has several keys; where all of them are to be new, it waits for the move.
            assert await store.events.next_sequence(order) == 0
            assert await store.events.read(order) == []
        calls = there.info("commandstats")
        assert calls["cmdstat_asking"]["calls"] == 3, "for ZCARD, EVALSHA, and EVAL after it"
        for client in (there, here):
            client.cluster("SETSLOT", slot, "NODE", target.id)


async def test_a_failover(cluster: Cluster, server: Server, prefix: str) -> None:
    """Last, for it leaves the cluster with a node less."""
    async with asyncstore.open(server.url, key_prefix=prefix) as store:
        orders = [Aggregate("orders", f"{n}") for n in range(30)]
        for order in orders:
            level = Durability.replicas(1)
            await store.events.append(order, numbered(1), expected=NEW, durability=level)
        before = {node.where for node in store._router.nodes()}
        await cluster.nodes[1].kill()
        for order in orders:
            await store.events.append(order, numbered(1, 1), expected=1)

        async def is_replaced() -> bool:
            return len(before - {node.where for node in store._router.nodes()}) == 1

        await eventually(is_replaced, "the map has the node that was promoted")
        assert len(await listed(store.events.roots("orders"))) == 30
        for order in orders:
            assert len(await store.events.read(order)) == 2
