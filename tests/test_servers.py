"""What the store does when the server is missing, odd, full, busy, or loses a reply."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import pytest
import redis
import uvloop

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    ConfigurationError,
    CorruptEvent,
    CorruptPosition,
    Event,
    OutcomeUnknown,
    Retention,
    Settings,
    Store,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
    UnexpectedReply,
    UnsafeServer,
    embedded,
)
from asyncstore.keys import Keys
from tests import servers
from tests.builders import listed, numbered, sequences
from tests.polling import eventually
from tests.proxy import proxy_to, serving
from tests.servers import RedisServer, Server, redis_server, rewrite_member, without_end

ORDER = Aggregate("orders", "1")
VALKEY = str(embedded.find_binary())


@pytest.mark.parametrize("kind", servers.kinds(), ids=lambda kind: kind.name)
def test_server_of_the_matrix_is_here(kind: servers.Kind) -> None:
    if kind.missing is not None:
        pytest.skip(kind.missing)
    with kind.running() as server, server.primaries() as clients:
        assert all(client.ping() for client in clients)
        assert (len(clients) > 1) == server.is_cluster


class TestOneRoundTrip:
    """A recorder of commands: what goes over the wire for each call."""

    @pytest.fixture
    def recorded(
        self, server: Server, prefix: str
    ) -> Iterator[Callable[[Awaitable[object]], Awaitable[list[str]]]]:
        with server.client() as client, client.monitor() as monitor:

            def drain() -> list[str]:
                client.echo(prefix)
                commands: list[str] = []
                while True:
                    seen = monitor.next_command()
                    if seen["command"].startswith("ECHO " + prefix):
                        return commands
                    if seen["client_type"] != "lua":
                        commands.append(seen["command"].split()[0].upper())

            async def record(call: Awaitable[object]) -> list[str]:
                drain()
                await call
                return drain()

            yield record

    async def test_every_call_is_one(
        self,
        store: Store,
        order: Aggregate,
        recorded: Callable[[Awaitable[object]], Awaitable[list[str]]],
    ) -> None:
        events, positions, snapshots = store.events, store.positions, store.snapshots
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: events.append(order, numbered(50), expected=NEW),
            lambda: events.append(order, numbered(1), expected=50),
            lambda: events.append(order, numbered(1), expected=ANY),
            lambda: events.read(order),
            lambda: events.read(order, start=3, stop=40, limit=7, reverse=True),
            lambda: events.next_sequence(order),
            lambda: store.load(order),
            lambda: positions.put("p", order, 3),
            lambda: positions.get("p", order),
            lambda: positions.advance("p", order, 4),
            lambda: snapshots.put(order, sequence=3, state=1, retention=Retention.PERSIST),
            lambda: snapshots.put(order, sequence=9, state=1),
            lambda: snapshots.get(order),
            lambda: snapshots.get(order, at=5),
            lambda: store.load(order),
            lambda: listed(events.roots("orders")),
            lambda: listed(events.domains()),
            lambda: listed(events.editions("orders")),
            lambda: snapshots.delete(order),
        ]
        for call in calls:
            await call()  # the script may have to be loaded first
        await events.delete(order)
        for call in calls:
            commands = await recorded(call())
            assert len(commands) == 1, commands
            assert commands[0] in {"EVALSHA", "GET", "ZCARD", "ZRANGE"}
        assert len(await recorded(events.delete(order))) <= 2  # 2: handlers are asked for first


class TestReach:
    async def test_nobody_there(self, tmp_path: Path) -> None:
        urls = [f"redis://:s3cret@127.0.0.1:{servers.free_port()}", f"unix://{tmp_path}/none"]
        for url in urls:
            with pytest.raises(StoreUnavailable, match="no connection") as caught:
                async with asyncstore.open(url):
                    pass
            assert "s3cret" not in str(caught.value)

    async def test_passwords(self, tmp_path: Path) -> None:
        with redis_server(VALKEY) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command(
                    "ACL", "SETUSER", "app", "on", ">s3cr:t@/", "~*", "&*", "+@all"
                )
                client.execute_command("ACL", "SETUSER", "default", "resetpass", ">other")
            path = urlsplit(server.url).path
            async with asyncstore.open(f"unix://app:s3cr%3At%40%2F@{path}") as store:
                await store.events.append(ORDER, numbered(1), expected=NEW)
            wrong = {
                f"unix://app:wr0ng@{path}": "refused the user or the password",
                f"unix://{path}": "wants a login",
            }
            for url, why in wrong.items():
                with pytest.raises(StoreUnavailable, match=why) as caught:
                    async with asyncstore.open(url):
                        pass
                assert "wr0ng" not in str(caught.value)
            with redis.Redis.from_url(f"unix://app:s3cr%3At%40%2F@{path}") as client:
                refused = [entry for entry in client.acl_log() if entry["reason"] == "auth"]
                assert sum(entry["count"] for entry in refused) == 1, "one login, one try"

    async def test_databases_are_apart(self) -> None:
        with redis_server(VALKEY, tcp=True) as server:
            async with asyncstore.open(server.url + "/3") as three:
                await three.events.append(ORDER, numbered(1), expected=NEW)
                async with asyncstore.open(server.url + "?db=4") as four:
                    assert await four.events.read(ORDER) == []
            valkey = server.url.replace("redis://", "valkey://")
            async with asyncstore.open(valkey + "/3") as three:
                assert len(await three.events.read(ORDER)) == 1

    async def test_options_that_make_no_sense(self, one_server: Server) -> None:
        with pytest.raises(ConfigurationError, match="option"):
            async with asyncstore.open(one_server.url + "?nonsense=1"):
                pass

    async def test_prefixes_are_apart(self, one_server: Server) -> None:
        async with (
            asyncstore.open(one_server.url, key_prefix="a:") as a,
            asyncstore.open(one_server.url, key_prefix="b:") as b,
        ):
            await a.events.append(ORDER, numbered(1), expected=NEW)
            assert await b.events.read(ORDER) == []
            assert await listed(b.events.domains()) == []
            await a.events.delete(ORDER)


class TestChecksAtOpen:
    @pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
    async def test_a_server_that_evicts_is_refused(self, policy: str) -> None:
        with redis_server(VALKEY, "--maxmemory-policy", policy) as server:
            with pytest.raises(UnsafeServer, match=policy):
                async with asyncstore.open(server.url):
                    pass
            async with asyncstore.open(server.url, allow_eviction=True) as store:
                await store.events.append(ORDER, numbered(1), expected=NEW)

    async def test_a_newer_layout_is_refused(self, one_server: Server, prefix: str) -> None:
        with one_server.client() as client:
            client.set(f"{prefix}layout:{{all}}", "2")
        with pytest.raises(ConfigurationError, match=r"layout '2'.*knows '1'"):
            async with asyncstore.open(one_server.url, key_prefix=prefix):
                pass

    async def test_a_node_whose_cluster_was_not_formed_is_refused(self) -> None:
        clustered = redis_server(VALKEY, "--cluster-enabled", "yes", tcp=True)
        with clustered as server, pytest.raises(StoreUnavailable, match="no node has the slots"):
            async with asyncstore.open(server.url, timeout=0.5):
                pass

    async def test_a_replica_takes_no_changes(self) -> None:
        replica = redis_server(VALKEY, "--replicaof", "127.0.0.1 1")
        with replica as server, pytest.raises(StoreUnavailable, match="replica"):
            async with asyncstore.open(server.url):
                pass

    async def test_an_acl_without_info_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with redis_server(VALKEY) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command(
                    "ACL", "SETUSER", "app", "on", ">pw", "~app:*", "+@all", "-info", "-zcard"
                )
            path = urlsplit(server.url).path
            url = f"unix://app:pw@{path}"
            with caplog.at_level(logging.WARNING):
                async with asyncstore.open(url, key_prefix="app:") as store:
                    with pytest.raises(UnexpectedReply, match="ACL"):
                        await store.events.next_sequence(ORDER)
            assert "NOPERM" in caplog.text
            assert "pw@" not in caplog.text


class TestTrouble:
    @pytest.fixture
    def running(self) -> Iterator[RedisServer]:
        with redis_server(VALKEY) as server:
            yield server

    @pytest.fixture
    async def store(self, running: RedisServer) -> AsyncIterator[Store]:
        async with asyncstore.open(running.url) as opened:
            yield opened

    async def test_a_lost_reply_is_found_out_or_said(self, running: RedisServer) -> None:
        path = Path(urlsplit(running.url).path)
        async with proxy_to(path) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            for place, expected in ((1, ANY), (2, 2), (3, ANY)):
                proxy.replies.cut()
                done = await store.events.append(ORDER, numbered(1), expected=expected)
                assert done == asyncstore.Appended(place, place)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: store.positions.put("p", ORDER, 1),
                lambda: store.snapshots.put(ORDER, sequence=0, state=1),
                lambda: store.events.delete(Aggregate("orders", "2")),
            ]
            for call in calls:
                await store.events.next_sequence(ORDER)  # there is a connection
                proxy.replies.cut()
                with pytest.raises(OutcomeUnknown, match="not known"):
                    await call()
            await store.events.next_sequence(ORDER)
            proxy.replies.cut()
            assert sequences(await store.events.read(ORDER)) == [0, 1, 2, 3]
            assert proxy.cuts == 7

    async def test_it_goes_on_after_a_restart(self, running: RedisServer, store: Store) -> None:
        await store.events.append(ORDER, numbered(1), expected=NEW)
        running.stop()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(store.events.append(ORDER, numbered(1), expected=NEW))
            await asyncio.to_thread(running.start)
        assert waiting.result() == asyncstore.Appended(0, 0)

    async def test_without_a_server_calls_end_in_time(self, running: RedisServer) -> None:
        async with asyncstore.open(running.url, timeout=0.3) as store:
            running.stop()
            with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                await store.events.append(ORDER, numbered(1), expected=1)
            calls = [store.events.append(ORDER, numbered(1), expected=ANY) for _ in range(5)]
            with anyio.fail_after(10):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            for outcome in outcomes:
                assert isinstance(outcome, StoreUnavailable)
                assert "no connection in 0.3 s" in str(outcome)

    async def test_out_of_memory(self, running: RedisServer, store: Store) -> None:
        await store.events.append(ORDER, numbered(5), expected=NEW)
        with redis.Redis.from_url(running.url) as client:
            client.config_set("maxmemory", "1")
            with pytest.raises(StoreFull):
                await store.events.append(ORDER, numbered(1), expected=5)
            assert sequences(await store.events.read(ORDER)) == [0, 1, 2, 3, 4]
            await store.snapshots.delete(ORDER)
            async with asyncstore.open(running.url) as other:
                assert (await other.load(ORDER)).next_sequence == 5
                assert await other.events.delete(ORDER) == 5

    async def test_forgotten_scripts_are_loaded_again(
        self, running: RedisServer, store: Store
    ) -> None:
        with redis.Redis.from_url(running.url) as client:
            for n in range(5):
                client.script_flush()
                await store.events.append(ORDER, numbered(1), expected=n)
                client.script_flush()
                assert (await store.load(ORDER)).next_sequence == n + 1

    @pytest.mark.parametrize(
        "key",
        [
            "events:orders:main:{1}",
            "roots:orders:main:{all}",
            "editions:orders:{all}",
            "domains:{all}",
            "commits:{all}",
        ],
    )
    async def test_a_key_of_another_kind_stops_an_append_whole(
        self, running: RedisServer, store: Store, key: str
    ) -> None:
        with redis.Redis.from_url(running.url) as client:
            client.delete(key)
            client.rpush(key, "somebody else's")
            with pytest.raises(UnexpectedReply, match=r"WRONGTYPE.*key_prefix"):
                await store.events.append(ORDER, numbered(3), expected=NEW)
            client.delete(key)
            assert await store.events.read(ORDER) == []
            await store.events.append(ORDER, numbered(3), expected=NEW)
            assert await listed(store.events.domains()) == ["orders"]
            assert await listed(store.events.editions("orders")) == ["main"]
            assert await listed(store.events.roots("orders")) == ["1"]
            client.delete(key)
            client.rpush(key, "somebody else's")
            await store.positions.put("p", ORDER, 1)
            if key != "commits:{all}":
                with pytest.raises(UnexpectedReply, match="WRONGTYPE"):
                    await store.events.delete(ORDER)
                assert await store.positions.get("p", ORDER) == 1

    async def test_a_position_that_is_none(self, running: RedisServer, store: Store) -> None:
        with redis.Redis.from_url(running.url) as client:
            client.set("positions:p:orders:main:{1}", "far")
        with pytest.raises(CorruptPosition, match="positions:p:orders:main"):
            await store.positions.get("p", ORDER)
        assert await store.positions.advance("p", ORDER, 3)
        assert await store.positions.get("p", ORDER) == 3

    async def test_a_server_that_is_silent(self) -> None:
        accepted = asyncio.Event()

        async def never_answer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            accepted.set()
            await reader.read(-1)

        async with serving(never_answer) as url:
            with pytest.raises(StoreUnavailable, match="in time"):
                async with asyncstore.open(url, timeout=0.2):
                    pass
        assert accepted.is_set()


class TestConcurrency:
    @pytest.mark.parametrize("bound", [{"max_in_flight": 3}, {"max_in_flight_bytes": 1000}])
    async def test_more_callers_than_may_be_in_flight(
        self, one_server: Server, prefix: str, bound: dict[str, int]
    ) -> None:
        settings = Settings(url=one_server.url, key_prefix=prefix, **bound)  # type: ignore[arg-type]
        async with asyncstore.open(settings) as store:
            await asyncio.gather(
                *(store.events.append(ORDER, numbered(1), expected=ANY) for _ in range(300))
            )
            assert sequences(await store.events.read(ORDER)) == list(range(300))

    async def test_nothing_is_sent_once_the_store_is_closed(self) -> None:
        with redis_server(VALKEY) as running, redis.Redis.from_url(running.url) as client:
            async with asyncstore.open(running.url, max_in_flight=1) as store:
                client.client_pause(60_000, all=False)  # it takes no writes for now
                events = numbered(500)  # so many that few appends make a group
                calls = [
                    asyncio.create_task(store.events.append(ORDER, events, expected=ANY))
                    for _ in range(12)
                ]
                wire = store._router.nodes()[0].transport._wire
                assert wire is not None
                await eventually(lambda: bool(wire.waiting), "some of them were sent")
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            kinds = [type(outcome) for outcome in outcomes]
            assert set(kinds) == {OutcomeUnknown, StoreClosed}
            client.client_unpause()
            assert client.zcard("events:orders:main:{1}") <= 500 * kinds.count(OutcomeUnknown)

    async def test_cancelled_callers_disturb_nobody(self, one_server: Server, prefix: str) -> None:
        dice = random.Random(5)
        async with asyncstore.open(one_server.url, key_prefix=prefix, max_in_flight=40) as store:

            async def append(n: int) -> Aggregate:
                place = Aggregate("orders", f"{n}")
                await store.events.append(place, [Event("Counted", n)], expected=NEW)
                (event,) = await store.events.read(place)
                assert event.data == n
                return place

            async def cancelled(n: int) -> None:
                async with asyncio.timeout(dice.random() / 100):
                    await append(n)

            outcomes = await asyncio.gather(
                *(cancelled(n) if n % 2 else append(n) for n in range(600)),
                return_exceptions=True,
            )
            for n, outcome in enumerate(outcomes):
                if n % 2 == 0:
                    assert outcome == Aggregate("orders", f"{n}")
                else:
                    assert outcome is None or isinstance(outcome, TimeoutError)
            assert any(isinstance(outcome, TimeoutError) for outcome in outcomes)

    async def test_cancelled_scopes_leave_the_connection(
        self, one_server: Server, prefix: str
    ) -> None:
        # Inside a cancelled scope of anyio every await is cancelled again, those of a clean-up too.
        async with asyncstore.open(one_server.url, key_prefix=prefix, max_in_flight=2) as store:
            for n in range(100):
                with anyio.move_on_after(n % 10 / 5000):
                    await store.events.append(ORDER, numbered(200), expected=ANY)
            with anyio.fail_after(10):
                events = await store.events.read(ORDER)
            assert len(events) % 200 == 0

    def test_another_event_loop_is_refused(self, one_server: Server) -> None:
        store = asyncstore.open(one_server.url)
        with asyncio.Runner() as one, asyncio.Runner() as other:
            one.run(store.__aenter__())
            with pytest.raises(StoreClosed, match="another event loop"):
                other.run(store.events.next_sequence(ORDER))
            one.run(store.__aexit__(None, None, None))

    def test_it_runs_on_uvloop(self) -> None:
        async def use() -> list[int]:
            async with asyncstore.open("embedded://") as store:
                await asyncio.gather(
                    *(store.events.append(ORDER, numbered(1), expected=ANY) for _ in range(50))
                )
                return sequences(await store.events.read(ORDER))

        assert uvloop.run(use()) == list(range(50))


class TestCorruption:
    @pytest.mark.parametrize(
        "garbage", [b"", b"\xff\xfe", b"not an event", b'[3,0,"x","A"]\n{}', b"[3]\n"], ids=repr
    )
    async def test_a_broken_event_is_named_and_the_others_can_be_read(
        self, server: Server, prefix: str, store: Store, order: Aggregate, garbage: bytes
    ) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        key = Keys(prefix).events(order)
        with server.client() as client:
            client.zremrangebyscore(key, 3, 3)
            client.zadd(key, {garbage: 3})
        for read in (
            lambda: store.events.read(order),
            lambda: store.events.read(order, reverse=True),
            lambda: store.load(order),
            lambda: listed(store.events.stream(order, start=2)),
        ):
            with pytest.raises(CorruptEvent) as caught:
                await read()
            assert (caught.value.key, caught.value.sequence) == (key, 3)
            assert "not an event" not in str(caught.value)
        assert sequences(await store.events.read(order, stop=3)) == [0, 1, 2]
        assert sequences(await store.events.read(order, start=4)) == [4, 5]
        stream = store.events.stream(order)
        assert [(await anext(stream)).sequence for _ in range(3)] == [0, 1, 2]
        with pytest.raises(CorruptEvent):
            await anext(stream)

    async def test_data_that_are_broken_are_named_when_they_are_asked_for(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        key = Keys(prefix).events(order)
        rewrite_member(server, key, 1, without_end)
        first, broken, last = (await store.load(order)).events
        assert (first.data, last.data) == ({"n": 0}, {"n": 2})
        assert (broken.sequence, broken.type) == (1, "Counted")
        with pytest.raises(CorruptEvent) as caught:
            _ = broken.data
        assert (caught.value.key, caught.value.sequence) == (key, 1)

    async def test_a_missing_event_is_no_silent_gap(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        key = Keys(prefix).events(order)
        with server.client() as client:
            client.zremrangebyscore(key, 3, 3)
        for reverse in (False, True):
            with pytest.raises(CorruptEvent, match="missing") as caught:
                await store.events.read(order, reverse=reverse)
            assert caught.value.sequence == 3

    @pytest.mark.parametrize("place", [0, 1, 5])
    async def test_two_at_one_place(
        self, server: Server, prefix: str, store: Store, order: Aggregate, place: int
    ) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        what_if = order.on("what-if")
        await store.events.branch(what_if, at=place + 1)
        key = Keys(prefix).events(order)
        with server.client() as client:
            client.zadd(key, {f'[{place},1,"{"0" * 32}","A"]\n{{}}': place})
        for read in (
            store.events.read(order),
            store.events.read(order, reverse=True),
            store.events.read(what_if),
            store.load(order),
        ):
            with pytest.raises(CorruptEvent, match="two members stand there") as caught:
                await read
            assert (caught.value.key, caught.value.sequence) == (key, place)
            assert f"stop={place}, those after it with start={place + 1}" in str(caught.value)
        assert sequences(await store.events.read(order, stop=place)) == list(range(place))
        assert sequences(await store.events.read(order, start=place + 1)) == [*range(place + 1, 6)]
        assert sequences(await store.events.read(order, start=place, limit=1)) == [place]

    @pytest.mark.parametrize(("score", "sequence"), [("2.5", 2), ("+inf", 2**53 - 1)])
    async def test_garbage_at_no_sequence(
        self,
        server: Server,
        prefix: str,
        store: Store,
        order: Aggregate,
        score: str,
        sequence: int,
    ) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        with server.client() as client:
            client.zadd(Keys(prefix).events(order), {"garbage": score})
        with pytest.raises(CorruptEvent) as caught:
            await store.events.read(order)
        assert caught.value.sequence == sequence
        before = await store.events.read(order, stop=sequence)
        assert sequences(before) == list(range(min(sequence, 6)))

    async def test_an_event_at_anothers_place(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        key = Keys(prefix).events(order)
        rewrite_member(server, key, 3, lambda member: b"[9" + member[2:])
        with pytest.raises(CorruptEvent, match="another sequence") as caught:
            await store.events.read(order)
        assert caught.value.sequence == 3

    @pytest.mark.parametrize(
        "fields",
        [
            {"state": b"\xff not json"},
            {"encoding": "zip"},
            {"sequence": "many"},
            {"sequence": "-5"},
            {"sequence": "nan"},
            {"sequence": str(2**60)},
            {"retention": "forever"},
            {"time": "noon"},
        ],
        ids=str,
    )
    async def test_a_broken_snapshot_is_passed_over_with_a_warning(
        self,
        server: Server,
        prefix: str,
        store: Store,
        order: Aggregate,
        fields: dict[str, str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        await store.snapshots.put(order, sequence=3, state="fine")
        with server.client() as client:
            client.hset(Keys(prefix).snapshots(order)[0], mapping=dict(fields))
        loaded = await store.load(order)
        assert loaded.snapshot is None
        assert sequences(loaded.events) == [0, 1, 2, 3, 4, 5]
        assert await store.snapshots.get(order) is None
        assert "passed over" in caplog.text
        await store.snapshots.put(order, sequence=5, state="mended")
        loaded = await store.load(order)
        assert loaded.snapshot is not None
        assert loaded.snapshot.state == "mended"
