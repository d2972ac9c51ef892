"""Finds what has changed, also when nobody was told of it: once for all subscriptions of a store.

Whatever gives handlers something to do writes a new number of a commit under its tag, and the time
with it. So these values are read, on a cluster those of all slots, and where one is another than
before, whoever subscribes has to look. That is all that is done while nothing happens.

A failover may take numbers back, and give them again. The time beside the number tells them apart;
and where a slot was silent for a while, or has another server, it is looked at whatever the number.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from asyncstore import forms
from asyncstore.errors import AsyncStoreError, StoreClosed
from asyncstore.observing import SERVER_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from asyncstore.doorbell import Doorbell, Ring
    from asyncstore.keys import Keys
    from asyncstore.nodes import Node
    from asyncstore.router import Router
    from asyncstore.wire import Argument

_log = logging.getLogger(__name__)

_SHARE: Final = 0.1  # of the time, at most, that sweeps take
_LONGEST_PAUSE: Final = 5.0  # seconds that sweeps wait for their share
_RETRY: Final = 0.1  # seconds after a failure


class Member(Protocol):
    """Whoever has to know. The call must return at once."""

    def moved(self, tags: Sequence[str]) -> None:
        """Take notice that there may be something to do under these tags."""


class Sweeper:
    """Reads the numbers of commits, as long as it has members."""

    def __init__(self, router: Router, keys: Keys, doorbell: Doorbell) -> None:
        self._router = router
        self._keys = keys
        self._doorbell = doorbell
        self._members: dict[Member, float] = {}
        self._commands: list[list[Argument]] = []  # by place, as all that follow: that of the tag
        self._known: list[bytes | None] = []  # None where nothing is there, or it is to be told
        self._homes: list[Node] = []  # where that was read
        self._under_way: set[Node] = set()
        self._again: set[Node] = set()  # of these, as what they were asked for may be old
        self._took = 0.0  # seconds, the last read
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self, member: Member, every: float) -> None:
        """Tell a member what there is, and every so many seconds what has changed.

        On a cluster at least ten times as long as a sweep takes.
        """
        self._members[member] = every
        if self._task is not None:
            member.moved(self.filled())
            self._begin_anew()
            return
        tags = self._keys.tags()
        self._commands = [["GET", self._keys.commits(tag)] for tag in tags]
        self._known = [None] * len(tags)
        self._homes = self._router.servers().homes()
        self._doorbell.enlist(self)
        self._task = asyncio.ensure_future(self._keep())

    async def leave(self, member: Member) -> None:
        """Tell a member nothing more."""
        self._members.pop(member, None)
        if not self._members and self._task is not None:
            await self._end()

    async def aclose(self) -> None:
        """End for good."""
        if self._task is not None:
            await self._end()

    async def _end(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
        await self._doorbell.leave(self)

    def filled(self) -> list[str]:
        """Return the tags under which something was found."""
        tags = self._keys.tags()
        return [tag for tag, value in zip(tags, self._known, strict=True) if value is not None]

    # What the doorbell calls

    def heard(self, ring: Ring) -> None:
        """Do nothing: whoever it is for hears it, too."""

    def missed(self, tags: Collection[str]) -> None:
        """Have these tags looked at, whether their numbers are others or not."""
        wanted = set(tags)
        for place, tag in enumerate(self._keys.tags()):
            if tag in wanted:
                self._known[place] = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Have all read that is there from now on."""
        self._again |= self._under_way
        self._wake.set()

    # The task

    async def _keep(self) -> None:
        async with asyncio.TaskGroup() as reads:
            while True:
                self._wake.clear()
                for node, places in self._by_home().items():
                    # A node that does not answer keeps the others from nothing.
                    if node not in self._under_way:
                        self._under_way.add(node)
                        reads.create_task(self._read(node, places))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._wake.wait()

    def _pause(self) -> float:
        """Return the seconds to the next sweep."""
        wanted = min(self._members.values(), default=_LONGEST_PAUSE)
        return max(wanted, min(self._took / _SHARE, _LONGEST_PAUSE))

    def _by_home(self) -> dict[Node, list[int]]:
        homes = self._router.servers().homes()
        if homes != self._homes:
            for place, (old, new) in enumerate(zip(self._homes, homes, strict=True)):
                if old is not new:
                    self._known[place] = None
            self._homes = homes
        found: dict[Node, list[int]] = {}
        for place, home in enumerate(homes):
            found.setdefault(home, []).append(place)
        return found

    async def _read(self, node: Node, places: list[int]) -> None:
        """Read what one node has, and tell what is new."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            values = await self._router.read_at(
                node, forms.is_text_or_nil, [self._commands[place] for place in places]
            )
        except StoreClosed:
            return
        except AsyncStoreError as error:
            _log.warning(
                "a sweep goes on without %s: %s",
                node.where,
                error,
                extra={SERVER_ADDRESS: node.where},
            )
            await asyncio.sleep(_RETRY)
        else:
            self._took = loop.time() - began
            self._compare(places, values)
        finally:
            self._under_way.discard(node)
            if node in self._again:
                self._again.discard(node)
                self._wake.set()

    def _compare(self, places: list[int], values: list[bytes | None]) -> None:
        tags, moved = self._keys.tags(), []
        for place, value in zip(places, values, strict=True):
            if value != self._known[place]:
                self._known[place] = value
                moved.append(tags[place])
        if moved:
            for member in list(self._members):
                member.moved(moved)
