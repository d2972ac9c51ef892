"""Appending and reading the events of aggregates, and listing what there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from asyncstore import forms, keys, scripts
from asyncstore.errors import (
    AsyncStoreError,
    BranchExists,
    ProtectedEdition,
    SequenceConflict,
)
from asyncstore.listing import flat
from asyncstore.names import (
    MAIN,
    check_bool,
    check_edition,
    check_id,
    check_name,
    check_schema_version,
    check_sequence,
)
from asyncstore.observing import observed
from asyncstore.reading import Range, Reader
from asyncstore.recorded import EventBook, Loaded, RecordedEvent
from asyncstore.sharing import all_of
from asyncstore.values import (
    ANY,
    Aggregate,
    Appended,
    Durability,
    Event,
    Expected,
    Source,
    check_aggregate,
    check_batch,
    check_expected,
    check_source,
    check_trace,
)
from asyncstore.writing import proven, stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from datetime import datetime

    from asyncstore.erasing import Eraser
    from asyncstore.keys import Keys
    from asyncstore.listing import Listing
    from asyncstore.router import Router
    from asyncstore.writing import Writer

_AT_ONCE: Final = 100  # aggregates that are looked through


@dataclass(frozen=True, slots=True)
class Events:
    """The events of a store."""

    _router: Router
    _keys: Keys
    _listing: Listing
    _reader: Reader
    _eraser: Eraser
    _writer: Writer

    @observed("append")
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
        wanted = self._writer.level(durability)
        batch = check_batch("events", events)
        if not batch:
            end = await self.next_sequence(aggregate)
            return Appended(end, end - 1)
        parts, reached = await self._writer.store(
            aggregate, batch, expected, trace, wanted, missed=missed
        )
        done = stored(parts, len(batch), expected, trace)
        if done is None:
            raise await self._refusal(aggregate, expected, parts, missed=missed)
        return done if reached is None else proven(aggregate, done, wanted, reached)

    @observed("confirm")
    async def confirm(self, aggregate: Aggregate, *, durability: Durability | None = None) -> int:
        """Return the next sequence of an aggregate once all events before it are that durable.

        For events that are stored, but whose append was not answered with the level that it asked
        for: after `DurabilityNotReached` or `OutcomeUnknown`, or where somebody else has appended
        them. `durability` and the errors are those of `append`. No event is written, but the
        store's commit number, so that what the server says of it holds for all that was before.
        """
        check_aggregate(aggregate)
        wanted = self._writer.level(durability)
        if wanted is Durability.MEMORY:
            return await self.next_sequence(aggregate)
        end, reached = await self._writer.prove(aggregate, wanted)
        proven(aggregate, Appended(0, end - 1), wanted, reached)
        return end

    @observed("read")
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

    @observed("next_sequence")
    async def next_sequence(self, aggregate: Aggregate) -> int:
        """Return the sequence that the next event will get: 0 for an unknown aggregate.

        That of main on an edition that has not diverged.
        """
        where = self._keys.timeline(check_aggregate(aggregate))
        if aggregate.edition == MAIN:
            count: int = await self._router.read(forms.is_count, "ZCARD", *where)
        else:
            count = await self._router.run(scripts.NEXT, where)
        return count

    @observed("load")
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

    @observed("find_source")
    async def find_source(self, aggregate: Aggregate, source: Source) -> list[RecordedEvent]:
        """Return the events that were appended to the aggregate with this source; [] for none.

        Those of its own edition: what an edition shares with main is found on main. One round
        trip, unless there is more than a megabyte; the rest of the aggregate is not read.
        """
        return await self._reader.find(aggregate, keys.claim_of_source(check_source(source)))

    @observed("find_idempotency_key")
    async def find_idempotency_key(self, aggregate: Aggregate, key: str) -> list[RecordedEvent]:
        """Return the events that were appended to the aggregate with this key; [] for none.

        As `find_source` does.
        """
        check_aggregate(aggregate)
        known = check_id("idempotency_key", key)
        if known is None:
            return []
        return await self._reader.find(aggregate, keys.claim_of_key(known))

    @observed("correlated")
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
        books: dict[Aggregate, EventBook] = {}

        async def look_through(aggregate: Aggregate) -> EventBook:
            return EventBook(aggregate, await self._reader.find(aggregate, claim))

        index = [self._keys.correlated(known)]
        async for page in self._listing.pages_of_names(index, _AT_ONCE):
            named = {keys.find_aggregate(place) for place in page} - {None, *books}
            found = await all_of(look_through(place) for place in named if place)
            books.update((book.aggregate, book) for book in found)
        # The index is in the order of its members' bytes, where some characters of a name come
        # before the colon that ends it.
        return sorted((book for book in books.values() if book.events), key=_place_of)

    @observed("branch")
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
            self._keys.commits(self._keys.tag_of(aggregate.root)),
            *self._keys.indexes_of(aggregate),
            *self._keys.timeline(aggregate),
            *self._keys.snapshots(aggregate),
        ]
        names = [aggregate.domain, aggregate.edition, aggregate.root]
        outcome, sequence = await self._router.run(scripts.BRANCH, where, [*names, at])
        if outcome == b"exists":
            raise BranchExists(aggregate, at, sequence)
        if outcome == b"conflict":
            raise SequenceConflict(aggregate, at, sequence)

    @observed("divergence")
    async def divergence(self, aggregate: Aggregate) -> int | None:
        """Return the sequence at which an aggregate has left main on its edition.

        From there on the events are the edition's own. None on main, and where it has not diverged.
        """
        if check_aggregate(aggregate).edition == MAIN:
            return None
        key = self._keys.divergence(aggregate)
        value = await self._router.read(forms.is_place_or_nil, "GET", key)
        return None if value is None else int(value)

    @observed("delete")
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
        return await self._eraser.erase(aggregate)

    @observed("delete_edition")
    async def delete_edition(self, domain: str, edition: str) -> int:
        """Erase all aggregates of a domain on an edition; main is refused: `ProtectedEdition`.

        Returns how many events of its own it had. Each aggregate goes in one atomic step, as with
        `delete`, but not all of them at once: other calls are served in between, and what they
        write to the edition meanwhile may stay. If it is cut off, call it again.
        """
        check_name("domain", domain)
        if check_edition(edition) == MAIN:
            raise ProtectedEdition(MAIN, "it can't be deleted; delete its aggregates one by one")
        return await self._eraser.erase_edition(domain, edition)

    def domains(self) -> AsyncIterator[str]:
        """Iterate over the domains that have events or a branch, in alphabetical order."""
        return self._listing.names([self._keys.domains(tag) for tag in self._keys.tags()])

    def editions(self, domain: str) -> AsyncIterator[str]:
        """Iterate over the editions of a domain that have events of their own, or a branch.

        In alphabetical order.
        """
        check_name("domain", domain)
        return self._listing.names([self._keys.editions(domain, tag) for tag in self._keys.tags()])

    def roots(self, domain: str, *, edition: str = MAIN) -> AsyncIterator[str]:
        """Iterate over the roots of a domain, each once, least recently appended to first.

        On a cluster that is the order within each slot. On another edition than main, those that
        have diverged there. A root that is there from beginning to end is never missed, also while
        others write. The names that were given out are remembered until the end, on a cluster
        those of one slot.
        """
        pages = self._listing.pages_of_roots(check_name("domain", domain), check_edition(edition))
        return flat(pages)

    async def _refusal(
        self, aggregate: Aggregate, expected: Expected, parts: list[Any], *, missed: bool
    ) -> AsyncStoreError:
        """Return what it means when append.lua has not stored the events."""
        tag, value, *page = parts
        if missed and tag == b"conflict" and expected is not ANY:
            before, new = await self._reader.missed(aggregate, expected, value, page)
            return SequenceConflict(aggregate, expected, value, new, before)
        return self._writer.refusal(aggregate, expected, parts)


def _place_of(book: EventBook) -> tuple[str, str, str]:
    return book.aggregate.domain, book.aggregate.edition, book.aggregate.root
