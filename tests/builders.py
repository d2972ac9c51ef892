"""Events and sequences, as the tests need them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterable, Iterable
from typing import TypeVar

from asyncstore import Event, RecordedEvent, slots
from asyncstore.keys import ALL, Keys

T = TypeVar("T")


def numbered(count: int, start: int = 0) -> list[Event]:
    """Return events whose data is their number."""
    return [Event("Counted", {"n": n}) for n in range(start, start + count)]


def sequences(events: Iterable[RecordedEvent]) -> list[int]:
    return [event.sequence for event in events]


async def listed(items: AsyncIterable[T]) -> list[T]:
    return [item async for item in items]


def roots_of_one_slot(count: int) -> list[str]:
    """Return roots whose aggregates are in one slot of a cluster."""
    numbers = (f"{n}" for n in itertools.count())
    same = (root for root in numbers if slots.slot_of_tag(root) == slots.slot_of_tag("0"))
    return list(itertools.islice(same, count))


class KeysOfOne(Keys):
    """The keys of a store on one server, whose indexes have one tag."""

    def roots(self, domain: str, edition: str, tag: str = ALL) -> str:
        return Keys.roots(self, domain, edition, tag)

    def editions(self, domain: str, tag: str = ALL) -> str:
        return Keys.editions(self, domain, tag)

    def domains(self, tag: str = ALL) -> str:
        return Keys.domains(self, tag)

    def attached(self, domain: str, edition: str, tag: str = ALL) -> str:
        return Keys.attached(self, domain, edition, tag)

    def commits(self, tag: str = ALL) -> str:
        return Keys.commits(self, tag)
