"""Whether a cluster is fit for events: each primary by itself, and what only the whole shows.

All primaries are looked at together (`checks`). What all of them say alike is one line; where they
differ, the line names them. A node that does not answer is a line of its own, and the others are
judged without it.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from asyncstore import forms, slots
from asyncstore.checks import (
    Finding,
    Level,
    Lines,
    Report,
    Said,
    Verdict,
    ask_cluster,
    ask_config,
    judge_layout,
    look_at,
    trouble,
)
from asyncstore.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from asyncstore.forms import Peer
    from asyncstore.keys import Keys
    from asyncstore.nodes import Node
    from asyncstore.router import Router
    from asyncstore.settings import Settings

_WORST_FIRST: Final[tuple[Level, ...]] = ("bad", "warning", "good")
_COVERAGE: Final = "cluster-require-full-coverage"
_TIMEOUT: Final = "cluster-node-timeout"
_MAJORITY_OF_TWO: Final = 3  # primaries that there must be for one to be replaced
_FAILOVER: Final = 1.5  # of the node timeout, measured from 0.5 to 5 seconds
_FAILOVER_MORE: Final = 0.5  # seconds
_SHOWN: Final = 5  # of a long list


async def check(router: Router, keys: Keys, settings: Settings) -> Report:
    """Look at all primaries, and at what they say of their cluster."""
    nodes = router.nodes()
    looks = [_look_at_node(node, router, keys, settings) for node in nodes]
    layout = Lines()
    seen, _ = await asyncio.gather(asyncio.gather(*looks), _put_layout(layout, router, keys))
    views = tuple(view for view, _ in seen if view is not None)
    lines = Lines()
    whole = _Whole(views, settings.timeout)
    for name, judge in _JUDGES.items():
        lines.add(name, judge, whole)
    silent = [line for view, found in seen if view is None for line in found]
    of_nodes = [(view.where, found) for view, found in seen if view is not None]
    findings = [*silent, *lines.all(), *layout.all(), *_merged(of_nodes)]
    name = f"a cluster of {len(nodes)} primaries at {settings.where()}"
    return Report(name, tuple(findings))


async def _put_layout(lines: Lines, router: Router, keys: Keys) -> None:
    try:
        await lines.add_answer("layout", judge_layout(router, keys))
    except StoreUnavailable as error:
        lines.add_trouble(str(error), ["layout"])


@dataclass(frozen=True, slots=True)
class _View:
    """What a primary says: of itself (INFO), and of the cluster."""

    where: str
    info: Said
    state: Said
    nodes: Said
    config: Said

    @property
    def peers(self) -> list[Peer]:
        return forms.peers_of(self.nodes["nodes"])

    @property
    def has_slots(self) -> bool:
        return any(peer.is_asked and peer.slots for peer in self.peers)

    @property
    def owners(self) -> frozenset[tuple[str, tuple[str, ...]]]:
        """Who has which slots."""
        return frozenset((peer.id, peer.slots) for peer in self.peers if peer.slots)

    @property
    def moving(self) -> set[int]:
        """The slots that the node gives away or takes over: `[7->-id]`, `[7-<-id]`."""
        parts = (part for peer in self.peers if peer.is_asked for part in peer.moving)
        return {int(part[1:].partition("-")[0]) for part in parts}

    @property
    def replicas(self) -> int:
        """How many replicas follow it now."""
        return sum(replica.is_online for replica in forms.replicas_of(self.info.fields))


@dataclass(frozen=True, slots=True)
class _Whole:
    """What the primaries that answer say. `timeout` is how long callers of the store wait."""

    views: tuple[_View, ...]
    timeout: float

    @property
    def peers(self) -> list[Peer]:
        """All nodes that one of them knows, as often as they are known."""
        return [peer for view in self.views for peer in view.peers]


async def _look_at_node(
    node: Node, router: Router, keys: Keys, settings: Settings
) -> tuple[_View | None, list[Finding]]:
    """Return what a primary says, None if it does not answer, and what there is to say of it."""
    where, lines = _address(node), Lines()
    count = len(router.servers().slots_of(node))
    try:
        (state, nodes), config, info = await asyncio.gather(
            ask_cluster(node.transport),
            ask_config(node.transport, _COVERAGE, _TIMEOUT),
            look_at(node, router, keys, settings, lines),
        )
    except StoreUnavailable as error:
        meaning = f"nothing in its {count:,} slots can be stored or read"
        return None, [trouble(f"{where}: {error.why}", meaning)]
    return _View(where, info, state, nodes, config), lines.all()


def _address(node: Node) -> str:
    """Return host and port, without a login."""
    return urlsplit(node.url).netloc.rpartition("@")[2]


# What nodes say alike


def _merged(of_nodes: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """Return one line for what all say alike, and lines that name nodes for the rest."""
    names = {finding.name: None for _, found in of_nodes for finding in found}
    merged: list[Finding] = []
    for name in names:
        said = [(where, line) for where, found in of_nodes for line in found if line.name == name]
        merged += _merged_line(said, len(of_nodes))
    return merged


def _merged_line(said: list[tuple[str, Finding]], nodes: int) -> list[Finding]:
    groups: defaultdict[tuple[Level, str, str], defaultdict[str, list[str]]]
    groups = defaultdict(lambda: defaultdict(list))
    for where, line in said:
        groups[line.level, line.meaning, line.remedy][line.found].append(where)
    name = said[0][1].name
    lines = []
    for (level, meaning, remedy), found in groups.items():
        is_said_by_all = len(found) == 1 and len(next(iter(found.values()))) == nodes
        text = next(iter(found)) if is_said_by_all else _by_node(found)
        lines.append(Finding(name, level, text, meaning, remedy))
    return sorted(lines, key=lambda line: _WORST_FIRST.index(line.level))


def _by_node(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(nodes)}: {text}" for text, nodes in found.items())


# Lines about the whole


def _state(whole: _Whole) -> Verdict:
    nodes = {peer.id: peer.is_primary for peer in whole.peers}
    primaries = sum(nodes.values())
    found = f"{primaries} primaries, {len(nodes) - primaries} replicas"
    bad = [view.where for view in whole.views if view.state["cluster_state"] != "ok"]
    if not bad:
        return Verdict("good", found, "each aggregate is in one slot, and so on one primary")
    why = "these refuse every call: slots have no node, or they do not see a majority of primaries"
    remedy = "bring back the nodes that are down, or give their slots to others"
    return Verdict("bad", f"{found}; {_listed(bad)}: state is not ok", why, remedy)


def _uncovered(whole: _Whole) -> Verdict:
    free = set(range(slots.COUNT))
    for part in {part for peer in whole.peers for part in peer.slots}:
        first, _, last = part.partition("-")
        free -= set(range(int(first), int(last or first) + 1))
    if not free:
        return Verdict("good", f"all {slots.COUNT:,} have a node", "every aggregate has a place")
    spans = _spans(free)
    why = "aggregates in these slots can't be stored or read"
    start, end = spans[0]
    remedy = (
        "bring back the node that had them; if it is gone with its data, CLUSTER ADDSLOTSRANGE "
        f"{start} {end} at a primary, where they begin empty"
    )
    return Verdict("bad", f"no node has {_listed(map(_shown, spans))}", why, remedy)


def _agreement(whole: _Whole) -> Verdict:
    by_map = defaultdict(list)
    for view in whole.views:
        by_map[view.owners].append(view.where)
    if len(by_map) == 1:
        return Verdict("good", "all say the same", "calls find their node at once")
    most = max(by_map.values(), key=len)
    others = [where for nodes in by_map.values() if nodes is not most for where in nodes]
    found = f"{_listed(others)} do not say the same as {most[0]} of who has which slots"
    why = "right after a failover or a move that is so for a moment; else a node is cut off"
    remedy = "look again; see that all nodes reach each other's bus (as a rule their port + 10000)"
    return Verdict("warning", found, why, remedy)


def _moving(whole: _Whole) -> Verdict:
    moving = set[int]().union(*(view.moving for view in whole.views))
    if not moving:
        return Verdict("good", "none", "no call takes a detour")
    why = (
        "calls to their aggregates take a detour, and wait while keys are on their way; a move "
        "that was cut off stays like this"
    )
    remedy = "wait until it is over; if nobody moves them, go on: redis-cli --cluster fix"
    found = f"{len(moving):,}: {_listed(map(_shown, _spans(moving)))}"
    return Verdict("warning", found, why, remedy)


def _health(whole: _Whole) -> Verdict:
    bad: dict[str, str] = {}
    with_slots: set[str] = set()
    for peer in whole.peers:
        if peer.trouble and not peer.is_asked:
            bad[peer.address] = max(bad.get(peer.address, ""), peer.trouble, key=len)
            with_slots |= {peer.address} if peer.slots else set()
    if not bad:
        return Verdict("good", "all see each other", "none is taken for dead")
    found = _listed(f"{address} ({what})" for address, what in bad.items())
    if with_slots:
        why = "slots of these can't be used until they are back, or a replica is promoted"
        return Verdict("bad", found, why, "start them; their logs say what ended them")
    why = "they hold no slots of their own, but can't take over from others either"
    remedy = "start them, or CLUSTER FORGET them at every node if they are gone for good"
    return Verdict("warning", found, why, remedy)


def _failover(whole: _Whole) -> Verdict:
    primaries = {peer.id for peer in whole.peers if peer.is_primary and peer.slots}
    if len(primaries) < _MAJORITY_OF_TWO:
        found = f"{len(primaries)} with slots"
        why = "a primary is replaced by a majority of primaries: without one, nobody is promoted"
        return Verdict("warning", found, why, "give slots to 3 primaries or more")
    alone = [view.where for view in whole.views if view.has_slots and not view.replicas]
    if not alone:
        return Verdict("good", "each primary has a replica", "it takes over when its primary fails")
    why = "when such a primary fails, its events can't be read before it is back"
    remedy = "start a server for each, CLUSTER MEET, CLUSTER REPLICATE <id of the primary>"
    return Verdict("warning", f"no replica follows {_listed(alone)}", why, remedy)


def _coverage(whole: _Whole) -> Verdict:
    values = {view.where: view.config[_COVERAGE] for view in whole.views}
    strict = [where for where, value in values.items() if value != "no"]
    if not strict:
        return Verdict("good", "no", "what is on the other nodes can be used while one is down")
    found = "yes" if len(strict) == len(values) else f"{_listed(strict)}: yes"
    why = "while one slot has no node, also during a failover, all nodes refuse every call"
    return Verdict("warning", found, why, f"{_COVERAGE} no")


def _node_timeout(whole: _Whole) -> Verdict:
    values = {view.where: view.config.number(_TIMEOUT) for view in whole.views}
    longest = max(values.values())
    takes = _FAILOVER * longest / 1000 + _FAILOVER_MORE
    if len(set(values.values())) > 1:
        found = _listed(f"{where}: {value}" for where, value in values.items())
        why = "it depends on who looks when a node is taken for dead"
        return Verdict("warning", found, why, f"{_TIMEOUT} {min(values.values())} at all nodes")
    found = f"{longest} (milliseconds)"
    if takes <= whole.timeout:
        why = f"a failover takes about {takes:.1f} s, and callers wait {whole.timeout:g} s"
        return Verdict("good", found, why)
    shorter = max(500, int((whole.timeout - _FAILOVER_MORE) / _FAILOVER) * 1000)
    why = f"a failover takes about {takes:.0f} s, and callers give up after {whole.timeout:g} s"
    remedy = f"{_TIMEOUT} {shorter}, or the store's setting timeout = {math.ceil(takes) + 1}"
    return Verdict("warning", found, why, remedy)


_JUDGES: Final[dict[str, Callable[[_Whole], Verdict | None]]] = {
    "cluster": _state,
    "slots": _uncovered,
    "slot map": _agreement,
    "slots on the way": _moving,
    "nodes": _health,
    "failover": _failover,
    _COVERAGE: _coverage,
    _TIMEOUT: _node_timeout,
}


# How it is shown


def _spans(numbers: set[int]) -> list[tuple[int, int]]:
    """Return the ranges (first, last) that numbers fill."""
    ordered = enumerate(sorted(numbers))
    runs = [list(run) for _, run in groupby(ordered, key=lambda pair: pair[1] - pair[0])]
    return [(run[0][1], run[-1][1]) for run in runs]


def _shown(span: tuple[int, int]) -> str:
    first, last = span
    return f"{first}" if first == last else f"{first}-{last}"


def _listed(parts: Iterable[str]) -> str:
    """Return the first parts of a list, and how many more there are."""
    some = list(parts)
    more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
    return ", ".join(some[:_SHOWN]) + more
