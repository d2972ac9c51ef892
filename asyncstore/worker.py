"""What a worker of a handler has leased, who works on it, and what became of it.

`Subscription` is how applications see one.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import anyio

from asyncstore import keeping
from asyncstore.deliveries import Delivery, Held, Step
from asyncstore.errors import (
    AsyncStoreError,
    CorruptPosition,
    HistoryRegressed,
    LeaseLost,
    StoreClosed,
)
from asyncstore.feeding import MOST_LEASES, Feeder, Pace
from asyncstore.keeping import Kept
from asyncstore.keys import ALL
from asyncstore.memory import Memory
from asyncstore.observing import ERROR, HANDLER, SEQUENCE, UNOBSERVED, named, observed
from asyncstore.scouting import Domains
from asyncstore.sharing import all_of
from asyncstore.values import Aggregate
from asyncstore.worklist import GIVE_BACK, KEEP, NotLeased, Wanted, Worklist

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Sequence
    from contextlib import AbstractContextManager

    from asyncstore.doorbell import Change, Doorbell, Ring
    from asyncstore.feeding import Place
    from asyncstore.keys import Keys
    from asyncstore.nodes import Node
    from asyncstore.observing import Processing
    from asyncstore.registering import Registry
    from asyncstore.router import Router
    from asyncstore.sweeping import Sweeper
    from asyncstore.values import Appended
    from asyncstore.wire import Reply
    from asyncstore.worklist import Asked, Known, Leased, Terms
    from asyncstore.writing import Effects, Writer

_log = logging.getLogger(__name__)

_FEEDER: Final = "feeder"  # the name of such a task
_RENEWED_AT_ONCE: Final = 100
_CORRUPT_PAUSE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Means:
    """What all workers of a store share."""

    router: Router
    keys: Keys
    doorbell: Doorbell
    sweeper: Sweeper
    registry: Registry
    writer: Writer


class Worker:
    """Leases aggregates that a handler is behind in, a few ahead, and delivers their events.

    Keeps the leases while it lives. Several tasks may take deliveries at once.
    """

    def __init__(
        self, means: Means, domain: str | None, terms: Terms, *, sweep: float, close_timeout: float
    ) -> None:
        self.terms = terms
        self.close_timeout = close_timeout
        self._router = means.router
        self._keys = means.keys
        self._doorbell = means.doorbell
        self._sweeper = means.sweeper
        self._writer = means.writer
        self._sweep = sweep
        self._name = uuid4().hex
        self._leases = 0  # that were asked for
        self.domains = Domains(domain, terms, means.registry, means.keys, self._look_now)
        self._worklists: dict[Place, Worklist] = {}
        self._feeders: dict[Node, Feeder] = {}
        self._running_feeders: set[Feeder] = set()  # with those whose nodes have left
        self._held: dict[Aggregate, Held] = {}
        self._ready: deque[Held] = deque()  # with events that nobody has yet
        self._errors: deque[AsyncStoreError] = deque()  # to be raised where deliveries are taken
        self._memory = Memory()
        self._kept = Kept(lambda some: self._start(self._end_leases(some)))
        self._pace = Pace()
        self._takers: deque[asyncio.Future[None]] = deque()
        self._settled = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._state = "new"

    # Opening and closing

    async def open(self) -> None:
        """Register the handler, and begin to look for what it has to do."""
        if self._state != "new":
            raise StoreClosed("a subscription is entered once: call store.subscribe() again")
        try:
            await self.domains.begin()
            self._state = "open"
            self._doorbell.enlist(self)
            self._start(self._renew())
            if self.domains.may_grow:
                self._start(self.domains.scout())
            self._sweeper.join(self, self._sweep)
        except BaseException:
            self._state = "closed"
            await self._leave()
            raise

    async def close(self) -> None:
        """Wait for what others have in progress, with a limit, and give all leases back.

        What the leaving task itself has taken and not acked is given back at once.
        """
        self.stop()
        with anyio.CancelScope(shield=True):
            feeders = [task for task in self._tasks if task.get_name() == _FEEDER]
            if feeders:
                await asyncio.wait(feeders, timeout=self.close_timeout)
            with anyio.move_on_after(self.close_timeout):
                await self._wait_for_others(asyncio.current_task())
            await self._leave()
        self._state = "closed"

    async def _leave(self) -> None:
        """Give all back, and hear nothing more."""
        await self._sweeper.leave(self)
        self._kept.close()
        while tasks := list(self._tasks):  # an ack that is answered meanwhile may begin one
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await self._release_all()
        await self._doorbell.leave(self)

    def _start(self, work: Coroutine[Any, Any, None], name: str = "") -> None:
        task = asyncio.get_running_loop().create_task(work, name=name or None)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def stop(self) -> None:
        """Deliver nothing more: those who take deliveries come to an end."""
        if self._state == "open":
            self._state = "closing"
        for feeder in self._running_feeders:
            feeder.wake()
        for taker in self._takers:
            if not taker.done():
                taker.set_result(None)

    def give_up(self, delivery: Delivery) -> None:
        """Let a delivery come again when its lease ends."""
        delivery._held.delivery, delivery._held.task = _nobody, None
        self._settled.set()

    async def _wait_for_others(self, leaving: asyncio.Task[Any] | None) -> None:
        while any(held.is_in_progress() and held.task is not leaving for held in self._all_held()):
            self._settled.clear()
            await self._settled.wait()

    async def _release_all(self) -> None:
        held = self._all_held()
        self._held.clear()
        self._ready.clear()
        await self._release(held)

    async def _release(self, held: list[Held]) -> None:
        await all_of(self._release_at(*one) for one in self._by_place(held).items())

    async def _release_at(self, place: Place, held: list[Held]) -> None:
        try:
            for some in _parts(held):
                await self.worklist(place).release([one.leased for one in some])
        except AsyncStoreError as error:
            self._warn("leases were not given back and end by themselves: %s", error)

    def _warn(self, text: str, *facts: object) -> None:
        _log.warning(text, *facts, extra={HANDLER: self.terms.handler})

    def _by_place(self, held: list[Held]) -> dict[Place, list[Held]]:
        groups: dict[Place, list[Held]] = {}
        for one in held:
            groups.setdefault((one.worklist.domain, one.worklist.tag), []).append(one)
        return groups

    def _all_held(self) -> list[Held]:
        return [held for held in self._held.values() if hasattr(held, "leased")]

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if not isinstance(error, AsyncStoreError):
            _log.error(
                "a subscription of %s has failed",
                self.terms.handler,
                exc_info=error,
                extra={HANDLER: self.terms.handler},
            )
            error = StoreClosed(f"the subscription has failed ({type(error).__name__})")
        self.fail(error)
        self.stop()

    # Taking deliveries

    def take_ready(self, room: int) -> list[Delivery]:
        """Take what is there, whole, as far as there is room for events."""
        deliveries: list[Delivery] = []
        while self._ready and len(self._ready[0].leased.events) <= room:
            if self._ready[0].leased.attempt > 1:
                break  # it comes by itself: see `_begins`
            held = self._ready.popleft()
            if held.ends > _now():
                deliveries.append(self._deliver(held, room))
                room -= len(deliveries[-1].events)
            else:
                self._lose(held)
        return deliveries

    async def take(self, most: int) -> Delivery:
        """Return the next delivery, with so many events at most, or wait for it."""
        if self._state == "new":
            raise StoreClosed("use the subscription inside `async with store.subscribe(…) as sub:`")
        while True:
            if self._errors:
                raise self._errors.popleft()
            if self._state != "open":
                raise StopAsyncIteration
            if not self._ready:
                await self._wait_for_ready()
                continue
            held = self._ready.popleft()
            if held.ends <= _now():
                self._lose(held)  # others may have handled it since
            elif held.leased.attempt == 1 or await self._begins(held):
                return self._deliver(held, most)

    async def _begins(self, held: Held) -> bool:
        """Note that events are tried once more; return whether the lease still is ours.

        Only then it counts: a worker that dies takes with it what waited behind what it worked on.
        """
        try:
            is_ours = await held.worklist.begin(held.leased)
        except AsyncStoreError as error:
            self._say_it_waits(held, error)
            self._lease_again(held)
            return False
        except BaseException:
            self._ready.appendleft(held)
            self._wake_taker()
            raise
        if not is_ours or self._held.get(held.aggregate) is not held:
            self._lose(held)
            return False
        return self.is_open()  # if not, it is given back with the others

    def _lease_again(self, held: Held) -> None:
        """Let an aggregate go, and ask for it by the same name: the lease may still be ours."""
        self._let_go(held, is_due=False)
        self._feeder_of(held.worklist.tag).add(held.aggregate, held.leased.holder)

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

    def _deliver(self, held: Held, most: int) -> Delivery:
        events = list(islice(held.leased.events, most))
        delivery = Delivery(self, held, events)
        if delivery.attempt > 1:
            self._router.tally.redeliveries[self.terms.handler] += 1
        held.delivery = weakref.ref(delivery)
        held.task = asyncio.current_task()
        if self._pace.took(_now() - held.offered):
            self._give_back_surplus()
        if all(taker.done() for taker in self._takers):
            self._kept.give_back()  # nobody is free here, somebody else may be
        for feeder in self._running_feeders:
            feeder.refill()
        return delivery

    def _offer(self, held: Held) -> None:
        """Let somebody take the next events of an aggregate."""
        held.rest()
        held.offered = _now()
        # Every other time an event that kills its workers lets those go first that are leased with
        # it: they would wait for ever behind one that is tried for ever.
        if held.leased.attempt % 2:
            self._ready.append(held)
        else:
            self._ready.appendleft(held)
        self._wake_taker()

    def _give_back_surplus(self) -> None:
        """Let other workers have what was leased ahead when handlers were quicker."""
        surplus: list[Held] = []
        while len(self._ready) > self._pace.ahead:
            surplus.append(self._ready.pop())
        if surplus:
            for held in surplus:
                self._let_go(held, is_due=False)
            self._start(self._release(surplus))

    # What deliveries call

    def _observed(self, deliveries: Sequence[Delivery]) -> AbstractContextManager[Processing]:
        observer = self._router.observer
        return UNOBSERVED if observer is None else observer.process(deliveries)

    @observed("ack")
    async def _ack(
        self, delivery: Delivery, through: int | None, effects: Effects | None
    ) -> Appended | None:
        step = self._step(delivery, through)
        if step is None:
            return await self._acked_before(delivery, effects)
        held, appended = step.held, None
        if effects is None:
            outcome = await held.worklist.ack(held.leased, step.known, step.then)
        else:
            outcome, appended = await held.worklist.ack_and_append(
                held.leased, step.known, step.then, self._writer, effects
            )
        if step.is_late():
            self._acked_twice(step, outcome)
            return await self._acked_before(delivery, effects)
        delivery._appended = appended
        await self._acked(step, outcome)
        return await self._made_durable(delivery)

    @observed("ack")
    async def _ack_all(self, deliveries: Sequence[Delivery]) -> None:
        """Ack what is open of deliveries in one go, and then raise the first error."""
        errors: list[AsyncStoreError] = []
        steps: list[Step] = []
        for delivery in deliveries:
            try:
                step = None if delivery._is_refused else self._step(delivery)
            except LeaseLost as error:
                errors.append(error)
            else:
                steps += [step] if step is not None else []
        sent = [
            step.held.worklist.send_ack(step.held.leased, step.known, step.then) for step in steps
        ]
        replies = await asyncio.gather(*sent, return_exceptions=True)
        for step, reply in zip(steps, replies, strict=True):
            try:
                await self._answered(step, reply)
            except AsyncStoreError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _answered(self, step: Step, reply: Reply) -> None:
        outcome = _outcome(step.held, reply)
        if step.is_late():
            self._acked_twice(step, outcome)
        else:
            await self._acked(step, outcome)

    def _step(self, delivery: Delivery, through: int | None = None) -> Step | None:
        """Return what an ack is to record, None if that was done before."""
        count = delivery._count_up_to(through) - delivery._settled
        if count <= 0 and not delivery._is_refused:
            return None
        self._check_lease(delivery)
        step = Step.of(delivery, count)
        if step.then == GIVE_BACK and self._keeps(step.held):
            step.then = KEEP
        return step

    def _keeps(self, held: Held) -> bool:
        """Whether more is likely to come soon of an aggregate, and somebody will be free for it."""
        is_free = self.is_open() and not self._ready
        return is_free and self._memory.when(held.aggregate) > _now() - keeping.SOON

    async def _acked(self, step: Step, outcome: str) -> None:
        """Take notice of what the server says of an ack."""
        if outcome == "lost":
            raise self._lost(step.held, step.last)
        self._memory.note(step.held.aggregate, step.known, _now())
        step.take()
        if step.then in (GIVE_BACK, KEEP) and step.known != step.held.leased.last_seen():
            step.held.was_rung = True  # more was heard than this ack has told of
        await self._go_on(step.delivery, outcome)

    def _acked_twice(self, step: Step, outcome: str) -> None:
        """Take notice of what the second of two acks at once has done to a lease that is kept."""
        if outcome not in ("ok", "kept") and self._held.get(step.held.aggregate) is step.held:
            self._lose(step.held)

    async def _acked_before(self, delivery: Delivery, effects: Effects | None) -> Appended | None:
        """Return what the ack before has appended. One that had nothing can't be added to."""
        if effects is not None and delivery._appended is None:
            held, event = delivery._held, delivery.events[delivery._settled - 1]
            raise LeaseLost(self.terms.handler, held.aggregate, event.sequence)
        return await self._made_durable(delivery)

    async def _made_durable(self, delivery: Delivery) -> Appended | None:
        if delivery._appended is None:
            return None
        return await self._writer.make_durable(delivery._held.aggregate, delivery._appended)

    async def _go_on(self, delivery: Delivery, outcome: str) -> None:
        """Deliver what comes next of an aggregate, or let it go."""
        held, comes_next = delivery._held, bool(delivery._held.leased.events)
        if outcome in ("ok", "kept"):
            if delivery._settled < len(delivery.events):
                return  # the rest of a batch is still in progress
            if comes_next:
                self._offer(held)
            elif outcome == "kept":
                self._keep(held)
            else:
                await self._pass_over(held)
        else:
            self._let_go(held, is_due=outcome == "more" or held.was_rung)
        self._settled.set()

    # Leases that are kept: what comes next of such an aggregate is delivered as it is heard

    def _keep(self, held: Held) -> None:
        if self._held.get(held.aggregate) is not held:
            return  # all was given back meanwhile
        held.rest()
        if held.was_rung or not self.is_open():
            self._kept.give_back([held])
        else:
            self._kept.add(held)

    async def _end_leases(self, kept: list[Held]) -> None:
        """Give leases back; where there is more to do, by what the server says, do that."""
        sent = [
            held.worklist.send_ack(held.leased, held.leased.last_seen(), GIVE_BACK) for held in kept
        ]
        replies = await asyncio.gather(*sent, return_exceptions=True)
        for held, reply in zip(kept, replies, strict=True):
            try:
                outcome = _outcome(held, reply)
            except AsyncStoreError as error:
                self._say_it_waits(held, error)
                self._end_later(held)
            else:
                self._let_go(held, is_due=outcome != "idle" or held.was_rung)

    def _end_later(self, held: Held) -> None:
        """Try again to give a lease back, or leave it if it has ended by itself."""
        if held.ends <= _now():
            self._lose(held)
        elif self._held.get(held.aggregate) is held:
            self._kept.add(held)

    @observed("nack")
    async def _nack(self, delivery: Delivery, delay: float, reason: str) -> None:
        self._check_lease(delivery)
        event = delivery.events[delivery._settled]
        await self._refuse(delivery._held, (event.sequence, event.id.hex), delay, reason)
        delivery._is_refused = True
        self._settled.set()

    async def _refuse(self, held: Held, event: Known, delay: float, reason: str) -> None:
        outcome = await held.worklist.nack(held.leased, event, delay, _short(reason))
        if outcome == "lost":
            raise self._lost(held, event[0])
        if outcome == "buried":
            self._router.tally.dead_letters[self.terms.handler] += 1
            _log.warning(
                "%s: event %s of %s has become a dead letter (%s)",
                self.terms.handler, event[0], held.aggregate, _short(reason),
                extra={**self._about(held), SEQUENCE: event[0], ERROR: _short(reason)},
            )  # fmt: skip
        self._let_go(held, is_due=outcome in ("buried", "acked") or delay == 0)
        self._look_by(held.aggregate, delay)

    async def _pass_over(self, held: Held) -> None:
        """Say no to an event that can't be read, or forget a dead letter whose event is gone.

        If that can't be said the lease ends by itself, and somebody comes to it again.
        """
        leased, error = held.leased, held.leased.bad
        try:
            if error is None:
                await held.worklist.ack(leased, leased.last_seen(), GIVE_BACK)
                self._let_go(held, is_due=True)
            else:
                _log.error("%s can't go on: %s", self.terms.handler, error, extra=self._about(held))
                if leased.attempt > 1:
                    await held.worklist.begin(leased)  # or it would never be tried too often
                bad = (leased.bad_at, "")
                await self._refuse(held, bad, _CORRUPT_PAUSE, type(error).__name__)
        except AsyncStoreError as failure:
            self._say_it_waits(held, failure)
            self._let_go(held, is_due=True)

    def _say_it_waits(self, held: Held, error: AsyncStoreError) -> None:
        _log.warning("%s waits: %s", self.terms.handler, error, extra=self._about(held))

    def _about(self, held: Held) -> dict[str, Any]:
        return {HANDLER: self.terms.handler, **named(held.aggregate)}

    def _check_lease(self, delivery: Delivery) -> None:
        held = delivery._held
        if delivery._is_done() or self._held.get(held.aggregate) is not held:
            raise LeaseLost(self.terms.handler, held.aggregate, delivery.event.sequence)

    def _lost(self, held: Held, sequence: int) -> LeaseLost:
        self._let_go(held, is_due=False)
        self._look_by(held.aggregate, 0)
        self._settled.set()
        return LeaseLost(self.terms.handler, held.aggregate, sequence)

    def _let_go(self, held: Held, *, is_due: bool) -> None:
        if self._held.get(held.aggregate) is held:
            del self._held[held.aggregate]
            self._kept.drop(held)
        if is_due:
            self._feeder_of(held.worklist.tag).add(held.aggregate)

    # Finding work: what feeders call

    def share(self, asked: int) -> int:
        """Return how many aggregates a feeder may lease now, which has asked for some already.

        None, or so many that a call pays.
        """
        feeders, ready = max(len(self._feeders), 1), len(self._ready)
        room = (self._pace.ahead - ready) // feeders - asked
        is_supplied = bool(ready or asked)
        if is_supplied and room < max(min(MOST_LEASES, self._pace.ahead // (2 * feeders)), 1):
            return 0
        return max(room, 1)

    def is_open(self) -> bool:
        """Whether it takes any more."""
        return self._state == "open"

    def worklist(self, place: Place) -> Worklist:
        """Return the work at a place."""
        if place not in self._worklists:
            self._worklists[place] = Worklist(self._router, self._keys, *place, self.terms)
        return self._worklists[place]

    def is_held(self, aggregate: Aggregate) -> bool:
        """Whether it has leased an aggregate, or is about to."""
        return aggregate in self._held

    def new_holder(self) -> str:
        """Return a name that no other lease has."""
        self._leases += 1
        return f"{self._name}.{self._leases}"

    def place_of(self, aggregate: Aggregate) -> Place:
        """Return in which worklist an aggregate is."""
        return aggregate.domain, self._keys.tag_of(aggregate.root)

    def ask(
        self, place: Place, wanted: Sequence[tuple[Aggregate, str]], *, at_once: bool
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """Send for leases of a place; what is returned waits for them, and offers what there is."""
        worklist, ends = self.worklist(place), _now() + self.terms.lease
        asked = [
            Wanted(aggregate, holder, self._memory.known(aggregate))
            for aggregate, holder in wanted
            if aggregate not in self._held
        ]
        helds = [Held(one.aggregate, worklist, ends) for one in asked]
        self._held.update((held.aggregate, held) for held in helds)
        return partial(self._take_leases, helds, worklist, worklist.ask(asked, at_once=at_once))

    async def _take_leases(self, helds: list[Held], worklist: Worklist, asked: Asked) -> None:
        try:
            found = await worklist.leased(asked)
        except BaseException:
            for held in helds:
                self._let_go(held, is_due=False)
            raise
        odd = [held for held, one in zip(helds, found, strict=True) if self._is_odd(held, one)]
        for held in odd:
            await self._pass_over(held)

    def _is_odd(self, held: Held, found: Leased | NotLeased | AsyncStoreError) -> bool:
        """Offer what was leased; return whether it was, and holds nothing that can be handled."""
        if isinstance(found, NotLeased):
            self._not_leased(held, found)
        elif isinstance(found, AsyncStoreError):
            # Something else is in its keys. The other aggregates must not wait for it.
            what = f"{self.terms.handler} can't go on with {held.aggregate}"
            _log.error("%s: %s", what, found, extra=self._about(held))
            self._let_go(held, is_due=False)
            self._look_by(held.aggregate, self.terms.lease)
        else:
            held.leased = found
            if not found.events:
                return True
            self._offer(held)
        return False

    def fail(self, error: AsyncStoreError) -> None:
        """Have an error raised where deliveries are taken."""
        self._errors.append(error)
        self._wake_taker()

    def _not_leased(self, held: Held, found: NotLeased) -> None:
        self._let_go(held, is_due=found.why == "more" or (found.why == "idle" and held.was_rung))
        if found.why == "taken":
            self._look_by(held.aggregate, found.numbers[0] / 1_000_000)
        elif found.why == "regressed":
            self._memory.forget(held.aggregate)
            self._look_by(held.aggregate, self.terms.lease)
            self.fail(HistoryRegressed(held.aggregate, *found.numbers))
        elif found.why == "unreadable":
            self._look_by(held.aggregate, self.terms.lease)
            self.fail(CorruptPosition(self._keys.position(self.terms.handler, held.aggregate)))

    def _look_by(self, aggregate: Aggregate, seconds: float) -> None:
        """Look at the worklist of an aggregate in so many seconds, or before."""
        self._look_at(self.place_of(aggregate), seconds)

    def _look_now(self, place: Place) -> None:
        self._look_at(place, 0)

    def _look_at(self, place: Place, seconds: float) -> None:
        self._feeder_of(place[1]).look_by(place, _now() + seconds)

    def _feeder_of(self, tag: str) -> Feeder:
        """Return the feeder of the server that has a tag."""
        node, _ = self._router.home_of(tag)  # a tag is in its own slot, as a root is
        if node not in self._feeders:
            nodes = set(self._router.nodes())
            for other in [other for other in self._feeders if other not in nodes]:
                self._feeders.pop(other).retire()
            feeder = self._feeders[node] = Feeder(self, self.terms.handler)
            self._start(self._run(feeder), _FEEDER)
        return self._feeders[node]

    async def _run(self, feeder: Feeder) -> None:
        self._running_feeders.add(feeder)
        try:
            await feeder.run()
        finally:
            self._running_feeders.discard(feeder)

    # What the sweeper calls

    def moved(self, tags: Sequence[str]) -> None:
        """Look at what there is under these tags."""
        self.domains.moved(tags)

    # What the doorbell calls

    def heard(self, ring: Ring) -> None:
        """Note which aggregates have changed."""
        if ring.edition != self.terms.edition:
            return
        if ring.domain not in self.domains:
            self.domains.heard_of_another(ring)
            return
        for change in ring.changes():
            self._changed(Aggregate(ring.domain, change.root, ring.edition), change)

    def _changed(self, aggregate: Aggregate, change: Change) -> None:
        held = self._held.get(aggregate)
        if held is None:
            self._feeder_of(self._keys.tag_of(aggregate.root)).hear(aggregate)
            return
        held.hear(change)
        if held not in self._kept:
            return
        if held.was_rung or not held.leased.events:
            self._kept.give_back([held])  # the server says what there is, or passes over it
        else:
            self._kept.drop(held)
            self._offer(held)

    def missed(self, tags: Collection[str]) -> None:
        """Register again, if a failover may have lost that.

        The sweeper is told, too, and tells what there is to look at.
        """
        if self._keys.tag_of(ALL) in tags and self.is_open():
            self._start(self._register_again())

    async def _register_again(self) -> None:
        try:
            await self.domains.keep()
        except AsyncStoreError as error:
            self._warn("%s was not registered again: %s", self.terms.handler, error)

    # Keeping leases: the renewer's task

    async def _renew(self) -> None:
        under_way: set[Place] = set()
        async with asyncio.TaskGroup() as renewals:
            while True:
                await asyncio.sleep(self.terms.lease / 3)
                self._drop_abandoned()
                # A server that does not answer must not keep us from renewing at the others.
                for place, some in self._by_place(self._all_held()).items():
                    if place not in under_way:
                        under_way.add(place)
                        renewals.create_task(self._renew_at(place, some, under_way))

    async def _renew_at(self, place: Place, held: list[Held], under_way: set[Place]) -> None:
        try:
            for some in _parts(held):
                await self._renew_some(self.worklist(place), some)
        except StoreClosed:
            return
        except AsyncStoreError as error:
            self._warn("leases of %s were not renewed: %s", self.terms.handler, error)
        finally:
            under_way.discard(place)

    def _drop_abandoned(self) -> None:
        for held in self._all_held():
            if held.is_abandoned():
                self._let_go(held, is_due=False)
                self._look_by(held.aggregate, 0)  # tells when the lease ends
        self._settled.set()

    async def _renew_some(self, worklist: Worklist, some: list[Held]) -> None:
        ends = _now() + self.terms.lease
        kept = await worklist.renew([one.leased for one in some])
        for one, is_kept in zip(some, kept, strict=True):
            if is_kept:
                one.ends = ends
            elif self._held.get(one.aggregate) is one:
                self._lose(one)

    def _lose(self, held: Held) -> None:
        self._let_go(held, is_due=True)
        if held in self._ready:
            self._ready.remove(held)


def _parts(held: list[Held]) -> list[list[Held]]:
    """Return them in parts that go in a call each."""
    return [held[n : n + _RENEWED_AT_ONCE] for n in range(0, len(held), _RENEWED_AT_ONCE)]


def _outcome(held: Held, reply: Reply) -> str:
    """Return what is left by the answer to an ack that travelled with others."""
    if isinstance(reply, BaseException):
        raise reply
    return held.worklist.acked(reply)


def _nobody() -> None:
    """Stand for a delivery that nobody works on any more."""


def _now() -> float:
    return asyncio.get_running_loop().time()


def _short(reason: str) -> str:
    """Return a reason as a line of bounded length."""
    return " ".join(reason.split())[:100]
