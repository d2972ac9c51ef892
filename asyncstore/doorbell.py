"""Hears that something was appended: one connection for each server, for all who listen in a store.

On a cluster there is a channel for each slot, where the slot is. When a slot moves or its server
fails, its channel goes silent there, and is asked for at the next one. What is heard may be
incomplete, as nobody is told again what was said meanwhile. So every member is told for which tags
that may have happened, and must look for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import anyio

from asyncstore.answers import ELSEWHERE_OR_LATER
from asyncstore.errors import AsyncStoreError, StoreClosed, StoreUnavailable
from asyncstore.observing import SERVER_ADDRESS
from asyncstore.pubsub import Ear

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from asyncstore.keys import Keys
    from asyncstore.nodes import Node
    from asyncstore.router import Router
    from asyncstore.wire import ReplyError

_log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 0.01  # seconds between two tries; doubled each time
_LONGEST_PAUSE: Final = 1.0
_HEARTBEAT: Final = 5.0  # seconds between two pings, at most


class Change(NamedTuple):
    """An append: to which root, from which sequence on, how many events (`length`).

    `members` are these as they are stored, if they came along.
    """

    root: str
    first: int
    length: int
    members: Sequence[bytes] = ()

    @property
    def end(self) -> int:
        """The sequence after the last one."""
        return self.first + self.length


class Ring(NamedTuple):
    """Appends to a domain and edition that were stored together, with the events if they are small.

    What is in `lines` and `events` is decoded only for those whom the ring is for.
    """

    domain: str
    edition: str
    lines: str
    events: bytes = b""

    @classmethod
    def of(cls, message: bytes) -> Ring:
        """Return what ring.lua has said; ValueError for anything else."""
        head, _, events = message.partition(b"\n\n")
        domain, edition, lines = head.decode().split("\n", 2)
        return cls(domain, edition, lines, events)

    def changes(self) -> list[Change]:
        """Return the appends; ValueError if it is not what ring.lua says."""
        members = iter(self._members())
        found = []
        for line in self.lines.split("\n"):
            first, count, root = line.split(" ", 2)
            some = tuple(islice(members, int(count)))
            found.append(Change(root, int(first), int(count), some))
        return found

    def _members(self) -> list[bytes]:
        lengths, _, members = self.events.partition(b"\n")
        found, end = [], 0
        for length in lengths.split():
            start, end = end, end + int(length)
            found.append(members[start:end])
        return found


class Member(Protocol):
    """Whoever listens. Both calls must return at once."""

    def heard(self, ring: Ring) -> None:
        """Take notice of appends."""

    def missed(self, tags: Collection[str]) -> None:
        """Take notice that the channels of these tags are heard, and were not for a while."""


class Doorbell:
    """The connections, as long as there are members: dialled again whenever they break.

    Nothing is open before the first member joins, or after the last has left.
    """

    def __init__(self, router: Router, keys: Keys, timeout: float) -> None:
        self._router = router
        self._keys = keys
        self._timeout = timeout
        self._members: list[Member] = []
        self._joining: list[Member] = []  # who have to hear all before they count
        self._lines: dict[Node, _Line] = {}
        self._line_of: dict[str, _Line] = {}  # by tag; where it is to be heard
        self._silent: set[str] = set()  # tags that are not heard now
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._news = asyncio.Event()  # replaced when it has happened
        self._trouble: AsyncStoreError | None = None
        self._is_closed = False

    async def join(self, member: Member) -> None:
        """Let a member hear all that is appended from now on.

        Raises `StoreUnavailable` if not all can be heard in time, and what else a connection may
        raise; then it has not joined.
        """
        if self._is_closed:
            raise StoreClosed("the store was closed")
        self._router.loop()  # or it is not open
        self._joining.append(member)
        self.enlist(member)
        try:
            async with asyncio.timeout(self._timeout):
                while self._silent:
                    await self._news.wait()
                    if self._trouble is not None and not _may_pass(self._trouble):
                        raise self._trouble
        except BaseException as error:
            await self.leave(member)
            if isinstance(error, TimeoutError):
                raise self._out_of_time() from None
            raise
        finally:
            self._joining.remove(member)

    def enlist(self, member: Member) -> None:
        """Let a member hear what can be heard, without waiting for it: it is told when it can."""
        self._members.append(member)
        if self._keeper is None and not self._is_closed:
            self._silent, self._trouble = set(self._keys.tags()), None
            self._keeper = asyncio.ensure_future(self._keep())

    async def leave(self, member: Member) -> None:
        """Let a member hear nothing more."""
        if member in self._members:
            self._members.remove(member)
        if not self._members:
            await self._hang_up()

    async def aclose(self) -> None:
        """Hang up for good."""
        self._is_closed = True
        await self._hang_up()

    async def _hang_up(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.cancel()
        lines, self._lines, self._line_of = self._lines, {}, {}
        with anyio.CancelScope(shield=True):
            await asyncio.wait([keeper])
            for line in lines.values():
                await line.aclose()

    def _out_of_time(self) -> AsyncStoreError:
        if self._trouble is not None:
            return self._trouble
        why = f"{len(self._silent)} channels are silent after {self._timeout:g} s"
        return StoreUnavailable("the doorbell", why)

    # Which line hears which tag: the keeper's task

    async def _keep(self) -> None:
        """Have each tag heard where it is, with pauses that grow as long as some are not."""
        pause = 0.0
        while True:
            self._changed.clear()
            if await self._arrange():
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
                continue
            if not self._silent:
                pause = 0.0
            # Servers tell what moves; the map is compared all the same.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT):
                    await self._changed.wait()

    async def _arrange(self) -> bool:
        """Ask for the tags that are not asked for where they are; return whether there were any."""
        wanted: dict[Node, list[str]] = {}
        homes = self._router.servers().homes()
        for tag, home in zip(self._keys.tags(), homes, strict=True):
            line = self._line_of.get(tag)
            if line is None or line.node is not home:
                wanted.setdefault(home, []).append(tag)
        for home, tags in wanted.items():
            self._move(tags, home)
        used = set(homes)
        for node in [node for node in self._lines if node not in used]:
            await self._lines.pop(node).aclose()
        return bool(wanted)

    def _move(self, tags: list[str], home: Node) -> None:
        for tag in tags:
            line = self._line_of.pop(tag, None)
            if line is not None:
                line.drop(tag)
        if home not in self._lines:
            self._lines[home] = _Line(self, home, self._keys, self._timeout)
        self._line_of.update(dict.fromkeys(tags, self._lines[home]))
        self._silent.update(tags)
        self._lines[home].want(tags)

    # What lines call

    def is_heard(self, tags: Collection[str]) -> None:
        """Take notice of tags that are heard from now on."""
        self._silent.difference_update(tags)
        self._trouble = None
        self._tell()
        for member in list(self._members):
            if member not in self._joining:
                member.missed(tags)

    def is_silent(self, tags: Iterable[str], *, gone: bool) -> None:
        """Take notice of tags that are not heard; `gone` says that they are elsewhere by now."""
        for tag in tags:
            self._silent.add(tag)
            if gone:
                self._line_of.pop(tag, None)
        self._look_again()

    def is_away(self, error: AsyncStoreError) -> None:
        """Take notice that a line has no connection."""
        self._trouble = error
        self._look_again()
        self._tell()

    def heard(self, message: bytes) -> None:
        """Pass on what was said."""
        try:
            ring = Ring.of(message)
            for member in list(self._members):
                member.heard(ring)
        except ValueError:  # InvalidName is one
            name = self._keys.live("…")
            _log.warning("something else than asyncstore publishes on %s", name)

    def refusal(self, error: ReplyError) -> AsyncStoreError:
        """Return what it means that a channel was refused."""
        return self._router.answers.refused("ssubscribe", error.code)

    def _look_again(self) -> None:
        with contextlib.suppress(StoreClosed):
            self._router.servers().look_again()
        self._changed.set()

    def _tell(self) -> None:
        """Wake those who join."""
        self._news.set()
        self._news = asyncio.Event()


class _Line:
    """The connection to one server, with the channels that are to be heard there."""

    def __init__(self, bell: Doorbell, node: Node, keys: Keys, timeout: float) -> None:
        self.node = node
        self._bell = bell
        self._timeout = timeout
        self._channel_of = keys.live
        self._wanted: dict[str, str] = {}  # tag by channel
        self._gained: set[str] = set()  # tags, since it was told last
        self._heard: set[str] = set()
        self._ear: Ear | None = None
        self._refusal: AsyncStoreError | None = None
        self._is_away = False
        self._keeper = asyncio.ensure_future(self._keep())

    def want(self, tags: Iterable[str]) -> None:
        """Have tags heard here."""
        channels = {self._channel_of(tag): tag for tag in tags}
        self._wanted.update(channels)
        if self._ear is not None:
            self._ear.listen(channels)

    def drop(self, tag: str) -> None:
        """Have a tag heard here no more; what is still said of it does no harm."""
        self._wanted.pop(self._channel_of(tag), None)
        self._heard.discard(tag)
        self._gained.discard(tag)

    async def aclose(self) -> None:
        """Close the connection."""
        self._keeper.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._keeper])

    async def _keep(self) -> None:
        """Keep a connection, with pauses between dials that grow until one has worked."""
        pause = 0.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            ear = Ear(self)
            try:
                async with contextlib.AsyncExitStack() as stack:
                    await self._dial(ear, stack)
                    ear.listen(self._wanted)
                    self._ear = ear
                    await self._stay(ear)
            except AsyncStoreError as error:
                pause = 0.0 if self._heard else pause
                self._lose(error)
            finally:
                self._ear = None

    async def _dial(self, ear: Ear, stack: contextlib.AsyncExitStack) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                ear.take(await self.node.transport.dial())
                stack.push_async_callback(_end, ear)
        except TimeoutError:
            raise StoreUnavailable(self.node.where, "it did not answer in time") from None

    async def _stay(self, ear: Ear) -> None:
        """Stay until the connection is gone, or has been silent through a whole heartbeat."""
        loop = asyncio.get_running_loop()
        heartbeat = min(_HEARTBEAT, self._timeout)
        while True:
            pinged = loop.time()
            ear.ping()
            await asyncio.wait([ear.closed], timeout=heartbeat)
            if ear.closed.done():
                refusal, self._refusal = self._refusal, None
                raise refusal or StoreUnavailable(self.node.where, ear.closed.result())
            if ear.last_heard < pinged:
                raise StoreUnavailable(self.node.where, "it has gone silent")

    def _lose(self, error: AsyncStoreError) -> None:
        if not self._is_away:
            _log.warning(
                "appends are not heard for now: %s", error, extra={SERVER_ADDRESS: self.node.where}
            )
        self._is_away = True
        silent = self._heard | self._gained
        self._heard, self._gained = set(), set()
        self._bell.is_silent(silent, gone=False)
        self._bell.is_away(error)

    # What the ear calls

    def heard(self, message: bytes) -> None:
        """Pass on what was said."""
        self._bell.heard(message)

    def gained(self, channel: str) -> None:
        """Note that a channel is heard."""
        if channel in self._wanted:
            self._gained.add(self._wanted[channel])

    def lost(self, channel: str) -> None:
        """Note that a channel has moved away."""
        tag = self._wanted.get(channel)
        if tag is not None:
            self.drop(tag)
            self._bell.is_silent([tag], gone=True)

    def refused(self, channel: str, error: ReplyError) -> None:
        """Note that a channel is elsewhere, or that the server does not let us hear it."""
        if error.code in ELSEWHERE_OR_LATER:
            self.lost(channel)
        elif self._ear is not None:
            self._refusal = self._bell.refusal(error)
            self._ear.abort("it refused a channel")

    def drained(self) -> None:
        """Tell what is heard now, once nothing is open any more."""
        if not self._gained or (self._ear is not None and self._ear.is_waiting()):
            return
        if self._is_away:
            _log.info(
                "appends are heard again at %s",
                self.node.where,
                extra={SERVER_ADDRESS: self.node.where},
            )
        self._is_away = False
        gained, self._gained = self._gained, set()
        self._heard |= gained
        self._bell.is_heard(gained)


def _may_pass(error: AsyncStoreError) -> bool:
    return isinstance(error, StoreUnavailable)


async def _end(ear: Ear) -> None:
    ear.abort("it is not needed any more")
    with anyio.CancelScope(shield=True):
        await asyncio.wait([ear.closed])
