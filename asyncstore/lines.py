"""The JSON lines of `asyncstore import` and `asyncstore export`: their form, parsed and written.

A line is one event, an object with `domain`, `root`, `type`, `data` (or `data_base64`, for bytes),
and if known `time` (ISO 8601 with an offset), `metadata`, `id`, `edition`, `sequence`, and what its
append said of where it comes from: `correlation_id`, `idempotency_key`, and `source` (an object
with `domain`, `root`, `edition`, `sequence`). Lines of one aggregate stand in their order.

Or a line says where an aggregate leaves main on another edition: `domain`, `root`, `edition` and
`diverges_at`, nothing else. An export writes one for each branch, before its events, so that a
branch without events is kept, too, and so are branches whose events have lost their sequence. In
a line that was made by hand, the `sequence` of the first event says as much. An edition's lines
are its own events, not those that it shares with main, and they come after those of main, or in
the same chunk. Between aggregates no other order is needed.

An append with an idempotency key is stored as a whole or not at all, for a second append with the
key would write nothing. So an export marks each event of such an append but the last with
`append_continues`: an import keeps it back until all of them are there. Without the mark, lines
with the same key that follow each other are one append as far as they are in one chunk.

What an aggregate has beside its events comes after them. A line with `snapshot`, the sequence that
it was made at, has its `state` (or `state_base64`, for bytes), and if known `retention`, `time` and
`schema_version`. A line with `handler` and `position` says how far a handler is.

Not exported is what subscriptions keep beside positions: leases, tries, dead letters, and where
they began.
"""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from asyncstore import codec
from asyncstore.errors import InvalidName, InvalidType, InvalidValue
from asyncstore.names import MAIN, check_name, check_schema_version, check_sequence
from asyncstore.values import Aggregate, Event, Retention, Source, Trace, check_trace

if TYPE_CHECKING:
    from uuid import UUID

    from asyncstore.recorded import RecordedEvent
    from asyncstore.values import Snapshot

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
        "correlation_id",
        "idempotency_key",
        "source",
        "append_continues",
    }
)
_PLACE_KEYS: Final = frozenset({"domain", "root", "edition"})
_BRANCH_KEYS: Final = _PLACE_KEYS | {"diverges_at"}
_POSITION_KEYS: Final = _PLACE_KEYS | {"handler", "position"}
_SNAPSHOT_KEYS: Final = _PLACE_KEYS | {
    "snapshot",
    "retention",
    "time",
    "schema_version",
    "state",
    "state_base64",
}
_NOT_OF_EVENTS: Final = ("diverges_at", "position", "snapshot")
_SOURCE_KEYS: Final = frozenset({"domain", "root", "edition", "sequence"})


@dataclass(frozen=True, slots=True)
class EventLine:
    """An event; `size` is that of its line in bytes."""

    number: int
    event: Event
    trace: Trace
    sequence: int | None
    append_continues: bool
    size: int


@dataclass(frozen=True, slots=True)
class BranchLine:
    """Where an edition leaves main."""

    number: int
    diverges_at: int


@dataclass(frozen=True, slots=True)
class PositionLine:
    """How far a handler is."""

    number: int
    handler: str
    position: int


@dataclass(frozen=True, slots=True)
class SnapshotLine:
    """A snapshot; without a `time` it is made now."""

    number: int
    sequence: int
    state: Any = field(repr=False)
    retention: Retention
    time: datetime | None
    schema_version: int


Line = EventLine | BranchLine | PositionLine | SnapshotLine


class Unusable(ValueError):
    """A line can't be loaded. `aggregate` is None where even that is not clear."""

    def __init__(self, why: str, aggregate: Aggregate | None = None) -> None:
        super().__init__(why)
        self.aggregate = aggregate


# Parsing


def parse_fields(text: bytes) -> dict[str, Any]:
    """Return the object of a line."""
    try:
        # Unlike orjson, this keeps integers of any size as they are, so that none changes unseen.
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Unusable("it is not JSON") from None
    if not isinstance(fields, dict):
        raise Unusable("it is not a JSON object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def parse_aggregate(fields: dict[str, Any]) -> Aggregate:
    """Return the aggregate that a line belongs to."""
    for key in ("domain", "root"):
        if key not in fields:
            raise Unusable(f"it has no {key!r}")
    try:
        return Aggregate(fields["domain"], fields["root"], fields.get("edition", MAIN))
    except InvalidName as error:
        raise Unusable(str(error)) from None


def is_of_event(fields: dict[str, Any]) -> bool:
    """Whether a line has an event, and not something else."""
    return fields.keys().isdisjoint(_NOT_OF_EVENTS)


def parse_line(
    number: int, size: int, aggregate: Aggregate, fields: dict[str, Any], place: int
) -> Line:
    """Return what a line has for its aggregate; `place` is that of an event among its lines."""
    try:
        if is_of_event(fields):
            return _parse_event_line(number, size, aggregate, fields, place)
        if "diverges_at" in fields:
            return _parse_branch(number, aggregate, fields)
        if "snapshot" in fields:
            return _parse_snapshot(number, fields)
        return _parse_position(number, fields)
    except (Unusable, InvalidName, InvalidType, InvalidValue) as error:
        raise Unusable(str(error), aggregate) from None


def _parse_branch(number: int, aggregate: Aggregate, fields: dict[str, Any]) -> BranchLine:
    if aggregate.edition == MAIN:
        raise Unusable(f"it has 'diverges_at', but the edition {MAIN!r} diverges from nothing")
    _check_keys(fields, "diverges_at", _BRANCH_KEYS)
    return BranchLine(number, check_sequence("diverges_at", fields["diverges_at"]))


def _parse_position(number: int, fields: dict[str, Any]) -> PositionLine:
    _check_keys(fields, "position", _POSITION_KEYS)
    if "handler" not in fields:
        raise Unusable("it has 'position', but no 'handler'")
    handler = check_name("handler", fields["handler"])
    return PositionLine(number, handler, check_sequence("position", fields["position"]))


def _parse_snapshot(number: int, fields: dict[str, Any]) -> SnapshotLine:
    _check_keys(fields, "snapshot", _SNAPSHOT_KEYS)
    return SnapshotLine(
        number,
        check_sequence("snapshot", fields["snapshot"]),
        _parse_value(fields, "state"),
        _parse_retention(fields.get("retention", Retention.DEFAULT.value)),
        _parse_time(fields.get("time")),
        check_schema_version(fields.get("schema_version", 0)),
    )


def _check_keys(fields: dict[str, Any], has: str, keys: frozenset[str]) -> None:
    others = fields.keys() - keys
    if others:
        raise Unusable(f"it has both {has!r} and {min(others)!r}: make two lines of it")


def _parse_retention(value: Any) -> Retention:
    try:
        return Retention(value)
    except ValueError:
        known = ", ".join(retention.value for retention in Retention)
        raise Unusable(f"its 'retention' is none of {known}") from None


def _parse_event_line(
    number: int, size: int, aggregate: Aggregate, fields: dict[str, Any], place: int
) -> EventLine:
    unknown = fields.keys() - _KEYS
    if unknown:
        raise Unusable(f"it has the unknown key {min(unknown)!r}")
    sequence = fields.get("sequence")
    if sequence is not None:
        check_sequence("sequence", sequence)
    trace = _parse_trace(fields)
    continues = _parse_continues(fields, trace)
    event = _parse_event(aggregate, fields, place)
    return EventLine(number, event, trace, sequence, continues, size)


def _parse_trace(fields: dict[str, Any]) -> Trace:
    source = _parse_source(fields.get("source"))
    return check_trace(fields.get("idempotency_key"), fields.get("correlation_id"), source)


def _parse_source(value: Any) -> Source | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != _SOURCE_KEYS:
        raise Unusable("its 'source' is not an object of domain, root, edition and sequence")
    try:
        return Source(**value)
    except (InvalidName, InvalidType, InvalidValue) as error:
        raise Unusable(f"its 'source' is none: {error}") from None


def _parse_continues(fields: dict[str, Any], trace: Trace) -> bool:
    continues = fields.get("append_continues", False)
    if not isinstance(continues, bool):
        raise Unusable("its 'append_continues' is not true or false")
    if continues and trace.idempotency_key is None:
        raise Unusable("it has 'append_continues', but no 'idempotency_key'")
    return continues


def _parse_event(aggregate: Aggregate, fields: dict[str, Any], place: int) -> Event:
    if "type" not in fields:
        raise Unusable("it has no 'type'")
    return Event(
        fields["type"],
        _parse_value(fields, "data"),
        metadata=_parse_metadata(fields.get("metadata")),
        id=_parse_id(fields["id"]) if "id" in fields else _make_id(aggregate, fields, place),
        time=_parse_time(fields.get("time")),
    )


def _parse_value(fields: dict[str, Any], name: str) -> Any:
    """Return what stands under a name, or in base64 under the other one that is for bytes."""
    in_base64 = f"{name}_base64"
    if (name in fields) == (in_base64 in fields):
        raise Unusable(f"it must have either {name!r} or {in_base64!r}")
    if name in fields:
        return fields[name]
    try:
        return base64.b64decode(fields[in_base64], validate=True)
    except (TypeError, ValueError):
        raise Unusable(f"its {in_base64!r} is not base64") from None


def _parse_metadata(value: Any) -> dict[str, Any] | None:
    if value is None or isinstance(value, dict):
        return value
    raise Unusable("its 'metadata' is not an object")


def _parse_time(value: Any) -> datetime | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise Unusable("its 'time' is not one of ISO 8601") from None


def _parse_id(value: Any) -> UUID:
    try:
        return uuid.UUID(value)
    except (AttributeError, TypeError, ValueError):
        raise Unusable("its 'id' is not a UUID") from None


def _make_id(aggregate: Aggregate, fields: dict[str, Any], place: int) -> UUID:
    """Return the same id for the same content at the same place of the same aggregate."""
    content = [aggregate.domain, aggregate.edition, aggregate.root, place, fields]
    return uuid.uuid5(_ID_NAMESPACE, codec.encode_json("the line", content).decode())


# Writing


def write_branch(aggregate: Aggregate, at: int) -> bytes:
    """Return the line of a branch."""
    fields = {**_identity(aggregate), "diverges_at": at}
    return codec.encode_json("the branch", fields) + b"\n"


def write_position(aggregate: Aggregate, handler: str, position: int) -> bytes:
    """Return the line of a position."""
    fields = {**_identity(aggregate), "handler": handler, "position": position}
    return codec.encode_json("the position", fields) + b"\n"


def write_snapshot(aggregate: Aggregate, snapshot: Snapshot, sequence: int) -> bytes:
    """Return the line of a snapshot, made at `sequence`."""
    fields = {
        **_identity(aggregate),
        "snapshot": sequence,
        "retention": snapshot.retention.value,
        "time": snapshot.time.isoformat(),
        "schema_version": snapshot.schema_version,
    }
    return _write_with_value(fields, "state", snapshot.state)


def _identity(aggregate: Aggregate) -> dict[str, Any]:
    return {
        "domain": aggregate.domain,
        "edition": aggregate.edition,
        "root": aggregate.root,
    }


def write_event(
    event: RecordedEvent, *, with_sequence: bool = True, append_continues: bool = False
) -> bytes:
    """Return the line of an event."""
    fields: dict[str, Any] = {
        **_identity(event.aggregate),
        **({"sequence": event.sequence} if with_sequence else {}),
        "type": event.type,
        "time": event.time.isoformat(),
        "id": str(event.id),
        **_trace_fields(event),
        **({"append_continues": True} if append_continues else {}),
    }
    if event.metadata:
        fields["metadata"] = event.metadata
    return _write_with_value(fields, "data", event.data)


def _write_with_value(fields: dict[str, Any], name: str, value: Any) -> bytes:
    # The value by itself: what could just be nested deep enough to be stored could not be written
    # one level deeper.
    if isinstance(value, bytes):
        name, text = f"{name}_base64", b'"' + base64.b64encode(value) + b'"'
    else:
        text = codec.encode_json(name, value)
    return b'%s,"%s":%s}\n' % (codec.encode_json("the line", fields)[:-1], name.encode(), text)


def _trace_fields(event: RecordedEvent) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if event.correlation_id is not None:
        fields["correlation_id"] = event.correlation_id
    if event.idempotency_key is not None:
        fields["idempotency_key"] = event.idempotency_key
    if event.source is not None:
        source = event.source
        fields["source"] = {
            "domain": source.domain,
            "root": source.root,
            "edition": source.edition,
            "sequence": source.sequence,
        }
    return fields
