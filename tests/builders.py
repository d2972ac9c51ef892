"""Events and sequences, as the tests need them."""

from __future__ import annotations

import itertools

from asyncstore import slots
from asyncstore.keys import ALL, Keys
from asyncstore.testing.builders import listed, numbered, sequences

__all__ = ["KeysOfOne", "listed", "numbered", "roots_of_one_slot", "sequences"]


def roots_of_one_slot(count: int) -> list[str]:
    """Return roots whose aggregates are in one slot of a cluster."""
    numbers = (f"{n}" for n in itertools.count())
    same = (root for root in numbers if slots.slot_of_tag(root) == slots.slot_of_tag("0"))
    return list(itertools.islice(same, count))


class KeysOfOne(Keys):
    """The keys of a store on one server, whose indexes have one tag."""

    def roots(self, domain: str, edition: str, tag: str = ALL) -> str:
        return Keys.roots(self, domain, edition, tag)

    def editions(self, domain: str, tag: str = ALL) -> str:
        return Keys.editions(self, domain, tag)

    def domains(self, tag: str = ALL) -> str:
        return Keys.domains(self, tag)

    def attached(self, domain: str, edition: str, tag: str = ALL) -> str:
        return Keys.attached(self, domain, edition, tag)

    def commits(self, tag: str = ALL) -> str:
        return Keys.commits(self, tag)
