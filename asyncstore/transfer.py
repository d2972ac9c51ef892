"""Import and export: what a store holds, as JSON lines and back. The lines are in `lines`."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from asyncstore import codec
from asyncstore.attached import Attachments
from asyncstore.errors import (
    BranchExists,
    CorruptEvent,
    CorruptPosition,
    EventTooLarge,
    InvalidType,
    InvalidValue,
    OutcomeUnknown,
    SequenceConflict,
    first_of,
)
from asyncstore.lines import (
    BranchLine,
    EventLine,
    Line,
    PositionLine,
    SnapshotLine,
    Unusable,
    is_of_event,
    parse_aggregate,
    parse_fields,
    parse_line,
    write_branch,
    write_event,
    write_position,
    write_snapshot,
)
from asyncstore.names import MAIN, MAX_SEQUENCE
from asyncstore.values import ANY, Aggregate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
    from uuid import UUID

    from asyncstore.recorded import RecordedEvent
    from asyncstore.settings import Settings
    from asyncstore.store import Store
    from asyncstore.values import Snapshot

T = TypeVar("T")

Corrupt = CorruptEvent | CorruptPosition
"""What export can leave out."""

CHUNK_LINES: Final = 2000
CHUNK_BYTES: Final = 16 * 1024 * 1024
_WRITERS: Final = 32
_TRIES: Final = 100  # each means that somebody else has written to the aggregate meanwhile


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was not loaded, and why. `why` never shows the line's data."""

    number: int
    why: str


@dataclass(slots=True)
class ImportReport:
    """What an import did.

    `stored` events, `branches`, `snapshots` and `positions` are new; what `present` lines bring was
    there before. Lines are `held_back` that follow a bad line of their aggregate, or for an edition
    one of main, and those of an append with an idempotency key that has a bad line, or whose last
    line has not come.
    `stopped` is True where a line did not even name its aggregate: nothing after it was loaded, for
    any of it might have had to come later.
    """

    stored: int = 0
    branches: int = 0
    snapshots: int = 0
    positions: int = 0
    present: int = 0
    held_back: int = 0
    aggregates: int = 0
    stopped: bool = False
    bad_lines: list[BadLine] = field(default_factory=list)


@dataclass(slots=True)
class _Progress:
    """How far an aggregate's lines are.

    `known` are the events in the store, by id, once they had to be read; on another edition its
    own. Until then the aggregate is taken to have `next_sequence` events, and the append finds out
    if that is wrong. An edition that `may_diverge` reads as main as yet: its first event may get
    any sequence up to the next one.
    """

    lines: int = 0
    next_sequence: int = 0
    known: dict[UUID, int] | None = None
    may_diverge: bool = False
    blocked: bool = False
    named: set[UUID] = field(default_factory=set)  # ids that lines without a sequence brought
    waiting: list[EventLine] = field(default_factory=list)  # for the last line of their append

    def took(self, lines: list[EventLine], first_sequence: int) -> None:
        """Note that an append has stored the events of these lines."""
        self.next_sequence = first_sequence + len(lines)
        self.may_diverge = False
        if self.known is not None:
            places = range(first_sequence, self.next_sequence)
            self.known.update(zip((line.event.id for line in lines), places, strict=True))


@dataclass(slots=True)
class _Plan:
    """What is to be done with some lines of one aggregate: the present ones come first."""

    present: int = 0
    new: list[EventLine] = field(default_factory=list)
    bad: BadLine | None = None
    held_back: int = 0

    def end_with(self, line: EventLine, why: str, after: int) -> None:
        """Plan to load nothing from a bad line on; `after` lines come after it."""
        self.bad = BadLine(line.number, why)
        self.held_back = after
        key = line.trace.idempotency_key
        while key is not None and self.new and self.new[-1].trace.idempotency_key == key:
            self.new.pop()  # alone, it would take the key away from the rest of its append
            self.held_back += 1


class Import:
    """Loads lines into a store: each event once, those of an aggregate in their order.

    An event that is in its aggregate already, by its id, is left out, so an import can be run
    again after it was cut off, or when its file has grown. A line without an `id` gets one made
    from its content and its place among the lines of its aggregate. A line with a `sequence` must
    get just that one. After a bad line nothing more of its aggregate is loaded, and after one of
    main nothing more of its editions, which share what may be wrong.
    """

    def __init__(self, store: Store) -> None:
        self.report = ImportReport()
        self._store = store
        self._progress: defaultdict[Aggregate, _Progress] = defaultdict(_Progress)
        self._writers = anyio.Semaphore(_WRITERS)

    def begin_at(self, aggregate: Aggregate, sequence: int) -> None:
        """Take lines of an aggregate for the events from a sequence on: those before are there."""
        self._progress[aggregate] = _Progress(next_sequence=sequence, known={})

    async def load(self, chunk: Iterable[tuple[int, bytes]]) -> None:
        """Load numbered lines. Nothing is loaded any more once the report says `stopped`."""
        batches: defaultdict[Aggregate, list[Line]] = defaultdict(list)
        for number, text in chunk:
            if text.strip() and not self.report.stopped:
                self._sort_in(number, text, batches)
        # What an edition diverges from has to be there before it.
        of_main = [aggregate for aggregate in batches if aggregate.edition == MAIN]
        await self._write_all({aggregate: batches.pop(aggregate) for aggregate in of_main})
        await self._write_all(batches)
        self.report.bad_lines.sort(key=lambda line: line.number)
        self.report.aggregates = len(self._progress)

    # Sorting lines by their aggregates

    def _sort_in(
        self, number: int, text: bytes, batches: defaultdict[Aggregate, list[Line]]
    ) -> None:
        try:
            fields = parse_fields(text)
            aggregate = parse_aggregate(fields)
            progress = self._progress[aggregate]
            if progress.blocked:
                self.report.held_back += 1
                return
            progress.lines += is_of_event(fields)
            line = parse_line(number, len(text), aggregate, fields, progress.lines)
            if not isinstance(line, EventLine):
                batches[aggregate].append(line)
            elif not self._is_repeated(progress, line, named="id" in fields):
                batches[aggregate] += self._complete(aggregate, line)
        except Unusable as error:
            self._block(error.aggregate, BadLine(number, str(error)))

    def _is_repeated(self, progress: _Progress, line: EventLine, *, named: bool) -> bool:
        """Whether the import has had the event before; with a sequence, that shows later."""
        if not named or line.sequence is not None:
            return False
        if line.event.id in progress.named:
            self.report.present += 1
            return True
        progress.named.add(line.event.id)
        return False

    def _complete(self, aggregate: Aggregate, line: EventLine) -> list[EventLine]:
        """Return the lines that wait for this one, and it; [] if they go on waiting."""
        progress = self._progress[aggregate]
        if progress.waiting and progress.waiting[-1].trace != line.trace:
            why = "the line before it says that its append goes on, but this one is of another"
            raise Unusable(why, aggregate)
        progress.waiting.append(line)
        if line.append_continues:
            self.report.held_back += 1
            return []
        complete, progress.waiting = progress.waiting, []
        self.report.held_back -= len(complete) - 1
        return complete

    def _block(self, aggregate: Aggregate | None, line: BadLine) -> None:
        self.report.bad_lines.append(line)
        if aggregate is None:
            self.report.stopped = True
        else:
            self._progress[aggregate].blocked = True

    # Writing them

    async def _write_all(self, batches: Mapping[Aggregate, list[Line]]) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                for aggregate, lines in batches.items():
                    tasks.start_soon(self._write, aggregate, lines)
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    async def _write(self, aggregate: Aggregate, lines: list[Line]) -> None:
        # `blocked` is no help here: it may be a later line that is bad.
        goes_on = not self._has_bad_main(aggregate)
        async with self._writers:
            for part in _parts(lines):
                if not goes_on:
                    self.report.held_back += len(part) if isinstance(part, list) else 1
                elif isinstance(part, list):
                    goes_on = await self._write_events(aggregate, part)
                elif isinstance(part, BranchLine):
                    goes_on = await self._write_branch(aggregate, part)
                elif isinstance(part, SnapshotLine):
                    goes_on = await self._write_snapshot(aggregate, part)
                else:
                    goes_on = await self._write_position(aggregate, part)

    def _has_bad_main(self, aggregate: Aggregate) -> bool:
        main = self._progress.get(aggregate.on(MAIN))
        return aggregate.edition != MAIN and main is not None and main.blocked

    async def _write_branch(self, aggregate: Aggregate, line: BranchLine) -> bool:
        """Let an edition diverge; return False for a bad line."""
        why = await self._diverge(aggregate, line.diverges_at)
        if why:
            self._block(aggregate, BadLine(line.number, why))
            return False
        await self._confirm(aggregate)
        return True

    async def _write_snapshot(self, aggregate: Aggregate, line: SnapshotLine) -> bool:
        """Keep a snapshot, unless there is one that is not older; return False for a bad line."""
        found = await self._store.snapshots.get(aggregate, at=line.sequence)
        if found is not None and found.sequence == line.sequence and _is_not_older(found, line):
            self.report.present += 1
            return True
        try:
            await _again_if_unknown(lambda: put_snapshot(self._store, aggregate, line))
        except (InvalidType, InvalidValue) as error:
            self._block(aggregate, BadLine(line.number, str(error)))
            return False
        self.report.snapshots += 1
        return True

    async def _write_position(self, aggregate: Aggregate, line: PositionLine) -> bool:
        """Move a handler's position, never backwards: it may have gone on here."""
        advance = self._store.positions.advance
        has_moved = await _again_if_unknown(lambda: advance(line.handler, aggregate, line.position))
        if has_moved:
            self.report.positions += 1
        else:
            self.report.present += 1
        return True

    async def _diverge(self, aggregate: Aggregate, at: int, tries: int = _TRIES) -> str:
        """Return why an edition can't diverge there; empty if it has."""
        try:
            await self._store.events.branch(aggregate, at=at)
        except BranchExists as error:
            if error.diverged_at != at:
                return f"it diverges at {at}, but it has diverged at {error.diverged_at} already"
            self.report.present += 1
        except SequenceConflict as error:
            return f"it diverges at {at}, but main has only {error.actual} events of its root"
        except OutcomeUnknown:
            if tries == 1:
                raise
            return await self._diverge(aggregate, at, tries - 1)  # if it was done, this says so
        else:
            self.report.branches += 1
        return ""

    async def _write_events(self, aggregate: Aggregate, lines: list[EventLine]) -> bool:
        """Append what the store does not have; return False if that ended with a bad line."""
        progress = self._progress[aggregate]
        refused: dict[int, str] = {}
        tries = 0
        while tries < _TRIES:
            if progress.known is None and _is_in_doubt(aggregate, progress, lines[0]):
                await self._look_up(aggregate)
            plan = _plan(progress, lines, refused)
            if plan.present:
                # Who has stored them may have asked for less than we have to, or not heard of more.
                await self._confirm(aggregate)
            stored = await self._append_all(aggregate, plan.new, refused)
            self.report.present += plan.present
            self.report.stored += stored
            if stored == len(plan.new):
                self.report.held_back += plan.held_back
                if plan.bad is not None:
                    self._block(aggregate, plan.bad)
                return plan.bad is None
            lines = lines[plan.present + stored :]
            tries = 0 if stored else tries + 1
        raise SequenceConflict(aggregate, ANY, progress.next_sequence)

    async def _confirm(self, aggregate: Aggregate, tries: int = _TRIES) -> None:
        """See that what is there is as durable as an append of ours would be."""
        try:
            await self._store.events.confirm(aggregate)
        except OutcomeUnknown:
            if tries == 1:
                raise
            await self._confirm(aggregate, tries - 1)

    async def _append_all(
        self, aggregate: Aggregate, lines: list[EventLine], refused: dict[int, str]
    ) -> int:
        """Return how many are stored: all, unless there is something new to plan with."""
        stored = 0
        for batch in _cut(lines, self._store.settings):
            if not await self._append(aggregate, batch, refused):
                break
            stored += len(batch)
        return stored

    async def _append(
        self, aggregate: Aggregate, lines: list[EventLine], refused: dict[int, str]
    ) -> bool:
        """Append the events of lines with one trace; return whether that was done."""
        progress = self._progress[aggregate]
        first, trace = lines[0], lines[0].trace
        expected = progress.next_sequence
        if progress.may_diverge and first.sequence is not None:
            expected = first.sequence
        try:
            appended = await self._store.events.append(
                aggregate,
                [line.event for line in lines],
                expected=expected,
                idempotency_key=trace.idempotency_key,
                correlation_id=trace.correlation_id,
                source=trace.source,
            )
        except EventTooLarge as error:
            refused[lines[error.index or 0].number] = str(error)
        except (InvalidType, InvalidValue):
            refused |= _unstorable(lines)
        except (SequenceConflict, OutcomeUnknown):
            # Somebody was there before, or we were: what is stored says who.
            await self._look_up(aggregate)
        else:
            if not appended.duplicate:
                progress.took(lines, appended.first_sequence)
                return True
            # That tells of the key only. Whether these events are stored, their ids tell.
            await self._look_up(aggregate)
            if first.event.id not in (progress.known or {}):
                refused[first.number] = "its idempotency key is in the store, with other events"
        return False

    async def _look_up(self, aggregate: Aggregate) -> None:
        """Learn which events are stored, or which have come since we learned it."""
        progress = self._progress[aggregate]
        start: int | None = progress.next_sequence
        if progress.known is None or progress.may_diverge:
            start = 0
            if aggregate.edition != MAIN:
                start = await self._store.events.divergence(aggregate)
            progress.may_diverge = start is None
        if start is None:
            progress.known = {}  # what main has is not the edition's own
            progress.next_sequence = await self._store.events.next_sequence(aggregate)
            return
        new = await self._store.events.read(aggregate, start=start)
        for event in new:
            _ = event.data  # one that can't be decoded is not there: say so
        progress.known = (progress.known or {}) | {event.id: event.sequence for event in new}
        progress.next_sequence = start + len(new)


async def put_snapshot(store: Store, aggregate: Aggregate, made: Snapshot | SnapshotLine) -> None:
    """Keep a snapshot as it was made elsewhere."""
    await store.snapshots.put(
        aggregate,
        sequence=made.sequence,
        state=made.state,
        retention=made.retention,
        schema_version=made.schema_version,
        time=made.time,
    )


async def _again_if_unknown(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call that may be made twice, until its outcome is known."""
    for _ in range(_TRIES - 1):
        try:
            return await call()
        except OutcomeUnknown:
            pass
    return await call()


def _is_not_older(found: Snapshot, line: SnapshotLine) -> bool:
    return line.time is None or found.time >= line.time


def _parts(
    lines: list[Line],
) -> Iterator[list[EventLine] | BranchLine | SnapshotLine | PositionLine]:
    """Take other lines out from between those of events."""
    events: list[EventLine] = []
    for line in lines:
        if isinstance(line, EventLine):
            events.append(line)
            continue
        if events:
            yield events
        yield line
        events = []
    if events:
        yield events


def _cut(lines: list[EventLine], settings: Settings) -> Iterator[list[EventLine]]:
    """Cut lines into appends: one trace each, and what the settings allow.

    A line is about as large as its event. An append with an idempotency key is not cut.
    """
    batch: list[EventLine] = []
    size = 0
    for line in lines:
        size += line.size
        is_full = len(batch) == settings.max_append_events or size > settings.max_append_bytes // 2
        if batch and (
            line.trace != batch[0].trace or (is_full and line.trace.idempotency_key is None)
        ):
            yield batch
            batch, size = [], line.size
        batch.append(line)
    if batch:
        yield batch


def _is_in_doubt(aggregate: Aggregate, progress: _Progress, line: EventLine) -> bool:
    """Whether to look first: where the guess is wrong, or an edition would diverge by it."""
    return aggregate.edition != MAIN or (line.sequence or 0) > progress.next_sequence


def _plan(progress: _Progress, lines: list[EventLine], refused: dict[int, str]) -> _Plan:
    plan = _Plan()
    known = progress.known or {}
    end = progress.next_sequence
    if progress.may_diverge:
        end = end if lines[0].sequence is None else lines[0].sequence
        refused = {lines[0].number: _why_not_here(progress, lines[0])} | refused
    present = [index for index, line in enumerate(lines) if line.event.id in known]
    for index, line in enumerate(lines):
        place = known.get(line.event.id)
        due = end + len(plan.new) if place is None else place
        if refused.get(line.number):
            why = refused[line.number]
        elif place is None and present and index < present[-1]:
            why = "the store has later lines of its aggregate, but not this one; was it changed?"
        elif line.sequence not in (None, due):
            why = f"its sequence is {line.sequence}, but its place is {due}"
        elif place is not None:
            plan.present += 1
            continue
        else:
            plan.new.append(line)
            continue
        plan.end_with(line, why, after=len(lines) - index - 1)
        break
    return plan


def _why_not_here(progress: _Progress, line: EventLine) -> str:
    """Return why an edition can't diverge with this line; empty if it can."""
    if line.sequence is None:
        return "it does not say where its edition diverges: no 'sequence', no 'diverges_at' before"
    if line.sequence > progress.next_sequence:
        there = f"main has only {progress.next_sequence} events of its root"
        return f"its edition diverges with it at its sequence, {line.sequence}, but {there}"
    return ""


def _unstorable(lines: list[EventLine]) -> dict[int, str]:
    """Return the first line whose event has no stored form, and why."""
    for line in lines:
        try:
            codec.encode_event(line.event, line.trace)
        except (InvalidType, InvalidValue) as error:
            return {line.number: str(error)}
    return {}


# Export


async def export_lines(
    store: Store,
    domains: Iterable[str] | None = None,
    on_corrupt: Callable[[Corrupt], None] | None = None,
) -> AsyncIterator[bytes]:
    """Iterate over what a store holds, or some domains of it, as lines that Import takes.

    Of each domain the events of main come first, then for each other edition where it diverges and
    its own events; right after the events of an aggregate come its snapshots and positions. Lines
    of one aggregate stand together, in their order; aggregates come in no particular order. What is
    written meanwhile may be left out, never what an edition needs; a position or snapshot that is
    put meanwhile, never an event that it stands on.

    An event or position that can't be read is handed to `on_corrupt` and left out; without one it
    is raised. The events after it come without their sequence, for an import has to close the gap;
    snapshots, positions and editions that shared it move down by it. A `source` keeps naming the
    sequence it named. A snapshot that can't be read is left out: it is only a short cut.
    """
    names = [name async for name in store.events.domains()] if domains is None else list(domains)
    for domain in names:
        # These before main is read: then main has all that they share, whatever others write.
        branches = [branch async for branch in branches_of(store, domain)]
        left_out: dict[str, list[int]] = {}
        async for root in store.events.roots(domain):
            history = History(store, Aggregate(domain, root), on_corrupt)
            async for line in _all_lines(history):
                yield line
            if history.left_out:
                left_out[root] = history.left_out
        for aggregate, at in branches:
            gaps = [gap for gap in left_out.get(aggregate.root, ()) if at is None or gap < at]
            if at is not None:
                yield write_branch(aggregate, at - len(gaps))
            history = History(store, aggregate, on_corrupt, at, gaps)
            with suppress(BranchExists):  # it was deleted meanwhile, and diverges elsewhere now
                async for line in _all_lines(history):
                    yield line


async def branches_of(store: Store, domain: str) -> AsyncIterator[tuple[Aggregate, int | None]]:
    """Iterate over what has left main, and where; None for what may have something else there."""
    attached = Attachments(store)
    async for edition in store.events.editions(domain):
        if edition == MAIN:
            continue
        async for root in store.events.roots(domain, edition=edition):
            aggregate = Aggregate(domain, root, edition)
            at = await store.events.divergence(aggregate)
            if at is not None:  # an index may name too much
                yield aggregate, at
        async for root in attached.only_attached(domain, edition):
            aggregate = Aggregate(domain, root, edition)
            if await store.events.divergence(aggregate) is None:
                yield aggregate, None


async def _all_lines(history: History) -> AsyncIterator[bytes]:
    """Iterate over the lines of an aggregate.

    How far handlers and snapshots are is read before the events: they must not be further than
    these.
    """
    attached, aggregate = Attachments(history.store), history.aggregate
    positions, newest = await asyncio.gather(
        attached.positions(aggregate, history.on_corrupt), attached.newest_snapshot(aggregate)
    )
    async for line in history.lines():
        yield line
    async for snapshot in attached.snapshots(aggregate, newest):
        place = history.moved(snapshot.sequence)
        if place >= 0:
            yield write_snapshot(aggregate, snapshot, place)
    for handler, position in positions.items():
        place = history.moved(position)
        if place >= 0:
            yield write_position(aggregate, handler, place)


@dataclass(slots=True)
class History:
    """The events of an aggregate itself: on another edition, without those that main has for it.

    `left_out` are the sequences of those that could not be read; to begin with, of those that main
    has for it.
    """

    store: Store
    aggregate: Aggregate
    on_corrupt: Callable[[Corrupt], None] | None
    diverges_at: int | None = None
    left_out: list[int] = field(default_factory=list)

    def moved(self, sequence: int) -> int:
        """Return the sequence that an import gives to what is at this one; -1 for none."""
        return sequence - sum(gap <= sequence for gap in self.left_out)

    async def lines(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Iterate over the lines of the events from a sequence up to another."""
        previous: RecordedEvent | None = None
        async for event in self._events(start, stop):
            if previous is not None:
                yield self._line(previous, event)
            previous = event
        if previous is not None:
            yield self._line(previous, None)

    async def _events(self, start: int, stop: int | None) -> AsyncIterator[RecordedEvent]:
        """Iterate over what can be read."""
        if self.aggregate.edition != MAIN and self.diverges_at is None:
            return
        start = max(start, self.diverges_at or 0)
        while True:
            events = self.store.events.stream(
                self.aggregate, start=start, stop=stop, diverge_at=self.diverges_at
            )
            try:
                async for event in events:
                    _ = event.data
                    yield event
                    start = event.sequence + 1
            except CorruptEvent as error:
                if self.on_corrupt is None:
                    raise
                self.on_corrupt(error)
                if error.sequence == MAX_SEQUENCE:  # nothing can be after it
                    return
                after = max(start, error.sequence + 1)
                self.left_out += range(start, after)
                start = after
            else:
                return

    def _line(self, event: RecordedEvent, following: RecordedEvent | None) -> bytes:
        key = event.idempotency_key
        continues = key is not None and following is not None and following.idempotency_key == key
        is_moved = bool(self.left_out and self.left_out[0] < event.sequence)
        return write_event(event, with_sequence=not is_moved, append_continues=continues)
