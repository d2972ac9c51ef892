"""Folding events to a state, and appending what was decided on it, on each server."""

from __future__ import annotations

import asyncio
import logging
import pickle
from enum import IntEnum
from typing import Any

import pytest

import asyncstore
from asyncstore import (
    NEW,
    Aggregate,
    Appended,
    Event,
    InvalidType,
    InvalidValue,
    RecordedEvent,
    SequenceConflict,
    Snapshot,
    Source,
    Store,
)
from tests.builders import numbered, sequences
from tests.servers import Server, rewrite_member


def summed(total: int, event: RecordedEvent) -> int:
    """Add up the numbers of events; fails on an event that was applied before."""
    n: int = event.data["n"]
    return total + n


async def newest(store: Store, aggregate: Aggregate) -> tuple[int, Any, int] | None:
    found: Snapshot | None = await store.snapshots.get(aggregate)
    return None if found is None else (found.sequence, found.state, found.schema_version)


class TestFold:
    async def test_of_nothing_is_the_beginning(self, store: Store, order: Aggregate) -> None:
        assert await store.fold(order, summed, 7) == 7

    async def test_applies_every_event_in_order(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        assert await store.fold(order, summed, 100) == 115
        in_order: tuple[int, ...] = ()
        found = await store.fold(order, lambda all_, event: (*all_, event.sequence), in_order)
        assert found == (0, 1, 2, 3, 4, 5)
        assert await newest(store, order) is None

    async def test_keeps_a_snapshot_every_so_often(self, store: Store, order: Aggregate) -> None:
        kept = []
        for n in range(10):
            await store.events.append(order, numbered(1, n), expected=n)
            assert await store.fold(order, summed, 0, snapshot_every=4) == sum(range(n + 1))
            found = await newest(store, order)
            kept.append(found and found[0])
        assert kept == [None, None, None, 3, 3, 3, 3, 7, 7, 7]
        assert (await store.load(order)).snapshot is not None
        assert sequences((await store.load(order)).events) == [8, 9]

    async def test_starts_from_the_snapshot(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(6), expected=NEW)
        await store.snapshots.put(order, sequence=3, state=1000)
        assert await store.fold(order, summed, 0) == 1009

    async def test_dump_and_restore(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)

        def apply(seen: frozenset[int], event: RecordedEvent) -> frozenset[int]:
            return seen | {event.data["n"]}

        async def fold() -> frozenset[int]:
            nobody: frozenset[int] = frozenset()
            how = {"dump": sorted, "restore": frozenset}
            return await store.fold(order, apply, nobody, snapshot_every=1, **how)  # type: ignore[arg-type]

        assert await fold() == {0, 1, 2}
        assert await newest(store, order) == (2, [0, 1, 2], 0)
        assert await fold() == {0, 1, 2}
        assert type(await fold()) is frozenset

    async def test_another_schema_version_is_passed_over(
        self, store: Store, order: Aggregate, caplog: pytest.LogCaptureFixture
    ) -> None:
        await store.events.append(order, numbered(4), expected=NEW)
        await store.snapshots.put(order, sequence=3, state="of old", schema_version=1)
        with caplog.at_level(logging.WARNING, "asyncstore"):
            assert await store.fold(order, summed, 0, schema_version=2, snapshot_every=2) == 6
        assert "schema version is 1, and 2 is wanted" in caplog.text
        assert "of old" not in caplog.text
        caplog.clear()
        assert await store.fold(order, summed, 0, schema_version=2) == 6
        assert await newest(store, order) == (3, 6, 2)
        assert not caplog.records
        assert (await store.load(order, schema_version=1)).snapshot is None
        assert (await store.load(order)).snapshot is not None

    async def test_an_older_snapshot_has_its_schema_version(
        self, store: Store, order: Aggregate
    ) -> None:
        for sequence, schema_version in ((1, 5), (2, 0), (3, 6)):
            await store.snapshots.put(
                order, sequence=sequence, state=None, schema_version=schema_version
            )
        found = [await store.snapshots.get(order, at=at) for at in (1, 2, 3)]
        assert [snapshot and snapshot.schema_version for snapshot in found] == [5, 0, 6]

    @pytest.mark.parametrize(
        ("field", "value"),
        [("state", b"{"), ("encoding", b"{"), ("sequence", b"{"), ("schema", b"{")]
        + [("sequence", text) for text in (b"+1", b"1.5", b"9" * 400, b"-1", b"1e3", b" 1")],
    )
    async def test_a_broken_snapshot_is_passed_over(
        self,
        server: Server,
        store: Store,
        order: Aggregate,
        caplog: pytest.LogCaptureFixture,
        field: str,
        value: bytes,
    ) -> None:
        await store.events.append(order, numbered(4), expected=NEW)
        await store.snapshots.put(order, sequence=1, state=1000)
        key = f"{store.settings.key_prefix}snapshots:orders:main:{{{order.root}}}"
        with server.client() as client:
            client.hset(key, field, value)
        assert sequences((await store.load(order)).events) == [0, 1, 2, 3]
        assert await store.fold(order, summed, 0) == 6
        assert "is passed over" in caplog.text

    async def test_a_snapshot_that_restore_refuses_is_passed_over(
        self, store: Store, order: Aggregate, caplog: pytest.LogCaptureFixture
    ) -> None:
        await store.events.append(order, numbered(4), expected=NEW)
        await store.snapshots.put(order, sequence=1, state={"of": "old"})
        assert await store.fold(order, summed, 0, restore=lambda state: int(state["new"])) == 6
        assert "KeyError in restore" in caplog.text

    async def test_follows_an_edition(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(5), expected=NEW)
        assert await store.fold(order, summed, 0, snapshot_every=2) == 10
        branch = order.on("what-if")
        await store.events.append(branch, [Event("Counted", {"n": 50})], expected=2)
        assert await store.fold(branch, summed, 0, snapshot_every=2) == 51
        assert await store.fold(branch, summed, 0) == 51
        assert await store.fold(order, summed, 0) == 10

    async def test_a_snapshot_of_what_is_gone_is_not_kept(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        (*_, last) = await store.events.read(order)
        assert await store.snapshots.put(order, sequence=2, state=3, as_of=last.id)
        await store.events.delete(order)
        assert not await store.snapshots.put(order, sequence=2, state=3, as_of=last.id)
        await store.events.append(order, numbered(3), expected=NEW)
        assert not await store.snapshots.put(order, sequence=2, state=3, as_of=last.id)
        assert await newest(store, order) is None

    async def test_a_snapshot_of_an_edition_that_has_diverged_since_is_not_kept(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(5), expected=NEW)
        branch = order.on("what-if")
        before = await store.events.read(branch)
        assert await store.snapshots.put(branch, sequence=4, state=1, as_of=before[4].id)
        await store.events.append(branch, numbered(4), expected=2)
        assert not await store.snapshots.put(branch, sequence=4, state=1, as_of=before[4].id)
        assert not await store.snapshots.put(branch, sequence=2, state=1, as_of=before[2].id)
        assert await store.snapshots.put(branch, sequence=1, state=1, as_of=before[1].id)
        assert await newest(store, branch) == (1, 1, 0)

    @pytest.mark.parametrize(
        "state", [(1, 2), frozenset([1]), {1: 2}, object()], ids=lambda value: type(value).__name__
    )
    async def test_a_state_that_would_come_back_changed_is_refused_at_once(
        self, store: Store, order: Aggregate, state: Any
    ) -> None:
        with pytest.raises(InvalidType, match=r"dump|state"):
            await store.fold(order, lambda kept, _: kept, state, snapshot_every=100)
        assert await store.fold(order, lambda kept, _: kept, state) is state

    async def test_a_schema_version_may_be_of_an_enum(self, store: Store, order: Aggregate) -> None:
        class Form(IntEnum):
            FIRST = 1
            SECOND = 2

        await store.events.append(order, numbered(4), expected=NEW)
        for form in (Form.FIRST, Form.SECOND):
            how: Any = {"schema_version": form, "snapshot_every": 1}
            assert await store.fold(order, summed, 0, **how) == 6
            assert await newest(store, order) == (3, 6, int(form))
        assert (await store.load(order, schema_version=Form.FIRST)).snapshot is None

    async def test_bad_options(self, store: Store, order: Aggregate) -> None:
        for options, error in (
            ({"snapshot_every": 0}, InvalidValue),
            ({"snapshot_every": -1}, InvalidValue),
            ({"snapshot_every": True}, InvalidType),
            ({"schema_version": -1}, InvalidValue),
            ({"schema_version": 2**31}, InvalidValue),
            ({"schema_version": 10**5000}, InvalidValue),
            ({"schema_version": None}, InvalidType),
            ({"dump": "json"}, InvalidType),
            ({"restore": 5}, InvalidType),
        ):
            with pytest.raises(error, match=next(iter(options))):
                await store.fold(order, summed, 0, **options)
        with pytest.raises(InvalidType, match="apply"):
            await store.fold(order, None, 0)  # type: ignore[arg-type]
        with pytest.raises(InvalidType, match="as_of"):
            await store.snapshots.put(order, sequence=0, state=0, as_of="id")  # type: ignore[arg-type]


def one_more(total: int) -> list[Event]:
    return [Event("Counted", {"n": total + 1})]


class TestUpdate:
    async def test_appends_what_is_decided(self, store: Store, order: Aggregate) -> None:
        assert await store.update(order, one_more, summed, 0) == Appended(0, 0)
        assert await store.update(order, one_more, summed, 0) == Appended(1, 1)
        assert [event.data["n"] for event in await store.events.read(order)] == [1, 2]

    async def test_nothing_decided_writes_nothing(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        assert await store.update(order, lambda _: [], summed, 0) == Appended(2, 1)
        assert await store.events.next_sequence(order) == 2

    async def test_decide_may_be_async(self, store: Store, order: Aggregate) -> None:
        async def decide(total: int) -> list[Event]:
            await asyncio.sleep(0)
            return one_more(total)

        assert await store.update(order, decide, summed, 0) == Appended(0, 0)

    async def test_many_at_once_each_decides_on_the_state_before_its_own(
        self, store: Store, order: Aggregate
    ) -> None:
        updates = [store.update(order, one_more, summed, 0, tries=1000) for _ in range(16)]
        await asyncio.gather(*updates)
        total = 0
        for event in await store.events.read(order):
            assert event.data["n"] == total + 1
            total += event.data["n"]

    async def test_what_was_missed_comes_with_the_conflict(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        seen: list[int] = []
        applied: list[int] = []

        def apply(total: int, event: RecordedEvent) -> int:
            applied.append(event.sequence)
            return summed(total, event)

        async def decide(total: int) -> list[Event]:
            seen.append(total)
            if len(seen) == 1:
                await store.events.append(order, numbered(150, 3), expected=3)
            return one_more(total)

        assert await store.update(order, decide, apply, 0) == Appended(153, 153)
        assert seen == [3, sum(range(153))]
        assert applied == list(range(153))  # each once: only what is new was read

    async def test_gives_up_after_some_tries(self, store: Store, order: Aggregate) -> None:
        asked = []

        async def decide(total: int) -> list[Event]:
            asked.append(total)
            place = await store.events.next_sequence(order)
            await store.events.append(order, numbered(1, 1), expected=place)
            return one_more(total)

        with pytest.raises(SequenceConflict) as caught:
            await store.update(order, decide, summed, 0, tries=3)
        assert asked == [0, 1, 2]
        assert (caught.value.expected, caught.value.actual) == (2, 3)
        assert sequences(pickle.loads(pickle.dumps(caught.value)).missed) == [2]  # noqa: S301

    async def test_what_decide_raises_ends_it(self, store: Store, order: Aggregate) -> None:
        def decide(_: int) -> list[Event]:
            raise LookupError("out of stock")

        with pytest.raises(LookupError, match="out of stock"):
            await store.update(order, decide, summed, 0)
        assert await store.events.next_sequence(order) == 0

    async def test_an_aggregate_that_was_deleted_meanwhile_is_begun_anew(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3, 1), expected=NEW)
        seen = []

        async def decide(total: int) -> list[Event]:
            seen.append(total)
            if len(seen) == 1:
                await store.events.delete(order)
            return one_more(total)

        assert await store.update(order, decide, summed, 0) == Appended(0, 0)
        assert seen == [6, 0]

    async def test_an_aggregate_that_was_begun_anew_meanwhile_is_read_anew(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3, 1), expected=NEW)
        seen = []

        async def decide(total: int) -> list[Event]:
            seen.append(total)
            if len(seen) == 1:
                await store.events.delete(order)
                await store.events.append(order, numbered(5, 100), expected=NEW)
            return one_more(total)

        assert await store.update(order, decide, summed, 0) == Appended(5, 5)
        assert seen == [6, 510]

    async def test_an_edition_that_diverged_meanwhile_is_read_anew(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(5, 1), expected=NEW)
        branch = order.on("what-if")
        seen = []

        async def decide(total: int) -> list[Event]:
            seen.append(total)
            if len(seen) == 1:
                events = [Event("Counted", {"n": 100}) for _ in range(6)]
                await store.events.append(branch, events, expected=1)
            return one_more(total)

        assert await store.update(branch, decide, summed, 0) == Appended(7, 7)
        assert seen == [15, 601]

    async def test_traces_are_passed_on(self, store: Store, order: Aggregate) -> None:
        source = Source("carts", "1", "main", 3)
        traces = {"idempotency_key": "k", "correlation_id": "c", "source": source}
        done = await store.update(order, one_more, summed, 0, **traces)  # type: ignore[arg-type]
        again = await store.update(order, one_more, summed, 0, **traces)  # type: ignore[arg-type]
        assert (done, again) == (Appended(0, 0), Appended(0, 0, duplicate=True))
        (event,) = await store.events.find_source(order, source)
        assert (event.correlation_id, event.idempotency_key) == ("c", "k")

    async def test_a_crowd_with_the_usual_tries(self, store: Store, order: Aggregate) -> None:
        def decide(total: int) -> list[Event]:
            return [Event("Counted", {"n": 1, "before": total})]

        await asyncio.gather(*(store.update(order, decide, summed, 0) for _ in range(128)))
        events = await store.events.read(order)
        assert [event.data["before"] for event in events] == list(range(128))

    async def test_a_key_that_was_used_is_not_decided_on_again(
        self, store: Store, order: Aggregate
    ) -> None:
        def take(stock: int) -> list[Event]:
            if stock == 0:
                raise LookupError("sold out")
            return [Event("Counted", {"n": -1}), Event("Counted", {"n": 0})]

        await store.events.append(order, [Event("Counted", {"n": 1})], expected=NEW)
        done = await store.update(order, take, summed, 0, idempotency_key="k")
        again = await store.update(order, take, summed, 0, idempotency_key="k")
        assert (done, again) == (Appended(1, 2), Appended(1, 2, duplicate=True))
        with pytest.raises(LookupError):
            await store.update(order, take, summed, 0, idempotency_key="k2")

    @pytest.mark.parametrize(
        "decision", [None, 5, Event("A", 1), [1]], ids=lambda value: type(value).__name__
    )
    async def test_a_decision_that_is_none(
        self, store: Store, order: Aggregate, decision: Any
    ) -> None:
        with pytest.raises(InvalidType, match=r"decide|events"):
            await store.update(order, lambda _: decision, summed, 0)
        assert await store.events.next_sequence(order) == 0

    async def test_bad_options(self, store: Store, order: Aggregate) -> None:
        for tries, error in ((0, InvalidValue), (1.5, InvalidType)):
            with pytest.raises(error, match="tries"):
                await store.update(order, one_more, summed, 0, tries=tries)  # type: ignore[arg-type]
        with pytest.raises(InvalidType, match="decide"):
            await store.update(order, [], summed, 0)  # type: ignore[arg-type]
        with pytest.raises(InvalidType, match="correlation_id"):
            await store.update(order, one_more, summed, 0, correlation_id=5)  # type: ignore[arg-type]


async def test_broken_missed_events_are_an_error_of_their_own(
    server: Server, store: Store, order: Aggregate
) -> None:
    await store.events.append(order, numbered(3), expected=NEW)
    key = f"{store.settings.key_prefix}events:orders:main:{{{order.root}}}"
    rewrite_member(server, key, 1, lambda member: b"no event" + member)
    with pytest.raises(asyncstore.CorruptEvent) as caught:
        await store.events.append(order, numbered(1), expected=0, missed=True)
    assert (caught.value.key, caught.value.sequence) == (key, 1)
