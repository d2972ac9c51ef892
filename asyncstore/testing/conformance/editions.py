"""What every server must do with editions.

An event's data say whose it is and where it stands, such as "main 0" or "what-if 3".
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from typing import TYPE_CHECKING, TypedDict, Unpack

import pytest

from asyncstore import (
    ANY,
    MAIN,
    NEW,
    Aggregate,
    Appended,
    BranchExists,
    CorruptEvent,
    Event,
    InvalidValue,
    ProtectedEdition,
    RecordedEvent,
    Retention,
    SequenceConflict,
    Store,
)
from asyncstore.testing.builders import listed
from asyncstore.testing.conformance import needs

if TYPE_CHECKING:
    from collections.abc import Iterable

PERSIST, TRANSIENT = Retention.PERSIST, Retention.TRANSIENT

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)

BEYOND = 2**53 - 1

KILOBYTE = 1000

pytestmark = needs("editions")


class Part(TypedDict, total=False):
    start: int
    stop: int | None
    limit: int | None
    reverse: bool


class Asked(Part, total=False):
    until: datetime | None
    diverge_at: int | None


@pytest.fixture
def branch(order: Aggregate) -> Aggregate:
    return order.on("what-if")


async def tell(store: Store, place: Aggregate, first: int, count: int, padding: int = 0) -> None:
    """Append events to an aggregate, which must end where the first of them shall stand."""
    names = [f"{place.edition} {n}" for n in range(first, first + count)]
    metadata = {"padding": "x" * padding}
    events = [Event("Told", name, metadata=metadata) for name in names]
    done = await store.events.append(place, events, expected=first)
    assert done == Appended(first, first + count - 1)


def names(events: Iterable[RecordedEvent]) -> list[str]:
    """Return the events' data; each must stand where its own data say."""
    told = [(event.sequence, event.data) for event in events]
    assert all(name.endswith(f" {sequence}") for sequence, name in told)
    return [name for _, name in told]


def timeline(diverges_at: int, own: int = 0, edition: str = "what-if") -> list[str]:
    """Return main before the divergence, and that many events of the edition from there on."""
    shared = [f"main {n}" for n in range(diverges_at)]
    return shared + [f"{edition} {n}" for n in range(diverges_at, diverges_at + own)]


async def heard(store: Store, place: Aggregate, **asked: Unpack[Asked]) -> list[str]:
    """Return what is read, which must be what is streamed, of the aggregate that is asked for."""
    events = await store.events.read(place, **asked)
    assert events == await listed(store.events.stream(place, **asked))
    assert {event.aggregate for event in events} <= {place}
    return names(events)


async def at(store: Store, place: Aggregate, sequence: int | None = None) -> int | None:
    snapshot = await store.snapshots.get(place, at=sequence)
    return None if snapshot is None else snapshot.sequence


async def loaded(store: Store, place: Aggregate) -> tuple[int | None, list[str], int]:
    """Return the snapshot's sequence, the events after it, and the next sequence."""
    found = await store.load(place)
    assert {event.aggregate for event in found.events} <= {place}
    snapshot = None if found.snapshot is None else found.snapshot.sequence
    return snapshot, names(found.events), found.next_sequence


class TestRead:
    async def test_main_up_to_the_divergence_and_its_own_from_there(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        await tell(store, branch, 1, 2)
        events = await store.events.read(branch)
        assert names(events) == ["main 0", "what-if 1", "what-if 2"]
        assert [event.aggregate for event in events] == [branch] * 3
        shared = (await store.events.read(order))[0]
        assert (events[0].id, events[0].time) == (shared.id, shared.time)
        assert await heard(store, order) == timeline(3)
        await tell(store, order, 3, 7)
        assert await heard(store, branch) == timeline(1, 2)
        assert await heard(store, order) == timeline(10)
        assert await store.events.next_sequence(branch) == 3
        assert await store.events.next_sequence(order) == 10

    async def test_ranges_cross_the_divergence(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 3, 4)
        assert await heard(store, branch, start=3) == timeline(3, 4)[3:]
        assert await heard(store, branch, start=1, stop=4) == ["main 1", "main 2", "what-if 3"]
        assert await heard(store, branch, stop=3) == timeline(3)
        backwards = await heard(store, branch, stop=5, reverse=True, limit=3)
        assert backwards == ["what-if 4", "what-if 3", "main 2"]
        assert await heard(store, branch, start=7) == []
        assert await heard(store, branch, start=BEYOND) == []

    @pytest.mark.parametrize(("diverges_at", "own"), [(0, 3), (1, 1), (3, 4), (3, 1), (5, 2)])
    async def test_every_range_is_that_of_one_list(
        self, store: Store, order: Aggregate, branch: Aggregate, diverges_at: int, own: int
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, diverges_at, own)
        whole = timeline(diverges_at, own)
        assert await heard(store, branch) == whole
        assert await heard(store, branch, start=0) == whole
        assert await heard(store, branch, start=0, stop=BEYOND) == whole

        async def check(asked: Part) -> None:
            part = whole[asked["start"] : asked["stop"]]
            ordered = part[::-1] if asked["reverse"] else part
            assert await heard(store, branch, **asked) == ordered[: asked["limit"]], asked

        for start in range(9):
            stops, limits = [None, *range(start, 10)], [None, 0, 1, 2, 3, 9]
            await asyncio.gather(
                *(
                    check(Part(start=start, stop=stop, limit=limit, reverse=reverse))
                    for stop, limit, reverse in product(stops, limits, (False, True))
                )
            )

    async def test_until_looks_at_all_of_it(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        mains, owns, diverges_at = [0, 20, 10, 5, 1, 2], [15, 3, 40, 12, 20], 4
        for place, first, minutes in ((order, 0, mains), (branch, diverges_at, owns)):
            events = [
                Event("Told", f"{place.edition} {n}", time=NOON + timedelta(minutes=minute))
                for n, minute in enumerate(minutes, first)
            ]
            await store.events.append(place, events, expected=first)
        story = timeline(diverges_at, len(owns))
        told = list(zip(story, mains[:diverges_at] + owns, strict=True))

        async def check(minute: int, asked: Part) -> None:
            zone = timezone(timedelta(hours=minute % 23 - 11))
            moment = (NOON + timedelta(minutes=minute)).astimezone(zone)
            found = [name for name, when in told[asked["start"] : asked["stop"]] if when <= minute]
            ordered = found[::-1] if asked["reverse"] else found
            read = await heard(store, branch, until=moment, **asked)
            assert read == ordered[: asked["limit"]], (minute, asked)

        for minute in (-1, 0, 1, 2, 3, 5, 10, 12, 14, 15, 20, 39, 40, 99):
            await asyncio.gather(
                *(
                    check(minute, Part(start=start, stop=stop, limit=limit, reverse=reverse))
                    for start in (0, 2, 4, 5)
                    for stop, limit, reverse in product(
                        (None, 5, 6, 8, 99), (None, 1, 2, 4), (False, True)
                    )
                )
            )

    async def test_until_is_exact_on_both_sides(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        late = datetime(9999, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
        await store.events.append(order, [Event("Told", "main 0", time=late)], expected=NEW)
        await store.events.append(branch, [Event("Told", "what-if 1", time=late)], expected=1)
        assert await heard(store, branch, until=late - timedelta(microseconds=1)) == []
        assert await heard(store, branch, until=late) == timeline(1, 1)

    async def test_pages_are_seamless_across_the_divergence(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 4000, KILOBYTE)
        await tell(store, branch, 2500, 3000, KILOBYTE)
        story = timeline(2500, 3000)
        assert await heard(store, branch) == story
        assert await heard(store, branch, reverse=True) == story[::-1]
        assert await heard(store, branch, start=700, stop=5000) == story[700:5000]
        backwards = await heard(store, branch, reverse=True, stop=5400, limit=4000)
        assert backwards == story[1400:5400][::-1]
        assert await heard(store, branch, start=1000, limit=3000) == story[1000:4000]
        everything = datetime.now(UTC) + timedelta(hours=1)
        assert await heard(store, branch, until=everything) == story
        assert await heard(store, branch, until=everything, reverse=True) == story[::-1]

    @pytest.mark.parametrize("diverges_at", range(3, 10))
    async def test_a_page_may_end_right_at_the_divergence(
        self, store: Store, order: Aggregate, branch: Aggregate, diverges_at: int
    ) -> None:
        # Half a megabyte each: wherever pages end, they meet the divergence in one of these.
        await tell(store, order, 0, diverges_at + 1, 500 * KILOBYTE)
        await tell(store, branch, diverges_at, 4, 500 * KILOBYTE)
        story = timeline(diverges_at, 4)
        assert await heard(store, branch) == story
        assert await heard(store, branch, reverse=True) == story[::-1]
        assert (await loaded(store, branch))[1] == story

    async def test_editions_do_not_see_each_other(self, store: Store, order: Aggregate) -> None:
        await tell(store, order, 0, 5)
        places = {"a": 0, "b": 2, "what-if": 2, "what-if-2": 4, "z.z": 5}
        for own, (edition, diverges_at) in enumerate(places.items(), 1):
            await tell(store, order.on(edition), diverges_at, own)
        await tell(store, order, 5, 2)
        for own, (edition, diverges_at) in enumerate(places.items(), 1):
            story = timeline(diverges_at, own, edition)
            assert await heard(store, order.on(edition)) == story
            assert await store.events.next_sequence(order.on(edition)) == len(story)
        assert await heard(store, order) == timeline(7)
        assert await heard(store, order.on("untouched")) == timeline(7)

    async def test_only_the_main_of_the_same_aggregate_is_shared(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        for other in (Aggregate("carts", order.root), Aggregate("orders", f"{order.root}:1")):
            await tell(store, other, 0, 3)
        assert await heard(store, branch) == []
        assert await store.events.next_sequence(branch) == 0

    async def test_a_read_meets_the_divergence_whole_or_not_at_all(
        self, store: Store, order: Aggregate
    ) -> None:
        await tell(store, order, 0, 20)

        async def look(place: Aggregate) -> list[str]:
            return names(await store.events.read(place))

        for n in range(20):
            place = order.on(f"edition-{n}")
            before = [look(place) for _ in range(n)]
            after = [look(place) for _ in range(20 - n)]
            *found, _ = await asyncio.gather(*before, *after, tell(store, place, n, 2))
            for story in found:
                assert story in (timeline(20), timeline(n, 2, place.edition))


class TestReadOnWhileItDiverges:
    async def test_a_stream_goes_on_as_it_began(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3000, KILOBYTE)
        stream = store.events.stream(branch)
        first = await anext(stream)
        await tell(store, branch, 1, 2)
        assert names([first, *await listed(stream)]) == timeline(3000)
        assert await heard(store, branch) == timeline(1, 2)

    async def test_backwards_too(self, store: Store, order: Aggregate, branch: Aggregate) -> None:
        await tell(store, order, 0, 3000, KILOBYTE)
        stream = store.events.stream(branch, reverse=True)
        first = await anext(stream)
        await store.events.branch(branch, at=1)
        assert names([first, *await listed(stream)]) == timeline(3000)[::-1]
        assert await heard(store, branch) == timeline(1)

    async def test_with_a_divergence_that_was_asked_for(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3000, KILOBYTE)
        stream = store.events.stream(branch, diverge_at=2500)
        first = await anext(stream)
        await tell(store, branch, 1, 3000)
        assert names([first, *await listed(stream)]) == timeline(2500)

    async def test_a_stream_of_a_branch_meets_its_own_new_events(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3000, KILOBYTE)
        await tell(store, branch, 2000, 1)
        stream = store.events.stream(branch)
        first = await anext(stream)
        await tell(store, branch, 2001, 4)
        await tell(store, order, 3000, 4)
        assert names([first, *await listed(stream)]) == timeline(2000, 5)

    async def test_a_load_of_many_pages_is_of_one_moment(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3000, KILOBYTE)
        found, _ = await asyncio.gather(loaded(store, branch), tell(store, branch, 1, 2))
        assert found in [(None, timeline(3000), 3000), (None, timeline(1, 2), 3)]
        assert await loaded(store, branch) == (None, timeline(1, 2), 3)


class TestNotDiverged:
    async def test_reads_as_main(self, store: Store, order: Aggregate, branch: Aggregate) -> None:
        assert await heard(store, branch) == []
        assert await store.events.next_sequence(branch) == 0
        await tell(store, order, 0, 4)
        assert await heard(store, branch) == timeline(4)
        assert await heard(store, branch, start=1, stop=3, reverse=True) == ["main 2", "main 1"]
        assert await store.events.next_sequence(branch) == 4
        await tell(store, order, 4, 2)
        assert await heard(store, branch) == timeline(6)
        assert await store.events.next_sequence(branch) == 6

    async def test_diverge_at_leaves_out_the_rest_of_main(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 6)
        assert await heard(store, branch, diverge_at=3) == timeline(3)
        assert await heard(store, branch, diverge_at=3, start=1, stop=5) == ["main 1", "main 2"]
        assert await heard(store, branch, diverge_at=3, reverse=True, limit=1) == ["main 2"]
        assert await heard(store, branch, diverge_at=3, start=3) == []
        assert await heard(store, branch, diverge_at=0) == []
        assert await heard(store, branch, diverge_at=6) == timeline(6)
        assert await heard(store, branch, diverge_at=99) == timeline(6)
        assert await heard(store, branch, diverge_at=BEYOND) == timeline(6)
        assert await heard(store, branch) == timeline(6)

    async def test_main_diverges_from_nothing(self, store: Store, order: Aggregate) -> None:
        with pytest.raises(InvalidValue, match="diverge_at"):
            await store.events.read(order, diverge_at=0)

    async def test_appending_nothing_is_no_divergence(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        assert await store.events.append(branch, [], expected=1) == Appended(3, 2)
        await tell(store, order, 3, 1)
        assert await heard(store, branch) == timeline(4)
        assert await listed(store.events.editions("orders")) == [MAIN]


class TestFirstAppend:
    @pytest.mark.parametrize("diverges_at", [0, 1, 2, 3])
    async def test_diverges_where_it_starts(
        self, store: Store, order: Aggregate, branch: Aggregate, diverges_at: int
    ) -> None:
        await tell(store, order, 0, 3)
        await tell(store, branch, diverges_at, 2)
        await tell(store, branch, diverges_at + 2, 1)
        await tell(store, order, 3, 3)
        assert await heard(store, branch) == timeline(diverges_at, 3)
        assert await store.events.next_sequence(branch) == diverges_at + 3

    async def test_at_0_it_is_wholly_its_own(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        done = await store.events.append(branch, [Event("Told", "what-if 0")], expected=NEW)
        assert done == Appended(0, 0)
        assert await heard(store, branch) == timeline(0, 1)
        assert await heard(store, order) == timeline(3)

    async def test_anywhere_is_the_end_of_main(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        for n in (3, 4):
            done = await store.events.append(branch, [Event("Told", f"what-if {n}")], expected=ANY)
            assert done == Appended(n, n)
        await tell(store, order, 3, 4)
        assert await heard(store, branch) == timeline(3, 2)

    @pytest.mark.parametrize("expected", [4, 5, BEYOND])
    async def test_beyond_main_is_a_conflict_and_leaves_nothing(
        self, store: Store, order: Aggregate, branch: Aggregate, expected: int
    ) -> None:
        await tell(store, order, 0, 3)
        with pytest.raises(SequenceConflict) as caught:
            await store.events.append(branch, [Event("Told", "lost")], expected=expected)
        error = caught.value
        assert (error.aggregate, error.expected, error.actual) == (branch, expected, 3)
        assert error.missed is None
        assert await listed(store.events.editions("orders")) == [MAIN]
        await tell(store, order, 3, 1)
        assert await heard(store, branch) == timeline(4)

    async def test_of_a_main_without_events(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        with pytest.raises(SequenceConflict) as caught:
            await store.events.append(branch, [Event("Told", "lost")], expected=1)
        assert (caught.value.expected, caught.value.actual) == (1, 0)
        await tell(store, branch, 0, 2)
        assert await heard(store, order) == []
        await tell(store, order, 0, 3)
        assert await heard(store, branch) == timeline(0, 2)
        await tell(store, branch, 2, 1)
        assert await heard(store, branch) == timeline(0, 3)
        assert await heard(store, order) == timeline(3)

    @pytest.mark.parametrize("expected", [0, 1, 2, 4, 9])
    async def test_later_ones_are_held_to_the_end_of_the_branch(
        self, store: Store, order: Aggregate, branch: Aggregate, expected: int
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 1, 2)
        with pytest.raises(SequenceConflict) as caught:
            await store.events.append(branch, [Event("Told", "lost")], expected=expected)
        assert (caught.value.expected, caught.value.actual) == (expected, 3)
        assert await heard(store, branch) == timeline(1, 2)

    async def test_writers_at_one_place_one_wins(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        outcomes = await asyncio.gather(
            *(store.events.append(branch, [Event("Claimed", n)], expected=2) for n in range(16)),
            return_exceptions=True,
        )
        won = [n for n, outcome in enumerate(outcomes) if outcome == Appended(2, 2)]
        assert len(won) == 1
        conflicts = [outcome for outcome in outcomes if isinstance(outcome, SequenceConflict)]
        assert [conflict.actual for conflict in conflicts] == [3] * 15
        assert [event.data for event in await store.events.read(branch, start=2)] == won

    async def test_one_group_has_branches_of_many_aggregates(self, store: Store) -> None:
        places = [Aggregate("orders", f"{n}") for n in range(40)]
        await asyncio.gather(*(tell(store, place, 0, n % 7) for n, place in enumerate(places) if n))
        branches = [place.on("what-if") for place in places]
        await asyncio.gather(
            *(tell(store, place, n % 7 // 2, 2) for n, place in enumerate(branches))
        )
        for n, place in enumerate(branches):
            assert await heard(store, place) == timeline(n % 7 // 2, 2)


class TestBranch:
    @pytest.mark.parametrize("diverges_at", [0, 2, 5])
    async def test_the_next_sequence_is_where_it_diverges(
        self, store: Store, order: Aggregate, branch: Aggregate, diverges_at: int
    ) -> None:
        await tell(store, order, 0, 5)
        await store.events.branch(branch, at=diverges_at)
        assert await store.events.next_sequence(branch) == diverges_at
        await tell(store, order, 5, 3)
        assert await heard(store, branch) == timeline(diverges_at)
        assert await store.events.next_sequence(branch) == diverges_at
        assert await loaded(store, branch) == (None, timeline(diverges_at), diverges_at)
        await tell(store, branch, diverges_at, 2)
        assert await heard(store, branch) == timeline(diverges_at, 2)
        assert await heard(store, order) == timeline(8)

    async def test_the_first_append_must_be_there(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await store.events.branch(branch, at=3)
        for expected in (0, 2, 4, 5):
            with pytest.raises(SequenceConflict) as caught:
                await store.events.append(branch, [Event("Told", "lost")], expected=expected)
            assert (caught.value.expected, caught.value.actual) == (expected, 3)
        done = await store.events.append(branch, [Event("Told", "what-if 3")], expected=ANY)
        assert done == Appended(3, 3)
        assert await heard(store, branch) == timeline(3, 1)

    @pytest.mark.parametrize("how", ["event", "branch point", "both"])
    @pytest.mark.parametrize("place", [0, 2, 3, 99])
    async def test_only_once(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str, place: int
    ) -> None:
        await tell(store, order, 0, 5)
        if how != "event":
            await store.events.branch(branch, at=2)
        if how != "branch point":
            await tell(store, branch, 2, 1)
        before = await heard(store, branch)
        with pytest.raises(BranchExists) as caught:
            await store.events.branch(branch, at=place)
        error = caught.value
        assert (error.aggregate, error.at, error.diverged_at) == (branch, place, 2)
        assert await heard(store, branch) == before

    async def test_beyond_main_is_a_conflict_and_leaves_nothing(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        for place in (4, BEYOND):
            with pytest.raises(SequenceConflict) as caught:
                await store.events.branch(branch, at=place)
            error = caught.value
            assert (error.aggregate, error.expected, error.actual) == (branch, place, 3)
        assert await listed(store.events.editions("orders")) == [MAIN]
        assert await heard(store, branch) == timeline(3)

    async def test_of_a_main_without_events(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        with pytest.raises(SequenceConflict) as caught:
            await store.events.branch(branch, at=1)
        assert (caught.value.expected, caught.value.actual) == (1, 0)
        await store.events.branch(branch, at=0)
        await tell(store, order, 0, 2)
        assert await heard(store, branch) == []
        assert await store.events.next_sequence(branch) == 0
        await tell(store, branch, 0, 1)
        assert await heard(store, branch) == timeline(0, 1)

    async def test_main_can_not_diverge(self, store: Store, order: Aggregate) -> None:
        with pytest.raises(ProtectedEdition) as caught:
            await store.events.branch(order, at=0)
        assert caught.value.edition == MAIN

    async def test_a_read_that_contradicts_it_is_refused(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        other = order.on("other")
        await tell(store, branch, 2, 2)
        await store.events.branch(other, at=2)
        for place in (branch, other):
            for diverge_at in (0, 1, 3, BEYOND):
                with pytest.raises(BranchExists) as caught:
                    await store.events.read(place, diverge_at=diverge_at)
                error = caught.value
                assert (error.aggregate, error.at, error.diverged_at) == (place, diverge_at, 2)
                with pytest.raises(BranchExists):
                    await listed(store.events.stream(place, diverge_at=diverge_at))
            assert await heard(store, place, diverge_at=2) == await heard(store, place)
        assert await heard(store, branch, diverge_at=2) == timeline(2, 2)

    async def test_where_it_diverged_can_be_asked(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        other = order.on("other")
        found = [await store.events.divergence(place) for place in (order, branch, other)]
        assert found == [None, None, None]
        await tell(store, branch, 2, 3)
        await store.events.branch(other, at=0)
        found = [await store.events.divergence(place) for place in (order, branch, other)]
        assert found == [None, 2, 0]
        await store.events.delete(branch)
        assert await store.events.divergence(branch) is None

    async def test_of_many_at_once_one_succeeds(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 9)
        outcomes = await asyncio.gather(
            *(store.events.branch(branch, at=place) for place in (4, 2, 9, 0, 7)),
            return_exceptions=True,
        )
        assert outcomes.count(None) == 1
        diverged_at = await store.events.next_sequence(branch)
        assert [4, 2, 9, 0, 7][outcomes.index(None)] == diverged_at
        refused = [outcome for outcome in outcomes if isinstance(outcome, BranchExists)]
        assert [error.diverged_at for error in refused] == [diverged_at] * 4
        assert await heard(store, branch) == timeline(diverged_at)


class TestListing:
    async def test_each_edition_has_its_own_roots(self, store: Store) -> None:
        first, second = Aggregate("orders", "1"), Aggregate("orders", "2")
        await tell(store, first, 0, 2)
        await tell(store, second, 0, 2)
        await tell(store, first.on("what-if"), 1, 1)
        await store.events.branch(second.on("branched"), at=2)
        await tell(store, Aggregate("carts", "*", "what-if"), 0, 1)
        assert await listed(store.events.domains()) == ["carts", "orders"]
        editions = await listed(store.events.editions("orders"))
        assert editions == ["branched", MAIN, "what-if"]
        assert await listed(store.events.editions("carts")) == ["what-if"]
        assert sorted(await listed(store.events.roots("orders"))) == ["1", "2"]
        assert await listed(store.events.roots("orders", edition="what-if")) == ["1"]
        assert await listed(store.events.roots("orders", edition="branched")) == ["2"]
        assert await listed(store.events.roots("orders", edition="unknown")) == []
        assert await listed(store.events.roots("carts")) == []
        assert await listed(store.events.roots("carts", edition="what-if")) == ["*"]

    async def test_positions_and_snapshots_list_nothing(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 2)
        await store.positions.put("projector", branch, 1)
        await store.snapshots.put(branch, sequence=1, state=1)
        assert await listed(store.events.editions("orders")) == [MAIN]
        assert await listed(store.events.roots("orders", edition="what-if")) == []


@needs("snapshots")
class TestLoad:
    @pytest.mark.parametrize("snapshot_at", [0, 1, 2, 3, 4, 6, 50])
    @pytest.mark.parametrize("own", [0, 2])
    async def test_a_snapshot_of_main_is_used_if_it_is_from_before_the_divergence(
        self, store: Store, order: Aggregate, branch: Aggregate, snapshot_at: int, own: int
    ) -> None:
        await tell(store, order, 0, 7)
        await store.snapshots.put(order, sequence=snapshot_at, state=f"as of {snapshot_at}")
        await store.events.branch(branch, at=3)
        await store.events.append(
            branch, [Event("Told", f"what-if {n}") for n in range(3, 3 + own)], expected=3
        )
        story = timeline(3, own)
        found = await store.load(branch)
        if snapshot_at < 3:
            assert found.snapshot == await store.snapshots.get(order)
            story = story[snapshot_at + 1 :]
        else:
            assert found.snapshot is None
        assert (names(found.events), found.next_sequence) == (story, 3 + own)
        assert await store.snapshots.get(branch) is None

    @pytest.mark.parametrize("retention", [PERSIST, Retention.DEFAULT])
    async def test_an_older_one_of_main_where_the_newest_is_too_late(
        self, store: Store, order: Aggregate, branch: Aggregate, retention: Retention
    ) -> None:
        await tell(store, order, 0, 10)
        for sequence in (2, 4, 8):
            await store.snapshots.put(order, sequence=sequence, state=sequence, retention=retention)
        for diverges_at, used in ((9, 8), (8, 4), (5, 4), (4, 2), (3, 2), (2, None), (0, None)):
            place = order.on(f"from-{diverges_at}")
            await tell(store, place, diverges_at, 2)
            after = 0 if used is None else used + 1
            story = timeline(diverges_at, 2, place.edition)[after:]
            assert await loaded(store, place) == (used, story, diverges_at + 2)

    async def test_kept_and_recent_ones_of_main_are_one_row(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 10)
        for sequence, retention in ((1, PERSIST), (3, Retention.DEFAULT), (5, PERSIST), (9, None)):
            chosen = retention or Retention.DEFAULT
            await store.snapshots.put(order, sequence=sequence, state=None, retention=chosen)
        for diverges_at, used in ((2, 1), (4, 3), (6, 5), (9, 5), (10, 9)):
            place = order.on(f"from-{diverges_at}")
            await store.events.branch(place, at=diverges_at)
            assert (await loaded(store, place))[0] == used

    async def test_its_own_one_is_preferred(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 6)
        await store.snapshots.put(order, sequence=3, state="main")
        await tell(store, branch, 4, 4)
        await store.snapshots.put(branch, sequence=5, state="what-if")
        await store.snapshots.put(order, sequence=5, state="main, later")
        found = await store.load(branch)
        assert found.snapshot is not None
        assert found.snapshot.state == "what-if"
        assert names(found.events) == ["what-if 6", "what-if 7"]
        await store.snapshots.delete(branch)
        assert await loaded(store, branch) == (3, timeline(4, 4)[4:], 8)

    async def test_not_diverged_it_takes_the_newest_of_main(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        assert await loaded(store, branch) == (None, [], 0)
        await tell(store, order, 0, 6)
        assert await loaded(store, branch) == (None, timeline(6), 6)
        await store.snapshots.put(order, sequence=2, state=None)
        await store.snapshots.put(order, sequence=4, state=None)
        assert await loaded(store, branch) == (4, ["main 5"], 6)
        await store.snapshots.put(branch, sequence=3, state=None)
        assert await loaded(store, branch) == (3, ["main 4", "main 5"], 6)
        assert await loaded(store, order) == (4, ["main 5"], 6)

    async def test_main_takes_none_of_a_branch(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 6)
        await tell(store, branch, 4, 1)
        for sequence in (1, 4):
            await store.snapshots.put(branch, sequence=sequence, state=None)
        assert await loaded(store, order) == (None, timeline(6), 6)
        assert (await loaded(store, order.on("other")))[0] is None

    async def test_another_schema_version_of_main_is_passed_over(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 6)
        await store.snapshots.put(order, sequence=2, state=None, schema_version=1)
        await tell(store, branch, 4, 2)
        found = await store.load(branch, schema_version=2)
        assert (found.snapshot, names(found.events)) == (None, timeline(4, 2))
        found = await store.load(branch, schema_version=1)
        assert found.snapshot is not None
        assert names(found.events) == timeline(4, 2)[3:]

    async def test_many_pages(self, store: Store, order: Aggregate, branch: Aggregate) -> None:
        await tell(store, order, 0, 4000, KILOBYTE)
        await tell(store, branch, 2500, 3000, KILOBYTE)
        assert await loaded(store, branch) == (None, timeline(2500, 3000), 5500)
        await store.snapshots.put(order, sequence=99, state=None)
        assert await loaded(store, branch) == (99, timeline(2500, 3000)[100:], 5500)
        await store.snapshots.put(branch, sequence=2600, state=None)
        assert await loaded(store, branch) == (2600, timeline(2500, 3000)[2601:], 5500)


async def diverge(store: Store, branch: Aggregate, how: str, diverges_at: int) -> None:
    if how == "append":
        await tell(store, branch, diverges_at, 1)
    else:
        await store.events.branch(branch, at=diverges_at)


@needs("snapshots")
@pytest.mark.parametrize("how", ["append", "branch"])
class TestSnapshotsFromBeforeItDiverged:
    async def test_those_beyond_the_divergence_go(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 12)
        for sequence, retention in ((2, PERSIST), (4, PERSIST), (7, PERSIST), (9, PERSIST)):
            await store.snapshots.put(branch, sequence=sequence, state=None, retention=retention)
        await store.snapshots.put(branch, sequence=10, state=None)
        await store.snapshots.put(branch, sequence=11, state=None)
        await diverge(store, branch, how, 5)
        answers = [await at(store, branch, sequence) for sequence in (None, 99, 7, 4, 3, 2, 1)]
        assert answers == [4, 4, 4, 4, 2, 2, None]
        assert (await loaded(store, branch))[0] == 4

    @pytest.mark.parametrize(
        ("diverges_at", "left"), [(3, 2), (2, None), (0, None), (10, 9), (9, 2)]
    )
    async def test_the_one_right_before_it_stays(
        self,
        store: Store,
        order: Aggregate,
        branch: Aggregate,
        how: str,
        diverges_at: int,
        left: int | None,
    ) -> None:
        await tell(store, order, 0, 10)
        for sequence in (2, 9):
            await store.snapshots.put(branch, sequence=sequence, state=None)
        await diverge(store, branch, how, diverges_at)
        assert await at(store, branch) == left
        assert await at(store, branch, BEYOND) == left
        assert (await loaded(store, branch))[0] == left

    @pytest.mark.parametrize("retention", [PERSIST, Retention.DEFAULT])
    async def test_what_stays_is_unchanged(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str, retention: Retention
    ) -> None:
        await tell(store, order, 0, 10)
        await store.snapshots.put(
            branch, sequence=2, state=b"\n\x00[]\xff\n", retention=retention, schema_version=7
        )
        before = await store.snapshots.get(branch)
        await store.snapshots.put(branch, sequence=8, state=None)
        await diverge(store, branch, how, 5)
        assert await store.snapshots.get(branch) == before
        assert await store.snapshots.get(branch, at=2) == before

    async def test_what_stays_is_kept_as_long_as_was_said(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 10)
        for sequence, retention in ((1, PERSIST), (3, Retention.DEFAULT), (8, Retention.DEFAULT)):
            await store.snapshots.put(branch, sequence=sequence, state=None, retention=retention)
        await diverge(store, branch, how, 5)
        await store.snapshots.put(branch, sequence=6, state=None)
        assert [await at(store, branch, sequence) for sequence in (2, 5, 9)] == [1, 3, 6]
        for sequence in range(7, 12):
            await store.snapshots.put(branch, sequence=sequence, state=None)
        assert [await at(store, branch, sequence) for sequence in (2, 5, 99)] == [1, 1, 11]

    @pytest.mark.parametrize(
        ("first", "second"), [(PERSIST, Retention.DEFAULT), (Retention.DEFAULT, PERSIST)]
    )
    async def test_the_latest_of_what_stays_is_the_newest(
        self,
        store: Store,
        order: Aggregate,
        branch: Aggregate,
        how: str,
        first: Retention,
        second: Retention,
    ) -> None:
        await tell(store, order, 0, 10)
        for sequence, retention in ((1, first), (3, second), (8, Retention.DEFAULT)):
            await store.snapshots.put(branch, sequence=sequence, state=None, retention=retention)
        await diverge(store, branch, how, 5)
        assert [await at(store, branch, sequence) for sequence in (None, 4, 2)] == [3, 3, 1]
        assert (await loaded(store, branch))[0] == 3

    async def test_the_latest_of_what_stays_is_there_once(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 10)
        await store.snapshots.put(branch, sequence=2, state="old", retention=PERSIST)
        await store.snapshots.put(branch, sequence=8, state=None)
        await diverge(store, branch, how, 5)
        await store.snapshots.put(branch, sequence=2, state="new", retention=TRANSIENT)
        await store.snapshots.put(branch, sequence=6, state=None)
        assert await at(store, branch, 5) is None

    async def test_an_older_one_that_comes_late_is_no_newest(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 10)
        for sequence in (3, 8):
            await store.snapshots.put(branch, sequence=sequence, state=None)
        await diverge(store, branch, how, 5)
        await store.snapshots.put(branch, sequence=2, state=None)
        assert await at(store, branch) == 3
        assert (await loaded(store, branch))[0] == 3
        assert await at(store, branch, 2) == 2

    async def test_those_of_main_and_of_other_editions_stay(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 10)
        for place in (order, branch, order.on("other")):
            await store.snapshots.put(place, sequence=7, state=None, retention=PERSIST)
            await store.snapshots.put(place, sequence=9, state=None)
        await diverge(store, branch, how, 5)
        for place in (order, order.on("other")):
            assert [await at(store, place, n) for n in (None, 8)] == [9, 7]
        assert await at(store, branch) is None

    async def test_later_ones_may_stand_anywhere(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 10)
        await diverge(store, branch, how, 5)
        for sequence in (4, 5, 9):
            await store.snapshots.put(branch, sequence=sequence, state=None)
        await store.events.append(branch, [Event("Told", "more")] * 3, expected=ANY)
        assert [await at(store, branch, n) for n in (None, 8, 4)] == [9, 5, 4]

    async def test_a_refused_divergence_takes_none(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 3)
        await store.snapshots.put(branch, sequence=9, state=None)
        with pytest.raises(SequenceConflict):
            await diverge(store, branch, how, 4)
        assert await at(store, branch) == 9

    async def test_as_of_is_the_event_of_the_branch(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 10)
        await diverge(store, branch, how, 5)
        await store.events.append(branch, [Event("Told", "more")] * 2, expected=ANY)
        mains, owns = await store.events.read(order), await store.events.read(branch)

        async def put(event: RecordedEvent) -> bool:
            return await store.snapshots.put(
                branch, sequence=event.sequence, state=None, as_of=event.id
            )

        assert [await put(event) for event in owns] == [True] * len(owns)
        assert [await put(event) for event in mains] == [True] * 5 + [False] * 5


@needs("positions")
@pytest.mark.parametrize("how", ["append", "branch"])
class TestPositionsFromBeforeItDiverged:
    @pytest.mark.parametrize(
        ("position", "diverges_at", "stands"),
        [(5, 3, 2), (3, 3, 2), (2, 3, 2), (1, 3, 1), (0, 3, 0), (5, 1, 0), (5, 0, None)],
    )
    async def test_stand_before_the_divergence_at_most(
        self,
        store: Store,
        order: Aggregate,
        branch: Aggregate,
        how: str,
        position: int,
        diverges_at: int,
        stands: int | None,
    ) -> None:
        await tell(store, order, 0, 6)
        await store.positions.put("put", branch, position)
        assert await store.positions.advance("advanced", branch, position) is True
        assert await store.positions.get("put", branch) == position
        await diverge(store, branch, how, diverges_at)
        assert await store.positions.get("put", branch) == stands
        assert await store.positions.get("advanced", branch) == stands

    async def test_advance_starts_from_there(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 6)
        await store.positions.put("projector", branch, 5)
        await diverge(store, branch, how, 3)
        assert await store.positions.advance("projector", branch, 2) is False
        assert await store.positions.get("projector", branch) == 2
        assert await store.positions.advance("projector", branch, 3) is True
        assert await store.positions.get("projector", branch) == 3
        assert await store.positions.advance("projector", branch, 3) is False

    async def test_at_0_nothing_was_processed(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 6)
        await store.positions.put("projector", branch, 5)
        await diverge(store, branch, how, 0)
        assert await store.positions.get("projector", branch) is None
        assert await store.positions.advance("projector", branch, 0) is True
        assert await store.positions.get("projector", branch) == 0

    async def test_later_ones_are_what_they_are(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 6)
        await store.positions.put("projector", branch, 5)
        await diverge(store, branch, how, 3)
        for sequence in (100, 7, 3, 1, 5):
            await store.positions.put("projector", branch, sequence)
            assert await store.positions.get("projector", branch) == sequence
        await store.events.append(branch, [Event("Told", "more")] * 9, expected=ANY)
        assert await store.positions.get("projector", branch) == 5

    async def test_apart_by_edition(
        self, store: Store, order: Aggregate, branch: Aggregate, how: str
    ) -> None:
        await tell(store, order, 0, 6)
        places = [order, branch, order.on("other"), Aggregate("carts", order.root, "what-if")]
        for sequence, place in enumerate(places, 5):
            await store.positions.put("projector", place, sequence)
        await diverge(store, branch, how, 3)
        found = [await store.positions.get("projector", place) for place in places]
        assert found == [5, 2, 7, 8]
        assert await store.positions.get("projector", order.on("unknown")) is None
        assert await store.positions.get("another", branch) is None


async def missed(store: Store, place: Aggregate, expected: int, actual: int) -> list[RecordedEvent]:
    with pytest.raises(SequenceConflict) as caught:
        await store.events.append(place, [Event("Told", "lost")], expected=expected, missed=True)
    assert (caught.value.expected, caught.value.actual) == (expected, actual)
    assert caught.value.missed is not None
    return caught.value.missed


class TestMissed:
    async def test_on_main(self, store: Store, order: Aggregate) -> None:
        await tell(store, order, 0, 250)
        for expected in (0, 100, 150, 249):
            events = await missed(store, order, expected, 250)
            assert events == await store.events.read(order, start=expected)
            assert len(events) == 250 - expected
        assert await missed(store, order, 251, 250) == []

    async def test_across_the_divergence(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 3, 3)
        for expected in range(6):
            events = await missed(store, branch, expected, 6)
            assert events == await store.events.read(branch, start=expected)
            assert names(events) == timeline(3, 3)[expected:]
        assert await missed(store, branch, 7, 6) == []
        assert await missed(store, branch, BEYOND, 6) == []

    async def test_with_a_branch_point_only(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await store.events.branch(branch, at=3)
        assert names(await missed(store, branch, 1, 3)) == ["main 1", "main 2"]
        assert await missed(store, branch, 4, 3) == []

    async def test_not_diverged_there_is_only_beyond_the_end(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        assert await missed(store, branch, 1, 0) == []
        await tell(store, order, 0, 5)
        assert await missed(store, branch, 6, 5) == []

    async def test_more_than_a_conflict_brings(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 400)
        await tell(store, branch, 150, 300)
        for expected in (0, 49, 50, 51, 149, 150, 151, 349, 350, 449):
            events = await missed(store, branch, expected, 450)
            assert names(events) == timeline(150, 300)[expected:]
            assert {event.aggregate for event in events} == {branch}

    async def test_more_than_a_megabyte(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 10, 300 * KILOBYTE)
        await tell(store, branch, 6, 6, 300 * KILOBYTE)
        assert names(await missed(store, branch, 1, 12)) == timeline(6, 6)[1:]

    async def test_only_if_it_is_asked_for(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 3, 3)
        with pytest.raises(SequenceConflict) as caught:
            await store.events.append(branch, [Event("Told", "lost")], expected=1)
        assert caught.value.missed is None


async def attach(store: Store, place: Aggregate) -> None:
    await store.positions.put("projector", place, 1)
    for sequence in (0, 1, 2, 3):
        await store.snapshots.put(place, sequence=sequence, state=None, retention=PERSIST)


async def is_attached(store: Store, place: Aggregate) -> bool:
    """Whether the aggregate has what `attach` has put; one that has a part of it is an error."""
    found = [
        await store.positions.get("projector", place) == 1,
        await at(store, place) == 3,
        await at(store, place, 1) == 1,
    ]
    assert len(set(found)) == 1
    return found[0]


class TestDelete:
    async def test_then_it_may_diverge_elsewhere(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 1, 2)
        await store.events.delete(branch)
        await tell(store, branch, 4, 2)
        assert await heard(store, branch) == timeline(4, 2)

    async def test_of_main_is_no_silent_gap_backwards_either(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 2, 2)
        await store.events.delete(order)
        with pytest.raises(CorruptEvent, match="missing"):
            await store.events.read(branch, reverse=True)


class TestDeleteEdition:
    async def test_the_last_one_takes_its_domain_along(self, store: Store) -> None:
        await tell(store, Aggregate("orders", "1", "what-if"), 0, 1)
        await tell(store, Aggregate("carts", "1", "what-if"), 0, 1)
        assert await store.events.delete_edition("orders", "what-if") == 1
        assert await listed(store.events.domains()) == ["carts"]

    async def test_main_is_refused(self, store: Store, order: Aggregate) -> None:
        await tell(store, order, 0, 5)
        with pytest.raises(ProtectedEdition) as caught:
            await store.events.delete_edition("orders", MAIN)
        assert caught.value.edition == MAIN
        assert await heard(store, order) == timeline(5)

    async def test_unknown_is_fine(self, store: Store, order: Aggregate) -> None:
        await tell(store, order, 0, 5)
        assert await store.events.delete_edition("orders", "unknown") == 0
        assert await store.events.delete_edition("unknown", "what-if") == 0
        assert await heard(store, order) == timeline(5)

    async def test_begins_anew_from_main(
        self, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 2, 4)
        assert await store.events.delete_edition("orders", "what-if") == 4
        await tell(store, branch, 5, 1)
        assert await heard(store, branch) == timeline(5, 1)
        assert await listed(store.events.editions("orders")) == [MAIN, "what-if"]
