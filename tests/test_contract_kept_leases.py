"""A worker keeps the lease of a busy aggregate for a moment: what comes next is delivered as it is
heard, with no call in between. Runs on each server of the matrix."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Delivery,
    Event,
    LeaseLost,
    Store,
    StoreUnavailable,
    Subscription,
    keeping,
)
from asyncstore.deliveries import Step
from asyncstore.doorbell import Ring
from asyncstore.keys import Keys
from asyncstore.worker import Worker
from asyncstore.worklist import Worklist
from tests.builders import numbered, sequences
from tests.polling import eventually
from tests.servers import Server

if TYPE_CHECKING:
    from asyncstore.wire import Reply

SECONDS = 20
SOON = 0.05


async def take(sub: Subscription) -> Delivery:
    async with asyncio.timeout(SECONDS):
        return await anext(sub)


async def handle(store: Store, sub: Subscription, place: Aggregate, count: int) -> None:
    """Append events one by one, each when the one before was handled."""
    for _ in range(count):
        done = await store.events.append(place, numbered(1), expected=ANY)
        delivery = await take(sub)
        assert (delivery.event.aggregate, delivery.event.sequence) == (place, done.last_sequence)
        await delivery.ack()


async def ack_next(sub: Subscription, *sequences: int) -> None:
    """Ack the next deliveries, which are of these sequences."""
    for sequence in sequences:
        delivery = await take(sub)
        assert delivery.event.sequence == sequence
        await delivery.ack()


async def append_unheard(store: Store, place: Aggregate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Append an event of which nobody is told."""
    with monkeypatch.context() as deaf:
        deaf.setattr(Keys, "live", lambda *_: "")
        await store.events.append(place, numbered(1), expected=ANY)


def is_kept(sub: Subscription, place: Aggregate) -> bool:
    held = sub._worker._held.get(place)
    return held is not None and held in sub._worker._kept


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are kept for a moment that tests can wait for."""
    monkeypatch.setattr(keeping, "SOON", SOON)


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are kept until something happens."""
    monkeypatch.setattr(keeping, "SOON", 1000.0)


@pytest.mark.usefixtures("long")
class TestKept:
    async def test_what_comes_next_needs_no_lease(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            assert is_kept(sub, order)
            monkeypatch.setattr(Worklist, "ask", None)  # whoever calls it fails
            await handle(store, sub, order, 3)
            await store.events.append(order, numbered(3), expected=5)
            async for delivery in sub.batches():
                assert sequences(delivery.events) == [5, 6, 7]
                assert (delivery.attempt, delivery.token) == (1, 2)
                await delivery.ack()
                break
        assert await store.positions.get("projector", order) == 7

    async def test_the_event_is_the_one_that_is_read(self, store: Store, order: Aggregate) -> None:
        data = b"\0\n\n1 2\n[3,"
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            await store.events.append(
                order, [Event("Seen", data, metadata={"a": 1})], expected=ANY, correlation_id="c"
            )
            delivery = await take(sub)
            assert delivery.events == await store.events.read(order, start=2)
            assert delivery.event.data == data
            await delivery.ack()

    async def test_while_it_is_handled(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("projector", "orders") as sub:
            first = await take(sub)
            monkeypatch.setattr(Worklist, "ask", None)
            await store.events.append(order, numbered(2), expected=1)
            held = first._held
            await eventually(lambda: held.leased.through == 2, "it has heard of them")
            await first.ack()
            await ack_next(sub, 1, 2)

    async def test_of_an_aggregate_that_is_seldom_busy_none_is(
        self, store: Store, order: Aggregate
    ) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 1)
            assert not is_kept(sub, order)
            assert order not in sub._worker._held

    async def test_too_much_for_a_ring_is_leased(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            large = Event("Large", "x" * 5000)
            await store.events.append(order, [large], expected=2)
            delivery = await take(sub)
            assert (delivery.event.data, delivery.token) == (large.data, 3)
            await delivery.ack()
            await handle(store, sub, order, 1)

    async def test_more_than_a_batch_is_leased(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders", batch=2) as sub:
            await handle(store, sub, order, 2)
            await store.events.append(order, numbered(3), expected=2)
            await ack_next(sub, 2, 3, 4)

    async def test_types(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders", types=["Counted"]) as sub:
            await handle(store, sub, order, 2)
            await store.events.append(order, [Event("Other", 1)], expected=2)
            await store.positions.wait("projector", order, 2, timeout=SECONDS)
            await handle(store, sub, order, 2)
            assert is_kept(sub, order)
        assert await store.positions.get("projector", order) == 4

    async def test_what_is_not_wanted_and_comes_before_the_answer_to_the_ack(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        acked = Worker._acked
        heard = asyncio.Event()

        async def late(worker: Worker, step: Step, outcome: str) -> None:
            await heard.wait()
            await acked(worker, step, outcome)

        async with store.subscribe("projector", "orders", types=["Counted"], sweep=1000) as sub:
            for end in (2, 4):  # of the first the lease is given back, of the second it is kept
                heard.clear()
                await store.events.append(order, numbered(1), expected=ANY)
                delivery = await take(sub)
                monkeypatch.setattr(Worker, "_acked", late)
                acking = asyncio.ensure_future(delivery.ack())
                await store.positions.wait("projector", order, end - 2, timeout=SECONDS)
                await store.events.append(order, [Event("Other", 1)], expected=end - 1)
                held = delivery._held
                await eventually(
                    lambda held=held, at=end - 1: held.leased.through == at,  # type: ignore[misc]
                    "it has heard of it",
                )
                heard.set()
                await acking
                await store.positions.wait("projector", order, end - 1, timeout=SECONDS)

    async def test_an_ack_said_twice_at_once_with_different_ends(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            await store.events.append(order, numbered(1), expected=2)
            delivery = await take(sub)
            with monkeypatch.context() as undecided:
                keeps = iter([True, False])
                undecided.setattr(Worker, "_keeps", lambda *_: next(keeps))
                await asyncio.gather(delivery.ack(), delivery.ack())
            assert not is_kept(sub, order)
            await handle(store, sub, order, 1)

    async def test_a_ring_that_promises_too_much(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            member = b'[2,1,"%032d","Counted"]\n{}' % 0
            lines = f"2 {10**15} {order.root}"
            sub._worker.heard(Ring("orders", "main", lines, b"%d\n%b" % (len(member), member)))
            await eventually(lambda: not is_kept(sub, order), "it asks the server")
            await handle(store, sub, order, 1)

    async def test_an_edition(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        place = order.on("what-if")
        await store.events.append(place, numbered(1), expected=2)
        async with store.subscribe("projector", "orders", edition="what-if") as sub:
            for _ in range(3):
                await (await take(sub)).ack()
            await handle(store, sub, place, 3)
            assert is_kept(sub, place)
            await store.events.append(order, numbered(1), expected=2)  # is no part of it
            await handle(store, sub, place, 1)
        assert await store.positions.get("projector", place) == 6

    async def test_effects(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("manager", "orders") as sub:
            await handle(store, sub, order, 2)
            await store.events.append(order, numbered(1), expected=2)
            delivery = await take(sub)
            assert await delivery.ack(append=[Event("Shipped", 1)]) == Appended(3, 3)
            delivery = await take(sub)
            assert (delivery.event.type, delivery.event.sequence) == ("Shipped", 3)
            await delivery.ack()

    async def test_nack_begins_to_count(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders", retries=2) as sub:
            await handle(store, sub, order, 2)
            await store.events.append(order, numbered(1), expected=2)
            for attempt in (1, 2, 3):
                delivery = await take(sub)
                assert delivery.attempt == attempt
                await delivery.nack(reason="Nope")
            letters = [one async for one in store.subscriptions.dead_letters("projector")]
            assert [(one.sequence, one.attempts) for one in letters] == [(2, 3)]


class TestGivenBack:
    @pytest.mark.usefixtures("soon")
    async def test_when_nothing_comes(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 3)
            await eventually(lambda: order not in sub._worker._held, "it is given back")
            with server.client() as client:
                holder, by = client.hmget(Keys(prefix).lease("projector", order), "holder", "by")
            assert (holder, bool(by)) == (b"", True)
            await handle(store, sub, order, 3)

    @pytest.mark.usefixtures("long")
    async def test_when_nobody_is_free(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        slow = Aggregate("orders", "slow")
        async with store.subscribe("projector", "orders") as busy:
            await handle(store, busy, order, 2)
            assert is_kept(busy, order)
            await store.events.append(slow, numbered(1), expected=NEW)
            working_on = await take(busy)
            assert working_on.event.aggregate == slow
            await eventually(lambda: not is_kept(busy, order), "it is given back")
            await eventually(lambda: order not in busy._worker._held, "the server knows")
            async with (
                asyncstore.open(server.url, key_prefix=prefix) as own,
                own.subscribe("projector", "orders") as free,
            ):
                busy.stop()
                await handle(own, free, order, 1)
            await working_on.ack()

    @pytest.mark.usefixtures("long")
    async def test_when_it_is_left(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)

    @pytest.mark.usefixtures("soon")
    async def test_what_was_not_heard_is_found_then(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with store.subscribe("projector", "orders", sweep=1000) as sub:
            await handle(store, sub, order, 2)
            await append_unheard(store, order, monkeypatch)
            await ack_next(sub, 2)

    @pytest.mark.usefixtures("soon")
    async def test_also_if_that_fails_at_first(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failures, send_ack = [1, 2], Worklist.send_ack

        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)

            def fail(*ack: Any) -> asyncio.Future[Reply]:
                if not failures:
                    return send_ack(*ack)
                failures.pop()
                failed = asyncio.get_running_loop().create_future()
                failed.set_exception(StoreUnavailable("here", "it is away"))
                return failed

            monkeypatch.setattr(Worklist, "send_ack", fail)
            await eventually(lambda: not failures and order not in sub._worker._held, "given back")
            await handle(store, sub, order, 1)

    @pytest.mark.usefixtures("long")
    async def test_at_a_gap(
        self, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with store.subscribe("projector", "orders", sweep=1000) as sub:
            await handle(store, sub, order, 2)
            await append_unheard(store, order, monkeypatch)
            await store.events.append(order, numbered(1), expected=3)
            await ack_next(sub, 2, 3)

    @pytest.mark.usefixtures("long")
    async def test_when_the_aggregate_begins_anew(self, store: Store, order: Aggregate) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            await store.events.delete(order)
            await store.events.append(order, numbered(1), expected=NEW)
            delivery = await take(sub)
            assert (delivery.event.sequence, delivery.token) == (0, 1)
            await delivery.ack()

    @pytest.mark.usefixtures("long")
    async def test_an_ack_after_it_ended_is_refused(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        async with store.subscribe("projector", "orders") as sub:
            await handle(store, sub, order, 2)
            await store.events.append(order, numbered(1), expected=2)
            delivery = await take(sub)
            with server.client() as client:
                lease = Keys(prefix).lease("projector", order)
                client.hset(lease, mapping={"holder": "another"})
            with pytest.raises(LeaseLost):
                await delivery.ack()
            assert await store.positions.get("projector", order) == 1
