"""Storing events: what an append is for append.lua, and the way there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncstore import codec, forms, keys
from asyncstore.errors import EventTooLarge, StoreUnavailable
from asyncstore.names import MAIN
from asyncstore.values import ANY, NO_TRACE, Aggregate, Durability, Event, Expected, Trace

if TYPE_CHECKING:
    from asyncstore.durability import Reached
    from asyncstore.erasing import Eraser
    from asyncstore.keys import Keys
    from asyncstore.router import Router
    from asyncstore.wire import Argument

Outcome = tuple[list[Any], "Reached | None"]
"""What append.lua answers, and what was reached of the level if one was wanted."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one append may hold; see Settings."""

    max_event_bytes: int
    max_append_bytes: int
    max_append_events: int


@dataclass(frozen=True, slots=True)
class Writer:
    """Stores events."""

    _router: Router
    _keys: Keys
    _eraser: Eraser
    _limits: Limits
    _erasures: dict[str, int] = field(default_factory=dict)  # by tag, as far as known

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
            return await self._send_indexed(aggregate, trace, letters, about, encoded, size, wanted)
        about += _options(letters, trace)
        where = self._keys_of(aggregate, trace)
        return await self._send(aggregate, where, about, encoded, size, wanted)

    async def prove(self, aggregate: Aggregate, wanted: Durability) -> Outcome:
        """Have a level proven for all events of an aggregate, with an append of none."""
        about: list[Argument] = [aggregate.root, "", 0, *_options("d", NO_TRACE)]
        where = self._keys_of(aggregate, NO_TRACE)
        return await self._send(aggregate, where, about, [], 0, wanted)

    async def _send(
        self,
        aggregate: Aggregate,
        where: list[str],
        about: list[Argument],
        encoded: list[bytes],
        size: int,
        wanted: Durability,
    ) -> Outcome:
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

    async def _send_indexed(
        self,
        aggregate: Aggregate,
        trace: Trace,
        letters: str,
        about: list[Argument],
        encoded: list[bytes],
        size: int,
        wanted: Durability,
    ) -> Outcome:
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
            options = [*_options(letters, trace, "e"), known]
            parts, reached = await self._send(
                aggregate, where, [*about, *options], encoded, size, wanted
            )
            if parts[0] != b"erased":
                return parts, reached
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
