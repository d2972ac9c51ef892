"""Appends travel in groups: one script call for many aggregates of one domain and edition.

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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import scripts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from asyncstore.keys import Keys
    from asyncstore.transport import Transport
    from asyncstore.values import Aggregate
    from asyncstore.wire import Argument, Reply

FIRST_APPENDS: Final = 4
MOST_APPENDS: Final = 16
HELD_APPENDS: Final = 100  # where a wait for replicas is what an append costs
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
    """Collects appends and sends them in groups, by domain and edition.

    `proofs` returns commands that go right behind each group, whose replies its callers get too. It
    is told how many seconds the group has waited already.
    """

    _transport: Transport
    _keys: Keys
    _proofs: Callable[[float], list[list[Argument]]] | None = None
    _open: dict[tuple[str, str], _Group] = field(default_factory=dict)

    def send(
        self,
        aggregate: Aggregate,
        keys: list[str],
        about: list[Argument],
        events: list[bytes],
        size: int,
    ) -> asyncio.Future[Reply]:
        """Send an append; the future gets the script's answer for it.

        `keys` and `about` are what append.lua wants of an aggregate before its events.
        """
        loop = self._transport.loop()
        reply = loop.create_future()
        append = Append(keys, [*about, *events], len(events) // 2, size, reply)
        self._take((aggregate.domain, aggregate.edition), append, loop)
        return reply

    def _take(
        self, place: tuple[str, str], append: Append, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Send an append when it is time."""
        if not self._open:
            if self._transport.is_idle():
                self._send_group(place, [append])
                return
            loop.call_soon(self._flush)
        self._add(place, append)

    def _add(self, place: tuple[str, str], append: Append) -> None:
        group = self._open.get(place) or self._first_group()
        if not group.has_room_for(append):
            group = self._send_at_once(place, group)
        group.add(append)
        if group.is_full():
            group = self._send_at_once(place, group)
        self._open[place] = group

    def _waited(self) -> float:
        return 0.0

    def _first_group(self) -> _Group:
        return _Group(FIRST_APPENDS)

    def _send_at_once(self, place: tuple[str, str], group: _Group) -> _Group:
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

    def _send_group(self, place: tuple[str, str], appends: list[Append]) -> None:
        domain, edition = place
        group = [append for append in appends if not append.reply.done()]  # not those cancelled
        if not group:
            return
        keys = [
            self._keys.commits(),
            self._keys.roots(domain, edition),
            self._keys.editions(domain),
            self._keys.domains(),
        ]
        mark = ""  # the transport sets it when it sends the group again
        arguments: list[Argument] = [mark, domain, edition, len(group)]
        for append in group:
            keys += append.keys
            arguments += append.arguments
        callers = [append.reply for append in group]
        try:
            proofs = self._proofs(self._waited()) if self._proofs else ()
            self._transport.run_for_group(scripts.APPEND, keys, arguments, callers, proofs)
        except Exception as error:
            # Whatever it is, it belongs to those who wait.
            for caller in callers:
                caller.set_exception(copy.copy(error))


@dataclass(slots=True)
class HeldAppender(Appender):
    """An appender for proofs that keep their connection waiting, such as WAIT.

    Groups are held back while others are under way, so that all that came meanwhile share one wait.
    """

    _full: list[tuple[tuple[str, str], list[Append]]] = field(default_factory=list)
    _under_way: int = 0
    _since: float = 0.0  # when the first of those that wait came

    def _take(
        self, place: tuple[str, str], append: Append, loop: asyncio.AbstractEventLoop
    ) -> None:
        if not self._open and not self._full:
            self._since = loop.time()
            if not self._under_way:
                loop.call_soon(self._flush)
        self._add(place, append)

    def _waited(self) -> float:
        return self._transport.loop().time() - self._since

    def _first_group(self) -> _Group:
        return _Group(HELD_APPENDS)

    def _send_at_once(self, place: tuple[str, str], group: _Group) -> _Group:
        self._full.append((place, group.appends))
        return self._first_group()

    def _flush(self) -> None:
        """Send what has come together."""
        full, self._full = self._full, []
        left, self._open = self._open, {}
        for place, appends in (*full, *((place, group.appends) for place, group in left.items())):
            live = [append for append in appends if not append.reply.done()]
            if live:
                self._under_way += 1
                live[-1].reply.add_done_callback(self._over)
                self._send_group(place, live)
        self._transport.flush()

    def _over(self, done: asyncio.Future[Reply]) -> None:
        self._under_way -= 1
        if not self._under_way and (self._open or self._full):
            # Also when the store was closed: then it is what tells those that were held.
            done.get_loop().call_soon(self._flush)
