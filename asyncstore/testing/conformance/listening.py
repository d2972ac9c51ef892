"""What every server must do for those who listen."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Event,
    Listener,
    ListenerLagged,
    RecordedEvent,
    Store,
    StoreClosed,
)
from asyncstore.testing.builders import numbered, sequences
from asyncstore.testing.conformance import needs

SECONDS = 20

pytestmark = needs("listening")


async def taken(live: Listener, count: int) -> list[RecordedEvent]:
    """The next events, as many as that."""
    async with asyncio.timeout(SECONDS):
        return [await anext(live) for _ in range(count)]


async def test_what_is_appended_is_heard(store: Store, order: Aggregate) -> None:
    async with store.listen("orders") as live:
        await store.events.append(order, numbered(3), expected=NEW)
        assert await taken(live, 3) == await store.events.read(order)


async def test_nobody_has_to_listen(store: Store, order: Aggregate) -> None:
    await store.events.append(order, numbered(3), expected=NEW)
    async with store.listen("orders") as live:
        await store.events.append(order, numbered(1, 3), expected=3)
        assert sequences(await taken(live, 1)) == [3]


@needs("correlation", "idempotency")
async def test_all_that_belongs_to_an_event_is_exact(store: Store, order: Aggregate) -> None:
    async with store.listen("orders") as live:
        await store.events.append(
            order,
            [Event("Seen", bytes(range(256)), metadata={"user": "ü"})],
            expected=NEW,
            correlation_id="checkout ☃",
            idempotency_key="k",
        )
        (event,) = await taken(live, 1)
    assert (event.data, event.metadata) == (bytes(range(256)), {"user": "ü"})
    assert (event.correlation_id, event.idempotency_key) == ("checkout ☃", "k")
    assert event.aggregate == order


async def test_several_listeners_each_get_each_event(store: Store, order: Aggregate) -> None:
    async with store.listen("orders") as one, store.listen("orders") as two, store.listen() as all_:
        await store.events.append(order, numbered(2), expected=NEW)
        for live in (one, two, all_):
            assert sequences(await taken(live, 2)) == [0, 1]


@needs("editions")
async def test_by_domain_edition_and_type(store: Store, order: Aggregate) -> None:
    cart = Aggregate("carts", order.root)
    async with (
        store.listen() as main,
        store.listen("orders") as orders,
        store.listen(edition="quiet") as quiet,
        store.listen(edition=None) as editions,
        store.listen(types=["Paid"]) as paid,
    ):
        await store.events.append(order, [Event("Placed", 1), Event("Paid", 2)], expected=NEW)
        await store.events.append(cart, [Event("Filled", 3)], expected=NEW)
        await store.events.append(order.on("quiet"), [Event("Asked", 4)], expected=1)
        await store.events.append(order, [Event("Paid", 5)], expected=2)
        heard = [
            [event.data for event in await taken(live, count)]
            for live, count in ((main, 4), (orders, 3), (quiet, 1), (editions, 5), (paid, 2))
        ]
    assert heard == [[1, 2, 3, 5], [1, 2, 5], [4], [1, 2, 3, 4, 5], [2, 5]]


async def test_by_root(store: Store) -> None:
    async with store.listen("orders", root="1") as live:
        for root in ("11", "1", "21"):  # in one ring, or not
            await store.events.append(Aggregate("orders", root), numbered(1), expected=NEW)
        await store.events.append(Aggregate("orders", "1"), numbered(1, 1), expected=1)
        assert {event.aggregate.root for event in await taken(live, 2)} == {"1"}
        async with store.listen("orders", root="11") as other:
            await asyncio.gather(
                *(
                    store.events.append(Aggregate("orders", root), numbered(1), expected=ANY)
                    for root in ("1", "11", "111")
                )
            )
            assert (await taken(other, 1))[0].aggregate.root == "11"


async def test_order_per_aggregate_and_none_lost(store: Store) -> None:
    places = [Aggregate("orders", uuid.uuid4()) for _ in range(40)]

    async def write(place: Aggregate) -> None:
        for n in range(25):
            await store.events.append(place, numbered(1, n), expected=n)

    async with store.listen("orders") as live:
        await asyncio.gather(*map(write, places))
        events = await taken(live, 40 * 25)
    for place in places:
        assert sequences(e for e in events if e.aggregate == place) == list(range(25))


async def test_long_roots_and_large_appends(store: Store) -> None:
    places = [Aggregate("orders", "é" * 250 + f"{n:02}") for n in range(40)]
    async with store.listen("orders") as live:
        await asyncio.gather(*(store.events.append(p, numbered(1), expected=NEW) for p in places))
        assert {event.aggregate for event in await taken(live, 40)} == set(places)
        await store.events.append(places[0], numbered(3000, 1), expected=1)
        assert sequences(await taken(live, 3000)) == list(range(1, 3001))


async def test_what_was_not_stored_is_not_heard(store: Store, order: Aggregate) -> None:
    async with store.listen("orders") as live:
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="k")
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="k")
        with suppress(asyncstore.SequenceConflict):
            await store.events.append(order, numbered(1), expected=7)
        await store.events.append(order, numbered(1, 1), expected=ANY)
        assert [event.data for event in await taken(live, 2)] == [{"n": 0}, {"n": 1}]


async def test_a_slow_listener_is_told_how_much_it_missed(store: Store, order: Aggregate) -> None:
    async with store.listen("orders", buffer=5) as live:
        for n in range(9):
            await store.events.append(order, numbered(1, n), expected=n)
        async with store.listen("orders") as other:  # has come after what was said before
            await store.events.append(order, numbered(1, 9), expected=9)
            await taken(other, 1)
        assert sequences(await taken(live, 5)) == [0, 1, 2, 3, 4]
        with pytest.raises(ListenerLagged, match="5 events were passed over") as lagged:
            await taken(live, 1)
        assert lagged.value.missed == 5
        await store.events.append(order, numbered(1, 10), expected=10)
        assert sequences(await taken(live, 1)) == [10]


async def test_deleted_before_it_was_read(store: Store, order: Aggregate) -> None:
    other = Aggregate("orders", "other")
    async with store.listen("orders") as live:
        await store.events.append(order, numbered(2), expected=NEW)
        await store.events.delete(order)
        await store.events.append(other, numbered(1), expected=NEW)
        (event,) = await taken(live, 1)
    assert event.aggregate == other


async def test_a_cancelled_wait_loses_nothing(store: Store, order: Aggregate) -> None:
    async with store.listen("orders") as live:
        for n in range(20):
            waiting = asyncio.ensure_future(anext(live))
            for _ in range(n % 4):
                await asyncio.sleep(0)
            append = asyncio.ensure_future(store.events.append(order, numbered(1, n), expected=n))
            for _ in range(n):
                await asyncio.sleep(0)
            waiting.cancel()
            await append
            with suppress(asyncio.CancelledError):
                assert (await waiting).sequence == n
                continue
            assert sequences(await taken(live, 1)) == [n]


async def test_leaving_ends_those_who_wait(store: Store) -> None:
    async with store.listen("orders") as live:
        waiting = [asyncio.ensure_future(anext(live, None)) for _ in range(3)]
        await asyncio.sleep(0)
    async with asyncio.timeout(SECONDS):
        assert await asyncio.gather(*waiting) == [None, None, None]


async def test_outside_of_async_with(store: Store) -> None:
    live = store.listen()
    with pytest.raises(StoreClosed):
        await anext(live)
    async with live:
        pass
    with pytest.raises(StoreClosed):
        async with live:
            pass
    with pytest.raises(StoreClosed):
        async with asyncstore.Store(store.settings).listen():
            pass
