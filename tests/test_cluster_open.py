"""Opening a store on real clusters: what can be wrong with where they are, and what is said."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio.from_thread
import pytest
import redis
import trustme

import asyncstore
from asyncstore import (
    ANY,
    Aggregate,
    ConfigurationError,
    Store,
    StoreUnavailable,
    acl,
    embedded,
    embedded_cluster,
)
from asyncstore.embedded_cluster import Node
from asyncstore.slots import COUNT, slot_of_tag
from tests.builders import numbered, sequences
from tests.fake_nodes import fake_cluster
from tests.polling import eventually
from tests.servers import RedisServer, free_port, redis_server

VALKEY = str(embedded.find_binary())
REDIS = shutil.which("redis-server")
PLACES = [Aggregate("orders", f"{n}") for n in range(12)]
NOWHERE = "192.0.2.1"  # RFC 5737: documentation only


@contextmanager
def _running(*, primaries: int, settings: dict[str, str] | None = None) -> Iterator[list[Node]]:
    with anyio.from_thread.start_blocking_portal() as portal:
        cluster = embedded_cluster.running(primaries=primaries, replicas=0, settings=settings)
        with portal.wrap_async_context_manager(cluster) as running:
            yield running.nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """The nodes of a cluster that tests leave as it is."""
    with _running(primaries=3) as found:
        yield found


@pytest.fixture
def own_nodes() -> Iterator[list[Node]]:
    """The nodes of a cluster that a test may spoil."""
    with _running(primaries=3) as found:
        yield found


def tell(node: Node, *command: object) -> object:
    with redis.Redis.from_url(node.url) as client:
        return client.execute_command(*command)


async def use(store: Store) -> None:
    for place in PLACES:
        await store.events.append(place, numbered(2), expected=ANY)
        assert sequences(await store.events.read(place))[:2] == [0, 1]


class TestSeeds:
    async def test_one_url_is_enough_and_the_server_says_that_it_is_a_cluster(
        self, nodes: list[Node]
    ) -> None:
        async with asyncstore.open(nodes[1].url) as store:
            await use(store)
            assert len(store._router.nodes()) == 3

    async def test_a_unix_socket_leads_to_all_nodes(self, nodes: list[Node]) -> None:
        async with asyncstore.open(nodes[1]._home.url) as store:
            await use(store)
            assert {node.where for node in store._router.nodes()} == {n.url for n in nodes}

    async def test_a_dead_one_among_live_ones(self, nodes: list[Node]) -> None:
        dead = f"redis://127.0.0.1:{free_port()}"
        for urls in ([dead, nodes[0].url], [nodes[0].url, dead], [dead, dead, nodes[2].url]):
            async with asyncstore.open(urls=urls) as store:
                await use(store)

    async def test_that_are_all_dead_are_all_named(self) -> None:
        dead = [f"redis://:s3cret@127.0.0.1:{free_port()}" for _ in range(2)]
        with pytest.raises(StoreUnavailable) as caught:
            async with asyncstore.open(urls=dead, timeout=1):
                pass
        for url in dead:
            assert f"{url.replace('s3cret', '***')}: no connection (nobody listens" in str(
                caught.value
            )
        assert "s3cret" not in str(caught.value)

    async def test_of_two_clusters(self, nodes: list[Node]) -> None:
        with _running(primaries=1) as others:
            urls = [nodes[0].url, others[0].url]
            with pytest.raises(ConfigurationError, match=f"{urls[1]} is of another cluster than"):
                async with asyncstore.open(urls=urls):
                    pass

    async def test_that_are_no_cluster(self) -> None:
        with redis_server(VALKEY, tcp=True) as server:
            for where in ({"urls": [server.url]}, {"url": f"{server.url}?cluster=true"}):
                with pytest.raises(ConfigurationError, match="no node of a cluster: give one serv"):
                    async with asyncstore.open(**where):
                        pass

    async def test_that_are_of_a_cluster_and_none_at_once(self, nodes: list[Node]) -> None:
        with (
            redis_server(VALKEY, tcp=True) as server,
            pytest.raises(ConfigurationError, match=f"{server.url} is no node of a cluster"),
        ):
            async with asyncstore.open(urls=[nodes[0].url, server.url]):
                pass


class TestSlots:
    async def test_that_nobody_has(self, own_nodes: list[Node]) -> None:
        tell(own_nodes[0], "CLUSTER", "DELSLOTS", 5, 7, 8)
        with pytest.raises(StoreUnavailable, match="no node has the slots 5-5, 7-8") as caught:
            async with asyncstore.open(own_nodes[0].url, timeout=0.5):
                pass
        assert "CLUSTER NODES" in str(caught.value)


class TestAddresses:
    async def test_that_can_not_be_reached(self) -> None:
        with _running(primaries=1) as (node,):
            tell(node, "CONFIG", "SET", "cluster-announce-ip", NOWHERE)
            why = (
                rf"announce addresses that can't be used from here: {NOWHERE}.*cluster-announce-ip"
            )
            with pytest.raises(StoreUnavailable, match=why):
                async with asyncstore.open(node.url, timeout=0.5):
                    pass

    async def test_that_are_host_names(self, own_nodes: list[Node]) -> None:
        for node in own_nodes:
            tell(node, "CONFIG", "SET", "cluster-announce-hostname", "localhost")
            tell(node, "CONFIG", "SET", "cluster-preferred-endpoint-type", "hostname")

        def is_told() -> bool:
            slots = tell(own_nodes[0], "CLUSTER", "SLOTS")
            assert isinstance(slots, list)
            return {span[2][0] for span in slots} == {b"localhost"}

        await eventually(is_told, "the nodes announce their names")
        async with asyncstore.open(own_nodes[0].url) as store:
            await use(store)
            wanted = {f"redis://localhost:{node.port}" for node in own_nodes}
            assert {node.where for node in store._router.nodes()} == wanted


class TestNodesThatAreNotThere:
    async def test_the_others_are_used_at_once(
        self, own_nodes: list[Node], caplog: pytest.LogCaptureFixture
    ) -> None:
        silent, *others = (node for node in own_nodes if not has_layout(node))
        tell(silent, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        await silent.pause()
        try:
            async with (
                asyncio.timeout(30),
                asyncstore.open(others[0].url, timeout=60) as store,
            ):
                await silent.resume()
                await eventually(lambda: "allkeys-lru" in caplog.text, "it is looked at later")
                assert f"not fit for events: {silent.url} evicts keys" in caplog.text
                await use(store)
        finally:
            await silent.resume()

    async def test_nobody_is_there_but_who_tells_of_them(self) -> None:
        async with fake_cluster() as (one, two):
            one.view = two.view = [two.has()]
            two.is_silent = True
            with pytest.raises(StoreUnavailable):
                async with asyncstore.open(urls=[one.url], timeout=0.5):
                    pass


def has_layout(node: Node) -> bool:
    slot = slot_of_tag("all")
    with redis.Redis.from_url(node.url) as client:
        spans = client.execute_command("CLUSTER", "SLOTS")
    return any(
        first <= slot <= last and port == node.port for first, last, (_, port, *_), *_ in spans
    )


class TestDatabases:
    @pytest.mark.parametrize("form", ["{}/3", "{}?db=3", "{}/3?cluster=true"])
    async def test_other_than_the_first(self, nodes: list[Node], form: str) -> None:
        with pytest.raises(ConfigurationError, match=r"database 3.*a cluster has only 0"):
            async with asyncstore.open(form.format(nodes[0].url)):
                pass
        with pytest.raises(ConfigurationError, match=r"names database 3, and a cluster has only 0"):
            async with asyncstore.open(urls=[form.format(nodes[0].url)]):
                pass

    async def test_the_first_by_its_number(self, nodes: list[Node]) -> None:
        async with asyncstore.open(f"{nodes[0].url}/0") as store:
            await use(store)

    async def test_where_a_cluster_may_have_more(self) -> None:
        with _running(primaries=1, settings={"cluster-databases": "16"}) as found:
            url = f"{found[0].url}/3"
            with pytest.raises(ConfigurationError, match="names database 3, and a cluster has"):
                async with asyncstore.open(url):
                    pass


class TestLayouts:
    async def test_that_of_one_server_on_a_cluster(self, nodes: list[Node], prefix: str) -> None:
        with redis.RedisCluster.from_url(nodes[0].url) as client:
            client.set(f"{prefix}layout:{{all}}", "1")
        with pytest.raises(ConfigurationError, match=r"layout '1', that of one server.*export"):
            async with asyncstore.open(nodes[0].url, key_prefix=prefix):
                pass

    async def test_that_of_a_cluster_on_one_server(self, nodes: list[Node], prefix: str) -> None:
        with redis.RedisCluster.from_url(nodes[0].url) as client:
            async with asyncstore.open(nodes[0].url, key_prefix=prefix) as store:
                await use(store)
            found = client.get(f"{prefix}layout:{{all}}")
        with redis_server(VALKEY) as server:
            with redis.Redis.from_url(server.url) as client:
                client.set(f"{prefix}layout:{{all}}", found)
            with pytest.raises(ConfigurationError, match=r"that of a cluster.*asyncstore export"):
                async with asyncstore.open(server.url, key_prefix=prefix):
                    pass


# TLS, users and passwords


@asynccontextmanager
async def tls_cluster(directory: Path) -> AsyncIterator[dict[int, RedisServer]]:
    """Run three nodes of Debian's Redis, by port, that speak TLS only, also with each other."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    with ExitStack() as stack:
        ports = [embedded_cluster._free_port() for _ in range(3)]
        nodes = [stack.enter_context(_tls_node(directory, port)) for port in ports]
        for place, node in enumerate(nodes):
            first, last = COUNT * place // 3, COUNT * (place + 1) // 3 - 1
            with redis.Redis.from_url(node.url) as client:
                client.execute_command(*shlex.split(acl.line("app", "test-")), ">s3cret")
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for node in nodes:
            with redis.Redis.from_url(node.url) as client:
                for port in ports:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", port)
        await eventually(lambda: all(map(_is_ok, nodes)), "the cluster is whole")
        yield dict(zip(ports, nodes, strict=True))


@contextmanager
def _tls_node(directory: Path, port: int) -> Iterator[RedisServer]:
    arguments = [
        *("--tls-port", f"{port}", "--bind", "127.0.0.1", "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(directory / "cert.pem")),
        *("--tls-key-file", str(directory / "key.pem")),
        *("--tls-ca-cert-file", str(directory / "ca.pem")),
        *("--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-node-timeout", "1000"),
        *("--cluster-announce-ip", "127.0.0.1"),
    ]
    with redis_server(str(REDIS), *arguments) as server:
        yield server


def _is_ok(node: RedisServer) -> bool:
    with redis.Redis.from_url(node.url) as client:
        info = client.execute_command("CLUSTER", "INFO")
        slots = client.execute_command("CLUSTER", "SLOTS")
    return b"cluster_state:ok" in info and len(slots) == 3


@pytest.mark.skipif(REDIS is None, reason="there is no redis-server on the PATH, to speak TLS")
class TestTlsAndUsers:
    async def test_all_nodes_are_spoken_to_alike_and_no_password_is_shown(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        async with tls_cluster(tmp_path) as nodes:
            dead, port, _ = nodes
            url = f"rediss://app:s3cret@127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem"
            shown = []
            async with asyncstore.open(url, key_prefix="test-1:", timeout=1.0) as store:
                await use(store)
                shown += [repr(store), repr(store.settings), repr(store._router.nodes())]
                shown += [node.where for node in store._router.nodes()]
                nodes[dead].stop()
                reads = (store.events.next_sequence(place) for place in PLACES)
                outcomes = await asyncio.gather(*reads, return_exceptions=True)
                shown += [f"{error} {error!r}" for error in outcomes if type(error) is not int]
            assert len(shown) > 8
            assert any(re.search(r"app:\*\*\*@127.0.0.1", text) for text in shown)
            assert not [text for text in (*shown, caplog.text) if "s3cret" in text]

    async def test_who_is_not_known_is_told_so(self, tmp_path: Path) -> None:
        async with tls_cluster(tmp_path) as nodes:
            place = f"127.0.0.1:{next(iter(nodes))}"
            wrong = f"rediss://app:wr0ng@{place}?ssl_ca_certs={tmp_path}/ca.pem&cluster=true"
            with pytest.raises(StoreUnavailable, match="refused the user or the pass") as caught:
                async with asyncstore.open(wrong, key_prefix="test-1:"):
                    pass
            assert "wr0ng" not in str(caught.value)
            untrusted = f"rediss://app:s3cret@{place}?cluster=true"
            with pytest.raises(StoreUnavailable, match="certificate can't be trusted"):
                async with asyncstore.open(untrusted, key_prefix="test-1:"):
                    pass
