"""What every server must do with snapshots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from asyncstore import Aggregate, Retention, Store
from asyncstore.testing.conformance import needs

PERSIST, TRANSIENT = Retention.PERSIST, Retention.TRANSIENT

pytestmark = needs("snapshots")


async def at(store: Store, order: Aggregate, sequence: int | None = None) -> int | None:
    snapshot = await store.snapshots.get(order, at=sequence)
    return None if snapshot is None else snapshot.sequence


async def test_unknown_is_none(store: Store, order: Aggregate) -> None:
    assert await store.snapshots.get(order) is None
    assert await store.snapshots.get(order, at=5) is None


@pytest.mark.parametrize(
    "state",
    [None, 0, "", {"deep": [{"er": 1.25}]}, b"", b"\x00\n\xff", b"x" * 100_000, "y" * 100_000],
    ids=lambda state: repr(state)[:20],
)
async def test_state_comes_back(store: Store, order: Aggregate, state: object) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    await store.snapshots.put(order, sequence=5, state=state)
    snapshot = await store.snapshots.get(order)
    assert snapshot is not None
    assert (snapshot.sequence, snapshot.retention) == (5, Retention.DEFAULT)
    assert snapshot.state == state
    assert type(snapshot.state) is type(state)
    assert before < snapshot.time < datetime.now(UTC) + timedelta(seconds=1)
    # The same, once it is an older one.
    await store.snapshots.put(order, sequence=6, state="newer")
    assert (await store.snapshots.get(order, at=5)) == snapshot


async def test_the_newest_wins(store: Store, order: Aggregate) -> None:
    for sequence in (1, 5, 10, 20, 50):
        await store.snapshots.put(order, sequence=sequence, state=sequence)
        assert await at(store, order) == sequence


@pytest.mark.parametrize("retention", list(Retention))
async def test_an_older_one_never_becomes_the_newest(
    store: Store, order: Aggregate, retention: Retention
) -> None:
    await store.snapshots.put(order, sequence=15, state="new", retention=retention)
    await store.snapshots.put(order, sequence=5, state="old", retention=retention)
    assert await at(store, order) == 15


async def test_the_same_sequence_is_replaced(store: Store, order: Aggregate) -> None:
    await store.snapshots.put(order, sequence=5, state="first", retention=PERSIST)
    await store.snapshots.put(order, sequence=5, state="second")
    snapshot = await store.snapshots.get(order)
    assert snapshot is not None
    assert (snapshot.state, snapshot.retention) == ("second", Retention.DEFAULT)


@pytest.mark.parametrize("retention", [Retention.DEFAULT, PERSIST])
async def test_the_same_sequence_of_an_older_one_is_replaced_too(
    store: Store, order: Aggregate, retention: Retention
) -> None:
    await store.snapshots.put(order, sequence=10, state=None)
    await store.snapshots.put(order, sequence=3, state="first", retention=PERSIST)
    await store.snapshots.put(order, sequence=3, state="second", retention=retention)
    snapshot = await store.snapshots.get(order, at=3)
    assert snapshot is not None
    assert (snapshot.state, snapshot.retention) == ("second", retention)


async def test_kept_ones_answer_for_their_time(store: Store, order: Aggregate) -> None:
    await store.snapshots.put(order, sequence=5, state="five", retention=PERSIST)
    await store.snapshots.put(order, sequence=10, state="ten", retention=PERSIST)
    answers = [await at(store, order, sequence) for sequence in (4, 5, 7, 10, 99)]
    assert answers == [None, 5, 5, 10, 10]


async def test_kept_ones_stay_however_many_follow(store: Store, order: Aggregate) -> None:
    await store.snapshots.put(order, sequence=3, state="kept", retention=PERSIST)
    for sequence in range(4, 40):
        await store.snapshots.put(order, sequence=sequence, state=None)
    assert await at(store, order, 30) == 3
    await store.snapshots.put(order, sequence=1, state="late, and kept", retention=PERSIST)
    assert await at(store, order, 2) == 1
    assert await at(store, order) == 39


async def test_transient_ones_go_in_the_same_step(store: Store, order: Aggregate) -> None:
    await store.snapshots.put(order, sequence=5, state=None, retention=TRANSIENT)
    assert await at(store, order, 7) == 5
    await store.snapshots.put(order, sequence=10, state=None)
    assert await at(store, order, 7) is None
    await store.snapshots.put(order, sequence=8, state=None, retention=TRANSIENT)
    assert await at(store, order, 9) is None


async def test_the_three_newest_default_ones_stay(store: Store, order: Aggregate) -> None:
    for sequence in (10, 20, 30, 40, 50):
        await store.snapshots.put(order, sequence=sequence, state=None)
    answers = [await at(store, order, sequence) for sequence in (29, 30, 45, 50)]
    assert answers == [None, 30, 40, 50]


async def test_delete_then_anew(store: Store, order: Aggregate) -> None:
    await store.snapshots.delete(order)
    for sequence in (1, 2, 3):
        await store.snapshots.put(order, sequence=sequence, state=None, retention=PERSIST)
    await store.snapshots.delete(order)
    assert [await at(store, order, sequence) for sequence in (None, 1, 3)] == [None, None, None]
    await store.snapshots.put(order, sequence=0, state="anew")
    assert await at(store, order) == 0


@needs("editions")
async def test_apart_by_root_domain_and_edition(store: Store, order: Aggregate) -> None:
    places = [order, Aggregate("orders", "other"), Aggregate("carts", order.root), order.on("x")]
    for n, place in enumerate(places):
        await store.snapshots.put(place, sequence=n, state=None)
    assert [await at(store, place) for place in places] == [0, 1, 2, 3]
    await store.snapshots.delete(order)
    assert [await at(store, place) for place in places] == [None, 1, 2, 3]
