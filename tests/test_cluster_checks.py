"""`store.check()` and `asyncstore doctor` of a cluster: its nodes, and what the whole shows."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio.from_thread
import pytest
import redis

import asyncstore
from asyncstore import ANY, Aggregate, Finding, Report, Settings, StoreUnavailable, embedded_cluster
from asyncstore.embedded_cluster import Cluster, Node
from asyncstore.forms import Peer
from asyncstore.keys import Keys
from asyncstore.store import examine
from tests.builders import numbered
from tests.polling import eventually
from tests.servers import sweep_cluster

GOOD = {
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory": "256mb",
    "cluster-require-full-coverage": "no",
}
OF_THE_WHOLE = [
    "cluster",
    "slots",
    "slot map",
    "slots on the way",
    "nodes",
    "failover",
    "cluster-require-full-coverage",
    "cluster-node-timeout",
    "layout",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A good one, which the tests leave as it was."""
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded_cluster.running(settings=GOOD)) as running,
    ):
        yield running


@asynccontextmanager
async def one_to_break(**options: Any) -> AsyncIterator[Cluster]:
    async with embedded_cluster.running(settings=GOOD, node_timeout=1.0, **options) as running:
        yield running


@contextmanager
def client_of(node: Node) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(node.url) as client:
        yield client


def named(report: Report, name: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.name == name]


def the(report: Report, name: str) -> Finding:
    (finding,) = named(report, name)
    return finding


def levels(report: Report, level: str) -> set[str]:
    return {finding.name for finding in report.findings if finding.level == level}


def where(node: Node) -> str:
    return node.url.removeprefix("redis://")


async def examined(cluster: Cluster, **options: Any) -> Report:
    return await examine(Settings(urls=tuple(cluster.urls), **options))


class TestAllNodes:
    async def test_a_good_cluster(self, cluster: Cluster, prefix: str) -> None:
        async with asyncstore.open(urls=cluster.urls, key_prefix=prefix) as store:
            for n in range(20):
                order = Aggregate("orders", f"somebody-{n}")
                await store.events.append(order, numbered(n + 1), expected=ANY)
            report = await store.check()
        names = [finding.name for finding in report.findings]
        assert names[: len(OF_THE_WHOLE)] == OF_THE_WHOLE
        assert len(names) == len(set(names)), "one line where all nodes say the same"
        assert levels(report, "bad") == set()
        assert levels(report, "warning") == {"after a restart"}  # of embedded servers
        assert report.server.startswith("a cluster of 3 primaries at redis://")
        assert the(report, "cluster").found == "3 primaries, 3 replicas"
        assert the(report, "layout").found == "1 by slot"
        for name in ("server", "role", "AOF", "fsync", "eviction"):
            assert "127.0.0.1" not in the(report, name).found
        for finding in report.findings:
            assert bool(finding.remedy) == (finding.level != "good"), finding
        assert "somebody" not in repr(report)
        sweep_cluster(cluster, prefix)

    async def test_a_node_that_differs_is_named(self, cluster: Cluster) -> None:
        first, second, third = cluster.nodes[:3]
        with client_of(second) as client:
            client.config_set("appendfsync", "everysec")
            report = await examined(cluster)
            client.config_set("appendfsync", "always")
        bad, good = named(report, "fsync")
        assert (bad.level, bad.found) == ("warning", f"{where(second)}: everysec")
        assert good.level == "good"
        assert set(good.found.removesuffix(": always").split(", ")) == {where(first), where(third)}

    async def test_settings_of_the_cluster(self, cluster: Cluster) -> None:
        second = cluster.nodes[1]
        with client_of(second) as client:
            client.config_set("cluster-require-full-coverage", "yes")
            client.config_set("cluster-node-timeout", "3000")
            report = await examined(cluster)
            client.config_set("cluster-require-full-coverage", "no")
            client.config_set("cluster-node-timeout", "2000")
        coverage = the(report, "cluster-require-full-coverage")
        assert (coverage.level, coverage.found) == ("warning", f"{where(second)}: yes")
        assert coverage.remedy == "cluster-require-full-coverage no"
        timeout = the(report, "cluster-node-timeout")
        assert f"{where(second)}: 3000" in timeout.found
        assert timeout.remedy == "cluster-node-timeout 2000 at all nodes"

    async def test_a_failover_that_takes_longer_than_callers_wait(self, cluster: Cluster) -> None:
        finding = the(await examined(cluster, timeout=3), "cluster-node-timeout")
        assert finding.level == "warning"
        assert finding.remedy == "cluster-node-timeout 1000, or the store's setting timeout = 5"

    async def test_slots_on_their_way(self, cluster: Cluster) -> None:
        first, second = cluster.nodes[:2]
        with client_of(first) as here, client_of(second) as there:
            for slot in (7, 8, 20):
                there.cluster("SETSLOT", slot, "IMPORTING", first.id)
                here.cluster("SETSLOT", slot, "MIGRATING", second.id)
            report = await examined(cluster)
            for slot in (7, 8, 20):
                for client in (here, there):
                    client.cluster("SETSLOT", slot, "STABLE")
        finding = the(report, "slots on the way")
        assert (finding.level, finding.found) == ("warning", "3: 7-8, 20")
        assert the(await examined(cluster), "slots on the way").level == "good"

    async def test_the_stores_clock_is_looked_at_in_some_slots(
        self, cluster: Cluster, prefix: str
    ) -> None:
        second = cluster.nodes[1]
        keys = Keys(prefix, by_slot=True)
        async with asyncstore.open(urls=cluster.urls, key_prefix=prefix) as store:
            with client_of(second) as client:
                later = (client.time()[0] + 3 * 3600) * 1_000_000
                pipeline = client.pipeline(transaction=False)
                servers = store._router.servers()
                (node,) = (node for node in servers.nodes() if where(second) in node.url)
                for slot in servers.slots_of(node):
                    pipeline.set(keys.commits(keys.tag_of_slot(slot)), f"1 {later}")
                pipeline.execute()
                client.config_resetstat()
                report = await store.check()
                calls = {name: one["calls"] for name, one in client.info("commandstats").items()}
        bad, good = named(report, "the store's clock")
        assert bad.level == "warning"
        assert bad.found == (
            f"{where(second)}: 3 hours ahead of the server's (in 256 of its slots)"
        )
        assert good.level == "good"
        assert calls["cmdstat_get"] <= 257
        assert sum(calls.values()) < 700
        assert not calls.keys() & {"cmdstat_scan", "cmdstat_keys", "cmdstat_set"}
        with client_of(second) as client:
            client.flushdb()

    async def test_what_an_acl_hides(self, cluster: Cluster) -> None:
        for node in cluster.nodes:
            with client_of(node) as client:
                client.acl_setuser(
                    "app",
                    enabled=True,
                    passwords=["+s3cret"],
                    keys=["*"],
                    commands=["+@all", "-cluster|nodes"],
                )
        urls = tuple(url.replace("://", "://app:s3cret@") for url in cluster.urls)
        report = await examine(Settings(urls=urls))
        finding = the(report, "CLUSTER")
        assert (finding.level, finding.found) == ("warning", "hidden (NOPERM)")
        assert finding.remedy == "ACL SETUSER <this user> +cluster|info +cluster|nodes"
        assert {"slots", "nodes", "failover"} <= set(finding.meaning.split(": ")[1].split(", "))
        assert "s3cret" not in repr(report)


class TestBroken:
    async def test_slots_without_a_node(self) -> None:
        async with one_to_break(replicas=0) as cluster:
            first = cluster.nodes[0]
            with client_of(first) as client:
                client.config_set("cluster-require-full-coverage", "yes")
            for node in cluster.nodes:
                with client_of(node) as client:
                    client.cluster("DELSLOTS", 7, 8)
            report = await examined(cluster, timeout=1)
            finding = the(report, "slots")
            assert (finding.level, finding.found) == ("bad", "no node has 7-8")
            assert "CLUSTER ADDSLOTSRANGE 7 8" in finding.remedy
            assert the(report, "failover").found.startswith("no replica follows 127.0.0.1:")
            with pytest.raises(StoreUnavailable, match="no node has the slots 7-8"):
                async with asyncstore.open(urls=cluster.urls, timeout=0.5):
                    pass
            finding = the(report, "cluster")
            assert finding.level == "bad"
            assert finding.found.endswith(f"; {where(first)}: state is not ok")

    async def test_nodes_that_are_down(self) -> None:
        async with one_to_break() as cluster:
            primary, replica = cluster.nodes[1], cluster.nodes[-1]
            await replica.kill()
            await until_taken_for_dead(cluster, replica)
            report = await examined(cluster)
            finding = the(report, "nodes")
            assert (finding.level, finding.found) == ("warning", f"{where(replica)} (fail)")
            assert the(report, "failover").level == "warning"
            # No majority of primaries is left, so that nobody takes over.
            await primary.kill()
            await cluster.nodes[0].pause()
            report = await examined(cluster, timeout=1.5)
            await cluster.nodes[0].resume()
            lines = named(report, "connection")
            silent = [line for line in lines if line.meaning.startswith("nothing in its 5,46")]
            assert {line.found.partition(": ")[0] for line in silent} == {
                where(primary),
                where(cluster.nodes[0]),
            }
            assert all(line.level == "bad" for line in silent)
            assert the(report, "server").found.startswith("Valkey"), "the third one answers"

    async def test_the_command_line(self, cluster: Cluster) -> None:
        command = [sys.executable, "-m", "asyncstore", "doctor", "--url", cluster.urls[4], "--json"]
        done = await asyncio.to_thread(
            lambda: subprocess.run(command, capture_output=True, check=False, env={**os.environ})
        )
        report = json.loads(done.stdout)
        assert (done.returncode, report["level"]) == (1, "warning")
        assert [line["name"] for line in report["findings"]][: len(OF_THE_WHOLE)] == OF_THE_WHOLE

    async def test_two_primaries_are_no_majority(self) -> None:
        async with one_to_break(primaries=2, replicas=0) as cluster:
            finding = the(await examined(cluster), "failover")
        assert (finding.level, finding.found) == ("warning", "2 with slots")


async def until_taken_for_dead(cluster: Cluster, node: Node) -> None:
    def is_known() -> bool:
        for other in cluster.nodes[:3]:
            with client_of(other) as client:
                lines: Any = client.cluster("NODES")
                flags = lines[where(node)]["flags"]
                if "fail" not in flags.split(","):
                    return False
        return True

    await eventually(is_known, f"all primaries take {node} for dead")


def test_a_line_of_cluster_nodes() -> None:
    line = "a 127.0.0.1:1@2,host master,fail? - 0 0 1 connected 0-5 7 [5->-b] [9-<-b]"
    peer = Peer.parse(line)
    assert (peer.address, peer.slots, peer.moving) == (
        "127.0.0.1:1",
        ("0-5", "7"),
        ("[5->-b]", "[9-<-b]"),
    )
    assert (peer.is_primary, peer.is_asked, peer.trouble) == (True, False, "fail?")
