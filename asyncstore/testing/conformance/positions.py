"""What every server must do with positions."""

from __future__ import annotations

import asyncio

from asyncstore import Aggregate, Store
from asyncstore.testing.conformance import needs

pytestmark = needs("positions")


async def test_unknown_is_none(store: Store, order: Aggregate) -> None:
    assert await store.positions.get("projector", order) is None


async def test_zero_is_a_position(store: Store, order: Aggregate) -> None:
    await store.positions.put("projector", order, 0)
    assert await store.positions.get("projector", order) == 0


async def test_put_goes_anywhere(store: Store, order: Aggregate) -> None:
    for sequence in (41, 7, 2**53 - 1):
        await store.positions.put("projector", order, sequence)
        assert await store.positions.get("projector", order) == sequence


async def test_advance_never_goes_back(store: Store, order: Aggregate) -> None:
    assert await store.positions.advance("projector", order, 5) is True
    assert await store.positions.advance("projector", order, 4) is False
    assert await store.positions.advance("projector", order, 5) is False
    assert await store.positions.get("projector", order) == 5
    assert await store.positions.advance("projector", order, 10) is True
    assert await store.positions.get("projector", order) == 10


async def test_concurrent_advances_end_at_the_highest(store: Store, order: Aggregate) -> None:
    await asyncio.gather(*(store.positions.advance("p", order, n) for n in range(50, 0, -1)))
    assert await store.positions.get("p", order) == 50


@needs("editions")
async def test_apart_by_handler_domain_edition_and_root(store: Store, order: Aggregate) -> None:
    places = [
        ("a", order),
        ("b", order),
        ("a", Aggregate("carts", order.root)),
        ("a", order.on("what-if")),
        ("a", Aggregate("orders", "other")),
    ]
    for n, (handler, aggregate) in enumerate(places):
        await store.positions.put(handler, aggregate, n)
    assert [await store.positions.get(*place) for place in places] == [0, 1, 2, 3, 4]
