"""The way of a request to the server that has its keys: the one there is, or one of a cluster."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, cast

from asyncstore.answers import Answers
from asyncstore.errors import StoreUnavailable
from asyncstore.observing import Tally
from asyncstore.sharing import all_of, running_loop
from asyncstore.slots import slot_of, slot_of_tag
from asyncstore.wire import Repeat, ReplyError, Request, Survey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.appends import Appender
    from asyncstore.forms import Form
    from asyncstore.nodes import Node
    from asyncstore.observing import Observer
    from asyncstore.scripts import Script
    from asyncstore.transport import Transport
    from asyncstore.values import Durability
    from asyncstore.wire import Argument, Reply

_QUESTIONS: Final = 256  # at once: a tenth of a millisecond of the server
_GONE: Final = ReplyError("MOVED")  # what a node says that is none any more


class Servers(Protocol):
    """One server, or a cluster."""

    @property
    def by_slot(self) -> bool:
        """Whether each of them has some slots, and not all there is."""

    def node_of(self, slot: int | None, /) -> Node:
        """Return the server that has a slot."""

    def reader_of(self, slot: int | None, /) -> Transport:
        """Return the connection to read a slot from."""

    def nodes(self) -> list[Node]:
        """Return the servers that take changes."""

    def homes(self) -> list[Node]:
        """Return the server of each tag, in the order of `Keys.tags()`."""

    def look_again(self) -> None:
        """Find out soon who has what, as somebody was told that it has changed."""

    def slots_of(self, node: Node, /) -> Sequence[int | None]:
        """Return the slots that a server has; None is one that stands for all there is."""

    async def refresh(self) -> None:
        """Find out anew who has which slots."""

    async def aclose(self) -> None:
        """Close all connections; calls in flight fail."""


class OneServer:
    """A server that has everything."""

    by_slot = False

    def __init__(self, node: Node) -> None:
        self._node = node

    def node_of(self, _: int | None) -> Node:
        """Return the server."""
        return self._node

    def reader_of(self, _: int | None) -> Transport:
        """Return the server's connection."""
        return self._node.transport

    def nodes(self) -> list[Node]:
        """Return the server."""
        return [self._node]

    def homes(self) -> list[Node]:
        """Return the server, which has the only tag."""
        return [self._node]

    def look_again(self) -> None:
        """Do nothing: it has everything."""

    def slots_of(self, _: Node) -> list[None]:
        """Return that it has all there is."""
        return [None]

    async def refresh(self) -> None:
        """Do nothing: it has them."""

    async def aclose(self) -> None:
        """Close its connections; calls in flight fail."""
        await self._node.aclose()


class Router:
    """Sends requests where they belong, while the store is open.

    `answers` says what is made of answers. `observer` sees the calls of the store, if there is one;
    `tally` has what was counted of it.
    """

    def __init__(self, where: str, timeout: float) -> None:
        self.answers = Answers(where)
        self.observer: Observer | None = None
        self.tally = Tally()
        self._timeout = timeout
        self._servers: Servers | None = None
        self._by_slot = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def opened(self, servers: Servers) -> None:
        """Take requests for these servers, from this event loop."""
        self._servers = servers
        self._by_slot = servers.by_slot
        self._loop = asyncio.get_running_loop()

    async def aclose(self) -> None:
        """Take no more requests; those in flight fail."""
        self._loop = None
        if self._servers is not None:
            await self._servers.aclose()

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop of the store, or raise StoreClosed if this is not it."""
        return running_loop(self._loop)

    def deadline(self) -> float:
        """Return when a call that begins now has to be over, by the clock of the event loop."""
        return self.loop().time() + self._timeout

    def servers(self) -> Servers:
        """Return the servers, or raise StoreClosed."""
        self.loop()
        return cast(Servers, self._servers)

    def nodes(self) -> list[Node]:
        """Return the servers that take changes."""
        return self.servers().nodes()

    def in_flight(self) -> int:
        """Return how many requests wait for an answer, or to be sent; 0 if the store is closed."""
        servers = self._servers  # once: other threads ask, too, also while the store closes
        if self._loop is None or servers is None:
            return 0
        return sum(node.in_flight() for node in servers.nodes())

    def system(self) -> str | None:
        """Return what the servers are, "redis" or "valkey"; None before the store is open."""
        servers = self._servers
        return None if servers is None else servers.nodes()[0].transport.system

    def home_of(self, root: str) -> tuple[Node, int | None]:
        """Return the server that has an aggregate, and on a cluster the slot."""
        slot = slot_of_tag(root) if self._by_slot else None
        return self.servers().node_of(slot), slot

    async def appender(self, root: str, wanted: Durability, born: float) -> Appender:
        """Return what sends appends of a level for an aggregate, once the server can give it.

        Raises `DurabilityUnavailable`, or `StoreUnavailable` when the time is over of a caller who
        began to wait at `born`.
        """
        deadline = born + self._timeout
        while True:
            node, _ = self.home_of(root)
            try:
                return await node.made_ready(wanted, deadline)
            except StoreUnavailable:
                # It may have left the cluster while it was asked.
                if self.loop().time() >= deadline or self.home_of(root)[0] is node:
                    raise

    async def run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Reply:
        """Run a script where its keys are, which on a cluster are all in one slot."""
        loop = self.loop()
        caller = loop.create_future()
        slot = slot_of(keys[0]) if self._by_slot else None
        request = script.request(keys, arguments, [caller], loop.time(), slot=slot)
        servers = self.servers()
        home = servers.node_of(slot).transport if script.writes else servers.reader_of(slot)
        home.send(request)
        return self.answers.believed(await caller, script.name, script.form)

    def send(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        callers: Sequence[asyncio.Future[Reply]],
        *,
        at_once: bool = True,
    ) -> None:
        """Run a script; the caller gets the reply as it came, each of many its part.

        At once, or with what else this turn of the event loop has to send.
        """
        slot = slot_of(keys[0]) if self._by_slot else None
        home = self.servers().node_of(slot).transport
        born, is_group = callers[0].get_loop().time(), len(callers) > 1
        request = script.request(keys, arguments, callers, born, is_group=is_group, slot=slot)
        home.send(request)
        if at_once:
            home.flush()

    async def read(self, form: Form, name: str, key: str | bytes, *arguments: Argument) -> Reply:
        """Send a command that changes nothing to the server that has its key."""
        return await self._command(form, [name, key, *arguments], key, is_read=True)

    async def those_there(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that are there, in one request to each server.

        What a server could not tell is among them: whoever reads it goes where it is now.
        """
        servers = self.servers()
        keys_at: dict[Transport, list[str]] = {}
        for key in keys:
            home = servers.reader_of(slot_of(key) if self._by_slot else None)
            keys_at.setdefault(home, []).append(key)
        missing = await all_of(self._missing_at(home, some) for home, some in keys_at.items())
        absent = set().union(*missing)
        return [key for key in keys if key not in absent]

    async def _missing_at(self, home: Transport, keys: Sequence[str]) -> list[str]:
        """Return the keys of which a server says that they are not there."""
        try:
            replies = await self._survey(home, [["EXISTS", key] for key in keys])
        except StoreUnavailable:
            return []
        return [key for key, reply in zip(keys, replies, strict=True) if reply == 0]

    async def change(self, form: Form, name: str, key: str | bytes, *arguments: Argument) -> Reply:
        """Send a command that may be carried out twice without harm."""
        return await self._command(form, [name, key, *arguments], key, is_read=False)

    async def read_each(self, form: Form, commands: Sequence[list[Argument]]) -> list[Reply]:
        """Send commands that change nothing, each to the primary that has its key.

        For what there is once in each slot: many travel together, which costs a tenth of what
        single ones do. Returns the replies in the order of the commands.
        """
        places: dict[Node, list[int]] = {}
        servers = self.servers()
        for place, command in enumerate(commands):
            slot = slot_of(cast(str, command[1])) if self._by_slot else None
            places.setdefault(servers.node_of(slot), []).append(place)
        found = await all_of(
            self.read_at(node, form, [commands[place] for place in some])
            for node, some in places.items()
        )
        replies: list[Reply] = [None] * len(commands)
        for some, answers in zip(places.values(), found, strict=True):
            for place, answer in zip(some, answers, strict=True):
                replies[place] = answer
        return replies

    async def read_at(
        self, node: Node, form: Form, commands: Sequence[list[Argument]]
    ) -> list[Reply]:
        """Do the same with commands whose keys are all at one server, or were until now."""
        replies: list[Reply] = []
        for first in range(0, len(commands), _QUESTIONS):
            # One survey after the other: calls of others come in between.
            some = commands[first : first + _QUESTIONS]
            found = await self._survey_of_node(node, some)
            odd = [n for n, reply in enumerate(found) if _is_refused(reply) or not form(reply)]
            # Their slots may be elsewhere by now: each finds its own way.
            again = await all_of(
                self._command(form, some[n], cast(str, some[n][1]), is_read=False) for n in odd
            )
            for n, reply in zip(odd, again, strict=True):
                found[n] = reply
            replies += found
        return replies

    async def _survey_of_node(self, node: Node, commands: Sequence[list[Argument]]) -> list[Reply]:
        try:
            return await self._survey(node.transport, commands)
        except StoreUnavailable:
            if node in self.nodes():
                raise
            return [_GONE] * len(commands)

    async def _survey(self, home: Transport, commands: Sequence[list[Argument]]) -> list[Reply]:
        loop = self.loop()
        caller = loop.create_future()
        home.send(Survey(commands, caller, loop.time()))
        replies: list[Reply] = await caller
        return replies

    async def _command(
        self, form: Form, command: list[Argument], key: str | bytes, *, is_read: bool
    ) -> Reply:
        loop = self.loop()
        caller = loop.create_future()
        name = str(command[0])
        slot = slot_of(key) if self._by_slot else None
        request = Request(command, name, Repeat.FREELY, [caller], loop.time(), slot=slot)
        servers = self.servers()
        home = servers.reader_of(slot) if is_read else servers.node_of(slot).transport
        home.send(request)
        return self.answers.believed(await caller, name, form)


def _is_refused(reply: Reply) -> bool:
    return type(reply) is ReplyError
