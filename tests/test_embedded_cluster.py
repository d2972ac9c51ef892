"""The embedded cluster: forming, faults, coming back, what is left behind; and its command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
import redis

from asyncstore import (
    ConfigurationError,
    InvalidValue,
    StoreUnavailable,
    embedded,
    embedded_cluster,
    forms,
)
from asyncstore.embedded_cluster import Cluster, Node
from asyncstore.transport import Bounds
from tests import servers
from tests.polling import eventually
from tests.processes import gone, is_running, parent_of

SLOTS = 16_384


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary ones, for this process and those that it starts."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def client_of(node: Node) -> redis.Redis:
    return redis.Redis.from_url(node.url, decode_responses=True)


def of_cluster(cluster: Cluster) -> redis.RedisCluster:
    return redis.RedisCluster.from_url(cluster.urls[0], decode_responses=True)


def is_loading(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.BusyLoadingError:
        return True
    return False


def primaries(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if node.is_primary]


def replicas(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.nodes if not node.is_primary]


def role(node: Node) -> list[object]:
    with client_of(node) as client:
        return list(client.role())


def primary_port(replica: Node) -> int:
    name, _, port, link, _ = role(replica)
    assert (name, link) == ("slave", "connected")
    return int(str(port))


def replicas_in_step(primary: Node) -> list[object]:
    name, _, found = role(primary)
    assert name == "master"
    assert isinstance(found, list)
    return found


def replica_of(cluster: Cluster, primary: Node) -> Node:
    (found,) = [node for node in replicas(cluster) if primary_port(node) == primary.port]
    return found


def is_primary_now(node: Node) -> bool:
    return role(node)[0] == "master"


def info(node: Node) -> dict[str, str]:
    with client_of(node) as client:
        found: dict[str, str] = client.cluster("info")
    return found


def shares(node: Node) -> list[int]:
    """How many slots each range has that a node knows of."""
    with client_of(node) as client:
        return [last - first + 1 for first, last, *_ in client.execute_command("CLUSTER SLOTS")]


def hosts(node: Node) -> set[str]:
    """Where a node sends clients."""
    with client_of(node) as client:
        slots = client.execute_command("CLUSTER SLOTS")
    return {owner[0] for _, _, *owners in slots for owner in owners}


def kind(missing: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(missing is not None, reason=missing or "")


BINARIES = [
    pytest.param(lambda: None, id="embedded-valkey"),
    pytest.param(servers._path_binary, id="redis-on-path", marks=kind(servers._path_missing())),
    pytest.param(servers._wheel_binary, id="redis-8.2", marks=kind(servers._wheel_missing())),
]


class TestForming:
    @pytest.mark.parametrize("find", BINARIES)
    async def test_it_is_whole_and_leaves_nothing(
        self, find: Callable[[], str | None], temporary: Path
    ) -> None:
        found = find()
        async with embedded_cluster.running(binary=Path(found) if found else None) as cluster:
            assert len(cluster.urls) == len(set(cluster.urls)) == 6
            for node in cluster.nodes:
                assert info(node)["cluster_state"] == "ok"
                assert sum(shares(node)) == SLOTS
                assert max(shares(node)) - min(shares(node)) <= 1
            for node in primaries(cluster):
                assert len(replicas_in_step(node)) == 1
            assert len(primaries(cluster)) == 3
            assert cluster.nodes[:3] == primaries(cluster)
            assert sorted(primary_port(node) for node in replicas(cluster)) == sorted(
                node.port for node in primaries(cluster)
            )
            with of_cluster(cluster) as client:
                for n in range(100):
                    client.set(f"key-{n}", n)
                assert client.get("key-17") == "17"
            pids = [node.pid for node in cluster.nodes]
            assert all(map(is_running, pids))
            pids += [parent_of(pid) for pid in pids]
            assert len(list(temporary.iterdir())) == 6
        for pid in pids:
            await gone(pid)  # a keeper ends right after it has hung up
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize(("count", "each"), [(1, 0), (1, 2), (6, 1), (9, 0)])
    async def test_of_any_size(self, count: int, each: int) -> None:
        async with embedded_cluster.running(primaries=count, replicas=each) as cluster:
            assert len(primaries(cluster)) == count
            followed = [primary_port(node) for node in replicas(cluster)]
            assert sorted(followed) == sorted(
                n.port for n in primaries(cluster) for _ in range(each)
            )
            assert sum(shares(cluster.nodes[-1])) == SLOTS
            assert hosts(cluster.nodes[0]) == {"127.0.0.1"}
            with of_cluster(cluster) as client:
                assert client.set("key", "1")

    async def test_several_at_once(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clusters = await asyncio.gather(
                *(stack.enter_async_context(embedded_cluster.running(replicas=0)) for _ in range(3))
            )
            assert len({url for cluster in clusters for url in cluster.urls}) == 9
            for cluster in clusters:
                assert info(cluster.nodes[0])["cluster_known_nodes"] == "3"

    async def test_settings_reach_each_server(self) -> None:
        wanted = {
            "appendonly": "yes",
            "bind": "127.0.0.1",
            "cluster-node-timeout": "700",
            "repl-diskless-sync-delay": "0",
        }
        async with embedded_cluster.running(
            primaries=2, replicas=0, node_timeout=0.7, settings={"appendonly": "yes"}
        ) as cluster:
            for node in cluster.nodes:
                with client_of(node) as client:
                    assert {name: client.config_get(name)[name] for name in wanted} == wanted

    @pytest.mark.parametrize("bus", [0, 10_000])
    async def test_a_port_that_was_taken_meanwhile(
        self, bus: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free_port = embedded_cluster._free_port
        with socket.socket() as other:
            taken = free_port()
            other.bind(("127.0.0.1", taken + bus))
            other.listen()
            chosen = iter([taken, taken])
            monkeypatch.setattr(
                embedded_cluster, "_free_port", lambda: next(chosen, None) or free_port()
            )
            async with embedded_cluster.running(primaries=2, replicas=0) as cluster:
                assert next(chosen, None) is None
                assert taken not in {node.port for node in cluster.nodes}

    def test_a_free_port_is_one_with_a_free_bus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        busy = embedded_cluster._free_port() + 10_000
        monkeypatch.setattr(embedded_cluster, "_PORTS", range(busy - 10_000, busy - 9_998))
        monkeypatch.setattr("random.sample", lambda ports, _: list(ports))
        with socket.socket() as other:
            other.bind(("127.0.0.1", busy))
            assert embedded_cluster._free_port() == busy - 9_999


# One that notices soon who is dead.
quick = partial(embedded_cluster.running, node_timeout=0.5)


class TestFaults:
    async def test_a_killed_primary_is_replaced_and_comes_back(self) -> None:
        async with quick() as cluster:
            victim = cluster.nodes[0]
            heir, pid, url = replica_of(cluster, victim), victim.pid, victim.url
            with of_cluster(cluster) as client:
                client.set("key", "before")
            with client_of(cluster.nodes[0]) as direct:
                direct.wait(1, 5000)
            await victim.kill()
            assert not is_running(pid)
            await eventually(lambda: is_primary_now(heir), "the replica was promoted")
            others = [node for node in cluster.nodes if node is not victim]
            await eventually(
                lambda: all(info(node)["cluster_state"] == "ok" for node in others),
                "the others went on",
            )
            await victim.restart()
            await cluster.until_whole()
            assert victim.pid != pid
            assert victim.url == url
            assert heir.is_primary
            assert primary_port(victim) == heir.port
            with of_cluster(cluster) as client:
                assert client.get("key") == "before"

    async def test_a_paused_primary_is_replaced_and_goes_on(self) -> None:
        async with quick() as cluster:
            victim = cluster.nodes[1]
            heir = replica_of(cluster, victim)
            await victim.pause()
            await eventually(lambda: is_primary_now(heir), "the replica was promoted")
            await victim.resume()
            await eventually(lambda: not is_primary_now(victim), "it saw that")
            await cluster.until_whole()
            assert heir.is_primary
            assert not victim.is_primary

    async def test_a_node_that_runs_can_be_restarted(self) -> None:
        async with quick(primaries=1, replicas=1) as cluster:
            replica = cluster.nodes[1]
            pid = replica.pid
            await replica.restart()
            assert not is_running(pid)
            await cluster.until_whole()
            await replica.pause()
            await replica.restart()  # a paused one, too
            await cluster.until_whole()
            for node in cluster.nodes:
                await node.pause()
            started = time.monotonic()
        assert time.monotonic() - started < 30  # and not the minute that a server is given

    async def test_a_node_that_loads_its_data_is_waited_for(self) -> None:
        slowly = {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024"}
        whole = {"repl-backlog-size": "16kb"}  # too little for what the replica is to have
        async with quick(primaries=1, replicas=1, settings=slowly | whole) as cluster:
            primary, replica = cluster.nodes
            with client_of(primary) as client:
                client.mset({f"{{x}}{n}": "x" * 100 for n in range(500)})
            await replica.restart()
            with client_of(replica) as client:
                await eventually(lambda: is_loading(client), "it is loading")
            await cluster.until_whole()
            with client_of(replica) as client:
                assert client.dbsize() == 500

    async def test_a_node_that_ended_by_itself_can_be_killed_stopped_and_restarted(self) -> None:
        async with quick(primaries=1, replicas=0) as cluster:
            (node,) = cluster.nodes
            for _ in range(2):
                os.kill(node.pid, signal.SIGKILL)
                await gone(node.pid)
                await node.kill()
                await node.stop()
                await node.restart()
                await cluster.until_whole()
                await node.stop()
                assert not is_running(node.pid)
                await node.restart()

    async def test_nodes_come_and_go(self, temporary: Path) -> None:
        async with quick(primaries=3, replicas=0) as cluster:
            node = await cluster.add_node()
            assert cluster.nodes[-1] is node
            for each in cluster.nodes:
                assert info(each)["cluster_known_nodes"] == "4"
            assert sum(shares(node)) == SLOTS
            with pytest.raises(InvalidValue, match="has slots"):
                await cluster.remove_node(cluster.nodes[0])
            await cluster.remove_node(node)
            assert len(cluster.nodes) == len(list(temporary.iterdir())) == 3
            await gone(node.pid)
            assert [info(each)["cluster_known_nodes"] for each in cluster.nodes] == ["3"] * 3
            await cluster.until_whole()

    @pytest.mark.parametrize(
        ("command", "why"),
        [
            ("CLUSTER DELSLOTS 7", "16383 slots covered|who has which slots"),
            ("ACL SETUSER default -psync -sync", "0 of 1 replicas|link to its primary is down"),
        ],
    )
    async def test_what_is_lacking_is_said(self, command: str, why: str) -> None:
        async with quick(primaries=1, replicas=1) as cluster:
            with client_of(cluster.nodes[0]) as client:
                client.execute_command(command)
                client.client_kill_filter(_type="replica")
            with pytest.raises(StoreUnavailable) as caught:
                await cluster.until_whole(seconds=0.5)
            said = str(caught.value)
            assert re.search(r"not whole after 0.5 s: node-\d at redis://\S+ (says|has|does)", said)
            assert re.search(why, said)

    def test_nodes_that_do_not_agree_are_not_whole(self) -> None:
        # It passes too soon to be caught in the act.
        fine = {"cluster_state": "ok", "cluster_slots_ok": "16384"}
        views = []
        for name, mine, others in [("a", "0-16383", ""), ("b", "", "0-16382 [16383->-a]")]:
            lines = [f"{name} 127.0.0.1:1@2 myself,master - 0 0 1 connected {mine}"]
            lines += [f"{'ab'.strip(name)} 127.0.0.1:3@4 master - 0 0 2 connected {others}"]
            peers = [forms.Peer.parse(line) for line in lines]
            home = embedded.Home(Path(), Path(), Path(), True, False, {})
            views.append(embedded_cluster._View(Node(name, home), peers, fine, {}))
        assert embedded_cluster._lack_of_whole(views[:1] * 2) is None
        lack = embedded_cluster._lack_of_whole(views)
        assert lack == (views[1].node, "does not agree with a who has which slots")

    async def test_a_node_that_is_down_is_named(self) -> None:
        async with quick(primaries=3, replicas=0) as cluster:
            await cluster.nodes[1].kill()
            with pytest.raises(StoreUnavailable, match=r"^node-2 at .*; its log ends with: "):
                await cluster.until_whole()


class TestKeeping:
    async def test_it_comes_back_with_its_data(self, tmp_path: Path) -> None:
        async with embedded_cluster.running(directory=tmp_path / "c") as cluster:
            urls = cluster.urls
            with of_cluster(cluster) as client:
                for n in range(50):
                    client.set(f"key-{n}", n)
        async with embedded_cluster.running(directory=tmp_path / "c") as cluster:
            assert sorted(cluster.urls) == sorted(urls)
            with of_cluster(cluster) as client:
                assert [client.get(f"key-{n}") for n in range(50)] == [f"{n}" for n in range(50)]
            assert len(primaries(cluster)) == 3
            assert all(node.directory.parent == tmp_path / "c" for node in cluster.nodes)

    async def test_it_comes_back_where_ports_are_taken(self, tmp_path: Path) -> None:
        async with embedded_cluster.running(directory=tmp_path) as cluster:
            # All of them: or who has moved would find those who have not.
            taken = [
                node.port + bus for node, bus in zip(cluster.nodes, [0, 10_000] * 3, strict=True)
            ]
            urls = set(cluster.urls)
            with of_cluster(cluster) as client:
                client.set("key", "1")
        with contextlib.ExitStack() as stack:
            for port in taken:
                other = stack.enter_context(socket.socket())
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(("127.0.0.1", port))
                other.listen()
            async with embedded_cluster.running(directory=tmp_path) as cluster:
                assert not urls & set(cluster.urls)
                with of_cluster(cluster) as client:
                    assert client.get("key") == "1"
                    client.set("key", "2")
        async with embedded_cluster.running(directory=tmp_path) as cluster:
            with of_cluster(cluster) as client:
                assert client.get("key") == "2"

    async def test_after_a_failover_and_with_another_node_it_comes_back(
        self, tmp_path: Path
    ) -> None:
        async with embedded_cluster.running(node_timeout=0.5, directory=tmp_path) as cluster:
            victim = cluster.nodes[0]
            heir = replica_of(cluster, victim)
            await victim.kill()
            await eventually(lambda: is_primary_now(heir), "the replica was promoted")
            await victim.restart()
            await cluster.until_whole()
            gone_again = await cluster.add_node()
            await cluster.remove_node(gone_again)
            assert not gone_again.directory.exists()
            added = await cluster.add_node()
            names = {node.name for node in cluster.nodes}
        async with embedded_cluster.running(directory=tmp_path) as cluster:
            assert {node.name for node in cluster.nodes} == names
            roles = {node.name: node.is_primary for node in cluster.nodes}
            assert (roles[victim.name], roles[heir.name], roles[added.name]) == (False, True, True)

    async def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        small = partial(embedded_cluster.running, primaries=1, replicas=0, directory=tmp_path)
        async with small():
            with pytest.raises(ConfigurationError, match="running already"):
                async with small():
                    pass
        async with small():
            pass

    async def test_forming_that_was_cut_off_begins_anew(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable):
            async with embedded_cluster.running(directory=tmp_path, seconds=1):
                pass
        assert (tmp_path / "node-1" / "nodes.conf").exists()
        # Nobody has used that one, so another may be made there.
        async with embedded_cluster.running(primaries=1, directory=tmp_path) as cluster:
            assert len(cluster.nodes) == 2
        assert not (tmp_path / "node-3").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"primaries": 0}, r"^primaries in the arguments: 0: a cluster has 1 at least"),
            ({"replicas": -1}, r"^replicas in the arguments: -1: "),
            ({"primaries": 33}, r"^primaries .*: 33 with replicas=1 are 66 .* at most 64"),
            ({"binary": Path("/dev/null")}, r"^binary .*: /dev/null is not a program"),
            ({"directory": Path("/dev/null")}, r"^directory .*: /dev/null is not a directory"),
            ({"directory": Path("/proc/self")}, r"^directory .*/proc/\d+ can't be"),
        ],
    )
    async def test_arguments(self, options: dict[str, object], why: str, temporary: Path) -> None:
        with pytest.raises(ConfigurationError, match=why):
            async with embedded_cluster.running(**options):  # type: ignore[arg-type]
                pass
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "text", "why"),
        [
            ("letter.txt", "mine", "neither empty nor the directory of a cluster"),
            ("cluster.json", "mine", "it is not what a cluster leaves there"),
            ("cluster.json", '{"primaries": 3}', "it is not what a cluster leaves there"),
            (
                "cluster.json",
                '{"primaries": 2, "replicas": 0, "is_formed": true, "ports": {}}',
                "has primaries=2 and replicas=0: give these numbers",
            ),
        ],
    )
    async def test_directories_of_something_else(
        self, tmp_path: Path, name: str, text: str, why: str
    ) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigurationError, match=why):
            async with embedded_cluster.running(directory=tmp_path):
                pass
        assert (tmp_path / name).read_text() == text
        assert {path.name for path in tmp_path.iterdir()} <= {name, "lock"}

    @pytest.mark.parametrize(
        ("program", "why"),
        [
            ("#!/bin/sh\necho this is no server >&2\nexit 1\n", "this is no server"),
            ("this is no program\n", "Exec format error"),
        ],
    )
    async def test_a_server_that_does_not_start_shows_its_log(
        self, program: str, why: str, tmp_path: Path, temporary: Path
    ) -> None:
        binary = tmp_path / "server"
        binary.write_text(program)
        binary.chmod(0o700)
        with pytest.raises(StoreUnavailable, match=why):
            async with embedded_cluster.running(binary=binary):
                pass
        await eventually(lambda: not list(temporary.iterdir()), "the directories went")

    async def test_a_setting_that_is_none(self, temporary: Path) -> None:
        with pytest.raises(StoreUnavailable, match="no-such-setting"):
            async with embedded_cluster.running(settings={"no-such-setting": "1"}):
                pass
        await eventually(lambda: not list(temporary.iterdir()), "the directories went")

    @pytest.mark.parametrize("seconds", [0, 0.05, 0.15, 0.6, 1.5])
    async def test_when_the_time_is_over_nothing_is_left(
        self, seconds: float, temporary: Path
    ) -> None:
        with pytest.raises(StoreUnavailable, match=f"is not whole after {seconds:g} s"):
            async with embedded_cluster.running(seconds=seconds):
                pass
        await eventually(lambda: not list(temporary.iterdir()), "the directories went")

    async def test_a_node_that_dies_while_it_is_formed(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        introduce = embedded_cluster._introduce

        async def strike(lines: list[embedded_cluster._Line], nodes: list[Node]) -> None:
            await introduce(lines, nodes)
            await nodes[4].kill()

        monkeypatch.setattr(embedded_cluster, "_introduce", strike)
        monkeypatch.setattr(embedded_cluster, "_BOUNDS", Bounds(0.5, 100, 1 << 20))
        with pytest.raises(StoreUnavailable, match=r"^node-5 at .*; its log ends with: .*"):
            async with embedded_cluster.running():
                pass
        await eventually(lambda: not list(temporary.iterdir()), "the directories went")

    async def test_cancelled_while_it_forms_leaves_nothing(self, temporary: Path) -> None:
        for delay in (0.0, 0.03, 0.08, 0.3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay), embedded_cluster.running():
                    await asyncio.Event().wait()
        await eventually(lambda: not list(temporary.iterdir()), "the directories went")

    async def test_a_cancelled_user_leaves_in_good_order(self, temporary: Path) -> None:
        pids: list[int] = []
        with anyio.CancelScope() as scope:
            async with embedded_cluster.running(primaries=1) as cluster:
                pids += [node.pid for node in cluster.nodes]
                scope.cancel()
                await anyio.sleep_forever()
        assert len(pids) == 2
        assert not any(map(is_running, pids))
        assert list(temporary.iterdir()) == []


PARENT = """
    import asyncio, sys
    from asyncstore import embedded_cluster

    async def main():
        async with embedded_cluster.running(replicas=0) as cluster:
            await cluster.nodes[0].kill()  # its directory goes, too
            print(*(node.pid for node in cluster.nodes), flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main())
"""


async def test_the_servers_of_a_killed_process_end(temporary: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(PARENT), stdin=pipe, stdout=pipe
    )
    assert parent.stdout is not None
    try:
        pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
        assert [is_running(pid) for pid in pids] == [False, True, True]
        assert len(list(temporary.iterdir())) == 3
    finally:
        parent.kill()
        await parent.communicate()
    for pid in pids:
        await gone(pid)
    await eventually(lambda: not list(temporary.iterdir()), "the directories went")


@contextlib.asynccontextmanager
async def command(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "asyncstore", "cluster", "start", *arguments),
        stdout=pipe,
        stderr=pipe,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class TestCommand:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    async def test_it_stays_until_a_signal_says_stop(
        self, number: signal.Signals, temporary: Path
    ) -> None:
        async with command("--primaries", "2", "--replicas", "0", "--json") as process:
            assert process.stdout is not None
            shown = json.loads(await process.stdout.readline())
            assert shown["urls"] == [node["url"] for node in shown["nodes"]]
            assert [node["primary"] for node in shown["nodes"]] == [True, True]
            assert sorted(node["directory"] for node in shown["nodes"]) == sorted(
                str(path) for path in temporary.iterdir()
            )
            with redis.RedisCluster.from_url(shown["urls"][0]) as client:
                assert client.set("key", "1")
            process.send_signal(number)
            process.send_signal(number)  # an impatient user stops it no worse
            assert await process.wait() == 0
            assert not any(is_running(node["pid"]) for node in shown["nodes"])
            assert list(temporary.iterdir()) == []

    async def test_it_says_how_to_use_it(self, tmp_path: Path) -> None:
        directory = tmp_path / "data"
        async with command("--primaries", "1", "--dir", str(directory)) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            lines = [(await process.stdout.readline()).decode() for _ in range(5)]
            primary, replica = (
                re.fullmatch(rf"{role}  (redis://\S+)  pid \d+  {directory}/node-\d\n", line)
                for role, line in zip(("primary", "replica"), lines, strict=False)
            )
            assert primary
            assert replica
            assert lines[3] == f'asyncstore.open(urls=["{primary[1]}", "{replica[1]}"])\n'
            assert lines[4] == f"export ASYNCSTORE_URLS={primary[1]},{replica[1]}\n"
            assert b"Ctrl-C stops it" in await process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
        assert (directory / "cluster.json").exists()

    async def test_ctrl_c_while_it_forms(self, temporary: Path) -> None:
        async with command() as process:
            await eventually(lambda: len(list(temporary.iterdir())) == 6, "it has begun")
            process.send_signal(signal.SIGINT)
            output, _ = await process.communicate()
            assert (process.returncode, output) == (0, b"")
        await eventually(lambda: not list(temporary.iterdir()), "the directories went")

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (["--primaries", "0"], "error: primaries in the arguments: 0"),
            (["--replicas", "-1"], "error: replicas in the arguments: -1"),
            (["--primaries", "100"], "at most 64"),
            (["--primaries", "many"], "'--primaries'"),
            (["--dir", "/dev/null"], "error: directory in the arguments: /dev/null is not"),
        ],
    )
    def test_bad_input(self, arguments: list[str], why: str, temporary: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "asyncstore", "cluster", "start", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert why in done.stderr
        assert done.stdout == ""
        assert list(temporary.iterdir()) == []
