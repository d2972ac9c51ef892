"""What every server must do with editions. Runs on each server of the matrix.

An event's data say whose it is and where it stands, such as "main 0" or "what-if 3".
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest

import asyncstore
from asyncstore import (
    MAIN,
    Aggregate,
    Appended,
    CorruptEvent,
    Event,
    SequenceConflict,
    Store,
)
from asyncstore.keys import Keys
from asyncstore.testing.conformance.editions import *  # noqa: F403 - the cases of every store
from asyncstore.testing.conformance.editions import (
    KILOBYTE,
    TRANSIENT,
    at,
    attach,
    heard,
    is_attached,
    loaded,
    names,
    tell,
    timeline,
)
from tests.builders import listed, sequences
from tests.servers import Server, rewrite_member, without_end


def keys_of(server: Server, prefix: str, edition: str) -> list[str]:
    """Return the keys that an edition has on the server."""
    with server.client() as client:
        found = [key.decode() for key in client.scan_iter(match=f"{prefix}*", count=1000)]
    return sorted(key.removeprefix(prefix) for key in found if f":{edition}:" in key)


class TestReadInTheServer:
    async def test_reading_writes_nothing(
        self, server: Server, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        await heard(store, branch)
        await heard(store, branch, diverge_at=1)
        await store.load(branch)
        await store.events.next_sequence(branch)
        assert keys_of(server, prefix, "what-if") == []


class TestFirstAppendInTheServer:
    @pytest.mark.parametrize("seed", range(10))
    async def test_writers_that_race_agree_on_one_divergence(
        self, server: Server, prefix: str, store: Store, order: Aggregate, seed: int
    ) -> None:
        branch = order.on("what-if")
        await tell(store, order, 0, 8)
        places = [*range(10), *range(10)]
        random.Random(seed).shuffle(places)
        async with asyncstore.open(server.url, key_prefix=prefix) as other:
            outcomes = await asyncio.gather(
                *(
                    (store, other)[writer % 2].events.append(
                        branch, [Event("Claimed", writer)], expected=place
                    )
                    for writer, place in enumerate(places)
                ),
                return_exceptions=True,
            )
        won = {
            outcome.first_sequence: writer
            for writer, outcome in enumerate(outcomes)
            if isinstance(outcome, Appended)
        }
        diverges_at, end = min(won), max(won) + 1
        assert sorted(won) == list(range(diverges_at, end))
        assert all(places[writer] == place for place, writer in won.items())
        events = await store.events.read(branch)
        assert sequences(events) == list(range(end))
        assert names(events[:diverges_at]) == timeline(diverges_at)
        assert [event.data for event in events[diverges_at:]] == [
            won[place] for place in range(diverges_at, end)
        ]
        lost = [outcome for outcome in outcomes if not isinstance(outcome, Appended)]
        assert len(lost) == len(outcomes) - len(won)
        for conflict in lost:
            assert isinstance(conflict, SequenceConflict)
            assert conflict.expected != conflict.actual
            assert conflict.actual == 8 or diverges_at < conflict.actual <= end
        assert await heard(store, order) == timeline(8)


class TestDeleteInTheServer:
    async def test_takes_the_branch_alone(
        self, server: Server, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        other = order.on("other")
        await tell(store, order, 0, 5)
        await tell(store, branch, 1, 7)
        await tell(store, other, 2, 1)
        for place in (order, branch, other):
            await attach(store, place)
        assert await store.events.delete(branch) == 7
        assert await heard(store, branch) == timeline(5)
        assert await store.events.next_sequence(branch) == 5
        assert await is_attached(store, branch) is False
        assert keys_of(server, prefix, "what-if") == []
        assert await heard(store, order) == timeline(5)
        assert await heard(store, other) == timeline(2, 1, "other")
        assert await is_attached(store, order)
        assert await is_attached(store, other)
        assert await listed(store.events.editions("orders")) == [MAIN, "other"]
        assert await store.events.delete(branch) == 0

    async def test_takes_the_branch_point(
        self, server: Server, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await store.events.branch(branch, at=2)
        assert await store.events.delete(branch) == 0
        assert await heard(store, branch) == timeline(5)
        assert await listed(store.events.editions("orders")) == [MAIN]
        assert keys_of(server, prefix, "what-if") == []

    async def test_of_what_is_not_diverged_takes_positions_and_snapshots(
        self, server: Server, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await attach(store, branch)
        assert await store.events.delete(branch) == 0
        assert keys_of(server, prefix, "what-if") == []
        assert await heard(store, branch) == timeline(5)

    async def test_of_main_leaves_branches_that_say_what_is_missing(
        self, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        await tell(store, branch, 2, 2)
        await tell(store, order.on("own"), 0, 2)
        assert await store.events.delete(order) == 5
        assert await heard(store, order.on("own")) == timeline(0, 2, "own")
        assert await heard(store, branch, start=2) == timeline(2, 2)[2:]
        for read in (store.events.read(branch), store.load(branch)):
            with pytest.raises(CorruptEvent, match="missing") as caught:
                await read
            assert (caught.value.key, caught.value.sequence) == (Keys(prefix).events(order), 0)

    @pytest.mark.parametrize("count", [0, 1])
    async def test_of_main_shows_on_a_branch_that_has_hardly_begun(
        self, prefix: str, store: Store, order: Aggregate, branch: Aggregate, count: int
    ) -> None:
        await tell(store, order, 0, 5)
        await store.events.branch(branch, at=3)
        await tell(store, branch, 3, count)
        await store.events.delete(order)
        assert await store.events.read(branch, limit=0) == []
        assert await heard(store, branch, start=3) == timeline(3, count)[3:]
        for read in (
            store.events.read(branch),
            store.events.read(branch, start=1, stop=2),
            store.events.read(branch, stop=3),
            store.load(branch),
            store.events.read(branch, reverse=True),
            store.events.read(branch, reverse=True, stop=3),
            store.events.read(branch, reverse=True, limit=count + 1),
        ):
            with pytest.raises(CorruptEvent, match="was the main history deleted"):
                await read
        await tell(store, order, 0, 1)
        for stop in (None, 3, 2):
            with pytest.raises(CorruptEvent, match="missing"):
                await store.events.read(branch, reverse=True, stop=stop)


class TestDeleteEditionInTheServer:
    async def test_that_was_cut_off_is_finished_by_the_next(self, store: Store) -> None:
        places = [Aggregate("orders", f"{n:04}", "what-if") for n in range(1000)]
        await asyncio.gather(*(tell(store, place, 0, 2) for place in places))
        deleting = asyncio.ensure_future(store.events.delete_edition("orders", "what-if"))
        while all([await store.events.next_sequence(place) == 2 for place in places[:3]]):
            pass
        deleting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deleting
        left = len(await listed(store.events.roots("orders", edition="what-if")))
        assert 0 < left < 1000
        assert await store.events.delete_edition("orders", "what-if") == 2 * left
        assert await listed(store.events.editions("orders")) == []

    async def test_takes_all_that_is_its_and_nothing_else(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        roots = ["plain", "*", "?[a-z]:\\", "orders:what-if:", "☃"]
        places = [Aggregate("orders", root) for root in roots]
        neighbours = [
            Aggregate(domain, root, edition)
            for root in roots
            for domain, edition in [
                ("orders", "what-if-2"),
                ("orders", "what"),
                ("orders", "What-If"),
                ("carts", "what-if"),
                ("orders.what-if", "main"),
            ]
        ]
        for place in places:
            await tell(store, place, 0, 4)
        for place in neighbours:
            await tell(store, place, 0, 2)
        for place in (*places, *neighbours):
            await attach(store, place)
        branches = [place.on("what-if") for place in places]
        for diverges_at, place in enumerate(branches):
            await tell(store, place, diverges_at, diverges_at + 1)
            await attach(store, place)
        assert await store.events.delete_edition("orders", "what-if") == 1 + 2 + 3 + 4 + 5
        with server.client() as client:
            left = [key.decode() for key in client.scan_iter(match=f"{prefix}*", count=1000)]
        assert [key for key in left if ":orders:what-if:{" in key] == []
        for place in branches:
            assert await heard(store, place) == timeline(4)
            assert await is_attached(store, place) is False
        for place in places:
            assert await heard(store, place) == timeline(4)
            assert await is_attached(store, place)
        for place in neighbours:
            assert await heard(store, place, start=0) == timeline(0, 2, place.edition)
            assert await is_attached(store, place)
        editions = await listed(store.events.editions("orders"))
        assert editions == sorted(["What-If", MAIN, "what", "what-if-2"])
        assert await listed(store.events.roots("orders", edition="what-if")) == []
        assert sorted(await listed(store.events.roots("carts", edition="what-if"))) == sorted(roots)
        assert await store.events.delete_edition("orders", "what-if") == 0

    async def test_takes_what_never_diverged(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await tell(store, order, 0, 5)
        places = [Aggregate("orders", f"{n}:*", "what-if") for n in range(5)]
        await store.positions.put("projector", places[0], 3)
        await store.positions.advance("saga", places[1], 3)
        await store.snapshots.put(places[2], sequence=3, state=None)
        await store.snapshots.put(places[3], sequence=3, state=None, retention=TRANSIENT)
        await store.events.branch(places[4], at=0)
        await store.events.branch(order.on("what-if"), at=3)
        assert await store.events.delete_edition("orders", "what-if") == 0
        assert keys_of(server, prefix, "what-if") == []
        assert await store.positions.get("projector", places[0]) is None
        assert await store.positions.get("saga", places[1]) is None
        assert await at(store, places[2]) is None
        assert await heard(store, order.on("what-if")) == timeline(5)
        assert await listed(store.events.editions("orders")) == [MAIN]

    async def test_thousands_of_aggregates(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await tell(store, order, 0, 3)
        places = [Aggregate("orders", f"{n}", "what-if") for n in range(3000)]
        await asyncio.gather(*(tell(store, place, 0, 1 + n % 3) for n, place in enumerate(places)))
        attached = [Aggregate("orders", f"attached {n}", "what-if") for n in range(500)]
        await asyncio.gather(*(store.positions.put("p", place, 1) for place in attached))
        assert await store.events.delete_edition("orders", "what-if") == 6000
        assert keys_of(server, prefix, "what-if") == []
        assert await heard(store, order) == timeline(3)

    async def test_two_at_once_count_each_event_once(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        places = [Aggregate("orders", f"{n}", "what-if") for n in range(450)]
        await asyncio.gather(*(tell(store, place, 0, 2) for place in places))
        async with asyncstore.open(server.url, key_prefix=prefix) as other:
            counts = await asyncio.gather(
                store.events.delete_edition("orders", "what-if"),
                other.events.delete_edition("orders", "what-if"),
            )
        assert sum(counts) == 900
        assert keys_of(server, prefix, "what-if") == []


class TestCorrupt:
    @pytest.mark.parametrize("sequence", [1, 4])
    async def test_an_event_names_the_key_that_holds_it(
        self, server: Server, prefix: str, store: Store, order: Aggregate, sequence: int
    ) -> None:
        branch = order.on("what-if")
        await tell(store, order, 0, 6)
        await tell(store, branch, 3, 3)
        key = Keys(prefix).events(order if sequence < 3 else branch)
        rewrite_member(server, key, sequence, lambda member: b"no event" + member)
        for read in (
            store.events.read(branch),
            store.events.read(branch, reverse=True),
            store.events.read(branch, until=datetime.now(UTC) + timedelta(hours=1)),
            listed(store.events.stream(branch, start=1)),
            store.load(branch),
            store.events.append(branch, [Event("Told", "lost")], expected=0, missed=True),
        ):
            with pytest.raises(CorruptEvent) as caught:
                await read
            assert (caught.value.key, caught.value.sequence) == (key, sequence)
        assert await heard(store, branch, stop=sequence) == timeline(3, 3)[:sequence]
        assert await heard(store, branch, start=sequence + 1) == timeline(3, 3)[sequence + 1 :]

    @pytest.mark.parametrize("sequence", [1, 4])
    async def test_so_do_data_that_are_broken(
        self, server: Server, prefix: str, store: Store, order: Aggregate, sequence: int
    ) -> None:
        branch = order.on("what-if")
        await tell(store, order, 0, 6)
        await tell(store, branch, 3, 3)
        key = Keys(prefix).events(order if sequence < 3 else branch)
        rewrite_member(server, key, sequence, without_end)
        for events in (await store.events.read(branch), (await store.load(branch)).events):
            with pytest.raises(CorruptEvent) as caught:
                _ = events[sequence].data
            assert (caught.value.key, caught.value.sequence) == (key, sequence)

    @pytest.mark.parametrize("sequence", [1, 4])
    async def test_so_does_an_event_that_is_missing(
        self, server: Server, prefix: str, store: Store, order: Aggregate, sequence: int
    ) -> None:
        branch = order.on("what-if")
        await tell(store, order, 0, 6)
        await tell(store, branch, 3, 3)
        key = Keys(prefix).events(order if sequence < 3 else branch)
        with server.client() as client:
            client.zremrangebyscore(key, sequence, sequence)
        for reverse in (False, True):
            with pytest.raises(CorruptEvent, match="missing") as caught:
                await store.events.read(branch, reverse=reverse)
            assert (caught.value.key, caught.value.sequence) == (key, sequence)

    @pytest.mark.parametrize("reverse", [False, True])
    async def test_so_does_one_that_is_missing_between_pages(
        self, server: Server, prefix: str, store: Store, reverse: bool
    ) -> None:
        # Half a megabyte each: pages end beside some of them.
        for sequence in range(9):
            place = Aggregate("orders", f"{sequence}")
            branch = place.on("what-if")
            await tell(store, place, 0, 6, 500 * KILOBYTE)
            await tell(store, branch, 5, 5, 500 * KILOBYTE)
            key = Keys(prefix).events(place if sequence < 5 else branch)
            with server.client() as client:
                client.zremrangebyscore(key, sequence, sequence)
            with pytest.raises(CorruptEvent, match="missing") as caught:
                await store.events.read(branch, reverse=reverse)
            assert (caught.value.key, caught.value.sequence) == (key, sequence)

    async def test_not_diverged_it_is_that_of_main(
        self, server: Server, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 6)
        key = Keys(prefix).events(order)
        rewrite_member(server, key, 2, without_end)
        rewrite_member(server, key, 4, lambda member: b"no event" + member)
        for read in (store.events.read(branch), store.load(branch)):
            with pytest.raises(CorruptEvent) as caught:
                await read
            assert (caught.value.key, caught.value.sequence) == (key, 4)
        for events in (
            await store.events.read(branch, stop=3),
            await store.events.read(branch, diverge_at=3),
        ):
            with pytest.raises(CorruptEvent) as caught:
                _ = events[2].data
            assert (caught.value.key, caught.value.sequence) == (key, 2)

    async def test_what_main_has_beyond_the_divergence_does_no_harm(
        self, server: Server, prefix: str, store: Store, order: Aggregate, branch: Aggregate
    ) -> None:
        await tell(store, order, 0, 6)
        await tell(store, branch, 3, 3)
        for sequence in (3, 4, 5):
            rewrite_member(
                server, Keys(prefix).events(order), sequence, lambda member: b"no event" + member
            )
        assert await heard(store, branch) == timeline(3, 3)
        assert await loaded(store, branch) == (None, timeline(3, 3), 6)
