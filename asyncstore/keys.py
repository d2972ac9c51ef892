"""Where everything is: the one place that spells a key.

The root stands in braces, so that it is the hash tag and all keys of one aggregate share a slot.
Indexes stand under a tag too, so that a script can change them with the events. One server has one
tag; on a cluster it is that of the root's slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from asyncstore import slots
from asyncstore.names import MAIN, MAX_SEQUENCE
from asyncstore.values import Aggregate, Source, check_aggregate

ALL: Final = "all"
"""The tag of one server, and of what there is once in a cluster."""

TYPES: Final = {
    "events": "zset",
    "positions": "string",
    "leases": "hash",
    "handlers": "set",
    "snapshots": "hash",
    "snapshots-kept": "zset",
    "snapshots-recent": "zset",
    "divergence": "string",
    "claims": "zset",
    "erasing": "zset",
    "correlated": "zset",
    "attached": "zset",
    "roots": "zset",
    "editions": "zset",
    "domains": "zset",
    "commits": "string",
    "erasures": "string",
    "subscribed": "zset",
    "subscriptions": "hash",
    "due": "zset",
    "dead-letters": "zset",
    "layout": "string",
    "migration": "string",
}
"""The first word of each key, behind the prefix, and the type of its value, as TYPE names it."""

_ONCE: Final = ("layout", "subscribed", "migration")  # what a cluster does not have in each slot

_PLACE: Final = r"(?P<domain>[^:]+):(?P<edition>[^:]+):\{(?P<root>[^{}]+)\}"
_TAG: Final = r"\{(?P<tag>[^{}]+)\}"
_OF_HANDLER: Final = rf"(?P<name>[^:]+):(?P<domain>[^:]+):(?P<edition>[^:]+):{_TAG}"
_RESTS: Final = {
    "positions": rf"(?P<name>[^:]+):{_PLACE}",
    "leases": rf"(?P<name>[^:]+):{_PLACE}",
    "subscribed": _TAG,
    "subscriptions": _OF_HANDLER,
    "due": _OF_HANDLER,
    "dead-letters": _OF_HANDLER,
    "correlated": r"\{(?P<name>.*)\}",
    "attached": rf"(?P<domain>[^:]+):(?P<edition>[^:]+):{_TAG}",
    "roots": rf"(?P<domain>[^:]+):(?P<edition>[^:]+):{_TAG}",
    "editions": rf"(?P<domain>[^:]+):{_TAG}",
    "domains": _TAG,
    "commits": _TAG,
    "erasures": _TAG,
    "layout": _TAG,
    "migration": _TAG,
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a key is: its first word, and what it names.

    `name` is a handler or a correlation id, `tag` that of an index.
    """

    word: str
    aggregate: Aggregate | None = None
    domain: str = ""
    edition: str = ""
    name: str = ""
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """The keys that hold the events of a timeline: before `diverges_at` it is that of `main`."""

    events: str
    main: str = ""
    diverges_at: int = 0

    def key_at(self, sequence: int) -> str:
        """Return the key of the event with this sequence."""
        return self.main if sequence < self.diverges_at else self.events

    def all(self) -> list[str]:
        """Return the keys that there are."""
        return [self.events, self.main] if self.main else [self.events]


@dataclass(slots=True)
class Keys:
    """The keys of one store; `prefix` goes in front of each.

    `by_slot` says that it is on a cluster, with indexes for each slot.
    """

    prefix: str = ""
    by_slot: bool = False

    def tag_of(self, root: str) -> str:
        """Return the tag of the indexes that name a root."""
        return self.tag_of_slot(slots.slot_of_tag(root) if self.by_slot else None)

    def tag_of_slot(self, slot: int | None) -> str:
        """Return the tag of the indexes of a slot; None for those of one server."""
        return ALL if slot is None else slots.tags()[slot]

    def tags(self) -> tuple[str, ...]:
        """Return the tags of all indexes."""
        return slots.tags() if self.by_slot else (ALL,)

    def events(self, aggregate: Aggregate) -> str:
        """Sorted set: score = sequence, member = the event as `codec` writes it."""
        return f"{self.prefix}events:{_place(aggregate)}"

    def position(self, handler: str, aggregate: Aggregate) -> str:
        """String: the last sequence that the handler has processed."""
        return f"{self.prefix}positions:{handler}:{_place(aggregate)}"

    def lease(self, handler: str, aggregate: Aggregate) -> str:
        """Hash: who works on the aggregate for the handler, and how long. See leases.lua."""
        return f"{self.prefix}leases:{handler}:{_place(aggregate)}"

    def of_handler(self, handler: str, aggregate: Aggregate) -> list[str]:
        """Return the keys where something of the aggregate may be that belongs to the handler."""
        place = aggregate.domain, aggregate.edition, self.tag_of(aggregate.root)
        return [
            self.position(handler, aggregate),
            self.lease(handler, aggregate),
            self.due(handler, *place),
            self.dead_letters(handler, *place),
        ]

    def handlers(self, aggregate: Aggregate) -> str:
        """Set: the handlers that have a position or a lease, so that `delete` finds them."""
        return f"{self.prefix}handlers:{_place(aggregate)}"

    def snapshots(self, aggregate: Aggregate) -> tuple[str, str, str]:
        """Return the hash of the newest snapshot, and the sorted sets of older ones.

        The second holds those with retention PERSIST, the third the last few of DEFAULT.
        """
        place = _place(aggregate)
        return (
            f"{self.prefix}snapshots:{place}",
            f"{self.prefix}snapshots-kept:{place}",
            f"{self.prefix}snapshots-recent:{place}",
        )

    def divergence(self, aggregate: Aggregate) -> str:
        """String: the sequence at which an edition has left main."""
        return f"{self.prefix}divergence:{_place(aggregate)}"

    def claims(self, aggregate: Aggregate) -> str:
        """Sorted set, all scores 0: which events have which key, source and correlation id.

        For the form of a member see claims.lua; what it claims is one of `claim_of_…`.
        """
        return f"{self.prefix}claims:{_place(aggregate)}"

    def erasing(self, aggregate: Aggregate) -> str:
        """Sorted set: claims of an aggregate that was erased, until no index names it any more."""
        return f"{self.prefix}erasing:{_place(aggregate)}"

    def places(self, aggregate: Aggregate, diverges_at: int) -> Places:
        """Return where the events of a timeline are that diverges there."""
        if aggregate.edition == MAIN:
            return Places(self.events(aggregate))
        return Places(self.events(aggregate), self.events(aggregate.on(MAIN)), diverges_at)

    def timeline(self, aggregate: Aggregate) -> list[str]:
        """Return what it takes to read the timeline of an aggregate; one key on main."""
        if aggregate.edition == MAIN:
            return [self.events(aggregate)]
        main = self.events(aggregate.on(MAIN))
        return [self.events(aggregate), self.divergence(aggregate), main]

    def roots(self, domain: str, edition: str, tag: str) -> str:
        """Sorted set: score = the commit number of the root's last append, member = root."""
        return f"{self.prefix}roots:{domain}:{edition}:{{{tag}}}"

    def editions(self, domain: str, tag: str) -> str:
        """Sorted set, all scores 0: the editions of a domain that have a root."""
        return f"{self.prefix}editions:{domain}:{{{tag}}}"

    def domains(self, tag: str) -> str:
        """Sorted set, all scores 0: the domains that have an edition."""
        return f"{self.prefix}domains:{{{tag}}}"

    def attached(self, domain: str, edition: str, tag: str) -> str:
        """Sorted set, all scores 0: roots that may have something on an edition without events.

        That is a position, a snapshot, or an erasure that was cut off.
        """
        return f"{self.prefix}attached:{domain}:{edition}:{{{tag}}}"

    def indexes_of(self, aggregate: Aggregate) -> list[str]:
        """Return the indexes that name an aggregate: roots, editions, domains."""
        tag = self.tag_of(check_aggregate(aggregate).root)
        domain, edition = aggregate.domain, aggregate.edition
        return [self.roots(domain, edition, tag), self.editions(domain, tag), self.domains(tag)]

    def attached_of(self, aggregate: Aggregate) -> str:
        """Return the index that names an aggregate for what it has beside events."""
        tag = self.tag_of(check_aggregate(aggregate).root)
        return self.attached(aggregate.domain, aggregate.edition, tag)

    def correlated(self, correlation_id: str) -> str:
        """Sorted set, all scores 0: where the id has claims, as `{domain}:{edition}:{root}`.

        It may name too much, never too little. For what may follow see `place_in_index`.
        """
        return f"{self.prefix}correlated:{{{correlation_id}}}"

    def subscribed(self, tag: str) -> str:
        """Sorted set, all scores 0: what handlers work on, as `{handler}:{domain}:{edition}`.

        There is one, under `ALL`.
        """
        return f"{self.prefix}subscribed:{{{tag}}}"

    def subscription(self, handler: str, domain: str, edition: str, tag: str) -> str:
        """Hash: under `ALL` where the handler began, under each tag which roots it has looked at.

        See subscribe.lua and sweep.lua. On a cluster the latter comes when there is a root.
        """
        return f"{self.prefix}subscriptions:{handler}:{domain}:{edition}:{{{tag}}}"

    def due(self, handler: str, domain: str, edition: str, tag: str) -> str:
        """Sorted set: score = when the handler is to look at it, in microseconds, member = root.

        All in which the handler is behind are there, or in `roots` after the commit number that the
        subscription has swept.
        """
        return f"{self.prefix}due:{handler}:{domain}:{edition}:{{{tag}}}"

    def dead_letters(self, handler: str, domain: str, edition: str, tag: str) -> str:
        """Sorted set, all scores 0: events that the handler could not handle. See handling.lua."""
        return f"{self.prefix}dead-letters:{handler}:{domain}:{edition}:{{{tag}}}"

    def commits(self, tag: str) -> str:
        """String: the number of the last commit, and its time in microseconds."""
        return f"{self.prefix}commits:{{{tag}}}"

    def erasures(self, tag: str) -> str:
        """String: how often erased aggregates were taken out of indexes in other slots."""
        return f"{self.prefix}erasures:{{{tag}}}"

    def live(self, tag: str) -> str:
        """Channel: what was appended, as it happens. No key, but under the tag as if it were one.

        For the form of a message see ring.lua.
        """
        return f"{self.prefix}live:{{{tag}}}"

    def layout(self) -> str:
        """String: the version of all this. See `codec.LAYOUT`."""
        return f"{self.prefix}layout:{{{ALL}}}"

    def migration(self) -> str:
        """String: what the store is being filled from. It goes when all has arrived."""
        return f"{self.prefix}migration:{{{ALL}}}"

    def _has_tag(self, word: str, tag: str) -> bool:
        """Whether there can be a key with this first word under a tag."""
        if tag == ALL:
            return not self.by_slot or word in (*_ONCE, "subscriptions")
        return self.by_slot and word not in _ONCE and self.tag_of(tag) == tag

    def beginning(self, word: str) -> str:
        """Return what all keys begin with that have this first word."""
        return f"{self.prefix}{word}:"

    def word_of(self, key: str) -> str | None:
        """Return the first word of a key behind the prefix, if it is one of ours."""
        word = key.removeprefix(self.prefix).split(":", 1)[0]
        return word if key.startswith(self.prefix) and word in TYPES else None

    def explain(self, key: str) -> Meaning | None:
        """Return what a key of this store is; None if it is none of those above."""
        word = self.word_of(key)
        if word is None:
            return None
        rest = key[len(self.prefix) + len(word) + 1 :]
        parts = re.fullmatch(_RESTS.get(word, _PLACE), rest)
        if parts is None:
            return None
        fields = parts.groupdict()
        try:
            if "tag" in fields and not self._has_tag(word, fields["tag"]):
                return None
            root = fields.pop("root", None)
            place = Aggregate(fields["domain"], root, fields["edition"]) if root else None
        except ValueError:  # InvalidName is one
            return None
        return Meaning(word, place, **fields)


def place_in_index(aggregate: Aggregate, erasures: int = 0) -> str:
    """Return the member of `correlated` that names an aggregate.

    On a cluster it is put there, in another slot, before the events, with the count of erasures
    that was known. Whoever erases the aggregate takes out those up to the count at that time: late
    as that may come, it takes none of a later append. A count of 0 is left out.
    """
    place = f"{aggregate.domain}:{aggregate.edition}:{aggregate.root}"
    return f"{place}\n{erasures:016}" if erasures else place


def places_in_index(aggregate: Aggregate, erasures: int = MAX_SEQUENCE) -> tuple[str, str]:
    """Return the range of members that name an aggregate, up to a count of erasures."""
    return f"[{place_in_index(aggregate)}", f"[{place_in_index(aggregate, erasures)}"


def subscription_in_index(handler: str, domain: str, edition: str) -> str:
    """Return the member of `subscribed` that names a subscription."""
    return f"{handler}:{domain}:{edition}"


def find_aggregate(place: str) -> Aggregate | None:
    """Return the aggregate that a member of `correlated` names, or None if it names none."""
    try:
        domain, edition, root = place.partition("\n")[0].split(":", 2)
        return Aggregate(domain, root, edition)
    except ValueError:  # InvalidName is one
        return None


def claim_of_key(idempotency_key: str) -> str:
    """Return what an append with the key claims."""
    return f"key:{idempotency_key}"


def claim_of_source(source: Source) -> str:
    """Return what an append with the source claims."""
    return f"source:{source.domain}:{source.edition}:{source.sequence}:{source.root}"


def claim_of_correlation(correlation_id: str) -> str:
    """Return what an append with the correlation id claims."""
    return f"correlation:{correlation_id}"


def _place(aggregate: Aggregate) -> str:
    check_aggregate(aggregate)
    return f"{aggregate.domain}:{aggregate.edition}:{{{aggregate.root}}}"
