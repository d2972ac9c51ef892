"""How to test an application: a store for each test, known times, and a network that fails.

pytest examples/testing
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

import asyncstore
from asyncstore import Aggregate, Event, Settings, Store
from asyncstore.testing import Clock, Cut, fault_proxy, history, sequences

ORDER = Aggregate("orders", "8f1c")
PAID_AT = datetime(2024, 2, 29, 12, tzinfo=UTC)

# The application. It asks its clock for the time of its events, and so a test can say what it is.

DEADLINE = timedelta(days=14)


def now() -> datetime:
    return datetime.now(UTC)


async def refund(store: Store, order: Aggregate, clock: Callable[[], datetime] = now) -> bool:
    """Give an order back: once, within two weeks."""
    events = await store.events.read(order)
    moment, last = clock(), events[-1]
    if last.type != "OrderPaid" or moment - last.time > DEADLINE:
        return False
    event = Event("OrderRefunded", {}, time=moment)
    await store.events.append(order, [event], expected=len(events))
    return True


# Its tests.


@pytest.fixture
def clock() -> Clock:
    return Clock(PAID_AT)


async def paid(store: Store, clock: Clock) -> None:
    await history(store, ORDER, [Event("OrderPlaced", {}), Event("OrderPaid", {})], clock=clock)


@pytest.mark.asyncio
@pytest.mark.parametrize(("days", "is_refunded"), [(0, True), (14, True), (15, False)])
async def test_within_two_weeks(
    event_store: Store, clock: Clock, days: int, is_refunded: bool
) -> None:
    await paid(event_store, clock)
    clock.advance(timedelta(days=days))
    assert await refund(event_store, ORDER, clock) is is_refunded
    last = (await event_store.events.read(ORDER))[-1]
    assert (last.type == "OrderRefunded") is is_refunded
    assert last.time == (clock.now if is_refunded else PAID_AT)


@pytest.mark.asyncio
async def test_once_though_the_answer_is_lost(event_store_settings: Settings, clock: Clock) -> None:
    where = event_store_settings
    async with (
        fault_proxy(str(where.url)) as proxy,
        asyncstore.open(proxy.url, key_prefix=where.key_prefix) as store,
    ):
        await paid(store, clock)
        proxy.requests.cut(Cut.AFTER, having=b"OrderRefunded")
        assert await refund(store, ORDER, clock)
        assert proxy.cuts == 1
        assert not await refund(store, ORDER, clock)
        assert sequences(await store.events.read(ORDER)) == [0, 1, 2]
