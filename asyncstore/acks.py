"""Acks travel in groups: one script call for many aggregates of one worklist.

Those of one turn of the event loop leave together at its end: what handlers say that work at the
same time, and what one handler says of many aggregates. Each has its own answer, and its own error.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import scripts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from asyncstore.router import Router
    from asyncstore.wire import Argument, Reply

MOST_ACKS: Final = 64  # in one call: less than a millisecond of the server


@dataclass(slots=True)
class Acks:
    """Collects the acks of one worklist, whose key of what is due is `due`."""

    _router: Router
    _due: str
    _waiting: list[tuple[Sequence[str], Sequence[Argument], asyncio.Future[Reply]]] = field(
        default_factory=list
    )

    def send(self, keys: Sequence[str], arguments: Sequence[Argument]) -> asyncio.Future[Reply]:
        """Send the ack of one aggregate; the future gets the script's answer for it."""
        loop = self._router.loop()
        reply = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((keys, arguments, reply))
        if len(self._waiting) >= MOST_ACKS:
            self._flush()
        return reply

    def _flush(self) -> None:
        """Send those whose callers were not cancelled."""
        acks, self._waiting = self._waiting, []
        live = [ack for ack in acks if not ack[2].done()]
        if not live:
            return
        where = [self._due]
        about: list[Argument] = [len(live[0][0])]
        for keys, arguments, _ in live:
            where += keys
            about += arguments
        callers = [reply for _, _, reply in live]
        try:
            self._router.send_group(scripts.ACK, where, about, callers)
        except Exception as error:
            for caller in callers:
                caller.set_exception(copy.copy(error))
