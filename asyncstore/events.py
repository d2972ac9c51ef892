"""Appending and reading the events of aggregates, and listing what there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from asyncstore import codec, forms, scripts
from asyncstore.errors import (
    CorruptEvent,
    EventTooLarge,
    InvalidName,
    InvalidType,
    InvalidValue,
    SequenceConflict,
)
from asyncstore.names import check_name, check_sequence, check_whole_number
from asyncstore.recorded import Loaded, RecordedEvent
from asyncstore.snapshots import decode_or_warn
from asyncstore.values import (
    ANY,
    MAIN,
    Aggregate,
    Appended,
    Event,
    Expected,
    check_aggregate,
    check_expected,
    check_moment,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from asyncstore.appends import Appender
    from asyncstore.keys import Keys
    from asyncstore.transport import Transport

_PAGE_EVENTS: Final = 5000  # a page is bounded in bytes too, see page.lua
_PAGE_NAMES: Final = 1000
_DELETE_ROUNDS: Final = 100  # handlers are met for the first time only so often


@dataclass(frozen=True, slots=True)
class Limits:
    """What one append may hold; see Settings."""

    max_event_bytes: int
    max_append_bytes: int
    max_append_events: int


@dataclass(frozen=True, slots=True)
class _Range:
    """Which events of an aggregate are wanted, in which order. Checked when it is made."""

    aggregate: Aggregate
    start: int = 0
    stop: int | None = None
    limit: int | None = None
    reverse: bool = False
    until: datetime | None = None

    def __post_init__(self) -> None:
        _check_main(self.aggregate)
        check_sequence("start", self.start)
        if self.stop is not None and check_sequence("stop", self.stop) < self.start:
            raise InvalidValue("stop", f"{self.stop} is before start, {self.start}")
        if self.limit is not None:
            check_whole_number("limit", self.limit)
        if self.until is not None:
            check_moment("until", self.until)

    def is_empty(self) -> bool:
        return self.limit == 0 or self.start == self.stop

    def after(self, sequence: int) -> _Range:
        """Return what is left when everything up to `sequence` has been looked at."""
        if self.reverse:
            return replace(self, stop=max(sequence, self.start))
        return replace(self, start=sequence + 1)

    def arguments(self) -> list[str | int]:
        """Return the ARGV of read.lua."""
        return [
            int(self.start),
            "+inf" if self.stop is None else f"({int(self.stop)}",
            _PAGE_EVENTS if self.limit is None else min(int(self.limit), _PAGE_EVENTS),
            "backwards" if self.reverse else "",
            "" if self.until is None else codec.to_microseconds(self.until),
        ]


@dataclass(frozen=True, slots=True)
class Events:
    """The events of a store."""

    _transport: Transport
    _keys: Keys
    _appender: Appender
    _limits: Limits

    async def append(
        self, aggregate: Aggregate, events: Iterable[Event], *, expected: Expected
    ) -> Appended:
        """Append events to an aggregate: all of them or none, in one atomic step.

        `expected` is the sequence that the first of them must get: NEW for an aggregate without
        events, a number, or ANY. If the aggregate is not there, `SequenceConflict` and nothing is
        written. An empty list writes nothing and succeeds, whatever is expected.

        Raises `EventTooLarge` for what the settings forbid, `InvalidType` and `InvalidValue` for
        what can't be stored, before anything is sent; `StoreUnavailable` and `StoreFull` when
        nothing was written. An answer that was lost is found out by the driver: the events are
        stored once, and their sequences are what is returned. `OutcomeUnknown` if that could not
        be done in time. Events of one aggregate must not share ids for that, with ANY.
        """
        _check_main(aggregate)
        expected = check_expected(expected)
        batch = _check_batch(events)
        if not batch:
            end = await self.next_sequence(aggregate)
            return Appended(end, end - 1)
        arguments, size = self._encode(batch)
        place = "" if expected is ANY else str(expected)
        reply = await self._appender.send(aggregate, place, arguments, size)
        parts = self._transport.checked(reply, "append")
        if type(parts) is list and len(parts) == 2:
            tag, value = parts
            if tag == b"ok" and forms.is_count(value) and expected in (ANY, value):
                return Appended(value, value + len(batch) - 1)
            if tag == b"conflict" and forms.is_count(value):
                raise SequenceConflict(aggregate, expected, value)
            if tag == b"error" and forms.is_text(value):
                raise self._transport.refused("append", value.decode(errors="replace"))
        raise self._transport.misfit("append")

    async def read(
        self,
        aggregate: Aggregate,
        *,
        start: int = 0,
        stop: int | None = None,
        limit: int | None = None,
        reverse: bool = False,
        until: datetime | None = None,
    ) -> list[RecordedEvent]:
        """Return events of an aggregate in the order of their sequences; [] for an unknown one.

        `start` is the first sequence, `stop` the one after the last, `limit` the most events to
        return, counted from the end with `reverse`, which also turns the order around. `until`
        leaves out what happened after that moment. Raises `CorruptEvent` for a member that is not
        an event, and where an event is missing; data that can't be decoded raise it when they are
        asked for.
        """
        wanted = _Range(aggregate, start, stop, limit, reverse, until)
        return [event async for page in self._pages(wanted) for event in page]

    def stream(
        self,
        aggregate: Aggregate,
        *,
        start: int = 0,
        stop: int | None = None,
        limit: int | None = None,
        reverse: bool = False,
        until: datetime | None = None,
    ) -> AsyncIterator[RecordedEvent]:
        """Iterate over what `read` returns, page by page: about a megabyte at a time in memory."""
        return self._stream(_Range(aggregate, start, stop, limit, reverse, until))

    async def next_sequence(self, aggregate: Aggregate) -> int:
        """Return the sequence that the next event will get: 0 for an unknown aggregate."""
        _check_main(aggregate)
        count: int = await self._transport.command(
            forms.is_count, "ZCARD", self._keys.events(aggregate)
        )
        return count

    async def load(self, aggregate: Aggregate) -> Loaded:
        """Return the newest snapshot, the events after it and the next sequence, as of one moment.

        One round trip, unless there is more than a megabyte of events, or a snapshot that can't
        be decoded: a warning is logged then, and all events are read.
        """
        _check_main(aggregate)
        next_sequence, fields, page = await self._transport.run(
            scripts.LOAD,
            [self._keys.events(aggregate), self._keys.snapshots(aggregate)[0]],
            [_PAGE_EVENTS],
        )
        snapshot = decode_or_warn(aggregate, fields)
        if fields and snapshot is None:
            return Loaded(None, await self.read(aggregate, stop=next_sequence), next_sequence)
        start = 0 if snapshot is None else snapshot.sequence + 1
        if start >= next_sequence:
            return Loaded(snapshot, [], next_sequence)
        wanted = _Range(aggregate, start, next_sequence)
        events, error = await self._decode_page(wanted, page[1:])
        if error:
            raise error
        if page[0]:
            rest = wanted.after(int(page[0]))
            events += [event async for more in self._pages(rest) for event in more]
        return Loaded(snapshot, events, next_sequence)

    async def delete(self, aggregate: Aggregate) -> int:
        """Erase an aggregate: events, snapshots, positions, index entries, in one atomic step.

        Returns how many events there were; 0 for an unknown one. Its next event gets sequence 0.
        """
        _check_main(aggregate)
        handlers: list[bytes] = []
        for _ in range(_DELETE_ROUNDS):
            names = [name.decode() for name in handlers]
            outcome, *rest = await self._transport.run(
                scripts.DELETE,
                [
                    self._keys.events(aggregate),
                    *self._keys.snapshots(aggregate),
                    self._keys.handlers(aggregate),
                    *self._index_keys(aggregate),
                    *(self._keys.position(name, aggregate) for name in names),
                ],
                [aggregate.domain, aggregate.edition, aggregate.root, *names],
            )
            if outcome == b"ok":
                return int(rest[0])
            handlers = rest
        raise self._transport.misfit("delete")

    def domains(self) -> AsyncIterator[str]:
        """Iterate over the domains that have events, in alphabetical order."""
        return self._names(self._keys.domains())

    def editions(self, domain: str) -> AsyncIterator[str]:
        """Iterate over the editions of a domain that have events, in alphabetical order."""
        return self._names(self._keys.editions(check_name("domain", domain)))

    def roots(self, domain: str, *, edition: str = MAIN) -> AsyncIterator[str]:
        """Iterate over the roots of a domain, each once, least recently appended to first.

        A root that is there from beginning to end is never missed, also while others write. The
        names that were given out are remembered until the end of the iteration.
        """
        check_name("edition", edition)
        return self._roots(self._keys.roots(check_name("domain", domain), edition))

    # Writing

    def _index_keys(self, aggregate: Aggregate) -> list[str]:
        return [
            self._keys.roots(aggregate.domain, aggregate.edition),
            self._keys.editions(aggregate.domain),
            self._keys.domains(),
        ]

    def _encode(self, batch: list[Event]) -> tuple[list[bytes], int]:
        """Return two arguments of the script for each event, and their size in bytes."""
        if len(batch) > self._limits.max_append_events:
            raise EventTooLarge("max_append_events", self._limits.max_append_events, len(batch))
        arguments: list[bytes] = []
        total = 0
        for index, event in enumerate(batch):
            time, member = codec.encode_event(event)
            if len(member) > self._limits.max_event_bytes:
                limit = self._limits.max_event_bytes
                raise EventTooLarge("max_event_bytes", limit, len(member), index)
            arguments += (time, member)
            total += len(time) + len(member)
        if total > self._limits.max_append_bytes:
            raise EventTooLarge("max_append_bytes", self._limits.max_append_bytes, total)
        return arguments, total

    # Reading

    async def _pages(self, wanted: _Range) -> AsyncIterator[list[RecordedEvent]]:
        while not wanted.is_empty():
            keys = [self._keys.events(wanted.aggregate)]
            looked_at, *members = await self._transport.run(scripts.READ, keys, wanted.arguments())
            events, error = await self._decode_page(wanted, members)
            yield events
            if error:
                raise error
            if not looked_at:
                return
            wanted = wanted.after(int(looked_at))
            if wanted.limit is not None:
                wanted = replace(wanted, limit=wanted.limit - len(events))

    async def _stream(self, wanted: _Range) -> AsyncIterator[RecordedEvent]:
        async for page in self._pages(wanted):
            for event in page:
                yield event

    async def _decode_page(
        self, wanted: _Range, members: list[bytes]
    ) -> tuple[list[RecordedEvent], CorruptEvent | None]:
        """Return the events, or those before one that can't be read, and what is wrong with it."""
        events: list[RecordedEvent] = []
        key = self._keys.events(wanted.aggregate)
        place = None if wanted.reverse else wanted.start
        for member in members:
            try:
                event = RecordedEvent.of_member(wanted.aggregate, key, member)
            except codec.Undecodable as error:
                return events, await self._corrupt(wanted, member, str(error))
            if wanted.until is not None:
                # The script compares doubles; here it is exact.
                if event.time <= wanted.until:
                    events.append(event)
                continue
            if place is not None and event.sequence != place:
                return events, await self._misplaced(wanted, member, place)
            place = event.sequence + (-1 if wanted.reverse else 1)
            events.append(event)
        return events, None

    async def _corrupt(self, wanted: _Range, member: bytes, why: str) -> CorruptEvent:
        score = await self._score(wanted, member)
        sequence = wanted.start if score is None else score
        return CorruptEvent(self._keys.events(wanted.aggregate), sequence, why)

    async def _misplaced(self, wanted: _Range, member: bytes, place: int) -> CorruptEvent:
        is_there = await self._score(wanted, member) == place
        why = "its header names another sequence" if is_there else "the event is missing"
        return CorruptEvent(self._keys.events(wanted.aggregate), place, why)

    async def _score(self, wanted: _Range, member: bytes) -> int | None:
        """Return where a member stands; None if it is gone meanwhile."""
        key = self._keys.events(wanted.aggregate)
        score = await self._transport.command(forms.is_score, "ZSCORE", key, member)
        if score is None:
            return None
        place = float(score)  # text in RESP2, a float in RESP3
        return int(place) if place.is_integer() and place >= 0 else None

    # Listing

    async def _names(self, key: str) -> AsyncIterator[str]:
        start = b"-"
        while True:
            page: list[bytes] = await self._transport.command(
                forms.is_texts, "ZRANGE", key, start, "+", "BYLEX", "LIMIT", 0, _PAGE_NAMES
            )
            for name in page:
                yield name.decode()
            if len(page) < _PAGE_NAMES:
                return
            start = b"(" + page[-1]

    async def _roots(self, key: str) -> AsyncIterator[str]:
        # An append moves its root to the end of the index. So a root may come by again, but it
        # can't slip past: what is before the place we have come to was given out.
        given: set[bytes] = set()
        start = b"-inf"
        while True:
            page = _pairs(
                await self._transport.command(
                    forms.is_scored,
                    "ZRANGE",
                    key,
                    start,
                    "+inf",
                    "BYSCORE",
                    "LIMIT",
                    0,
                    _PAGE_NAMES,
                    "WITHSCORES",
                )
            )
            for root, _ in page:
                if root not in given:
                    given.add(root)
                    yield root.decode()
            if len(page) < _PAGE_NAMES:
                return
            start = b"(%d" % int(float(page[-1][1]))


def _pairs(reply: list[Any]) -> list[tuple[bytes, bytes | float]]:
    """Return members and scores: RESP3 has them in pairs, RESP2 in a flat list."""
    if reply and isinstance(reply[0], list):
        return [(member, score) for member, score in reply]
    return list(zip(reply[::2], reply[1::2], strict=True))


def _check_main(aggregate: Aggregate) -> None:
    if check_aggregate(aggregate).edition != MAIN:
        why = f"this version keeps events on the edition {MAIN!r} only"
        raise InvalidName("edition", aggregate.edition, why)


def _check_batch(events: Iterable[Event]) -> list[Event]:
    if not isinstance(events, Iterable):
        why = f"a list of Event is wanted, not {type(events).__name__}"
        raise InvalidType("events", why)
    batch = list(events)
    for index, event in enumerate(batch):
        if not isinstance(event, Event):
            why = f"at index {index} is a {type(event).__name__}, an Event is wanted"
            raise InvalidType("events", why)
    return batch
