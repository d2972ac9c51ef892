"""What every server must do with idempotency keys, sources, correlation ids and server times.

And that nothing of an erased aggregate stays. Runs on each server of the matrix.
"""

from __future__ import annotations

import asyncio
import pickle
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta, timezone
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
    EventBook,
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
from tests.builders import listed, numbered, sequences
from tests.proxy import proxy_to
from tests.servers import RedisServer, Server, keys_with, redis_server

FAR = 2**53 - 1
CART = Source("carts", "7", "main", 3)


def numbers(events: list[asyncstore.RecordedEvent]) -> list[int]:
    return [event.data["n"] for event in events]


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


class TestIdempotencyKey:
    @pytest.mark.parametrize("expected", [ANY, NEW, 1, 3, 5, 8, FAR], ids=str)
    async def test_again_is_what_it_was(
        self, store: Store, order: Aggregate, expected: asyncstore.Expected
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        first = await store.events.append(order, numbered(2, 3), expected=3, idempotency_key="pay")
        assert first == Appended(3, 4, duplicate=False)
        await store.events.append(order, numbered(3, 5), expected=5)
        before = await store.events.read(order)
        for others in (numbered(2, 3), numbered(1, 99), numbered(50, 99)):
            again = await store.events.append(
                order, others, expected=expected, idempotency_key="pay"
            )
            assert again == Appended(3, 4, duplicate=True)
        assert await store.events.read(order) == before
        assert numbers(before) == list(range(8))

    async def test_the_very_same_events_again(self, store: Store, order: Aggregate) -> None:
        events = numbered(2)
        await store.events.append(order, events, expected=NEW, idempotency_key="pay")
        again = await store.events.append(order, events, expected=NEW, idempotency_key="pay")
        assert again == Appended(0, 1, duplicate=True)
        assert sequences(await store.events.read(order)) == [0, 1]

    async def test_again_with_another_correlation_id_and_source_claims_nothing(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="pay")
        again = await store.events.append(
            order,
            numbered(1),
            expected=ANY,
            idempotency_key="pay",
            correlation_id="late",
            source=CART,
        )
        assert again == Appended(0, 0, duplicate=True)
        assert await store.events.correlated("late") == []
        assert await store.events.find_source(order, CART) == []

    async def test_again_from_another_process(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW, idempotency_key="pay")
        async with asyncstore.open(server.url, key_prefix=prefix) as other:
            again = await other.events.append(
                order, numbered(1), expected=ANY, idempotency_key="pay"
            )
        assert again == Appended(0, 1, duplicate=True)

    async def test_different_keys_both_store(self, store: Store, order: Aggregate) -> None:
        for n, key in enumerate(("a", "b", "A")):
            done = await store.events.append(order, numbered(1, n), expected=n, idempotency_key=key)
            assert done == Appended(n, n)
        assert [e.idempotency_key for e in await store.events.read(order)] == ["a", "b", "A"]

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

    async def test_apart_by_aggregate_edition_and_domain(
        self, store: Store, order: Aggregate
    ) -> None:
        places = [
            order,
            Aggregate("orders", "other"),
            Aggregate("carts", order.root),
            order.on("what-if"),
            order.on("what"),
        ]
        for again in (False, True):
            for place in places:
                done = await store.events.append(
                    place, numbered(1), expected=NEW, idempotency_key="pay"
                )
                assert done == Appended(0, 0, duplicate=again)
        for place in places:
            (found,) = await store.events.find_idempotency_key(place, "pay")
            assert found.aggregate == place

    async def test_an_empty_one_is_none(self, store: Store, order: Aggregate) -> None:
        for n in range(2):
            done = await store.events.append(order, numbered(1), expected=n, idempotency_key="")
            assert done == Appended(n, n, duplicate=False)
        assert [e.idempotency_key for e in await store.events.read(order)] == [None, None]
        assert await store.events.find_idempotency_key(order, "") == []

    @pytest.mark.parametrize(
        "key",
        [
            "a:b:c",
            "{a}",
            "}{",
            "  a b  ",
            "☃ ümläut 🎈",
            "key:",
            "0",
            '"\\',
            "%s%d%%",
            "[a-z]*?",
            "(1",
            "ÿ",
            "x" * 512,
            "☃" * 170 + "é",
        ],
        ids=lambda key: repr(key)[:12],
    )
    async def test_keys_of_all_sorts(self, store: Store, order: Aggregate, key: str) -> None:
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="other")
        done = await store.events.append(order, numbered(2, 1), expected=1, idempotency_key=key)
        assert done == Appended(1, 2)
        again = await store.events.append(order, numbered(1), expected=ANY, idempotency_key=key)
        assert again == Appended(1, 2, duplicate=True)
        found = await store.events.find_idempotency_key(order, key)
        assert [(e.sequence, e.idempotency_key) for e in found] == [(1, key), (2, key)]

    async def test_each_event_has_it(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        await store.events.append(order, numbered(3), expected=2, idempotency_key="pay")
        keys = [event.idempotency_key for event in await store.events.read(order)]
        assert keys == [None, None, "pay", "pay", "pay"]

    async def test_find_hit_and_miss(self, store: Store, order: Aggregate) -> None:
        assert await store.events.find_idempotency_key(order, "pay") == []
        await store.events.append(order, numbered(2), expected=NEW)
        await store.events.append(order, numbered(2, 2), expected=2, idempotency_key="pay")
        await store.events.append(order, numbered(2, 4), expected=4, idempotency_key="ship")
        everything = await store.events.read(order)
        assert await store.events.find_idempotency_key(order, "pay") == everything[2:4]
        assert await store.events.find_idempotency_key(order, "ship") == everything[4:]
        for miss in ("pa", "payy", "Pay", "pay ", "", "key:pay"):
            assert await store.events.find_idempotency_key(order, miss) == []
        other = Aggregate("orders", "other")
        assert await store.events.find_idempotency_key(other, "pay") == []

    async def test_one_key_that_begins_like_another(self, store: Store, order: Aggregate) -> None:
        keys = ["evt-12", "evt-1", "evt-123", "evt-1 2", "evt", "evt-1:"]
        for n, key in enumerate(keys):
            done = await store.events.append(order, numbered(1, n), expected=n, idempotency_key=key)
            assert done == Appended(n, n, duplicate=False)
        for n, key in enumerate(keys):
            done = await store.events.append(order, numbered(3), expected=ANY, idempotency_key=key)
            assert done == Appended(n, n, duplicate=True)
            found = await store.events.find_idempotency_key(order, key)
            assert numbers(found) == [n]

    async def test_a_key_a_source_and_a_correlation_id_of_one_text_are_three_things(
        self, store: Store, order: Aggregate
    ) -> None:
        text = "carts:main:3:7"
        await store.events.append(order, numbered(1, 0), expected=0, idempotency_key=text)
        await store.events.append(order, numbered(1, 1), expected=1, correlation_id=text)
        await store.events.append(order, numbered(1, 2), expected=2, source=CART)
        assert numbers(await store.events.find_idempotency_key(order, text)) == [0]
        (book,) = await store.events.correlated(text)
        assert numbers(book.events) == [1]
        assert numbers(await store.events.find_source(order, CART)) == [2]

    async def test_order_of_checks(self, store: Store, order: Aggregate) -> None:
        append = store.events.append
        # An empty batch is first: it neither uses a key up nor is told of one.
        assert await append(order, [], expected=9, idempotency_key="pay") == Appended(0, -1)
        assert await append(order, numbered(2), expected=0, idempotency_key="pay") == Appended(0, 1)
        assert await append(order, [], expected=9, idempotency_key="pay") == Appended(2, 1)
        # Then the key, and only then the sequence.
        again = await append(order, numbered(1), expected=9, idempotency_key="pay")
        assert again == Appended(0, 1, duplicate=True)
        with pytest.raises(SequenceConflict) as caught:
            await append(order, numbered(1), expected=9, idempotency_key="ship")
        assert (caught.value.expected, caught.value.actual) == (9, 2)

    async def test_a_conflict_does_not_record_the_key(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        for stale in (0, 1, 5):
            with pytest.raises(SequenceConflict):
                await store.events.append(
                    order,
                    numbered(1),
                    expected=stale,
                    idempotency_key="pay",
                    correlation_id="checkout",
                    source=CART,
                )
        assert await store.events.find_idempotency_key(order, "pay") == []
        assert await store.events.find_source(order, CART) == []
        assert await store.events.correlated("checkout") == []
        done = await store.events.append(order, numbered(1, 2), expected=2, idempotency_key="pay")
        assert done == Appended(2, 2, duplicate=False)
        assert numbers(await store.events.find_idempotency_key(order, "pay")) == [2]

    @pytest.mark.parametrize("first", [0, 2, 5])
    async def test_on_a_branchs_first_append(
        self, store: Store, order: Aggregate, first: int
    ) -> None:
        branch = order.on("what-if")
        await store.events.append(order, numbered(5), expected=NEW)
        done = await store.events.append(
            branch, numbered(2, 90), expected=first, idempotency_key="pay"
        )
        assert done == Appended(first, first + 1)
        for expected in (ANY, 0, 1, 5, 9):
            again = await store.events.append(
                branch, numbered(1), expected=expected, idempotency_key="pay"
            )
            assert again == Appended(first, first + 1, duplicate=True)
        found = await store.events.find_idempotency_key(branch, "pay")
        assert [(e.aggregate, e.sequence) for e in found] == [(branch, first), (branch, first + 1)]
        assert numbers(await store.events.read(branch)) == [*range(first), 90, 91]
        assert await store.events.find_idempotency_key(order, "pay") == []
        assert numbers(await store.events.read(order)) == list(range(5))

    async def test_a_key_of_main_is_not_the_branchs(self, store: Store, order: Aggregate) -> None:
        branch = order.on("what-if")
        await store.events.append(order, numbered(2), expected=NEW, idempotency_key="pay")
        done = await store.events.append(branch, numbered(1), expected=2, idempotency_key="pay")
        assert done == Appended(2, 2, duplicate=False)
        assert sequences(await store.events.find_idempotency_key(branch, "pay")) == [2]
        assert sequences(await store.events.find_idempotency_key(order, "pay")) == [0, 1]

    async def test_a_thousand_events_of_one_key(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(10), expected=NEW)
        done = await store.events.append(
            order, numbered(1000, 10), expected=10, idempotency_key="bulk"
        )
        assert done == Appended(10, 1009)
        await store.events.append(order, numbered(10, 1010), expected=1010)
        again = await store.events.append(order, numbered(1), expected=ANY, idempotency_key="bulk")
        assert again == Appended(10, 1009, duplicate=True)
        found = await store.events.find_idempotency_key(order, "bulk")
        assert numbers(found) == list(range(10, 1010))

    async def test_more_events_of_one_key_than_a_page_has(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(7000), expected=NEW, idempotency_key="bulk")
        await store.events.append(order, numbered(1, 7000), expected=7000)
        found = await store.events.find_idempotency_key(order, "bulk")
        assert numbers(found) == list(range(7000))

    async def test_three_megabytes_of_one_key(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        bodies = [bytes([n]) * 150_000 for n in range(20)]
        events = [Event("Large", body) for body in bodies]
        await store.events.append(order, events, expected=2, idempotency_key="bulk", source=CART)
        await store.events.append(order, numbered(1), expected=22)
        found = await store.events.find_idempotency_key(order, "bulk")
        assert [event.data for event in found] == bodies
        assert await store.events.find_source(order, CART) == found

    async def test_an_erased_aggregate_has_used_no_key(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW, idempotency_key="pay")
        await store.events.delete(order)
        assert await store.events.find_idempotency_key(order, "pay") == []
        done = await store.events.append(order, numbered(1), expected=NEW, idempotency_key="pay")
        assert done == Appended(0, 0, duplicate=False)


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
            proxy.lose = 1
            done = await store.events.append(
                order, numbered(2, 3), expected=expected, idempotency_key="pay"
            )
            assert proxy.lost == 1
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
            proxy.lose = 1
            done = await store.events.append(
                branch, numbered(2, 90), expected=1, idempotency_key="pay", correlation_id="c"
            )
            assert proxy.lost == 1
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

            proxy.on_lost = append_another
            await store.events.append(order, numbered(1), expected=NEW)
            proxy.lose = 1
            done = await store.events.append(
                order, numbered(1, 1), expected=ANY, idempotency_key="pay"
            )
            assert done == Appended(1, 1, duplicate=False)
            assert await meanwhile[0] == Appended(2, 3)
            assert numbers(await store.events.read(order)) == [0, 1, 7, 8]

    async def test_a_duplicate_stays_one(self, running: RedisServer, order: Aggregate) -> None:
        async with proxy_to(self.path(running)) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.append(order, numbered(2), expected=NEW, idempotency_key="pay")
            proxy.lose = 1
            again = await store.events.append(
                order, numbered(1), expected=ANY, idempotency_key="pay"
            )
            assert proxy.lost == 1
            assert again == Appended(0, 1, duplicate=True)
            assert sequences(await store.events.read(order)) == [0, 1]

    async def test_a_whole_group_of_them(self, running: RedisServer) -> None:
        places = [Aggregate(f"group-{uuid.uuid4()}", f"{n}") for n in range(24)]
        async with proxy_to(self.path(running)) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.next_sequence(places[0])
            proxy.lose = 1
            done = await asyncio.gather(
                *(
                    store.events.append(
                        place, numbered(2), expected=NEW, idempotency_key="pay", source=CART
                    )
                    for place in places
                )
            )
            assert proxy.lost == 1
            assert set(done) == {Appended(0, 1, duplicate=False)}
            for place in places:
                assert numbers(await store.events.find_source(place, CART)) == [0, 1]


class TestSource:
    async def test_it_is_kept_with_each_event(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        await store.events.append(order, numbered(3), expected=1, source=CART)
        sources = [event.source for event in await store.events.read(order)]
        assert sources == [None, CART, CART, CART]

    async def test_find(self, store: Store, order: Aggregate) -> None:
        assert await store.events.find_source(order, CART) == []
        await store.events.append(order, numbered(2), expected=NEW)
        assert await store.events.find_source(order, CART) == []
        await store.events.append(order, numbered(2, 2), expected=2, source=CART)
        await store.events.append(order, numbered(1, 4), expected=4)
        everything = await store.events.read(order)
        assert await store.events.find_source(order, CART) == everything[2:4]
        for miss in (
            Source("carts", "7", "main", 2),
            Source("carts", "7", "main", 30),
            Source("carts", "7", "main", 0),
            Source("carts", "7", "what-if", 3),
            Source("carts", "77", "main", 3),
            Source("carts", "8", "main", 3),
            Source("orders", "7", "main", 3),
        ):
            assert await store.events.find_source(order, miss) == []
        for place in (Aggregate("orders", "other"), order.on("what-if")):
            assert await store.events.find_source(place, CART) == []

    async def test_several_appends_with_one_are_all_found_in_order(
        self, store: Store, order: Aggregate
    ) -> None:
        other = Source("carts", "7", "main", 4)
        wanted = []
        for n in range(0, 36, 3):
            is_wanted = n % 2 == 0
            source = CART if is_wanted else other
            await store.events.append(order, numbered(3, n), expected=n, source=source)
            wanted += [n, n + 1, n + 2] if is_wanted else []
        found = await store.events.find_source(order, CART)
        assert sequences(found) == numbers(found) == wanted

    async def test_roots_with_colons_do_not_mix(self, store: Store, order: Aggregate) -> None:
        sources = [
            Source("a", "b:c", "main", 1),
            Source("a", "b", "main", 1),
            Source("a", "b:c", "b", 1),
            Source("a", "c", "b", 1),
            Source("a", "1:b:c", "main", 1),
            Source("a", "b:c:1", "main", 1),
            Source("a", "b:c", "main", 11),
            Source("a", "b c", "main", 1),
            Source("a", "main:1:b:c", "main", 1),
        ]
        for n, source in enumerate(sources):
            await store.events.append(order, numbered(1, n), expected=n, source=source)
        for n, source in enumerate(sources):
            (found,) = await store.events.find_source(order, source)
            assert (found.sequence, found.source) == (n, source)
        assert await store.events.find_source(order, Source("a", "c:b", "main", 1)) == []

    async def test_a_root_that_is_a_uuid_is_its_text(self, store: Store, order: Aggregate) -> None:
        root = uuid.uuid4()
        source = Source("carts", root, "main", FAR)
        await store.events.append(order, numbered(1), expected=NEW, source=source)
        (found,) = await store.events.find_source(order, Source("carts", str(root), "main", FAR))
        assert found.source == source
        assert found.source.root == str(root)

    async def test_on_a_branch_it_finds_the_branchs_own(
        self, store: Store, order: Aggregate
    ) -> None:
        branch = order.on("what-if")
        await store.events.append(order, numbered(3), expected=NEW, source=CART)
        assert await store.events.find_source(branch, CART) == []
        await store.events.append(branch, numbered(2, 90), expected=2, source=CART)
        found = await store.events.find_source(branch, CART)
        assert [(e.aggregate, e.sequence, e.data["n"]) for e in found] == [
            (branch, 2, 90),
            (branch, 3, 91),
        ]
        assert numbers(await store.events.find_source(order, CART)) == [0, 1, 2]

    async def test_a_source_may_be_used_again(self, store: Store, order: Aggregate) -> None:
        # It is no idempotency key: it tells where events come from, and refuses nothing.
        for n in range(2):
            done = await store.events.append(order, numbered(1), expected=n, source=CART)
            assert done == Appended(n, n, duplicate=False)


def told(books: list[EventBook]) -> list[tuple[str, str, str, list[int]]]:
    """Return what books say: domain, edition, root and the sequences."""
    return [
        (b.aggregate.domain, b.aggregate.edition, b.aggregate.root, sequences(b.events))
        for b in books
    ]


class TestCorrelation:
    async def test_unknown_and_empty(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW, correlation_id="")
        assert await store.events.correlated("unknown") == []
        assert await store.events.correlated("") == []
        (event,) = await store.events.read(order)
        assert event.correlation_id is None

    async def test_two_domains_make_two_books(self, store: Store, order: Aggregate) -> None:
        cart = Aggregate("carts", "7")
        await store.events.append(order, numbered(2), expected=NEW, correlation_id="checkout")
        await store.events.append(cart, numbered(1), expected=NEW, correlation_id="checkout")
        books = await store.events.correlated("checkout")
        assert told(books) == [("carts", "main", "7", [0]), ("orders", "main", order.root, [0, 1])]
        for book in books:
            assert book.events == await store.events.read(book.aggregate)
            assert [e.aggregate for e in book.events] == [book.aggregate] * len(book.events)

    async def test_only_the_events_that_carry_it(self, store: Store, order: Aggregate) -> None:
        ids = ["a", None, "b", "a", "a", None, "b", "a"]
        for n, correlation_id in enumerate(ids):
            await store.events.append(
                order, numbered(2, 2 * n), expected=2 * n, correlation_id=correlation_id
            )
        events = await store.events.read(order)
        assert [e.correlation_id for e in events] == [i for i in ids for _ in range(2)]
        for correlation_id in ("a", "b"):
            (book,) = await store.events.correlated(correlation_id)
            wanted = [e for e in events if e.correlation_id == correlation_id]
            assert book == EventBook(order, wanted)

    async def test_books_are_in_order_of_domain_edition_and_root(self, store: Store) -> None:
        places = [
            Aggregate(domain, root, edition)
            for domain in ("orders", "carts")
            for edition in ("main", "what-if", "b")
            for root in ("2", "10", "a:b", "ä", "a", "☃ 1")
        ]
        for place in reversed(places):
            await store.events.append(place, numbered(1), expected=NEW, correlation_id="c")
            await store.events.append(place, numbered(1), expected=1)
            await store.events.append(place, numbered(2), expected=2, correlation_id="c")
        wanted = sorted((p.domain, p.edition, p.root, [0, 2, 3]) for p in places)
        assert told(await store.events.correlated("c")) == wanted

    # the colon: `orders-eu` and `orders2` come before `orders`, though the docstring of
    # `correlated` says "in the order of their domains, editions and roots".
    async def test_books_are_in_that_order_also_where_one_name_begins_like_another(
        self, store: Store
    ) -> None:
        places = [
            Aggregate("orders", "1"),
            Aggregate("orders-eu", "1"),
            Aggregate("orders2", "1"),
            Aggregate("orders", "1", "what"),
            Aggregate("orders", "1", "what-if"),
            Aggregate("orders", "1", "what.now"),
        ]
        for place in places:
            await store.events.append(place, numbered(1), expected=NEW, correlation_id="c")
        books = await store.events.correlated("c")
        wanted = sorted((p.domain, p.edition, p.root, [0]) for p in places)
        assert sorted(told(books)) == wanted
        assert told(books) == wanted

    async def test_on_branches_only_their_own_events(self, store: Store, order: Aggregate) -> None:
        branch = order.on("what-if")
        await store.events.append(order, numbered(3), expected=NEW, correlation_id="c")
        await store.events.append(branch, numbered(2), expected=1, correlation_id="c")
        await store.events.branch(order.on("empty"), at=2)
        books = await store.events.correlated("c")
        assert told(books) == [
            ("orders", "main", order.root, [0, 1, 2]),
            ("orders", "what-if", order.root, [1, 2]),
        ]
        assert [e.aggregate for e in books[1].events] == [branch, branch]

    async def test_thousands_of_appends_with_two_ids_in_one_aggregate(
        self, store: Store, order: Aggregate
    ) -> None:
        async def append(n: int) -> None:
            correlation_id = ("odd", "even")[n % 2 == 0]
            event = Event("Counted", {"id": correlation_id, "n": n})
            await store.events.append(order, [event], expected=ANY, correlation_id=correlation_id)

        await asyncio.gather(*(append(n) for n in range(2500)))
        everything = await store.events.read(order)
        assert len(everything) == 2500
        for correlation_id, rest in (("even", 0), ("odd", 1)):
            (book,) = await store.events.correlated(correlation_id)
            assert sorted(numbers(book.events)) == list(range(rest, 2500, 2))
            assert {e.data["id"] for e in book.events} == {correlation_id}
            assert book.events == [e for e in everything if e.correlation_id == correlation_id]

    @pytest.mark.parametrize("count", [1000, 2001])
    async def test_as_many_claims_as_pages_have(
        self, store: Store, order: Aggregate, count: int
    ) -> None:
        await asyncio.gather(
            *(
                store.events.append(order, numbered(2, n), expected=ANY, correlation_id="c")
                for n in range(count)
            )
        )
        (book,) = await store.events.correlated("c")
        assert sequences(book.events) == list(range(2 * count))

    async def test_more_bytes_than_a_page_has(self, store: Store, order: Aggregate) -> None:
        for n in range(12):
            events = [Event("Large", bytes([n]) * 100_000) for _ in range(2)]
            await store.events.append(
                order, events, expected=2 * n, correlation_id="a" if n % 3 else "b"
            )
        (book,) = await store.events.correlated("a")
        assert sequences(book.events) == [s for s in range(24) if s // 2 % 3]
        assert [e.data[0] for e in book.events] == [e.sequence // 2 for e in book.events]

    async def test_more_aggregates_than_are_looked_through_at_once(self, store: Store) -> None:
        places = [Aggregate("orders", f"{n:03}") for n in range(250)]
        await asyncio.gather(
            *(
                store.events.append(place, numbered(1), expected=NEW, correlation_id="c")
                for place in places
            )
        )
        books = await store.events.correlated("c")
        assert [book.aggregate for book in books] == places

    async def test_ids_of_all_sorts_are_apart(self, store: Store, order: Aggregate) -> None:
        ids = [
            "c",
            "c-1",
            "c-12",
            "c-1 2",
            "c:",
            "{c}",
            "}{",
            "{",
            "c}",
            "☃ 🎈",
            "ÿ",
            "*",
            "c*",
            "%d",
            "x" * 512,
        ]
        for n, correlation_id in enumerate(ids):
            await store.events.append(
                order, numbered(1, n), expected=n, correlation_id=correlation_id
            )
        for n, correlation_id in enumerate(ids):
            (book,) = await store.events.correlated(correlation_id)
            assert [(e.sequence, e.correlation_id) for e in book.events] == [(n, correlation_id)]
        assert await store.events.correlated("c-") == []

    async def test_deleted_ones_are_not_there(self, store: Store, order: Aggregate) -> None:
        branch, other = order.on("what-if"), Aggregate("orders", "other")
        for place in (order, branch, other):
            await store.events.append(place, numbered(1), expected=NEW, correlation_id="c")
        await store.events.delete(order)
        assert [b.aggregate for b in await store.events.correlated("c")] == sorted(
            (branch, other), key=lambda a: (a.domain, a.edition, a.root)
        )
        await store.events.delete_edition("orders", "what-if")
        assert [b.aggregate for b in await store.events.correlated("c")] == [other]
        await store.events.append(order, numbered(2), expected=NEW)
        assert [b.aggregate for b in await store.events.correlated("c")] == [other]
        await store.events.delete(other)
        assert await store.events.correlated("c") == []

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


class TestAllTogether:
    @pytest.mark.parametrize("where", ["main", "what-if"])
    @pytest.mark.parametrize(
        "data", [{"ü": [1, None]}, b"", b"\x00\xff\n\r\n", b'{"a":1}'], ids=repr
    )
    async def test_traces_metadata_and_bodies_come_back(
        self, store: Store, order: Aggregate, where: str, data: object
    ) -> None:
        place = order.on(where)
        moment = datetime(2020, 2, 29, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
        event = Event(
            "Ticked\n☃", data, metadata={"correlation": "x", "key": 1, "ü": {}}, time=moment
        )
        names = {"idempotency_key": 'k"{:}\\', "correlation_id": "c]\u2028,ü"}
        source = Source("a", 'b:"c"\\ü', "main", 12)
        await store.events.append(place, [event] * 2, expected=NEW, source=source, **names)  # type: ignore[arg-type]
        events = await store.events.read(place)
        assert sequences(events) == [0, 1]
        for recorded in events:
            assert recorded.aggregate == place
            assert (recorded.type, recorded.data, recorded.metadata) == (
                event.type,
                data,
                {"correlation": "x", "key": 1, "ü": {}},
            )
            assert type(recorded.data) is type(data)
            assert (recorded.id, recorded.time) == (event.id, moment)
            assert recorded.idempotency_key == names["idempotency_key"]
            assert recorded.correlation_id == names["correlation_id"]
            assert recorded.source == source
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                copy = pickle.loads(pickle.dumps(recorded, protocol))  # noqa: S301
                assert copy == recorded
                assert copy.data == data
                assert (copy.source, copy.correlation_id, copy.idempotency_key) == (
                    source,
                    names["correlation_id"],
                    names["idempotency_key"],
                )
        assert await store.events.find_idempotency_key(place, names["idempotency_key"]) == events
        assert await store.events.find_source(place, source) == events
        assert await store.events.correlated(names["correlation_id"]) == [EventBook(place, events)]
        assert (await store.load(place)).events == events
        assert await listed(store.events.stream(place)) == events


class TestTime:
    @pytest.mark.parametrize("hours", [-12, 0, 5.5, 14])
    async def test_a_given_one_is_the_same_moment(
        self, store: Store, order: Aggregate, hours: float
    ) -> None:
        zone = timezone(timedelta(hours=hours))
        moments = [
            datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=zone),
            datetime(1970, 1, 1, tzinfo=zone),
            datetime(1969, 7, 20, 20, 17, 40, 1, tzinfo=zone),
            datetime(2500, 1, 1, 0, 0, 0, 7, tzinfo=zone),
        ]
        events = [Event("Happened", 1, time=moment) for moment in moments]
        await store.events.append(order, events, expected=NEW, idempotency_key="k")
        recorded = await store.events.find_idempotency_key(order, "k")
        assert [e.time for e in recorded] == moments
        assert {e.time.utcoffset() for e in recorded} == {timedelta(0)}

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

    async def test_a_given_one_does_not_move_the_stores_own(
        self, store: Store, order: Aggregate
    ) -> None:
        late = datetime(2200, 1, 1, tzinfo=UTC)
        await store.events.append(order, [Event("Late", 1, time=late)], expected=NEW)
        await store.events.append(order, numbered(1), expected=1)
        event = (await store.events.read(order))[1]
        assert event.time < datetime.now(UTC) + timedelta(seconds=1)

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


async def test_a_call_full_of_conflicts_brings_what_was_missed_and_does_not_stall(
    store: Store, order: Aggregate
) -> None:
    large = [Event("Large", b"x" * 4_000_000) for _ in range(4)]
    await store.events.append(order, large, expected=NEW)
    small = Event("Told", 1)
    refused = await asyncio.gather(
        *(store.events.append(order, [small], expected=0, missed=True) for _ in range(20)),
        return_exceptions=True,
    )
    for each in refused:
        assert isinstance(each, SequenceConflict)
        assert each.missed is not None
        assert [event.id for event in each.missed] == [event.id for event in large]
