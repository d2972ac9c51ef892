"""Live listening: events as they are appended, at most once."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

from asyncstore.errors import CorruptEvent, ListenerLagged, StoreClosed
from asyncstore.names import check_edition, check_name, check_root, check_whole_number
from asyncstore.reading import Range
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate, check_types

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from types import TracebackType

    from asyncstore.doorbell import Doorbell, Ring
    from asyncstore.reading import Reader
    from asyncstore.recorded import RecordedEvent

DEFAULT_BUFFER: Final = 10_000  # events
_READS_AT_ONCE: Final = 32
_EVENTS_A_READ: Final = 500


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events are wanted; None is all. Checked when it is made."""

    domain: str | None
    root: str | None
    edition: str | None
    types: frozenset[str] | None

    @classmethod
    def of(
        cls,
        domain: str | None,
        root: str | UUID | None,
        edition: str | None,
        types: Iterable[str] | None,
    ) -> Wanted:
        """Return what a caller has said as one value."""
        return cls(
            None if domain is None else check_name("domain", domain),
            None if root is None else check_root(str(root) if isinstance(root, UUID) else root),
            None if edition is None else check_edition(edition),
            check_types(types),
        )

    def takes(self, ring: Ring) -> bool:
        """Whether some of what was appended can be among them."""
        return (
            self.domain in (None, ring.domain)
            and self.edition in (None, ring.edition)
            # A thousand may listen for a root each: taking the lines apart is for few of them.
            and (self.root is None or self.root in ring.lines)
        )

    def takes_root(self, root: str) -> bool:
        """Whether events of this root are among them."""
        return self.root in (None, root)

    def takes_type(self, name: str) -> bool:
        """Whether events of this type are among them."""
        return self.types is None or name in self.types


@dataclass(slots=True)
class _Lag:
    """Stands among the ranges where some are missing."""

    missed: int | None


class _Inbox:
    """Where the events are that were heard of and not taken yet, as far as there is room."""

    def __init__(self, wanted: Wanted, room: int) -> None:
        self.changed = asyncio.Event()
        self.waiting: deque[Range | _Lag] = deque()
        self._wanted = wanted
        self._room = room

    def take_lag(self) -> _Lag | None:
        """Take what stands first, if that is a lag."""
        first = self.waiting[0]
        if not isinstance(first, _Lag):
            return None
        self.waiting.popleft()
        return first

    def first_ranges(self, most: int) -> list[Range]:
        """Return what is to be read next: as much as comes before a lag."""
        ranges: list[Range] = []
        for waiting in self.waiting:
            if isinstance(waiting, _Lag) or len(ranges) == most:
                break
            ranges.append(waiting)
        return ranges

    def take(self, ranges: Iterable[Range]) -> None:
        """Make room, as the first ones were read."""
        for wanted in ranges:
            self.waiting.popleft()
            self._room += _size(wanted)

    # What the doorbell calls

    def heard(self, ring: Ring) -> None:
        """Note where new events are, or how many there is no room for."""
        if not self._wanted.takes(ring):
            return
        for change in ring.changes():
            if not self._wanted.takes_root(change.root):
                continue
            aggregate = Aggregate(ring.domain, change.root, ring.edition)
            for start in range(change.first, change.end, _EVENTS_A_READ):
                self._add(Range(aggregate, start, min(start + _EVENTS_A_READ, change.end)))
        self.changed.set()

    def missed(self, tags: Collection[str]) -> None:
        """Note that nobody knows what was appended for a while."""
        self._lag().missed = None
        self.changed.set()

    def _add(self, wanted: Range) -> None:
        if _size(wanted) <= self._room:
            self.waiting.append(wanted)
            self._room -= _size(wanted)
            return
        lag = self._lag()
        if lag.missed is not None:
            lag.missed += _size(wanted)

    def _lag(self) -> _Lag:
        last = self.waiting[-1] if self.waiting else None
        if isinstance(last, _Lag):
            return last
        lag = _Lag(0)
        self.waiting.append(lag)
        return lag


class Listener:
    """Hears the events of a store while it is entered; made by `Store.listen`.

    What waits to be taken is where events are, not the events: those are read when it is their
    turn, some at a time.
    """

    def __init__(self, doorbell: Doorbell, reader: Reader, wanted: Wanted, buffer: int) -> None:
        self._doorbell = doorbell
        self._reader = reader
        self._wanted = wanted
        self._buffer = check_whole_number("buffer", buffer)
        self._inbox = _Inbox(wanted, buffer)
        self._ready: deque[RecordedEvent | CorruptEvent] = deque()
        self._reading = asyncio.Lock()
        self._is_entered = False
        self._is_over = False

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise StoreClosed("a listener is entered once: call store.listen() again")
        self._is_entered = True
        await self._doorbell.join(self._inbox)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._inbox.changed.set()
        await self._doorbell.leave(self._inbox)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecordedEvent:
        """Return the next event, or wait for it. Raises `ListenerLagged`, and can be called again.

        That is an error and not an item, so that nobody can take a history with holes for a whole.
        """
        if not self._is_entered:
            raise StoreClosed("use the listener inside `async with store.listen() as live:`")
        while not self._ready:
            async with self._reading:
                await self._take_more()
        event = self._ready.popleft()
        if isinstance(event, CorruptEvent):
            raise event
        return event

    async def _take_more(self) -> None:
        """Read what comes next, if nobody else did meanwhile."""
        inbox = self._inbox
        while not self._ready and not inbox.waiting:
            if self._is_over:
                raise StopAsyncIteration
            inbox.changed.clear()
            await inbox.changed.wait()
        if self._ready:
            return
        if (lag := inbox.take_lag()) is not None:
            raise ListenerLagged(lag.missed, self._buffer)
        ranges = inbox.first_ranges(_READS_AT_ONCE)
        found = await all_of(self._read(wanted) for wanted in ranges)
        inbox.take(ranges)  # only now: whoever is cancelled while it reads has lost nothing
        self._ready.extend(event for events in found for event in events)

    async def _read(self, wanted: Range) -> list[RecordedEvent | CorruptEvent]:
        """Return the events that are still there."""
        try:
            events = await self._reader.read(wanted)
        except CorruptEvent as error:
            return [error]
        return [event for event in events if self._wanted.takes_type(event.type)]


def _size(wanted: Range) -> int:
    return (wanted.stop or 0) - wanted.start
