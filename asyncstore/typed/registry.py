"""Which class stands for which type of event, and how old versions become new ones.

The version of an event's data stands in its metadata, under `$version`; version 1 is not written.
So an event of version 1 is stored as one that was made by hand, and one that was made by hand is
of version 1. Names that begin with `$` are kept for this layer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar

from asyncstore.errors import (
    ForgottenEvent,
    InvalidEvent,
    InvalidType,
    InvalidValue,
    UnknownEvent,
    UnreadableEvent,
)
from asyncstore.names import check_whole_number
from asyncstore.typed.kinds import kind_of
from asyncstore.values import Event, check_types

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Unpack
    from uuid import UUID

    from asyncstore.recorded import RecordedEvent
    from asyncstore.typed.kinds import Kind

C = TypeVar("C", bound=type)

VERSION: Final = "$version"
CODINGS: Final = "$body"
"""What a body went through; see `bodies`. It is gone from the metadata when that is undone."""
RESERVED: Final = "$"

Upcaster = Callable[[Any], Any]
"""From the plain data of one version to those of the next."""
SubjectOf = Callable[[Any], "str | None"]
"""From an event to whom it is about; None for nobody whose events are kept secret."""

_log = logging.getLogger(__name__)


class Policy(Enum):
    """What becomes of a stored event that there is no object for."""

    KEEP = "keep"
    """It comes as it is stored: a `RecordedEvent`, or `Forgotten`."""
    SKIP = "skip"
    """It is passed over, counted in `Registry.skipped`, and told once in the log."""
    FAIL = "fail"
    """Reading raises `UnknownEvent` or `ForgottenEvent`."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Stands for an event whose subject has been forgotten: what it said, nobody can read."""

    type: str
    subject: str


class EventOptions(TypedDict, total=False):
    """What an `Event` has beside its type and data."""

    metadata: Mapping[str, Any] | None
    id: UUID
    time: datetime | None


@dataclass(frozen=True, slots=True)
class Schema:
    """What is registered for a type of event."""

    type: str
    version: int
    kind: Kind
    upcasters: Mapping[int, Upcaster]
    subject_of: SubjectOf | None

    def dump(self, value: Any) -> Any:
        """Return the plain data of an object, which `load` is known to make the same object of."""
        try:
            data = self.kind.dump(value)
            changed = self.kind.changed(value, self.kind.load(data))
        except Exception as error:
            # Neither the text nor the chain of the error: both may show what the event holds.
            why = f"{type(error).__name__} when it was written and read back"
            raise InvalidEvent(self.type, self.version, why, self.kind.blame(error)) from None
        if changed:
            why = "it would come back as something else"
            raise InvalidEvent(self.type, self.version, why, ", ".join(changed))
        return data

    def subject(self, value: Any) -> str | None:
        """Return whom an object is about, if its events are kept secret."""
        if self.subject_of is None:
            return None
        subject = self.subject_of(value)
        if subject is not None and not isinstance(subject, str):
            why = f"it must return a str or None, not {type(subject).__name__}"
            raise InvalidType("subject", why)
        return subject


class Registry:
    """Turns objects into events and stored events into objects, by the names of their types.

    `unknown` says what becomes of events whose type, or whose newer version, is not registered;
    `forgotten` of those whose subject has been forgotten. No I/O happens here.

        shop = Registry()

        @shop.event("OrderPlaced", version=2, upcasters={1: lambda old: {**old, "currency": "EUR"}})
        @dataclass(frozen=True)
        class OrderPlaced:
            total: int
            currency: str

        await store.events.append(order, [shop.to_event(OrderPlaced(12, "EUR"))], expected=NEW)
        placed = [shop.from_event(event) for event in await store.events.read(order)]
    """

    def __init__(self, *, unknown: Policy = Policy.FAIL, forgotten: Policy = Policy.KEEP) -> None:
        self._unknown = _check_policy("unknown", unknown)
        self._forgotten = _check_policy("forgotten", forgotten)
        self._by_type: dict[str, Schema] = {}
        self._by_class: dict[type, Schema] = {}
        self.skipped: Counter[str] = Counter()
        """How many events of each type were passed over."""

    def event(
        self,
        name: str,
        *,
        version: int = 1,
        upcasters: Mapping[int, Upcaster] | None = None,
        subject: SubjectOf | None = None,
    ) -> Callable[[C], C]:
        """Return a decorator for the class that stands for a type of event.

        Dataclasses, pydantic models, msgspec Structs, protobuf messages. Of a class that can't be
        decorated, such as a generated one: `shop.event("OrderPlaced")(OrderPlaced)`.

        `version` is that of the class, 1 or more. `upcasters` has for each version before it the
        function that makes the data of the next one: JSON as it was stored, or bytes of a protobuf
        message. It must not change what it gets. `subject` tells whom an event is about: what it
        holds is then kept secret by a `TypedStore`, and can be forgotten.

        Raises `InvalidType` and `InvalidValue` for a type or class that is registered already, a
        version without an upcaster, and a class that could not be read back.
        """
        check_types([name])
        check_whole_number("version", version, least=1)
        steps = dict(upcasters or {})
        _check_steps(version, steps)
        if subject is not None and not callable(subject):
            raise InvalidType("subject", f"a function is wanted, not {type(subject).__name__}")

        def decorator(cls: C) -> C:
            self._check_is_free(name, cls)
            schema = Schema(name, version, kind_of(cls), steps, subject)
            self._by_type[name] = self._by_class[cls] = schema
            return cls

        return decorator

    def to_event(self, value: Any, **options: Unpack[EventOptions]) -> Event:
        """Return the event that an object stands for; see `Event` for the options.

        Raises `InvalidEvent` for an object that would not come back, `InvalidType` for one whose
        class is not registered, `InvalidValue` for one that is to be kept secret, which takes a
        `TypedStore`.
        """
        if self._subject_of(value) is not None:
            why = f"a {type(value).__name__} is kept secret: append it by a TypedStore with keys"
            raise InvalidValue("event", why)
        return self._in_the_clear(value, **options)

    def _in_the_clear(self, value: Any, **options: Unpack[EventOptions]) -> Event:
        """Return the event of an object that may have a subject, and is not secret yet."""
        schema = self._schema_of(value)
        metadata = options.get("metadata")
        check_unreserved(metadata)
        if schema.version > 1:
            options["metadata"] = {**(metadata or {}), VERSION: schema.version}
        return Event(schema.type, schema.dump(value), **options)

    def _subject_of(self, value: Any) -> str | None:
        """Return whom an object is about, if what it holds is to be kept secret."""
        return self._schema_of(value).subject(value)

    def from_event(self, event: RecordedEvent) -> Any:
        """Return the object that a stored event stands for, brought to the newest version.

        Of an unknown or forgotten one what the policy says: with `SKIP` None. Raises
        `UnknownEvent` and `ForgottenEvent` with `FAIL`; `UnreadableEvent` for data that are not
        what its class takes, or that a `TypedStore` has to open; `CorruptEvent` for what can't be
        decoded. None of them shows data.
        """
        version = _version_of(event)
        schema = self._by_type.get(event.type)
        if schema is None or version > schema.version:
            newest = None if schema is None else schema.version
            unknown = UnknownEvent(event.aggregate, event.sequence, event.type, version, newest)
            return self._without_object(self._unknown, event, event, unknown)
        if CODINGS in event.metadata:
            raise unreadable(event, "its body is compressed or secret: read it by a TypedStore")
        data = event.data
        if isinstance(data, Forgotten):
            place = event.aggregate, event.sequence, event.type, version
            return self._without_object(
                self._forgotten, event, data, ForgottenEvent(*place, data.subject)
            )
        return _load(schema, event, version, data)

    def _knows(self, event: RecordedEvent) -> bool:
        """Whether `from_event` gives an object for an event, if its data are sound."""
        schema = self._by_type.get(event.type)
        return schema is not None and _version_of(event) <= schema.version

    def _without_object(
        self, policy: Policy, event: RecordedEvent, kept: Any, error: Exception
    ) -> Any:
        if policy is Policy.FAIL:
            raise error
        if policy is Policy.KEEP:
            return kept
        if not self.skipped[event.type]:
            _log.warning(
                "events of type %s are passed over, the first of them: %s", event.type, error
            )
        self.skipped[event.type] += 1
        return None

    def _schema_of(self, value: Any) -> Schema:
        schema = self._by_class.get(type(value))
        if schema is None:
            why = f"{type(value).__name__} is not registered: decorate it with event(…)"
            raise InvalidType("event", why)
        return schema

    def _check_is_free(self, name: str, cls: type) -> None:
        if not isinstance(cls, type):
            raise InvalidType("event", f"a class is wanted, not {type(cls).__name__}")
        if name in self._by_type:
            why = f"{name!r} is registered already: a type of event has one class, of its newest "
            raise InvalidValue("event", why + "version")
        if cls in self._by_class:
            other = self._by_class[cls].type
            raise InvalidValue("event", f"{cls.__name__} is registered already, for {other!r}")


def unreadable(event: RecordedEvent, why: str, fields: str = "") -> UnreadableEvent:
    """Return the error that names an event, and never what it holds."""
    version = event.metadata.get(VERSION, 1)
    shown = version if type(version) is int else 0
    return UnreadableEvent(event.aggregate, event.sequence, event.type, shown, why, fields)


def _load(schema: Schema, event: RecordedEvent, version: int, data: Any) -> Any:
    for number in range(version, schema.version):
        try:
            data = schema.upcasters[number](data)
        except Exception as error:
            why = f"{type(error).__name__} in its upcaster from version {number}"
            raise unreadable(event, why) from None
    try:
        return schema.kind.load(data)
    except Exception as error:
        why = f"{type(error).__name__} when it was made of the data"
        raise unreadable(event, why, schema.kind.blame(error)) from None


def _version_of(event: RecordedEvent) -> int:
    version = event.metadata.get(VERSION, 1)
    if type(version) is not int or version < 1:
        raise unreadable(event, f"its {VERSION} is not a number of 1 or more")
    return version


def _check_policy(argument: str, value: Policy) -> Policy:
    if not isinstance(value, Policy):
        raise InvalidType(argument, f"a Policy is wanted, not {type(value).__name__}")
    return value


def _check_steps(version: int, steps: Mapping[int, Upcaster]) -> None:
    for number in range(1, version):
        if number not in steps:
            raise InvalidValue("upcasters", f"there is none from version {number} to {number + 1}")
        if not callable(steps[number]):
            why = f"a function is wanted for version {number}, not {type(steps[number]).__name__}"
            raise InvalidType("upcasters", why)
    if len(steps) >= version:
        why = f"one for each version before {version} is wanted, and nothing else"
        raise InvalidValue("upcasters", why)


def check_unreserved(metadata: Mapping[str, Any] | None) -> None:
    """Raise `InvalidType` or `InvalidValue` for metadata that are none, or have names of ours."""
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise InvalidType("metadata", f"a mapping is wanted, not {type(metadata).__name__}")
    if any(str(name).startswith(RESERVED) for name in metadata):
        why = f"names that begin with {RESERVED!r} are kept for asyncstore"
        raise InvalidValue("metadata", why)
