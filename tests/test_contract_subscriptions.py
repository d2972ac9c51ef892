"""What every server must do for those who subscribe. Runs on each server of the matrix."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

import asyncstore
from asyncstore import (
    ANY,
    FIRST,
    MAIN,
    NEW,
    NOW,
    Aggregate,
    Delivery,
    Event,
    HistoryRegressed,
    InvalidName,
    InvalidType,
    InvalidValue,
    LeaseLost,
    OutcomeUnknown,
    RecordedEvent,
    Start,
    StillBehind,
    Store,
    StoreClosed,
    Subscription,
    running,
    worker,
)
from asyncstore.keys import ALL, Keys
from asyncstore.progress import Subscriptions
from asyncstore.registering import Registry
from asyncstore.worklist import Leased, Polled, Terms, Worklist
from tests.builders import listed, numbered, roots_of_one_slot, sequences
from tests.polling import eventually
from tests.servers import Server, rewrite_member

SECONDS = 20
SOON = 0.05  # a sweep that tests wait for


async def take(sub: Subscription, count: int = 1) -> list[Delivery]:
    """The next deliveries, none of them acked."""
    async with asyncio.timeout(SECONDS):
        return [await anext(sub) for _ in range(count)]


async def handle(sub: Subscription, count: int) -> list[tuple[str, int]]:
    """Ack the next events one by one; return what they were."""
    seen = []
    for _ in range(count):
        (delivery,) = await take(sub)
        seen.append((delivery.event.aggregate.root, delivery.event.sequence))
        await delivery.ack()
    return seen


async def die(sub: Subscription) -> None:
    """End a worker that says nothing more to the server."""
    for task in sub._worker._tasks:
        task.cancel()
    await asyncio.gather(*sub._worker._tasks, return_exceptions=True)


async def nothing_comes(sub: Subscription) -> bool:
    """Whether nothing is delivered though all that there is was looked at."""
    try:
        async with asyncio.timeout(0.2):
            await anext(sub)
    except TimeoutError:
        return True
    return False


async def fill(store: Store, roots: int, events: int, domain: str = "orders") -> list[Aggregate]:
    places = [Aggregate(domain, f"r{n}") for n in range(roots)]
    await asyncio.gather(*(store.events.append(p, numbered(events), expected=NEW) for p in places))
    return places


class TestDelivering:
    async def test_what_was_there_and_what_comes(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            seen = await handle(sub, 3)
            await store.events.append(order, numbered(2, 3), expected=3)
            seen += await handle(sub, 2)
        assert seen == [(order.root, n) for n in range(5)]
        assert await store.positions.get("projector", order) == 4

    async def test_the_event_is_the_one_that_is_read(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, [Event("Seen", b"\0")], expected=NEW, correlation_id="c")
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            assert [delivery.event] == await store.events.read(order)
            assert delivery.events == [delivery.event]
            assert (delivery.attempt, delivery.token) == (1, 1)

    async def test_goes_on_where_it_was(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(4), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            await handle(sub, 2)
        async with store.subscribe("projector", "orders") as sub:
            assert sequences([d.event for d in await take(sub)]) == [2]

    async def test_handlers_are_apart(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        for handler in ("one", "two", "three"):
            async with store.subscribe(handler, "orders") as sub:
                assert await handle(sub, 2) == [(order.root, 0), (order.root, 1)]

    async def test_the_next_comes_after_the_ack(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            (first,) = await take(sub)
            assert await nothing_comes(sub)
            await first.ack()
            (second,) = await take(sub)
            assert second.event.sequence == 1

    async def test_other_aggregates_go_on_meanwhile(self, store: Store) -> None:
        await fill(store, 5, 2)
        async with store.subscribe("projector", "orders") as sub:
            held = await take(sub, 5)
            assert len({d.event.aggregate for d in held}) == 5
            for delivery in held[1:]:
                await delivery.ack()
            assert sequences([d.event for d in await take(sub, 4)]) == [1] * 4
            assert held[0].event.sequence == 0

    async def test_many_aggregates_in_order(self, store: Store) -> None:
        places = await fill(store, 300, 7)
        seen = defaultdict(list)
        async with store.subscribe("projector", "orders", batch=3) as sub:
            for root, sequence in await handle(sub, 300 * 7):
                seen[root].append(sequence)
            assert await nothing_comes(sub)
        assert seen == {place.root: list(range(7)) for place in places}

    async def test_a_domain_that_comes_later(self, store: Store) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await store.events.append(Aggregate("carts", "1"), numbered(1), expected=NEW)
            await store.events.append(Aggregate("orders", "1"), numbered(1), expected=NEW)
            assert await handle(sub, 1) == [("1", 0)]
            assert await nothing_comes(sub)

    async def test_all_domains(self, store: Store) -> None:
        await fill(store, 2, 1, "orders")
        async with store.subscribe("projector", None, sweep=SOON) as sub:
            await handle(sub, 2)
            await fill(store, 2, 1, "carts")
            assert sorted(await handle(sub, 2)) == [("r0", 0), ("r1", 0)]

    async def test_types(self, store: Store, order: Aggregate) -> None:
        kinds = ["A", "B", 'C"]', "A", "B", "AB", 'C"]', "B"]
        await store.events.append(order, [Event(k, n) for n, k in enumerate(kinds)], expected=NEW)
        async with store.subscribe("projector", "orders", types=["A", 'C"]']) as sub:
            assert [n for _, n in await handle(sub, 4)] == [0, 2, 3, 6]
            assert await store.positions.get("projector", order) == 7
            await store.events.append(order, [Event("B", 8)], expected=8)
            await eventually(lambda: at(store, order, 8), "an event of another type is passed over")
            await store.events.append(order, [Event("B", 9), Event("A", 10)], expected=9)
            assert [n for _, n in await handle(sub, 1)] == [10]
        async with store.subscribe("nothing", "orders", types=["D"]) as sub:
            await eventually(lambda: at(store, order, 10, "nothing"), "all are passed over")
            assert await nothing_comes(sub)

    async def test_types_among_many_events(self, store: Store, order: Aggregate) -> None:
        events = [Event("Rare" if n % 500 == 499 else "Often", "x" * 3000) for n in range(1500)]
        await store.events.append(order, events, expected=NEW)
        async with store.subscribe("projector", "orders", types=["Rare"]) as sub:
            assert [n for _, n in await handle(sub, 3)] == [499, 999, 1499]
            assert await store.positions.get("projector", order) == 1499

    async def test_an_edition_with_what_it_shares_with_main(
        self, store: Store, order: Aggregate
    ) -> None:
        quiet = order.on("quiet")
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", "orders", edition="quiet") as sub:
            await store.events.append(quiet, numbered(2, 7), expected=2)
            events = []
            for _ in range(4):
                (delivery,) = await take(sub)
                events.append(delivery.event)
                await delivery.ack()
            await store.events.append(order, numbered(1), expected=3)
            assert await nothing_comes(sub)
        assert [event.data["n"] for event in events] == [0, 1, 7, 8]
        assert {event.aggregate for event in events} == {quiet}
        assert await store.positions.get("projector", quiet) == 3
        assert await store.positions.get("projector", order) is None

    async def test_batches(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(10), expected=NEW)
        async with (
            asyncio.timeout(SECONDS),
            store.subscribe("projector", "orders", batch=4) as sub,
        ):
            found = []
            async for delivery in sub.batches():
                found.append(sequences(delivery.events))
                if found[-1][0] == 4:
                    await delivery.ack(through=5)
                    assert await store.positions.get("projector", order) == 5
                    await delivery.ack(through=5)
                await delivery.ack()
                if found[-1][-1] == 9:
                    break
        assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert await store.positions.get("projector", order) == 9

    async def test_events_that_do_not_fit_into_a_page(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, [Event("Big", "x" * 400_000)] * 0, expected=NEW)
        events = [Event("Big", "x" * 400_000) for _ in range(9)]
        await store.events.append(order, events, expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            assert [n for _, n in await handle(sub, 9)] == list(range(9))


async def at(store: Store, place: Aggregate, sequence: int, handler: str = "projector") -> bool:
    return await store.positions.get(handler, place) == sequence


def terms(start: Start) -> Terms:
    """Those of a projector that nobody asks for more."""
    return Terms("projector", MAIN, start, None, 1, 30.0, None)


class TestBeginning:
    async def test_from_now(self, store: Store, order: Aggregate) -> None:
        other = Aggregate("orders", "other")
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", "orders", start=NOW) as sub:
            await store.events.append(order, numbered(1, 3), expected=3)
            await store.events.append(other, numbered(1), expected=NEW)
            assert sorted(await handle(sub, 2)) == sorted([(order.root, 3), ("other", 0)])
            assert await nothing_comes(sub)

    async def test_from_now_counts_the_first_time_only(
        self, store: Store, order: Aggregate
    ) -> None:
        async with store.subscribe("projector", "orders", start=NOW):
            pass
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders", start=NOW) as sub:
            await handle(sub, 2)
        async with store.subscribe("projector", "orders", start=FIRST) as sub:
            assert await nothing_comes(sub)

    async def test_from_now_with_more_than_a_page_of_aggregates(self, store: Store) -> None:
        places = await fill(store, 450, 2)
        async with store.subscribe("projector", "orders", start=NOW) as sub:
            await asyncio.gather(
                *(store.events.append(p, numbered(1, 2), expected=2) for p in places[::7])
            )
            seen = await handle(sub, len(places[::7]))
            assert await nothing_comes(sub)
        assert sorted(seen) == sorted((place.root, 2) for place in places[::7])

    async def test_from_now_while_others_write(self, store: Store) -> None:
        places = await fill(store, 30, 1)
        written: dict[str, int] = {}

        async def write(place: Aggregate) -> None:
            for n in range(1, 40):
                await store.events.append(place, numbered(1, n), expected=n)
                written[place.root] = n

        async def write_last() -> None:
            """What is written after NOW for sure."""
            await asyncio.gather(*writers)
            for place in places:
                await store.events.append(place, numbered(1, 40), expected=40)

        writers = [asyncio.ensure_future(write(place)) for place in places]
        await eventually(lambda: len(written) == 30, "all have begun")
        async with store.subscribe("projector", "orders", start=NOW) as sub:
            from_here = dict(written)
            seen: defaultdict[str, list[int]] = defaultdict(list)
            last = asyncio.ensure_future(write_last())
            while any(40 not in seen[place.root] for place in places):
                for root, sequence in await handle(sub, 1):
                    seen[root].append(sequence)
            await last
            assert await nothing_comes(sub)
        for root, found in seen.items():
            assert found == list(range(found[0], 41))
            assert found[0] <= from_here[root] + 1

    async def test_from_now_in_all_domains(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", None, start=NOW) as sub:
            await store.events.append(Aggregate("later", "1"), numbered(2), expected=NEW)
            assert await handle(sub, 2) == [("1", 0), ("1", 1)]
        await store.events.append(Aggregate("last", "1"), numbered(1), expected=NEW)
        async with store.subscribe("projector", None, start=NOW) as sub:
            assert await handle(sub, 1) == [("1", 0)]

    async def test_who_comes_late_marks_nothing_that_came_later(
        self, server: Server, prefix: str, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Some under a tag that is to be marked, some under others.
        places = [Aggregate("orders", root) for root in roots_of_one_slot(20)]
        places += [Aggregate("orders", f"r{n}") for n in range(20)]
        for place in places[:5]:
            await store.events.append(place, numbered(1), expected=NEW)
        mark, has_come, go_on = Registry._mark, asyncio.Event(), asyncio.Event()

        async def mark_late(registry: Registry, *arguments: Any) -> None:
            if registry is late._means.registry:
                has_come.set()
                await go_on.wait()
            await mark(registry, *arguments)

        monkeypatch.setattr(Registry, "_mark", mark_late)
        async with asyncstore.open(server.url, key_prefix=prefix) as late:
            entering = asyncio.ensure_future(late._means.registry.begin("orders", terms(NOW)))
            await has_come.wait()  # it knows what there was
            async with store.subscribe("projector", "orders", start=NOW) as sub:
                await asyncio.gather(
                    *(store.events.append(p, numbered(1), expected=ANY) for p in places)
                )
                go_on.set()
                await entering
                seen = await handle(sub, 40)
                assert await nothing_comes(sub)
        assert sorted(seen) == sorted((p.root, int(n < 5)) for n, p in enumerate(places))

    async def test_one_that_died_while_it_marked(
        self, server: Server, prefix: str, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        places = await fill(store, 20, 2)
        mark = Registry._mark

        async def mark_some(registry: Registry, *arguments: Any) -> None:
            if random.random() < 0.5:
                raise StoreClosed("it has died")
            await mark(registry, *arguments)

        monkeypatch.setattr(Registry, "_mark", mark_some)
        dying = store.subscribe("projector", "orders", start=NOW)
        with suppress(StoreClosed):
            async with dying:
                pass
        monkeypatch.undo()
        async with store.subscribe("projector", "orders", start=FIRST) as sub:
            await asyncio.gather(
                *(store.events.append(p, numbered(1), expected=ANY) for p in places)
            )
            assert sorted(await handle(sub, 20)) == sorted((p.root, 2) for p in places)
            assert await nothing_comes(sub)

    async def test_beyond_a_position_that_was_put(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(5), expected=NEW)
        await store.positions.put("projector", order, 2)
        async with store.subscribe("projector", "orders") as sub:
            assert [n for _, n in await handle(sub, 2)] == [3, 4]


class TestSettling:
    async def test_a_second_ack_changes_nothing(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await asyncio.gather(delivery.ack(), delivery.ack())
            await delivery.ack()
            assert await store.positions.get("projector", order) == 0
            assert [n for _, n in await handle(sub, 1)] == [1]
            await delivery.ack()
            assert await store.positions.get("projector", order) == 1

    async def test_nack_brings_it_again(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            for attempt in (1, 2, 3):
                (delivery,) = await take(sub)
                assert (delivery.event.sequence, delivery.attempt) == (0, attempt)
                await delivery.nack()
                for call in (delivery.ack, delivery.nack):
                    with pytest.raises(LeaseLost):
                        await call()
            assert [n for _, n in await handle(sub, 2)] == [0, 1]

    async def test_nack_counts_for_the_event_it_was_said_of(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            await handle(sub, 1)
            (delivery,) = await take(sub)
            await delivery.nack()
            (delivery,) = await take(sub)
            assert (delivery.event.sequence, delivery.attempt) == (1, 2)
            await delivery.ack()
            (delivery,) = await take(sub)
            assert (delivery.event.sequence, delivery.attempt) == (2, 1)

    async def test_nack_with_a_delay(self, store: Store) -> None:
        await fill(store, 2, 1)
        async with store.subscribe("projector", "orders") as sub:
            one, other = await take(sub, 2)
            started = time.monotonic()
            await one.nack(delay=0.3)
            await other.ack()
            (again,) = await take(sub)
            assert again.event == one.event
            assert 0.29 < time.monotonic() - started < 5
            await again.nack(delay=60)
            assert await nothing_comes(sub)
        async with store.subscribe("projector", "orders") as sub:
            assert await nothing_comes(sub)

    async def test_after_the_retries_the_aggregate_goes_on(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        tries = []
        async with store.subscribe("projector", "orders", retries=2) as sub:
            for _ in range(5):
                (delivery,) = await take(sub)
                tries.append((delivery.event.sequence, delivery.attempt))
                if delivery.event.sequence == 1:
                    await delivery.nack(reason="ValueError")
                else:
                    await delivery.ack()
            assert await nothing_comes(sub)
        assert tries == [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1)]
        assert await store.positions.get("projector", order) == 2

    async def test_what_only_waited_when_its_worker_died_was_not_tried(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        await fill(store, 3, 1)

        async def lease_and_die() -> None:
            async with asyncstore.open(server.url, key_prefix=prefix) as dying:
                sub = dying.subscribe("projector", "orders", lease=0.1, retries=1)
                await sub.__aenter__()
                await eventually(lambda: len(sub._worker._ready) == 3, "all are leased")
                await die(sub)

        for _ in range(4):
            await lease_and_die()
        async with store.subscribe("projector", "orders", retries=1) as other:
            deliveries = await take(other, 3)
            assert [delivery.attempt for delivery in deliveries] == [2, 2, 2]
            for delivery in deliveries:
                await delivery.nack(reason="now it was tried twice")
            assert len(await listed(store.subscriptions.dead_letters("projector"))) == 3

    async def test_nack_of_what_was_acked_after_all(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(4), expected=NEW)

        async with store.subscribe("projector", "orders", retries=0) as sub:
            async for delivery in sub.batches():
                held = delivery._held
                known = delivery.events[1].sequence, delivery.events[1].id.hex
                assert await held.worklist.ack(held.leased, known, 2) == "ok"  # nobody waited
                await delivery.nack(reason="Unsure")  # says so of event 0
                break
            assert await store.positions.get("projector", order) == 1
            assert [d.event.sequence for d in await take(sub)] == [2]
            assert await listed(store.subscriptions.dead_letters("projector")) == []

    async def test_what_only_waited_is_tried_even_if_nothing_is_tried_again(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        await fill(store, 3, 1)
        async with asyncstore.open(server.url, key_prefix=prefix) as dying:
            sub = dying.subscribe("projector", "orders", lease=0.1, retries=0)
            await sub.__aenter__()
            await eventually(lambda: len(sub._worker._ready) == 3, "all are leased")
            await die(sub)
        async with store.subscribe("projector", "orders", retries=0) as other:
            for delivery in await take(other, 3):
                await delivery.nack(reason="now it was tried")
            letters = await listed(store.subscriptions.dead_letters("projector"))
            assert [letter.reason for letter in letters] == ["now it was tried"] * 3

    async def test_what_follows_a_nack_of_what_was_acked_after_all_does_not_wait(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders", sweep=1000) as sub:
            (delivery,) = await take(sub)
            held, event = delivery._held, delivery.event
            known = event.sequence, event.id.hex
            assert await held.worklist.ack(held.leased, known, 1) == "ok"  # nobody waited
            await delivery.nack(delay=1000)
            assert await handle(sub, 1) == [(order.root, 1)]

    async def test_leaving_while_a_try_is_noted_gives_it_back(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        begin, is_noted, goes_on = Worklist.begin, asyncio.Event(), asyncio.Event()

        async def slowly(worklist: Worklist, leased: Leased) -> bool:
            is_ours = await begin(worklist, leased)
            is_noted.set()
            await goes_on.wait()
            return is_ours

        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await delivery.nack()
            with monkeypatch.context() as slow:
                slow.setattr(Worklist, "begin", slowly)
                taking = asyncio.ensure_future(anext(sub))
                await is_noted.wait()
                sub.stop()
                goes_on.set()
                with pytest.raises(StopAsyncIteration):
                    await taking
        async with store.subscribe("projector", "orders") as other:
            (delivery,) = await take(other)
            assert delivery.attempt == 2

    async def test_a_try_that_could_not_be_noted_is_noted_later(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        begin, failures = Worklist.begin, [1, 2]

        async def fail(worklist: Worklist, leased: Leased) -> bool:
            is_ours = await begin(worklist, leased)
            if failures:
                failures.pop()
                raise OutcomeUnknown("here", "the answer was lost")
            return is_ours

        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await delivery.nack()
            monkeypatch.setattr(Worklist, "begin", fail)
            (delivery,) = await take(sub)
            assert (delivery.attempt, failures) == (2, [])
            await delivery.ack()

    async def test_retries_for_ever(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("projector", "orders", retries=None) as sub:
            for attempt in range(1, 20):
                (delivery,) = await take(sub)
                assert delivery.attempt == attempt
                await delivery.nack()

    async def test_a_delivery_that_nobody_holds_comes_again(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("projector", "orders", lease=0.3) as sub:
            await take(sub)
            (delivery,) = await take(sub)
            assert (delivery.event.sequence, delivery.attempt) == (0, 2)

    async def test_a_lease_is_kept_while_it_is_needed(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with (
            store.subscribe("projector", "orders", lease=0.2, sweep=SOON) as sub,
            store.subscribe("projector", "orders", lease=0.2, sweep=SOON) as other,
        ):
            delivery = await first_of(sub, other)
            await asyncio.sleep(0.7)
            await delivery.ack()
        assert await store.positions.get("projector", order) == 0

    async def test_who_was_too_slow_cannot_ack(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders", lease=0.2) as slow:
            (late,) = await take(slow)
            for task in slow._worker._tasks:  # it hears of nothing: only the server can tell it
                task.cancel()
            async with store.subscribe("projector", "orders", lease=5) as other:
                (delivery,) = await take(other)
                assert (delivery.event.sequence, delivery.attempt) == (0, 2)
                assert delivery.token > late.token
                with pytest.raises(LeaseLost) as lost:
                    await late.ack()
                assert (lost.value.handler, lost.value.aggregate) == ("projector", order)
                with pytest.raises(LeaseLost):
                    await late.nack()
                await delivery.ack()
        assert await store.positions.get("projector", order) == 0

    async def test_who_has_acked_before_and_is_too_slow_now_cannot_nack(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders", lease=0.2) as slow:
            await handle(slow, 1)
            (late,) = await take(slow)
            await die(slow)
            async with store.subscribe("projector", "orders", lease=5) as other:
                (delivery,) = await take(other)
                with pytest.raises(LeaseLost):
                    await late.nack()
                await delivery.ack()

    @pytest.mark.parametrize("behind", [0, 1])
    async def test_a_lease_that_has_ended_and_that_nobody_has_taken(
        self, server: Server, prefix: str, store: Store, order: Aggregate, behind: int
    ) -> None:
        await store.events.append(order, numbered(1 + behind), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            (late,) = await take(sub)
            with server.client() as client:
                client.hset(Keys(prefix).lease("projector", order), "until", "1")
            with pytest.raises(LeaseLost):
                await late.ack()
            assert await store.positions.get("projector", order) is None

    async def test_the_tries_of_one_event_are_none_of_the_next(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await delivery.nack()
            (delivery,) = await take(sub)
            assert (delivery.event.sequence, delivery.attempt) == (0, 2)
            await delivery.ack()
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            assert (delivery.event.sequence, delivery.attempt) == (1, 1)

    async def test_after_the_end_of_the_subscription(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
        with pytest.raises(LeaseLost):
            await delivery.ack()
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            assert delivery.attempt == 1  # it was given back, not tried
            await delivery.ack()

    async def test_a_position_that_is_ahead(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        await store.positions.put("projector", order, 5)
        await fill(store, 1, 1)
        async with store.subscribe("projector", "orders") as sub:
            seen: list[tuple[str, int]] = []
            regressed: HistoryRegressed | None = None
            for _ in range(2):
                try:
                    seen += await handle(sub, 1)
                except HistoryRegressed as error:
                    regressed = error
            assert seen == [("r0", 0)]
            assert regressed is not None
            assert (regressed.aggregate, regressed.expected, regressed.actual) == (order, 6, 2)

    async def test_another_event_at_the_position(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            await handle(sub, 3)
        with server.client() as client:  # a failover that lost the end, and then others wrote
            client.zremrangebyscore(Keys(prefix).events(order), 2, 2)
        await store.events.append(order, numbered(3, 20), expected=2)
        async with store.subscribe("projector", "orders", lease=0.2) as sub:
            with pytest.raises(HistoryRegressed):
                await take(sub)
            await store.positions.put("projector", order, 1)
        async with store.subscribe("projector", "orders") as sub:
            assert [n for _, n in await handle(sub, 3)] == [2, 3, 4]


async def first_of(*subs: Subscription) -> Delivery:
    """The first delivery that one of them gets."""
    tasks = [asyncio.ensure_future(anext(sub)) for sub in subs]
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=SECONDS)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    return done.pop().result()


class TestSharing:
    async def test_workers_share_the_work(self, server: Server, prefix: str, store: Store) -> None:
        places = await fill(store, 100, 5)
        seen: list[tuple[str, int]] = []
        shares: defaultdict[int, int] = defaultdict(int)

        async def work(number: int) -> None:
            async with (
                asyncstore.open(server.url, key_prefix=prefix) as own,
                own.subscribe("projector", "orders", sweep=SOON, batch=2) as sub,
            ):
                workers.append(sub)
                await eventually(lambda: len(workers) == 4, "all have begun")
                async for delivery in sub:
                    seen.append((delivery.event.aggregate.root, delivery.event.sequence))
                    shares[number] += 1
                    await delivery.ack()

        workers: list[Subscription] = []
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(work(number))
            await eventually(lambda: len(seen) >= 500, "all were handled")
            for worker in workers:
                worker.stop()
        assert sorted(seen) == sorted((p.root, n) for p in places for n in range(5))
        for place in places:
            assert [n for root, n in seen if root == place.root] == list(range(5))
        assert len(shares) == 4

    async def test_tasks_share_a_subscription(self, store: Store) -> None:
        await fill(store, 20, 10)
        seen: defaultdict[str, list[int]] = defaultdict(list)

        async def work(sub: Subscription) -> None:
            async for delivery in sub:
                await asyncio.sleep(0)
                seen[delivery.event.aggregate.root].append(delivery.event.sequence)
                await delivery.ack()

        async with asyncio.TaskGroup() as tasks, store.subscribe("projector", "orders") as sub:
            for _ in range(8):
                tasks.create_task(work(sub))
            await eventually(lambda: sum(map(len, seen.values())) == 200, "all were handled")
        assert all(found == list(range(10)) for found in seen.values())

    async def test_a_dead_worker_gives_up_its_aggregates(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        await fill(store, 5, 1)
        async with asyncstore.open(server.url, key_prefix=prefix) as dying:
            sub = dying.subscribe("projector", "orders", lease=0.5)
            await sub.__aenter__()
            held = await take(sub, 2)
            await die(sub)
        async with store.subscribe("projector", "orders") as other:
            assert len(await handle(other, 5)) == 5
        assert len(held) == 2

    async def test_what_waited_beyond_its_lease_is_not_delivered(
        self,
        server: Server,
        prefix: str,
        store: Store,
        order: Aggregate,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        poll = Worklist.poll

        async def get_nowhere(*_: Any) -> None:
            await asyncio.Event().wait()

        async def look(worklist: Worklist, most: int) -> Polled:
            if any(worklist is one for one in slow._worker._worklists.values()):
                await get_nowhere()  # each look keeps what is due from others for a moment
            return await poll(worklist, most)

        await store.events.append(order, numbered(1), expected=NEW)
        async with (
            asyncstore.open(server.url, key_prefix=prefix) as own,
            own.subscribe("projector", "orders", lease=0.2, close_timeout=0.1) as slow,
        ):
            await eventually(lambda: len(slow._worker._ready) == 1, "it has leased the event")
            monkeypatch.setattr(Worklist, "renew", get_nowhere)
            monkeypatch.setattr(Worklist, "poll", look)
            async with store.subscribe("projector", "orders") as other:
                assert await handle(other, 1) == [(order.root, 0)]
            assert await nothing_comes(slow)

    async def test_leaving_waits_for_others(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        taken, go_on = asyncio.Event(), asyncio.Event()

        async def work(sub: Subscription) -> None:
            async for delivery in sub:
                taken.set()
                await go_on.wait()
                await delivery.ack()

        async with asyncio.TaskGroup() as tasks, store.subscribe("projector", "orders") as sub:
            tasks.create_task(work(sub))
            await taken.wait()
            asyncio.get_running_loop().call_later(0.1, go_on.set)
        assert await store.positions.get("projector", order) == 0

    async def test_leaving_does_not_wait_for_ever(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders", close_timeout=0.1) as sub:
            waiting = asyncio.ensure_future(take(sub))
            await eventually(waiting.done, "it was delivered")
        with pytest.raises(LeaseLost):
            await waiting.result()[0].ack()

    async def test_a_wait_that_is_cancelled_loses_nothing(
        self, store: Store, order: Aggregate
    ) -> None:
        async with store.subscribe("projector", "orders") as sub:
            for n in range(20):
                waiting = asyncio.ensure_future(anext(sub))
                append = asyncio.ensure_future(
                    store.events.append(order, numbered(1, n), expected=n)
                )
                for _ in range(n):
                    await asyncio.sleep(0)
                waiting.cancel()
                await append
                outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
                if isinstance(outcome, Delivery):
                    await outcome.ack()
                else:
                    await handle(sub, 1)


async def settled(store: Store, *subs: Subscription) -> None:
    """All is heard, and was looked at since, and nobody is to look again unless he is told to.

    What is found from here on is found by a sweep.
    """
    bell, sweeper = store._doorbell, store._sweeper
    await eventually(lambda: not bell._silent, "all channels are heard")
    await eventually(lambda: not (sweeper._again or sweeper._under_way), "all was looked at")
    feeders = [feeder for sub in subs for feeder in sub._worker._feeders.values()]
    await eventually(
        lambda: all(feeder._agenda.next_moment() == math.inf for feeder in feeders),
        "nobody is to look again",
    )


async def is_listed(store: Store) -> bool:
    return bool(await store.subscriptions.status("projector"))


class TestSweeping:
    """What nobody was told of, or was told of in vain."""

    async def test_an_append_that_was_not_heard(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with (
            store.subscribe("one", "orders", sweep=SOON, lease=1) as one,
            store.subscribe("all", None, sweep=SOON, lease=1) as all_,
        ):
            await handle(one, 1)
            await handle(all_, 1)
            await settled(store, one, all_)
            monkeypatch.setattr(Keys, "live", lambda *_: "")
            await store.events.append(order, numbered(1), expected=ANY)
            await store.events.append(Aggregate("carts", "1"), numbered(1), expected=NEW)
            assert await handle(one, 1) == [(order.root, 1)]
            assert sorted(await handle(all_, 2)) == sorted([(order.root, 1), ("1", 0)])

    async def test_a_registration_that_was_lost(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        keys = server.keys(prefix)
        async with store.subscribe("projector", None, start=NOW) as sub:
            await store.events.append(order, numbered(1), expected=NEW)
            await handle(sub, 1)
            with server.client() as client:
                for domain in ("orders", "*"):
                    client.unlink(keys.subscription("projector", domain, MAIN, ALL))
                client.unlink(keys.subscribed(ALL))
            sub._worker.missed(keys.tags())
            await eventually(lambda: is_listed(store), "it is registered again")
        await store.events.append(order, numbered(1, 1), expected=1)
        async with store.subscribe("projector", None, start=NOW) as sub:
            assert await handle(sub, 1) == [(order.root, 1)]

    async def test_numbers_that_were_taken_back_and_given_again(
        self,
        server: Server,
        prefix: str,
        store: Store,
        order: Aggregate,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        keys = server.keys(prefix)
        tag = keys.tag_of(order.root)
        commits = keys.commits(tag)
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders", sweep=1, lease=1) as sub:
            await handle(sub, 2)
            await settled(store, sub)
            with server.client() as client:  # a failover that lost a commit, and then another
                before = cast(bytes, client.get(commits))
                client.set(commits, b"0 " + before.split(b" ")[1])
                client.hset(keys.subscription("projector", "orders", MAIN, tag), "swept", 0)
                monkeypatch.setattr(Keys, "live", lambda *_: "")
                await store.events.append(order, numbered(1, 2), expected=2)
                after = cast(bytes, client.get(commits))
            assert (before[:2], after[:2], before == after) == (b"1 ", b"1 ", False)
            assert await handle(sub, 1) == [(order.root, 2)]

    async def test_what_a_worker_gives_back(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        places = await fill(store, 8, 1)
        async with store.subscribe("projector", "orders") as first:
            await take(first, 3)
            async with (
                asyncstore.open(server.url, key_prefix=prefix) as own,
                own.subscribe("projector", "orders", sweep=SOON) as other,
            ):
                assert await nothing_comes(other)
                await first.__aexit__(None, None, None)
                assert sorted(await handle(other, 8)) == [(place.root, 0) for place in places]

    async def test_a_reset_and_a_dead_letter_from_elsewhere(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        (place,) = await bury(store, "projector", 1)
        async with (
            asyncstore.open(server.url, key_prefix=prefix) as own,
            own.subscribe("projector", "orders", sweep=SOON) as sub,
        ):
            assert await nothing_comes(sub)
            (letter,) = await listed(store.subscriptions.dead_letters("projector"))
            await store.subscriptions.retry(letter)
            assert await handle(sub, 1) == [(place.root, 1)]
            assert await nothing_comes(sub)
            await store.subscriptions.reset("projector", "orders")
            assert [n for _, n in await handle(sub, 3)] == [0, 1, 2]


class TestErasing:
    async def test_an_aggregate_takes_all_with_it(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        (place,) = await fill(store, 1, 2)
        async with store.subscribe("projector", "orders", retries=0) as sub:
            (delivery,) = await take(sub)
            await delivery.nack()
            await handle(sub, 1)
        await store.events.delete(place)
        with server.client() as client:
            left = {key.decode().removeprefix(prefix) for key in client.scan_iter(prefix + "*")}
        assert {key.split(":")[0] for key in left} == {
            "commits", "layout", "subscribed", "subscriptions",
        }  # fmt: skip

    async def test_and_may_begin_anew(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders") as sub:
            for _ in range(2):
                await store.events.append(order, numbered(3), expected=NEW)
                assert [n for _, n in await handle(sub, 3)] == [0, 1, 2]
                await store.events.delete(order)

    async def test_while_it_is_handled(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await store.events.delete(order)
            with pytest.raises(LeaseLost):
                await delivery.ack()
            await store.events.append(order, numbered(1), expected=NEW)
            assert [n for _, n in await handle(sub, 1)] == [0]


class TestBadInput:
    async def test_arguments(self, store: Store) -> None:
        calls: list[tuple[type[Exception], Callable[[], object]]] = [
            (InvalidName, lambda: store.subscribe("a:b", "orders")),
            (InvalidName, lambda: store.subscribe("p", "a:b")),
            (InvalidName, lambda: store.subscribe("p", "orders", edition="MAIN")),
            (InvalidType, lambda: store.subscribe("p", "orders", start="first")),  # type: ignore[arg-type]
            (InvalidValue, lambda: store.subscribe("p", "orders", batch=0)),
            (InvalidValue, lambda: store.subscribe("p", "orders", lease=0)),
            (InvalidValue, lambda: store.subscribe("p", "orders", sweep=float("nan"))),
            (InvalidType, lambda: store.subscribe("p", "orders", lease="1")),  # type: ignore[arg-type]
            (InvalidValue, lambda: store.subscribe("p", "orders", retries=-1)),
            (InvalidValue, lambda: store.subscribe("p", "orders", types=[])),
            (InvalidType, lambda: store.subscribe("p", "orders", types="Paid")),
            (InvalidType, lambda: store.listen("orders", types=[7])),  # type: ignore[list-item]
        ]
        for error, call in calls:
            with pytest.raises(error):
                call()

    async def test_outside_of_async_with(self, store: Store) -> None:
        sub = store.subscribe("projector", "orders")
        with pytest.raises(StoreClosed):
            await anext(sub)
        async with sub:
            pass
        with pytest.raises(StoreClosed):
            await sub.__aenter__()
        assert [delivery async for delivery in sub] == []

    async def test_nack_with_a_bad_delay(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=ANY)
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            with pytest.raises(InvalidValue, match="delay"):
                await delivery.nack(delay=-1)


async def bury(store: Store, handler: str, roots: int, **options: Any) -> list[Aggregate]:
    """Aggregates of three events, of which the second of each has become a dead letter."""
    places = await fill(store, roots, 3)
    async with store.subscribe(handler, "orders", retries=0, **options) as sub:
        for _ in range(3 * roots):
            (delivery,) = await take(sub)
            if delivery.event.sequence == 1:
                await delivery.nack(reason="ValueError: no\nway")
            else:
                await delivery.ack()
    return places


class TestDeadLetters:
    async def test_can_be_looked_at(self, store: Store) -> None:
        places = await bury(store, "projector", 3)
        letters = await listed(store.subscriptions.dead_letters("projector"))
        assert [letter.aggregate for letter in letters] == places
        for letter, place in zip(letters, places, strict=True):
            (event,) = await store.events.read(place, start=1, stop=2)
            assert (letter.handler, letter.sequence, letter.attempts) == ("projector", 1, 1)
            assert (letter.event_id, letter.reason) == (event.id.hex, "ValueError: no way")
            assert abs((letter.time - event.time).total_seconds()) < 60
        assert await listed(store.subscriptions.dead_letters("projector", "carts")) == []
        assert await listed(store.subscriptions.dead_letters("other")) == []

    async def test_retry_delivers_it_once_more(self, store: Store) -> None:
        places = await bury(store, "projector", 2)
        one, _ = await listed(store.subscriptions.dead_letters("projector", "orders"))
        assert await store.subscriptions.retry(one) is True
        assert await store.subscriptions.retry(one) is False
        async with store.subscribe("projector", "orders") as sub:
            await store.events.append(places[0], numbered(1, 3), expected=3)
            assert await handle(sub, 2) == [(places[0].root, 1), (places[0].root, 3)]
            assert await nothing_comes(sub)
        assert len(await listed(store.subscriptions.dead_letters("projector"))) == 1
        assert await store.positions.get("projector", places[0]) == 3

    async def test_refused_again_it_is_a_dead_letter_again(self, store: Store) -> None:
        await bury(store, "projector", 1)
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        await store.subscriptions.retry(letter)
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await delivery.nack(reason="again")
            assert await nothing_comes(sub)
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        assert (letter.sequence, letter.reason) == (1, "again")

    async def test_retried_until_its_worker_has_died_too_often(self, store: Store) -> None:
        (place,) = await bury(store, "projector", 1)
        for _ in range(2):
            (letter,) = await listed(store.subscriptions.dead_letters("projector"))
            assert await store.subscriptions.retry(letter)
            async with store.subscribe("projector", "orders", retries=1, lease=0.1) as sub:
                for attempt in (1, 2):
                    (delivery,) = await take(sub)
                    assert (delivery.event.sequence, delivery.attempt) == (1, attempt)
                    sub.give_up(delivery)
                end = await store.events.next_sequence(place)
                await store.events.append(place, numbered(1, end), expected=end)
                assert await handle(sub, 1) == [(place.root, end)]
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        assert (letter.sequence, letter.attempts, letter.reason) == (1, 2, "its lease ended")

    async def test_retry_while_the_aggregate_is_handled(self, store: Store) -> None:
        (place,) = await bury(store, "projector", 1)
        await store.events.append(place, numbered(2, 3), expected=3)
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        async with store.subscribe("projector", "orders") as sub:
            (delivery,) = await take(sub)
            await store.subscriptions.retry(letter)
            await delivery.ack()
            assert await handle(sub, 2) == [(place.root, 4), (place.root, 1)]

    async def test_drop(self, store: Store) -> None:
        await bury(store, "projector", 2)
        one, other = await listed(store.subscriptions.dead_letters("projector"))
        assert await store.subscriptions.drop(one) is True
        assert await store.subscriptions.drop(one) is False
        assert await listed(store.subscriptions.dead_letters("projector")) == [other]
        async with store.subscribe("projector", "orders") as sub:
            assert await nothing_comes(sub)

    async def test_an_event_that_cannot_be_read(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(4), expected=NEW)
        rewrite_member(server, Keys(prefix).events(order), 1, lambda member: b"[1,garbage")
        with server.client() as client:
            client.zremrangebyscore(Keys(prefix).events(order), 3, 3)
        await store.events.append(order, numbered(1), expected=3)
        async with store.subscribe("projector", "orders", retries=0) as sub:
            assert [n for _, n in await handle(sub, 3)] == [0, 2, 3]
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        assert (letter.sequence, letter.reason, letter.event_id) == (1, "CorruptEvent", "")

    @pytest.mark.parametrize("is_there", [True, False])
    async def test_an_event_that_can_never_be_read_is_not_tried_for_ever(
        self,
        server: Server,
        prefix: str,
        store: Store,
        order: Aggregate,
        monkeypatch: pytest.MonkeyPatch,
        is_there: bool,
    ) -> None:
        monkeypatch.setattr(worker, "_CORRUPT_PAUSE", 0.0)
        await store.events.append(order, numbered(4), expected=NEW)
        if is_there:
            rewrite_member(server, Keys(prefix).events(order), 0, lambda member: b"[0,garbage")
        else:
            with server.client() as client:
                client.zremrangebyscore(Keys(prefix).events(order), 0, 0)
        async with store.subscribe("projector", "orders", retries=4) as sub:
            assert await handle(sub, 2) == [(order.root, 1), (order.root, 2)]
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        assert (letter.sequence, letter.attempts) == (0, 5)

    @pytest.mark.parametrize("hole", [1, 2])
    async def test_a_hole_before_the_last_event_is_not_passed_over(
        self, server: Server, prefix: str, store: Store, order: Aggregate, hole: int
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("projector", "orders", retries=0) as sub:
            await handle(sub, 1)
        await store.events.append(order, numbered(hole + 1, 1), expected=1)
        with server.client() as client:
            client.zremrangebyscore(Keys(prefix).events(order), hole, hole)
        async with store.subscribe("projector", "orders", retries=0) as sub:
            await handle(sub, hole - 1)
            await eventually(lambda: at(store, order, hole), "it goes on behind it")
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        assert (letter.sequence, letter.reason) == (hole, "CorruptEvent")

    async def test_where_all_is_handled_there_is_no_hole(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            await handle(sub, 1)
        keys = server.keys(prefix)
        due = keys.due("projector", "orders", "main", keys.tag_of(order.root))
        with server.client() as client:
            client.zadd(due, {order.root: 0})
            async with store.subscribe("projector", "orders") as sub:
                sub._worker._look_by(order, 0)
                await eventually(lambda: not client.exists(due), "it was looked at")
                assert await nothing_comes(sub)
                assert sub._worker._leases == 1

    async def test_a_hole_that_is_passed_over_is_no_other_event(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        others = [Event("Other", {}), Event("Other", {})]
        await store.events.append(order, [*numbered(1), *others], expected=NEW)
        with server.client() as client:
            client.zremrangebyscore(Keys(prefix).events(order), 1, 1)
        wanted = numbered(1)[0].type
        async with store.subscribe("projector", "orders", types=[wanted]) as sub:
            assert await handle(sub, 1) == [(order.root, 0)]
        await store.events.append(order, numbered(1), expected=2)
        async with store.subscribe("projector", "orders", types=[wanted]) as sub:
            assert await handle(sub, 1) == [(order.root, 2)]


class TestProgress:
    async def test_how_far_a_handler_is(self, store: Store) -> None:
        places = await fill(store, 450, 3)
        async with store.subscribe("projector", "orders") as sub:
            await handle(sub, 300)
            (delivery,) = await take(sub)
            await delivery.nack(delay=60)
            (status,) = await store.subscriptions.status("projector")
        assert (status.handler, status.domain, status.edition) == ("projector", "orders", "main")
        assert status.events_behind == 1350 - 300
        assert 350 <= status.aggregates_behind <= 450
        assert status.dead_letters == 0
        assert status.oldest is not None
        firsts = await asyncio.gather(*(store.events.read(p, limit=1) for p in places))
        assert min(events[0].time for events in firsts) <= status.oldest
        assert await store.subscriptions.status("other") == []

    async def test_what_is_given_back_meanwhile_is_not_passed_over(
        self, server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        places = await fill(store, 900, 1)
        async with store.subscribe("projector", "orders"):
            pass
        keys, lags_of = store._keys, Subscriptions._lags_of

        def are_due(some: list[Aggregate], moment: int) -> None:
            with server.client() as client:
                for place in some:
                    tag = "projector", "orders", MAIN, keys.tag_of(place.root)
                    client.zadd(keys.due(*tag), {place.root: moment})
                    client.hset(keys.subscription(*tag), "swept", 10**9)

        async def lags_while_others_give_leases_back(*args: Any) -> Any:
            monkeypatch.setattr(Subscriptions, "_lags_of", lags_of)
            are_due(places[800:], 0)
            return await lags_of(*args)

        are_due(places, 1)
        are_due(places[800:], 2)
        monkeypatch.setattr(Subscriptions, "_lags_of", lags_while_others_give_leases_back)
        (status,) = await store.subscriptions.status("projector")
        assert status.aggregates_behind == 900

    async def test_of_one_that_has_done_all(self, store: Store) -> None:
        await bury(store, "projector", 2)
        (status,) = await store.subscriptions.status()
        assert (status.events_behind, status.aggregates_behind) == (0, 0)
        assert (status.dead_letters, status.oldest) == (2, None)

    async def test_wait_until_caught_up(self, store: Store) -> None:
        await fill(store, 300, 2)
        async with store.subscribe("projector", "orders") as sub:
            with pytest.raises(StillBehind, match="nowhere yet"):
                await sub.wait_until_caught_up(timeout=0.05)
            waiting = asyncio.ensure_future(sub.wait_until_caught_up(timeout=SECONDS))
            await handle(sub, 600)
            await waiting
            await store.subscriptions.wait_until_caught_up("projector", "orders", timeout=0)

    async def test_wait_for_a_position(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders") as sub:
            waiting = asyncio.ensure_future(store.positions.wait("projector", order, 1))
            await store.events.append(order, numbered(2), expected=NEW)
            await handle(sub, 1)
            with pytest.raises(StillBehind, match="at 0"):
                await store.positions.wait("projector", order, 1, timeout=0.02)
            assert not waiting.done()
            await handle(sub, 1)
            await waiting

    async def test_reset_to_the_first(self, store: Store) -> None:
        places = await bury(store, "projector", 250)
        async with store.subscribe("projector", "orders", sweep=SOON) as sub:
            await store.subscriptions.reset("projector", "orders")
            seen = await handle(sub, 750)
            assert sorted(seen) == sorted((p.root, n) for p in places for n in range(3))
            assert await nothing_comes(sub)
        assert await listed(store.subscriptions.dead_letters("projector")) == []

    async def test_reset_refuses_what_is_in_progress(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("projector", "orders", sweep=SOON) as sub:
            await handle(sub, 2)
            (delivery,) = await take(sub)
            await store.subscriptions.reset("projector", "orders")
            with pytest.raises(LeaseLost):
                await delivery.ack()
            assert [n for _, n in await handle(sub, 3)] == [0, 1, 2]

    async def test_reset_to_a_moment(self, store: Store, order: Aggregate) -> None:
        times = [datetime(2020, 1, day, tzinfo=UTC) for day in (1, 2, 5, 3, 6)]
        await store.events.append(order, [Event("T", 0, time=t) for t in times], expected=NEW)
        other = Aggregate("orders", "other")
        await store.events.append(other, [Event("T", 0, time=times[0])], expected=NEW)
        for handler, moment, due in (("a", times[2], [2, 3, 4]), ("b", times[3], [2, 3, 4])):
            async with store.subscribe(handler, "orders", start=moment, sweep=SOON) as sub:
                assert [n for _, n in await handle(sub, 3)] == due
                assert await nothing_comes(sub)
                await store.subscriptions.reset(handler, "orders", to=times[4])
                assert [n for _, n in await handle(sub, 1)] == [4]
                await store.subscriptions.reset(handler, "orders", to=NOW)
                assert await nothing_comes(sub)

    async def test_from_a_moment_beyond_the_end(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        async with store.subscribe("projector", "orders", start=tomorrow, sweep=SOON) as sub:
            assert await nothing_comes(sub)
            await store.events.append(order, numbered(1, 2), expected=2)
            await store.events.append(Aggregate("orders", "new"), numbered(1), expected=NEW)
            assert sorted(await handle(sub, 2)) == sorted([(order.root, 2), ("new", 0)])

    async def test_two_versions_side_by_side(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with (
            store.subscribe("projector", "orders") as old,
            store.subscribe("projector-2", "orders") as new,
        ):
            assert await handle(old, 2) == await handle(new, 2)


class TestHandlers:
    async def test_functions_get_events(self, store: Store) -> None:
        places = await fill(store, 20, 5)
        seen: defaultdict[str, list[int]] = defaultdict(list)
        at_once = most = 0

        @store.handler("projector", "orders", concurrency=3, sweep=SOON)
        async def project(event: RecordedEvent) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0)
            at_once -= 1
            seen[event.aggregate.root].append(event.sequence)

        @store.handler("counter", None)
        async def count(event: RecordedEvent) -> None:
            seen["all"].append(event.sequence)

        task = asyncio.ensure_future(store.run_handlers())
        await eventually(lambda: sum(map(len, seen.values())) == 200, "all were handled")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(seen[place.root] == list(range(5)) for place in places)
        assert (most, len(seen["all"])) == (3, 100)

    async def test_what_fails_is_tried_again(self, store: Store, order: Aggregate) -> None:
        tries: list[int] = []

        @store.handler("projector", "orders", retries=1)
        async def project(event: RecordedEvent) -> None:
            tries.append(event.sequence)
            if event.sequence == 0:
                raise RuntimeError("secret")

        await store.events.append(order, numbered(2), expected=NEW)
        task = asyncio.ensure_future(store.run_handlers())
        await eventually(lambda: at(store, order, 1), "it goes on")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert tries == [0, 0, 1]
        (letter,) = await listed(store.subscriptions.dead_letters("projector"))
        assert (letter.reason, letter.attempts) == ("RuntimeError", 2)

    async def test_a_signal_lets_them_finish(self, store: Store, order: Aggregate) -> None:
        started, finished = asyncio.Event(), asyncio.Event()

        @store.handler("projector", "orders")
        async def project(event: RecordedEvent) -> None:
            started.set()
            await asyncio.sleep(0.1)
            finished.set()

        await store.events.append(order, numbered(2), expected=NEW)
        task = asyncio.ensure_future(store.run_handlers())
        await started.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            await task
        assert finished.is_set()
        assert await store.positions.get("projector", order) == 0

    async def test_a_cancelled_one_is_given_back(self, store: Store, order: Aggregate) -> None:
        started = asyncio.Event()

        @store.handler("projector", "orders")
        async def project(event: RecordedEvent) -> None:
            started.set()
            await asyncio.Event().wait()

        await store.events.append(order, numbered(1), expected=NEW)
        task = asyncio.ensure_future(store.run_handlers())
        await started.wait()
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(task, return_exceptions=True)
        async with store.subscribe("projector", "orders") as sub:
            assert [n for _, n in await handle(sub, 1)] == [0]

    async def test_an_event_whose_lease_was_lost_comes_again(
        self,
        server: Server,
        store: Store,
        order: Aggregate,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        seen: list[int] = []

        @store.handler("projector", "orders", concurrency=1, lease=0.3, sweep=SOON)
        async def project(event: RecordedEvent) -> None:
            if not seen:
                with server.client() as client:
                    client.delete(store._keys.lease("projector", order))
            seen.append(event.sequence)

        await store.events.append(order, numbered(2), expected=NEW)
        task = asyncio.ensure_future(store.run_handlers())
        await eventually(lambda: at(store, order, 1), "it goes on")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert seen == [0, 0, 1]
        (record,) = [one for one in caplog.records if one.name == running.__name__]
        assert record.getMessage() == str(LeaseLost("projector", order, 0))

    async def test_the_error_of_an_ack_is_not_lost(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("a mistake in the driver")

        store.handler("projector", "orders", sweep=SOON)(AsyncMock())
        await fill(store, 20, 1)
        monkeypatch.setattr(Worklist, "send_ack", fail)
        async with asyncio.timeout(5):  # half of what leaving waits for what is in progress
            with pytest.raises(ExceptionGroup) as found:
                await store.run_handlers()
        assert found.group_contains(RuntimeError, match="a mistake in the driver")

    def test_bad_options(self, store: Store) -> None:
        with pytest.raises(InvalidValue):
            store.handler("projector", "orders", concurrency=0)
        with pytest.raises(InvalidValue):
            store.handler("projector", "orders", lease=0)
