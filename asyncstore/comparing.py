"""Whether two stores hold the same: what `asyncstore compare` does.

Goes through both of them, aggregate by aggregate, in the order of domains, editions and roots. The
keys of one server and of a cluster have the same names but other indexes; what is compared is what
callers see: events with all that each has, where editions leave main, positions, snapshots. In
memory are a page of events for each of some aggregates, and some names: an index has no order of
names, so it is gone through again for every hundred thousand of them.

What is written meanwhile may show as a difference.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from asyncstore.attached import Attachments
from asyncstore.errors import CorruptEvent, CorruptPosition
from asyncstore.names import MAIN
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from asyncstore.recorded import RecordedEvent
    from asyncstore.store import Store

T = TypeVar("T")

_AT_ONCE: Final = 32  # aggregates
_NAMES_AT_ONCE: Final = 100_000
_FIELDS: Final = (
    "id",
    "type",
    "time",
    "metadata",
    "correlation_id",
    "source",
    "idempotency_key",
    "data",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What two stores do not have alike in an aggregate.

    `kind` is `event`, `branch`, `position`, `snapshot`, or `unreadable` for what can't be compared;
    `sequence` is that of the first event or snapshot that differs. `text` tells it to people, and
    never shows data. Of each kind the first is told.
    """

    kind: str
    aggregate: Aggregate
    sequence: int | None
    text: str


async def differences(
    one: Store,
    other: Store,
    domains: Collection[str] | None = None,
    on_events: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[Difference]:
    """Iterate over what two open stores do not have alike, or some domains of them.

    `on_events` is called with the number of events that were compared since the last call. The
    first store is called the old one, the second the new one.
    """
    batch: list[Aggregate] = []
    async for aggregate in aggregates_of(one, other, domains):
        batch.append(aggregate)
        if len(batch) == _AT_ONCE:
            for difference in await _compared(one, other, batch, on_events):
                yield difference
            batch = []
    for difference in await _compared(one, other, batch, on_events):
        yield difference


async def compare(
    one: Store,
    other: Store,
    aggregate: Aggregate,
    on_events: Callable[[int], None] = lambda _: None,
) -> list[Difference]:
    """Return what two stores do not have alike in one aggregate, the first of each kind."""
    try:
        return await _compare(one, other, aggregate, on_events)
    except (CorruptEvent, CorruptPosition) as error:
        sequence = error.sequence if isinstance(error, CorruptEvent) else None
        return [Difference("unreadable", aggregate, sequence, str(error))]


async def aggregates_of(
    one: Store, other: Store, domains: Collection[str] | None = None
) -> AsyncIterator[Aggregate]:
    """Iterate over the aggregates of two stores, each once, in the order of their names.

    Those that only an index names are among them. What can't be a root is passed over; `verify`
    tells of it.
    """
    found = await _both(one.events.domains(), other.events.domains())
    for domain in found if domains is None else sorted(set(domains)):
        for edition in await _both(one.events.editions(domain), other.events.editions(domain)):
            async for root in _roots(one, other, domain, edition):
                try:
                    yield Aggregate(domain, root, edition)
                except ValueError:  # InvalidName is one
                    continue


async def _compared(
    one: Store, other: Store, batch: list[Aggregate], on_events: Callable[[int], None]
) -> list[Difference]:
    found = await all_of(compare(one, other, aggregate, on_events) for aggregate in batch)
    return [difference for some in found for difference in some]


# Names


async def _both(one: AsyncIterator[str], other: AsyncIterator[str]) -> list[str]:
    return sorted({name async for name in one} | {name async for name in other})


async def _roots(one: Store, other: Store, domain: str, edition: str) -> AsyncIterator[str]:
    """Iterate over the roots of both, in order: as many at a time as memory is to hold."""
    after = ""
    while True:
        page = await _smallest(one, other, domain, edition, after)
        for root in page:
            yield root
        if len(page) < _NAMES_AT_ONCE:
            return
        after = page[-1]


async def _smallest(one: Store, other: Store, domain: str, edition: str, after: str) -> list[str]:
    """Return the first roots behind a name."""
    found: set[str] = set()
    for store in (one, other):
        async for names in Attachments(store).roots(domain, edition):
            found.update(name for name in names if name > after)
            if len(found) > 2 * _NAMES_AT_ONCE:
                found = set(sorted(found)[:_NAMES_AT_ONCE])
    return sorted(found)[:_NAMES_AT_ONCE]


# One aggregate


async def _compare(
    one: Store, other: Store, aggregate: Aggregate, on_events: Callable[[int], None]
) -> list[Difference]:
    found: list[Difference] = []
    at, other_at = await asyncio.gather(
        one.events.divergence(aggregate), other.events.divergence(aggregate)
    )
    if at != other_at:
        text = f"it leaves main at {_shown(at)} in the old one, at {_shown(other_at)} in the new"
        found.append(Difference("branch", aggregate, None, text))
    else:
        found += await _compare_events(one, other, aggregate, at, on_events)
    for compared in (_compare_positions, _compare_snapshots):
        found += await compared(one, other, aggregate)
    return found


def _shown(value: int | None) -> str:
    return "nowhere" if value is None else str(value)


async def _compare_events(
    one: Store, other: Store, aggregate: Aggregate, at: int | None, on_events: Callable[[int], None]
) -> list[Difference]:
    count = 0
    sides = (_own_events(store, aggregate, at) for store in (one, other))
    async for mine, theirs in _pairs(*sides):
        count += 1
        text = _difference(mine, theirs)
        if text:
            event = mine or theirs
            sequence = None if event is None else event.sequence
            return [Difference("event", aggregate, sequence, text)]
    on_events(count)
    return []


async def _own_events(
    store: Store, aggregate: Aggregate, at: int | None
) -> AsyncIterator[RecordedEvent]:
    """Iterate over the events of an aggregate, without those that main has for it."""
    if aggregate.edition == MAIN or at is not None:
        async for event in store.events.stream(aggregate, start=at or 0, diverge_at=at):
            yield event


async def _pairs(
    one: AsyncIterator[T], other: AsyncIterator[T]
) -> AsyncIterator[tuple[T | None, T | None]]:
    """Iterate over two at a time, with None where one of them has ended before the other."""
    while True:
        mine, theirs = await anext(one, None), await anext(other, None)
        if mine is None and theirs is None:
            return
        yield mine, theirs


def _difference(mine: RecordedEvent | None, theirs: RecordedEvent | None) -> str:
    """Return what is not alike in two events; empty if they are the same."""
    if mine is None or theirs is None:
        return f"only the {'new' if mine is None else 'old'} one has the event, and what follows"
    if mine == theirs:
        return ""
    fields = [name for name in _FIELDS if getattr(mine, name) != getattr(theirs, name)]
    return f"the events differ in {', '.join(fields)}"


async def _compare_positions(one: Store, other: Store, aggregate: Aggregate) -> list[Difference]:
    mine, theirs = await all_of(Attachments(store).positions(aggregate) for store in (one, other))
    for handler in sorted(mine.keys() | theirs.keys()):
        at, other_at = mine.get(handler), theirs.get(handler)
        if at != other_at:
            text = f"{handler} is at {_shown(at)} in the old one, at {_shown(other_at)} in the new"
            return [Difference("position", aggregate, None, text)]
    return []


async def _compare_snapshots(one: Store, other: Store, aggregate: Aggregate) -> list[Difference]:
    sides = (Attachments(store).fingerprints(aggregate) for store in (one, other))
    mine, theirs = await all_of(sides)
    for sequence in sorted(mine.keys() | theirs.keys()):
        if sequence not in theirs:
            text = "only the old one has the snapshot"
        elif sequence not in mine:
            text = "only the new one has the snapshot"
        elif mine[sequence] != theirs[sequence]:
            text = "the snapshots differ"
        else:
            continue
        return [Difference("snapshot", aggregate, sequence, text)]
    return []
