"""What every server must do when a handler appends events with its ack: both, once, or neither."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Delivery,
    DurabilityNotReached,
    DurabilityUnavailable,
    Event,
    EventTooLarge,
    InvalidType,
    InvalidValue,
    LeaseLost,
    OutcomeUnknown,
    SequenceConflict,
    Source,
    Store,
    StoreUnavailable,
    Subscription,
    UnexpectedReply,
)
from asyncstore.doorbell import Change
from asyncstore.testing import FaultProxy
from tests.builders import listed, numbered, roots_of_one_slot, sequences
from tests.polling import eventually
from tests.proxy import proxy_to
from tests.servers import RedisServer, Server, redis_server

SECONDS = 20
EFFECT = "Effect"
SOON = 0.05  # a sweep that tests wait for


def effects(count: int = 1) -> list[Event]:
    return [Event(EFFECT, {"n": n}) for n in range(count)]


async def take(sub: Subscription) -> Delivery:
    async with asyncio.timeout(SECONDS):
        return await anext(sub)


async def types_of(store: Store, place: Aggregate) -> list[str]:
    return [event.type for event in await store.events.read(place)]


class TestAppending:
    async def test_events_and_position_in_one_step(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            assert await delivery.ack(append=effects(2)) == Appended(2, 3)
            assert await store.positions.get("manager", order) == 0
            assert await types_of(store, order) == ["Counted", "Counted", EFFECT, EFFECT]

    async def test_the_handler_gets_its_own_events(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            await (await take(sub)).ack(append=effects(2))
            for sequence in (1, 2):
                delivery = await take(sub)
                assert (delivery.event.sequence, delivery.event.type) == (sequence, EFFECT)
                assert (delivery.event.data, delivery.attempt) == ({"n": sequence - 1}, 1)
                assert await delivery.ack() is None
        assert await store.positions.get("manager", order) == 2

    async def test_or_passes_over_them(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders", types={"Counted"}) as sub:
            await (await take(sub)).ack(append=effects(3))
            await store.positions.wait("manager", order, 3, timeout=SECONDS)
            await store.events.append(order, numbered(1), expected=4)
            assert (await take(sub)).event.sequence == 4

    async def test_nothing_to_append(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            assert await delivery.ack(append=[], expected=NEW, idempotency_key="k") is None
        assert await store.positions.get("manager", order) == 0
        assert await store.events.next_sequence(order) == 1

    async def test_a_batch_in_parts(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(4), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await anext(sub.batches())
            assert len(delivery.events) == 4
            assert await delivery.ack(through=1, append=effects()) == Appended(4, 4)
            assert await store.positions.get("manager", order) == 1
            assert await delivery.ack(append=effects(2)) == Appended(5, 6)
            sources = [event.source for event in await store.events.read(order, start=4)]
            assert [source.sequence for source in sources if source] == [1, 3, 3]
            assert sequences((await anext(sub.batches())).events) == [4, 5, 6]

    async def test_a_dead_letter_that_is_handled_again(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW)
        async with store.subscribe("manager", "orders", retries=0, sweep=SOON) as sub:
            await (await take(sub)).nack()
            (letter,) = [one async for one in store.subscriptions.dead_letters("manager")]
            await (await take(sub)).ack()
            await store.subscriptions.retry(letter)
            delivery = await take(sub)
            assert delivery.event.sequence == 0
            assert await delivery.ack(append=effects()) == Appended(2, 2)
            delivery = await take(sub)
            assert delivery.event.type == EFFECT
            await delivery.ack()
        assert await store.positions.get("manager", order) == 2


class TestWhatIsWritten:
    async def test_source_and_correlation_are_those_of_the_event(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(2), expected=NEW, correlation_id="process")
        await store.events.append(order, numbered(1), expected=2)
        async with store.subscribe("manager", "orders") as sub:
            await (await take(sub)).ack(append=effects())
            await (await take(sub)).ack(append=effects(), correlation_id="")
            await (await take(sub)).ack(append=effects())
        found = await store.events.read(order, start=3)
        wanted = [Source("orders", order.root, "main", n) for n in range(3)]
        assert [event.source for event in found] == wanted
        assert [event.correlation_id for event in found] == ["process", None, None]
        for source, event in zip(wanted, found, strict=True):
            assert await store.events.find_source(order, source) == [event]
        (book,) = await store.events.correlated("process")
        assert sequences(book.events) == [0, 1, 3]

    async def test_or_what_is_said(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW, correlation_id="process")
        source = Source("payments", "p", "main", 7)
        async with store.subscribe("manager", "orders") as sub:
            await (await take(sub)).ack(
                append=effects(2), correlation_id="other", source=source, idempotency_key="k"
            )
        (book,) = await store.events.correlated("other")
        assert sequences(book.events) == [1, 2]
        assert await store.events.find_source(order, source) == book.events
        assert await store.events.find_idempotency_key(order, "k") == book.events

    async def test_a_key_that_was_used_before(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(2), expected=NEW, idempotency_key="done")
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            done = await delivery.ack(append=effects(), idempotency_key="done", expected=9)
            assert done == Appended(0, 1, duplicate=True)
            assert await store.positions.get("manager", order) == 0
            assert (await take(sub)).event.sequence == 1
        assert await store.events.next_sequence(order) == 2

    async def test_others_hear_of_it(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with (
            store.listen("orders") as listener,
            store.subscribe("manager", "orders") as sub,
            store.subscribe("other", "orders", sweep=1000) as other,
        ):
            await (await take(other)).ack()
            await (await take(sub)).ack(append=effects(2))
            async with asyncio.timeout(SECONDS):
                assert [(await anext(listener)).sequence for _ in range(2)] == [1, 2]
            assert (await take(other)).event.sequence == 1

    async def test_indexes_are_as_an_append_leaves_them(self, store: Store) -> None:
        order, later = (Aggregate("orders", root) for root in roots_of_one_slot(2))
        for place in (order, later):
            await store.events.append(place, numbered(1), expected=NEW, correlation_id="c")
        async with store.subscribe("manager", "orders") as sub:
            for _ in range(2):
                delivery = await take(sub)
                if delivery.event.aggregate == order:
                    await delivery.ack(append=effects())
        assert await listed(store.events.roots("orders")) == [later.root, order.root]


class TestErasing:
    """On a cluster the index of a correlation id is in another slot: see `Writer._send_indexed`."""

    async def test_one_that_took_place_in_the_slot(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        order, gone = (Aggregate("orders", root) for root in roots_of_one_slot(2))
        await store.events.append(order, numbered(1), expected=NEW)
        async with asyncstore.open(server.url, key_prefix=prefix) as other:
            await other.events.append(gone, numbered(1), expected=NEW, correlation_id="c")
            await other.events.delete(gone)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            assert await delivery.ack(append=effects(), correlation_id="c") == Appended(1, 1)
        (book,) = await store.events.correlated("c")
        assert (book.aggregate, sequences(book.events)) == (order, [1])

    async def test_what_was_refused_is_named_nowhere(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            with pytest.raises(SequenceConflict):
                await delivery.ack(append=effects(), expected=5, correlation_id="refused")
            await store.positions.put("manager", order, 0)
            with pytest.raises(LeaseLost):
                await delivery.ack(append=effects(), correlation_id="lost")
        await store.events.delete(order)
        keys = server.keys(prefix)
        indexes = [keys.correlated(correlation_id) for correlation_id in ("refused", "lost")]
        assert await store._router.those_there(indexes) == []


class TestEditions:
    async def test_one_that_has_diverged(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        place = order.on("what-if")
        await store.events.append(place, numbered(1), expected=2)
        async with store.subscribe("manager", "orders", edition="what-if") as sub:
            assert await (await take(sub)).ack(append=effects()) == Appended(3, 3)
            assert [(await take(sub)).event.sequence] == [1]
        assert await types_of(store, place) == ["Counted", "Counted", "Counted", EFFECT]
        assert await store.events.next_sequence(order) == 3
        source = Source("orders", order.root, "what-if", 0)
        assert sequences(await store.events.find_source(place, source)) == [3]

    @pytest.mark.parametrize("expected", [ANY, 3])
    async def test_one_that_diverges_by_it(
        self, store: Store, order: Aggregate, expected: asyncstore.Expected
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        place = order.on("what-if")
        async with store.subscribe("manager", "orders", edition="what-if") as sub:
            sub._worker._changed(
                place, Change(place.root, 0, 1)
            )  # as if somebody had said so: no index names it yet
            delivery = await take(sub)
            with pytest.raises(SequenceConflict):
                await delivery.ack(append=effects(), expected=2)
            assert await store.events.divergence(place) is None
            assert await delivery.ack(append=effects(), expected=expected) == Appended(3, 3)
            seen = []
            for _ in range(3):
                delivery = await take(sub)
                seen.append((delivery.event.sequence, delivery.event.type))
                await delivery.ack()
            assert seen == [(1, "Counted"), (2, "Counted"), (3, EFFECT)]
        assert await store.events.divergence(place) == 3
        assert await store.positions.get("manager", place) == 3
        assert await store.events.next_sequence(order) == 3


class TestRefused:
    async def test_a_conflict_changes_nothing(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            await store.events.append(order, numbered(1), expected=1)
            with pytest.raises(SequenceConflict) as conflict:
                await delivery.ack(append=effects(), expected=1)
            assert (conflict.value.expected, conflict.value.actual) == (1, 2)
            assert await store.positions.get("manager", order) is None
            assert await delivery.ack(append=effects(), expected=2) == Appended(2, 2)
            assert await store.positions.get("manager", order) == 0
            assert (await take(sub)).event.sequence == 1

    @pytest.mark.parametrize("is_done", [False, True], ids=["in progress", "done"])
    async def test_by_others_who_have_the_lease(
        self, store: Store, order: Aggregate, is_done: bool
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders", lease=0.2) as slow:
            late = await take(slow)
            for task in slow._worker._tasks:  # it hears of nothing: only the server can tell it
                task.cancel()
            async with store.subscribe("manager", "orders", lease=5) as other:
                delivery = await take(other)
                if is_done:
                    assert await delivery.ack(append=effects()) == Appended(1, 1)
                with pytest.raises(LeaseLost):
                    await late.ack(append=effects())
        assert await store.events.next_sequence(order) == 1 + is_done

    async def test_by_others_who_have_the_lease_with_a_key_that_was_used(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="done")
        async with store.subscribe("manager", "orders", lease=0.2) as slow:
            late = await take(slow)
            for task in slow._worker._tasks:
                task.cancel()
            async with store.subscribe("manager", "orders", lease=5) as other:
                await take(other)
                with pytest.raises(LeaseLost):  # it has not recorded anything
                    await late.ack(append=effects(), idempotency_key="done")
        assert await store.positions.get("manager", order) is None

    async def test_after_a_nack(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            await delivery.nack(delay=1000)
            with pytest.raises(LeaseLost):
                await delivery.ack(append=effects())
        assert await store.events.next_sequence(order) == 1

    async def test_when_the_aggregate_was_deleted(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            await store.events.delete(order)
            with pytest.raises(LeaseLost):
                await delivery.ack(append=effects())
        assert await store.events.next_sequence(order) == 0

    async def test_when_somebody_else_has_moved_the_position(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            await store.positions.put("manager", order, 1)
            with pytest.raises(LeaseLost):
                await delivery.ack(append=effects())
        assert await store.events.next_sequence(order) == 3

    async def test_by_a_key_of_another_type(
        self, server: Server, prefix: str, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            with server.client() as client:
                keys = server.keys(prefix)
                due = keys.due("manager", "orders", "main", keys.tag_of(order.root))
                client.delete(due)
                client.set(due, "somebody else's")
                with pytest.raises(UnexpectedReply):
                    await delivery.ack(append=effects())
                assert await store.events.next_sequence(order) == 1
                client.delete(due)
            assert await delivery.ack(append=effects()) == Appended(1, 1)

    @pytest.mark.parametrize(
        ("error", "arguments"),
        [
            (InvalidType, {"append": 7}),
            (InvalidType, {"append": ["Counted"]}),
            (InvalidType, {"append": effects(), "expected": "2"}),
            (InvalidValue, {"append": effects(), "expected": -1}),
            (InvalidValue, {"append": effects(), "expected": NEW}),
            (InvalidValue, {"append": effects(), "through": -1}),
            (InvalidType, {"append": effects(), "source": "orders"}),
            (InvalidType, {"append": effects(), "correlation_id": 7}),
            (InvalidValue, {"append": effects(), "idempotency_key": "a\nb"}),
            (EventTooLarge, {"append": [Event("Large", b"." * 20_000_000)]}),
        ],
    )
    async def test_bad_input_is_refused_before_anything_is_sent(
        self, store: Store, order: Aggregate, error: type[Exception], arguments: dict[str, Any]
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            with pytest.raises(error):
                await delivery.ack(**arguments)
            assert await store.positions.get("manager", order) is None
            assert await delivery.ack(append=effects()) == Appended(1, 1)


class TestTwice:
    async def test_a_second_ack_returns_what_the_first_did(
        self, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery, batch = await take(sub), effects(2)
            twice = [delivery.ack(append=batch) for _ in range(2)]
            assert await asyncio.gather(*twice) == [Appended(1, 2)] * 2
            assert await delivery.ack(append=batch) == Appended(1, 2)
            assert await delivery.ack() == Appended(1, 2)
        assert await store.events.next_sequence(order) == 3

    async def test_nothing_can_be_added_to_an_ack(self, store: Store, order: Aggregate) -> None:
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            await delivery.ack()
            with pytest.raises(LeaseLost):
                await delivery.ack(append=effects())
        assert await store.events.next_sequence(order) == 1

    async def test_a_cancelled_ack_that_was_carried_out_is_found_again(
        self, store: Store, order: Aggregate
    ) -> None:
        await make_known(store, order)
        await store.events.append(order, numbered(1), expected=NEW)
        batch = effects()
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            await cut_off(delivery.ack(append=batch))
            await has_end(store, order, 2)
            async with store.subscribe("manager", "orders") as other:
                await (await take(other)).ack(append=effects(3))  # works on the effect by now
                assert await delivery.ack(append=batch) == Appended(1, 1)
        assert await store.events.next_sequence(order) == 5


async def make_known(store: Store, order: Aggregate) -> None:
    """Have the script on the server: who is cut off sends it no second time, with its source."""
    place = Aggregate("known", order.root)
    await store.events.append(place, numbered(1), expected=NEW)
    async with store.subscribe("first", "known") as sub:
        await (await take(sub)).ack(append=effects())


async def cut_off(call: Awaitable[Any]) -> None:
    """Cancel a call that was sent and has no answer yet."""
    task = asyncio.ensure_future(call)
    for _ in range(3):
        await asyncio.sleep(0)
    assert task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def has_end(store: Store, place: Aggregate, end: int) -> None:
    async def has_come() -> bool:
        return await store.events.next_sequence(place) == end

    await eventually(has_come, f"{place} has {end} events")


@pytest.fixture
async def proxied(binary: str) -> AsyncIterator[tuple[FaultProxy, Store]]:
    """A store behind a proxy."""
    with redis_server(binary) as running:
        path = Path(urlsplit(running.url).path)
        async with proxy_to(path) as proxy, asyncstore.open(proxy.url) as store:
            yield proxy, store


# What the script answers, as it stands in its reply.
GIVEN_BACK, STILL_HELD = b"$4\r\nmore\r\n*", b"*2\r\n$2\r\nok\r\n*"


class TestLostReplies:
    @pytest.mark.parametrize("expected", [ANY, 1])
    @pytest.mark.parametrize("key", [None, "pay"])
    async def test_the_answer_is_found_again(
        self,
        proxied: tuple[FaultProxy, Store],
        order: Aggregate,
        expected: asyncstore.Expected,
        key: str | None,
    ) -> None:
        proxy, store = proxied
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await take(sub)
            proxy.replies.cut(having=GIVEN_BACK)
            done = await delivery.ack(append=effects(2), expected=expected, idempotency_key=key)
            assert (proxy.cuts, done) == (1, Appended(1, 2))
            assert (await take(sub)).event.sequence == 1
        assert await store.events.next_sequence(order) == 3

    async def test_in_the_middle_of_a_batch(
        self, proxied: tuple[FaultProxy, Store], order: Aggregate
    ) -> None:
        proxy, store = proxied
        await store.events.append(order, numbered(3), expected=NEW)
        async with store.subscribe("manager", "orders") as sub:
            delivery = await anext(sub.batches())
            for through in (0, 1):
                proxy.replies.cut(having=STILL_HELD)
                done = await delivery.ack(through=through, append=effects())
                assert (proxy.cuts, done) == (through + 1, Appended(3 + through, 3 + through))
            assert await store.positions.get("manager", order) == 1
            assert await delivery.ack(append=effects()) == Appended(5, 5)
        assert await store.events.next_sequence(order) == 6

    async def test_of_a_key_that_was_used_before(
        self, proxied: tuple[FaultProxy, Store], order: Aggregate
    ) -> None:
        proxy, store = proxied
        await store.events.append(order, numbered(2), expected=NEW, idempotency_key="done")
        async with store.subscribe("manager", "orders", batch=1) as sub:
            delivery = await take(sub)
            proxy.replies.cut(having=GIVEN_BACK)
            done = await delivery.ack(append=effects(), idempotency_key="done")
            assert (proxy.cuts, done) == (1, Appended(0, 1, duplicate=True))
        assert await store.events.next_sequence(order) == 2

    async def test_of_a_dead_letter(
        self, proxied: tuple[FaultProxy, Store], order: Aggregate
    ) -> None:
        proxy, store = proxied
        await store.events.append(order, numbered(1), expected=NEW)
        async with store.subscribe("manager", "orders", retries=0, sweep=SOON) as sub:
            await (await take(sub)).nack()
            (letter,) = await listed(store.subscriptions.dead_letters("manager"))
            await store.subscriptions.retry(letter)
            delivery = await take(sub)
            proxy.replies.cut(having=GIVEN_BACK)
            assert await delivery.ack(append=effects()) == Appended(1, 1)
            assert proxy.cuts == 1
            assert (await take(sub)).event.sequence == 1
        assert await store.events.next_sequence(order) == 2

    async def test_at_random_under_many_workers(self, proxied: tuple[FaultProxy, Store]) -> None:
        """Each number is counted down to 0 by the handler itself, whatever gets lost."""
        proxy, store = proxied
        places = [Aggregate("countdown", f"{n}") for n in range(20)]
        for place in places:
            await store.events.append(place, [Event("Left", 10)], expected=NEW)

        async def count_down(sub: Subscription) -> None:
            async for delivery in sub:
                left = delivery.event.data
                with contextlib.suppress(LeaseLost, OutcomeUnknown, StoreUnavailable):
                    await delivery.ack(append=[Event("Left", left - 1)] if left else [])

        async with (
            asyncstore.open(proxy.url) as other,
            store.subscribe("counter", "countdown", lease=0.5) as one,
            other.subscribe("counter", "countdown", lease=0.5) as two,
        ):
            proxy.replies.cut_at_random(0.05)
            tasks = [asyncio.ensure_future(count_down(sub)) for sub in (one, two, one, two)]
            for place in places:
                await has_end(store, place, 11)
            proxy.replies.mend()
            await one.wait_until_caught_up(timeout=SECONDS)
            for sub in (one, two):
                sub.stop()
            await asyncio.gather(*tasks)
        assert proxy.cuts > 5
        for place in places:
            events = await store.events.read(place)
            assert [event.data for event in events] == list(range(10, -1, -1))
            assert await store.positions.get("counter", place) == 10


class TestDurability:
    async def test_is_that_of_the_settings(self, durable: RedisServer, order: Aggregate) -> None:
        async with asyncstore.open(durable.url, durability="fsync") as store:
            await store.events.append(order, numbered(2), expected=NEW)
            async with store.subscribe("manager", "orders") as sub:
                assert await (await take(sub)).ack(append=effects()) == Appended(2, 2)
                delivery, batch = await take(sub), effects()
                with redis.Redis.from_url(durable.url) as client:
                    client.config_set("appendfsync", "everysec")
                    with pytest.raises((DurabilityNotReached, DurabilityUnavailable)) as refused:
                        await delivery.ack(append=batch)
                    is_stored = refused.type is DurabilityNotReached
                    assert await store.events.next_sequence(order) == 3 + is_stored
                    client.config_set("appendfsync", "always")
                assert await delivery.ack(append=batch) == Appended(3, 3)


@pytest.fixture
def durable(binary: str, tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(
        binary, "--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path)
    ) as running:
        yield running
