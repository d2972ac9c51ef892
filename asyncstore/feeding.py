"""Finds work for a subscription on one server, and leases it, with pauses when that fails.

On a cluster a subscription has a feeder for each primary, so that one which does not answer keeps
nobody from what the others have.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import random
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from asyncstore.errors import (
    AsyncStoreError,
    OutcomeUnknown,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
)
from asyncstore.observing import HANDLER
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable, Sequence

    from asyncstore.worklist import Worklist

_log = logging.getLogger(__name__)

_MOST_RUNG: Final = 10_000  # aggregates that are known to have changed; a sweep finds the others
_FIRST_PAUSE: Final = 0.05  # seconds after a failure; doubled each time
_LONGEST_PAUSE: Final = 2.0
_PASSING: Final = (StoreUnavailable, OutcomeUnknown, StoreFull)  # what it waits for the end of
_LEAST_AHEAD: Final = 16
_MOST_AHEAD: Final = 64
_SHORT_WAIT: Final = 0.05  # seconds
_LONG_WAIT: Final = 0.5
MOST_LEASES: Final = 16  # in one call: a quarter of a millisecond of the server, in which acks wait
_FIRST: Final = 0.0  # a moment that comes before those of all others

H = TypeVar("H", bound="Hashable")

Place = tuple[str, str]
"""A domain and a tag: where there is one worklist."""

_Chosen = tuple[Aggregate, str | None]
"""What is to be leased, and where no answer came to that before, the holder then."""


class Agenda(Generic[H]):
    """What is to be looked at when, by the clock of the event loop; each at one moment only."""

    def __init__(self) -> None:
        self._moments: dict[H, float] = {}
        self._heap: list[tuple[float, int, H]] = []  # some are of the past
        self._numbers = itertools.count()

    def put(self, what: H, moment: float) -> None:
        """Look at it at that moment, or before."""
        if moment < self._moments.get(what, math.inf):
            self._moments[what] = moment
            heapq.heappush(self._heap, (moment, next(self._numbers), what))

    def take(self, now: float, most: int) -> list[H]:
        """Take what is to be looked at by now, the first ones of it."""
        taken: list[H] = []
        while len(taken) < most and self.next_moment() <= now:
            _, _, what = heapq.heappop(self._heap)
            del self._moments[what]
            taken.append(what)
        return taken

    def next_moment(self) -> float:
        """Return when the next one is to be looked at; infinity if there is none."""
        while self._heap:
            moment, _, what = self._heap[0]
            if self._moments.get(what) == moment:
                return moment
            heapq.heappop(self._heap)
        return math.inf


class Pace:
    """How many aggregates are leased ahead: many where handlers are quick, few where they are slow.

    What waits for a slow handler is kept from other workers that may have nothing to do.
    """

    def __init__(self) -> None:
        self.ahead = _LEAST_AHEAD

    def took(self, waited: float) -> bool:
        """Take notice of how many seconds an aggregate has waited; return whether that is long."""
        if waited > _LONG_WAIT:
            self.ahead = max(self.ahead // 2, _LEAST_AHEAD)
        elif waited < _SHORT_WAIT:
            self.ahead = min(self.ahead + 1, _MOST_AHEAD)
        return waited > _LONG_WAIT


class Desk(Protocol):
    """The subscription, as its feeders know it."""

    def share(self, asked: int) -> int:
        """Return how many aggregates a feeder may lease now, which has asked for some already."""

    def is_open(self) -> bool:
        """Whether it takes any more."""

    def worklist(self, place: Place) -> Worklist:
        """Return the work at a place."""

    def is_held(self, aggregate: Aggregate) -> bool:
        """Whether it has leased an aggregate, or is about to."""

    def new_holder(self) -> str:
        """Return a name that no other lease has."""

    def ask(
        self, place: Place, wanted: Sequence[tuple[Aggregate, str]], *, at_once: bool
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """Send for leases of a place; what is returned waits for them, and offers what there is.

        At once, or with what else this turn of the event loop has to send.
        """

    def place_of(self, aggregate: Aggregate) -> Place:
        """Return in which worklist an aggregate is."""

    def fail(self, error: AsyncStoreError) -> None:
        """Take an error that the application has to know of."""


class Feeder:
    """Looks for what a handler has to do on one server. `run` is its task.

    Leases are on their way while it goes on looking: the server is to have the next call when it is
    through with one.
    """

    def __init__(self, desk: Desk, name: str) -> None:
        self._desk = desk
        self._name = name
        # To be leased when there is room. Where it was tried and no answer came, the holder then.
        self._due: OrderedDict[Aggregate, str | None] = OrderedDict()
        self._agenda: Agenda[Place] = Agenda()
        self._wake = asyncio.Event()
        self._leasing: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None  # of one of these
        self._pause = _FIRST_PAUSE
        self._is_retired = False
        self._replaced = 0  # of those that were due, since it has looked for others
        self._asked = 0  # aggregates of which it is not known yet whether they are leased
        self._lacks_room = False

    def hear(self, aggregate: Aggregate) -> None:
        """Lease an aggregate that has changed, at once if nothing waits before it.

        By way of the task it would come some 40 microseconds later. If that fails it is among those
        that are due.
        """
        if self._due or not self._desk.share(self._asked) or not self._desk.is_open():
            self.add(aggregate)
        else:
            self._ask(self._desk.place_of(aggregate), [(aggregate, None)], at_once=False)

    def add(self, aggregate: Aggregate, holder: str | None = None) -> None:
        """Lease an aggregate soon, for the holder that may have it, if there is one."""
        if len(self._due) < _MOST_RUNG:
            self._due.setdefault(aggregate, holder)
            self._wake.set()

    def look_by(self, place: Place, moment: float) -> None:
        """Look at a place at that moment, or before."""
        self._agenda.put(place, moment)
        self._wake.set()

    def wake(self) -> None:
        """Go on, as there is room, or an end."""
        self._wake.set()

    def retire(self) -> None:
        """End when there is nothing left to do: new work goes to others."""
        self._is_retired = True
        self._wake.set()

    async def run(self) -> None:
        """Find work until the subscription ends."""
        try:
            await self._run()
            await self._end_leasing()
        finally:
            for task in self._leasing:
                task.cancel()
            await self._end_leasing()

    async def _end_leasing(self) -> None:
        if self._leasing:
            await asyncio.wait(list(self._leasing))

    async def _run(self) -> None:
        while self._desk.is_open() and not self._is_done():
            self._wake.clear()
            try:
                await self._feed()
            except StoreClosed:
                raise
            except AsyncStoreError as error:
                _log.warning("%s waits: %s", self._name, error, extra={HANDLER: self._name})
                if not isinstance(error, _PASSING):
                    self._desk.fail(error)
                await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                continue
            await self._wait()

    def _is_done(self) -> bool:
        is_idle = not self._due and not self._leasing and math.isinf(self._agenda.next_moment())
        return self._is_retired and is_idle

    async def _feed(self) -> None:
        """Lease as much as there is room for, and look where it is time."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        room = self._desk.share(self._asked)
        self._ask_for(room)
        lacking, self._replaced = max(room, self._replaced) - len(self._due), 0
        if lacking > 0 and (places := self._agenda.take(_now(), lacking)):
            # What is taken at one place is kept from other workers for a while.
            await all_of(self._look(place, lacking // len(places)) for place in places)
            if not (self._leasing or self._failure):
                self._pause = _FIRST_PAUSE

    def refill(self) -> None:
        """Send for leases as there is room: the server is at it while others are handled."""
        if self._lacks_room and (room := self._desk.share(self._asked)):
            self._ask_for(room)
            self._wake.set()

    def _ask_for(self, room: int) -> None:
        chosen: dict[Place, list[_Chosen]] = {}
        for _ in range(min(room, len(self._due))):
            one = self._due.popitem(last=False)
            chosen.setdefault(self._desk.place_of(one[0]), []).append(one)
            self._replaced += 1
        for place, some in chosen.items():
            for first in range(0, len(some), MOST_LEASES):
                self._ask(place, some[first : first + MOST_LEASES], at_once=True)

    def _ask(self, place: Place, chosen: Sequence[_Chosen], *, at_once: bool) -> None:
        wanted = [(one, holder or self._desk.new_holder()) for one, holder in chosen]
        answer = self._desk.ask(place, wanted, at_once=at_once)
        task = asyncio.ensure_future(self._take(wanted, answer))
        self._leasing.add(task)
        self._asked += len(chosen)
        task.add_done_callback(partial(self._lease_ended, len(chosen)))

    async def _take(
        self,
        wanted: Sequence[tuple[Aggregate, str]],
        answer: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        try:
            await answer()
        except BaseException:
            self._due.update(wanted)  # the leases may be ours all the same
            raise

    def _lease_ended(self, count: int, task: asyncio.Task[None]) -> None:
        self._leasing.discard(task)
        self._asked -= count
        if task.cancelled():
            return
        self._failure = task.exception() or self._failure
        if task.exception() is None:
            self._pause = _FIRST_PAUSE
        if self._failure or self._lacks_room or self._is_retired:
            self._wake.set()

    async def _look(self, place: Place, most: int) -> None:
        """Take what is due at a place, and have what has changed there made due."""
        worklist = self._desk.worklist(place)
        now = _now()
        try:
            polled = await worklist.poll(most)
            is_behind = bool(polled.changed) and await worklist.sweep(polled)
        except BaseException:
            self._agenda.put(place, now)
            raise
        self._note_due(worklist, polled.due)
        if is_behind:
            self._agenda.put(place, _FIRST)
        elif len(polled.due) == most:
            self._agenda.put(place, now)
        elif polled.wait is not None:
            self._agenda.put(place, now + polled.wait)

    def _note_due(self, worklist: Worklist, roots: Sequence[str]) -> None:
        for root in roots:
            aggregate = Aggregate(worklist.domain, root, worklist.terms.edition)
            if not self._desk.is_held(aggregate):
                self._due.setdefault(aggregate)

    async def _wait(self) -> None:
        """Wait until there is something to do."""
        moment = math.inf
        self._lacks_room = not self._desk.share(self._asked)
        if not self._lacks_room:
            if self._due:
                return
            moment = self._agenda.next_moment()
        left = None if math.isinf(moment) else max(moment - _now(), 0.0)
        if left == 0.0 or self._wake.is_set():
            return
        try:
            async with asyncio.timeout(left):
                await self._wake.wait()
        except TimeoutError:
            return
        finally:
            self._lacks_room = False


def _now() -> float:
    return asyncio.get_running_loop().time()
