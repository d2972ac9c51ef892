"""Events as they are read: the header is decoded at once, the rest when somebody asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from asyncstore import codec
from asyncstore.errors import CorruptEvent
from asyncstore.keys import Places

if TYPE_CHECKING:
    from datetime import datetime

    from asyncstore.values import Aggregate, Snapshot, Source


class RecordedEvent:
    """An event as it is stored. It can't be changed; `data` and `metadata` are not in its repr.

    `data` is decoded when it is asked for first, which raises `CorruptEvent` where the stored body
    can't be decoded. `time` is in UTC, exact to the microsecond. `metadata` is {} where none was
    given. `correlation_id`, `source` and `idempotency_key` are None where the append named none.

    Decoding is not synchronised: two threads that ask first may get equal objects, not the same.
    The constructor is there for tests and tools; those of a store come from reading it.
    """

    # An object that a page makes ten thousand times: what is not asked for costs nothing.
    __slots__ = (
        "_aggregate",
        "_body",
        "_data",
        "_extras",
        "_id",
        "_metadata",
        "_places",
        "_sequence",
        "_time",
        "_type",
    )

    _id: UUID | bytes
    _time: datetime | int

    def __init__(
        self,
        *,
        aggregate: Aggregate,
        sequence: int,
        type: str,  # noqa: A002
        data: Any,
        metadata: dict[str, Any],
        id: UUID,  # noqa: A002
        time: datetime,
        correlation_id: str | None = None,
        source: Source | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        self._aggregate = aggregate
        self._sequence = sequence
        self._type = type
        self._data = data
        self._metadata: dict[str, Any] | None = metadata
        self._id = id
        self._time = time
        self._places = Places("")
        self._body: bytes | None = None
        self._extras = codec.Extras(
            idempotency_key=idempotency_key, correlation_id=correlation_id, source=source
        )

    @property
    def aggregate(self) -> Aggregate:
        """The aggregate that the event belongs to."""
        return self._aggregate

    @property
    def sequence(self) -> int:
        """The event's place in its aggregate's timeline."""
        return self._sequence

    @property
    def type(self) -> str:
        """What kind of event it is."""
        return self._type

    @property
    def data(self) -> Any:
        """What was appended: anything JSON, or bytes. Raises `CorruptEvent`."""
        body = self._body
        if body is not None:
            try:
                self._data = codec.decode_body(body, self._extras.encoding)
            except codec.Undecodable as error:
                raise self._corrupt(error) from None
            self._body = None
        return self._data

    @property
    def metadata(self) -> dict[str, Any]:
        """What was appended beside the data."""
        if self._metadata is None:
            self._metadata = self._extras.metadata or {}
        return self._metadata

    @property
    def id(self) -> UUID:
        """The event's id, given or made when it was made."""
        if isinstance(self._id, bytes):
            self._id = UUID(bytes=self._id)
        return self._id

    def _hex_id(self) -> str:
        """Return the id in hexadecimal, without a UUID made for it."""
        return (self._id if isinstance(self._id, bytes) else self._id.bytes).hex()

    @property
    def time(self) -> datetime:
        """When it happened, in UTC."""
        if isinstance(self._time, int):
            self._time = codec.from_microseconds(self._time)
        return self._time

    @property
    def correlation_id(self) -> str | None:
        """The business process that the append named."""
        return self._extras.correlation_id

    @property
    def source(self) -> Source | None:
        """The event that made a saga write this one. Raises `CorruptEvent`."""
        source = self._extras.source
        if not isinstance(source, list):
            return source
        try:
            return codec.decode_source(source)
        except codec.Undecodable as error:
            raise self._corrupt(error) from None

    @property
    def idempotency_key(self) -> str | None:
        """The key under which the append is stored once."""
        return self._extras.idempotency_key

    def _corrupt(self, error: codec.Undecodable) -> CorruptEvent:
        return CorruptEvent(self._places.key_at(self._sequence), self._sequence, str(error))

    def _fields(self) -> dict[str, Any]:
        """Return everything but the data, which may be impossible to decode."""
        return {
            "aggregate": self.aggregate,
            "sequence": self.sequence,
            "type": self.type,
            "metadata": self.metadata,
            "id": self.id,
            "time": self.time,
            "correlation_id": self.correlation_id,
            "source": self.source,
            "idempotency_key": self.idempotency_key,
        }

    def _stored(self) -> tuple[object, ...]:
        """Return all of it as far as it is decoded: what has this alike is the same event."""
        header = self._aggregate, self._sequence, self._type, self._id, self._time
        return *header, self._extras, self._body

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecordedEvent):
            return NotImplemented
        if self._body is not None and self._stored() == other._stored():
            return True
        if self._fields() != other._fields():
            return False
        if self._body is not None and self._body == other._body:
            return self._extras.encoding == other._extras.encoding
        return bool(self.data == other.data)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_of, (self._fields(), self.data)

    def __hash__(self) -> int:
        return hash((self.aggregate, self.sequence, self.id))

    def __repr__(self) -> str:
        return (
            f"RecordedEvent(aggregate={self.aggregate!r}, sequence={self.sequence}, "
            f"type={self.type!r}, id={self.id!r}, time={self.time!r})"
        )


def event_of_member(aggregate: Aggregate, places: Places, member: bytes) -> RecordedEvent:
    """Return the event that a member of a sorted set holds, its data not decoded yet.

    Raises `codec.Undecodable` where the header can't be decoded.
    """
    event = RecordedEvent.__new__(RecordedEvent)
    event._sequence, event._time, event._id, event._type, event._extras, event._body = (
        codec.decode_member(member)
    )
    event._aggregate = aggregate
    event._places = places
    event._metadata = None
    return event


def _made_of(fields: dict[str, Any], data: Any) -> RecordedEvent:
    """Make the event of a pickle; its form does not depend on how this module works inside."""
    return RecordedEvent(data=data, **fields)


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that is needed to go on with an aggregate: newest snapshot and the events after it.

    `next_sequence` is what to hand to `append(expected=…)`.
    """

    snapshot: Snapshot | None
    events: list[RecordedEvent]
    next_sequence: int


@dataclass(frozen=True, slots=True)
class EventBook:
    """Events of one aggregate, in the order of their sequences; not always all of them."""

    aggregate: Aggregate
    events: list[RecordedEvent]
