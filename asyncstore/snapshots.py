"""States of aggregates as of a sequence, so that not every event has to be read again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncstore import codec, scripts
from asyncstore.errors import InvalidType
from asyncstore.names import check_sequence
from asyncstore.values import Retention, Snapshot

if TYPE_CHECKING:
    from asyncstore.keys import Keys
    from asyncstore.transport import Transport
    from asyncstore.values import Aggregate

OLDER_DEFAULTS_STAY = 2
"""How many snapshots of retention DEFAULT stay beside the newest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of a store."""

    _transport: Transport
    _keys: Keys

    async def get(self, aggregate: Aggregate, *, at: int | None = None) -> Snapshot | None:
        """Return the newest snapshot, or with `at` the newest whose sequence is at most that.

        None where there is none. A snapshot that can't be decoded counts as none: it is only a
        short cut, the events are what counts. A warning is logged.
        """
        bound = "" if at is None else check_sequence("at", at)
        keys = self._keys.snapshots(aggregate)
        reply = await self._transport.run(scripts.GET_SNAPSHOT, keys, [bound])
        return decode_or_warn(aggregate, reply)

    async def put(
        self,
        aggregate: Aggregate,
        *,
        sequence: int,
        state: Any,
        retention: Retention = Retention.DEFAULT,
    ) -> None:
        """Keep the state that the aggregate had when `sequence` was its last event.

        `state` is anything JSON, or bytes. A snapshot of the same sequence is replaced; an older
        one than the newest never becomes the newest. `retention` says how long it stays.
        """
        sequence = check_sequence("sequence", sequence)
        if not isinstance(retention, Retention):
            raise InvalidType("retention", f"a Retention, not {type(retention).__name__}")
        body, encoding = codec.encode_state(state)
        await self._transport.run(
            scripts.PUT_SNAPSHOT,
            self._keys.snapshots(aggregate),
            [sequence, retention.value, encoding, body, OLDER_DEFAULTS_STAY],
        )

    async def delete(self, aggregate: Aggregate) -> None:
        """Delete all snapshots of the aggregate; fine where there are none."""
        await self._transport.run(scripts.DELETE_SNAPSHOTS, self._keys.snapshots(aggregate))


def decode_or_warn(aggregate: Aggregate, reply: list[bytes]) -> Snapshot | None:
    """Return the snapshot of a script's reply; None, and a warning, if it can't be decoded."""
    try:
        return codec.decode_snapshot(reply)
    except codec.Undecodable as error:
        _log.warning("the snapshot of %s is passed over: %s", aggregate, error)
        return None
