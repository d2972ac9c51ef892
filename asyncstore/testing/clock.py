"""Known times and ids for events.

An event without a time is stamped by the server, with the server's clock: nothing in a process can
set that. An event that has a time keeps it. So code whose times a test wants to know makes its
events with a time, from a clock that it was given:

    clock = Clock(datetime(2024, 1, 1, tzinfo=UTC), step=timedelta(minutes=1))
    Event("OrderPlaced", {"total": 12}, time=clock(), id=clock.new_id())
    clock.event("OrderPlaced", {"total": 12})  # the same
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from asyncstore.errors import InvalidValue
from asyncstore.values import Event, check_moment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_STILL: Final = timedelta(0)
_COUNTER_BITS: Final = 62


class Clock:
    """A clock that stands where it is put, and goes on by `step` each time that it is asked.

    Ids are UUIDs of version 7 of its time, counted from 0: the same in every run, and in the order
    in which they were made as long as the clock does not go back. Two clocks that give ids to one
    store need another `seed` each.
    """

    def __init__(self, start: datetime, *, step: timedelta = _STILL, seed: int = 0) -> None:
        self.now = check_moment("start", start).astimezone(UTC)
        self.step = step
        if not 0 <= seed < 1 << 12:
            raise InvalidValue("seed", f"{seed} is not within 0..4095")
        self._seed = seed
        self._made = 0

    def __call__(self) -> datetime:
        """Return the time, and go on by `step`."""
        moment = self.now
        self.now = moment + self.step
        return moment

    def advance(self, by: timedelta) -> None:
        """Go on, or back if it is negative."""
        self.now += by

    def new_id(self) -> UUID:
        """Return the next id, of the time that it is."""
        return self._id_at(self.now)

    def event(self, type: str, data: Any, *, metadata: Mapping[str, Any] | None = None) -> Event:  # noqa: A002 - as Event calls it
        """Return an event with an id and the time."""
        moment = self()
        return Event(type, data, metadata=metadata, id=self._id_at(moment), time=moment)

    def stamp(self, events: Iterable[Event]) -> list[Event]:
        """Return the events with ids and times of this clock; a time that one has stays."""
        return [self._stamped(event) for event in events]

    def _stamped(self, event: Event) -> Event:
        moment = event.time or self()
        return replace(event, id=self._id_at(moment), time=moment)

    def _id_at(self, moment: datetime) -> UUID:
        milliseconds = (moment - _EPOCH) // _MILLISECOND
        if not 0 <= milliseconds < 1 << 48:
            raise InvalidValue("start", f"{moment} is before 1970, which an id can't say")
        number, self._made = self._made, self._made + 1
        high = milliseconds << 16 | 0x7000 | self._seed
        return UUID(int=high << 64 | 0b10 << _COUNTER_BITS | number)
