"""Appending and reading the events of aggregates, and listing what there is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from asyncstore import codec, forms, keys, scripts
from asyncstore.errors import (
    AsyncStoreError,
    BranchExists,
    DurabilityNotReached,
    EventTooLarge,
    HistoryRegressed,
    InvalidType,
    ProtectedEdition,
    SequenceConflict,
)
from asyncstore.names import (
    MAIN,
    check_bool,
    check_edition,
    check_id,
    check_name,
    check_schema_version,
    check_sequence,
)
from asyncstore.reading import Range, Reader
from asyncstore.recorded import EventBook, Loaded, RecordedEvent
from asyncstore.values import (
    ANY,
    NO_TRACE,
    Aggregate,
    Appended,
    Durability,
    Event,
    Expected,
    Source,
    Trace,
    check_aggregate,
    check_durability,
    check_expected,
    check_source,
    check_trace,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from asyncstore.appends import Appender
    from asyncstore.durability import Reached
    from asyncstore.keys import Keys
    from asyncstore.lanes import Lanes
    from asyncstore.transport import Transport
    from asyncstore.wire import Argument, Reply

_PAGE_NAMES: Final = 1000
_DELETE_ROUNDS: Final = 100  # handlers and correlation ids are met for the first time only so often
_AT_ONCE: Final = 100  # aggregates that are deleted or looked through


@dataclass(frozen=True, slots=True)
class Limits:
    """What one append may hold; see Settings."""

    max_event_bytes: int
    max_append_bytes: int
    max_append_events: int


@dataclass(frozen=True, slots=True)
class Events:
    """The events of a store."""

    _transport: Transport
    _keys: Keys
    _appender: Appender
    _lanes: Lanes
    _reader: Reader
    _limits: Limits

    async def append(
        self,
        aggregate: Aggregate,
        events: Iterable[Event],
        *,
        expected: Expected,
        idempotency_key: str | None = None,
        correlation_id: str | None = None,
        source: Source | None = None,
        durability: Durability | None = None,
        missed: bool = False,
    ) -> Appended:
        """Append events to an aggregate: all of them or none, in one atomic step.

        `expected` is the sequence that the first of them must get: NEW for an aggregate without
        events, a number, or ANY. If the aggregate is not there, `SequenceConflict` and nothing is
        written; with `missed` the error has the events from `expected` on. An empty list writes
        nothing and succeeds, whatever is expected. The first append to an edition may start
        anywhere from 0 to the next sequence of main: that is where the edition diverges. With ANY
        it is wherever main ends then; to choose the place, give a number, or call `branch`.

        `idempotency_key` names what is done, in the aggregate and its edition: the second append
        with a key writes nothing, whatever it brings and expects, and returns the sequences of the
        first, with `duplicate=True`. `correlation_id` names the business process, for
        `correlated`; `source` the event that made a saga write these, for `find_source`. All three
        are stored with each event; an empty text counts as None.

        `durability` says what must be true before this returns; None takes what the settings say.
        A server that can't give it is `DurabilityUnavailable`, with nothing written. When it was
        not reached in time, the events are stored all the same: `DurabilityNotReached`, and
        `confirm` finds out later.

        Raises `EventTooLarge` for what the settings forbid, `InvalidType` and `InvalidValue` for
        what can't be stored, before anything is sent; `StoreUnavailable` and `StoreFull` when
        nothing was written. An answer that was lost is found out by the driver: the events are
        stored once, and their sequences are what is returned. `OutcomeUnknown` if that could not
        be done in time. Events of one aggregate must not share ids for that, with ANY.
        """
        check_aggregate(aggregate)
        expected = check_expected(expected)
        trace = check_trace(idempotency_key, correlation_id, source)
        check_bool("missed", missed)
        wanted = self._lanes.default if durability is None else check_durability(durability)
        batch = _check_batch(events)
        if not batch:
            end = await self.next_sequence(aggregate)
            return Appended(end, end - 1)
        encoded, size = self._encode(batch, trace)
        place = "" if expected is ANY else str(expected)
        about: list[Argument] = [aggregate.root, place, len(batch)]
        about += _options(trace, missed=missed, durable=wanted is not Durability.MEMORY)
        where = self._append_keys(aggregate, trace)
        if wanted is Durability.MEMORY:
            reply = await self._appender.send(aggregate, where, about, encoded, size)
            reached = None
        else:
            reply, reached = await self._prove(wanted, aggregate, where, about, encoded, size)
        parts = self._transport.checked(reply, "append")
        if not forms.is_appended(parts):
            raise self._transport.misfit("append")
        tag, value = parts[:2]
        if tag == b"ok" and expected in (ANY, value):
            done = Appended(value, value + len(batch) - 1)
        elif tag == b"duplicate" and trace.idempotency_key is not None:
            done = Appended(value, value + parts[2] - 1, duplicate=True)
        else:
            raise await self._refusal(aggregate, expected, parts, missed=missed)
        return done if reached is None else _proven(aggregate, done, wanted, reached)

    async def confirm(self, aggregate: Aggregate, *, durability: Durability | None = None) -> int:
        """Return the next sequence of an aggregate once all events before it are that durable.

        For events that are stored, but whose append was not answered with the level that it asked
        for: after `DurabilityNotReached` or `OutcomeUnknown`, or where somebody else has appended
        them. `durability` and the errors are those of `append`. No event is written, but the
        store's commit number, so that what the server says of it holds for all that was before.
        """
        check_aggregate(aggregate)
        wanted = self._lanes.default if durability is None else check_durability(durability)
        if wanted is Durability.MEMORY:
            return await self.next_sequence(aggregate)
        about: list[Argument] = [aggregate.root, "", 0, *_options(NO_TRACE, durable=True)]
        where = self._append_keys(aggregate, NO_TRACE)
        reply, reached = await self._prove(wanted, aggregate, where, about, [], 0)
        parts = self._transport.checked(reply, "append")
        if not forms.is_appended(parts) or reached is None:
            raise self._transport.misfit("append")
        tag, end = parts[:2]
        if tag != b"ok":
            raise await self._refusal(aggregate, ANY, parts, missed=False)
        _proven(aggregate, Appended(0, end - 1), wanted, reached)
        return int(end)

    async def read(
        self,
        aggregate: Aggregate,
        *,
        start: int = 0,
        stop: int | None = None,
        limit: int | None = None,
        reverse: bool = False,
        until: datetime | None = None,
        diverge_at: int | None = None,
    ) -> list[RecordedEvent]:
        """Return events of an aggregate in the order of their sequences; [] for an unknown one.

        `start` is the first sequence, `stop` the one after the last, `limit` the most events to
        return, counted from the end with `reverse`, which also turns the order around. `until`
        leaves out what happened after that moment.

        On another edition than main, the events are those of main before the divergence and the
        edition's own from there on; each has the aggregate that was asked for. `diverge_at` says
        where, for an edition that has not diverged: what main has from there on is left out.
        `BranchExists` if it has diverged elsewhere.

        Raises `CorruptEvent` for a member that is not an event, and where an event is missing;
        data that can't be decoded raise it when they are asked for.
        """
        return await self._reader.read(
            Range(aggregate, start, stop, limit, reverse, until, diverge_at)
        )

    def stream(
        self,
        aggregate: Aggregate,
        *,
        start: int = 0,
        stop: int | None = None,
        limit: int | None = None,
        reverse: bool = False,
        until: datetime | None = None,
        diverge_at: int | None = None,
    ) -> AsyncIterator[RecordedEvent]:
        """Iterate over what `read` returns, page by page: about a megabyte at a time in memory."""
        return self._reader.stream(Range(aggregate, start, stop, limit, reverse, until, diverge_at))

    async def next_sequence(self, aggregate: Aggregate) -> int:
        """Return the sequence that the next event will get: 0 for an unknown aggregate.

        That of main on an edition that has not diverged.
        """
        where = self._keys.timeline(check_aggregate(aggregate))
        if aggregate.edition == MAIN:
            count: int = await self._transport.command(forms.is_count, "ZCARD", *where)
        else:
            count = await self._transport.run(scripts.NEXT, where)
        return count

    async def load(self, aggregate: Aggregate, *, schema_version: int | None = None) -> Loaded:
        """Return the newest snapshot, the events after it and the next sequence, as of one moment.

        An edition that has no snapshot of its own takes one that main has from before the
        divergence. With `schema_version`, a snapshot of another one is passed over, as is one that
        can't be decoded: a warning is logged, and all events are returned.

        One round trip, unless there is more than a megabyte of events, or a snapshot that can't
        be decoded.
        """
        if schema_version is not None:
            schema_version = check_schema_version(schema_version)
        return await self._reader.load(aggregate, schema_version)

    async def find_source(self, aggregate: Aggregate, source: Source) -> list[RecordedEvent]:
        """Return the events that were appended to the aggregate with this source; [] for none.

        Those of its own edition: what an edition shares with main is found on main. One round
        trip, unless there is more than a megabyte; the rest of the aggregate is not read.
        """
        return await self._reader.find(aggregate, keys.claim_of_source(check_source(source)))

    async def find_idempotency_key(self, aggregate: Aggregate, key: str) -> list[RecordedEvent]:
        """Return the events that were appended to the aggregate with this key; [] for none.

        As `find_source` does.
        """
        check_aggregate(aggregate)
        known = check_id("idempotency_key", key)
        if known is None:
            return []
        return await self._reader.find(aggregate, keys.claim_of_key(known))

    async def correlated(self, correlation_id: str) -> list[EventBook]:
        """Return the events of all aggregates and editions that were appended with this id.

        One book for each aggregate, in the order of their domains, editions and roots. Events
        whose append was acknowledged before are never missing. One call for the index, and one for
        each aggregate that it names, a hundred at a time.
        """
        known = check_id("correlation_id", correlation_id)
        if known is None:
            return []
        claim = keys.claim_of_correlation(known)
        books: list[EventBook] = []

        async def look_through(aggregate: Aggregate) -> EventBook:
            return EventBook(aggregate, await self._reader.find(aggregate, claim))

        async for page in self._pages_of_names(self._keys.correlated(known), _AT_ONCE):
            named = [keys.find_aggregate(place) for place in page]
            books += await all_of(look_through(place) for place in named if place)
        # The index is in the order of its members' bytes, where some characters of a name come
        # before the colon that ends it.
        return sorted((book for book in books if book.events), key=_place_of)

    async def branch(self, aggregate: Aggregate, *, at: int) -> None:
        """Let an aggregate diverge from main on an edition: its next sequence there is `at`.

        Later events of main never show on the edition. An edition also diverges with its first
        event, if this was not called before. Raises `BranchExists` if it has diverged already,
        `SequenceConflict` if main has no event before `at`.
        """
        check_aggregate(aggregate)
        if aggregate.edition == MAIN:
            raise ProtectedEdition(MAIN, "it is the one that others diverge from")
        at = check_sequence("at", at)
        where = [
            self._keys.commits(),
            *self._index_keys(aggregate),
            *self._keys.timeline(aggregate),
            *self._keys.snapshots(aggregate),
        ]
        names = [aggregate.domain, aggregate.edition, aggregate.root]
        outcome, sequence = await self._transport.run(scripts.BRANCH, where, [*names, at])
        if outcome == b"exists":
            raise BranchExists(aggregate, at, sequence)
        if outcome == b"conflict":
            raise SequenceConflict(aggregate, at, sequence)

    async def divergence(self, aggregate: Aggregate) -> int | None:
        """Return the sequence at which an aggregate has left main on its edition.

        From there on the events are the edition's own. None on main, and where it has not diverged.
        """
        if check_aggregate(aggregate).edition == MAIN:
            return None
        key = self._keys.divergence(aggregate)
        value = await self._transport.command(forms.is_place_or_nil, "GET", key)
        return None if value is None else int(value)

    async def delete(self, aggregate: Aggregate) -> int:
        """Erase an aggregate on its edition.

        What goes in one atomic step are its events, snapshots, positions, claims of keys, sources
        and correlation ids, its divergence, and its entries in the indexes of roots, editions and
        domains. Right after that go its entries in the indexes of its correlation ids; if it is cut
        off there, the next `delete` goes on. Returns how many events there were; 0
        for an unknown one; an edition's own ones. Its next event gets sequence 0, or on an edition
        that of main.

        Editions that have diverged from a main history keep their own events when it is deleted,
        and can't be read any more until main has as many events again, which they would then show:
        delete them, too. An append whose reply was lost may be sent again after the deletion, and
        is stored anew. Other aggregates may name the root as the source of their events; the
        server's backups, and its append-only file until it is rewritten, have what was deleted.
        """
        check_aggregate(aggregate)
        handlers: list[str] = []
        names = [aggregate.domain, aggregate.edition, aggregate.root]
        own = [
            self._keys.events(aggregate),
            *self._keys.snapshots(aggregate),
            self._keys.handlers(aggregate),
            self._keys.claims(aggregate),
            self._keys.erasing(aggregate),
            self._keys.divergence(aggregate),
            *self._index_keys(aggregate),
            self._keys.attached(aggregate.domain, aggregate.edition),
        ]
        for _ in range(_DELETE_ROUNDS):
            positions = [self._keys.position(name, aggregate) for name in handlers]
            outcome, *rest = await self._transport.run(
                scripts.DELETE, [*own, *positions], [*names, *handlers]
            )
            if outcome == b"ok":
                count, ids = rest
                if ids:
                    await self._erase_correlations(aggregate, ids)
                return int(count)
            handlers = [name.decode(errors="replace") for name in rest[0]]
        raise self._transport.misfit("delete")

    async def _erase_correlations(self, aggregate: Aggregate, ids: list[bytes]) -> None:
        """Take an aggregate that was erased out of the indexes of correlation ids."""
        own = [
            self._keys.erasing(aggregate),
            self._keys.claims(aggregate),
            self._keys.attached(aggregate.domain, aggregate.edition),
            self._keys.handlers(aggregate),
            self._keys.snapshots(aggregate)[0],
        ]
        names = [aggregate.domain, aggregate.edition, aggregate.root]
        while ids:
            indexes = [self._keys.correlated(name.decode(errors="replace")) for name in ids]
            ids = await self._transport.run(scripts.ERASE, [*own, *indexes], [*names, *ids])

    async def delete_edition(self, domain: str, edition: str) -> int:
        """Erase all aggregates of a domain on an edition; main is refused: `ProtectedEdition`.

        Returns how many events of its own it had. Each aggregate goes in one atomic step, as with
        `delete`, but not all of them at once: other calls are served in between, and what they
        write to the edition meanwhile may stay. If it is cut off, call it again.
        """
        check_name("domain", domain)
        if check_edition(edition) == MAIN:
            raise ProtectedEdition(MAIN, "it can't be deleted; delete its aggregates one by one")
        count = 0
        for names in (
            self._pages_of_roots(self._keys.roots(domain, edition), _AT_ONCE),
            self._pages_of_names(self._keys.attached(domain, edition), _AT_ONCE),
        ):
            async for page in names:
                places = [Aggregate(domain, root, edition) for root in page]
                count += sum(await all_of(self.delete(place) for place in places))
        return count

    def domains(self) -> AsyncIterator[str]:
        """Iterate over the domains that have events or a branch, in alphabetical order."""
        return _flat(self._pages_of_names(self._keys.domains()))

    def editions(self, domain: str) -> AsyncIterator[str]:
        """Iterate over the editions of a domain that have events of their own, or a branch.

        In alphabetical order.
        """
        key = self._keys.editions(check_name("domain", domain))
        return _flat(self._pages_of_names(key))

    def roots(self, domain: str, *, edition: str = MAIN) -> AsyncIterator[str]:
        """Iterate over the roots of a domain, each once, least recently appended to first.

        On another edition than main, those that have diverged there. A root that is there from
        beginning to end is never missed, also while others write. The names that were given out
        are remembered until the end of the iteration.
        """
        key = self._keys.roots(check_name("domain", domain), check_edition(edition))
        return _flat(self._pages_of_roots(key))

    # Writing

    async def _prove(
        self,
        wanted: Durability,
        aggregate: Aggregate,
        where: list[str],
        about: list[Argument],
        encoded: list[bytes],
        size: int,
    ) -> tuple[Reply, Reached | None]:
        """Send an append that has to be durable; return the script's answer, and what was reached.

        Nothing was reached where the answer is an error.
        """
        born = self._transport.loop().time()
        appender = self._lanes.ready(wanted) or await self._lanes.made_ready(wanted, born)
        answer = await appender.send(aggregate, where, about, encoded, size, born)
        return self._lanes.reached(wanted, answer)

    async def _refusal(
        self, aggregate: Aggregate, expected: Expected, parts: list[Any], *, missed: bool
    ) -> AsyncStoreError:
        """Return what it means when append.lua has not stored the events."""
        tag, value, *page = parts
        if tag == b"error":
            return self._transport.refused("append", value.decode(errors="replace"))
        if tag == b"regressed" and expected is not ANY:
            return HistoryRegressed(aggregate, expected, value)
        if tag == b"conflict" and expected is not ANY:
            if not missed:
                return SequenceConflict(aggregate, expected, value)
            before, new = await self._reader.missed(aggregate, expected, value, page)
            return SequenceConflict(aggregate, expected, value, new, before)
        return self._transport.misfit("append")

    def _index_keys(self, aggregate: Aggregate) -> list[str]:
        return [
            self._keys.roots(aggregate.domain, aggregate.edition),
            self._keys.editions(aggregate.domain),
            self._keys.domains(),
        ]

    def _append_keys(self, aggregate: Aggregate, trace: Trace) -> list[str]:
        """Return the keys that append.lua has for one aggregate."""
        where = self._keys.timeline(aggregate)
        if aggregate.edition != MAIN:
            where += self._keys.snapshots(aggregate)
        if trace is not NO_TRACE:
            where.append(self._keys.claims(aggregate))
            if trace.correlation_id is not None:
                where.append(self._keys.correlated(trace.correlation_id))
        return where

    def _encode(self, batch: list[Event], trace: Trace) -> tuple[list[bytes], int]:
        """Return two arguments of the script for each event, and their size in bytes."""
        if len(batch) > self._limits.max_append_events:
            raise EventTooLarge("max_append_events", self._limits.max_append_events, len(batch))
        arguments: list[bytes] = []
        total = 0
        for index, event in enumerate(batch):
            time, member = codec.encode_event(event, trace)
            if len(member) > self._limits.max_event_bytes:
                limit = self._limits.max_event_bytes
                raise EventTooLarge("max_event_bytes", limit, len(member), index)
            arguments += (time, member)
            total += len(time) + len(member)
        if total > self._limits.max_append_bytes:
            raise EventTooLarge("max_append_bytes", self._limits.max_append_bytes, total)
        return arguments, total

    # Listing

    async def _pages_of_names(self, key: str, most: int = _PAGE_NAMES) -> AsyncIterator[list[str]]:
        start = b"-"
        while True:
            page: list[bytes] = await self._transport.command(
                forms.is_texts, "ZRANGE", key, start, "+", "BYLEX", "LIMIT", 0, most
            )
            yield [name.decode(errors="replace") for name in page]
            if len(page) < most:
                return
            start = b"(" + page[-1]

    async def _pages_of_roots(self, key: str, most: int = _PAGE_NAMES) -> AsyncIterator[list[str]]:
        # An append moves its root to the end of the index. So a root may come by again, but it
        # can't slip past: what is before the place we have come to was given out.
        given: set[bytes] = set()
        start = b"-inf"
        by = ("BYSCORE", "LIMIT", 0, most, "WITHSCORES")
        while True:
            reply = await self._transport.command(
                forms.is_scored, "ZRANGE", key, start, "+inf", *by
            )
            page = forms.pairs_of(reply)
            new = [root for root, _ in page if root not in given]
            given.update(new)
            yield [root.decode(errors="replace") for root in new]
            if len(page) < most:
                return
            start = b"(%d" % int(float(page[-1][1]))


T = TypeVar("T")


def _place_of(book: EventBook) -> tuple[str, str, str]:
    return book.aggregate.domain, book.aggregate.edition, book.aggregate.root


async def _flat(pages: AsyncIterator[list[str]]) -> AsyncIterator[str]:
    async for page in pages:
        for name in page:
            yield name


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Make calls at the same time. If one fails, the others are cancelled, and its error raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _proven(aggregate: Aggregate, done: Appended, wanted: Durability, reached: Reached) -> Appended:
    """Return what was done, or raise that it is less durable than it should be."""
    if reached.satisfies(wanted):
        return done
    first, last = done.first_sequence, done.last_sequence
    raise DurabilityNotReached(aggregate, first, last, wanted, reached.fsynced, reached.on_replicas)


def _options(trace: Trace, *, missed: bool = False, durable: bool = False) -> list[Argument]:
    """Return the options of append.lua, and a text for each of its claims."""
    letters = "m" if missed else ""
    if durable:
        letters += "d"
    if trace is NO_TRACE:
        return [letters]
    texts: list[str] = []
    if trace.idempotency_key is not None:
        letters, texts = letters + "k", [*texts, keys.claim_of_key(trace.idempotency_key)]
    if trace.source is not None:
        letters, texts = letters + "s", [*texts, keys.claim_of_source(trace.source)]
    if trace.correlation_id is not None:
        letters, texts = letters + "c", [*texts, keys.claim_of_correlation(trace.correlation_id)]
    return [letters, *texts]


def _check_batch(events: Iterable[Event]) -> list[Event]:
    if not isinstance(events, Iterable):
        why = f"a list of Event is wanted, not {type(events).__name__}"
        raise InvalidType("events", why)
    batch = list(events)
    for index, event in enumerate(batch):
        if not isinstance(event, Event):
            why = f"at index {index} is a {type(event).__name__}, an Event is wanted"
            raise InvalidType("events", why)
    return batch
