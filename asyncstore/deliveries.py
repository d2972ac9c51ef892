"""What handlers get: deliveries of events, bundles of them, and how far they are settled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from asyncstore.errors import InvalidValue
from asyncstore.names import check_seconds
from asyncstore.values import ANY, Source, check_batch, check_expected, check_trace
from asyncstore.worklist import GIVE_BACK
from asyncstore.writing import Effects

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from asyncstore.doorbell import Change
    from asyncstore.observing import Processing
    from asyncstore.recorded import RecordedEvent
    from asyncstore.values import Aggregate, Appended, Event, Expected, Trace
    from asyncstore.worklist import Known, Leased, Then, Worklist


class Settler(Protocol):
    """The subscription, as its deliveries know it.

    Each knows of the other what begins with an underscore: users have both, and that is not theirs.
    """

    async def _ack(
        self, delivery: Delivery, through: int | None, effects: Effects | None
    ) -> Appended | None:
        """Record that events were handled, all or up to a sequence, and append what follows."""

    async def _ack_all(self, deliveries: Sequence[Delivery]) -> None:
        """Record that all events of many were handled."""

    async def _nack(self, delivery: Delivery, delay: float, reason: str) -> None:
        """Record that the first event that is not settled could not be handled."""

    def _observed(self, deliveries: Sequence[Delivery]) -> AbstractContextManager[Processing]:
        """Return a context in which the store's observer sees them being handled."""


class Delivery:
    """One event, or some of one aggregate, and the duty to say what became of them.

    No other events of the aggregate are delivered to any worker of the handler before that. If it
    is neither acked nor nacked, and nobody holds it any more, they come again when the lease ends.
    """

    __slots__ = (
        "__weakref__",
        "_appended",
        "_held",
        "_is_refused",
        "_settled",
        "_subscription",
        "attempt",
        "events",
        "token",
    )

    def __init__(self, subscription: Settler, held: Held, events: list[RecordedEvent]) -> None:
        self._subscription = subscription
        self._held = held
        self._settled = 0  # of the events
        self._is_refused = False
        self._appended: Appended | None = None  # with the last ack
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

    async def ack(
        self,
        *,
        through: int | None = None,
        append: Iterable[Event] = (),
        expected: Expected = ANY,
        idempotency_key: str | None = None,
        correlation_id: str | None = None,
        source: Source | None = None,
    ) -> Appended | None:
        """Record that the events were handled: they are never delivered to the handler again.

        `through` is the last sequence of a batch that was; the others stay to be acked or nacked.
        A second ack changes nothing. Raises `LeaseLost` when the lease has ended or was given back:
        then they are delivered again, or have been. After `StoreUnavailable` and `OutcomeUnknown`
        it can be called again, with the same arguments.

        `append` are events that follow from those that were handled. They are appended to the same
        aggregate, on its edition, in the step that records the ack: both happen, once, or neither,
        also when the answer is lost or the lease is. Returns what was appended, or None where
        there was nothing to append. The handler gets these events too, unless `types` leaves them
        out: it must know its own. They are as durable as the settings say of appends.

        The other arguments are those of `Events.append`. `expected` is ANY by default: others may
        have appended since the delivery, and the effects are right all the same. Where they follow
        from the state, give the next sequence of what was folded, or that after the handled event.
        If the aggregate is not there, `SequenceConflict`: nothing is appended nor acked; decide
        anew and ack again, or `nack`. `source` is the last event that is acked, if none is given;
        `correlation_id` is that event's, an empty text means none. If the idempotency key was used
        before, it is an ack that appends nothing, and returns the sequences of that time.
        """
        effects = None
        batch = check_batch("append", append)
        if batch:
            handled = self.events[: self._count_up_to(through)]
            if not handled:
                raise InvalidValue("append", f"no event is acked with it: through={through}")
            trace = _trace_of(handled[-1], idempotency_key, correlation_id, source)
            effects = Effects(batch, _expected_after(handled[-1], expected), trace)
        return await self._subscription._ack(self, through, effects)

    async def nack(self, *, delay: float = 0.0, reason: str = "") -> None:
        """Record that the first event could not be handled: it comes again in `delay` seconds.

        After as many retries as the subscription allows it becomes a dead letter with the reason,
        and the aggregate goes on behind it. Give a short reason without data, such as the name of
        an exception. Raises `LeaseLost` as `ack` does.
        """
        check_seconds("delay", delay)
        await self._subscription._nack(self, delay, reason)

    def observed(self) -> AbstractContextManager[Processing]:
        """Return a context in which the events are handled, for the store's observer to see it.

        A span, if `asyncstore.telemetry` was asked for: see there.
        """
        return self._subscription._observed([self])

    @property
    def handler(self) -> str:
        """The name of the handler that it is for."""
        return self._held.worklist.terms.handler

    def _count_up_to(self, through: int | None) -> int:
        if through is None:
            return len(self.events)
        return sum(1 for event in self.events if event.sequence <= through)

    def _is_done(self) -> bool:
        return self._is_refused or self._settled == len(self.events)

    def __repr__(self) -> str:
        first, last = self.events[0].sequence, self.events[-1].sequence
        which = f"{first}" if first == last else f"{first} to {last}"
        return f"<Delivery {self._held.aggregate} {which} attempt={self.attempt}>"


class Bundle:
    """Deliveries of several aggregates that are handled together, and acked in one go."""

    __slots__ = ("_subscription", "deliveries", "events")

    def __init__(self, subscription: Settler, deliveries: list[Delivery]) -> None:
        self._subscription = subscription
        self.deliveries = deliveries
        """One of each aggregate; each can be acked or nacked by itself."""
        self.events: list[RecordedEvent] = [
            event for delivery in deliveries for event in delivery.events
        ]
        """All events, those of an aggregate one after the other."""

    async def ack(self) -> None:
        """Ack all deliveries that were neither acked nor nacked.

        Each has an answer of its own: where one can't be acked, the others are all the same, and
        then its error is raised; see `Delivery.ack`. After `StoreUnavailable` and `OutcomeUnknown`
        it can be called again.
        """
        await self._subscription._ack_all(self.deliveries)

    def observed(self) -> AbstractContextManager[Processing]:
        """Return a context in which the events are handled; see `Delivery.observed`."""
        return self._subscription._observed(self.deliveries)

    def __repr__(self) -> str:
        return f"<Bundle of {len(self.deliveries)} aggregates, {len(self.events)} events>"


@dataclass(slots=True, eq=False)
class Held:
    """An aggregate that this worker has leased, or is about to."""

    aggregate: Aggregate
    worklist: Worklist
    ends: float  # when the lease may end, by the clock of the event loop, unless renewed
    leased: Leased = field(init=False)
    offered: float = 0.0  # when it was, to whoever takes it
    delivery: Callable[[], Delivery | None] | None = None  # what is in progress, or was
    task: asyncio.Task[Any] | None = None  # that took the delivery
    was_rung: bool = False  # more was appended since we asked last
    is_leaving: bool = False  # its lease is given back

    def hear(self, change: Change) -> None:
        """Take events along that a ring has brought, or note that there are more."""
        is_ours = hasattr(self, "leased") and not self.is_leaving
        if not is_ours or not self.worklist.add_heard(self.leased, change):
            self.was_rung = True

    def rest(self) -> None:
        """Note that nobody works on it."""
        self.delivery, self.task = None, None

    def is_in_progress(self) -> bool:
        """Whether somebody works on it."""
        return self.delivery is not None and self.delivery() is not None

    def is_abandoned(self) -> bool:
        """Whether it was delivered, and nobody can ack it any more."""
        return self.delivery is not None and self.delivery() is None


@dataclass(slots=True)
class Step:
    """What an ack records: the first `count` events that are not settled."""

    delivery: Delivery
    held: Held
    settled: int  # before
    count: int
    known: Known
    then: Then

    @classmethod
    def of(cls, delivery: Delivery, count: int) -> Step:
        """Return the step that settles so many more."""
        held, leased, settled = delivery._held, delivery._held.leased, delivery._settled
        following = leased.events[count].sequence if count < len(leased.events) else None
        if following is None and leased.bad is not None:
            following = leased.bad_at
        last = delivery.events[settled + count - 1]
        known = (last.sequence, last._hex_id())
        if following is None:
            known, held.was_rung = leased.last_seen(), False
        then: Then = GIVE_BACK if following is None else following
        return cls(delivery, held, settled, count, known, then)

    @property
    def last(self) -> int:
        """The last sequence that it settles."""
        return self.delivery.events[self.settled + self.count - 1].sequence

    def is_late(self) -> bool:
        """Whether another ack has settled them meanwhile."""
        return self.delivery._settled != self.settled

    def take(self) -> None:
        """Note that it was recorded."""
        self.delivery._settled += self.count
        for _ in range(self.count):
            self.held.leased.events.popleft()
        self.held.leased.attempt = 1


def _trace_of(
    event: RecordedEvent,
    idempotency_key: str | None,
    correlation_id: str | None,
    source: Source | None,
) -> Trace:
    """Return what is said of the effects of an event; what is not given is that of the event."""
    if source is None:
        place = event.aggregate
        source = Source(place.domain, place.root, place.edition, event.sequence)
    if correlation_id is None:
        correlation_id = event.correlation_id
    return check_trace(idempotency_key, correlation_id, source)


def _expected_after(event: RecordedEvent, expected: Expected) -> Expected:
    """Return `expected`, which must not be before what was handled."""
    wanted = check_expected(expected)
    if wanted is not ANY and wanted <= event.sequence:
        why = f"event {event.sequence} was handled, and what follows from it comes after that"
        raise InvalidValue("expected", why)
    return wanted
