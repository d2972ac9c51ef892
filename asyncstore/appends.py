"""Appends travel in groups: one script call for many aggregates of one domain, edition and slot.

Each append has its own check, answer and failure; what is paid once a call is the call itself, the
server's clock and the numbers of the commits. A group leaves

- when it is full: the server works on it while the next one is made. The first of a turn is small,
  so that the server begins early, and the next ones grow;
- at the end of the turn of the event loop in which it was begun;
- at once, if it finds the connection idle: waiting for company would cost a lone append 5 µs of
  about 100, and gain nothing.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import scripts
from asyncstore.wire import Shipment

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from asyncstore.keys import Keys
    from asyncstore.transport import Transport
    from asyncstore.values import Aggregate
    from asyncstore.wire import Argument, Reply, Request

_Place = tuple[str, str, int | None]
"""Domain, edition, and on a cluster the slot: what is one for all appends of a group."""

FIRST_APPENDS: Final = 4
MOST_APPENDS: Final = 16
HELD_APPENDS: Final = 100  # where a wait for replicas is what an append costs
MOST_GROUPS: Final = 16  # as on a cluster, where nearly each append is a group of its own
MOST_EVENTS: Final = 200
MOST_BYTES: Final = 64 * 1024
"""What one call may hold: less than a millisecond of the server's time.

Larger groups save the server nothing and keep it from others for longer, smaller ones cost it more:
see the bounds that `make bench` compares, and ARCHITECTURE.md. An append that is larger goes alone.
"""


@dataclass(slots=True)  # making a frozen one takes twice as long
class Append:
    """One append, and the caller who waits for its reply."""

    keys: list[str]
    arguments: list[Argument]
    events: int
    size: int
    reply: asyncio.Future[Reply]
    born: float  # when the caller began to wait, by the clock of the event loop


@dataclass(slots=True)
class _Group:
    """Appends that will travel together."""

    most: int
    appends: list[Append] = field(default_factory=list)
    events: int = 0
    size: int = 0

    def has_room_for(self, append: Append) -> bool:
        """Whether the append can go along; one that is beyond the bounds goes alone."""
        events, size = self.events + append.events, self.size + append.size
        return not self.appends or (events <= MOST_EVENTS and size <= MOST_BYTES)

    def add(self, append: Append) -> None:
        """Take the append along."""
        self.appends.append(append)
        self.events += append.events
        self.size += append.size

    def is_full(self) -> bool:
        """Whether the group has nothing to wait for."""
        is_large = self.events >= MOST_EVENTS or self.size >= MOST_BYTES
        return is_large or len(self.appends) >= self.most


@dataclass(slots=True)
class Appender:
    """Collects appends and sends them in groups, by domain, edition and slot.

    `prove` returns commands that go right behind each group, whose replies its callers get too: see
    `Shipment`. Then a caller gets its part of the reply and a list of theirs.
    """

    _transport: Transport
    _keys: Keys
    _prove: Callable[[float], list[list[Argument]]] | None = None
    _open: dict[_Place, _Group] = field(default_factory=dict)

    def send(
        self,
        aggregate: Aggregate,
        keys: list[str],
        about: list[Argument],
        events: list[bytes],
        size: int,
        slot: int | None = None,
        born: float | None = None,
    ) -> asyncio.Future[Reply]:
        """Send an append; the future gets the script's answer for it.

        `keys` and `about` are what append.lua wants of an aggregate before its events. `slot` is
        that of the root on a cluster, `born` when the caller began to wait, if it was not now.
        """
        loop = self._transport.loop()
        reply = loop.create_future()
        began = loop.time() if born is None else born
        append = Append(keys, [*about, *events], len(events) // 2, size, reply, began)
        self._take((aggregate.domain, aggregate.edition, slot), append, loop)
        return reply

    def _take(self, place: _Place, append: Append, loop: asyncio.AbstractEventLoop) -> None:
        """Send an append when it is time."""
        if not self._open:
            if self._transport.is_idle():
                self._send_group(place, [append])
                return
            loop.call_soon(self._flush)
        self._add(place, append)
        if len(self._open) >= MOST_GROUPS:
            self._flush()

    def _add(self, place: _Place, append: Append) -> None:
        group = self._open.get(place) or self._first_group()
        if not group.has_room_for(append):
            group = self._send_at_once(place, group)
        group.add(append)
        if group.is_full():
            group = self._send_at_once(place, group)
        self._open[place] = group

    def _first_group(self) -> _Group:
        return _Group(FIRST_APPENDS)

    def _send_at_once(self, place: _Place, group: _Group) -> _Group:
        """Send a group before the turn has ended, and return the next one."""
        self._send_group(place, group.appends)
        self._transport.flush()
        return _Group(min(2 * group.most, MOST_APPENDS))

    def _flush(self) -> None:
        """Send what the last turn has left."""
        groups, self._open = self._open, {}
        for place, group in groups.items():
            self._send_group(place, group.appends)
        self._transport.flush()

    def _send_group(self, place: _Place, appends: list[Append]) -> None:
        live = _waiting(appends)
        if not live:
            return
        try:
            request = self._request(place, live)
            if self._prove is not None:
                request = Shipment([request], self._prove)
            self._transport.send(request)
        except Exception as error:
            _refuse(live, error)

    def _request(self, place: _Place, appends: list[Append]) -> Request:
        domain, edition, slot = place
        tag = self._keys.tag_of_slot(slot)
        keys = [
            self._keys.commits(tag),
            self._keys.roots(domain, edition, tag),
            self._keys.editions(domain, tag),
            self._keys.domains(tag),
        ]
        mark = ""  # the transport sets it when it sends the group again
        arguments: list[Argument] = [mark, domain, edition, len(appends), self._keys.live(tag)]
        for append in appends:
            keys += append.keys
            arguments += append.arguments
        callers = [append.reply for append in appends]
        born = min(append.born for append in appends)
        return scripts.APPEND.request(keys, arguments, callers, born, is_group=True, slot=slot)


@dataclass(slots=True)
class Turns:
    """Lets one shipment at a time onto a connection that its proofs keep waiting.

    Whoever has appends to send asks for a turn, whatever level they want. Those that come while
    another shipment is under way leave together, and share one wait.
    """

    _asked: deque[Callable[[], asyncio.Future[None] | None]] = field(default_factory=deque)
    _is_taken: bool = False

    def ask(
        self,
        depart: Callable[[], asyncio.Future[None] | None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Have `depart` called when it is its turn; it returns what ends with its shipment."""
        self._asked.append(depart)
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._next)

    def _next(self, _: object = None) -> None:
        while self._asked:
            over = self._asked.popleft()()
            if over is not None:
                over.add_done_callback(self._next)
                return
        self._is_taken = False


@dataclass(slots=True)
class HeldAppender(Appender):
    """An appender for proofs that keep their connection waiting, such as WAIT.

    Its groups wait for their turn, and leave as one shipment with one wait.
    """

    turns: Turns = field(default_factory=Turns)
    _full: list[tuple[_Place, _Group]] = field(default_factory=list)

    def _take(self, place: _Place, append: Append, loop: asyncio.AbstractEventLoop) -> None:
        if not self._open and not self._full:
            self.turns.ask(self._depart, loop)
        self._add(place, append)

    def _first_group(self) -> _Group:
        return _Group(HELD_APPENDS)

    def _send_at_once(self, place: _Place, group: _Group) -> _Group:
        self._full.append((place, group))
        return self._first_group()

    def _depart(self) -> asyncio.Future[None] | None:
        """Send what has come together."""
        groups = [*self._full, *self._open.items()]
        self._full, self._open = [], {}
        live = [(place, waiting) for place, group in groups if (waiting := _waiting(group.appends))]
        if not live:
            return None
        try:
            requests = [self._request(place, appends) for place, appends in live]
            # A script that is not there would have its proofs wait in vain.
            requests[0].name_source()
            shipment = Shipment(requests, self._prove or _nothing)
            self._transport.send(shipment)
            self._transport.flush()
        except Exception as error:
            # Also when the store was closed: this is what tells those that were held.
            for _, appends in live:
                _refuse(appends, error)
            return None
        return shipment.over


def _waiting(appends: list[Append]) -> list[Append]:
    """Return the appends whose callers were not cancelled."""
    return [append for append in appends if not append.reply.done()]


def _refuse(appends: list[Append], error: Exception) -> None:
    """Raise an error in those who wait: whatever it is, it belongs to them."""
    for append in appends:
        append.reply.set_exception(copy.copy(error))


def _nothing(_: float) -> list[list[Argument]]:
    return []
