"""What every server must do with events."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest

from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Event,
    EventTooLarge,
    SequenceConflict,
    Store,
)
from asyncstore.testing.builders import listed, numbered, sequences
from asyncstore.testing.conformance import needs


class TestAppend:
    async def test_one_event_is_read_back(self, store: Store, order: Aggregate) -> None:
        event = Event("OrderPlaced", {"total": 12, "ümläut": ["☃", None, 1.5]}, metadata={"by": 1})
        assert await store.events.append(order, [event], expected=NEW) == Appended(0, 0)
        (recorded,) = await store.events.read(order)
        assert recorded.aggregate == order
        assert recorded.sequence == 0
        assert recorded.type == "OrderPlaced"
        assert recorded.data == {"total": 12, "ümläut": ["☃", None, 1.5]}
        assert recorded.metadata == {"by": 1}
        assert recorded.id == event.id
        assert (recorded.correlation_id, recorded.source, recorded.idempotency_key) == (None,) * 3

    async def test_five_events_get_five_sequences(self, store: Store, order: Aggregate) -> None:
        assert await store.events.append(order, numbered(5), expected=NEW) == Appended(0, 4)
        events = await store.events.read(order)
        assert [(e.sequence, e.data["n"]) for e in events] == [(n, n) for n in range(5)]

    async def test_batches_in_a_row_are_dense(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        assert await store.events.append(order, numbered(2, 3), expected=3) == Appended(3, 4)
        assert await store.events.append(order, numbered(1, 5), expected=ANY) == Appended(5, 5)
        events = await store.events.read(order)
        assert [e.data["n"] for e in events] == list(range(6))

    async def test_nothing_is_fine_and_leaves_nothing(self, store: Store, order: Aggregate) -> None:
        assert await store.events.append(order, [], expected=NEW) == Appended(0, -1)
        assert await store.events.append(order, [], expected=7) == Appended(0, -1)
        assert await store.events.read(order) == []
        assert await listed(store.events.domains()) == []

    @pytest.mark.parametrize("expected", [0, 2, 4, 2**53 - 1])
    async def test_another_sequence_is_a_conflict(
        self, store: Store, order: Aggregate, expected: int
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        with pytest.raises(SequenceConflict) as caught:
            await store.events.append(order, numbered(2, 3), expected=expected)
        error = caught.value
        assert (error.aggregate, error.expected, error.actual) == (order, expected, 3)
        assert "expected=3" in str(error)
        assert sequences(await store.events.read(order)) == [0, 1, 2]

    async def test_a_first_append_beyond_the_beginning_is_a_conflict(
        self, store: Store, order: Aggregate
    ) -> None:
        with pytest.raises(SequenceConflict):
            await store.events.append(order, numbered(1), expected=1)
        assert await listed(store.events.roots("orders")) == []

    async def test_equal_events_are_both_stored(self, store: Store, order: Aggregate) -> None:
        moment = datetime(2020, 1, 1, tzinfo=UTC)
        event = Event("Ticked", {"n": 1}, id=uuid.uuid4(), time=moment)
        await store.events.append(order, [event, event], expected=NEW)
        await store.events.append(order, [event], expected=2)
        assert sequences(await store.events.read(order)) == [0, 1, 2]

    async def test_writers_at_one_sequence_one_wins(self, store: Store, order: Aggregate) -> None:
        events = [Event("Claimed", {"by": n}) for n in range(16)]
        outcomes = await asyncio.gather(
            *(store.events.append(order, [event], expected=NEW) for event in events),
            return_exceptions=True,
        )
        won = [n for n, outcome in enumerate(outcomes) if outcome == Appended(0, 0)]
        assert len(won) == 1
        refused = [outcome for outcome in outcomes if isinstance(outcome, SequenceConflict)]
        assert len(refused) == 15
        assert [e.data["by"] for e in await store.events.read(order)] == won

    async def test_eight_writers_that_retry_are_dense(self, store: Store, order: Aggregate) -> None:
        async def write(writer: int) -> int:
            while True:
                place = await store.events.next_sequence(order)
                try:
                    event = Event("Written", {"writer": writer})
                    done = await store.events.append(order, [event], expected=place)
                except SequenceConflict:
                    continue
                return done.first_sequence

        places = await asyncio.gather(*(write(n) for n in range(8)))
        assert sorted(places) == list(range(8))
        events = await store.events.read(order)
        assert {e.data["writer"]: e.sequence for e in events} == dict(enumerate(places))

    async def test_ten_batches_of_a_thousand(self, store: Store, order: Aggregate) -> None:
        for first in range(0, 10_000, 1000):
            await store.events.append(order, numbered(1000, first), expected=first)
        middle = await store.events.read(order, start=5000, stop=5010)
        assert [e.data["n"] for e in middle] == list(range(5000, 5010))
        assert sequences(await store.events.read(order)) == list(range(10_000))

    async def test_five_thousand_in_one_append(self, store: Store, order: Aggregate) -> None:
        done = await store.events.append(order, numbered(5000), expected=NEW)
        assert done == Appended(0, 4999)
        events = await store.events.read(order)
        assert [e.data["n"] for e in events] == list(range(5000))

    async def test_a_megabyte_in_one_event(self, store: Store, order: Aggregate) -> None:
        text, raw = "é" * 500_000, bytes(range(256)) * 4096
        events = [Event("Text", text), Event("Raw", raw)]
        await store.events.append(order, events, expected=NEW)
        assert [e.data for e in await store.events.read(order)] == [text, raw]

    @needs("limits")
    async def test_too_much_names_the_setting(self, store: Store, order: Aggregate) -> None:
        limit = 16 * 1024 * 1024
        huge = [Event("Small", 1), Event("Huge", b"x" * limit)]
        with pytest.raises(EventTooLarge) as caught:
            await store.events.append(order, huge, expected=NEW)
        error = caught.value
        assert (error.setting, error.limit, error.index) == ("max_event_bytes", limit, 1)
        assert "max_event_bytes" in str(error)
        with pytest.raises(EventTooLarge) as caught:
            await store.events.append(order, numbered(10_001), expected=NEW)
        assert (caught.value.setting, caught.value.actual) == ("max_append_events", 10_001)
        with pytest.raises(EventTooLarge) as caught:
            await store.events.append(order, [Event("Big", b"x" * 2**23)] * 9, expected=NEW)
        assert caught.value.setting == "max_append_bytes"
        assert await store.events.next_sequence(order) == 0

    @pytest.mark.parametrize(
        "raw",
        [b"", b"\n", b"\x00\xff\r\n", b'{"a":1}', bytearray(b"abc"), memoryview(b"abc")],
        ids=["nothing", "newline", "binary", "json", "bytearray", "memoryview"],
    )
    async def test_bytes_stay_bytes(
        self, store: Store, order: Aggregate, raw: bytes | bytearray | memoryview
    ) -> None:
        await store.events.append(order, [Event("Raw", raw)], expected=NEW)
        (event,) = await store.events.read(order)
        assert type(event.data) is bytes
        assert event.data == bytes(raw)

    async def test_aggregates_do_not_touch_each_other(self, store: Store) -> None:
        places = [
            Aggregate("orders", "1"),
            Aggregate("orders", "2"),
            Aggregate("carts", "1"),
            Aggregate("a", "b:c"),
            Aggregate("a", "b"),
            Aggregate("a", "*"),
            Aggregate("a", "[b]?"),
        ]
        for n, place in enumerate(places):
            await store.events.append(place, [Event("Counted", n)], expected=NEW)
        for n, place in enumerate(places):
            assert [e.data for e in await store.events.read(place)] == [n]


class TestTime:
    async def test_a_given_time_comes_back(self, store: Store, order: Aggregate) -> None:
        times = [
            datetime(2010, 3, 31, 16, 59, 42, 123456, tzinfo=timezone(timedelta(hours=2))),
            datetime(1, 1, 1, 12, tzinfo=UTC),
            datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
            datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        ]
        events = [Event("Happened", None, time=moment) for moment in times]
        await store.events.append(order, events, expected=NEW)
        recorded = await store.events.read(order)
        assert [e.time for e in recorded] == times
        assert all(e.time.tzinfo is UTC for e in recorded)

    async def test_the_server_stamps_what_has_no_time(self, store: Store, order: Aggregate) -> None:
        before = datetime.now(UTC)
        await store.events.append(order, numbered(2), expected=NEW)
        after = datetime.now(UTC)
        for event in await store.events.read(order):
            assert before - timedelta(seconds=1) <= event.time <= after + timedelta(seconds=1)

    async def test_until_is_inclusive_and_needs_no_order(
        self, store: Store, order: Aggregate
    ) -> None:
        noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
        minutes = [0, 20, 10, 30]
        events = [Event("At", m, time=noon + timedelta(minutes=m)) for m in minutes]
        await store.events.append(order, events, expected=NEW)

        async def until(minute: float, **keywords: int | bool) -> list[int]:
            moment = (noon + timedelta(minutes=minute)).astimezone(timezone(timedelta(hours=-7)))
            found = await store.events.read(order, until=moment, **keywords)  # type: ignore[arg-type]
            return [e.data for e in found]

        assert await until(-1) == []
        assert await until(0) == [0]
        assert await until(10) == [0, 10]
        assert await until(20) == [0, 20, 10]
        assert await until(99) == [0, 20, 10, 30]
        assert await until(20, limit=2) == [0, 20]
        assert await until(20, limit=2, reverse=True) == [10, 20]
        assert await until(20, start=1, stop=3) == [20, 10]

    async def test_until_is_exact_to_the_microsecond_in_far_years(
        self, store: Store, order: Aggregate
    ) -> None:
        late = datetime(9999, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
        await store.events.append(order, [Event("Late", 1, time=late)], expected=NEW)
        assert await store.events.read(order, until=late - timedelta(microseconds=1)) == []
        assert len(await store.events.read(order, until=late)) == 1

    async def test_until_reads_on_over_many_pages(self, store: Store, order: Aggregate) -> None:
        start = datetime(2024, 1, 1, tzinfo=UTC)
        body = "x" * 1000
        events = [
            Event("At", [n, body], time=start + timedelta(seconds=-n % 3)) for n in range(6000)
        ]
        await store.events.append(order, events, expected=NEW)
        found = await store.events.read(order, until=start)
        assert [e.data[0] for e in found] == list(range(0, 6000, 3))
        found = await store.events.read(order, until=start, reverse=True, limit=1990)
        assert [e.data[0] for e in found] == list(range(5997, 27, -3))


class TestRead:
    async def test_unknown_is_empty(self, store: Store, order: Aggregate) -> None:
        assert await store.events.read(order) == []
        assert await listed(store.events.stream(order)) == []
        assert await store.events.next_sequence(order) == 0

    async def test_ranges(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(10), expected=NEW)

        async def read(**keywords: int | bool | None) -> list[int]:
            read = await store.events.read(order, **keywords)  # type: ignore[arg-type]
            streamed = await listed(store.events.stream(order, **keywords))  # type: ignore[arg-type]
            assert read == streamed
            return sequences(read)

        assert await read() == await read(start=0) == await read(start=0, stop=99) == [*range(10)]
        assert await read(start=4) == [4, 5, 6, 7, 8, 9]
        assert await read(start=9) == [9]
        assert await read(start=10) == await read(start=2**53 - 1) == []
        assert await read(start=3, stop=6) == [3, 4, 5]
        assert await read(start=3, stop=4) == [3]
        assert await read(stop=0) == await read(start=5, stop=5) == []
        assert await read(limit=0) == []
        assert await read(limit=3) == [0, 1, 2]
        assert await read(start=8, limit=5) == [8, 9]
        assert await read(reverse=True) == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
        assert await read(reverse=True, limit=2) == [9, 8]
        assert await read(reverse=True, start=2, stop=5) == [4, 3, 2]
        assert await read(reverse=True, start=2, stop=50, limit=9) == [9, 8, 7, 6, 5, 4, 3, 2]
        assert await read(reverse=True, start=2, stop=2**53 - 1, limit=1) == [9]

    async def test_pages_are_seamless(self, store: Store, order: Aggregate) -> None:
        # More events than a page has, and more bytes than a page has.
        for first in range(0, 12_000, 4000):
            events = [Event("Padded", "x" * 300) for _ in range(4000)]
            await store.events.append(order, events, expected=first)
        everything = list(range(12_000))
        assert sequences(await store.events.read(order)) == everything
        assert sequences(await store.events.read(order, reverse=True)) == everything[::-1]
        assert sequences(await store.events.read(order, limit=11_000)) == everything[:11_000]
        streamed = await listed(store.events.stream(order, start=7, stop=11_999))
        assert sequences(streamed) == everything[7:11_999]

    async def test_a_stream_can_be_left(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(10), expected=NEW)
        async for event in store.events.stream(order):
            if event.sequence == 3:
                break
        assert await store.events.next_sequence(order) == 10


class TestNextSequence:
    async def test_counts_step_by_step(self, store: Store, order: Aggregate) -> None:
        for n in range(7):
            assert await store.events.next_sequence(order) == n
            await store.events.append(order, numbered(1), expected=n)
        assert await store.events.next_sequence(order) == 7


class TestLoad:
    async def test_unknown(self, store: Store, order: Aggregate) -> None:
        loaded = await store.load(order)
        assert (loaded.snapshot, loaded.events, loaded.next_sequence) == (None, [], 0)

    async def test_without_a_snapshot_all_events(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        loaded = await store.load(order)
        assert loaded.snapshot is None
        assert loaded.events == await store.events.read(order)
        assert loaded.next_sequence == 3

    @needs("snapshots")
    async def test_only_the_events_after_the_snapshot(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(10), expected=NEW)
        await store.snapshots.put(order, sequence=6, state={"sum": 21})
        loaded = await store.load(order)
        assert loaded.snapshot is not None
        assert (loaded.snapshot.sequence, loaded.snapshot.state) == (6, {"sum": 21})
        assert sequences(loaded.events) == [7, 8, 9]
        assert loaded.next_sequence == 10

    @needs("snapshots")
    @pytest.mark.parametrize("sequence", [9, 50, 2**53 - 1])
    async def test_a_snapshot_at_or_beyond_the_end(
        self, store: Store, order: Aggregate, sequence: int
    ) -> None:
        await store.events.append(order, numbered(10), expected=NEW)
        await store.snapshots.put(order, sequence=sequence, state=1)
        loaded = await store.load(order)
        assert (loaded.events, loaded.next_sequence) == ([], 10)

    @needs("snapshots")
    async def test_more_than_a_page(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(9000), expected=NEW)
        await store.snapshots.put(order, sequence=99, state=None)
        loaded = await store.load(order)
        assert sequences(loaded.events) == list(range(100, 9000))
        assert loaded.next_sequence == 9000


class TestListing:
    @needs("editions")
    async def test_roots_domains_editions(self, store: Store) -> None:
        assert await listed(store.events.domains()) == []
        assert await listed(store.events.roots("orders")) == []
        assert await listed(store.events.editions("orders")) == []
        for domain, root in [("orders", "☃ 1"), ("orders", "2"), ("carts", "2"), ("a.b", "*")]:
            await store.events.append(Aggregate(domain, root), numbered(1), expected=NEW)
        assert await listed(store.events.domains()) == ["a.b", "carts", "orders"]
        assert sorted(await listed(store.events.roots("orders"))) == ["2", "☃ 1"]
        assert await listed(store.events.roots("carts")) == ["2"]
        assert await listed(store.events.roots("orders", edition="what-if")) == []
        assert await listed(store.events.roots("unknown")) == []
        assert await listed(store.events.editions("orders")) == ["main"]

    async def test_many_roots_each_once_while_others_write(self, store: Store) -> None:
        async def append(n: int) -> None:
            await store.events.append(Aggregate("orders", f"{n}"), numbered(1), expected=ANY)

        await asyncio.gather(*(append(n) for n in range(2500)))
        seen = []
        async for root in store.events.roots("orders"):
            seen.append(root)
            if len(seen) % 500 == 0:
                await append(0)
                await append(2400)
                await append(10_000 + len(seen))
        assert len(seen) == len(set(seen))
        assert set(seen) >= {f"{n}" for n in range(2500)}


class TestDelete:
    @needs("positions", "snapshots")
    async def test_takes_all_that_is_its_and_nothing_else(
        self, store: Store, order: Aggregate
    ) -> None:
        other = Aggregate("orders", "other")
        for place in (order, other):
            await store.events.append(place, numbered(5), expected=NEW)
            await store.positions.put("projector", place, 3)
            await store.positions.put("saga", place, 4)
            for sequence in (1, 2, 3):
                await store.snapshots.put(place, sequence=sequence, state=sequence)
        assert await store.events.delete(order) == 5
        assert await store.events.read(order) == []
        assert await store.events.next_sequence(order) == 0
        assert await store.positions.get("projector", order) is None
        assert await store.positions.get("saga", order) is None
        assert await store.snapshots.get(order) is None
        assert await store.snapshots.get(order, at=2) is None
        assert await listed(store.events.roots("orders")) == ["other"]
        assert await store.events.next_sequence(other) == 5
        assert await store.positions.get("saga", other) == 4
        assert await store.snapshots.get(other, at=2) is not None

    async def test_unknown_is_fine(self, store: Store, order: Aggregate) -> None:
        assert await store.events.delete(order) == 0

    @needs("editions")
    async def test_the_last_root_takes_its_domain_along(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        await store.events.append(Aggregate("carts", "1"), numbered(1), expected=NEW)
        await store.events.delete(order)
        assert await listed(store.events.domains()) == ["carts"]
        assert await listed(store.events.editions("orders")) == []

    async def test_begins_anew_at_0(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        await store.events.delete(order)
        assert await store.events.append(order, numbered(1), expected=NEW) == Appended(0, 0)
        assert await listed(store.events.domains()) == ["orders"]

    @needs("positions")
    async def test_thousands_of_handlers(self, store: Store, order: Aggregate) -> None:
        names = [f"handler-{n}" for n in range(8500)]
        for first in range(0, 8500, 500):
            await asyncio.gather(
                *(store.positions.put(name, order, 0) for name in names[first : first + 500])
            )
        await store.events.delete(order)
        assert await store.positions.get("handler-8499", order) is None

    @needs("positions")
    async def test_positions_that_appear_meanwhile_go_too(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        handlers = [f"handler-{n}" for n in range(40)]
        await asyncio.gather(
            *(store.positions.put(handler, order, 0) for handler in handlers[:20]),
            store.events.delete(order),
            *(store.positions.put(handler, order, 0) for handler in handlers[20:]),
        )
        await store.events.delete(order)
        found = await asyncio.gather(*(store.positions.get(name, order) for name in handlers))
        assert found == [None] * 40
