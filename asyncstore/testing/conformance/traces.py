"""What every server must do with idempotency keys, sources, correlation ids and server times.

And that nothing of an erased aggregate stays.
"""

from __future__ import annotations

import asyncio
import pickle
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Event,
    EventBook,
    SequenceConflict,
    Source,
    Store,
)
from asyncstore.testing.builders import listed, numbered, sequences
from asyncstore.testing.conformance import needs

FAR = 2**53 - 1

CART = Source("carts", "7", "main", 3)


def numbers(events: list[asyncstore.RecordedEvent]) -> list[int]:
    return [event.data["n"] for event in events]


@needs("idempotency")
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

    async def test_different_keys_both_store(self, store: Store, order: Aggregate) -> None:
        for n, key in enumerate(("a", "b", "A")):
            done = await store.events.append(order, numbered(1, n), expected=n, idempotency_key=key)
            assert done == Appended(n, n)
        assert [e.idempotency_key for e in await store.events.read(order)] == ["a", "b", "A"]

    @needs("editions")
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

    @needs("editions")
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

    @needs("editions")
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


@needs("sources")
class TestSource:
    async def test_it_is_kept_with_each_event(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        await store.events.append(order, numbered(3), expected=1, source=CART)
        sources = [event.source for event in await store.events.read(order)]
        assert sources == [None, CART, CART, CART]

    @needs("editions")
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

    @needs("editions")
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


@needs("correlation")
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

    @needs("editions")
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

    @needs("editions")
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

    @needs("editions")
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

    @needs("editions")
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


@needs("correlation", "idempotency", "sources")
class TestAllTogether:
    @pytest.mark.parametrize("where", ["main", pytest.param("what-if", marks=needs("editions"))])
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

    async def test_a_given_one_does_not_move_the_stores_own(
        self, store: Store, order: Aggregate
    ) -> None:
        late = datetime(2200, 1, 1, tzinfo=UTC)
        await store.events.append(order, [Event("Late", 1, time=late)], expected=NEW)
        await store.events.append(order, numbered(1), expected=1)
        event = (await store.events.read(order))[1]
        assert event.time < datetime.now(UTC) + timedelta(seconds=1)


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
