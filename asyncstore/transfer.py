"""Events from and to JSON lines: what `asyncstore import` and `asyncstore export` do.

A line is one event, an object with `domain`, `root`, `type`, `data` (or `data_base64`, for bytes),
and if known `time` (ISO 8601 with an offset), `metadata`, `id`, `edition`, `sequence`. Lines of one
aggregate stand in their order; between aggregates no order is needed.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import anyio

from asyncstore import codec
from asyncstore.errors import (
    CorruptEvent,
    EventTooLarge,
    InvalidName,
    InvalidType,
    InvalidValue,
    OutcomeUnknown,
    SequenceConflict,
)
from asyncstore.names import MAIN, check_sequence
from asyncstore.values import ANY, Aggregate, Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from uuid import UUID

    from asyncstore.recorded import RecordedEvent
    from asyncstore.settings import Settings
    from asyncstore.store import Store

CHUNK_LINES: Final = 2000
CHUNK_BYTES: Final = 16 * 1024 * 1024
_WRITERS: Final = 32
_TRIES: Final = 100  # each means that somebody else has written to the aggregate meanwhile
_ID_NAMESPACE: Final = uuid.UUID("6d1f4a62-6c1c-5b8e-9d5b-3f0a5f1f8a11")
_KEYS: Final = frozenset(
    {
        "domain",
        "root",
        "edition",
        "sequence",
        "type",
        "time",
        "id",
        "metadata",
        "data",
        "data_base64",
    }
)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was not loaded, and why. `why` never shows the line's data."""

    number: int
    why: str


@dataclass(slots=True)
class ImportReport:
    """What an import did.

    `stored` events are new, `present` ones were there before, `held_back` ones follow a bad line
    of their aggregate. `stopped` is True where a line did not even name its aggregate: nothing
    after it was loaded, for any of it might have had to come later.
    """

    stored: int = 0
    present: int = 0
    held_back: int = 0
    aggregates: int = 0
    stopped: bool = False
    bad_lines: list[BadLine] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    event: Event
    sequence: int | None
    size: int


@dataclass(slots=True)
class _Progress:
    """How far an aggregate's lines are.

    `known` are the events in the store, by id, once they had to be read. Until then the aggregate
    is taken to have `next_sequence` events, and the append finds out if that is wrong.
    """

    lines: int = 0
    next_sequence: int = 0
    known: dict[UUID, int] | None = None
    blocked: bool = False
    named: set[UUID] = field(default_factory=set)  # ids that lines without a sequence brought


@dataclass(slots=True)
class _Plan:
    """What is to be done with some lines of one aggregate."""

    present: int = 0
    new: list[_Line] = field(default_factory=list)
    bad: BadLine | None = None
    held_back: int = 0


class _Unusable(ValueError):
    """A line can't be loaded. `aggregate` is None where even that is not clear."""

    def __init__(self, why: str, aggregate: Aggregate | None = None) -> None:
        super().__init__(why)
        self.aggregate = aggregate


class Import:
    """Loads lines into a store: each event once, those of an aggregate in their order.

    An event that is in its aggregate already, by its id, is left out, so an import can be run
    again after it was cut off, or when its file has grown. A line without an `id` gets one made
    from its content and its place among the lines of its aggregate. A line with a `sequence` must
    get just that one. After a bad line nothing more of its aggregate is loaded.
    """

    def __init__(self, store: Store) -> None:
        self.report = ImportReport()
        self._store = store
        self._progress: defaultdict[Aggregate, _Progress] = defaultdict(_Progress)
        self._writers = anyio.Semaphore(_WRITERS)

    async def load(self, chunk: Iterable[tuple[int, bytes]]) -> None:
        """Load numbered lines. Nothing is loaded any more once the report says `stopped`."""
        batches: defaultdict[Aggregate, list[_Line]] = defaultdict(list)
        for number, text in chunk:
            if text.strip() and not self.report.stopped:
                self._sort_in(number, text, batches)
        try:
            async with anyio.create_task_group() as tasks:
                for aggregate, lines in batches.items():
                    tasks.start_soon(self._write, aggregate, lines)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        self.report.bad_lines.sort(key=lambda line: line.number)
        self.report.aggregates = len(self._progress)

    def _sort_in(
        self, number: int, text: bytes, batches: defaultdict[Aggregate, list[_Line]]
    ) -> None:
        try:
            fields = _parse_fields(text)
            aggregate = _parse_aggregate(fields)
            progress = self._progress[aggregate]
            if progress.blocked:
                self.report.held_back += 1
                return
            progress.lines += 1
            line = _parse_line(number, len(text), aggregate, fields, progress.lines)
            if "id" in fields and line.sequence is None:
                if line.event.id in progress.named:
                    self.report.present += 1  # the same event twice; with a sequence, that shows
                    return
                progress.named.add(line.event.id)
            batches[aggregate].append(line)
        except _Unusable as error:
            self._block(error.aggregate, BadLine(number, str(error)))

    def _block(self, aggregate: Aggregate | None, line: BadLine) -> None:
        self.report.bad_lines.append(line)
        if aggregate is None:
            self.report.stopped = True
        else:
            self._progress[aggregate].blocked = True

    async def _write(self, aggregate: Aggregate, lines: list[_Line]) -> None:
        async with self._writers:
            for batch in _cut(lines, self._store.settings):
                await self._write_batch(aggregate, batch)

    async def _write_batch(self, aggregate: Aggregate, lines: list[_Line]) -> None:
        progress = self._progress[aggregate]
        refused: dict[int, str] = {}
        for _ in range(_TRIES):
            if progress.known is None and (lines[0].sequence or 0) > progress.next_sequence:
                await self._look_up(aggregate)
            plan = _plan(progress, lines, refused)
            try:
                await self._carry_out(aggregate, plan)
            except EventTooLarge as error:
                if error.index is None:
                    raise
                refused[plan.new[error.index].number] = str(error)
            except (InvalidType, InvalidValue):
                refused |= _unstorable(plan.new)
            except (SequenceConflict, OutcomeUnknown):
                # Somebody was there before, or we were: what is stored says who.
                await self._look_up(aggregate)
            else:
                return
        raise SequenceConflict(aggregate, ANY, progress.next_sequence)

    async def _carry_out(self, aggregate: Aggregate, plan: _Plan) -> None:
        progress = self._progress[aggregate]
        if plan.new:
            events = [line.event for line in plan.new]
            await self._store.events.append(aggregate, events, expected=progress.next_sequence)
            if progress.known is not None:
                places = range(progress.next_sequence, progress.next_sequence + len(events))
                progress.known.update(zip((event.id for event in events), places, strict=True))
            progress.next_sequence += len(events)
        self.report.stored += len(plan.new)
        self.report.present += plan.present
        self.report.held_back += plan.held_back
        if plan.bad is not None:
            self._block(aggregate, plan.bad)

    async def _look_up(self, aggregate: Aggregate) -> None:
        """Learn which events are stored, or which have come since we learned it."""
        progress = self._progress[aggregate]
        start = 0 if progress.known is None else progress.next_sequence
        new = await self._store.events.read(aggregate, start=start)
        for event in new:
            _ = event.data  # one that can't be decoded is not there: say so
        progress.known = (progress.known or {}) | {event.id: event.sequence for event in new}
        progress.next_sequence = start + len(new)


def _cut(lines: list[_Line], settings: Settings) -> Iterator[list[_Line]]:
    """Cut lines into appends that the settings allow. A line is about as large as its event."""
    batch: list[_Line] = []
    size = 0
    for line in lines:
        size += line.size
        if len(batch) == settings.max_append_events or size > settings.max_append_bytes // 2:
            if batch:
                yield batch
            batch, size = [], line.size
        batch.append(line)
    yield batch


def _plan(progress: _Progress, lines: list[_Line], refused: dict[int, str]) -> _Plan:
    plan = _Plan()
    known = progress.known or {}
    present = [index for index, line in enumerate(lines) if line.event.id in known]
    for index, line in enumerate(lines):
        place = known.get(line.event.id)
        due = progress.next_sequence + len(plan.new) if place is None else place
        if line.number in refused:
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
        plan.bad = BadLine(line.number, why)
        plan.held_back = len(lines) - index - 1
        break
    return plan


def _unstorable(lines: list[_Line]) -> dict[int, str]:
    """Return the first line whose event has no stored form, and why."""
    for line in lines:
        try:
            codec.encode_event(line.event)
        except (InvalidType, InvalidValue) as error:
            return {line.number: str(error)}
    return {}


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# Parsing


def _parse_fields(text: bytes) -> dict[str, Any]:
    try:
        # Unlike orjson, this keeps integers of any size as they are, so that none changes unseen.
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _Unusable("it is not JSON") from None
    if not isinstance(fields, dict):
        raise _Unusable("it is not a JSON object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _parse_aggregate(fields: dict[str, Any]) -> Aggregate:
    for key in ("domain", "root"):
        if key not in fields:
            raise _Unusable(f"it has no {key!r}")
    try:
        return Aggregate(fields["domain"], fields["root"], fields.get("edition", MAIN))
    except InvalidName as error:
        raise _Unusable(str(error)) from None


def _parse_line(
    number: int, size: int, aggregate: Aggregate, fields: dict[str, Any], place: int
) -> _Line:
    try:
        if aggregate.edition != MAIN:
            raise _Unusable(f"this version keeps events on the edition {MAIN!r} only")
        unknown = fields.keys() - _KEYS
        if unknown:
            raise _Unusable(f"it has the unknown key {min(unknown)!r}")
        sequence = fields.get("sequence")
        if sequence is not None:
            check_sequence("sequence", sequence)
        return _Line(number, _parse_event(aggregate, fields, place), sequence, size)
    except (_Unusable, InvalidType, InvalidValue) as error:
        raise _Unusable(str(error), aggregate) from None


def _parse_event(aggregate: Aggregate, fields: dict[str, Any], place: int) -> Event:
    if "type" not in fields:
        raise _Unusable("it has no 'type'")
    if ("data" in fields) == ("data_base64" in fields):
        raise _Unusable("it must have either 'data' or 'data_base64'")
    return Event(
        fields["type"],
        _parse_data(fields),
        metadata=_parse_metadata(fields.get("metadata")),
        id=_parse_id(fields["id"]) if "id" in fields else _make_id(aggregate, fields, place),
        time=_parse_time(fields.get("time")),
    )


def _parse_data(fields: dict[str, Any]) -> Any:
    if "data" in fields:
        return fields["data"]
    try:
        return base64.b64decode(fields["data_base64"], validate=True)
    except (TypeError, ValueError):
        raise _Unusable("its 'data_base64' is not base64") from None


def _parse_metadata(value: Any) -> dict[str, Any] | None:
    if value is None or isinstance(value, dict):
        return value
    raise _Unusable("its 'metadata' is not an object")


def _parse_time(value: Any) -> datetime | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise _Unusable("its 'time' is not one of ISO 8601") from None


def _parse_id(value: Any) -> UUID:
    try:
        return uuid.UUID(value)
    except (AttributeError, TypeError, ValueError):
        raise _Unusable("its 'id' is not a UUID") from None


def _make_id(aggregate: Aggregate, fields: dict[str, Any], place: int) -> UUID:
    """Return the same id for the same content at the same place of the same aggregate."""
    content = [aggregate.domain, aggregate.edition, aggregate.root, place, fields]
    return uuid.uuid5(_ID_NAMESPACE, codec.encode_json("the line", content).decode())


# Export


async def export_lines(
    store: Store,
    domains: Iterable[str] | None = None,
    on_corrupt: Callable[[CorruptEvent], None] | None = None,
) -> AsyncIterator[bytes]:
    """Iterate over the events of a store, or of some domains, as lines that Import takes.

    Lines of one aggregate stand together, in their order; aggregates come in no particular order.
    An event that can't be read is handed to `on_corrupt` and left out; without one it is raised.
    The events after it come without their sequence, for an import has to close the gap.
    """
    names = [name async for name in store.events.domains()] if domains is None else list(domains)
    for domain in names:
        async for root in store.events.roots(domain):
            async for line in _aggregate_lines(store, Aggregate(domain, root), on_corrupt):
                yield line


async def _aggregate_lines(
    store: Store, aggregate: Aggregate, on_corrupt: Callable[[CorruptEvent], None] | None
) -> AsyncIterator[bytes]:
    start, gap = 0, False
    while True:
        try:
            async for event in store.events.stream(aggregate, start=start):
                yield _write_line(event, with_sequence=not gap)
                start = event.sequence + 1
        except CorruptEvent as error:
            if on_corrupt is None:
                raise
            on_corrupt(error)
            start, gap = max(start, error.sequence + 1), True
        else:
            return


def _write_line(event: RecordedEvent, *, with_sequence: bool) -> bytes:
    fields: dict[str, Any] = {
        "domain": event.aggregate.domain,
        "edition": event.aggregate.edition,
        "root": event.aggregate.root,
        **({"sequence": event.sequence} if with_sequence else {}),
        "type": event.type,
        "time": event.time.isoformat(),
        "id": str(event.id),
    }
    if event.metadata:
        fields["metadata"] = event.metadata
    # The data by themselves: what could just be nested deep enough to be stored could not be
    # written one level deeper.
    if isinstance(event.data, bytes):
        name, data = b"data_base64", b'"' + base64.b64encode(event.data) + b'"'
    else:
        name, data = b"data", codec.encode_json("data", event.data)
    return b'%s,"%s":%s}\n' % (codec.encode_json("the event", fields)[:-1], name, data)
