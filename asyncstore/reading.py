"""Reading timelines, page by page.

The timeline of an aggregate on main is its events. On another edition it is those of main before
the sequence at which the edition diverges, and its own from there on; one that has not diverged
reads as main. Pages of one reading all take the divergence for what it was with the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from asyncstore import codec, forms, scripts
from asyncstore.errors import BranchExists, CorruptEvent, InvalidValue
from asyncstore.names import (
    MAIN,
    MAX_SEQUENCE,
    check_bool,
    check_sequence,
    check_whole_number,
)
from asyncstore.recorded import Loaded, RecordedEvent, event_of_member
from asyncstore.snapshots import decode_or_warn
from asyncstore.values import Aggregate, check_aggregate, check_moment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from asyncstore.keys import Keys, Places
    from asyncstore.router import Router

PAGE_EVENTS: Final = 5000  # a page is bounded in bytes too, see page.lua
_NOWHERE: Final = MAX_SEQUENCE + 1  # where a timeline diverges that is main's all through


@dataclass(frozen=True, slots=True)
class Range:
    """Which events of a timeline are wanted, in which order. Checked when it is made."""

    aggregate: Aggregate
    start: int = 0
    stop: int | None = None
    limit: int | None = None
    reverse: bool = False
    until: datetime | None = None
    diverge_at: int | None = None

    def __post_init__(self) -> None:
        check_aggregate(self.aggregate)
        check_sequence("start", self.start)
        if self.stop is not None and check_sequence("stop", self.stop) < self.start:
            raise InvalidValue("stop", f"{self.stop} is before start, {self.start}")
        if self.limit is not None:
            check_whole_number("limit", self.limit)
        check_bool("reverse", self.reverse)
        if self.until is not None:
            check_moment("until", self.until)
        if self.diverge_at is not None:
            check_sequence("diverge_at", self.diverge_at)
            if self.aggregate.edition == MAIN:
                raise InvalidValue("diverge_at", f"edition {MAIN!r} diverges from nothing")

    def is_empty(self) -> bool:
        """Whether nothing can be in it."""
        return self.limit == 0 or self.start == self.stop

    def before(self, sequence: int) -> Range:
        """Return the part of it that is before a sequence."""
        stop = sequence if self.stop is None else min(self.stop, sequence)
        return replace(self, start=min(self.start, stop), stop=stop)

    def after(self, sequence: int, count: int) -> Range:
        """Return what is left when everything up to `sequence` was looked at, and `count` taken."""
        limit = None if self.limit is None else self.limit - count
        if self.reverse:
            return replace(self, stop=max(sequence, self.start), limit=limit)
        return replace(self, start=sequence + 1, limit=limit)

    def due(self) -> int | None:
        """Return the sequence that the first event must have, if that is known."""
        return None if self.reverse or self.until is not None else self.start

    def gap_before(
        self, events: list[RecordedEvent], due: int | None, diverges_at: int
    ) -> int | None:
        """Return a sequence that is missing before the first event of a page, read backwards."""
        if due is not None or not self.reverse or not events:
            return None
        last = self.gap(None, diverges_at)
        return last if last is not None and events[0].sequence < last else None

    def gap(self, due: int | None, diverges_at: int) -> int | None:
        """Return a sequence that is missing when none is left and `due` would be the next."""
        if self.until is not None:
            return None
        # What was there before an edition diverged is known; where a timeline ends is not.
        known = 0 if diverges_at == _NOWHERE else diverges_at
        end = known if self.stop is None else min(known, self.stop)
        if self.reverse:
            due = end - 1 if due is None else due
            return due if due >= self.start else None
        return due if due is not None and due < end else None

    def arguments(self, diverge_at: int | None) -> list[str | int]:
        """Return the ARGV of read.lua."""
        return [
            int(self.start),
            "" if self.stop is None else int(self.stop),
            PAGE_EVENTS if self.limit is None else min(int(self.limit), PAGE_EVENTS),
            "backwards" if self.reverse else "",
            "" if self.until is None else codec.to_microseconds(self.until),
            "" if diverge_at is None else int(diverge_at),
        ]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the timelines of a store."""

    _router: Router
    _keys: Keys

    async def pages(
        self, wanted: Range, diverges_at: int | None = None
    ) -> AsyncIterator[list[RecordedEvent]]:
        """Iterate over pages of events. `diverges_at` is what an earlier page said of that."""
        keys = self._keys.timeline(wanted.aggregate)
        due = wanted.due()
        while not wanted.is_empty():
            asked_for = wanted.diverge_at if diverges_at is None else diverges_at
            arguments = wanted.arguments(asked_for)
            go_on, stored, *members = await self._router.run(scripts.READ, keys, arguments)
            if diverges_at is None:
                wanted, diverges_at = _settle(wanted, stored)
            events, error = await self._decode_page(wanted, due, members, diverges_at)
            gap = wanted.gap_before(events, due, diverges_at)
            if gap is not None:
                raise _missing(self._keys.places(wanted.aggregate, diverges_at), gap)
            yield events
            if error:
                raise error
            if events and wanted.until is None:
                due = events[-1].sequence + (-1 if wanted.reverse else 1)
            if not go_on:
                gap = wanted.gap(due, diverges_at)
                if gap is not None:
                    raise _missing(self._keys.places(wanted.aggregate, diverges_at), gap)
                return
            wanted = wanted.after(int(go_on), len(events))

    async def read(self, wanted: Range) -> list[RecordedEvent]:
        """Return all events of the range."""
        return [event async for page in self.pages(wanted) for event in page]

    async def stream(self, wanted: Range) -> AsyncIterator[RecordedEvent]:
        """Iterate over the events of the range, a page at a time in memory."""
        async for page in self.pages(wanted):
            for event in page:
                yield event

    async def load(self, aggregate: Aggregate, schema_version: int | None) -> Loaded:
        """Return the newest snapshot, the events after it and the next sequence."""
        check_aggregate(aggregate)
        keys = [*self._keys.snapshots(aggregate), *self._keys.timeline(aggregate)]
        if aggregate.edition != MAIN:
            keys += self._keys.snapshots(aggregate.on(MAIN))
        schema = "" if schema_version is None else schema_version
        next_sequence, fields, paged_from, page = await self._router.run(
            scripts.LOAD, keys, [PAGE_EVENTS, schema]
        )
        go_on, stored, *members = page
        snapshot = decode_or_warn(aggregate, fields, schema_version)
        start = 0 if snapshot is None else snapshot.sequence + 1
        if start != paged_from:
            # The script took a snapshot for a good one that can't be decoded, or the other way.
            snapshot, start = None, 0
        if start >= next_sequence:
            return Loaded(snapshot, [], next_sequence)
        wanted = Range(aggregate, start, next_sequence)
        wanted, diverges_at = _settle(wanted, stored)
        if start != paged_from:
            return Loaded(None, await self._rest(wanted, diverges_at), next_sequence)
        events, error = await self._decode_page(wanted, start, members, diverges_at)
        if error:
            raise error
        if go_on:
            events += await self._rest(wanted.after(int(go_on), 0), diverges_at)
        if len(events) < next_sequence - start:
            raise _missing(self._keys.places(aggregate, diverges_at), start + len(events))
        return Loaded(snapshot, events, next_sequence)

    async def missed(
        self, aggregate: Aggregate, expected: int, actual: int, page: list[bytes]
    ) -> tuple[RecordedEvent | None, list[RecordedEvent] | None]:
        """Return the event before `expected`, and those from there on: the conflict's and the rest.

        None for those that are not all there any more.
        """
        if expected >= actual:
            return None, []
        wanted = Range(aggregate, max(expected - 1, 0), actual)
        if page:
            go_on, diverged_at, *members = page
            wanted, diverges_at = _settle(wanted, diverged_at)
            events, error = await self._decode_page(wanted, wanted.start, members, diverges_at)
            if error:
                raise error
            if go_on:
                events += await self._rest(wanted.after(int(go_on), 0), diverges_at)
        else:
            events = await self.read(wanted)  # the call had no room for them
        if len(events) != actual - wanted.start:
            return None, None
        return (None, events) if expected == 0 else (events[0], events[1:])

    async def find(self, aggregate: Aggregate, claim: str) -> list[RecordedEvent]:
        """Return the aggregate's own events that a claim names."""
        check_aggregate(aggregate)
        keys = [self._keys.claims(aggregate), self._keys.events(aggregate)]
        places = self._keys.places(aggregate, 0)
        found: list[RecordedEvent] = []
        start = 0
        while True:
            go_on, *members = await self._router.run(
                scripts.FIND, keys, [claim, start, PAGE_EVENTS]
            )
            for member in members:
                try:
                    found.append(event_of_member(aggregate, places, member))
                except codec.Undecodable as error:
                    raise await self._corrupt(places, start, member, str(error)) from None
            if not go_on:
                return found
            start = int(go_on) + 1

    async def _rest(self, wanted: Range, diverges_at: int) -> list[RecordedEvent]:
        return [event async for page in self.pages(wanted, diverges_at) for event in page]

    async def _decode_page(
        self, wanted: Range, due: int | None, members: list[bytes], diverges_at: int
    ) -> tuple[list[RecordedEvent], CorruptEvent | None]:
        """Return the events, or those before one that can't be read, and what is wrong with it."""
        events: list[RecordedEvent] = []
        aggregate = wanted.aggregate
        places = self._keys.places(aggregate, diverges_at)
        for member in members:
            try:
                event = event_of_member(aggregate, places, member)
            except codec.Undecodable as error:
                return events, await self._corrupt(places, wanted.start, member, str(error))
            if wanted.until is not None:
                # The script compares doubles; here it is exact.
                if event.time <= wanted.until:
                    events.append(event)
                continue
            if due is not None and event.sequence != due:
                return events, await self._misplaced(places, member, due, reverse=wanted.reverse)
            due = event.sequence + (-1 if wanted.reverse else 1)
            events.append(event)
        return events, None

    async def _corrupt(self, places: Places, met_at: int, member: bytes, why: str) -> CorruptEvent:
        key, place = await self._find(places, member)
        if place is None:  # it is gone meanwhile
            return CorruptEvent(places.key_at(met_at), met_at, why)
        return CorruptEvent(key, place, why)

    async def _misplaced(
        self, places: Places, member: bytes, due: int, *, reverse: bool
    ) -> CorruptEvent:
        key, place = await self._find(places, member)
        if place == due:
            return CorruptEvent(key, due, "its header names another sequence")
        if place is not None and (place > due if reverse else place < due):
            return CorruptEvent(key, place, "two members stand there")
        return _missing(places, due)

    async def _find(self, places: Places, member: bytes) -> tuple[str, int | None]:
        """Return where a member stands: the key and the sequence at or right before it."""
        for key in places.all():
            score = await self._router.read(forms.is_score, "ZSCORE", key, member)
            if score is not None:
                # Text in RESP2, a float in RESP3. What is not a sequence still has a place.
                return key, int(min(max(float(score), 0), MAX_SEQUENCE))
        return places.events, None


def _settle(wanted: Range, stored: bytes) -> tuple[Range, int]:
    """Return what is wanted and where its timeline diverges, for all pages of the reading.

    `stored` is where the edition has diverged. Where it has not, all there is comes from main: what
    may be appended to the edition before the next page is no part of it.
    """
    asked_for = wanted.diverge_at
    if not stored:
        return wanted if asked_for is None else wanted.before(asked_for), _NOWHERE
    diverged_at = int(stored)
    if asked_for is not None and asked_for != diverged_at:
        raise BranchExists(wanted.aggregate, asked_for, diverged_at)
    return wanted, diverged_at


def _missing(places: Places, sequence: int) -> CorruptEvent:
    key, why = places.key_at(sequence), "the event is missing"
    if key == places.main:
        why += "; was the main history deleted, from which this edition has diverged?"
    return CorruptEvent(key, sequence, why)
