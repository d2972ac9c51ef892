"""Erasing aggregates, with all that belongs to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncstore import forms, keys, scripts
from asyncstore.listing import in_portions
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.keys import Keys
    from asyncstore.listing import Listing
    from asyncstore.router import Router

_ROUNDS: Final = 100  # handlers and correlation ids are met for the first time only so often
_AT_ONCE: Final = 100  # aggregates


@dataclass(frozen=True, slots=True)
class Eraser:
    """Takes aggregates out of a store."""

    _router: Router
    _keys: Keys
    _listing: Listing

    async def erase(self, aggregate: Aggregate) -> int:
        """Erase an aggregate on its edition; return how many events it had."""
        handlers: list[str] = []
        names = [aggregate.domain, aggregate.edition, aggregate.root]
        own = [
            self._keys.events(aggregate),
            *self._keys.snapshots(aggregate),
            self._keys.handlers(aggregate),
            self._keys.claims(aggregate),
            self._keys.erasing(aggregate),
            self._keys.divergence(aggregate),
            *self._keys.indexes_of(aggregate),
            self._keys.attached_of(aggregate),
            self._keys.erasures(self._keys.tag_of(aggregate.root)),
        ]
        for _ in range(_ROUNDS):
            theirs = [key for name in handlers for key in self._keys.of_handler(name, aggregate)]
            outcome, *rest = await self._router.run(
                scripts.DELETE, [*own, *theirs], [*names, *handlers]
            )
            if outcome == b"ok":
                count, ids, erasures = rest
                if ids:
                    await self.finish(aggregate, ids, erasures)
                return int(count)
            handlers = [name.decode(errors="replace") for name in rest[0]]
        raise self._router.answers.misfit("delete")

    async def erase_edition(self, domain: str, edition: str) -> int:
        """Erase all aggregates of a domain on an edition; return how many events they had."""
        attached = [self._keys.attached(domain, edition, tag) for tag in self._keys.tags()]
        count = 0
        for names in (
            self._listing.pages_of_roots(domain, edition, _AT_ONCE),
            self._listing.pages_of_names(attached, _AT_ONCE),
        ):
            async for page in in_portions(names, _AT_ONCE):
                places = [Aggregate(domain, root, edition) for root in page]
                count += sum(await all_of(self.erase(place) for place in places))
        return count

    async def finish(
        self, aggregate: Aggregate, ids: Sequence[bytes] = (), erasures: int = 0
    ) -> int:
        """Take an aggregate that was erased out of the indexes of correlation ids.

        `ids` are the first of them, as far as they are known, and `erasures` the count of erasures
        when they were read. Returns this count as it is then. Others may do the same meanwhile.
        """
        names = [aggregate.domain, aggregate.edition, aggregate.root]
        own = [
            self._keys.erasing(aggregate),
            self._keys.claims(aggregate),
            self._keys.attached_of(aggregate),
            self._keys.handlers(aggregate),
            self._keys.snapshots(aggregate)[0],
            self._keys.erasures(self._keys.tag_of(aggregate.root)),
        ]
        while True:
            indexes = [self._keys.correlated(name.decode(errors="replace")) for name in ids]
            if self._keys.by_slot:
                # These are in other slots. Appends with such an id wait until this is over.
                await all_of(self._take_out(aggregate, index, erasures) for index in indexes)
                indexes = []
            count, *left = await self._router.run(scripts.ERASE, [*own, *indexes], [*names, *ids])
            ids, erasures = left, int(count)
            if not ids:
                return erasures

    async def _take_out(self, aggregate: Aggregate, index: str, erasures: int) -> None:
        lowest, highest = keys.places_in_index(aggregate, erasures)
        await self._router.change(forms.is_count, "ZREMRANGEBYLEX", index, lowest, highest)
