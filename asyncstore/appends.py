"""Appends of one turn of the event loop travel together: one script call for many aggregates.

Each has its own check, answer and failure; what is paid once is the call, the server's clock and a
number of commits. An append that finds the connection idle leaves at once, as a group of one.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import scripts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from asyncstore.keys import Keys
    from asyncstore.transport import Transport
    from asyncstore.values import Aggregate
    from asyncstore.wire import Argument, Reply

MOST_APPENDS: Final = 64
MOST_BYTES: Final = 128 * 1024
"""What one call may hold, so that none keeps the server from others for long.

Chosen from the middle of what was tried on a prototype (32-128 appends), not measured on its own.
"""


@dataclass(slots=True)  # making a frozen one takes twice as long
class Append:
    """One append, and the caller who waits for its reply."""

    key: str
    arguments: list[Argument]
    size: int
    reply: asyncio.Future[Reply]


@dataclass(slots=True)
class Appender:
    """Collects the appends of a turn and sends them in groups, by domain and edition."""

    _transport: Transport
    _keys: Keys
    _waiting: defaultdict[tuple[str, str], list[Append]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def send(
        self, aggregate: Aggregate, expected: str, events: list[bytes], size: int
    ) -> asyncio.Future[Reply]:
        """Send an append; the future gets the script's answer for it."""
        loop = self._transport.loop()
        reply = loop.create_future()
        arguments: list[Argument] = [aggregate.root, expected, len(events) // 2, *events]
        append = Append(self._keys.events(aggregate), arguments, size, reply)
        if not self._waiting:
            if self._transport.is_idle():
                self._send_group(aggregate.domain, aggregate.edition, [append])
                return reply
            loop.call_soon(self._flush)
        self._waiting[aggregate.domain, aggregate.edition].append(append)
        return reply

    def _flush(self) -> None:
        """Send what came in the last turn."""
        waiting, self._waiting = self._waiting, defaultdict(list)
        for (domain, edition), appends in waiting.items():
            for group in _groups(appends):
                self._send_group(domain, edition, group)
        self._transport.flush()

    def _send_group(self, domain: str, edition: str, group: list[Append]) -> None:
        keys = [
            self._keys.commits(),
            self._keys.roots(domain, edition),
            self._keys.editions(domain),
            self._keys.domains(),
            *(append.key for append in group),
        ]
        mark = ""  # the transport sets it when it sends the group again
        arguments: list[Argument] = [mark, domain, edition]
        for append in group:
            arguments += append.arguments
        callers = [append.reply for append in group]
        try:
            self._transport.run_for_group(scripts.APPEND, keys, arguments, callers)
        except Exception as error:
            # Whatever it is, it belongs to those who wait.
            for caller in callers:
                caller.set_exception(copy.copy(error))


def _groups(appends: list[Append]) -> Iterator[list[Append]]:
    """Cut appends into groups within the bounds; one that is beyond them goes alone."""
    group: list[Append] = []
    size = 0
    for append in appends:
        if append.reply.done():
            continue  # its caller was cancelled before it left
        if group and (len(group) == MOST_APPENDS or size + append.size > MOST_BYTES):
            yield group
            group, size = [], 0
        group.append(append)
        size += append.size
    if group:
        yield group
