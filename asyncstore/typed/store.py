"""A store whose events are objects: the registry, and what bodies go through, around a `Store`."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, Generic, TypedDict, TypeVar

from asyncstore.errors import InvalidType, InvalidValue, SequenceConflict
from asyncstore.folding import DEFAULT_TRIES, Fold, Folder
from asyncstore.typed.bodies import Bodies, is_sealed
from asyncstore.typed.registry import Registry, check_unreserved
from asyncstore.typed.subjects import StoredKeys
from asyncstore.values import check_aggregate, check_expected, check_trace

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Unpack

    from asyncstore.events import Events
    from asyncstore.folding import FoldOptions
    from asyncstore.recorded import Loaded, RecordedEvent
    from asyncstore.store import Store
    from asyncstore.subscriptions import SubscribeOptions
    from asyncstore.values import Aggregate, Appended, Durability, Event, Expected, Source

S = TypeVar("S")

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    E = TypeVarWithDefault("E", default=Any)
else:
    E = TypeVar("E")

_AT_ONCE: Final = 128  # events of a stream that are opened together


class AppendOptions(TypedDict, total=False):
    """What `Events.append` takes beside `expected`."""

    idempotency_key: str | None
    correlation_id: str | None
    source: Source | None
    durability: Durability | None
    missed: bool


class ReadOptions(TypedDict, total=False):
    """What `Events.read` and `Events.stream` take."""

    start: int
    stop: int | None
    limit: int | None
    reverse: bool
    until: datetime | None
    diverge_at: int | None


@dataclass(frozen=True, slots=True)
class Typed(Generic[E]):
    """An object, and the event that it was made of, with its sequence, time and metadata."""

    value: E
    event: RecordedEvent


TypedFunction = Callable[[Typed[E]], Awaitable[object]]


class TypedStore(Generic[E]):
    """Appends and reads objects: what `Registry` knows, through what `Bodies` do.

    Made of a store, with no I/O. All that is not here is done with the store itself: `to_events`
    and `from_events` lead there and back. A type checker may be told which classes there are.

        shop: TypedStore[OrderPlaced | OrderPaid] = TypedStore(store, registry)
        await shop.append(order, [OrderPlaced(12, "EUR")], expected=NEW)
        for placed in await shop.read(order):
            print(placed.value, placed.event.time)
    """

    def __init__(self, store: Store, registry: Registry, bodies: Bodies | None = None) -> None:
        if not isinstance(registry, Registry):
            raise InvalidType("registry", f"a Registry is wanted, not {type(registry).__name__}")
        self._store = store
        self._registry = registry
        self._bodies = Bodies() if bodies is None else bodies
        self._folder = Folder(store._router, _Opened(store.events, self._open), store.snapshots)
        if isinstance(self._bodies._keys, StoredKeys):
            self._bodies._keys._warn_if_beside(store)

    # There and back

    async def to_events(
        self,
        aggregate: Aggregate,
        values: Iterable[E],
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Event]:
        """Return the events of objects, for an append to this aggregate: `ack(append=…)`, say.

        The errors are those of `Registry.to_event`, all of them before any I/O. Only for what is
        kept secret there is some: keys are asked for.
        """
        check_aggregate(aggregate)
        batch = _listed(values)
        events = [self._registry._in_the_clear(value, metadata=metadata) for value in batch]
        subjects = [self._registry._subject_of(value) for value in batch]
        return await self._bodies._seal(aggregate, events, subjects)

    async def from_events(self, events: Iterable[RecordedEvent]) -> list[Typed[E]]:
        """Return what stored events stand for: of a delivery, a listener, a book.

        What a policy passes over is left out. The errors are those of `Registry.from_event`.
        """
        opened = await self._open(list(events))
        values = ((self._registry.from_event(event), event) for event in opened)
        return [Typed(value, event) for value, event in values if value is not None]

    async def _open(self, events: list[RecordedEvent]) -> list[RecordedEvent]:
        """Return events as they were before they were stored, as far as there are classes for them.

        What there is no class for stays as it is, for the policy: perhaps nobody here can open it.
        """
        closed = [event for event in events if is_sealed(event) and self._registry._knows(event)]
        if not closed:
            return events
        opened = dict(zip(map(id, closed), await self._bodies._open(closed), strict=True))
        return [opened.get(id(event), event) for event in events]

    # Events

    async def append(
        self,
        aggregate: Aggregate,
        values: Iterable[E],
        *,
        expected: Expected,
        metadata: Mapping[str, Any] | None = None,
        **options: Unpack[AppendOptions],
    ) -> Appended:
        """Append objects to an aggregate, as `Events.append` does events.

        The `missed` events of a conflict are as they are stored: see `from_events`.
        """
        check_expected(expected)  # before keys are asked for
        events = await self.to_events(aggregate, values, metadata=metadata)
        return await self._store.events.append(aggregate, events, expected=expected, **options)

    async def read(self, aggregate: Aggregate, **options: Unpack[ReadOptions]) -> list[Typed[E]]:
        """Return objects of an aggregate in the order of their sequences, as `Events.read` does."""
        return await self.from_events(await self._store.events.read(aggregate, **options))

    async def stream(
        self, aggregate: Aggregate, **options: Unpack[ReadOptions]
    ) -> AsyncIterator[Typed[E]]:
        """Iterate over what `read` returns, some at a time in memory."""
        some: list[RecordedEvent] = []
        async for event in self._store.events.stream(aggregate, **options):
            some.append(event)
            if len(some) == _AT_ONCE:
                for typed in await self.from_events(some):
                    yield typed
                some.clear()
        for typed in await self.from_events(some):
            yield typed

    # States

    async def fold(
        self,
        aggregate: Aggregate,
        apply: Callable[[S, E], S],
        initial: S,
        **options: Unpack[FoldOptions],
    ) -> S:
        """Return the state of an aggregate: `apply(state, value)` for each object, from `initial`.

        As `Store.fold`. A snapshot is not encrypted: where there are keys, `snapshot_every` takes
        a `dump` that leaves out what is to be forgotten.
        """
        folded = await self._folder.fold(aggregate, self._fold(apply, initial, options))
        return folded.state

    async def update(
        self,
        aggregate: Aggregate,
        decide: Callable[[S], Iterable[E] | Awaitable[Iterable[E]]],
        apply: Callable[[S, E], S],
        initial: S,
        *,
        tries: int = DEFAULT_TRIES,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        correlation_id: str | None = None,
        source: Source | None = None,
        **options: Unpack[FoldOptions],
    ) -> Appended:
        """Append the objects that `decide(state)` returns, as `Store.update` does events.

        The state is what `fold` returns; `decide` may be async. `metadata` are those of each event.
        """
        check_unreserved(metadata)
        trace = check_trace(idempotency_key, correlation_id, source)

        async def events_of(state: S) -> list[Event]:
            decision = decide(state)
            values = await decision if inspect.isawaitable(decision) else decision
            return await self.to_events(aggregate, values, metadata=metadata)

        how = self._fold(apply, initial, options)
        return await self._folder.update(aggregate, events_of, how, tries, trace)

    def _fold(self, apply: Callable[[S, E], S], initial: S, options: FoldOptions) -> Fold[S]:
        keeps = options.get("snapshot_every") is not None
        if keeps and self._bodies._keys is not None and options.get("dump") is None:
            why = "a snapshot is not encrypted: give dump and restore that leave out what is secret"
            raise InvalidValue("snapshot_every", why)

        def over(state: S, event: RecordedEvent) -> S:
            value = self._registry.from_event(event)
            return state if value is None else apply(state, value)

        return Fold(over, initial, **options)

    def handler(
        self,
        name: str,
        domain: str | None,
        *,
        concurrency: int = 8,
        **options: Unpack[SubscribeOptions],
    ) -> Callable[[TypedFunction[E]], TypedFunction[E]]:
        """Return a decorator for an async function that gets a handler's objects, as `Typed`.

        As `Store.handler`, whose `run_handlers` runs it. What a policy passes over is acked.
        """
        register = self._store.handler(name, domain, concurrency=concurrency, **options)

        def decorator(function: TypedFunction[E]) -> TypedFunction[E]:
            @wraps(function)
            async def handle(event: RecordedEvent) -> None:
                for typed in await self.from_events([event]):
                    await function(typed)

            register(handle)
            return function

        return decorator


@dataclass(frozen=True, slots=True)
class _Opened:
    """The events of a store, opened as they are read: what a `Folder` folds."""

    _events: Events
    _open: Callable[[list[RecordedEvent]], Awaitable[list[RecordedEvent]]]

    async def load(self, aggregate: Aggregate, *, schema_version: int | None = None) -> Loaded:
        loaded = await self._events.load(aggregate, schema_version=schema_version)
        return replace(loaded, events=await self._open(loaded.events))

    async def read(self, aggregate: Aggregate, *, stop: int | None = None) -> list[RecordedEvent]:
        return await self._open(await self._events.read(aggregate, stop=stop))

    async def find_idempotency_key(self, aggregate: Aggregate, key: str) -> list[RecordedEvent]:
        return await self._events.find_idempotency_key(aggregate, key)  # for their sequences

    async def append(
        self,
        aggregate: Aggregate,
        events: Iterable[Event],
        *,
        expected: Expected,
        **options: Unpack[AppendOptions],
    ) -> Appended:
        try:
            return await self._events.append(aggregate, events, expected=expected, **options)
        except SequenceConflict as refusal:
            if refusal.missed is not None:
                refusal.missed = await self._open(refusal.missed)
            raise


def _listed(values: Iterable[Any]) -> list[Any]:
    if isinstance(values, Mapping | str | bytes) or not isinstance(values, Iterable):
        why = f"a list of events is wanted, not {type(values).__name__}"
        raise InvalidType("values", why)
    return list(values)
