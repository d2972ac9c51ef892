"""What aggregates have beside their events, all of it: their positions and snapshots.

For export, comparing and migrating. What is found begins at the indexes of roots, so positions and
snapshots that were put where there are no events are found on editions that have some, and not on
main.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncstore import codec, forms, scripts
from asyncstore.errors import CorruptPosition
from asyncstore.looking import Looker
from asyncstore.names import MAX_SEQUENCE
from asyncstore.sharing import all_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from asyncstore.listing import Page
    from asyncstore.store import Store
    from asyncstore.values import Aggregate, Snapshot

    PageOf = Callable[[str, bytes], Coroutine[Any, Any, Page]]

_log = logging.getLogger(__name__)

Fingerprints = dict[int, tuple[object, ...]]
"""What tells snapshots apart, by their sequences."""


@dataclass(frozen=True, slots=True)
class Attachments:
    """The positions and snapshots of a store."""

    _store: Store

    async def handlers(self, aggregate: Aggregate) -> list[str]:
        """Return the handlers that may have a position, in alphabetical order."""
        key = self._store._keys.handlers(aggregate)
        reply = await self._store._router.read(forms.is_texts, "SMEMBERS", key)
        return sorted(name.decode(errors="replace") for name in reply)

    async def positions(
        self,
        aggregate: Aggregate,
        on_corrupt: Callable[[CorruptPosition], None] | None = None,
    ) -> dict[str, int]:
        """Return how far each handler is; what is no position is handed over, or raised."""
        names = await self.handlers(aggregate)
        found = await all_of(self._position(name, aggregate) for name in names)
        positions: dict[str, int] = {}
        for name, position in zip(names, found, strict=True):
            if isinstance(position, int):
                positions[name] = position
            elif position is not None:
                if on_corrupt is None:
                    raise position
                on_corrupt(position)
        return positions

    async def _position(self, handler: str, aggregate: Aggregate) -> int | CorruptPosition | None:
        try:
            return await self._store.positions.get(handler, aggregate)
        except CorruptPosition as error:
            return error

    async def remove_position(self, handler: str, aggregate: Aggregate) -> None:
        """Take away a handler's position, as if it had never had one."""
        keys, router = self._store._keys, self._store._router
        position, lease = keys.position(handler, aggregate), keys.lease(handler, aggregate)
        await router.change(forms.is_count, "UNLINK", position)
        await router.run(
            scripts.MEND_HANDLER, [keys.handlers(aggregate), position, lease], [handler]
        )

    async def newest_snapshot(self, aggregate: Aggregate) -> int:
        """Return the sequence of the newest snapshot; -1 for none, the highest if it is damaged."""
        newest, _, _ = self._store._keys.snapshots(aggregate)
        text = await self._store._router.read(forms.is_text_or_nil, "HGET", newest, "sequence")
        if text is None:
            return -1
        return int(text) if text.isdigit() else MAX_SEQUENCE

    async def snapshots(self, aggregate: Aggregate, up_to: int) -> AsyncIterator[Snapshot]:
        """Iterate over snapshots with a sequence up to a number, a few at a time in memory.

        Those that can't be decoded are passed over, with a warning: they are short cuts only.
        """
        if up_to < 0:
            return
        _, *older = self._store._keys.snapshots(aggregate)
        for key in older:
            async for page in self._look.pages(key):
                for member, _ in page:
                    snapshot = _decoded(aggregate, [member])
                    if snapshot is not None and snapshot.sequence <= up_to:
                        yield snapshot
        reply = await self._store._router.run(
            scripts.GET_SNAPSHOT, self._store._keys.snapshots(aggregate), [""]
        )
        last = _decoded(aggregate, reply)
        if last is not None and last.sequence <= up_to:
            yield last

    async def fingerprints(self, aggregate: Aggregate) -> Fingerprints:
        """Return what tells the snapshots of an aggregate apart from those of another store."""
        newest = await self.newest_snapshot(aggregate)
        return {
            snapshot.sequence: _fingerprint(snapshot)
            async for snapshot in self.snapshots(aggregate, newest)
        }

    async def roots(self, domain: str, edition: str) -> AsyncIterator[list[str]]:
        """Iterate over what may have something on an edition, in no order; one may come twice."""
        keys, listing = self._store._keys, self._store.events._listing
        for page_of, index in (listing.roots_in, keys.roots), (listing.names_in, keys.attached):
            indexes = [index(domain, edition, tag) for tag in keys.tags()]
            if not keys.by_slot:
                async for page in _pages(indexes[0], page_of):
                    yield page
                continue
            async for there in listing.those_there(indexes):  # each has few names
                for names in await all_of(_all_names(key, page_of) for key in there):
                    yield names

    async def only_attached(self, domain: str, edition: str) -> AsyncIterator[str]:
        """Iterate over roots that may have something on an edition without events there."""
        keys = self._store._keys
        indexes = [keys.attached(domain, edition, tag) for tag in keys.tags()]
        async for root in self._store.events._listing.names(indexes):
            yield root

    @property
    def _look(self) -> Looker:
        return Looker(self._store._router)


async def _pages(key: str, page_of: PageOf) -> AsyncIterator[list[str]]:
    page = await page_of(key, b"")
    yield page.names
    while page.last:
        page = await page_of(key, page.last)
        yield page.names


async def _all_names(key: str, page_of: PageOf) -> list[str]:
    return [name async for page in _pages(key, page_of) for name in page]


def _decoded(aggregate: Aggregate, reply: list[bytes]) -> Snapshot | None:
    try:
        return codec.decode_snapshot(reply)
    except codec.Undecodable as error:
        _log.warning("a snapshot of %s is passed over: %s", aggregate, error)
        return None


def _fingerprint(snapshot: Snapshot) -> tuple[object, ...]:
    body, encoding = codec.encode_state(snapshot.state)
    digest = hashlib.blake2b(body, digest_size=16).digest()
    return snapshot.time, snapshot.retention, snapshot.schema_version, encoding, digest
