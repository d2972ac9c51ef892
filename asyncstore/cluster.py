"""Which node of a cluster has a slot, also while slots move and nodes come and go.

The map comes from CLUSTER SLOTS, which tells the addresses that clients are to use, and on TLS the
ports for it. A node that answers MOVED mends the map for that one slot at once, and has the rest
looked up; so does a node that can't be reached, is silent, or says that it can't serve. However
many callers notice, one of them looks, and the others wait for the next map, if for anything.

A request that a node could not take was not carried out, so it may go again, to the node that has
the slot now. It stops when its time is over. One that was sent to a node which is none any more may
have been carried out: a read goes again; an append goes again with the mark that tells its script
so. That is safe even if the old node still runs it later: it is no node for this slot any more,
and what it writes is thrown away when it joins the new one.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from urllib.parse import urlsplit, urlunsplit

from asyncstore import forms, slots
from asyncstore.answers import NOT_NOW, Answers
from asyncstore.errors import (
    AsyncStoreError,
    ConfigurationError,
    OutcomeUnknown,
    StoreUnavailable,
    UnexpectedReply,
)
from asyncstore.nodes import Lane, Node
from asyncstore.replicas import Replicas
from asyncstore.settings import mask
from asyncstore.sharing import Shared
from asyncstore.transport import Transport
from asyncstore.wire import ELSEWHERE, Repeat, Shipment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncstore.nodes import Ways
    from asyncstore.wire import ReplyError, Request

# Errors after which another node may serve, or the same one in a moment.
_ELSEWHERE_OR_LATER: Final = frozenset(
    {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "READONLY", "LOADING", "MASTERDOWN"}
)
_AT_ONCE: Final = 3  # detours without a pause; more of them go round in circles
_FIRST_PAUSE: Final = 0.002  # seconds; a slot's keys move in a few milliseconds
_LONGEST_PAUSE: Final = 0.1
_ASKED_AT_ONCE: Final = 3  # nodes that are asked for the map: one of them may be cut off
_LOOK_PAUSE: Final = 0.1  # seconds between two looks
_OTHER_SEEDS: Final = 0.5  # seconds that the other seeds have to answer, when one has


class Address(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Span:
    """Slots that one primary has, with its replicas."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What a node says of its cluster."""

    spans: tuple[Span, ...]
    is_ok: bool
    epoch: int

    def gaps(self) -> list[tuple[int, int]]:
        """Return the ranges of slots that nobody has."""
        found, following = [], 0
        for span in sorted(self.spans, key=lambda span: span.first):
            if span.first > following:
                found.append((following, span.first - 1))
            following = span.last + 1
        if following < slots.COUNT:
            found.append((following, slots.COUNT - 1))
        return found


class Cluster:
    """The nodes of a cluster, by slot. `seeds` are URLs of some of them."""

    by_slot = True

    def __init__(self, seeds: Sequence[str], ways: Ways) -> None:
        self._seeds = seeds
        self._ways = ways
        self._timeout = ways.bounds.timeout
        self.where = ",".join(mask(seed) for seed in seeds)
        self._nodes: dict[Address, Node] = {}
        self._owners: list[Node | None] = [None] * slots.COUNT
        self._looking = Shared(self._look)
        self._looks: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers = Answers(self.where)
        self._epoch = 0
        self._spares: list[Address] = []  # replicas, which can tell of the cluster, too
        self._replicas: dict[Node, Replicas[Address]] = {}
        self.lookups = 0

    # Opening and closing

    async def open(self) -> None:
        """Find the nodes, and connect to them.

        Raises `ConfigurationError` for what is no cluster, or two of them, and `StoreUnavailable`
        when no seed answers, some slots have no node, or the nodes can't be reached.
        """
        self._loop = asyncio.get_running_loop()
        seeds = [Transport(seed, mask(seed), self._ways.bounds) for seed in self._seeds]
        try:
            alive = await self._dial(seeds)
            await _see_that_they_are_one(alive)
            await self._wait_for_all_slots(alive)
        finally:
            for seed in seeds:
                await seed.aclose()
        await self._connect()

    async def _dial(self, seeds: list[Transport]) -> list[Transport]:
        """Return the seeds that can be reached: the first, and who else answers right after."""
        dials = [asyncio.ensure_future(seed.open()) for seed in seeds]
        try:
            while not any(map(_succeeded, dials)) and not all(dial.done() for dial in dials):
                pending = [dial for dial in dials if not dial.done()]
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(dials, timeout=_OTHER_SEEDS)
            if not any(map(_succeeded, dials)):
                await dials[0]  # raises why
        finally:
            for dial in dials:
                dial.cancel()
            await asyncio.wait(dials)
        return [seed for seed, dial in zip(seeds, dials, strict=True) if _succeeded(dial)]

    async def _wait_for_all_slots(self, seeds: list[Transport]) -> None:
        deadline = self._now() + self._timeout
        while True:
            view = await _best_view(seeds)
            if view is not None and not view.gaps():
                self._take(view)
                return
            if self._now() >= deadline:
                break
            await asyncio.sleep(_LOOK_PAUSE)
        if view is None:
            raise StoreUnavailable(self.where, "no seed tells of its cluster")
        gaps = ", ".join(f"{first}-{last}" for first, last in view.gaps())
        why = f"no node has the slots {gaps}; nothing was changed. See CLUSTER NODES there"
        raise StoreUnavailable(self.where, why)

    async def _connect(self) -> None:
        """Make the connections that all calls share; some nodes may be down."""
        nodes = list(self._nodes.values())
        asks = [node.transport.command(forms.is_text, "PING") for node in nodes]
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(errors) == len(nodes):
            addresses = ", ".join(str(address) for address in self._nodes)
            why = (
                f"its nodes announce addresses that can't be used from here: {addresses} "
                f"({errors[0]}). See cluster-announce-ip, or its hostname, in their settings"
            )
            raise StoreUnavailable(self.where, why)

    async def aclose(self) -> None:
        """Close all connections; calls in flight fail."""
        self._loop = None
        await self._looking.aclose()
        if self._looks is not None:
            self._looks.cancel()
            await asyncio.wait([self._looks])
        for replicas in self._replicas.values():
            await replicas.aclose()
        for node in self._nodes.values():
            await node.aclose()

    # Nodes

    def nodes(self) -> list[Node]:
        """Return the primaries."""
        return list(self._nodes.values())

    def node_of(self, slot: int | None) -> Node:
        """Return the node that has a slot; any, which will tell, if that is not known."""
        return self._owners[cast(int, slot)] or next(iter(self._nodes.values()))

    def reader_of(self, slot: int | None) -> Transport:
        """Return the connection to read a slot from."""
        node = self.node_of(slot)
        replicas = self._replicas.get(node)
        return (replicas.pick() if replicas is not None else None) or node.transport

    def _take(self, view: View) -> None:
        """Use what was found, and give up the nodes that are none any more.

        A view from before a failover that is known of is not used: a node that was cut off has it.
        """
        if view.epoch < self._epoch:
            return
        self._epoch = view.epoch
        owners: list[Node | None] = [None] * slots.COUNT
        for span in view.spans:
            node = self._node_at(span.primary)
            owners[span.first : span.last + 1] = [node] * (span.last + 1 - span.first)
        self._owners = owners
        replicas = {span.primary: span.replicas for span in view.spans}
        self._spares = [address for some in replicas.values() for address in some]
        if self._ways.max_replica_lag is not None:
            for primary, addresses in replicas.items():
                self._replicas_of(self._nodes[primary]).update(addresses)
        primaries = {span.primary for span in view.spans}
        gone = [self._nodes.pop(address) for address in set(self._nodes) - primaries]
        for node in gone:
            if node in self._replicas:
                self._replicas.pop(node).update(())
            node.leave()

    def _node_at(self, address: Address) -> Node:
        if address not in self._nodes:
            url = _at(self._seeds[0], address)
            way = partial(_Way, self, address=address, give_up=self.look_again)
            node = Node(url, mask(url), self._ways, lambda lane: way(lane=lane))
            node.transport.start()
            self._nodes[address] = node
        return self._nodes[address]

    def _replicas_of(self, node: Node) -> Replicas[Address]:
        if node not in self._replicas:
            lag = cast(int, self._ways.max_replica_lag)
            self._replicas[node] = Replicas(node.transport, partial(self._reader_at, node), lag)
        return self._replicas[node]

    def _reader_at(self, node: Node, address: Address) -> Transport:
        """Return a connection to a replica; when it is in trouble, it is given up."""
        url = _at(self._seeds[0], address)

        def give_up() -> None:
            if node in self._replicas:
                self._replicas[node].leave(address)

        way = _Way(self, Lane.READING, address, give_up)
        return Transport(url, mask(url), self._ways.bounds, detour=way, read_only=True)

    # Detours

    def refused(self, request: Request, error: ReplyError, lane: Lane, source: Address) -> bool:
        """Send a request on that a node could not take; False if another node can't either."""
        code = error.code
        if code not in _ELSEWHERE_OR_LATER or request.slot is None:
            return False
        node = self._node_named_by(error, source) if code in ("MOVED", "ASK") else None
        request.send_elsewhere(asking=code == "ASK")
        if code == "MOVED" and node is not None:
            self._owners[request.slot] = node
        if code not in ("ASK", "TRYAGAIN"):
            self.look_again()
        if node is not None and request.detours <= _AT_ONCE:
            node.send(request, lane)
        else:
            why = NOT_NOW.get(code, "its nodes do not agree on who has the slot")
            self._send_later(request, lane, why, node if code == "ASK" else None)
        return True

    def left(self, request: Request, lane: Lane) -> None:
        """Send a request on that was on its way to a node which is none any more."""
        if isinstance(request, Shipment) and len(request.groups) > 1:
            for shipment in request.split():
                shipment.sent = request.sent
                self.left(shipment, lane)
            return
        gone = "the node that was asked is gone"
        can_go_on = request.slot is not None and self._loop is not None
        if not can_go_on or (request.sent and request.repeat is Repeat.NEVER):
            request.fail(self._answers.missing(request, gone))
            return
        if request.may_have_changed_something:
            why = f"{request.name}: its answer was lost, and it was refused when sent again"
            request.send_again(ELSEWHERE, OutcomeUnknown(self.where, why))
        request.send_elsewhere(asking=False)
        self._send_later(request, lane, gone, None)

    def look_again(self) -> None:
        """Have the map looked up soon, unless that is under way."""
        if self._looks is None and self._loop is not None:
            self._looks = self._loop.create_task(self._look_soon())

    def _node_named_by(self, error: ReplyError, source: Address) -> Node | None:
        """Return the node that MOVED or ASK names: `MOVED 3999 10.0.0.1:6381`."""
        words = str(error).split(" ")
        host, _, port = words[-1].rpartition(":")
        if len(words) < 3 or not port.isdigit():
            return None
        return self._node_at(Address(host.strip("[]") or source.host, int(port)))

    def _send_later(self, request: Request, lane: Lane, why: str, node: Node | None) -> None:
        """Send a request again after a pause, to the node that has its slot then."""
        loop = self._loop
        if loop is None or request.slot is None or request.born + self._timeout <= loop.time():
            request.fail(self._answers.missing(request, why))
            return
        pause = min(_FIRST_PAUSE * 2 ** min(request.detours - 1, 10), _LONGEST_PAUSE)
        slot = request.slot

        def send() -> None:
            if self._loop is None:
                request.fail(self._answers.missing(request, "the store was closed"))
            elif not request.is_over():
                (node or self.node_of(slot)).send(request, lane)

        loop.call_later(pause * random.uniform(0.5, 1.0), send)  # noqa: S311

    # Looking

    async def _look_soon(self) -> None:
        try:
            with suppress(AsyncStoreError):
                await self._looking.result()
            await asyncio.sleep(_LOOK_PAUSE * random.uniform(0.5, 1.0))  # noqa: S311
        finally:
            self._looks = None

    async def _look(self) -> None:
        """Ask some nodes for the map, and take the best answer."""
        self.lookups += 1
        nodes = list(self._nodes.values())
        asked = random.sample(nodes, min(_ASKED_AT_ONCE, len(nodes)))
        spare = [
            Transport(_at(self._seeds[0], address), str(address), self._ways.bounds)
            for address in random.sample(self._spares, min(1, len(self._spares)))
        ]
        for transport in spare:
            transport.start()
        try:
            view = await _best_view([*(node.transport for node in asked), *spare])
        finally:
            for transport in spare:
                await transport.aclose()
        if view is not None:
            self._take(view)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class _Way:
    """The detour of one connection of a node."""

    cluster: Cluster
    lane: Lane
    address: Address
    give_up: Callable[[], None]

    def refused(self, request: Request, error: ReplyError) -> bool:
        return self.cluster.refused(request, error, self.lane, self.address)

    def left(self, request: Request) -> None:
        self.cluster.left(request, self.lane)

    def in_trouble(self) -> None:
        self.give_up()


# What nodes say


async def _best_view(asked: Sequence[Transport]) -> View | None:
    """Return the newest view of some nodes: of the first that answers, and who else is quick."""
    tasks = [asyncio.ensure_future(_view_of(transport)) for transport in asked]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        _, slow = await asyncio.wait(tasks, timeout=_LOOK_PAUSE)
        if len(slow) < len(tasks) and not any(_found(task) for task in tasks):
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    views = [view for task in tasks if (view := _found(task)) is not None]
    return max(views, key=lambda view: (view.epoch, view.is_ok, -len(view.gaps())), default=None)


def _succeeded(dial: asyncio.Future[None]) -> bool:
    return dial.done() and not dial.cancelled() and dial.exception() is None


def _found(task: asyncio.Task[View]) -> View | None:
    if not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()


async def _view_of(transport: Transport) -> View:
    spans, info = await asyncio.gather(
        transport.command(forms.is_slots, "CLUSTER", "SLOTS"),
        transport.command(forms.is_anything, "CLUSTER", "INFO"),
        return_exceptions=True,
    )
    if isinstance(spans, BaseException):
        raise spans
    lines = info.decode(errors="replace").splitlines() if isinstance(info, bytes) else []
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    epoch = said.get("cluster_current_epoch", "")
    return View(
        tuple(_span(entry, transport.host) for entry in spans),
        said.get("cluster_state") == "ok",
        int(epoch) if epoch.isdigit() else 0,
    )


def _span(entry: Any, asked: str) -> Span:
    first, last, *nodes = entry
    addresses = [Address((host or b"").decode() or asked, port) for host, port, *_ in nodes]
    return Span(first, last, addresses[0], tuple(addresses[1:]))


async def _see_that_they_are_one(seeds: Sequence[Transport]) -> None:
    """Raise `ConfigurationError` if a seed is of no cluster, or of another one than the first."""
    outcomes = await asyncio.gather(*map(_ids_at, seeds), return_exceptions=True)
    known: set[str] = set()
    for seed, ids in zip(seeds, outcomes, strict=True):
        if isinstance(ids, UnexpectedReply):
            continue  # an ACL hides it
        if isinstance(ids, BaseException):
            raise ids
        if known and known.isdisjoint(ids):
            why = f"{seed.where} is of another cluster than {seeds[0].where}"
            raise ConfigurationError("urls", why, "the settings")
        known |= ids


async def _ids_at(seed: Transport) -> set[str]:
    info: bytes = await seed.command(forms.is_text, "INFO", "cluster")
    if b"cluster_enabled:0" in info:
        why = f"{seed.where} is no node of a cluster: give one server by `url`"
        raise ConfigurationError("urls", why, "the settings")
    nodes: bytes = await seed.command(forms.is_text, "CLUSTER", "NODES")
    return {line.split(" ", 1)[0] for line in nodes.decode(errors="replace").splitlines()}


def _at(url: str, address: Address) -> str:
    """Return the URL of another node, with the login and the options of one that is known."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, f"{login}{at}{address}", "", parts.query, ""))
