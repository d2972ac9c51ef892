"""Events and sequences, as the tests need them."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import TypeVar

from asyncstore import Event, RecordedEvent

T = TypeVar("T")


def numbered(count: int, start: int = 0) -> list[Event]:
    """Return events whose data is their number."""
    return [Event("Counted", {"n": n}) for n in range(start, start + count)]


def sequences(events: Iterable[RecordedEvent]) -> list[int]:
    return [event.sequence for event in events]


async def listed(items: AsyncIterable[T]) -> list[T]:
    return [item async for item in items]
