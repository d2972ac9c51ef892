r"""How values look in the store; the only file that knows orjson.

An event is one member of a sorted set, of two lines:

    [12,1732345678901234,"0193a4c7f2e07cc38e1d2f3a4b5c6d7e","OrderPlaced"]\n
    {"total":12}

The first line is the header, a JSON array: sequence, time in microseconds since 1970 (UTC), id in
hexadecimal, type; where there is more to say, a JSON object follows (`metadata`, and
`"encoding":"bytes"` when the body is not JSON). The rest is the body, as it is. The script writes
the sequence and, where the caller gave none, the time: so Python makes only what follows the time,
and a member is unique by its sequence even when two events are equal. A header can be read without
its body, and both with redis-cli.

An older snapshot is kept in the same form: `[sequence,time,"retention","encoding"]\n` and the
state. The newest one is a hash with those names as fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from math import isfinite
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import orjson

from asyncstore.errors import InvalidType, InvalidValue
from asyncstore.names import MAX_SEQUENCE
from asyncstore.values import Aggregate, Event, RecordedEvent, Retention, Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUT: Final = 1
"""The version of the stored form: the keys in `keys` and the values here."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_BYTES = "bytes"
_JSON = "json"


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


def encode_event(event: Event) -> tuple[bytes, bytes]:
    """Return the event's time (empty: the server's) and the part of its member after the time."""
    body, encoding = _encode_body("data", event.data)
    header = orjson.dumps([event.id.hex, event.type])[1:-1]
    extras = _encode_extras(event.metadata, encoding)
    time = b"" if event.time is None else b"%d" % to_microseconds(event.time)
    return time, b"".join((header, extras, b"]\n", body))


def _encode_extras(metadata: Mapping[str, Any] | None, encoding: str) -> bytes:
    extras: dict[str, Any] = {}
    if encoding != _JSON:
        extras["encoding"] = encoding
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InvalidType("metadata", f"a mapping is wanted, not {type(metadata).__name__}")
    if metadata:
        extras["metadata"] = dict(metadata)
    return b"," + encode_json("metadata", extras) if extras else b""


def decode_event(aggregate: Aggregate, member: bytes) -> RecordedEvent:
    """Return the event that a member holds, or raise Undecodable."""
    head, newline, body = member.partition(b"\n")
    if not newline:
        raise Undecodable("there is no line with a header")
    sequence, microseconds, event_id, name, extras = _decode_header(head)
    metadata = extras.get("metadata", {})
    if not isinstance(metadata, dict):
        raise Undecodable("its metadata is not an object")
    return RecordedEvent(
        aggregate=aggregate,
        sequence=sequence,
        type=name,
        data=_decode_body(body, extras.get("encoding", _JSON)),
        metadata=metadata,
        id=event_id,
        time=_decode_moment(microseconds),
    )


def _decode_header(head: bytes) -> tuple[int, int, UUID, str, dict[str, Any]]:
    match _decode_json(head):
        case [int(sequence), int(microseconds), str(hexadecimal), str(name)]:
            extras: dict[str, Any] = {}
        case [int(sequence), int(microseconds), str(hexadecimal), str(name), dict(extras)]:
            pass
        case _:
            raise Undecodable("its header is not one of an event")
    try:
        return sequence, microseconds, UUID(hex=hexadecimal), name, extras
    except ValueError:
        raise Undecodable("its id is not a UUID") from None


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
    else:
        named = dict(zip(reply[::2], reply[1::2], strict=True))
        state = named.get(b"state", b"")
        fields = _newest_fields(named)
    match fields:
        case [int(sequence), int(microseconds), str(retention), str(encoding)]:
            if not 0 <= sequence <= MAX_SEQUENCE:
                raise Undecodable("its sequence is none")
            return Snapshot(
                sequence,
                _decode_body(state, encoding),
                _decode_retention(retention),
                _decode_moment(microseconds),
            )
    raise Undecodable("it does not have the fields of a snapshot")


def _newest_fields(named: Mapping[bytes, bytes]) -> list[int | str]:
    try:
        return [
            int(named[b"sequence"]),
            int(named[b"time"]),
            named[b"retention"].decode(),
            named[b"encoding"].decode(),
        ]
    except (KeyError, ValueError):
        raise Undecodable("it does not have the fields of a snapshot") from None


def _decode_retention(name: str) -> Retention:
    try:
        return Retention(name)
    except ValueError:
        raise Undecodable(f"its retention is {name[:20]!r}") from None


# Bodies


def _encode_body(argument: str, value: Any) -> tuple[bytes, str]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), _BYTES
    return encode_json(argument, value), _JSON


def _decode_body(body: bytes, encoding: str) -> Any:
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
