"""Storing events: what an append is for append.lua, and the way there."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncstore import codec, forms, keys, scripts
from asyncstore.errors import (
    AsyncStoreError,
    DurabilityNotReached,
    EventTooLarge,
    HistoryRegressed,
    SequenceConflict,
    StoreUnavailable,
)
from asyncstore.names import MAIN
from asyncstore.values import (
    ANY,
    NO_TRACE,
    Aggregate,
    Appended,
    Durability,
    Event,
    Expected,
    Trace,
    check_durability,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncstore.durability import Reached
    from asyncstore.erasing import Eraser
    from asyncstore.keys import Keys
    from asyncstore.router import Router
    from asyncstore.wire import Argument

Outcome = tuple[list[Any], "Reached | None"]
"""What append.lua answers, and what was reached of the level if one was wanted."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one append may hold; see Settings."""

    max_event_bytes: int
    max_append_bytes: int
    max_append_events: int


@dataclass(frozen=True, slots=True)
class Effects:
    """Events that a handler appends in the step of its ack, and how; see `Delivery.ack`."""

    events: list[Event]
    expected: Expected
    trace: Trace


@dataclass(frozen=True, slots=True)
class Ack:
    """What ack.lua has of an ack, without the keys of the timeline."""

    keys: list[str]
    arguments: list[Argument]


@dataclass(frozen=True, slots=True)
class Writer:
    """Stores events."""

    _router: Router
    _keys: Keys
    _eraser: Eraser
    _limits: Limits
    _durability: Durability  # of appends that name none
    _erasures: dict[str, int] = field(default_factory=dict)  # by tag, as far as known

    def level(self, durability: Durability | None) -> Durability:
        """Return the level of an append that names this one, or none."""
        return self._durability if durability is None else check_durability(durability)

    async def store(
        self,
        aggregate: Aggregate,
        batch: list[Event],
        expected: Expected,
        trace: Trace,
        wanted: Durability,
        *,
        missed: bool,
    ) -> Outcome:
        """Append events; with `missed`, a conflict has those that the caller has missed."""
        encoded, size = self._encode(batch, trace)
        letters = "m" if missed else ""
        if wanted is not Durability.MEMORY:
            letters += "d"
        place = "" if expected is ANY else str(expected)
        about: list[Argument] = [aggregate.root, place, len(batch)]
        if self._keys.by_slot and trace.correlation_id is not None:
            send = partial(self._send, aggregate, about, encoded, size, wanted)
            return await self._send_indexed(aggregate, trace, letters, send)
        where, options = self._keys_of(aggregate, trace), _options(letters, trace)
        return await self._send(aggregate, about, encoded, size, wanted, where, options)

    async def prove(self, aggregate: Aggregate, wanted: Durability) -> tuple[int, Reached]:
        """Have a level proven for all events of an aggregate, with an append of none.

        Returns the sequence after the last of them, and what was reached.
        """
        where, options = self._keys_of(aggregate, NO_TRACE), _options("d", NO_TRACE)
        about: list[Argument] = [aggregate.root, "", 0]
        parts, reached = await self._send(aggregate, about, [], 0, wanted, where, options)
        if parts[0] != b"ok" or reached is None:
            raise self.refusal(aggregate, ANY, parts)
        return int(parts[1]), reached

    async def store_with_ack(
        self, aggregate: Aggregate, effects: Effects, ack: Ack
    ) -> tuple[str, Appended | None]:
        """Append events in one step with an ack: see ack_append.lua.

        Returns what ack.lua says, and what was appended: None when the lease was lost.
        """
        batch, expected, trace = effects.events, effects.expected, effects.trace
        encoded, _ = self._encode(batch, trace)
        if self._durability is not Durability.MEMORY:
            # What is there already is proven afterwards: see `prove`.
            born = self._router.loop().time()
            await self._router.appender(aggregate.root, self._durability, born)
        place = "" if expected is ANY else str(expected)
        about: list[Argument] = [aggregate.root, place, len(batch)]
        send = partial(self._send_with_ack, aggregate, ack, about, encoded)
        if self._keys.by_slot and trace.correlation_id is not None:
            parts, outcome = await self._send_indexed(aggregate, trace, "", send)
        else:
            parts, outcome = await send(self._keys_of(aggregate, trace), _options("", trace))
        if outcome == "lost":
            return outcome, None
        done = stored(parts, len(batch), expected, trace)
        if done is None:
            raise self.refusal(aggregate, expected, parts)
        return outcome, done

    async def make_durable(self, aggregate: Aggregate, done: Appended) -> Appended:
        """Return what was appended once it has the level of appends that name none."""
        if self._durability is Durability.MEMORY:
            return done
        _, reached = await self.prove(aggregate, self._durability)
        return proven(aggregate, done, self._durability, reached)

    def refusal(
        self, aggregate: Aggregate, expected: Expected, parts: list[Any]
    ) -> AsyncStoreError:
        """Return what it means when append.lua has not stored the events."""
        tag, value = parts[:2]
        if tag == b"error":
            return self._router.answers.refused("append", value.decode(errors="replace"))
        if tag == b"regressed" and expected is not ANY:
            return HistoryRegressed(aggregate, expected, value)
        if tag == b"conflict" and expected is not ANY:
            return SequenceConflict(aggregate, expected, value)
        return self._router.answers.misfit("append")

    async def _send(
        self,
        aggregate: Aggregate,
        about: list[Argument],
        encoded: list[bytes],
        size: int,
        wanted: Durability,
        where: list[str],
        options: list[Argument],
    ) -> Outcome:
        about = [*about, *options]
        node, slot = self._router.home_of(aggregate.root)
        if wanted is Durability.MEMORY:
            reply = await node.appender.send(aggregate, where, about, encoded, size, slot)
            reached = None
        else:
            born = self._router.loop().time()
            appender = node.ready(wanted)
            appender = appender or await self._router.appender(aggregate.root, wanted, born)
            answer = await appender.send(aggregate, where, about, encoded, size, slot, born)
            reply, reached = node.reached(wanted, answer)
        parts = self._router.answers.checked(reply, "append")
        if not forms.is_appended(parts):
            raise self._router.answers.misfit("append")
        return parts, reached

    async def _send_with_ack(
        self,
        aggregate: Aggregate,
        ack: Ack,
        about: list[Argument],
        encoded: list[bytes],
        where: list[str],
        options: list[Argument],
    ) -> tuple[list[Any], str]:
        """Return what append.lua answers, or nothing when the lease was lost, and ack.lua's."""
        tag = self._keys.tag_of(aggregate.root)
        indexes = [self._keys.commits(tag), *self._keys.indexes_of(aggregate)]
        arguments: list[Argument] = [*ack.arguments, aggregate.domain, aggregate.edition]
        arguments += [self._keys.live(tag), *about, *options, *encoded]
        outcome, *parts = await self._router.run(
            scripts.ACK_APPEND, [*ack.keys, *indexes, *where], arguments
        )
        return parts[0] if parts else [], outcome.decode()

    async def _send_indexed(
        self,
        aggregate: Aggregate,
        trace: Trace,
        letters: str,
        send: Callable[[list[str], list[Argument]], Awaitable[tuple[list[Any], T]]],
    ) -> tuple[list[Any], T]:
        """Send an append when the index of its correlation id, in another slot, names it.

        Whoever erases the aggregate meanwhile could take it out of the index again. So erasures are
        counted in the aggregate's slot, and the append is refused if one has ended there since the
        count was known, or is under way. Then the index is written anew.
        """
        index = self._keys.correlated(str(trace.correlation_id))
        tag = self._keys.tag_of(aggregate.root)
        where = self._keys_of(aggregate, trace)
        deadline = self._router.deadline()
        while True:
            known = self._erasures.get(tag, 0)
            await self._name(aggregate, index, known)
            parts, rest = await send(where, [*_options(letters, trace, "e"), known])
            if parts[:1] != [b"erased"]:
                return parts, rest
            if self._router.loop().time() >= deadline:
                why = "aggregates in its slot are erased all the time; nothing was stored"
                raise StoreUnavailable(self._router.answers.where, why)
            count = parts[1]
            if count == known:  # one is under way, or was cut off
                count = await self._eraser.finish(aggregate)
            self._erasures[tag] = count

    async def _name(self, aggregate: Aggregate, index: str, erasures: int) -> None:
        """Have the index of a correlation id name an aggregate."""
        place = keys.place_in_index(aggregate, erasures)
        is_new = await self._router.change(forms.is_count, "ZADD", index, 0, place)
        if is_new and erasures:
            # What names it from before says the same, for all that is stored.
            lowest, highest = keys.places_in_index(aggregate, erasures - 1)
            await self._router.change(forms.is_count, "ZREMRANGEBYLEX", index, lowest, highest)

    def _keys_of(self, aggregate: Aggregate, trace: Trace) -> list[str]:
        """Return the keys that append.lua has for one aggregate."""
        where = self._keys.timeline(aggregate)
        if aggregate.edition != MAIN:
            where += self._keys.snapshots(aggregate)
        if trace is NO_TRACE:
            return where
        where.append(self._keys.claims(aggregate))
        if trace.correlation_id is not None and self._keys.by_slot:
            tag = self._keys.tag_of(aggregate.root)
            where += [self._keys.erasing(aggregate), self._keys.erasures(tag)]
        elif trace.correlation_id is not None:
            where.append(self._keys.correlated(trace.correlation_id))
        return where

    def _encode(self, batch: list[Event], trace: Trace) -> tuple[list[bytes], int]:
        """Return two arguments of the script for each event, and their size in bytes."""
        if len(batch) > self._limits.max_append_events:
            raise EventTooLarge("max_append_events", self._limits.max_append_events, len(batch))
        observer = self._router.observer
        if observer is not None:
            batch = observer.outgoing(batch)
        arguments: list[bytes] = []
        total = 0
        for index, event in enumerate(batch):
            time, member = codec.encode_event(event, trace)
            if len(member) > self._limits.max_event_bytes:
                limit = self._limits.max_event_bytes
                raise EventTooLarge("max_event_bytes", limit, len(member), index)
            arguments += (time, member)
            total += len(time) + len(member)
        if total > self._limits.max_append_bytes:
            raise EventTooLarge("max_append_bytes", self._limits.max_append_bytes, total)
        return arguments, total


def stored(parts: list[Any], count: int, expected: Expected, trace: Trace) -> Appended | None:
    """Return what an append wrote by the answer of append.lua; None if that says something else."""
    tag, value = parts[:2]
    if tag == b"ok" and expected in (ANY, value):
        return Appended(value, value + count - 1)
    if tag == b"duplicate" and trace.idempotency_key is not None:
        return Appended(value, value + parts[2] - 1, duplicate=True)
    return None


def proven(aggregate: Aggregate, done: Appended, wanted: Durability, reached: Reached) -> Appended:
    """Return what was done, or raise that it is less durable than it should be."""
    if reached.satisfies(wanted):
        return done
    first, last = done.first_sequence, done.last_sequence
    raise DurabilityNotReached(aggregate, first, last, wanted, reached.fsynced, reached.on_replicas)


def _options(letters: str, trace: Trace, of_correlation: str = "c") -> list[Argument]:
    """Return the options of append.lua, and a text for each of its claims."""
    if trace is NO_TRACE:
        return [letters]
    texts: list[str] = []
    if trace.idempotency_key is not None:
        letters, texts = letters + "k", [*texts, keys.claim_of_key(trace.idempotency_key)]
    if trace.source is not None:
        letters, texts = letters + "s", [*texts, keys.claim_of_source(trace.source)]
    if trace.correlation_id is not None:
        letters += of_correlation
        texts.append(keys.claim_of_correlation(trace.correlation_id))
    return [letters, *texts]
