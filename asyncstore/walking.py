"""A way through all keys of a store, also while slots of a cluster move from node to node.

SCAN finds what is on a node from its beginning to its end. Keys of a slot that moves meanwhile may
be missed: the node they leave is not done with them, and the one they come to was scanned before.
So all nodes are asked, before and after a round, which slots they have and which they give away.
What has changed for a slot has it walked again, in another round: of the nodes that have it then.
A move there and back does not go unseen, for a node takes over a slot under a new epoch.

A slot that is on its way all the time has keys at both nodes, and keys only go one way: they are
found if the node that gives it away was scanned first.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncstore import forms, slots
from asyncstore.errors import StoreUnavailable
from asyncstore.sharing import all_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asyncstore.forms import Peer
    from asyncstore.nodes import Node
    from asyncstore.router import Router

_KEYS_A_SCAN: Final = 1000
_ROUNDS: Final = 30
_PAUSE: Final = 0.2  # seconds after a round in which something moved

Homes = dict[int, frozenset["Home"]]
"""What is said of each slot."""


@dataclass(frozen=True, slots=True)
class Home:
    """That a node has a slot, gives it away (`>`) or takes it over (`<`)."""

    node: str
    epoch: str
    part: str


async def keys(router: Router, prefix: str) -> AsyncIterator[list[bytes]]:
    """Iterate over the keys with a prefix, in pages; one may come twice.

    A prefix has no characters that SCAN gives a meaning: the settings see to that. Raises
    `StoreUnavailable` if some slots could not be walked.
    """
    if not router.servers().by_slot:
        (node,) = router.nodes()
        async for page in scan(node, prefix):
            yield page
        return
    walk = _Walk(router, prefix)
    while walk.left:
        async for page in walk.round():
            yield page


async def scan(node: Node, prefix: str) -> AsyncIterator[list[bytes]]:
    """Iterate over the keys with a prefix on one node."""
    options = ("MATCH", f"{prefix}*", "COUNT", _KEYS_A_SCAN)
    cursor = b"0"
    while True:
        reply = await node.transport.command(forms.is_scan, "SCAN", cursor, *options)
        cursor, found = reply
        yield found
        if cursor == b"0":
            return


class _Walk:
    """A way through the keys of a cluster. `left` are the slots that are not walked yet."""

    def __init__(self, router: Router, prefix: str) -> None:
        self.left = set(range(slots.COUNT))
        self._router = router
        self._prefix = prefix
        self._rounds = 0

    async def round(self) -> AsyncIterator[list[bytes]]:
        """Iterate over the keys of slots that are left; those that have not moved are not, then."""
        await self._begin()
        before, nodes = await self._homes()
        scanned: dict[str, int] = {}
        for place, name in enumerate(self._in_order(before)):
            try:
                async for page in scan(nodes[name], self._prefix):
                    yield [key for key in page if slots.slot_of(key) in self.left]
            except StoreUnavailable:  # another may have its slots soon
                continue
            scanned[name] = place
        after, _ = await self._homes()
        self.left -= {slot for slot in self.left if _is_walked(slot, before, after, scanned)}

    async def _begin(self) -> None:
        if self._rounds == _ROUNDS:
            first = ", ".join(map(str, sorted(self.left)[:5]))
            why = f"{len(self.left):,} slots moved or had no node in each of {_ROUNDS} rounds"
            raise StoreUnavailable("the cluster", f"{why}, such as {first}; run it again later")
        if self._rounds:
            await asyncio.sleep(_PAUSE)
        self._rounds += 1
        await self._router.servers().refresh()

    def _in_order(self, homes: Homes) -> list[str]:
        """Return the nodes to scan: one that gives a slot away before the one that gets it."""
        named: dict[str, None] = {}
        giving = (home for slot in sorted(self.left) for home in homes.get(slot, ()))
        for home in sorted(giving, key=lambda home: home.part != ">"):
            named[home.node] = None
        return list(named)

    async def _homes(self) -> tuple[Homes, dict[str, Node]]:
        """Return what the nodes say of themselves, and the nodes by their ids."""
        nodes = self._router.nodes()
        said = await all_of(_said_by(node) for node in nodes)
        homes: defaultdict[int, set[Home]] = defaultdict(set)
        for peer in said:
            if peer is not None:
                for slot, part in _slots_of(peer):
                    homes[slot].add(Home(peer.id, peer.epoch, part))
        by_id = {peer.id: node for peer, node in zip(said, nodes, strict=True) if peer is not None}
        return {slot: frozenset(some) for slot, some in homes.items()}, by_id


def _is_walked(slot: int, before: Homes, after: Homes, scanned: dict[str, int]) -> bool:
    homes = before.get(slot)
    if not homes or homes != after.get(slot) or any(home.node not in scanned for home in homes):
        return False
    if sum(not home.part for home in homes) != 1:
        return False  # they do not agree whose it is
    giving = [scanned[home.node] for home in homes if home.part == ">"]
    taking = [scanned[home.node] for home in homes if home.part == "<"]
    if not giving and not taking:
        return True
    return bool(giving and taking) and max(giving) < min(taking)


async def _said_by(node: Node) -> Peer | None:
    """Return what a node says of itself; None if it does not answer."""
    try:
        reply: bytes = await node.transport.command(forms.is_text, "CLUSTER", "NODES")
    except StoreUnavailable:
        return None
    peers = forms.peers_of(reply.decode(errors="replace"))
    return next((peer for peer in peers if peer.is_asked), None)


def _slots_of(peer: Peer) -> Iterator[tuple[int, str]]:
    """Iterate over the slots that a node says something of, and what."""
    for part in peer.slots:
        first, _, last = part.partition("-")
        for slot in range(int(first), int(last or first) + 1):
            yield slot, ""
    for part in peer.moving:  # [7->-id] or [7-<-id]
        number, direction, _ = part[1:].split("-", 2)
        yield int(number), direction
