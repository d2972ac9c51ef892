"""The values that callers hand in and get back. Making one does no I/O."""

from __future__ import annotations

import enum
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal
from uuid import UUID

from asyncstore.errors import InvalidType, InvalidValue
from asyncstore.names import (
    MAIN,
    check_bool,
    check_edition,
    check_id,
    check_name,
    check_root,
    check_sequence,
    check_whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class AnySequence(enum.Enum):
    """The type of `ANY`."""

    ANY = "any"

    def __repr__(self) -> str:
        return "ANY"

    __str__ = __repr__


NEW: Final = 0
"""`expected=NEW`: the aggregate must have no events yet."""

ANY: Final = AnySequence.ANY
"""`expected=ANY`: append wherever the aggregate's end is."""


class Start(enum.Enum):
    """Where a handler begins that subscribes for the first time."""

    FIRST = "first"
    """With the first event of each aggregate."""
    NOW = "now"
    """With what is appended from now on."""

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


FIRST: Final = Start.FIRST
NOW: Final = Start.NOW

Expected = int | Literal[AnySequence.ANY]


@dataclass(frozen=True, slots=True, init=False)
class Aggregate:
    """The identity of one aggregate on one timeline: what events, positions, snapshots hang on.

    `root` is any text of 1-512 bytes without braces and control characters, or a UUID; `domain`
    and `edition` are 1-128 letters, digits, `.`, `_`, `-`. Anything else is `InvalidName`.
    """

    domain: str
    root: str
    edition: str

    def __init__(self, domain: str, root: str | UUID, edition: str = MAIN) -> None:
        object.__setattr__(self, "domain", check_name("domain", domain))
        text = str(root) if isinstance(root, UUID) else root
        object.__setattr__(self, "root", check_root(text))
        object.__setattr__(self, "edition", check_edition(edition))

    def on(self, edition: str) -> Aggregate:
        """Return the same aggregate on another timeline."""
        return Aggregate(self.domain, self.root, edition)

    def __str__(self) -> str:
        where = "" if self.edition == MAIN else f" on edition {self.edition}"
        return f"{self.domain}/{self.root}{where}"


class _IdClock:
    """Hands out UUIDs of version 7 (RFC 9562) that sort by the time they were made.

    The 12 bits after the milliseconds hold the fraction of the millisecond (method 3 of
    section 6.2), and a tick that was used already is moved on by one, so ids of one process are
    in order even within a microsecond.
    """

    def __init__(self) -> None:
        self._last_tick = 0
        self._lock = threading.Lock()

    def new_id(self) -> UUID:
        milliseconds, rest = divmod(time.time_ns(), 1_000_000)
        tick = (milliseconds << 12) | (rest << 12) // 1_000_000
        with self._lock:
            tick = self._last_tick = max(tick, self._last_tick + 1)
        random = int.from_bytes(os.urandom(8)) >> 2
        high = (tick >> 12) << 16 | 0x7000 | (tick & 0xFFF)
        return UUID(int=high << 64 | 0b10 << 62 | random)


new_id = _IdClock().new_id


@dataclass(frozen=True, slots=True)
class Event:
    """An event to append.

    `type` is any text but the empty one. `data` is anything JSON (dict, list, str, int, float,
    bool, None; datetimes, UUIDs and enums become text), or bytes, which stay bytes. `metadata` is
    a JSON object that is kept beside the data. `id` is made for you and sorts by time. `time` is
    when it happened, with a time zone; None lets the server stamp it.
    """

    type: str
    data: Any = field(repr=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False, kw_only=True)
    id: UUID = field(default_factory=new_id, kw_only=True)
    time: datetime | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_type(self.type)
        if not isinstance(self.id, UUID):
            raise InvalidType("id", f"a uuid.UUID is wanted, not {type(self.id).__name__}")
        if self.time is not None:
            check_moment("time", self.time)


def _check_type(name: object) -> None:
    if not isinstance(name, str):
        raise InvalidType("type", f"a str is wanted, not {type(name).__name__}")
    if not name:
        raise InvalidValue("type", "it is empty")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidValue("type", "it has a lone surrogate, which is not a text") from None


def check_types(value: Iterable[str] | None) -> frozenset[str] | None:
    """Return types of events that are wanted, or None for all."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidType("types", f"a list of str is wanted, not {type(value).__name__}")
    types = frozenset(value)
    for name in types:
        _check_type(name)
    if not types:
        raise InvalidValue("types", "it is empty: name one, or leave it out for all")
    return types


def check_moment(argument: str, value: datetime) -> datetime:
    """Return `value` if it is a datetime with a time zone."""
    if not isinstance(value, datetime):
        raise InvalidType(argument, f"a datetime is wanted, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise InvalidValue(argument, "the datetime has no time zone: add tzinfo, such as UTC")
    try:
        value.astimezone(UTC)
    except OverflowError:
        raise InvalidValue(argument, "in UTC, it is outside of the years 1 to 9999") from None
    return value


@dataclass(frozen=True, slots=True, init=False)
class Source:
    """Which event of which aggregate made a saga write this one. Checked as an Aggregate is."""

    domain: str
    root: str
    edition: str
    sequence: int

    def __init__(self, domain: str, root: str | UUID, edition: str, sequence: int) -> None:
        aggregate = Aggregate(domain, root, edition)
        object.__setattr__(self, "domain", aggregate.domain)
        object.__setattr__(self, "root", aggregate.root)
        object.__setattr__(self, "edition", aggregate.edition)
        object.__setattr__(self, "sequence", check_sequence("sequence", sequence))


@dataclass(frozen=True, slots=True)
class Trace:
    """What an append says of where it comes from. It is stored with each of its events."""

    idempotency_key: str | None = None
    correlation_id: str | None = None
    source: Source | None = None


NO_TRACE: Final = Trace()


def check_trace(
    idempotency_key: str | None, correlation_id: str | None, source: Source | None
) -> Trace:
    """Return what was given as one value; what is empty counts as not given."""
    if idempotency_key is None and correlation_id is None and source is None:
        return NO_TRACE
    if source is not None:
        check_source(source)
    key = check_id("idempotency_key", idempotency_key)
    correlation = check_id("correlation_id", correlation_id)
    if key is None and correlation is None and source is None:
        return NO_TRACE
    return Trace(key, correlation, source)


def check_source(value: Source) -> Source:
    """Return `value` if it is a Source."""
    if not isinstance(value, Source):
        raise InvalidType("source", f"a Source is wanted, not {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append wrote: the sequences of its first and last event.

    After an append of nothing `first_sequence` is the aggregate's next sequence and
    `last_sequence` the one before. `duplicate` is True when the events had been stored before.
    """

    first_sequence: int
    last_sequence: int
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Durability:
    """What must be true of an append before it is answered.

    `MEMORY`: it is applied. `FSYNC`: it is on the server's disk. `replicas(n)`: it is in the memory
    of so many replicas, too. `fsync_and_replicas(n)`: it is on the disks of the server and of so
    many replicas.
    """

    fsynced: bool = False
    on_replicas: int = 0

    MEMORY: ClassVar[Durability]
    FSYNC: ClassVar[Durability]

    def __post_init__(self) -> None:
        check_bool("fsynced", self.fsynced)
        check_whole_number("on_replicas", self.on_replicas)

    @staticmethod
    def replicas(count: int) -> Durability:
        """Return the level of so many replicas, 1 or more."""
        return Durability(on_replicas=_check_replicas(count))

    @staticmethod
    def fsync_and_replicas(count: int) -> Durability:
        """Return the level of an fsync on the server and on so many replicas, 1 or more."""
        return Durability(fsynced=True, on_replicas=_check_replicas(count))

    @staticmethod
    def parse(text: str) -> Durability:
        """Return the level that `str` shows so: `memory`, `fsync`, `replicas(1)`, …"""
        if not isinstance(text, str):
            raise InvalidType("durability", f"a text is wanted, not {type(text).__name__}")
        if text in ("memory", "fsync"):
            return Durability.FSYNC if text == "fsync" else Durability.MEMORY
        found = _ON_REPLICAS.fullmatch(text)
        if not found:
            why = "memory, fsync, replicas(n) or fsync_and_replicas(n) is wanted"
            raise InvalidValue("durability", why)
        return Durability(fsynced=bool(found[1]), on_replicas=_check_replicas(int(found[2])))

    def __str__(self) -> str:
        if self.on_replicas:
            kind = "fsync_and_replicas" if self.fsynced else "replicas"
            return f"{kind}({self.on_replicas})"
        return "fsync" if self.fsynced else "memory"


Durability.MEMORY = Durability()
Durability.FSYNC = Durability(fsynced=True)
_ON_REPLICAS: Final = re.compile(r"(fsync_and_)?replicas\(([0-9]{1,4})\)")


def check_durability(value: Durability) -> Durability:
    """Return `value` if it is a Durability."""
    if not isinstance(value, Durability):
        why = f"a Durability is wanted, such as Durability.FSYNC, not {type(value).__name__}"
        raise InvalidType("durability", why)
    return value if value != Durability.MEMORY else Durability.MEMORY


def _check_replicas(count: int) -> int:
    if check_whole_number("replicas", count) == 0:
        raise InvalidValue("replicas", "it must be 1 or more; Durability.MEMORY asks for none")
    return int(count)


class Retention(enum.Enum):
    """What becomes of a snapshot when a newer one is put."""

    DEFAULT = "default"
    """It stays for a while: the three newest snapshots are there to answer `at=`."""
    PERSIST = "persist"
    """It stays until it is deleted."""
    TRANSIENT = "transient"
    """It goes, in the same step."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an aggregate when `sequence` was its last event. `state` is not in the repr.

    `time` is when the snapshot was put, in UTC, by the server's clock. `schema_version` is the
    number that whoever put it gave to the form of `state`.
    """

    sequence: int
    state: Any = field(repr=False)
    retention: Retention
    time: datetime
    schema_version: int = 0


def check_aggregate(value: Aggregate) -> Aggregate:
    """Return `value` if it is an Aggregate."""
    if not isinstance(value, Aggregate):
        raise InvalidType("aggregate", f"an Aggregate is wanted, not {type(value).__name__}")
    return value


def check_start(argument: str, value: Start | datetime) -> Start | datetime:
    """Return `value` if it is a Start, or a moment."""
    if isinstance(value, datetime):
        return check_moment(argument, value)
    if not isinstance(value, Start):
        why = f"FIRST, NOW or a datetime is wanted, not {type(value).__name__}"
        raise InvalidType(argument, why)
    return value


def check_expected(value: Expected) -> Expected:
    """Return `value` if it is ANY or a sequence."""
    return ANY if value is ANY else check_sequence("expected", value)


def check_batch(argument: str, value: Iterable[Event]) -> list[Event]:
    """Return the events of an append as a list."""
    if not isinstance(value, Iterable):
        raise InvalidType(argument, f"a list of Event is wanted, not {type(value).__name__}")
    batch = list(value)
    for index, event in enumerate(batch):
        if not isinstance(event, Event):
            why = f"at index {index} is a {type(event).__name__}, an Event is wanted"
            raise InvalidType(argument, why)
    return batch
