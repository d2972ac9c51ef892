"""Deliveries of several aggregates at once, and what one call does for many aggregates."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest

import asyncstore
from asyncstore import (
    NEW,
    Aggregate,
    Bundle,
    Event,
    LeaseLost,
    Store,
    StoreUnavailable,
    Subscription,
    UnexpectedReply,
    feeding,
)
from asyncstore.feeding import Pace
from asyncstore.router import Router
from asyncstore.scripts import LEASE, Script
from asyncstore.worklist import Worklist
from tests.builders import numbered, roots_of_one_slot, sequences
from tests.polling import eventually
from tests.servers import Server, rewrite_member

SECONDS = 20


async def fill(store: Store, roots: int, events: int) -> list[Aggregate]:
    """Aggregates that are in one slot on a cluster, so that one call is for all of them."""
    places = [Aggregate("orders", root) for root in roots_of_one_slot(roots)]
    await asyncio.gather(*(store.events.append(p, numbered(events), expected=NEW) for p in places))
    return places


async def take(sub: Subscription, least: int = 1) -> Bundle:
    """The next bundle, once that many aggregates are there."""
    await eventually(lambda: len(sub._worker._ready) >= least, "they are leased")
    async with asyncio.timeout(SECONDS):
        return await anext(sub.bundles())


async def positions(store: Store, places: list[Aggregate]) -> list[int | None]:
    return [await store.positions.get("projector", place) for place in places]


async def test_all_come_in_order(store: Store) -> None:
    places = await fill(store, 30, 5)
    seen: defaultdict[str, list[int]] = defaultdict(list)
    async with (
        asyncio.timeout(SECONDS),
        store.subscribe("projector", "orders", batch=12) as sub,
    ):
        async for bundle in sub.bundles():
            assert 0 < len(bundle.events) <= 12
            for event in bundle.events:
                seen[event.aggregate.root].append(event.sequence)
            await bundle.ack()
            if sum(map(len, seen.values())) == 150:
                break
    assert seen == {place.root: list(range(5)) for place in places}
    assert await positions(store, places) == [4] * 30


async def test_whole_aggregates_as_far_as_there_is_room(store: Store) -> None:
    await fill(store, 5, 3)
    async with store.subscribe("projector", "orders", batch=7) as sub:
        bundle = await take(sub, 5)
        assert [len(delivery.events) for delivery in bundle.deliveries] == [3, 3]
        assert "2 aggregates, 6 events" in repr(bundle)


async def test_one_that_was_refused_comes_again(store: Store) -> None:
    places = await fill(store, 4, 2)
    async with store.subscribe("projector", "orders") as sub:
        bundle = await take(sub, 4)
        refused = bundle.deliveries[1]
        await refused.nack()
        await bundle.ack()
        await bundle.ack()  # changes nothing
        again = await take(sub)
        assert again.events == refused.events
        assert again.deliveries[0].attempt == 2
        await again.ack()
    assert await positions(store, places) == [1] * 4


async def test_one_that_was_lost_keeps_no_other_back(store: Store) -> None:
    places = await fill(store, 4, 2)
    async with store.subscribe("projector", "orders") as sub:
        bundle = await take(sub, 4)
        lost = bundle.deliveries[2].event.aggregate
        await store.events.delete(lost)
        with pytest.raises(LeaseLost) as caught:
            await bundle.ack()
        assert caught.value.aggregate == lost
        with pytest.raises(LeaseLost):
            await bundle.ack()
    wanted = [None if place == lost else 1 for place in places]
    assert await positions(store, places) == wanted


async def test_one_whose_keys_are_broken_keeps_no_other_back(server: Server, store: Store) -> None:
    places = await fill(store, 4, 2)
    with server.client() as client:
        wrong = store._keys.position("projector", places[0])
        client.hset(wrong, "a", "b")
        async with store.subscribe("projector", "orders") as sub:
            bundle = await take(sub, 3)
            broken = bundle.deliveries[1].event.aggregate
            key = store._keys.lease("projector", broken)
            client.delete(key)
            client.set(key, "none")
            with pytest.raises(UnexpectedReply):
                await bundle.ack()
            found = await positions(store, places[1:])
            assert sorted(map(str, found)) == ["1", "1", "None"]
            assert client.hgetall(wrong) == {b"a": b"b"}


async def test_acks_of_one_aggregate_in_one_turn(store: Store, order: Aggregate) -> None:
    await store.events.append(order, numbered(3), expected=NEW)
    async with store.subscribe("projector", "orders") as sub:
        (delivery,) = (await take(sub)).deliveries
        await asyncio.gather(delivery.ack(through=1), delivery.ack(through=0))
        assert await store.positions.get("projector", order) == 1
        await asyncio.gather(delivery.ack(), delivery.ack())
    assert await store.positions.get("projector", order) == 2


async def test_on_another_edition(store: Store) -> None:
    """What is left of each is seen across its divergence: leases are for two events here."""
    places = [Aggregate("orders", root, "trial") for root in roots_of_one_slot(4)]
    for number, place in enumerate(places):
        await store.events.append(Aggregate("orders", place.root), numbered(4), expected=NEW)
        await store.events.append(place, numbered(1), expected=1 + number)  # diverges there
    seen: defaultdict[str, list[int]] = defaultdict(list)
    async with store.subscribe("projector", "orders", edition="trial", batch=2) as sub:
        await eventually(lambda: len(sub._worker._ready) == 4, "they are leased")
        while sum(map(len, seen.values())) < 14:
            async with asyncio.timeout(SECONDS):
                deliveries = [await anext(sub) for _ in range(min(4, len(sub._worker._ready) or 1))]
            for delivery in deliveries:
                seen[delivery.event.aggregate.root].append(delivery.event.sequence)
            await asyncio.gather(*(delivery.ack() for delivery in deliveries))
    assert seen == {place.root: list(range(2 + n)) for n, place in enumerate(places)}
    assert await positions(store, places) == [1, 2, 3, 4]


async def test_acks_leave_together_or_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one turn in one call; those that come one by one do not wait for the turn's end."""
    left: list[int] = []
    send = Router.send

    def spy(router: Router, script: Script, *call: Any, **how: Any) -> None:
        if script is not LEASE:
            left.append(len(call[-1]))
        send(router, script, *call, **how)

    monkeypatch.setattr(Router, "send", spy)
    await fill(store, 8, 2)
    async with store.subscribe("projector", "orders") as sub:
        deliveries = (await take(sub, 8)).deliveries
        await asyncio.gather(*(delivery.ack(through=0) for delivery in deliveries))
        assert left == [8]
        await deliveries[0].ack()
        acks = [asyncio.ensure_future(delivery.ack()) for delivery in deliveries[1:]]
        await asyncio.sleep(0)
        assert left == [8, 1, 1]
        await asyncio.gather(*acks)
        assert left == [8, 1, 1, 6]


async def test_large_events_are_leased_in_several_calls(store: Store) -> None:
    places = [Aggregate("orders", root) for root in roots_of_one_slot(6)]
    for place in places:
        large = [Event("Large", "x" * 300_000) for _ in range(2)]
        await store.events.append(place, large, expected=NEW)
    found: set[Aggregate] = set()
    async with asyncio.timeout(SECONDS), store.subscribe("projector", "orders") as sub:
        while len(found) < 6:
            bundle = await take(sub)
            found |= {event.aggregate for event in bundle.events}
            await bundle.ack()
    assert found == set(places)


async def test_an_event_that_can_not_be_read_is_passed_over_though_that_was_not_said(
    server: Server, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker must not hold its aggregate for ever."""
    await store.events.append(order, numbered(3), expected=NEW)
    rewrite_member(server, store._keys.events(order), 1, lambda _: b"[1,broken")

    async def fail(*_: Any) -> str:
        raise StoreUnavailable("here", "it is away")

    monkeypatch.setattr(Worklist, "nack", fail)
    async with (
        asyncio.timeout(SECONDS),
        store.subscribe("projector", "orders", lease=0.3, retries=0) as sub,
    ):
        first = await anext(sub)
        await first.ack()
        second = await anext(sub)
        assert sequences(second.events) == [2]


def test_the_pace_goes_by_how_long_they_wait() -> None:
    pace = Pace()
    least = pace.ahead
    for _ in range(1000):
        pace.took(0.0)
    most = pace.ahead
    pace.took(0.2)
    assert pace.ahead == most > least
    pace.took(3.0)
    assert pace.ahead < most
    for _ in range(9):
        pace.took(3.0)
    assert pace.ahead == least


async def test_what_waits_for_a_slow_handler_is_given_to_others(
    server: Server, prefix: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(store, 120, 1)
    slow = store.subscribe("projector", "orders")
    slow._worker._pace.ahead = 64
    async with slow, asyncstore.open(server.url, key_prefix=prefix) as own:
        await eventually(lambda: len(slow._worker._ready) == 64, "it has leased ahead")
        monkeypatch.setattr(feeding, "_LONG_WAIT", 0.0)
        held = [await anext(slow) for _ in range(2)]
        assert len(slow._worker._ready) == slow._worker._pace.ahead == 16
        async with asyncio.timeout(SECONDS), own.subscribe("projector", "orders") as other:
            for _ in range(120 - len(held) - 16):
                await (await anext(other)).ack()
        for delivery in held:
            await delivery.ack()


async def test_what_was_given_up_comes_again(store: Store, order: Aggregate) -> None:
    await store.events.append(order, numbered(1), expected=NEW)
    async with (
        asyncio.timeout(SECONDS),
        store.subscribe("projector", "orders", lease=0.2) as sub,
    ):
        given_up = await anext(sub)
        sub.give_up(given_up)
        again = await anext(sub)
        assert (again.event, again.attempt) == (given_up.event, 2)
        await again.ack()
        with pytest.raises(LeaseLost):
            await given_up.ack()
