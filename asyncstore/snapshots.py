"""States of aggregates as of a sequence, so that not every event has to be read again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from asyncstore import codec, scripts
from asyncstore.errors import InvalidType, InvalidValue
from asyncstore.names import MAIN, check_schema_version, check_sequence
from asyncstore.observing import named, observed
from asyncstore.values import Retention, Snapshot, check_moment

if TYPE_CHECKING:
    from datetime import datetime

    from asyncstore.keys import Keys
    from asyncstore.router import Router
    from asyncstore.values import Aggregate

OLDER_DEFAULTS_STAY = 2
"""How many snapshots of retention DEFAULT stay beside the newest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of a store.

    Each edition has its own. Those that were put while an edition still read as main go when it
    diverges, as far as they are not from before that. `Store.load` uses those of main, too.
    """

    _router: Router
    _keys: Keys

    @observed("snapshots.get")
    async def get(self, aggregate: Aggregate, *, at: int | None = None) -> Snapshot | None:
        """Return the newest snapshot, or with `at` the newest whose sequence is at most that.

        None where there is none. A snapshot that can't be decoded counts as none: it is only a
        short cut, the events are what counts. A warning is logged.
        """
        bound = "" if at is None else check_sequence("at", at)
        keys = self._keys.snapshots(aggregate)
        reply = await self._router.run(scripts.GET_SNAPSHOT, keys, [bound])
        return decode_or_warn(aggregate, reply)

    @observed("snapshots.put")
    async def put(
        self,
        aggregate: Aggregate,
        *,
        sequence: int,
        state: Any,
        retention: Retention = Retention.DEFAULT,
        schema_version: int = 0,
        as_of: UUID | None = None,
        time: datetime | None = None,
    ) -> bool:
        """Keep the state that the aggregate had when `sequence` was its last event.

        `state` is anything JSON, or bytes. A snapshot of the same sequence is replaced; an older
        one than the newest never becomes the newest. `retention` says how long it stays. Give the
        form of `state` another `schema_version` when it changes, and `Store.load` and `Store.fold`
        the one they can use: they pass over snapshots of another one.

        Nobody checks that the state is that of the events, or that there are so many. `as_of` is
        the id of the event at `sequence`. If that is not there any more (the aggregate
        was deleted, the edition has diverged before it), nothing is kept, and False returned.
        `time` is for snapshots that were made earlier, elsewhere; None takes the server's.
        """
        sequence = check_sequence("sequence", sequence)
        if not isinstance(retention, Retention):
            raise InvalidType("retention", f"a Retention, not {type(retention).__name__}")
        schema = check_schema_version(schema_version)
        body, encoding = codec.encode_state(state)
        if as_of is not None and not isinstance(as_of, UUID):
            raise InvalidType("as_of", f"a uuid.UUID is wanted, not {type(as_of).__name__}")
        keys = [*self._keys.snapshots(aggregate), *self._keys.timeline(aggregate)]
        if aggregate.edition != MAIN:
            keys.append(self._keys.attached_of(aggregate))
        about = [sequence, retention.value, encoding, schema, as_of.hex if as_of else ""]
        arguments = [*about, body, OLDER_DEFAULTS_STAY, aggregate.root, _text_of(time)]
        (outcome,) = await self._router.run(scripts.PUT_SNAPSHOT, keys, arguments)
        return bool(outcome == b"ok")

    @observed("snapshots.delete")
    async def delete(self, aggregate: Aggregate) -> None:
        """Delete all snapshots of the aggregate; fine where there are none."""
        await self._router.run(scripts.DELETE_SNAPSHOTS, self._keys.snapshots(aggregate))


def _text_of(time: datetime | None) -> str:
    """Return microseconds since 1970, as the script has them; '' for None."""
    if time is None:
        return ""
    microseconds = codec.to_microseconds(check_moment("time", time))
    if microseconds < 0:
        raise InvalidValue("time", "no snapshot is from before 1970")
    return str(microseconds)


def decode_or_warn(
    aggregate: Aggregate, reply: list[bytes], schema_version: int | None = None
) -> Snapshot | None:
    """Return the snapshot of a script's reply; None, and a warning, if it can't be used."""
    try:
        snapshot = codec.decode_snapshot(reply)
    except codec.Undecodable as error:
        _log.warning(
            "the snapshot of %s is passed over: %s", aggregate, error, extra=named(aggregate)
        )
        return None
    if snapshot is None or schema_version in (None, snapshot.schema_version):
        return snapshot
    _log.warning(
        "the snapshot of %s is passed over: its schema version is %d, and %d is wanted",
        aggregate,
        snapshot.schema_version,
        schema_version,
        extra=named(aggregate),
    )
    return None
