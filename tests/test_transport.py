"""The shared connection: in step whatever happens, each append stored once, every answer true."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import socket
import tracemalloc
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sized
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import hiredis
import pytest
import redis
import trustme
import uvloop

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Event,
    OutcomeUnknown,
    SequenceConflict,
    Store,
    StoreUnavailable,
    embedded,
)
from asyncstore.testing import Cut, FaultProxy
from asyncstore.wire import Wire
from tests.builders import listed, numbered, sequences
from tests.polling import eventually
from tests.proxy import handshake_answer, proxy_to, serving
from tests.servers import RedisServer, Server, as_user, free_port, redis_server

VALKEY = str(embedded.find_binary())
REDIS = shutil.which("redis-server")
ORDER = Aggregate("orders", "1")


@pytest.fixture(autouse=True)
def _nothing_goes_unheard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What asyncio logs as an error are exceptions that nobody caught."""
    yield
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [r.getMessage() for r in records if r.name == "asyncio" and r.levelname == "ERROR"] == []


@pytest.fixture
def running() -> Iterator[RedisServer]:
    with redis_server(VALKEY) as server:
        yield server


@asynccontextmanager
async def store_behind_proxy(running: RedisServer) -> AsyncIterator[tuple[Store, FaultProxy]]:
    path = Path(urlsplit(running.url).path)
    async with proxy_to(path) as proxy, asyncstore.open(proxy.url, timeout=30) as store:
        yield store, proxy


class History:
    """What the writers were told, to be held against what is stored."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[Aggregate, Appended, list[uuid.UUID]]] = []
        self.refused: list[uuid.UUID] = []
        self.unknown: list[uuid.UUID] = []

    async def append(self, store: Store, place: Aggregate, count: int, expected: int | None) -> int:
        """Append, note the answer, and return what to expect next."""
        events = [Event("Written", {"n": n}) for n in range(count)]
        ids = [event.id for event in events]
        try:
            done = await store.events.append(
                place, events, expected=ANY if expected is None else expected
            )
        except SequenceConflict as conflict:
            self.refused += ids
            return conflict.actual
        except OutcomeUnknown:
            self.unknown += ids
            return await store.events.next_sequence(place)
        self.acknowledged.append((place, done, ids))
        return done.last_sequence + 1

    async def check(self, store: Store, places: list[Aggregate]) -> None:
        stored = {place: await store.events.read(place) for place in places}
        for events in stored.values():
            assert sequences(events) == list(range(len(events)))
        found = Counter(event.id for events in stored.values() for event in events)
        assert not [event_id for event_id, times in found.items() if times > 1]
        for place, done, ids in self.acknowledged:
            there = stored[place][done.first_sequence : done.last_sequence + 1]
            assert [event.id for event in there] == ids
        assert not found.keys() & set(self.refused)
        known = {event_id for _, _, ids in self.acknowledged for event_id in ids}
        assert found.keys() <= known | set(self.unknown)


class TestExactlyOnce:
    async def test_replies_lost_at_random_under_64_writers(self, running: RedisServer) -> None:
        places = [Aggregate("orders", f"{n}") for n in range(12)]
        history = History()
        dice = random.Random(7)

        async def write(store: Store, writer: int) -> None:
            expected = 0
            for _ in range(100):
                place = places[writer % 12] if dice.random() < 0.7 else dice.choice(places)
                number = expected if writer % 2 else None
                expected = await history.append(store, place, dice.randrange(1, 4), number)

        async with store_behind_proxy(running) as (store, proxy):
            proxy.replies.cut_at_random(0.2)
            await asyncio.gather(*(write(store, writer) for writer in range(64)))
            proxy.replies.mend()
            await history.check(store, places)
            print(
                f"{proxy.cuts} times replies were lost: {len(history.acknowledged)} appends stored "
                f"once, {len(history.refused)} refused, {len(history.unknown)} unknown"
            )
            assert proxy.cuts >= 10
            assert history.unknown == []
            assert len(history.acknowledged) > 3200
            assert history.refused

    async def test_a_second_arrival_is_told_from_the_first(self, running: RedisServer) -> None:
        async with store_behind_proxy(running) as (store, proxy):
            await store.events.append(ORDER, numbered(250), expected=NEW)
            for n in range(250, 260, 2):
                proxy.replies.cut()
                done = await store.events.append(ORDER, numbered(2), expected=ANY)
                assert done == Appended(n, n + 1)
            proxy.replies.cut()
            with pytest.raises(SequenceConflict) as caught:
                await store.events.append(ORDER, numbered(1), expected=7)
            assert caught.value.actual == 260
            assert sequences(await store.events.read(ORDER)) == list(range(260))

    async def test_without_proof_that_the_old_connection_is_gone_it_is_unknown(
        self, running: RedisServer
    ) -> None:
        with redis.Redis.from_url(running.url) as client:
            client.execute_command(
                "ACL", "SETUSER", "default", "-client|kill", "on", "nopass", "~*", "&*"
            )
        async with store_behind_proxy(running) as (store, proxy):
            await store.events.append(ORDER, numbered(1), expected=NEW)
            proxy.replies.cut()
            with pytest.raises(OutcomeUnknown, match="may still be read"):
                await store.events.append(ORDER, numbered(1), expected=1)
            assert len(await store.events.read(ORDER)) == 2

    async def test_a_second_arrival_that_is_refused_does_not_deny_the_first(
        self, running: RedisServer
    ) -> None:
        async with store_behind_proxy(running) as (store, proxy):
            await store.events.append(ORDER, numbered(1), expected=NEW)
            with redis.Redis.from_url(running.url) as client:
                proxy.on_cut = lambda: client.config_set("maxmemory", "1")
                proxy.replies.cut()
                outcomes = await asyncio.gather(
                    store.events.append(ORDER, numbered(1), expected=1),
                    store.events.append(Aggregate("orders", "2"), numbered(1), expected=ANY),
                    return_exceptions=True,
                )
            assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown] * 2
            assert "refused when sent again" in str(outcomes[0])
            assert len(await store.events.read(ORDER)) == 2

    async def test_connections_killed_by_the_server(self, running: RedisServer) -> None:
        places = [Aggregate("orders", f"{n}") for n in range(8)]
        history = History()
        done = asyncio.Event()

        async def write(store: Store, writer: int) -> None:
            for _ in range(60):
                await history.append(store, places[writer % 8], 1, None)

        async def kill() -> None:
            with redis.Redis.from_url(running.url) as client:
                while not done.is_set():
                    client.client_kill_filter(_type="normal", skipme=True)
                    await anyio.sleep(0.005)

        async with asyncstore.open(running.url, timeout=30) as store:
            killing = asyncio.create_task(kill())
            await asyncio.gather(*(write(store, writer) for writer in range(32)))
            done.set()
            await killing
            await history.check(store, places)
            assert len(history.acknowledged) == 32 * 60

    async def test_servers_that_are_killed(self, tmp_path: Path) -> None:
        arguments = ("--appendonly", "yes", "--appendfsync", "always")
        places = [Aggregate("orders", f"{n}") for n in range(8)]
        history = History()
        with redis_server(VALKEY, *arguments) as running:
            async with asyncstore.open(running.url, timeout=30) as store:

                async def write(writer: int) -> None:
                    for _ in range(60):
                        await history.append(store, places[writer % 8], 2, None)

                writing = asyncio.gather(*(write(writer) for writer in range(32)))
                for target in (200, 600, 1000):
                    await eventually(partial(has_more, history.acknowledged, target), "they write")
                    running.stop()
                    await asyncio.to_thread(running.start)
                await writing
                await history.check(store, places)


class TestInStep:
    @pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
    def test_thousands_of_cancellations(
        self, one_server: Server, prefix: str, run: Callable[[Awaitable[object]], object]
    ) -> None:
        dice = random.Random(11)

        async def call(store: Store, n: int) -> None:
            place = Aggregate("orders", f"{n}")
            await store.events.append(place, [Event("Numbered", n)], expected=NEW)
            (event,) = await store.events.read(place)
            assert event.data == n
            await store.positions.put("p", place, n)
            assert await store.positions.get("p", place) == n

        async def storm() -> None:
            async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
                tasks = [asyncio.ensure_future(call(store, n)) for n in range(4000)]
                cancelled = 0
                while cancelled < 2000 and any(not task.done() for task in tasks):
                    for task in dice.sample(tasks, 20):
                        cancelled += task.cancel()
                    await asyncio.sleep(0)
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                wrong = [o for o in outcomes if o and not isinstance(o, asyncio.CancelledError)]
                assert wrong == []
                completed = outcomes.count(None)
                print(f"{cancelled} cancellations of {len(tasks)} callers, {completed} completed")
                assert cancelled > 100
                assert completed >= len(tasks) - cancelled
                assert await store.events.next_sequence(Aggregate("orders", "unknown")) == 0

        run(storm())

    async def test_ten_thousand_at_once(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            calls = [
                store.events.append(Aggregate("orders", f"{n % 100}"), numbered(1), expected=ANY)
                for n in range(10_000)
            ]
            tracemalloc.start()
            try:
                done = await asyncio.gather(*calls)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak < 64 << 20, "a few KB a caller"
            assert Counter(d.first_sequence for d in done) == dict.fromkeys(range(100), 100)

    @pytest.mark.parametrize(
        ("sizes", "expected"),
        [
            ([1] * 100, [1, 4, 8, 16, 16, 16, 16, 16, 7]),
            ([1] * 4 + [5000] + [1] * 3, [1, 3, 1, 3]),
            ([1] + [100] * 3 + [150] * 2, [1, 2, 1, 1, 1]),
            ([5000] * 3, [1, 1, 1]),
        ],
        ids=["many", "a large one goes alone", "of many events", "large ones"],
    )
    async def test_appends_of_one_turn_leave_in_groups(
        self, sizes: list[int], expected: list[int]
    ) -> None:
        """The first finds the connection idle and leaves alone; groups are bounded."""
        groups: list[int] = []

        async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            requests = hiredis.Reader()
            while data := await reader.read(1 << 20):
                requests.feed(data)
                while request := requests.gets():
                    if request[0] == b"EVALSHA":
                        groups.append(int(request[2]) - 4)
                        answer = b"*2\r\n$2\r\nok\r\n:0\r\n" * groups[-1]
                        writer.write(b"*%d\r\n%s" % (groups[-1], answer))
                    else:
                        writer.write(handshake_answer(request[0]))

        async with serving(count) as url, asyncstore.open(url) as store:
            await asyncio.gather(
                *(store.events.append(ORDER, numbered(size), expected=ANY) for size in sizes)
            )
            assert groups == expected

    async def test_what_is_alone_or_full_leaves_before_the_turn_ends(
        self, running: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[int] = []
        write = Wire.flush

        def flush(wire: Wire) -> None:
            written.extend([len(wire.outbox)] if wire.outbox else [])
            write(wire)

        async with asyncstore.open(running.url) as store:
            monkeypatch.setattr(Wire, "flush", flush)
            places = [Aggregate("orders", f"{n}") for n in range(8)]
            small, large = numbered(1), [Event("Large", "x" * 40_000)]
            batches = [small, small, small, small, small, large, large, small]
            calls = [
                store.events.append(place, batch, expected=NEW)
                for place, batch in zip(places, batches, strict=True)
            ]
            waited: list[asyncio.Future[object]] = []
            seen: list[int] = []
            for call in calls:
                waited.append(call.send(None))  # as far as it goes without waiting
                seen.append(sum(written))
            # The first alone, four small ones, and one large one when the next has no room.
            assert seen == [1, 1, 1, 1, 2, 2, 3, 3]
            await asyncio.wait(waited)
            for call in calls:
                with pytest.raises(StopIteration) as ended:
                    call.send(None)
                assert ended.value.value == Appended(0, 0)

    @pytest.mark.parametrize(
        "answer",
        [
            b"+OK\r\n",
            b"*1\r\n+OK\r\n",
            b"*1\r\n*2\r\n$7\r\nunknown\r\n:5\r\n",
            b"*1\r\n*2\r\n$2\r\nok\r\n$-1\r\n",
            b"*1\r\n*2\r\n$2\r\nok\r\n$1\r\n5\r\n",
            b"*1\r\n*2\r\n$5\r\nerror\r\n:5\r\n",
            b"*1\r\n*2\r\n$8\r\nconflict\r\n$-1\r\n",
            b"*1\r\n*3\r\n$2\r\nok\r\n:5\r\n:6\r\n",
            b"*1\r\n*2\r\n$2\r\nok\r\n:7\r\n",
            b"*1\r\n*2\r\n$2\r\nok\r\n:-5\r\n",
            b"*1\r\n*2\r\n$5\r\nerror\r\n$-1\r\n",
            b"*2\r\n$2\r\nok\r\n:0\r\n",
            b"$-1\r\n",
            b":5\r\n",
        ],
    )
    async def test_only_the_right_answer_says_that_it_was_stored(self, answer: bytes) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 20):
                if b"EVALSHA" in data:
                    writer.write(answer)
                else:
                    writer.write(handshake_answer(data))

        async with serving(serve) as url, asyncstore.open(url) as store:
            with pytest.raises(asyncstore.UnexpectedReply, match="of another form"):
                await store.events.append(ORDER, numbered(1), expected=NEW)

    async def test_a_connection_that_is_dying_takes_no_more_requests(
        self, running: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with asyncstore.open(running.url) as store:
            wire = store._router.nodes()[0].transport._wire
            assert wire is not None
            assert wire._transport is not None
            wire._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            done = await asyncio.gather(
                *(store.events.append(ORDER, numbered(1), expected=ANY) for _ in range(200))
            )
            assert sorted(d.first_sequence for d in done) == list(range(200))
        assert "socket.send() raised exception." not in caplog.text

    async def test_a_reply_beyond_all_bounds_is_given_up(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound = 1 << 20
        monkeypatch.setattr("asyncstore.wire._LARGEST_REPLY", bound)
        sent: list[int] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 20):
                if b"ZCARD" in data:
                    writer.write(b"$629145600\r\n")  # 600 MiB are announced
                    with contextlib.suppress(ConnectionError):
                        for _ in range(9600):
                            writer.write(bytes(65536))
                            sent.append(65536)
                            await writer.drain()
                    return
                writer.write(handshake_answer(data))

        async with serving(serve) as url, asyncstore.open(url, timeout=1) as store:
            with pytest.raises(StoreUnavailable, match=f"more than {bound} bytes"):
                await store.events.next_sequence(ORDER)
        assert 0 < sum(sent) < 16 << 20, "it is asked once, and cut off"

    async def test_a_strange_greeting_is_no_reason_to_stop_dialling(self) -> None:
        connections = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            number = connections
            while data := await reader.read(1 << 20):
                if b"ZCARD" in data and number == 1:
                    return  # the connection breaks
                if b"HELLO" in data and number == 2:
                    writer.write(b"*2\r\n*0\r\n:1\r\n")
                else:
                    writer.write(b":7\r\n" if b"ZCARD" in data else handshake_answer(data))

        async with serving(serve) as url, asyncstore.open(url, timeout=2) as store:
            assert await store.events.next_sequence(ORDER) == 7

    @pytest.mark.parametrize(
        "answer",
        [
            b"+OK\r\n",
            b":-5\r\n",
            b"$-1\r\n",
            b"*0\r\n",
            b"*1\r\n*0\r\n",
            b"*1\r\n:5\r\n",
            b"*3\r\n:1\r\n:2\r\n:3\r\n",
            b"*2\r\n$8\r\nhandlers\r\n$1\r\np\r\n",
            b"*3\r\n$4\r\nmore\r\n*1\r\n$1\r\np\r\n*0\r\n",
            b"*2\r\n$2\r\nok\r\n$1\r\n5\r\n",
            b"*2\r\n$0\r\n\r\n$1\r\np\r\n",
            b"*1\r\n$1\r\np\r\n",
            b"%1\r\n*0\r\n:1\r\n",
            b"*4294967295\r\n",
        ],
    )
    async def test_answers_of_a_strange_form_are_typed_errors(self, answer: bytes) -> None:
        """None of these is what the calls below have to be answered with, or it is nothing."""
        strange = False

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 20):
                if strange and b"HELLO" not in data and b"INFO" not in data:
                    writer.write(answer * max(1, data.count(b"EVALSHA")))
                else:
                    writer.write(handshake_answer(data))

        async with serving(serve) as url, asyncstore.open(url, timeout=0.3) as store:
            strange = True
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: store.events.read(ORDER),
                lambda: store.load(ORDER),
                lambda: store.events.delete(ORDER),
                lambda: store.events.next_sequence(ORDER),
                lambda: store.events.next_sequence(ORDER.on("x")),
                lambda: store.events.branch(ORDER.on("x"), at=1),
                lambda: store.events.find_idempotency_key(ORDER, "k"),
                lambda: store.events.correlated("c"),
                lambda: store.events.delete_edition("orders", "x"),
                lambda: store.events.append(ORDER, [Event("A", 1)], expected=0, missed=True),
                lambda: store.positions.get("p", ORDER.on("x")),
                lambda: store.positions.get("p", ORDER),
                lambda: store.positions.put("p", ORDER, 1),
                lambda: store.snapshots.get(ORDER),
                lambda: listed(store.events.roots("orders")),
                lambda: listed(store.events.domains()),
            ]
            for call in calls:
                with anyio.fail_after(3), contextlib.suppress(asyncstore.AsyncStoreError):
                    # Some are what is answered with where nothing is, or names.
                    assert isinstance(await call(), list | int | None)

    async def test_concurrent_calls_leave_in_one_write(self) -> None:
        chunks: list[bytes] = []

        async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 20):
                if asked := data.count(b"ZCARD"):
                    chunks.append(data)
                    writer.write(b":0\r\n" * asked)
                else:
                    writer.write(handshake_answer(data))

        async with serving(count) as url, asyncstore.open(url) as store:
            await asyncio.gather(*(store.events.next_sequence(ORDER) for _ in range(100)))
        assert b"".join(chunks).count(b"ZCARD") == 100
        assert len(chunks) <= 2, "the first finds the connection idle, the others follow together"

    async def test_forgotten_scripts_under_load(self, running: RedisServer) -> None:
        async with asyncstore.open(running.url) as store:
            with redis.Redis.from_url(running.url) as client:

                async def write(writer: int) -> None:
                    for n in range(30):
                        place = Aggregate("orders", f"{writer}")
                        await store.events.append(place, numbered(1), expected=n)
                        if n % 5 == 0:
                            client.script_flush()

                await asyncio.gather(*(write(writer) for writer in range(16)))


class TestNobodyHangs:
    async def test_calls_cancelled_before_they_left_make_room(
        self, one_server: Server, prefix: str
    ) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix, max_in_flight=10) as store:
            calls = [asyncio.create_task(store.events.read(ORDER)) for _ in range(30)]
            await asyncio.sleep(0)
            for call in calls[:10]:
                call.cancel()
            with anyio.fail_after(1):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert outcomes[10:] == [[]] * 20

    async def test_without_a_server_nothing_is_kept_busy(self, running: RedisServer) -> None:
        async with asyncstore.open(running.url, timeout=0.2) as store:
            running.stop()
            for _ in range(3):
                with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                    await store.events.append(ORDER, [Event("Large", b"x" * 10**6)], expected=ANY)
            mine = asyncio.current_task()
            await eventually(lambda: asyncio.all_tasks() == {mine}, "nobody dials any more")
            assert not store._router.nodes()[0].transport._backlog

    async def test_a_connection_that_breaks_as_soon_as_it_is_made(self) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(65536):
                writer.write(b"$1\r\n1\r\n" * 2)  # one reply too many

        async with serving(answer) as url:
            with anyio.fail_after(5), pytest.raises(StoreUnavailable):
                async with asyncstore.open(url, timeout=0.5):
                    pass

    async def test_every_reply_lost_is_no_storm(self, running: RedisServer) -> None:
        path = Path(urlsplit(running.url).path)
        async with proxy_to(path) as proxy, asyncstore.open(proxy.url, timeout=1) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            proxy.requests.cut(Cut.AFTER, times=None, having=b"EVALSHA")
            with pytest.raises(OutcomeUnknown):
                await store.events.append(ORDER, numbered(1), expected=1)
            assert proxy.connections < 20
            proxy.requests.mend()
            assert len(await store.events.read(ORDER)) == 2

    async def test_closed_in_a_cancelled_scope(self, running: RedisServer) -> None:
        store = asyncstore.open(running.url, timeout=5)
        with anyio.CancelScope() as scope:
            async with store:
                running.stop()
                waiting = asyncio.create_task(store.events.read(ORDER))
                await asyncio.sleep(0)
                scope.cancel()
        with anyio.fail_after(2), pytest.raises(asyncstore.AsyncStoreError):
            await waiting

    async def test_bytes_in_flight_are_bounded_within_a_turn(
        self, one_server: Server, prefix: str
    ) -> None:
        limit = 4 * 1024 * 1024
        async with asyncstore.open(
            one_server.url, key_prefix=prefix, max_in_flight_bytes=limit
        ) as store:
            large = [Event("Large", b"x" * 1_000_000)]
            calls = [
                asyncio.create_task(
                    store.events.append(Aggregate("orders", f"{n}"), large, expected=NEW)
                )
                for n in range(40)
            ]
            most = 0
            while not all(call.done() for call in calls):
                wire = store._router.nodes()[0].transport._wire
                assert wire is not None
                in_flight = [*wire.waiting, *wire.outbox]
                most = max(most, sum(len(request.packet) for request in in_flight))
                await asyncio.sleep(0)
            assert 0 < most <= limit + 1_100_000
            assert [call.result() for call in calls] == [Appended(0, 0)] * 40


class TestGroups:
    async def test_good_and_bad_appends_of_one_group_are_answered_as_if_alone(
        self, running: RedisServer
    ) -> None:
        good, taken, wrong, huge = (
            Aggregate("orders", name) for name in ["good", "taken", "wrong", "huge"]
        )
        async with asyncstore.open(running.url) as store:
            await store.events.append(taken, numbered(3), expected=NEW)
            with redis.Redis.from_url(running.url) as client:
                client.rpush("events:orders:main:{wrong}", "not a sorted set")
                calls = [
                    store.events.append(good, numbered(2), expected=NEW),
                    store.events.append(taken, numbered(1), expected=NEW),
                    store.events.append(wrong, numbered(1), expected=NEW),
                    store.events.append(taken, numbered(1), expected=3),
                    store.events.append(good, numbered(1), expected=ANY),
                    store.events.append(huge, numbered(5000), expected=NEW),
                    store.events.append(good, numbered(10_001), expected=ANY),
                    store.events.append(Aggregate("carts", "good"), numbered(1), expected=NEW),
                    store.events.append(good, numbered(1), expected=3),
                    store.events.append(good, numbered(1), expected=3),
                ]
                before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                after = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            kinds = [type(outcome).__name__ for outcome in outcomes]
            assert kinds == [
                "Appended",
                *("SequenceConflict", "UnexpectedReply", "Appended", "Appended"),
                "Appended",
                "EventTooLarge",
                "Appended",
                *("Appended", "SequenceConflict"),
            ]
            assert "WRONGTYPE" in str(outcomes[2])
            assert outcomes[4] == Appended(2, 2)
            # The first finds the connection idle; four go together; the large one goes alone, and
            # so does the other domain's; the last two go together.
            assert after - before == 5
            assert len(await store.events.read(huge)) == 5000
            assert [event.data["n"] for event in await store.events.read(good)] == [0, 1, 0, 0]
            roots = [root async for root in store.events.roots("orders")]
            assert sorted(roots) == ["good", "huge", "taken"]

    async def test_a_cancelled_append_takes_nobody_along(
        self, one_server: Server, prefix: str
    ) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            places = [Aggregate("orders", f"{n}") for n in range(10)]
            calls = [
                asyncio.create_task(store.events.append(place, numbered(1), expected=NEW))
                for place in places
            ]
            await asyncio.sleep(0)
            calls[7].cancel()  # in a group that waits for the end of the turn
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(outcomes.pop(7), asyncio.CancelledError)
            assert outcomes == [Appended(0, 0)] * 9
            assert await store.events.next_sequence(places[7]) == 0, "it had not left"

    async def test_a_full_server_refuses_each_of_a_group(self, running: RedisServer) -> None:
        async with asyncstore.open(running.url) as store:
            with redis.Redis.from_url(running.url) as client:
                client.config_set("maxmemory", "1")
            outcomes = await asyncio.gather(
                *(store.events.append(ORDER, numbered(1), expected=ANY) for _ in range(5)),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [asyncstore.StoreFull] * 5
            assert len({id(outcome) for outcome in outcomes}) == 5


@contextmanager
def tls_server(directory: Path, password: str) -> Iterator[str]:
    """Run Debian's Redis with a certificate made just now, and give its URL."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    port = free_port()
    arguments = [
        *("--tls-port", f"{port}", "--bind", "127.0.0.1", "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(directory / "cert.pem")),
        *("--tls-key-file", str(directory / "key.pem")),
        *("--tls-ca-cert-file", str(directory / "ca.pem")),
        *("--requirepass", password),
    ]
    with redis_server(str(REDIS), *arguments):
        yield f"rediss://:{password}@127.0.0.1:{port}/3"


@pytest.mark.skipif(REDIS is None, reason="there is no redis-server on the PATH, to speak TLS")
class TestTls:
    @pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
    def test_the_shared_connection_speaks_it(
        self, tmp_path: Path, run: Callable[[Awaitable[object]], object]
    ) -> None:
        async def use(url: str) -> None:
            async with asyncstore.open(f"{url}?ssl_ca_certs={tmp_path}/ca.pem") as store:
                large = [Event("Large", b"x" * 3_000_000)]
                await asyncio.gather(
                    *(store.events.append(ORDER, numbered(3), expected=ANY) for _ in range(200)),
                    store.events.append(Aggregate("orders", "2"), large, expected=NEW),
                )
                assert sequences(await store.events.read(ORDER)) == list(range(600))
                assert len(await store.events.read(Aggregate("orders", "2"))) == 1

        with tls_server(tmp_path, "s3cret") as url:
            run(use(url))

    async def test_a_certificate_that_nobody_vouches_for_is_refused(self, tmp_path: Path) -> None:
        with tls_server(tmp_path, "s3cret") as url:
            with pytest.raises(StoreUnavailable, match="certificate can't be trusted") as caught:
                async with asyncstore.open(url):
                    pass
            assert "s3cret" not in str(caught.value)
            wrong = url.replace("s3cret", "wrong")
            with pytest.raises(StoreUnavailable, match="refused the user or the password"):
                async with asyncstore.open(f"{wrong}?ssl_ca_certs={tmp_path}/ca.pem"):
                    pass

    async def test_a_certificate_of_another_authority_or_host_is_refused(
        self, tmp_path: Path
    ) -> None:
        trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
        with tls_server(tmp_path, "s3cret") as url:
            localhost = url.replace("127.0.0.1", "localhost")
            for wrong in (
                f"{url}?ssl_ca_certs={tmp_path}/other.pem",
                f"{localhost}?ssl_ca_certs={tmp_path}/ca.pem",
            ):
                with pytest.raises(StoreUnavailable, match="certificate can't be trusted"):
                    async with asyncstore.open(wrong):
                        pass

    async def test_a_port_of_the_other_kind_is_said(self, tmp_path: Path) -> None:
        with tls_server(tmp_path, "s3cret") as url:
            plain = url.replace("rediss://", "redis://")
            with pytest.raises(StoreUnavailable, match="which wants rediss://"):
                async with asyncstore.open(plain, timeout=2):
                    pass
        with redis_server(str(REDIS), tcp=True) as server:
            tls = server.url.replace("redis://", "rediss://")
            with pytest.raises(StoreUnavailable, match="is it a port for TLS"):
                async with asyncstore.open(tls, timeout=2):
                    pass

    async def test_a_user_with_the_least_rights(self, tmp_path: Path) -> None:
        with tls_server(tmp_path, "s3cret") as url:
            secure = f"{url}?ssl_ca_certs={tmp_path}/ca.pem"
            limited = as_user(secure)
            async with asyncstore.open(limited, key_prefix="test-1:") as store:
                await store.events.append(ORDER, numbered(3), expected=NEW)
                assert sequences(await store.events.read(ORDER)) == [0, 1, 2]
            with pytest.raises(StoreUnavailable, match="certificate can't be trusted"):
                async with asyncstore.open(limited.partition("?")[0], key_prefix="test-1:"):
                    pass


class TestOddServers:
    @pytest.mark.parametrize(
        "reply",
        [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"\x15\x03\x01\x00\x02\x02\x50",
            b"$5\r\nhel",
            b"",
            b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n+OK\r\n",
            b"*-5\r\n",
        ],
        ids=["http", "tls", "half a reply", "nothing", "too many", "nonsense"],
    )
    async def test_one_that_is_no_redis(self, reply: bytes) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(reply)

        async with serving(answer, password=":s3cret@") as url:
            with anyio.fail_after(10), pytest.raises(StoreUnavailable) as caught:
                async with asyncstore.open(url):
                    pass
            assert "127.0.0.1" in str(caught.value)
            assert "s3cret" not in str(caught.value)

    async def test_one_that_pushes_what_nobody_asked_for(self, running: RedisServer) -> None:
        # RESP3 has messages that are no replies. The proxy puts one before each chunk of them.
        path = Path(urlsplit(running.url).path)
        async with (
            proxy_to(path) as proxy,
            asyncstore.open(proxy.url + "?protocol=3") as store,
        ):
            pushed = 0

            def push(data: bytes) -> bytes:
                nonlocal pushed
                pushed += 1
                return b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n" + data

            proxy.replies.change = push
            for n in range(20):
                await store.events.append(ORDER, numbered(1, start=n), expected=n)
            events = await store.events.read(ORDER)
            assert [event.data["n"] for event in events] == list(range(20))
            assert pushed > 20

    async def test_one_that_falls_silent(self, running: RedisServer) -> None:
        path = Path(urlsplit(running.url).path)
        async with proxy_to(path) as proxy, asyncstore.open(proxy.url, timeout=0.5) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            proxy.replies.swallow()
            with anyio.fail_after(10):
                with pytest.raises(OutcomeUnknown):
                    await store.events.append(ORDER, numbered(1), expected=1)
                with pytest.raises(StoreUnavailable):
                    await store.events.read(ORDER)
            proxy.replies.pass_on()
            await eventually(lambda: answers(store), "it answered again")

    async def test_a_silent_one_is_noticed_without_calls(
        self, running: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("asyncstore.transport._PING_SECONDS", 0.05)
        path = Path(urlsplit(running.url).path)
        async with proxy_to(path) as proxy, asyncstore.open(proxy.url, timeout=0.3) as store:
            connections = proxy.connections
            proxy.replies.swallow()
            await eventually(lambda: proxy.open_connections == 0, "the silent one was given up")
            proxy.replies.pass_on()
            assert await store.events.read(ORDER) == []
            assert proxy.connections > connections


def has_more(items: Sized, count: int) -> bool:
    return len(items) > count


async def answers(store: Store) -> bool:
    try:
        await store.events.read(ORDER)
    except StoreUnavailable:
        return False
    return True
