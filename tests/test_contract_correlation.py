"""Appends with correlation ids while aggregates are erased: `correlated` misses no event.

On a cluster the index of a correlation id is in another slot than the events, so that whoever
erases an aggregate could take it out of an index that somebody else has just put it into.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Event,
    OutcomeUnknown,
    SequenceConflict,
    Store,
    StoreUnavailable,
)
from tests.builders import numbered
from tests.servers import Server, keys_with

IDS = [f"process-{n}" for n in range(3)]
PLACES = [Aggregate("orders", f"{n}", "main" if n < 2 else "what-if") for n in range(4)]
ROUNDS = 5
UNANSWERED = (OutcomeUnknown, StoreUnavailable, TimeoutError)

Call = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]


@dataclass
class History:
    """What was told to those who appended and erased.

    With the moments when an append was asked for, and when the last erasure was over.
    """

    clock: int = 0
    stored: list[tuple[Aggregate, Event, int]] = field(default_factory=list)
    erased: dict[Aggregate, int] = field(default_factory=dict)

    def moment(self) -> int:
        self.clock += 1
        return self.clock

    def is_expected(self, place: Aggregate, asked: int) -> bool:
        return asked > self.erased.get(place, 0)


@dataclass
class Play:
    """Writers and erasers on a few aggregates; `through` makes their calls, or disturbs them."""

    stores: list[Store]
    through: Call
    dice: random.Random
    history: History = field(default_factory=History)
    is_over: bool = False

    async def run(self, store: Store) -> None:
        """Play some rounds, and check after each what is there."""
        for _ in range(ROUNDS):
            self.is_over = False
            erasers = [asyncio.create_task(self.erase(n)) for n in range(3)]
            try:
                await asyncio.gather(*(self.write(n) for n in range(16)))
            finally:
                self.is_over = True
                await asyncio.gather(*erasers)
            await check(store, self.history)

    async def write(self, writer: int) -> None:
        store = self.stores[writer % len(self.stores)]
        for n in range(4):
            place, correlation_id = self.dice.choice(PLACES), self.dice.choice(IDS)
            event, asked = Event("Told", {"id": correlation_id}), self.history.moment()
            call = store.events.append(
                place,
                [event],
                expected=self.dice.choice([ANY, ANY, ANY, NEW, 2]),
                correlation_id=correlation_id,
                idempotency_key=self.dice.choice([None, f"{n % 7}"]),
            )
            try:
                done = await self.through(call)
            except (*UNANSWERED, SequenceConflict):
                continue
            if not done.duplicate:
                self.history.stored.append((place, event, asked))

    async def erase(self, eraser: int) -> None:
        store = self.stores[eraser % len(self.stores)]
        while not self.is_over:
            await asyncio.sleep(self.dice.random() / 100)
            place = self.dice.choice(PLACES)
            events = store.events
            by_edition = place.edition != "main" and self.dice.random() < 0.1
            call: Coroutine[Any, Any, int] = (
                events.delete_edition("orders", place.edition)
                if by_edition
                else events.delete(place)
            )
            with suppress(*UNANSWERED):
                await self.through(call)
            gone = [each for each in PLACES if each.edition == place.edition]
            for each in gone if by_edition else [place]:
                self.history.erased[each] = self.history.moment()


async def check(store: Store, history: History) -> None:
    """Each event that is there is found by its id, and each that was acknowledged is there."""
    there = {place: await store.events.read(place) for place in PLACES}
    for correlation_id in IDS:
        books = await store.events.correlated(correlation_id)
        found = {book.aggregate: [event.id for event in book.events] for book in books}
        assert len(found) == len(books)
        own = {
            place: [event.id for event in events if event.correlation_id == correlation_id]
            for place, events in there.items()
        }
        assert found == {place: ids for place, ids in own.items() if ids}
    for place, event, asked in history.stored:
        if history.is_expected(place, asked):
            assert event.id in {each.id for each in there[place]}


async def undisturbed(call: Coroutine[Any, Any, Any]) -> Any:
    return await call


@asynccontextmanager
async def two_stores(
    server: Server, prefix: str, dice: random.Random, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Store]]:
    """Open two stores whose changes of an index elsewhere are at times slow to leave."""
    async with (
        asyncstore.open(server.url, key_prefix=prefix) as one,
        asyncstore.open(server.url, key_prefix=prefix) as other,
    ):
        for store in (one, other):
            monkeypatch.setattr(store._router, "change", _dawdling(store._router.change, dice))
        yield [one, other]


def _dawdling(change: Callable[..., Awaitable[Any]], dice: random.Random) -> Any:
    async def late(*arguments: Any) -> Any:
        await asyncio.sleep(dice.choice([0, 0, 0, 0.001, 0.01]))
        return await change(*arguments)

    return late


@pytest.mark.parametrize("seed", range(2))
async def test_erased_meanwhile(
    server: Server, prefix: str, store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    async with two_stores(server, prefix, dice, monkeypatch) as stores:
        play = Play(stores, undisturbed, dice)
        await play.run(store)
        for place in PLACES:
            await store.events.delete(place)
    assert keys_with(server, prefix) <= server.lasting(prefix, *(place.root for place in PLACES))


@pytest.mark.parametrize("seed", range(2))
async def test_erased_meanwhile_by_callers_who_give_up(
    server: Server, prefix: str, store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)

    async def impatient(call: Coroutine[Any, Any, Any]) -> Any:
        patience = dice.choice([0.0005, 0.001, 0.002, 0.005, 5, 5])
        async with asyncio.timeout(patience):
            return await call

    async with two_stores(server, prefix, dice, monkeypatch) as stores:
        play = Play(stores, impatient, dice)
        await play.run(store)


@pytest.mark.parametrize("seed", range(2))
async def test_erased_meanwhile_over_connections_that_break(
    server: Server, prefix: str, store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    with server.primaries() as clients:
        broken, over = 0, False

        async def breaking() -> None:
            nonlocal broken
            while not over:
                for client in clients:
                    broken += await asyncio.to_thread(client.client_kill_filter, _type="normal")
                await asyncio.sleep(dice.random() / 50)

        async with two_stores(server, prefix, dice, monkeypatch) as stores:
            play = Play(stores, undisturbed, dice)
            breaks = asyncio.create_task(breaking())
            try:
                await play.run(store)
            finally:
                over = True
                await breaks
    assert broken > 0


class Held:
    """Holds back the first change of an index that erasing makes, as a slow way to its server."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        self._change = store._router.change
        monkeypatch.setattr(store._router, "change", self.change)

    async def change(self, form: Any, name: str, key: str, *arguments: Any) -> Any:
        if name.startswith("ZREM") and not self.arrived.is_set():
            self.arrived.set()
            await self.go_on.wait()
        return await self._change(form, name, key, *arguments)


async def test_a_late_removal_takes_nothing_newer_out(
    server: Server, prefix: str, store: Store, order: Aggregate, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not server.is_cluster:
        # All of it is one script there.
        await store.events.append(order, numbered(1), expected=NEW, correlation_id="c")
        await store.events.delete(order)
        assert await store.events.correlated("c") == []
        return
    await store.events.append(order, numbered(1), expected=NEW, correlation_id="c")
    held = Held(store, monkeypatch)
    erasing = asyncio.create_task(store.events.delete(order))
    await held.arrived.wait()
    async with asyncstore.open(server.url, key_prefix=prefix) as other:
        done = await other.events.append(order, numbered(1), expected=NEW, correlation_id="c")
        assert done == Appended(0, 0)
        held.go_on.set()
        assert await erasing == 1
        (book,) = await other.events.correlated("c")
        assert book.aggregate == order
        assert await other.events.delete(order) == 1
        assert await other.events.correlated("c") == []
    assert keys_with(server, prefix) <= server.lasting(prefix, order.root)


@pytest.mark.parametrize("where", ["main", "what-if"])
async def test_what_was_refused_is_named_nowhere_once_it_is_erased(
    server: Server, prefix: str, store: Store, order: Aggregate, where: str
) -> None:
    place = order.on(where)
    append = store.events.append
    with pytest.raises(SequenceConflict):
        await append(place, numbered(1), expected=5, correlation_id="refused")
    await append(place, numbered(1), expected=NEW, idempotency_key="k", correlation_id="stored")
    again = await append(place, numbered(1), expected=1, idempotency_key="k", correlation_id="late")
    assert again.duplicate
    for correlation_id in ("refused", "late"):
        assert await store.events.correlated(correlation_id) == []
    await append(place, numbered(1), expected=1, correlation_id="refused")
    (book,) = await store.events.correlated("refused")
    assert [event.sequence for event in book.events] == [1]
    assert await store.events.delete(place) == 2
    assert keys_with(server, prefix) <= server.lasting(prefix, order.root)
