"""Events for tests, and what tests ask of those that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from asyncstore.values import NEW, Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    from asyncstore.recorded import RecordedEvent
    from asyncstore.store import Store
    from asyncstore.testing.clock import Clock
    from asyncstore.values import Aggregate

T = TypeVar("T")


def numbered(count: int, start: int = 0, *, clock: Clock | None = None) -> list[Event]:
    """Return events whose data is their number: `Counted`, `{"n": 0}`, `{"n": 1}`, …

    With a clock they have its times and ids.
    """
    events = [Event("Counted", {"n": n}) for n in range(start, start + count)]
    return events if clock is None else clock.stamp(events)


async def history(
    store: Store, aggregate: Aggregate, events: int | Iterable[Event], *, clock: Clock | None = None
) -> list[RecordedEvent]:
    """Give an aggregate that has none its first events, and return them as they are stored.

    `events` are the events, or how many `numbered` ones. With a clock they have its times and ids.
    """
    chosen = numbered(events) if isinstance(events, int) else list(events)
    stamped = chosen if clock is None else clock.stamp(chosen)
    await store.events.append(aggregate, stamped, expected=NEW)
    return await store.events.read(aggregate)


def sequences(events: Iterable[RecordedEvent]) -> list[int]:
    """Return the events' sequences."""
    return [event.sequence for event in events]


async def listed(items: AsyncIterable[T]) -> list[T]:
    """Return all that an async iterator gives, such as those of `stream` and `roots`."""
    return [item async for item in items]
