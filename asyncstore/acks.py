"""Acks travel in groups: one script call for many aggregates of one worklist.

Those of one turn of the event loop leave together at its end: what handlers say that work at the
same time, and what one handler says of many aggregates. Each has its own answer, and its own error.
Where they come one after the other, as from one handler, they leave at once: nobody else comes.
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
    from asyncstore.scripts import Script
    from asyncstore.wire import Argument, Reply

_Ack = tuple["Sequence[str]", "Sequence[Argument]", "asyncio.Future[Reply]"]

MOST_ACKS: Final = 64  # in one call: less than a millisecond of the server


@dataclass(slots=True)
class Acks:
    """Collects the acks of one worklist, whose key of what is due is `due`."""

    _router: Router
    _due: str
    _waiting: list[_Ack] = field(default_factory=list)
    _last: asyncio.Future[Reply] | None = None  # that left; when it is answered, so are all before
    _was_lone: bool = False  # whether the last one left with no other, and with none under way

    def send(self, keys: Sequence[str], arguments: Sequence[Argument]) -> asyncio.Future[Reply]:
        """Send the ack of one aggregate; the future gets the script's answer for it."""
        loop = self._router.loop()
        reply = loop.create_future()
        is_first = not self._waiting
        self._waiting.append((keys, arguments, reply))
        if len(self._waiting) >= MOST_ACKS or (self._was_lone and not self._is_under_way()):
            self._flush()
        elif is_first:
            loop.call_soon(self._flush)
        return reply

    def _is_under_way(self) -> bool:
        return self._last is not None and not self._last.done()

    def _flush(self) -> None:
        """Send those whose callers were not cancelled."""
        acks, self._waiting = self._waiting, []
        live = [ack for ack in acks if not ack[2].done()]
        if not live:
            return
        self._was_lone = len(live) == 1 and not self._is_under_way()
        self._last = live[-1][2]
        callers = [reply for _, _, reply in live]
        try:
            self._router.send(*_call(self._due, live), callers)
        except Exception as error:
            for caller in callers:
                caller.set_exception(copy.copy(error))


def _call(due: str, acks: Sequence[_Ack]) -> tuple[Script, list[str], list[Argument]]:
    """Return the script, and its keys and arguments; one by itself has a lighter script."""
    if len(acks) == 1:
        keys, arguments, _ = acks[0]
        return scripts.ACK, [due, *keys], list(arguments)
    where = [due]
    about: list[Argument] = [len(acks[0][0])]
    for keys, arguments, _ in acks:
        where += keys
        about += arguments
    return scripts.ACKS, where, about
