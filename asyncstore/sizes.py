"""How many events a store has, and the memory they take: what `asyncstore stats` does.

Goes through all keys with SCAN and asks for the size of each, so it is for operators, and needs a
user who may do that. It costs the server two short commands for each aggregate, and one for each
other key, a thousand of them in one request. In memory are a page of keys and some numbers for each
domain. Keys that are written or moved meanwhile may be counted twice, or not at all.

Sizes are what MEMORY USAGE says: of a large key an estimate from a few of its members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncstore import forms
from asyncstore.checks import ask_info
from asyncstore.errors import UnexpectedReply
from asyncstore.looking import Looker
from asyncstore.registering import EVERY_DOMAIN
from asyncstore.sharing import all_of
from asyncstore.slots import slot_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncstore.keys import Meaning
    from asyncstore.store import Store

_GONE: Final = ("ASK", "MOVED", "TRYAGAIN")  # it is on its way to another node


@dataclass(slots=True)
class DomainSize:
    """What a domain has.

    An aggregate counts once on each edition on which it has events of its own. `event_memory` are
    the bytes of its events' keys, `memory` those of all that belongs to it: snapshots, positions,
    indexes, claims, what subscriptions keep.
    """

    domain: str
    aggregates: int = 0
    events: int = 0
    event_memory: int = 0
    memory: int = 0

    @property
    def bytes_per_event(self) -> float | None:
        """What an event takes, all that belongs to its domain included; None without events."""
        return self.memory / self.events if self.events else None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a store has.

    `other_memory` are the bytes of keys that belong to no domain: counters, correlation ids.
    `server_memory` is what its servers use, whoever uses it; None where an ACL hides that.
    """

    domains: list[DomainSize]
    keys: int
    other_memory: int
    server_memory: int | None

    @property
    def total(self) -> DomainSize:
        """What all domains have, and all keys take."""
        total = DomainSize("(all)", memory=self.other_memory)
        for one in self.domains:
            total.aggregates += one.aggregates
            total.events += one.events
            total.event_memory += one.event_memory
            total.memory += one.memory
        return total


async def measure(store: Store, on_keys: Callable[[int], None] = lambda _: None) -> Sizes:
    """Count what an open store has; `on_keys` is told how many keys were looked at."""
    sizes: dict[str, DomainSize] = {}
    keys = other = 0
    async for page in Looker(store._router).keys(store._keys.prefix):
        meanings = [(key, meaning) for key in page if (meaning := store._keys.explain(key))]
        found = await all_of(_size_of(store, key, meaning) for key, meaning in meanings)
        for (_, meaning), (memory, events) in zip(meanings, found, strict=True):
            domain = _domain_of(meaning)
            if domain:
                _add(sizes.setdefault(domain, DomainSize(domain)), meaning, memory, events)
            else:
                other += memory
        keys += len(meanings)
        on_keys(len(meanings))
    ordered = [sizes[name] for name in sorted(sizes)]
    return Sizes(ordered, keys, other, await _server_memory(store))


def _domain_of(meaning: Meaning) -> str:
    domain = meaning.aggregate.domain if meaning.aggregate else meaning.domain
    return "" if domain == EVERY_DOMAIN else domain


def _add(size: DomainSize, meaning: Meaning, memory: int, events: int) -> None:
    size.memory += memory
    if meaning.word == "events":
        size.aggregates += events > 0
        size.events += events
        size.event_memory += memory


async def _size_of(store: Store, key: str, meaning: Meaning) -> tuple[int, int]:
    """Return the bytes of a key, and how many events it has."""
    memory = await _unless_refused(_memory_of(store, key), _GONE)
    if meaning.word != "events":
        return memory, 0
    # What is no sorted set is something else, of which `verify` tells.
    return memory, await _unless_refused(Looker(store._router).size(key), ("WRONGTYPE",))


async def _memory_of(store: Store, key: str) -> int:
    slot = slot_of(key) if store._keys.by_slot else None
    home = store._router.servers().node_of(slot).transport
    return await home.command(forms.is_count_or_nil, "MEMORY", "USAGE", key) or 0


async def _unless_refused(answer: Awaitable[int], codes: tuple[str, ...]) -> int:
    try:
        return await answer
    except UnexpectedReply as error:
        if error.code in codes:
            return 0
        raise


async def _server_memory(store: Store) -> int | None:
    infos = await all_of(ask_info(node.transport) for node in store._router.nodes())
    used = [info.fields.get("used_memory", "") for info in infos]
    return sum(map(int, used)) if all(number.isdigit() for number in used) else None
