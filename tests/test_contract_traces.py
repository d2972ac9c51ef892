"""What every server must do with idempotency keys, sources, correlation ids and server times.

And that nothing of an erased aggregate stays. Runs on each server of the matrix.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Event,
    Retention,
    SequenceConflict,
    Source,
    Store,
    UnexpectedReply,
    codec,
    embedded,
    scripts,
)
from asyncstore.keys import Keys
from asyncstore.testing.conformance.traces import *  # noqa: F403 - the cases of every store
from asyncstore.testing.conformance.traces import CART, numbers, told
from tests.builders import numbered, sequences
from tests.proxy import proxy_to
from tests.servers import RedisServer, Server, keys_with, redis_server


def dump(server: Server, prefix: str) -> dict[str, Any]:
    """Return each key of the store: its type, and all that is in it."""
    with server.client() as client:
        readers: dict[bytes, Any] = {
            b"string": client.get,
            b"set": client.smembers,
            b"hash": client.hgetall,
            b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        }
        found: dict[str, Any] = {}
        for key in client.scan_iter(match=prefix + "*", count=1000):
            kind: Any = client.type(key)
            found[key.decode().removeprefix(prefix)] = (kind, readers[kind](key))
        return found


class TestIdempotencyKeyInTheServer:
    async def test_again_from_another_process(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW, idempotency_key="pay")
        async with asyncstore.open(server.url, key_prefix=prefix) as other:
            again = await other.events.append(
                order, numbered(1), expected=ANY, idempotency_key="pay"
            )
        assert again == Appended(0, 1, duplicate=True)

    @pytest.mark.parametrize("connections", [1, 4])
    async def test_32_at_once_write_once(
        self, server: Server, prefix: str, store: Store, order: Aggregate, connections: int
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with AsyncExitStack() as stack:
            stores = [store]
            for _ in range(connections - 1):
                other = asyncstore.open(server.url, key_prefix=prefix)
                stores.append(await stack.enter_async_context(other))
            done = await asyncio.gather(
                *(
                    stores[n % connections].events.append(
                        order,
                        [Event("By", {"n": n}) for _ in range(1 + n % 3)],
                        expected=ANY if n % 2 else 1,
                        idempotency_key="once",
                    )
                    for n in range(32)
                )
            )
        assert len({(d.first_sequence, d.last_sequence) for d in done}) == 1
        (winner,) = [n for n, d in enumerate(done) if not d.duplicate]
        assert done[winner] == Appended(1, 1 + winner % 3)
        stored = await store.events.read(order, start=1)
        assert numbers(stored) == [winner] * (1 + winner % 3)


BINARIES = {"valkey": str(embedded.find_binary()), "redis-on-path": shutil.which("redis-server")}


@pytest.fixture(scope="module", params=BINARIES)
def running(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server on a unix socket, for the proxy to stand in front of."""
    binary = BINARIES[request.param]
    if binary is None:
        pytest.skip("there is no redis-server on the PATH")
    with redis_server(binary) as server:
        yield server


class TestLostReply:
    """An append whose reply is lost is sent again, and recognised."""

    @staticmethod
    def path(running: RedisServer) -> Path:
        return Path(urlsplit(running.url).path)

    @pytest.mark.parametrize("expected", [3, ANY], ids=str)
    async def test_is_stored_once_and_no_duplicate(
        self, running: RedisServer, order: Aggregate, expected: asyncstore.Expected
    ) -> None:
        async with proxy_to(self.path(running)) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.append(order, numbered(3), expected=NEW)
            proxy.replies.cut()
            done = await store.events.append(
                order, numbered(2, 3), expected=expected, idempotency_key="pay"
            )
            assert proxy.cuts == 1
            assert done == Appended(3, 4, duplicate=False)
            assert numbers(await store.events.read(order)) == [0, 1, 2, 3, 4]
            again = await store.events.append(
                order, numbered(2, 3), expected=ANY, idempotency_key="pay"
            )
            assert again == Appended(3, 4, duplicate=True)

    async def test_on_a_branchs_first_append(self, running: RedisServer, order: Aggregate) -> None:
        branch = order.on("what-if")
        async with proxy_to(self.path(running)) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.append(order, numbered(3), expected=NEW)
            proxy.replies.cut()
            done = await store.events.append(
                branch, numbered(2, 90), expected=1, idempotency_key="pay", correlation_id="c"
            )
            assert proxy.cuts == 1
            assert done == Appended(1, 2, duplicate=False)
            assert numbers(await store.events.read(branch)) == [0, 90, 91]

    async def test_the_events_own_range_though_others_came_after_it(
        self, running: RedisServer, order: Aggregate
    ) -> None:
        async with (
            proxy_to(self.path(running)) as proxy,
            asyncstore.open(proxy.url) as store,
            asyncstore.open(running.url) as other,
        ):
            meanwhile: list[asyncio.Task[Appended]] = []

            def append_another() -> None:
                call = other.events.append(order, numbered(2, 7), expected=2)
                meanwhile.append(asyncio.create_task(call))

            proxy.on_cut = append_another
            await store.events.append(order, numbered(1), expected=NEW)
            proxy.replies.cut()
            done = await store.events.append(
                order, numbered(1, 1), expected=ANY, idempotency_key="pay"
            )
            assert done == Appended(1, 1, duplicate=False)
            assert await meanwhile[0] == Appended(2, 3)
            assert numbers(await store.events.read(order)) == [0, 1, 7, 8]

    async def test_a_duplicate_stays_one(self, running: RedisServer, order: Aggregate) -> None:
        async with proxy_to(self.path(running)) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.append(order, numbered(2), expected=NEW, idempotency_key="pay")
            proxy.replies.cut()
            again = await store.events.append(
                order, numbered(1), expected=ANY, idempotency_key="pay"
            )
            assert proxy.cuts == 1
            assert again == Appended(0, 1, duplicate=True)
            assert sequences(await store.events.read(order)) == [0, 1]

    async def test_a_whole_group_of_them(self, running: RedisServer) -> None:
        places = [Aggregate(f"group-{uuid.uuid4()}", f"{n}") for n in range(24)]
        async with proxy_to(self.path(running)) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.next_sequence(places[0])
            proxy.replies.cut()
            done = await asyncio.gather(
                *(
                    store.events.append(
                        place, numbered(2), expected=NEW, idempotency_key="pay", source=CART
                    )
                    for place in places
                )
            )
            assert proxy.cuts == 1
            assert set(done) == {Appended(0, 1, duplicate=False)}
            for place in places:
                assert numbers(await store.events.find_source(place, CART)) == [0, 1]


class TestCorrelationInTheServer:
    async def test_what_the_index_names_too_much_does_not_disturb(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        innocent = Aggregate("orders", "innocent")
        await store.events.append(order, numbered(2), expected=NEW, correlation_id="c")
        await store.events.append(innocent, numbered(2), expected=NEW, correlation_id="d")
        junk = [
            "",
            "junk",
            ":",
            "::",
            "a:b",
            "orders:main:{x}",
            "orders:main:",
            "or ders:main:x",
            "orders:Main:x",
            "orders:main:nobody",
            "orders:main:innocent",
            "orders:what-if:innocent",
            "orders:main:\x01",
            "☃:main:x",
        ]
        key = server.keys(prefix).correlated("c")
        with server.client() as client:
            assert client.zcard(key) == 1, "this is the key of the index"
            client.zadd(key, dict.fromkeys(junk, 0))
            assert client.zcard(key) == 1 + len(junk)
        assert told(await store.events.correlated("c")) == [("orders", "main", order.root, [0, 1])]

    # AsyncStoreError and does not name the key.
    async def test_a_member_of_the_index_that_is_no_text_does_not_disturb(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW, correlation_id="c")
        with server.client() as client:
            client.zadd(server.keys(prefix).correlated("c"), {b"orders:main:\xff\xfe": 0})
        assert told(await store.events.correlated("c")) == [("orders", "main", order.root, [0, 1])]


class TestTimeInTheServer:
    @pytest.mark.parametrize("where", ["main", "what-if"])
    async def test_the_stores_own_never_run_back_when_the_servers_clock_does(
        self, server: Server, prefix: str, store: Store, order: Aggregate, where: str
    ) -> None:
        place, other = order.on(where), Aggregate("carts", order.root, where)
        await store.events.append(place, numbered(1), expected=NEW)
        keys = server.keys(prefix)
        commits_key = keys.commits(keys.tag_of(order.root))
        ahead = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
        microseconds = int(ahead.timestamp()) * 1_000_000
        with server.client() as client:
            commits: Any = client.get(commits_key)
            number, _ = commits.split()
            # As if the last commit had been made before the clock was put back by an hour.
            client.set(commits_key, b"%s %d" % (number, microseconds))
        await store.events.append(place, numbered(2, 1), expected=1)
        await asyncio.gather(
            *(store.events.append(place, numbered(1), expected=ANY) for _ in range(6)),
            store.events.append(other, numbered(1), expected=NEW),
        )
        times = [e.time for e in await store.events.read(place)]
        assert len(times) == 9
        assert times == sorted(times)
        assert set(times[1:]) == {ahead}
        assert [e.time for e in await store.events.read(other)] == [ahead]
        with server.client() as client:
            commits = client.get(commits_key)
            assert commits.split()[1] == b"%d" % microseconds
            scores: Any = [
                client.zscore(keys.indexes_of(each)[0], each.root) for each in (place, other)
            ]
        assert min(scores) > int(number)
        assert max(scores) <= int(commits.split()[0])

    async def test_commit_numbers_grow_with_each_append(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        seen = []
        with server.client() as client:
            for n in range(10):
                place = Aggregate(f"domain-{n % 3}", "1")
                await store.events.append(place, numbered(2), expected=ANY, correlation_id="c")
                roots, _, _ = server.keys(prefix).indexes_of(place)
                score: Any = client.zscore(roots, place.root)
                seen.append(score)
        assert seen == sorted(set(seen))

    async def test_a_refused_or_repeated_append_takes_no_commit_number(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="k")
        before = dump(server, prefix)
        with pytest.raises(SequenceConflict):
            await store.events.append(order, numbered(1), expected=0, idempotency_key="other")
        await store.events.append(order, numbered(1), expected=ANY, idempotency_key="k")
        await store.events.append(order, [], expected=ANY, idempotency_key="third")
        assert dump(server, prefix) == before


async def fill(store: Store, place: Aggregate) -> None:
    """Give an aggregate everything that it can have."""
    await store.events.append(place, numbered(2), expected=NEW)
    for n in range(3):
        await store.events.append(
            place,
            [Event("Raw", b"\x00\xff"), *numbered(2)],
            expected=ANY,
            idempotency_key=f"key {n}",
            correlation_id=f"process {n} ☃",
            source=Source("carts", "7", "main", n),
        )
    await store.events.append(place, numbered(1), expected=ANY, correlation_id="process 1 ☃")
    retentions = [Retention.PERSIST, Retention.DEFAULT, Retention.PERSIST, Retention.DEFAULT]
    for sequence, retention in enumerate([*retentions, Retention.TRANSIENT]):
        await store.snapshots.put(place, sequence=sequence, state=sequence, retention=retention)
    for handler in ("projector", "saga", "mailer"):
        await store.positions.put(handler, place, 4)


KINDS = {
    "attached",
    "claims",
    "commits",
    "correlated",
    "divergence",
    "domains",
    "editions",
    "events",
    "handlers",
    "layout",
    "positions",
    "roots",
    "snapshots",
    "snapshots-kept",
    "snapshots-recent",
}


class TestErasure:
    def left(self, server: Server, prefix: str) -> dict[str, Any]:
        """Return all there is, but for the counters: of commits, and on a cluster of erasures."""
        found = dump(server, prefix)
        counters = {"commits", "erasures"} if server.is_cluster else {"commits"}
        return {key: value for key, value in found.items() if key.split(":")[0] not in counters}

    async def test_nothing_of_it_stays(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        before = self.left(server, prefix)
        for place in (order, order.on("what-if")):
            await fill(store, place)
        kinds = {key.split(":", 1)[0] for key in dump(server, prefix)}
        assert kinds == KINDS, "there is a key of each kind to erase"
        for place in (order.on("what-if"), order):
            assert await store.events.delete(place) == 12
        assert self.left(server, prefix) == before

    async def test_main_alone_leaves_the_branch_as_it_was(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        branch = order.on("what-if")
        await fill(store, branch)
        before = self.left(server, prefix)
        await fill(store, order)
        assert self.left(server, prefix) != before
        await store.events.delete(order)
        assert self.left(server, prefix) == before

    async def test_a_branch_alone_leaves_main_as_it_was(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await fill(store, order)
        before = self.left(server, prefix)
        for branch in (order.on("what-if"), order.on("what")):
            await fill(store, branch)
        await store.events.delete(order.on("what"))
        assert await store.events.delete_edition("orders", "what-if") == 12
        assert self.left(server, prefix) == before

    async def test_of_a_branch_without_events(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await fill(store, order)
        before = self.left(server, prefix)
        for edition in ("a", "b"):
            branch = order.on(edition)
            await store.events.branch(branch, at=3)
            await store.positions.put("projector", branch, 2)
            await store.snapshots.put(branch, sequence=2, state=None)
        assert await store.events.delete(order.on("a")) == 0
        assert await store.events.delete_edition("orders", "b") == 0
        assert self.left(server, prefix) == before

    async def test_of_an_edition_with_positions_and_snapshots_only(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await fill(store, order)
        before = self.left(server, prefix)
        await store.positions.put("projector", order.on("a"), 2)
        await store.snapshots.put(order.on("a"), sequence=2, state=None)
        await store.events.delete_edition("orders", "a")
        assert self.left(server, prefix) == before

    async def test_the_others_keep_what_they_share(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        others = [
            Aggregate("orders", "other"),
            Aggregate("carts", order.root),
            Aggregate("orders", f"{order.root}:x"),
        ]
        for place in others:
            await fill(store, place)
        before = self.left(server, prefix)
        await fill(store, order)
        await store.events.delete(order)
        assert self.left(server, prefix) == before
        for n in range(3):
            books = await store.events.correlated(f"process {n} ☃")
            assert {book.aggregate for book in books} == set(others)

    async def test_its_name_is_nowhere(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        other = Aggregate("orders", "other")
        await fill(store, other)
        for place in (order, order.on("what-if")):
            await fill(store, place)
        assert order.root in repr(dump(server, prefix))
        await store.events.delete(order.on("what-if"))
        assert order.root in repr(dump(server, prefix))
        await store.events.delete(order)
        assert order.root not in repr(dump(server, prefix))
        assert other.root in repr(dump(server, prefix))

    async def test_it_can_be_filled_again(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        before = self.left(server, prefix)
        for _ in range(2):
            await fill(store, order)
            assert await store.events.next_sequence(order) == 12
            await store.events.delete(order)
            assert self.left(server, prefix) == before

    async def test_hundreds_of_correlation_ids(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        before = self.left(server, prefix)
        await asyncio.gather(
            *(
                store.events.append(order, numbered(1), expected=ANY, correlation_id=f"{n % 700}")
                for n in range(1400)
            )
        )
        assert len(self.left(server, prefix)) > 700
        assert await store.events.delete(order) == 1400
        assert self.left(server, prefix) == before

    async def test_appends_that_come_meanwhile_are_whole_or_gone(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        before = self.left(server, prefix)
        async with asyncstore.open(server.url, key_prefix=prefix) as other:

            async def write(n: int) -> None:
                await other.events.append(
                    order, numbered(2), expected=ANY, correlation_id=f"{n}", idempotency_key=f"{n}"
                )
                await other.positions.put(f"handler-{n}", order, 1)

            writes = [asyncio.create_task(write(n)) for n in range(60)]
            for _ in range(3):
                await store.events.delete(order)
            await asyncio.gather(*writes)
        for n in range(60):
            found = await store.events.find_idempotency_key(order, f"{n}")
            books = await store.events.correlated(f"{n}")
            assert [book.events for book in books] == ([found] if found else [])
            assert len(found) in (0, 2)
        await store.events.delete(order)
        assert self.left(server, prefix) == before

    # of the correlation ids: it fails in the middle, when the positions are gone.
    @pytest.mark.parametrize("where", ["main", "what-if"])
    async def test_one_that_was_cut_off_is_finished_by_the_next(
        self, server: Server, prefix: str, store: Store, order: Aggregate, where: str
    ) -> None:
        place = order.on(where)
        await fill(store, place)
        key = server.keys(prefix).correlated("process 1 ☃")
        with server.client() as client:
            client.delete(key)
            client.rpush(key, "somebody else's")
            with pytest.raises(UnexpectedReply, match="WRONGTYPE"):
                await store.events.delete(place)
            client.delete(key)
            assert await store.events.read(place) == []
            assert await store.positions.get("projector", place) is None
            # Meanwhile it is begun anew, with one of its old ids.
            await store.events.append(place, numbered(1), expected=NEW, correlation_id="again")
            assert await store.events.delete(place) == 1
        assert keys_with(server, prefix) <= server.lasting(prefix, order.root)

    async def test_one_that_was_cut_off_is_found_with_its_edition(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        branch = order.on("what-if")
        await fill(store, branch)
        key = server.keys(prefix).correlated("process 1 ☃")
        with server.client() as client:
            client.delete(key)
            client.rpush(key, "somebody else's")
            with pytest.raises(UnexpectedReply, match="WRONGTYPE"):
                await store.events.delete_edition("orders", "what-if")
            client.delete(key)
            assert await store.events.delete_edition("orders", "what-if") == 0
        assert keys_with(server, prefix) <= server.lasting(prefix, order.root)

    async def test_goes_through_under_appends_with_ever_new_ids(
        self, store: Store, order: Aggregate
    ) -> None:
        done = False

        async def write() -> None:
            while not done:
                name = f"{uuid.uuid4()}"
                await store.events.append(order, numbered(1), expected=ANY, correlation_id=name)

        writers = [asyncio.ensure_future(write()) for _ in range(4)]
        try:
            for _ in range(5):
                await store.events.delete(order)
        finally:
            done = True
            await asyncio.gather(*writers)
        await store.events.delete(order)
        assert await store.events.next_sequence(order) == 0

    @pytest.mark.parametrize("where", ["main", "what-if"])
    @pytest.mark.parametrize("kind", ["claims", "correlated"])
    async def test_a_key_of_another_kind_stops_an_append_whole(
        self, server: Server, prefix: str, store: Store, order: Aggregate, where: str, kind: str
    ) -> None:
        place, keys = order.on(where), server.keys(prefix)
        key = keys.claims(place) if kind == "claims" else keys.correlated("c")
        with server.client() as client:
            client.rpush(key, "somebody else's")
            with pytest.raises(UnexpectedReply, match="WRONGTYPE"):
                await store.events.append(
                    place, numbered(2), expected=NEW, idempotency_key="k", correlation_id="c"
                )
            client.delete(key)
        assert await store.events.read(place) == []
        assert await store.events.find_idempotency_key(place, "k") == []
        assert await store.events.correlated("c") == []
        done = await store.events.append(
            place, numbered(2), expected=NEW, idempotency_key="k", correlation_id="c"
        )
        assert done == Appended(0, 1, duplicate=False)


class TestSecondArrival:
    """The append script as it is called when the first sending may have arrived, or not."""

    def arrive(
        self, server: Server, keys: Keys, place: Aggregate, event: Event, expected: str, key: str
    ) -> object:
        where = [keys.commits(keys.tag_of(place.root)), *keys.indexes_of(place)]
        where += [keys.events(place), keys.claims(place)]
        about = ["again", "orders", "main", 1, "", place.root, expected, 1, "k", f"key:{key}"]
        with server.client() as client:
            replies: Any = client.eval(
                scripts.APPEND.source, len(where), *where, *about, *codec.encode_event(event)
            )
        return replies[0]

    async def test_of_a_key_that_never_arrived_stores(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        event = Event("Told", 1)
        await store.events.append(order, [event], expected=NEW, idempotency_key="k")
        keys = server.keys(prefix)
        assert self.arrive(server, keys, order, event, "", "k2") == [b"ok", 1]
        assert self.arrive(server, keys, order, event, "", "k2") == [b"ok", 1]
        found = await store.events.find_idempotency_key(order, "k2")
        assert [each.sequence for each in found] == [1]

    async def test_of_a_duplicate_is_one(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        event, keys = Event("Told", 1), server.keys(prefix)
        await store.events.append(order, [event], expected=NEW, idempotency_key="k")
        assert self.arrive(server, keys, order, event, "1", "k") == [b"duplicate", 0, 1]
        assert self.arrive(server, keys, order, event, "0", "k") == [b"ok", 0]
        other = Event("Told", 2)
        assert self.arrive(server, keys, order, other, "0", "k") == [b"duplicate", 0, 1]
        two = store.events.append(order, [event, other], expected=1, idempotency_key="two")
        assert await two == Appended(1, 2)
        assert self.arrive(server, keys, order, event, "", "two") == [b"duplicate", 1, 2]
