"""Durable subscriptions: every event at least once, in order per aggregate, shared by workers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict
from uuid import uuid4

import anyio

from asyncstore import forms
from asyncstore.errors import (
    AsyncStoreError,
    CorruptPosition,
    HistoryRegressed,
    LeaseLost,
    OutcomeUnknown,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
    UnexpectedReply,
)
from asyncstore.keys import ALL
from asyncstore.names import check_seconds
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate
from asyncstore.worklist import EVERY_DOMAIN, Leased, Worklist

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from datetime import datetime
    from types import TracebackType

    from asyncstore.doorbell import Doorbell, Ring
    from asyncstore.keys import Keys
    from asyncstore.progress import Subscriptions
    from asyncstore.recorded import RecordedEvent
    from asyncstore.router import Router
    from asyncstore.values import Start
    from asyncstore.worklist import Known, NotLeased, Terms

_log = logging.getLogger(__name__)

_AHEAD: Final = 16  # aggregates that are leased before somebody asks for them
_MOST_RUNG: Final = 10_000  # aggregates that are known to have changed; a sweep finds the others
_MOST_KNOWN: Final = 10_000  # aggregates of which it is remembered what was handled last
_RENEWED_AT_ONCE: Final = 100
_FIRST_PAUSE: Final = 0.05  # seconds after a failure; doubled each time
_LONGEST_PAUSE: Final = 2.0
_CORRUPT_PAUSE: Final = 1.0
_PASSING: Final = (StoreUnavailable, OutcomeUnknown, StoreFull)  # what it waits for the end of


class SubscribeOptions(TypedDict, total=False):
    """The options of `Store.subscribe`, for handlers that are decorated."""

    edition: str
    start: Start | datetime
    types: Iterable[str] | None
    batch: int
    lease: float
    sweep: float
    retries: int | None
    close_timeout: float


class Delivery:
    """One event, or some of one aggregate, and the duty to say what became of them.

    No other events of the aggregate are delivered to any worker of the handler before that. If it
    is neither acked nor nacked, and nobody holds it any more, they come again when the lease ends.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "_is_refused",
        "_settled",
        "_subscription",
        "attempt",
        "events",
        "token",
    )

    def __init__(
        self, subscription: Subscription, held: _Held, events: list[RecordedEvent]
    ) -> None:
        self._subscription = subscription
        self._held = held
        self._settled = 0  # of the events
        self._is_refused = False
        self.events = events
        """The events, in the order of their sequences: one, unless they came from `batches`."""
        self.attempt = held.leased.attempt
        """How often the first event has been delivered, this time included."""
        self.token = held.leased.token
        """A number that grows with each lease of the aggregate, for systems that can refuse an
        older one: what a worker does after its lease has ended."""

    @property
    def event(self) -> RecordedEvent:
        """The first event."""
        return self.events[0]

    async def ack(self, *, through: int | None = None) -> None:
        """Record that the events were handled: they are never delivered to the handler again.

        `through` is the last sequence of a batch that was; the others stay to be acked or nacked.
        A second ack changes nothing. Raises `LeaseLost` when the lease has ended or was given back:
        then they are delivered again, or have been. After `StoreUnavailable` and `OutcomeUnknown`
        it can be called again.
        """
        await self._subscription._ack(self, through)

    async def nack(self, *, delay: float = 0.0, reason: str = "") -> None:
        """Record that the first event could not be handled: it comes again in `delay` seconds.

        After as many retries as the subscription allows it becomes a dead letter with the reason,
        and the aggregate goes on behind it. Give a short reason without data, such as the name of
        an exception. Raises `LeaseLost` as `ack` does.
        """
        check_seconds("delay", delay)
        await self._subscription._nack(self, delay, reason)

    def __repr__(self) -> str:
        first, last = self.events[0].sequence, self.events[-1].sequence
        which = f"{first}" if first == last else f"{first} to {last}"
        return f"<Delivery {self._held.aggregate} {which} attempt={self.attempt}>"


@dataclass(slots=True, eq=False)
class _Held:
    """An aggregate that this worker has leased, or is about to."""

    aggregate: Aggregate
    worklist: Worklist
    leased: Leased = field(init=False)
    delivery: weakref.ref[Delivery] | None = None  # what is in progress
    task: asyncio.Task[Any] | None = None  # that took the delivery
    was_rung: bool = False  # more was appended since we asked last

    def is_in_progress(self) -> bool:
        """Whether somebody works on it."""
        return self.delivery is not None and self.delivery() is not None

    def is_abandoned(self) -> bool:
        """Whether it was delivered, and nobody can ack it any more."""
        return self.delivery is not None and self.delivery() is None


@dataclass(slots=True, eq=False)
class _Feed:
    """A domain, and when to look for work there."""

    worklist: Worklist
    next_look: float = 0.0

    def look_by(self, moment: float) -> None:
        """Look at that moment, or before."""
        self.next_look = min(self.next_look, moment)


class Subscription:
    """A worker of a handler; made by `Store.subscribe`.

    Leases aggregates that the handler is behind in, a few ahead, delivers their events, and keeps
    the leases while it lives. Several tasks may iterate over it at once.
    """

    def __init__(
        self,
        router: Router,
        keys: Keys,
        doorbell: Doorbell,
        progress: Subscriptions,
        domain: str | None,
        terms: Terms,
        *,
        sweep: float,
        close_timeout: float,
    ) -> None:
        self._router = router
        self._keys = keys
        self._doorbell = doorbell
        self._progress = progress
        self._domain = domain
        self._terms = terms
        self._sweep = sweep
        self.close_timeout = close_timeout
        self._worker = uuid4().hex
        self._leases = 0  # that were asked for
        self._feeds: dict[str, _Feed] = {}
        self._new_domains: set[str] = set()
        # To be leased when there is room. Where it was tried and no answer came, the holder then.
        self._due: OrderedDict[Aggregate, str | None] = OrderedDict()
        self._held: dict[Aggregate, _Held] = {}
        self._ready: deque[_Held] = deque()  # with events that nobody has yet
        self._errors: deque[AsyncStoreError] = deque()  # to be raised where deliveries are taken
        self._known: OrderedDict[Aggregate, Known] = OrderedDict()
        self._takers: deque[asyncio.Future[None]] = deque()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._next_sweep = 0.0
        self._hurried: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._state = "new"

    # Opening and closing

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise StoreClosed("a subscription is entered once: call store.subscribe() again")
        self._state = "open"
        self._doorbell.enlist(self)
        try:
            await self._find_domains()
            self._tasks = [
                asyncio.ensure_future(self._feed()),
                asyncio.ensure_future(self._renew()),
            ]
            for task in self._tasks:
                task.add_done_callback(self._task_ended)
        except BaseException:
            self._state = "closed"
            await self._doorbell.leave(self)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what others have in progress, with a limit, and give all leases back.

        What the leaving task itself has taken and not acked is given back at once.
        """
        self.stop()
        with anyio.CancelScope(shield=True):
            feeder, renewer = self._tasks
            await asyncio.wait([feeder, *self._hurried], timeout=self.close_timeout)
            with anyio.move_on_after(self.close_timeout):
                await self._wait_for_others(asyncio.current_task())
            last = [feeder, renewer, *self._hurried]
            for task in last:
                task.cancel()
            await asyncio.wait(last)
            await self._release_all()
            await self._doorbell.leave(self)
        self._state = "closed"

    def stop(self) -> None:
        """Deliver nothing more: those who iterate come to an end. Deliveries can still be acked."""
        if self._state == "open":
            self._state = "closing"
        self._wake.set()
        for taker in self._takers:
            if not taker.done():
                taker.set_result(None)

    def give_up(self, delivery: Delivery) -> None:
        """Say that nobody works on a delivery any more; it comes again when its lease ends.

        Or at once, when the subscription is left.
        """
        delivery._held.delivery = delivery._held.task = None
        self._settled.set()

    async def wait_until_caught_up(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - as other stores have it
    ) -> None:
        """Wait until the handler has handled all that was appended before this call.

        Whichever worker of the handler does it; another task must take deliveries meanwhile. Raises
        `StillBehind` after `timeout` seconds.
        """
        handler, edition = self._terms.handler, self._terms.edition
        ends = None if timeout is None else time.monotonic() + check_seconds("timeout", timeout)
        await self._find_domains()
        for domain in list(self._feeds):
            left = None if ends is None else max(ends - time.monotonic(), 0.0)
            await self._progress.wait_until_caught_up(
                handler, domain, edition=edition, timeout=left
            )

    async def _wait_for_others(self, leaving: asyncio.Task[Any] | None) -> None:
        while any(held.is_in_progress() and held.task is not leaving for held in self._all_held()):
            self._settled.clear()
            await self._settled.wait()

    async def _release_all(self) -> None:
        groups: dict[str, tuple[Worklist, list[Leased]]] = {}
        for held in self._all_held():
            group = groups.setdefault(held.aggregate.domain, (held.worklist, []))
            group[1].append(held.leased)
        self._held.clear()
        self._ready.clear()
        for worklist, leases in groups.values():
            for start in range(0, len(leases), _RENEWED_AT_ONCE):
                try:
                    await worklist.release(leases[start : start + _RENEWED_AT_ONCE])
                except AsyncStoreError as error:
                    _log.warning("leases were not given back and end by themselves: %s", error)

    def _all_held(self) -> list[_Held]:
        return [held for held in self._held.values() if hasattr(held, "leased")]

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if not isinstance(error, AsyncStoreError):
            _log.error("a subscription of %s has failed", self._terms.handler, exc_info=error)
            error = StoreClosed(f"the subscription has failed ({type(error).__name__})")
        self._fail(error)
        self.stop()

    def _fail(self, error: AsyncStoreError) -> None:
        self._errors.append(error)
        self._wake_taker()

    # Taking deliveries

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        """Return the next delivery of one event, or wait for it."""
        return await self._take(1)

    async def batches(self) -> AsyncIterator[Delivery]:
        """Iterate over deliveries of all events of an aggregate that were leased at once.

        At most `batch` of them. `ack()` is for all; `ack(through=…)` for those up to a sequence.
        """
        while True:
            try:
                yield await self._take(self._terms.batch)
            except StopAsyncIteration:
                return

    async def _take(self, most: int) -> Delivery:
        if self._state == "new":
            raise StoreClosed("use the subscription inside `async with store.subscribe(…) as sub:`")
        while True:
            if self._errors:
                raise self._errors.popleft()
            if self._state != "open":
                raise StopAsyncIteration
            if self._ready:
                return self._deliver(self._ready.popleft(), most)
            await self._wait_for_ready()

    async def _wait_for_ready(self) -> None:
        taker = asyncio.get_running_loop().create_future()
        self._takers.append(taker)
        try:
            await taker
        except asyncio.CancelledError:
            if taker.done() and not taker.cancelled():
                self._wake_taker()  # it was meant for somebody who takes it
            raise
        finally:
            self._takers.remove(taker)

    def _wake_taker(self) -> None:
        for taker in self._takers:
            if not taker.done():
                taker.set_result(None)
                return

    def _deliver(self, held: _Held, most: int) -> Delivery:
        events = [event for event, _ in zip(held.leased.events, range(most), strict=False)]
        delivery = Delivery(self, held, events)
        held.delivery = weakref.ref(delivery)
        held.task = asyncio.current_task()
        if len(self._ready) < _AHEAD // 2:
            self._wake.set()
        return delivery

    def _offer(self, held: _Held) -> None:
        """Let somebody take the next events of an aggregate."""
        held.delivery = held.task = None
        self._ready.append(held)
        self._wake_taker()

    # Settling deliveries

    async def _ack(self, delivery: Delivery, through: int | None) -> None:
        held, leased, settled = delivery._held, delivery._held.leased, delivery._settled
        count = _count_up_to(delivery.events, through) - settled
        if count <= 0 and not delivery._is_refused:
            return
        self._check_lease(delivery)
        following = leased.events[count].sequence if count < len(leased.events) else None
        if following is None and leased.bad is not None:
            following = leased.bad_at
        last = delivery.events[settled + count - 1]
        known = (last.sequence, last.id.hex)
        if following is None:
            known, held.was_rung = (leased.through, leased.through_id), False
        outcome = await held.worklist.ack(leased, known, following)
        if outcome == "lost":
            raise self._lost(held, last.sequence)
        if delivery._settled != settled:
            return  # it was acked twice at once
        self._remember(held.aggregate, known)
        delivery._settled += count
        for _ in range(count):
            leased.events.popleft()
        leased.attempt = 1
        await self._go_on(delivery, outcome)

    async def _go_on(self, delivery: Delivery, outcome: str) -> None:
        """Deliver what comes next of an aggregate, or let it go."""
        held = delivery._held
        if outcome == "ok":
            if delivery._settled < len(delivery.events):
                return  # the rest of a batch is still in progress
            if held.leased.events:
                self._offer(held)
            else:
                await self._refuse_bad(held)
        else:
            self._let_go(held, is_due=outcome == "more" or held.was_rung)
        self._settled.set()

    async def _nack(self, delivery: Delivery, delay: float, reason: str) -> None:
        self._check_lease(delivery)
        event = delivery.events[delivery._settled]
        await self._refuse(delivery._held, (event.sequence, event.id.hex), delay, reason)
        delivery._is_refused = True
        self._settled.set()

    async def _refuse(self, held: _Held, event: Known, delay: float, reason: str) -> None:
        outcome = await held.worklist.nack(held.leased, event, delay, _short(reason))
        if outcome == "lost":
            raise self._lost(held, event[0])
        if outcome == "buried":
            _log.warning(
                "%s: event %s of %s has become a dead letter (%s)",
                self._terms.handler, event[0], held.aggregate, _short(reason),
            )  # fmt: skip
        self._let_go(held, is_due=outcome == "buried" or delay == 0)
        self._look_by(held.aggregate.domain, delay)

    async def _refuse_bad(self, held: _Held) -> None:
        """Say no to an event that can't be read: nobody can handle it."""
        error = held.leased.bad
        if error is not None:
            _log.error("%s can't go on: %s", self._terms.handler, error)
            event = (held.leased.bad_at, "")
            await self._refuse(held, event, _CORRUPT_PAUSE, type(error).__name__)

    def _check_lease(self, delivery: Delivery) -> None:
        held = delivery._held
        is_settled = delivery._is_refused or delivery._settled == len(delivery.events)
        if is_settled or self._held.get(held.aggregate) is not held:
            raise LeaseLost(self._terms.handler, held.aggregate, delivery.event.sequence)

    def _lost(self, held: _Held, sequence: int) -> LeaseLost:
        self._let_go(held, is_due=False)
        self._look_by(held.aggregate.domain, 0)
        self._settled.set()
        return LeaseLost(self._terms.handler, held.aggregate, sequence)

    def _let_go(self, held: _Held, *, is_due: bool) -> None:
        if self._held.get(held.aggregate) is held:
            del self._held[held.aggregate]
        if is_due:
            self._due.setdefault(held.aggregate)
            self._wake.set()

    def _remember(self, aggregate: Aggregate, known: Known) -> None:
        self._known[aggregate] = known
        self._known.move_to_end(aggregate)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)

    # Finding work: the feeder's task

    async def _feed(self) -> None:
        pause = _FIRST_PAUSE
        while self._state == "open":
            self._wake.clear()
            try:
                await self._feed_once()
                pause = _FIRST_PAUSE
            except StoreClosed:
                raise
            except AsyncStoreError as error:
                _log.warning("%s waits: %s", self._terms.handler, error)
                if not isinstance(error, _PASSING):
                    self._fail(error)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            await self._wait()

    async def _feed_once(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_sweep:
            self._next_sweep = now + self._sweep
            await self._find_domains()
            for feed in self._feeds.values():
                feed.look_by(now)
        elif self._new_domains:
            await self._find_domains()
        for feed in list(self._feeds.values()):
            if feed.next_look <= now and len(self._due) < self._room():
                await self._look(feed, now)
        count = min(self._room(), len(self._due))
        chosen = [self._due.popitem(last=False) for _ in range(count)]
        if chosen:
            await all_of(self._lease(*one) for one in chosen)

    def _room(self) -> int:
        return max(_AHEAD - len(self._ready), 0)

    async def _look(self, feed: _Feed, now: float) -> None:
        most = self._room() - len(self._due)
        polled = await feed.worklist.poll(most)
        for root in polled.due:
            aggregate = Aggregate(feed.worklist.domain, root, self._terms.edition)
            if aggregate not in self._held:
                self._due.setdefault(aggregate)
        if polled.changed:
            await feed.worklist.sweep(polled)
        if polled.changed or len(polled.due) == most:
            feed.next_look = now
        else:
            feed.next_look = now + self._sweep if polled.wait is None else now + polled.wait

    async def _wait(self) -> None:
        """Wait until there is something to do."""
        now = asyncio.get_running_loop().time()
        moment = self._next_sweep
        if self._room():
            if self._due:
                return
            moment = min([moment, *(feed.next_look for feed in self._feeds.values())])
        if moment > now and not self._wake.is_set():
            try:
                async with asyncio.timeout(moment - now):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _lease(self, aggregate: Aggregate, holder: str | None) -> None:
        """Lease an aggregate, if there is something to do in it."""
        if aggregate in self._held:
            return
        worklist = self._feeds[aggregate.domain].worklist
        held = self._held[aggregate] = _Held(aggregate, worklist)
        if holder is None:
            self._leases += 1
            holder = f"{self._worker}.{self._leases}"
        try:
            found = await worklist.lease(aggregate, holder, self._known.get(aggregate))
        except UnexpectedReply as error:
            # Something else is in its keys. The other aggregates must not wait for it.
            _log.error("%s can't go on with %s: %s", self._terms.handler, aggregate, error)
            self._let_go(held, is_due=False)
            return
        except BaseException:
            self._let_go(held, is_due=False)
            self._due[aggregate] = holder
            raise
        if isinstance(found, Leased):
            held.leased = found
            if found.events:
                self._offer(held)
            elif found.bad is not None:
                await self._refuse_bad(held)
            else:
                await self._pass_over(held)
        else:
            self._not_leased(held, found)

    async def _pass_over(self, held: _Held) -> None:
        """Forget a dead letter that was to be handled again, and whose event is gone."""
        leased = held.leased
        await held.worklist.ack(leased, (leased.through, leased.through_id), None)
        self._let_go(held, is_due=True)

    def _not_leased(self, held: _Held, found: NotLeased) -> None:
        self._let_go(held, is_due=found.why == "more" or (found.why == "idle" and held.was_rung))
        if found.why == "taken":
            self._look_by(held.aggregate.domain, found.numbers[0] / 1_000_000)
        elif found.why == "regressed":
            self._known.pop(held.aggregate, None)
            self._fail(HistoryRegressed(held.aggregate, *found.numbers))
        elif found.why == "unreadable":
            self._fail(CorruptPosition(self._keys.position(self._terms.handler, held.aggregate)))

    def _look_by(self, domain: str, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        self._feeds[domain].look_by(now + seconds)
        self._wake.set()

    # Domains

    async def _find_domains(self) -> None:
        """Begin in the domains that are there now, and were not before."""
        self._new_domains.clear()
        if self._domain is not None:
            if self._domain not in self._feeds:
                await self._begin(self._domain, None)
            return
        everywhere = Worklist(self._router, self._keys, EVERY_DOMAIN, ALL, self._terms)
        is_new = not self._feeds and await everywhere.subscribe() == "marking"
        for domain in await self._domains():
            if domain not in self._feeds:
                await self._begin(domain, None if is_new else "first")
        if is_new:
            await everywhere.sweep(await everywhere.poll(0))

    async def _domains(self) -> list[str]:
        key = self._keys.domains(ALL)
        reply = await self._router.read(forms.is_texts, "ZRANGE", key, "-", "+", "BYLEX")
        return [name.decode() for name in reply]

    async def _begin(self, domain: str, start: str | None) -> None:
        """Work on a domain. Where the handler does not begin at the first event, mark where."""
        worklist = Worklist(self._router, self._keys, domain, ALL, self._terms)
        state = await worklist.subscribe(start)
        while state == "marking":
            polled = await worklist.poll(0)
            places = [Aggregate(domain, root, self._terms.edition) for root, _ in polled.changed]
            starts = await self._progress.starts_of(places, await worklist.start())
            state = await worklist.sweep(polled, starts)
            if state == "moved":
                state = await worklist.subscribe(start)
        self._feeds[domain] = _Feed(worklist)

    # What the doorbell calls

    def heard(self, ring: Ring) -> None:
        """Note which aggregates have changed."""
        if ring.edition != self._terms.edition:
            return
        if ring.domain not in self._feeds:
            if self._domain is None:
                self._new_domains.add(ring.domain)
                self._wake.set()
            return
        for change in ring.changes():
            self._changed(Aggregate(ring.domain, change.root, ring.edition))

    def _changed(self, aggregate: Aggregate) -> None:
        held = self._held.get(aggregate)
        if held is not None:
            held.was_rung = True
        elif not self._due and len(self._hurried) < self._room() and self._state == "open":
            self._hurry(aggregate)
        elif len(self._due) < _MOST_RUNG:
            self._due.setdefault(aggregate)
            self._wake.set()

    def _hurry(self, aggregate: Aggregate) -> None:
        """Lease an aggregate now: by way of the feeder it would come some 40 microseconds later.

        If that fails it is among those that are due, and the feeder goes on with it.
        """
        task = asyncio.ensure_future(self._lease(aggregate, None))
        self._hurried.add(task)
        task.add_done_callback(self._hurry_ended)

    def _hurry_ended(self, task: asyncio.Task[None]) -> None:
        self._hurried.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._wake.set()

    def missed(self) -> None:
        """Look everywhere: nobody knows what has changed."""
        self._next_sweep = 0.0
        self._wake.set()

    # Keeping leases: the renewer's task

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._terms.lease / 3)
            self._drop_abandoned()
            try:
                await self._renew_all()
            except StoreClosed:
                return
            except AsyncStoreError as error:
                _log.warning("leases of %s were not renewed: %s", self._terms.handler, error)

    def _drop_abandoned(self) -> None:
        for held in self._all_held():
            if held.is_abandoned():
                self._let_go(held, is_due=False)
                self._look_by(held.aggregate.domain, 0)  # tells when the lease ends
        self._settled.set()

    async def _renew_all(self) -> None:
        held = self._all_held()
        for feed in list(self._feeds.values()):
            own = [one for one in held if one.worklist is feed.worklist]
            for start in range(0, len(own), _RENEWED_AT_ONCE):
                some = own[start : start + _RENEWED_AT_ONCE]
                kept = await feed.worklist.renew([one.leased for one in some])
                for one, is_kept in zip(some, kept, strict=True):
                    if not is_kept and self._held.get(one.aggregate) is one:
                        self._lose(one)

    def _lose(self, held: _Held) -> None:
        self._let_go(held, is_due=True)
        if held in self._ready:
            self._ready.remove(held)


def _count_up_to(events: Iterable[RecordedEvent], through: int | None) -> int:
    return sum(1 for event in events if through is None or event.sequence <= through)


def _short(reason: str) -> str:
    """Return a reason as a line of bounded length."""
    return " ".join(reason.split())[:100]
