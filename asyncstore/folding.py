"""From events to a state, and from a state to new events, however many others write.

The pattern has many names (fold, evolve and decide, aggregate root). Here it is two functions of
the caller: `apply(state, event)` returns the next state, `decide(state)` the events to append.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypedDict, TypeVar
from weakref import WeakValueDictionary

from asyncstore import codec
from asyncstore.errors import (
    InvalidType,
    InvalidValue,
    OutcomeUnknown,
    SequenceConflict,
    StoreFull,
    StoreUnavailable,
    UnexpectedReply,
)
from asyncstore.names import MAIN, check_schema_version, check_whole_number
from asyncstore.observing import named, observed
from asyncstore.values import Aggregate, Appended, Event

if TYPE_CHECKING:
    from uuid import UUID

    from asyncstore.recorded import Loaded, RecordedEvent
    from asyncstore.router import Router
    from asyncstore.snapshots import Snapshots
    from asyncstore.values import Expected, Source, Trace

S = TypeVar("S")

DEFAULT_TRIES: Final = 10
_FIRST_PAUSE: Final = 0.001  # seconds; doubled with each try, and a random part of it is waited
_LONGEST_PAUSE: Final = 0.1
_NOT_KEPT: Final = (StoreFull, StoreUnavailable, OutcomeUnknown, UnexpectedReply)

_log = logging.getLogger(__name__)

Decide = Callable[[S], Iterable[Event] | Awaitable[Iterable[Event]]]


class FoldOptions(TypedDict, total=False):
    """How `Store.fold` and `Store.update` use snapshots.

    `snapshot_every`: keep one when so many events came after the last; None keeps none.
    `schema_version`: says what state it is and in which form; snapshots of another are passed over.
    `dump`, `restore`: from a state to what a snapshot can hold, and back. Without them the state
    must be what JSON gives back (dict with str keys, list, str, int, float, bool, None) or bytes.
    """

    snapshot_every: int | None
    schema_version: int
    dump: Callable[[Any], Any] | None
    restore: Callable[[Any], Any] | None


@dataclass(frozen=True, slots=True)
class Fold(Generic[S]):
    """How the events of an aggregate become its state."""

    apply: Callable[[S, RecordedEvent], S]
    initial: S
    snapshot_every: int | None = None
    schema_version: int = 0
    dump: Callable[[S], Any] | None = None
    restore: Callable[[Any], S] | None = None

    def __post_init__(self) -> None:
        _check_callable("apply", self.apply)
        object.__setattr__(self, "schema_version", check_schema_version(self.schema_version))
        if self.snapshot_every is not None:
            _check_at_least_one("snapshot_every", self.snapshot_every)
        for name in ("dump", "restore"):
            if getattr(self, name) is not None:
                _check_callable(name, getattr(self, name))

    def over(self, state: S, events: Iterable[RecordedEvent]) -> S:
        """Return the state after more events."""
        for event in events:
            state = self.apply(state, event)
        return state

    def dumped(self, state: S) -> Any:
        """Return what a snapshot of the state holds, or raise if it would come back changed."""
        if self.dump is not None:
            return self.dump(state)
        body, encoding = codec.encode_state(state)
        if codec.decode_body(body, encoding) != state:
            why = f"a {type(state).__name__} does not come back from JSON as it was: give dump"
            raise InvalidType("dump", f"{why} and restore")
        return state

    def restored(self, state: Any) -> S:
        """Return the state that a snapshot holds."""
        restored: S = state if self.restore is None else self.restore(state)
        return restored


@dataclass(frozen=True, slots=True)
class Folded(Generic[S]):
    """A state, and the id of the last event in it, if it is known."""

    state: S
    next_sequence: int
    last_id: UUID | None

    def goes_on_with(self, refusal: SequenceConflict) -> bool:
        """Whether what was missed goes on from the history that the state is of.

        Not if the aggregate was deleted and begun anew, nor if its edition may have diverged from
        what was seen of main.
        """
        if refusal.aggregate.edition != MAIN:
            return False
        if self.next_sequence == 0:
            return True
        return refusal.before is not None and refusal.before.id == self.last_id


class History(Protocol):
    """What is needed of `Events`."""

    async def load(self, aggregate: Aggregate, *, schema_version: int | None = None) -> Loaded:
        """Return the newest snapshot and the events after it."""

    async def read(self, aggregate: Aggregate, *, stop: int | None = None) -> list[RecordedEvent]:
        """Return the events before a sequence."""

    async def find_idempotency_key(self, aggregate: Aggregate, key: str) -> list[RecordedEvent]:
        """Return the events that were appended with a key."""

    async def append(
        self,
        aggregate: Aggregate,
        events: Iterable[Event],
        *,
        expected: Expected,
        idempotency_key: str | None = None,
        correlation_id: str | None = None,
        source: Source | None = None,
        missed: bool = False,
    ) -> Appended:
        """Append events."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Folds the events of a store."""

    _router: Router
    _events: History
    _snapshots: Snapshots
    _turns: WeakValueDictionary[Aggregate, asyncio.Lock] = field(
        default_factory=WeakValueDictionary
    )

    async def fold(self, aggregate: Aggregate, how: Fold[S]) -> Folded[S]:
        """Return the state of an aggregate, and what it is as of."""
        loaded = await self._events.load(aggregate, schema_version=how.schema_version)
        state, since, events = how.initial, 0, loaded.events
        if loaded.snapshot is not None:
            try:
                state = how.restored(loaded.snapshot.state)
                since = loaded.snapshot.sequence + 1
            except Exception as error:
                # A snapshot is a short cut: whatever is wrong with it, the events are there.
                why = type(error).__name__
                _log.warning(
                    "the snapshot of %s is passed over: %s in restore",
                    aggregate,
                    why,
                    extra=named(aggregate),
                )
                events = await self._events.read(aggregate, stop=loaded.next_sequence)
        state = how.over(state, events)
        every = how.snapshot_every
        if every is not None:
            dumped = how.dumped(state)  # each time: what can't be kept shows with the first call
            if events and loaded.next_sequence - since >= every:
                await self._keep(aggregate, events[-1], dumped, how)
        return Folded(state, loaded.next_sequence, events[-1].id if events else None)

    async def _keep(
        self, aggregate: Aggregate, last: RecordedEvent, state: Any, how: Fold[S]
    ) -> None:
        try:
            await self._snapshots.put(
                aggregate,
                sequence=last.sequence,
                state=state,
                schema_version=how.schema_version,
                as_of=last.id,
            )
        except _NOT_KEPT as error:
            _log.warning("no snapshot of %s was kept: %s", aggregate, error, extra=named(aggregate))

    @observed("update")
    async def update(
        self, aggregate: Aggregate, decide: Decide[S], how: Fold[S], tries: int, trace: Trace
    ) -> Appended:
        """Append what `decide` makes of the state; decide again when somebody was faster."""
        _check_callable("decide", decide)
        _check_at_least_one("tries", tries)
        done = await self._done_before(aggregate, trace)
        if done is not None:
            return done
        folded = await self.fold(aggregate, how)
        try:
            return await self._try(aggregate, decide, folded, trace)
        except SequenceConflict as refusal:
            if tries == 1:
                raise
            # Those of this store that were refused take turns, and have only others to fear.
            turn = self._turns.setdefault(aggregate, asyncio.Lock())
            async with turn:
                return await self._try_again(decide, how, tries - 1, trace, folded, refusal)

    async def _done_before(self, aggregate: Aggregate, trace: Trace) -> Appended | None:
        """Return what the key was used for: on a state that has its effect, nothing is decided."""
        if trace.idempotency_key is None:
            return None
        found = await self._events.find_idempotency_key(aggregate, trace.idempotency_key)
        if not found:
            return None
        return Appended(found[0].sequence, found[-1].sequence, duplicate=True)

    async def _try_again(
        self,
        decide: Decide[S],
        how: Fold[S],
        tries: int,
        trace: Trace,
        folded: Folded[S],
        refusal: SequenceConflict,
    ) -> Appended:
        aggregate, pause = refusal.aggregate, _FIRST_PAUSE
        while True:
            self._router.tally.retries += 1
            if refusal.missed and folded.goes_on_with(refusal):
                state, last = how.over(folded.state, refusal.missed), refusal.missed[-1].id
                folded = Folded(state, refusal.actual, last)
            else:
                folded = await self.fold(aggregate, how)
            try:
                return await self._try(aggregate, decide, folded, trace)
            except SequenceConflict as conflict:
                tries -= 1
                if not tries:
                    raise
                refusal = conflict
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _try(
        self, aggregate: Aggregate, decide: Decide[S], folded: Folded[S], trace: Trace
    ) -> Appended:
        next_sequence = folded.next_sequence
        decision = decide(folded.state)
        events = await decision if inspect.isawaitable(decision) else decision
        if not isinstance(events, Iterable):
            why = f"it must return a list of Event, not {type(events).__name__}"
            raise InvalidType("decide", why)
        batch = list(events)
        if not batch:
            return Appended(next_sequence, next_sequence - 1)
        return await self._events.append(
            aggregate,
            batch,
            expected=next_sequence,
            idempotency_key=trace.idempotency_key,
            correlation_id=trace.correlation_id,
            source=trace.source,
            missed=True,
        )


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise InvalidType(name, f"a function is wanted, not {type(value).__name__}")


def _check_at_least_one(name: str, value: int) -> None:
    if check_whole_number(name, value) == 0:
        raise InvalidValue(name, "it must be 1 or more")
