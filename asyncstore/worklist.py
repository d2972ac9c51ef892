"""What a handler has to do in one domain and edition, as the server keeps it.

All aggregates that the handler is behind in are either among those that are due, or in the index of
roots after the commit number up to which that was swept. Both are on the server, and change in
one step, so nothing is passed over whoever dies when, and a failover takes back all of it alike.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal

from asyncstore import codec, forms, scripts
from asyncstore.acks import Acks
from asyncstore.errors import AsyncStoreError, CorruptEvent
from asyncstore.names import MAIN
from asyncstore.recorded import RecordedEvent, event_of_member
from asyncstore.values import Aggregate
from asyncstore.writing import Ack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from asyncstore.doorbell import Change
    from asyncstore.keys import Keys, Places
    from asyncstore.router import Router
    from asyncstore.values import Appended, Start
    from asyncstore.wire import Argument, Reply
    from asyncstore.writing import Effects, Writer

PAGE: Final = 200  # roots that are looked at in one call: less than a millisecond of the server
_MOMENT: Final = 2_000_000  # microseconds in which those that are due can be leased
_SEQUENCE: Final = re.compile(rb"\[(\d+),")
_MISSING: Final = "the event is missing, or at another place"

Known = tuple[int, str]
"""The sequence of an event and its id in hexadecimal."""

GIVE_BACK: Final = ""
KEEP: Final = "keep"

Then = int | Literal["", "keep"]
"""What becomes of a lease behind an ack: the sequence that is handed out next, or see ack.lua."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a handler works; see `Store.subscribe`."""

    handler: str
    edition: str
    start: Start | datetime
    types: frozenset[str] | None
    batch: int
    lease: float
    retries: int | None

    def lease_arguments(self) -> list[Argument]:
        """Return what lease.lua wants to know of all leases, before the types."""
        retries = "" if self.retries is None else self.retries
        return [self.handler, to_microseconds(self.lease), self.batch, retries]

    def type_arguments(self) -> list[Argument]:
        """Return the types as they stand in the header of an event."""
        return [] if self.types is None else [codec.encode_type(name) for name in self.types]


@dataclass(frozen=True, slots=True)
class Polled:
    """What there was to do: changed roots with their commits, and roots that are due.

    `wait` is how many seconds it is until the next one is due, None if there is none.
    """

    swept: int
    changed: list[tuple[str, int]]
    due: list[str]
    wait: float | None


@dataclass(slots=True)
class Leased:
    """Events that were leased to this worker, and what became of the rest.

    `through` is the last sequence that was looked at, with the id there. `bad` is an event that
    comes after `events`, and can't be read; `bad_at` is its sequence. `keys` are its own
    of ack.lua, `places` those of its events.
    """

    aggregate: Aggregate
    holder: str
    token: int
    attempt: int
    through: int
    through_id: str
    is_again: bool
    keys: list[str]
    places: Places
    events: deque[RecordedEvent] = field(default_factory=deque)
    bad: CorruptEvent | None = None
    bad_at: int = 0

    def stop_at(self, sequence: int, why: str) -> None:
        """Note that an event can't be read."""
        self.bad = CorruptEvent(self.places.key_at(sequence), sequence, why)
        self.bad_at = sequence

    def last_seen(self) -> Known:
        """Return the last event that was looked at."""
        return self.through, self.through_id


@dataclass(frozen=True, slots=True)
class NotLeased:
    """Why an aggregate was not leased; for `numbers` see lease.lua."""

    why: str
    numbers: list[int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """An aggregate to be leased, for whom, and what was done last of it."""

    aggregate: Aggregate
    holder: str
    known: Known | None


@dataclass(frozen=True, slots=True)
class Asked:
    """Leases that were sent for, the keys of each, and what will be the answer."""

    wanted: Sequence[Wanted]
    own: list[list[str]]
    reply: asyncio.Future[Reply]


@dataclass(frozen=True, slots=True)
class Worklist:
    """The work of one handler in one domain and edition, as far as it is under one tag."""

    _router: Router
    _keys: Keys
    domain: str
    tag: str
    terms: Terms
    _acks: Acks = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_acks", Acks(self._router, self._due()))

    async def poll(self, most_due: int) -> Polled:
        """Return what there is to do."""
        where = [self._subscription(), self._roots(), self._due()]
        swept, changed, due, wait = await self._router.run(
            scripts.POLL, where, [PAGE, most_due, _MOMENT]
        )
        return Polled(
            int(swept),
            [(root.decode(), int(float(score))) for root, score in forms.pairs_of(changed)],
            [root.decode() for root in due],
            int(wait) / 1_000_000 if wait else None,
        )

    async def sweep(self, polled: Polled) -> bool:
        """Put changed roots among those that are due; return whether there is more to look at."""
        outcome = await self._sweep(polled, "", ())
        return len(polled.changed) == PAGE or bool(outcome != [b"swept", b""])

    async def mark(self, polled: Polled, starts: Sequence[int | None]) -> bool:
        """Put positions at `starts` where there are none; return whether all have one now."""
        return bool(await self._sweep(polled, "mark", starts) == [b"marked"])

    async def _sweep(self, polled: Polled, mode: str, starts: Sequence[int | None]) -> Reply:
        where = [self._subscription(), self._due()]
        arguments: list[Argument] = [self.terms.handler, mode, polled.swept]
        arguments.append(polled.changed[-1][1] if polled.changed else polled.swept)
        arguments.append("last" if len(polled.changed) < PAGE else "")
        arguments.append(len(self._own_keys(Aggregate(MAIN, MAIN, self.terms.edition))))
        for place, (root, _) in enumerate(polled.changed):
            where += self._own_keys(Aggregate(self.domain, root, self.terms.edition))
            start = starts[place] if starts else None
            arguments += [root, "" if start is None else start]
        return await self._router.run(scripts.SWEEP, where, arguments)

    def ask(self, wanted: Sequence[Wanted], *, at_once: bool) -> Asked:
        """Send for leases: at once, or with what else this turn of the event loop has to send."""
        reply = asyncio.get_running_loop().create_future()
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may leave
        if not wanted:
            reply.set_result([])
            return Asked(wanted, [], reply)
        own = [self._own_keys(one.aggregate) for one in wanted]
        where = list(chain([self._due(), self._dead_letters()], *own))
        types = self.terms.type_arguments()
        about = [*self.terms.lease_arguments(), len(own[0]), len(types), *types]
        for one in wanted:
            about += (one.aggregate.root, one.holder, *(one.known or ("", "")))
        try:
            self._router.send(scripts.LEASE, where, about, [reply], at_once=at_once)
        except AsyncStoreError as error:
            reply.set_exception(error)
        return Asked(wanted, own, reply)

    async def leased(self, asked: Asked) -> list[Leased | NotLeased | AsyncStoreError]:
        """Return what was leased, with its events; what is wrong with one is its error."""
        reply = await asked.reply
        replies = self._router.answers.believed(reply, scripts.LEASE.name, scripts.LEASE.form)
        if len(replies) != len(asked.wanted):
            raise self._router.answers.misfit(scripts.LEASE.name)
        return list(map(self._leased, asked.wanted, asked.own, replies))

    def _leased(
        self, wanted: Wanted, own: list[str], reply: list[Reply]
    ) -> Leased | NotLeased | AsyncStoreError:
        tag, *rest = reply
        if tag == b"error":
            return self._router.answers.refused(scripts.LEASE.name, rest[0].decode())
        if tag not in (b"leased", b"again"):
            return NotLeased(tag.decode(), rest)
        token, attempt, first, through, through_id, diverged_at, members = rest
        position, lease, _, *timeline = own
        leased = Leased(
            wanted.aggregate,
            wanted.holder,
            token,
            attempt,
            through,
            through_id.decode(),
            tag == b"again",
            [position, lease, *timeline[:3]],  # not `attached`
            self._keys.places(wanted.aggregate, int(diverged_at or 0)),
        )
        due = first if self.terms.types is None else None
        self._decode(leased, members, due)
        if leased.events and leased.events[-1]._sequence == through:
            leased.through_id = leased.events[-1]._hex_id()
        return leased

    def _decode(self, leased: Leased, members: Iterable[bytes], due: int | None) -> None:
        for member in members:
            try:
                event = event_of_member(leased.aggregate, leased.places, member)
                if due is not None and event._sequence != due:
                    raise codec.Undecodable(_MISSING)
            except codec.Undecodable as error:
                found = _SEQUENCE.match(member) if due is None else None
                leased.stop_at(int(found[1]) if found else due or 0, str(error))
                return
            leased.events.append(event)
            if due is not None:
                due += 1
        if due is not None and due <= leased.through and not leased.is_again:
            leased.stop_at(due, _MISSING)

    def add_heard(self, leased: Leased, change: Change) -> bool:
        """Add events that a ring has brought to those that were leased, if they follow on them."""
        room = self.terms.batch - len(leased.events)
        is_next = change.first == leased.through + 1 and leased.bad is None and not leased.is_again
        if not is_next or not 0 < len(change.members) == change.length <= room:
            return False
        where = leased.aggregate, leased.places
        try:
            events = [event_of_member(*where, member) for member in change.members]
        except codec.Undecodable:
            return False
        if any(event.sequence != due for due, event in enumerate(events, change.first)):
            return False
        types = self.terms.types
        leased.events += [event for event in events if types is None or event.type in types]
        leased.through, leased.through_id = events[-1].sequence, events[-1]._hex_id()
        return True

    async def begin(self, leased: Leased) -> bool:
        """Note that events that were leased before are tried now; return whether they may be."""
        _, lease, *_ = leased.keys
        (outcome,) = await self._router.run(scripts.BEGIN, [lease], [leased.holder])
        return bool(outcome == b"ok")

    async def ack(self, leased: Leased, known: Known, then: Then) -> str:
        """Record what was done; return what is left: see ack.lua."""
        return self.acked(await self.send_ack(leased, known, then))

    def send_ack(self, leased: Leased, known: Known, then: Then) -> asyncio.Future[Reply]:
        """Begin to record what was done: what many begin in one turn travels together."""
        return self._acks.send(leased.keys, _ack_arguments(leased, known, then))

    def acked(self, reply: Reply) -> str:
        """Return what is left, by the answer to an ack."""
        parts = self._router.answers.checked(reply, scripts.ACK.name)
        if forms.is_one_text(parts):
            return str(parts[0].decode())
        if forms.is_failure(parts):
            raise self._router.answers.refused(scripts.ACK.name, parts[1].decode())
        raise self._router.answers.misfit(scripts.ACK.name)

    async def ack_and_append(
        self,
        leased: Leased,
        known: Known,
        then: Then,
        writer: Writer,
        effects: Effects,
    ) -> tuple[str, Appended | None]:
        """Record what was done, and append events in the same step: see ack_append.lua."""
        ack = Ack([self._due(), *leased.keys[:2]], _ack_arguments(leased, known, then))
        return await writer.store_with_ack(leased.aggregate, effects, ack)

    async def nack(self, leased: Leased, event: Known, delay: float, reason: str) -> str:
        """Record that an event could not be handled; return what became of it: see nack.lua."""
        position, lease, *_ = self._own_keys(leased.aggregate)
        where = [self._due(), self._dead_letters(), position, lease]
        retries = "" if self.terms.retries is None else self.terms.retries
        arguments: list[Argument] = [leased.aggregate.root, leased.holder, *event]
        arguments += [to_microseconds(delay), retries, reason]
        arguments.append("again" if leased.is_again else "")
        (outcome,) = await self._router.run(scripts.NACK, where, arguments)
        return str(outcome.decode())

    async def renew(self, leases: Sequence[Leased]) -> list[bool]:
        """Make leases last longer; return which of them are still ours."""
        arguments: list[Argument] = [to_microseconds(self.terms.lease)]
        replies = await self._router.run(
            scripts.RENEW, self._lease_keys(leases), [*arguments, *_named(leases)]
        )
        return [reply == b"ok" for reply in replies]

    async def release(self, leases: Sequence[Leased]) -> None:
        """Give back leases of which nothing was tried."""
        where = [self._keys.commits(self.tag), *self._lease_keys(leases)]
        await self._router.run(scripts.RELEASE, where, _named(leases))

    def _lease_keys(self, leases: Sequence[Leased]) -> list[str]:
        handler = self.terms.handler
        return [self._due(), *(self._keys.lease(handler, one.aggregate) for one in leases)]

    def _own_keys(self, aggregate: Aggregate) -> list[str]:
        """Return position, lease, handlers, and what it takes to read the timeline, attached."""
        handler = self.terms.handler
        own = [
            self._keys.position(handler, aggregate),
            self._keys.lease(handler, aggregate),
            self._keys.handlers(aggregate),
            *self._keys.timeline(aggregate),
        ]
        if aggregate.edition != MAIN:
            own.append(self._keys.attached_of(aggregate))
        return own

    def _place(self) -> tuple[str, str, str, str]:
        return self.terms.handler, self.domain, self.terms.edition, self.tag

    def _roots(self) -> str:
        return self._keys.roots(self.domain, self.terms.edition, self.tag)

    def _subscription(self) -> str:
        return self._keys.subscription(*self._place())

    def _due(self) -> str:
        return self._keys.due(*self._place())

    def _dead_letters(self) -> str:
        return self._keys.dead_letters(*self._place())


def _ack_arguments(leased: Leased, known: Known, then: Then) -> list[Argument]:
    again = "again" if leased.is_again else ""
    return [leased.aggregate.root, leased.holder, *known, then, again]


def _named(leases: Iterable[Leased]) -> list[Argument]:
    return [text for leased in leases for text in (leased.aggregate.root, leased.holder)]


def to_microseconds(seconds: float) -> int:
    """Return whole microseconds."""
    return round(seconds * 1_000_000)
