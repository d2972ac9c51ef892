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
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

import anyio

from asyncstore import forms, slots
from asyncstore.answers import ELSEWHERE_OR_LATER, NOT_NOW, Answers
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
from asyncstore.sharing import Shared, quickest
from asyncstore.transport import Transport
from asyncstore.wire import ELSEWHERE, Repeat, Shipment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncstore.nodes import Ways
    from asyncstore.wire import ReplyError, Request

T = TypeVar("T")

_AT_ONCE: Final = 3  # detours without a pause; more of them go round in circles
_FIRST_PAUSE: Final = 0.002  # seconds; a slot's keys move in a few milliseconds
_LONGEST_PAUSE: Final = 0.1
_LAST_SENDING: Final = 0.9  # of a call's time; the answer to a later one could come too late
_ASKED_AT_ONCE: Final = 3  # nodes that are asked for the map: one of them may be cut off
_LOOK_SHARE: Final = 0.2  # of a call's time, for nodes that are asked for the map
_LOOK_PAUSE: Final = 0.1  # seconds between two looks; doubled while there is cause to look on
_LONGEST_LOOK_PAUSE: Final = 0.5
_OTHER_VIEWS: Final = 0.1  # seconds that the others have to answer, when one has
OTHER_NODES: Final = 0.5  # the same, when a store is opened


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
    """The nodes of a cluster, by slot.

    `seeds` are URLs of some of them. `on_newcomer` is told of each primary that it finds.
    """

    by_slot = True

    def __init__(
        self,
        seeds: Sequence[str],
        ways: Ways,
        on_newcomer: Callable[[Node], None] = lambda _: None,
    ) -> None:
        self._seeds = seeds
        self._on_newcomer = on_newcomer
        self._ways = ways
        self._timeout = ways.bounds.timeout
        self.where = ",".join(mask(seed) for seed in seeds)
        self._nodes: dict[Address, Node] = {}
        self._owners: list[Node | None] = [None] * slots.COUNT
        self._looking = Shared(self._look)
        self._looks: asyncio.Task[None] | None = None
        self._was_noticed = False  # that the map may be wrong, since the last look
        self._limbo: dict[Request, asyncio.TimerHandle] = {}  # what will be sent again in a moment
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers = Answers(self.where)
        self._epoch = 0
        self._older_since: float | None = None  # when nodes began to tell of an older epoch only
        self._primaries: set[Address] = set()
        self._spares: list[Address] = []  # replicas, which can tell of the cluster, too
        self._replicas: dict[Node, Replicas[Address]] = {}
        self.lookups = 0

    # Opening and closing

    async def open(self, *, partly: bool = False) -> None:
        """Find the nodes, and connect to them.

        Raises `ConfigurationError` for what is no cluster, or two of them, and `StoreUnavailable`
        when no seed answers, some slots have no node, or the nodes can't be reached. `partly` takes
        a cluster also when only some slots have a node: to look at it.
        """
        for url in self._seeds:
            _check_database(url)
        self._loop = asyncio.get_running_loop()
        seeds = [Transport(seed, mask(seed), self._ways.bounds) for seed in self._seeds]
        try:
            alive = await self._dial(seeds)
            await _see_that_they_are_one(alive)
            await self._wait_for_slots(alive, partly=partly)
        finally:
            for seed in seeds:
                await seed.aclose()
        await self._connect()

    async def _dial(self, seeds: list[Transport]) -> list[Transport]:
        """Return the seeds that can be reached: the first, and who else answers right after."""
        dials = (seed.open() for seed in seeds)
        outcomes = await quickest(dials, self._timeout, OTHER_NODES)
        alive = [seed for seed, outcome in zip(seeds, outcomes, strict=True) if outcome is None]
        if not alive:
            raise self._why_none(outcomes)
        return alive

    def _why_none(self, outcomes: Sequence[BaseException | None]) -> BaseException:
        """Return why no seed can be used: what one of them said, or that none is there."""
        errors = [outcome for outcome in outcomes if outcome is not None]
        for error in errors:
            if len(errors) == 1 or not isinstance(error, StoreUnavailable | TimeoutError):
                return error
        reasons = [
            f"{mask(seed)}: {getattr(error, 'why', 'it did not answer in time')}"
            for seed, error in zip(self._seeds, errors, strict=True)
        ]
        return StoreUnavailable("no seed can be reached", "; ".join(reasons))

    async def _wait_for_slots(self, seeds: list[Transport], *, partly: bool) -> None:
        deadline = self._now() + self._timeout
        while True:
            view = await _best_view(seeds, self._timeout)
            if view is not None and (not view.gaps() or (partly and view.spans)):
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
        asks = (node.transport.command(forms.is_text, "PING") for node in nodes)
        outcomes = await quickest(asks, self._timeout, OTHER_NODES)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(errors) == len(nodes):
            addresses = ", ".join(str(address) for address in self._nodes)
            reason = getattr(errors[0], "why", "no answer in time; nothing was changed")
            why = (
                f"its nodes announce addresses that can't be used from here: {addresses} "
                f"({reason}). See cluster-announce-ip, or its hostname, in their settings"
            )
            raise StoreUnavailable(self.where, why)

    async def aclose(self) -> None:
        """Close all connections; calls in flight fail."""
        self._loop = None
        for request, timer in self._limbo.items():
            timer.cancel()
            request.fail(self._answers.closed(request))
        self._limbo.clear()
        with anyio.CancelScope(shield=True):
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

    def homes(self) -> list[Node]:
        """Return the node of each slot."""
        any_node = next(iter(self._nodes.values()))
        return [owner or any_node for owner in self._owners]

    def slots_of(self, node: Node) -> list[int]:
        """Return the slots that a node has."""
        return [slot for slot, owner in enumerate(self._owners) if owner is node]

    async def refresh(self) -> None:
        """Look the map up now; where nobody answers, the old one stays."""
        with suppress(AsyncStoreError):
            await self._looking.result()

    def _take(self, view: View) -> None:
        """Use what was found, and give up the nodes that are none any more."""
        if not view.spans or self._is_of_the_past(view):
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
        former, self._primaries = self._primaries, set(replicas)
        for address in set(self._nodes) - self._primaries:
            # A node that slots are just coming to has none yet: it is not given up in the middle.
            if address in former or not self._nodes[address].is_at_work():
                self._give_up(self._nodes.pop(address))

    def _give_up(self, node: Node) -> None:
        if node in self._replicas:
            self._replicas.pop(node).update(())
        node.leave()

    def _is_of_the_past(self, view: View) -> bool:
        """Whether a view is from before what is known: a node that was cut off has such a one.

        When nobody tells a newer one for as long as a call may take, it is another cluster that
        took the place of the one that was known.
        """
        if view.epoch >= self._epoch:
            self._older_since = None
            return False
        if self._older_since is None:
            self._older_since = self._now()
        return self._now() < self._older_since + self._timeout

    def _node_at(self, address: Address) -> Node:
        if address not in self._nodes:
            url = _at(self._seeds[0], address)
            way = partial(_Way, self, address=address, give_up=self.look_again)
            node = Node(url, mask(url), self._ways, lambda lane: way(lane=lane))
            node.transport.start()
            self._nodes[address] = node
            self._on_newcomer(node)
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
        bounds, tally = self._ways.bounds, self._ways.tally
        return Transport(url, mask(url), bounds, detour=way, read_only=True, tally=tally)

    # Detours

    def refused(self, request: Request, error: ReplyError, lane: Lane, source: Address) -> bool:
        """Send a request on that a node could not take; False if another node can't either."""
        code = error.code
        if code not in ELSEWHERE_OR_LATER or request.slot is None:
            return False
        self._ways.tally.redirects[code] += 1
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
        if request.slot is None or (request.sent and request.repeat is Repeat.NEVER):
            request.fail(self._answers.missing(request, gone))
            return
        if request.sent:
            self._ways.tally.resends[request.name] += 1
        if request.may_have_changed_something:
            why = f"{request.name}: its answer was lost, and it was refused when sent again"
            request.send_again(ELSEWHERE, OutcomeUnknown(self.where, why))
        request.send_elsewhere(asking=False)
        self._send_later(request, lane, gone, None)

    def look_again(self) -> None:
        """Have the map looked up soon."""
        self._was_noticed = True
        if self._looks is None and self._loop is not None:
            self._looks = self._loop.create_task(self._look_soon())

    def _node_named_by(self, error: ReplyError, source: Address) -> Node | None:
        """Return the node that MOVED or ASK names: `MOVED 3999 10.0.0.1:6381`."""
        words = str(error).split(" ")
        host, _, port = words[-1].rpartition(":")
        is_address = len(words) == 3 and port.isdecimal() and 0 < int(port) < 65536
        if not is_address or self._loop is None:
            return None
        return self._node_at(Address(host.strip("[]") or source.host, int(port)))

    def _send_later(self, request: Request, lane: Lane, why: str, node: Node | None) -> None:
        """Send a request again after a pause, to the node that has its slot then."""
        loop, slot = self._loop, request.slot
        if loop is None:
            request.fail(self._answers.closed(request))
            return
        pause = min(_FIRST_PAUSE * 2 ** min(request.detours - 1, 10), _LONGEST_PAUSE)
        if loop.time() + pause >= request.born + _LAST_SENDING * self._timeout:
            request.fail(self._answers.missing(request, why))
            return

        def send() -> None:
            del self._limbo[request]
            if not request.is_over():
                (node or self.node_of(slot)).send(request, lane)

        self._limbo[request] = loop.call_later(pause * random.uniform(0.5, 1.0), send)  # noqa: S311

    # Looking

    async def _look_soon(self) -> None:
        """Look, and again after a pause as long as somebody notices that the map may be wrong."""
        pause = _LOOK_PAUSE
        try:
            while self._was_noticed:
                self._was_noticed = False
                with suppress(AsyncStoreError):
                    await self._looking.result()
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(2 * pause, _LONGEST_LOOK_PAUSE)
        finally:
            self._looks = None

    async def _look(self) -> None:
        """Ask some nodes for the map, or the seeds if none answers, and take the best answer."""
        self.lookups += 1
        nodes = _some(list(self._nodes.values()), _ASKED_AT_ONCE)
        spare = [_at(self._seeds[0], address) for address in _some(self._spares, 1)]
        view = await self._best_view([node.transport for node in nodes], spare)
        if view is None:
            view = await self._best_view([], _some(self._seeds, _ASKED_AT_ONCE))
        if view is not None:
            self._take(view)

    async def _best_view(self, known: list[Transport], spare: Sequence[str]) -> View | None:
        """Return the newest view of nodes that are connected, and of some that are dialled."""
        dialled = [Transport(url, mask(url), self._ways.bounds) for url in spare]
        for transport in dialled:
            transport.start()
        try:
            return await _best_view([*known, *dialled], _LOOK_SHARE * self._timeout)
        finally:
            for transport in dialled:
                await transport.aclose()

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


async def _best_view(asked: Sequence[Transport], seconds: float) -> View | None:
    """Return the newest view of some nodes: of the first that answers, and who else is quick."""
    found = await quickest(map(_view_of, asked), seconds, _OTHER_VIEWS)
    views = [view for view in found if isinstance(view, View)]
    return max(views, key=lambda view: (view.epoch, view.is_ok, -len(view.gaps())), default=None)


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
        if isinstance(ids, UnexpectedReply | StoreUnavailable):
            continue  # an ACL hides it, or it has just gone down
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


def _some(found: Sequence[T], most: int) -> list[T]:
    return random.sample(found, min(most, len(found)))


def _at(url: str, address: Address) -> str:
    """Return the URL of another node, with the login and the options of one that is known."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    scheme = "redis" if parts.scheme == "unix" else parts.scheme
    # A node that has to announce a host name, and has none, announces `?`.
    place = quote(str(address), safe=":[]")
    return urlunsplit((scheme, f"{login}{at}{place}", "", parts.query, ""))


def _check_database(url: str) -> None:
    """Raise `ConfigurationError` for a URL that names another database than a cluster has."""
    parts = urlsplit(url)
    named = parse_qs(parts.query).get("db", ["" if parts.scheme == "unix" else parts.path[1:]])[0]
    if named.strip("0"):
        why = f"{mask(url)} names database {named}, and a cluster has only 0: leave it out"
        raise ConfigurationError("url", why, "the settings")
