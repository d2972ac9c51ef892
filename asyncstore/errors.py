"""Every error that asyncstore raises, under one base class.

An error carries its facts as fields and builds its own message from them. No message holds event
data or a password. All of them can be pickled.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncstore.recorded import RecordedEvent
    from asyncstore.values import Aggregate, Durability, Expected


@dataclass(eq=False)
class AsyncStoreError(Exception):
    """The base of all errors of this package."""

    def __reduce__(self) -> tuple[type[AsyncStoreError], tuple[Any, ...]]:
        fields = dataclasses.fields(self)
        return type(self), tuple(getattr(self, field.name) for field in fields)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a task group, for callers who need not know that there is one."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# What the caller gave


@dataclass(eq=False)
class InvalidName(AsyncStoreError, ValueError):
    """A domain, edition, handler or root that can't be used. Nothing was sent."""

    part: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.part} {self.value!r} can't be used: {self.why}"


@dataclass(eq=False)
class InvalidValue(AsyncStoreError, ValueError):
    """An argument of the right type with a value that makes no sense. Nothing was sent."""

    argument: str
    why: str

    def __str__(self) -> str:
        return f"{self.argument}: {self.why}"


@dataclass(eq=False)
class InvalidType(AsyncStoreError, TypeError):
    """An argument of a type that can't be used. Nothing was sent."""

    argument: str
    why: str

    def __str__(self) -> str:
        return f"{self.argument}: {self.why}"


@dataclass(eq=False)
class EventTooLarge(AsyncStoreError, ValueError):
    """An event, or a list of events, beyond what the settings allow. Nothing was sent.

    `setting` names the limit, `index` the place of the event in the list (None: the list itself).
    """

    setting: str
    limit: int
    actual: int
    index: int | None = None

    def __str__(self) -> str:
        what = "the append" if self.index is None else f"the event at index {self.index}"
        unit = "bytes" if self.setting.endswith("bytes") else "events"
        return (
            f"{what} has {self.actual} {unit}, and {self.setting} is {self.limit}: "
            f"write less at once, or raise {self.setting} in the settings"
        )


@dataclass(eq=False)
class ConfigurationError(AsyncStoreError, ValueError):
    """The configuration can't be used. `key` names the setting, `source` where it stands."""

    key: str
    why: str
    source: str = "the arguments"

    def __str__(self) -> str:
        return f"{self.key} in {self.source}: {self.why}"


# What the store found


@dataclass(eq=False)
class SequenceConflict(AsyncStoreError):
    """Somebody else appended first; nothing was written.

    `actual` is the sequence that the aggregate's next event will get. If the append asked for it,
    `missed` are the events from `expected` on, or None where they are gone again, and `before` is
    the one before them: if that is not the one you know, the aggregate was deleted and begun anew.
    """

    aggregate: Aggregate
    expected: Expected
    actual: int
    missed: list[RecordedEvent] | None = dataclasses.field(default=None, repr=False)
    before: RecordedEvent | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        return (
            f"{self.aggregate}: expected to go on at sequence {self.expected}, but the next "
            f"sequence is {self.actual}. Read what is new and decide again; to append, give "
            f"expected={self.actual}"
        )


@dataclass(eq=False)
class HistoryRegressed(AsyncStoreError):
    """The server has less of the aggregate's history than it had before; nothing was written.

    Its process was replaced in the middle of an append, or behind the back of a handler (a
    failover, a restart that lost the end of the history): where `expected` was to come next, the
    history has gone back to `actual`, and may have other events from there on. Read it anew:
    events that were acknowledged before may be gone.
    """

    aggregate: Aggregate
    expected: Expected
    actual: int

    def __str__(self) -> str:
        return (
            f"{self.aggregate}: its history went back from sequence {self.expected} to "
            f"{self.actual} when the server was replaced. Read it anew before you decide"
        )


@dataclass(eq=False)
class BranchExists(AsyncStoreError):
    """The aggregate has left main on this edition already, at the sequence `diverged_at`.

    Nothing was changed. `at` is where it should have diverged.
    """

    aggregate: Aggregate
    at: int
    diverged_at: int

    def __str__(self) -> str:
        return (
            f"{self.aggregate} can't diverge from main at sequence {self.at}: it has diverged at "
            f"{self.diverged_at}. Use another edition, or delete the aggregate on this one first"
        )


@dataclass(eq=False)
class ProtectedEdition(AsyncStoreError, ValueError):
    """The main edition can't be deleted as a whole, or diverge. Nothing was sent."""

    edition: str
    why: str

    def __str__(self) -> str:
        return f"edition {self.edition!r}: {self.why}"


@dataclass(eq=False)
class CorruptEvent(AsyncStoreError):
    """What stands at `sequence` of the sorted set `key` is not just one event of this store.

    The other events stay readable: `read(aggregate, stop=error.sequence)` gives the ones before,
    `read(aggregate, start=error.sequence + 1)` the ones after, or what is wrong next. Of two
    members that stand at one place, `limit=1` with `start=error.sequence` gives the first.
    """

    key: str
    sequence: int
    why: str

    def __str__(self) -> str:
        return (
            f"{self.key}, sequence {self.sequence}: {self.why}. Events before it are read with "
            f"stop={self.sequence}, those after it with start={self.sequence + 1}; "
            f"`asyncstore verify` tells of all that is wrong"
        )


@dataclass(eq=False)
class CorruptPosition(AsyncStoreError):
    """What stands at `key` is not a position. `positions.put` sets it anew."""

    key: str

    def __str__(self) -> str:
        return f"{self.key}: it is not a position; put one to set it anew"


@dataclass(eq=False)
class MoveRefused(AsyncStoreError):
    """An aggregate can't be moved to another store; nothing was lost in either of them."""

    aggregate: Aggregate
    why: str

    def __str__(self) -> str:
        return f"{self.aggregate} can't be stored in the new store: {self.why}"


# What subscriptions and listeners are told


@dataclass(eq=False)
class ListenerLagged(AsyncStoreError):
    """Events were appended that a listener will not get; it can go on with those that follow.

    `missed` is how many, of whatever type: it was too slow, and `buffer` were waiting for it
    already. None where nobody knows: the connection was gone for a while.
    """

    missed: int | None
    buffer: int

    def __str__(self) -> str:
        if self.missed is None:
            return (
                "the connection was gone for a while, and what was appended meanwhile was not "
                "heard: read what you must not miss, or use store.subscribe"
            )
        return (
            f"{self.missed} events were passed over, because {self.buffer} were waiting already: "
            f"handle them faster, give a larger buffer, or use store.subscribe"
        )


@dataclass(eq=False)
class LeaseLost(AsyncStoreError):
    """A delivery can't be settled: its worker has no lease on the aggregate any more.

    The lease has ended, or was given back with `nack` or the end of the subscription. The events
    from `sequence` on are delivered again, or have been already.
    """

    handler: str
    aggregate: Aggregate
    sequence: int

    def __str__(self) -> str:
        return (
            f"{self.handler} has no lease on {self.aggregate} any more, so event {self.sequence} "
            f"can't be settled: it is delivered again. Does handling take longer than the lease "
            f"without leaving the event loop free?"
        )


@dataclass(eq=False)
class StillBehind(AsyncStoreError):
    """A handler has not come as far as was waited for, in the time that was given."""

    handler: str
    aggregate: Aggregate
    sequence: int
    position: int | None

    def __str__(self) -> str:
        at = "nowhere yet" if self.position is None else f"at {self.position}"
        return (
            f"{self.handler} is {at} in {self.aggregate}, and was to come to {self.sequence}: does "
            f"a worker of it run? store.subscriptions.status() says more"
        )


# What typed events are told


@dataclass(eq=False)
class InvalidEvent(AsyncStoreError, ValueError):
    """An object can't be stored as the event that it stands for. Nothing was sent.

    `fields` names those that are wrong, where that is known.
    """

    type: str
    version: int
    why: str
    fields: str = ""

    def __str__(self) -> str:
        return f"{self.type} version {self.version} can't be stored: {_why_of(self)}"


@dataclass(eq=False)
class UnreadableEvent(AsyncStoreError):
    """A stored event can't be turned into an object. `events.read` still gives it as it is."""

    aggregate: Aggregate
    sequence: int
    type: str
    version: int
    why: str
    fields: str = ""

    def __str__(self) -> str:
        return f"{_place_of(self)} can't be read: {_why_of(self)}"


@dataclass(eq=False)
class UnknownEvent(AsyncStoreError):
    """A stored event has a type that is not registered, or a newer version than `newest`."""

    aggregate: Aggregate
    sequence: int
    type: str
    version: int
    newest: int | None

    def __str__(self) -> str:
        if self.newest is None:
            why = "no class is registered for it: register one, or choose another policy"
        else:
            why = f"version {self.newest} is the newest that is registered here: deploy readers "
            why += "before writers"
        return f"{_place_of(self)}: {why}"


@dataclass(eq=False)
class ForgottenEvent(AsyncStoreError):
    """A stored event was kept secret for a subject that has been forgotten."""

    aggregate: Aggregate
    sequence: int
    type: str
    version: int
    subject: str

    def __str__(self) -> str:
        return f"{_place_of(self)}: its subject, {self.subject}, has been forgotten"


def _why_of(error: InvalidEvent | UnreadableEvent) -> str:
    return f"{error.why} ({error.fields})" if error.fields else error.why


def _place_of(error: UnreadableEvent | UnknownEvent | ForgottenEvent) -> str:
    return f"{error.aggregate}, sequence {error.sequence}: {error.type} version {error.version}"


# What the server is, or did


@dataclass(eq=False)
class UnsafeServer(AsyncStoreError):
    """The server may throw histories away by itself: its eviction policy is not `noeviction`."""

    where: str
    policy: str

    def __str__(self) -> str:
        return (
            f"{self.where} evicts keys (maxmemory-policy {self.policy}), and would delete whole "
            f"histories when its memory is full. Set maxmemory-policy to noeviction, or "
            f"allow_eviction=True if losing events is fine"
        )


@dataclass(eq=False)
class StoreUnavailable(AsyncStoreError):
    """The server can't be used now. Nothing was written."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass(eq=False)
class DurabilityUnavailable(AsyncStoreError):
    """The server can't give the level of durability that was asked for. Nothing was written."""

    where: str
    wanted: Durability
    why: str

    def __str__(self) -> str:
        return f"{self.where} can't give durability {self.wanted}: {self.why}; nothing was written"


@dataclass(eq=False)
class DurabilityNotReached(AsyncStoreError):
    """The events ARE stored, but less safely than was asked for when the time was over.

    `first_sequence` and `last_sequence` are theirs. `fsynced` says whether the server has fsynced
    them, `on_replicas` how many replicas have them: fsynced, where that was asked for, too. Don't
    append them again: `events.confirm` returns when the level is reached.
    """

    aggregate: Aggregate
    first_sequence: int
    last_sequence: int
    wanted: Durability
    fsynced: bool
    on_replicas: int

    def __str__(self) -> str:
        return (
            f"{self.aggregate}: events {self.first_sequence} to {self.last_sequence} are stored, "
            f"but durability {self.wanted} was not reached: {self._reached()}. Don't append them "
            f"again; events.confirm returns when it is reached"
        )

    def _reached(self) -> str:
        fsynced = "they are fsynced" if self.fsynced else "they are not known to be fsynced"
        if not self.wanted.on_replicas:
            return fsynced
        replicas = f"{self.on_replicas} of {self.wanted.on_replicas} replicas have"
        if not self.wanted.fsynced:
            return f"{replicas} acknowledged them"
        return f"{fsynced} on the server, and {replicas} acknowledged to have fsynced them"


@dataclass(eq=False)
class OutcomeUnknown(AsyncStoreError):
    """The request was sent and no answer came: it may have been carried out, or not.

    Read the aggregate to find out; for an append, look for the id of its first event.
    """

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}; whether the change was made is not known, read to see"


@dataclass(eq=False)
class StoreFull(AsyncStoreError):
    """The server's memory limit is reached. Nothing was written, reads go on."""

    where: str

    def __str__(self) -> str:
        return (
            f"{self.where} is out of memory: nothing was written. "
            f"Raise its maxmemory, or delete what is not needed"
        )


_HINTS = {
    "ERR": "it does not take what we sent; does it have the database that the URL names?",
    "NOPERM": "its ACL does not allow this user a command or a key that the store needs",
    "WRONGTYPE": "a key holds another kind of value; does something else use the same key_prefix?",
}


@dataclass(eq=False)
class UnexpectedReply(AsyncStoreError):
    """The server refused a command for a reason that the driver has no name for.

    `code` is the first word of the server's answer; the rest may hold data and is left out.
    """

    where: str
    command: str
    code: str

    def __str__(self) -> str:
        hint = _HINTS.get(self.code)
        text = f"{self.where} answered {self.command} with the error {self.code}"
        return f"{text}: {hint}" if hint else text


@dataclass(eq=False)
class StoreClosed(AsyncStoreError):
    """The store was used before `async with`, after it, or from another event loop."""

    why: str

    def __str__(self) -> str:
        return self.why
