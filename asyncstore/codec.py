r"""How values look in the store; the only file that knows orjson.

An event is one member of a sorted set, of two lines:

    [12,1732345678901234,"0193a4c7f2e07cc38e1d2f3a4b5c6d7e","OrderPlaced"]\n
    {"total":12}

The first line is the header, a JSON array: sequence, time in microseconds since 1970 (UTC), id in
hexadecimal, type; where there is more to say, a JSON object follows (`metadata`; `key`,
`correlation` and `source` that the append gave; `"encoding":"bytes"` when the body is not JSON).
The rest is the body, as it is. The script writes
the sequence and, where the caller gave none, the time: so Python makes only what follows the time,
and a member is unique by its sequence even when two events are equal. A header can be read without
its body, and both with redis-cli.

An older snapshot is kept in the same form: `[sequence,time,"retention","encoding",schema]\n` and
the state. The newest one is a hash with those names as fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import orjson

from asyncstore.errors import InvalidName, InvalidType, InvalidValue
from asyncstore.names import MAX_SEQUENCE
from asyncstore.values import NO_TRACE, Retention, Snapshot, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.values import Event, Trace

LAYOUT: Final = 1
_BY_SLOT: Final = b" by slot"
"""The version of the stored form: the keys in `keys` and the values here."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST_MICROSECOND = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST_MICROSECOND = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_ID_BYTES = 16
_BYTES = "bytes"
_JSON = "json"
_RETENTIONS: Final = {retention.value: retention for retention in Retention}
_SOURCE_TYPES: Final = [str, str, str, int]
_SNAPSHOT_TYPES: Final = [int, int, str, str, int]


class Undecodable(ValueError):
    """What was read is not what this module writes. Says why, never shows the content."""


# Moments


def to_microseconds(moment: datetime) -> int:
    """Return microseconds since 1970 of a datetime with a time zone; exact."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    """Return the moment in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


# Events


def encode_event(event: Event, trace: Trace = NO_TRACE) -> tuple[bytes, bytes]:
    """Return the event's time (empty: the server's) and the part of its member after the time."""
    body, encoding = _encode_body("data", event.data)
    header = orjson.dumps([event.id.hex, event.type])[1:-1]
    time = b"" if event.time is None else b"%d" % to_microseconds(event.time)
    if event.metadata is None and encoding == _JSON and trace is NO_TRACE:
        return time, b"%b]\n%b" % (header, body)
    extras = _encode_extras(event.metadata, encoding, trace)
    return time, b"%b%b]\n%b" % (header, extras, body)


def encode_type(name: str) -> bytes:
    """Return the type of an event as it stands in the header."""
    return orjson.dumps(name)


def _encode_extras(metadata: Mapping[str, Any] | None, encoding: str, trace: Trace) -> bytes:
    extras: dict[str, Any] = {}
    if encoding != _JSON:
        extras["encoding"] = encoding
    if trace.idempotency_key is not None:
        extras["key"] = trace.idempotency_key
    if trace.correlation_id is not None:
        extras["correlation"] = trace.correlation_id
    if trace.source is not None:
        source = trace.source
        extras["source"] = [source.domain, source.root, source.edition, source.sequence]
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InvalidType("metadata", f"a mapping is wanted, not {type(metadata).__name__}")
    if metadata:
        extras["metadata"] = dict(metadata)
    return b"," + encode_json("metadata", extras) if extras else b""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a header says beyond the four things that each has."""

    encoding: str = _JSON
    metadata: dict[str, Any] | None = None
    idempotency_key: str | None = None
    correlation_id: str | None = None
    source: Source | list[Any] | None = None  # a list as it is stored; see decode_source


_NO_EXTRAS: Final = Extras()

Member = tuple[int, int, bytes, str, Extras, bytes]
"""Sequence, microseconds since 1970, id as its 16 bytes, type, extras, and the body as it is."""


def decode_member(member: bytes) -> Member:
    """Return the decoded header of an event's member and its body, or raise Undecodable."""
    head, newline, body = member.partition(b"\n")
    if not newline:
        raise Undecodable("there is no line with a header")
    # Plain comparisons: `match` takes twice as long, and this is done for each event of a page.
    fields = _decode_json(head)
    if type(fields) is not list or not 4 <= len(fields) <= 5:
        raise Undecodable("its header is not one of an event")
    extras = _NO_EXTRAS if len(fields) == 4 else _decode_extras(fields.pop())
    sequence, time, hexadecimal, name = fields
    if not (type(sequence) is type(time) is int and type(hexadecimal) is type(name) is str):
        raise Undecodable("its header is not one of an event")
    if not _FIRST_MICROSECOND <= time <= _LAST_MICROSECOND:
        raise Undecodable("its time is out of range")
    return sequence, time, _decode_id(hexadecimal), name, extras, body


def _decode_id(hexadecimal: str) -> bytes:
    try:
        number = bytes.fromhex(hexadecimal)
    except ValueError:
        number = b""
    if len(hexadecimal) != 2 * _ID_BYTES or len(number) != _ID_BYTES:
        raise Undecodable("its id is not a UUID")
    return number


def _decode_extras(fields: object) -> Extras:
    if not isinstance(fields, dict):
        raise Undecodable("its header is not one of an event")
    encoding = fields.get("encoding", _JSON)
    if encoding not in (_JSON, _BYTES):
        raise Undecodable(f"its encoding {str(encoding)[:20]!r} is not known to this version")
    metadata = fields.get("metadata")
    if not isinstance(metadata, dict | None):
        raise Undecodable("its metadata is not an object")
    key, correlation = fields.get("key"), fields.get("correlation")
    if not (isinstance(key, str | None) and isinstance(correlation, str | None)):
        raise Undecodable("its key or its correlation id is not a text")
    source = fields.get("source")
    if source is not None and not _is_source(source):
        raise Undecodable("its source is none")
    return Extras(encoding, metadata, key, correlation, source)


def _is_source(fields: object) -> bool:
    return type(fields) is list and [type(field) for field in fields] == _SOURCE_TYPES


def decode_source(fields: Sequence[Any]) -> Source:
    """Return the source that a header names, or raise Undecodable."""
    try:
        return Source(*fields)
    except (InvalidName, InvalidValue):
        raise Undecodable("its source is none") from None


def _decode_moment(microseconds: int) -> datetime:
    try:
        return from_microseconds(microseconds)
    except OverflowError:
        raise Undecodable("its time is out of range") from None


# Snapshots


def encode_state(state: Any) -> tuple[bytes, str]:
    """Return the stored form of a snapshot's state, and the name of its encoding."""
    return _encode_body("state", state)


def decode_snapshot(reply: Sequence[bytes]) -> Snapshot | None:
    """Return the snapshot of a script's reply, None for an empty one, or raise Undecodable.

    The reply is either the flat list of a hash, or one member of a sorted set of older snapshots.
    """
    if not reply:
        return None
    if len(reply) == 1:
        head, _, state = reply[0].partition(b"\n")
        fields = _decode_json(head)
        if type(fields) is list and len(fields) == 4:
            fields.append(0)  # as they were written before they had a schema version
    else:
        named = dict(zip(reply[::2], reply[1::2], strict=True))
        state = named.get(b"state", b"")
        fields = _newest_fields(named)
    if type(fields) is not list or [type(field) for field in fields] != _SNAPSHOT_TYPES:
        raise Undecodable("it does not have the fields of a snapshot")
    sequence, microseconds, retention, encoding, schema_version = fields
    if not 0 <= sequence <= MAX_SEQUENCE:
        raise Undecodable("its sequence is none")
    if retention not in _RETENTIONS:
        raise Undecodable(f"its retention is {retention[:20]!r}")
    return Snapshot(
        sequence,
        decode_body(state, encoding),
        _RETENTIONS[retention],
        _decode_moment(microseconds),
        schema_version,
    )


def _newest_fields(named: Mapping[bytes, bytes]) -> list[int | str]:
    try:
        return [
            _number(named[b"sequence"]),
            _number(named[b"time"]),
            named[b"retention"].decode(),
            named[b"encoding"].decode(),
            _number(named.get(b"schema", b"0")),
        ]
    except (KeyError, ValueError):
        raise Undecodable("it does not have the fields of a snapshot") from None


def _number(digits: bytes) -> int:
    """Return the number; int() alone would take signs, blanks and underscores, too."""
    if not digits.isdigit():
        raise ValueError
    return int(digits)


# Bodies


def encode_data(data: Any) -> tuple[bytes, str]:
    """Return the stored form of an event's data, and the name of its encoding."""
    return _encode_body("data", data)


def _encode_body(argument: str, value: Any) -> tuple[bytes, str]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), _BYTES
    return encode_json(argument, value), _JSON


def decode_body(body: bytes, encoding: str) -> Any:
    """Return the value that a body stands for, or raise Undecodable."""
    if encoding == _JSON:
        return _decode_json(body)
    if encoding == _BYTES:
        return body
    raise Undecodable(f"its encoding {str(encoding)[:20]!r} is not known to this version")


def encode_json(argument: str, value: Any) -> bytes:
    """Return the value as JSON, or raise InvalidType or InvalidValue that names `argument`."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError as error:
        # orjson's reasons name types, never values.
        raise InvalidType(argument, f"it can't be written as JSON: {error}") from None
    # orjson writes NaN and infinities as null. Only then is it worth looking for one.
    if b"null" in text and _has_non_finite(value):
        raise InvalidValue(argument, "it holds NaN or an infinity, which JSON does not have")
    return text


def _decode_json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Undecodable("it is not JSON") from None


def _has_non_finite(value: Any) -> bool:
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Enum):
            item = item.value
        if isinstance(item, float) and not isfinite(item):
            return True
        # As orjson looks at them: subclasses may show something else.
        if isinstance(item, dict):
            rest.extend(dict.values(item))
        elif isinstance(item, list):
            rest.extend(list.__iter__(item))
        elif isinstance(item, tuple):
            rest.extend(tuple.__iter__(item))
    return False


def layout(*, by_slot: bool) -> bytes:
    """Return what a store is marked with: a cluster has other indexes, one for each slot."""
    return b"%d" % LAYOUT + (_BY_SLOT if by_slot else b"")
