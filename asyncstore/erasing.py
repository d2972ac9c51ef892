"""Erasing aggregates, with all that belongs to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncstore import forms, keys, scripts
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate

if TYPE_CHECKING:
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
        ]
        for _ in range(_ROUNDS):
            theirs = [key for name in handlers for key in self._keys.of_handler(name, aggregate)]
            outcome, *rest = await self._router.run(
                scripts.DELETE, [*own, *theirs], [*names, *handlers]
            )
            if outcome == b"ok":
                count, ids = rest
                if ids:
                    await self.finish(aggregate, ids)
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
            async for page in names:
                for first in range(0, len(page), _AT_ONCE):
                    some = page[first : first + _AT_ONCE]
                    places = [Aggregate(domain, root, edition) for root in some]
                    count += sum(await all_of(self.erase(place) for place in places))
        return count

    async def finish(self, aggregate: Aggregate, ids: list[bytes] | None = None) -> None:
        """Take an aggregate that was erased out of the indexes of correlation ids.

        `ids` are the first of them, as far as they are known.
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
        known = ids or []
        while True:
            indexes = [self._keys.correlated(name.decode(errors="replace")) for name in known]
            if self._keys.by_slot:
                # These are in other slots. Appends with such an id wait until this is over.
                place = keys.place_in_index(aggregate)
                await all_of(
                    self._router.change(forms.is_count, "ZREM", index, place) for index in indexes
                )
                indexes = []
            known = await self._router.run(scripts.ERASE, [*own, *indexes], [*names, *known])
            if not known:
                return
