"""How far each handler has come in each aggregate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncstore import forms, scripts
from asyncstore.errors import CorruptPosition
from asyncstore.names import MAIN, check_name, check_sequence

if TYPE_CHECKING:
    from asyncstore.keys import Keys
    from asyncstore.router import Router
    from asyncstore.values import Aggregate


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions of a store. A position is the last sequence that a handler has processed.

    Each edition has its own. One that was put while an edition still read as main, and further
    than where it then diverged, counts as standing right before that.
    """

    _router: Router
    _keys: Keys

    async def get(self, handler: str, aggregate: Aggregate) -> int | None:
        """Return the position, or None where the handler has none. 0 is a position."""
        handler = check_name("handler", handler)
        key = self._keys.position(handler, aggregate)
        value: bytes | None
        if aggregate.edition == MAIN:
            value = await self._router.read(forms.is_text_or_nil, "GET", key)
        else:
            keys = [key, self._keys.divergence(aggregate)]
            value = await self._router.run(scripts.GET_POSITION, keys)
        if value is None:
            return None
        if not value.isdigit():
            raise CorruptPosition(key)
        return int(value)

    async def put(self, handler: str, aggregate: Aggregate, sequence: int) -> None:
        """Set the position, forwards or backwards."""
        await self._put(handler, aggregate, sequence, "anywhere")

    async def advance(self, handler: str, aggregate: Aggregate, sequence: int) -> bool:
        """Move the position forwards. False, and nothing moved, if it is there or further."""
        return await self._put(handler, aggregate, sequence, "forwards")

    async def _put(self, handler: str, aggregate: Aggregate, sequence: int, direction: str) -> bool:
        handler = check_name("handler", handler)
        position = self._keys.position(handler, aggregate)
        sequence = check_sequence("sequence", sequence)
        keys = [position, self._keys.handlers(aggregate)]
        if aggregate.edition != MAIN:
            attached = self._keys.attached_of(aggregate)
            keys += [self._keys.divergence(aggregate), attached]
        (outcome,) = await self._router.run(
            scripts.PUT_POSITION, keys, [handler, sequence, direction, aggregate.root]
        )
        return bool(outcome == b"ok")
