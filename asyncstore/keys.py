"""Where everything is: the one place that spells a key.

The root stands in braces, so that it is the hash tag and all keys of one aggregate share a slot.
Indexes stand under a tag too. One server has one; on a cluster it will be the tag of the root's
slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from asyncstore.values import Aggregate, check_aggregate

_TAG: Final = "{all}"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one store; `prefix` goes in front of each."""

    prefix: str = ""

    def events(self, aggregate: Aggregate) -> str:
        """Sorted set: score = sequence, member = the event as `codec` writes it."""
        return f"{self.prefix}events:{_place(aggregate)}"

    def position(self, handler: str, aggregate: Aggregate) -> str:
        """String: the last sequence that the handler has processed."""
        return f"{self.prefix}positions:{handler}:{_place(aggregate)}"

    def handlers(self, aggregate: Aggregate) -> str:
        """Set: the handlers that have a position, so that `delete` finds them."""
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

    def roots(self, domain: str, edition: str) -> str:
        """Sorted set: score = the commit number of the root's last append, member = root."""
        return f"{self.prefix}roots:{domain}:{edition}:{_TAG}"

    def editions(self, domain: str) -> str:
        """Sorted set, all scores 0: the editions of a domain that have a root."""
        return f"{self.prefix}editions:{domain}:{_TAG}"

    def domains(self) -> str:
        """Sorted set, all scores 0: the domains that have an edition."""
        return f"{self.prefix}domains:{_TAG}"

    def commits(self) -> str:
        """String: how many appends there have been; numbers them."""
        return f"{self.prefix}commits:{_TAG}"

    def layout(self) -> str:
        """String: the version of all this. See `codec.LAYOUT`."""
        return f"{self.prefix}layout:{_TAG}"


def _place(aggregate: Aggregate) -> str:
    check_aggregate(aggregate)
    return f"{aggregate.domain}:{aggregate.edition}:{{{aggregate.root}}}"
