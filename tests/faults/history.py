"""The load, and what became of it: what each writer asked, what it was told, what readers saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from uuid import UUID

from asyncstore import (
    ANY,
    Aggregate,
    Appended,
    AsyncStoreError,
    DurabilityNotReached,
    DurabilityUnavailable,
    Event,
    HistoryRegressed,
    OutcomeUnknown,
    SequenceConflict,
    Store,
    StoreFull,
    StoreUnavailable,
)

REFUSALS = (
    SequenceConflict,
    HistoryRegressed,
    StoreUnavailable,
    StoreFull,
    DurabilityUnavailable,
)
"""Errors after which nothing was written."""
PACE = 0.004  # seconds, at most, that a writer waits between two appends
_READ_AGAIN = 50  # events that a reader knows and reads once more
_OFTEN = 0.1  # how often a writer repeats what was acknowledged
_MAIN = tuple(Aggregate(domain, f"{n}") for domain in ("orders", "carts") for n in range(3))
BRANCHES = (_MAIN[0].on("what-if"), _MAIN[3].on("what-if"))
PLACES = (*_MAIN, *BRANCHES)


class Outcome(Enum):
    """What is known of an append."""

    ACKNOWLEDGED = "it was answered with its sequences"
    REFUSED = "it was answered, or known, that nothing was written"
    UNKNOWN = "neither"


@dataclass(slots=True)
class Attempt:
    """One append: what was asked, and what is known of it."""

    place: Aggregate
    ids: tuple[UUID, ...]
    writer: int
    key: str | None
    began: float
    epoch: int | None  # the quiet time in which it began and ended; None if it was none
    outcome: Outcome = Outcome.UNKNOWN
    ended: float = float("inf")
    first: int = -1

    def events(self) -> list[Event]:
        return [
            Event("Written", data_of(self.writer, event_id), id=event_id) for event_id in self.ids
        ]


def data_of(writer: int, event_id: UUID) -> dict[str, Any]:
    """Return the data that an event of a writer has: other data are somebody else's."""
    return {"writer": writer, "for": event_id.hex, "padding": "é" * (event_id.int % 40)}


@dataclass
class History:
    """All that was asked and answered.

    Time is cut in epochs. A fault begins one and its end the next, so that even ones are quiet:
    what began and ended in the same even epoch was certainly served by the same state of things.
    """

    attempts: list[Attempt] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seen: dict[tuple[Aggregate, int], list[UUID]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    main: tuple[Aggregate, ...] = _MAIN
    branches: tuple[Aggregate, ...] = BRANCHES
    acknowledged: int = 0  # appends
    reads: int = 0
    epoch: int = 0
    recoveries: list[float] = field(default_factory=list)
    lost_before_repeated: int = 0
    answers: list[tuple[Aggregate, float, float]] = field(default_factory=list)  # when, how long
    _mended: float | None = None
    _mended_places: frozenset[Aggregate] = frozenset()

    @property
    def places(self) -> tuple[Aggregate, ...]:
        return (*self.main, *self.branches)

    # What writers tell

    def begin(self, place: Aggregate, count: int, writer: int, key: str | None) -> Attempt:
        ids = tuple(Event("Written", None).id for _ in range(count))
        quiet = self.epoch if self.is_quiet() else None
        attempt = Attempt(place, ids, writer, key, time.monotonic(), quiet)
        self.attempts.append(attempt)
        return attempt

    def acknowledge(self, attempt: Attempt, done: Appended) -> None:
        """Note an answer; not the first, for an append that was repeated with its key."""
        now = time.monotonic()
        if done.last_sequence - done.first_sequence + 1 != len(attempt.ids):
            self.wrong.append(f"{attempt.place}: an answer of {done} for {len(attempt.ids)} events")
        attempt.outcome = Outcome.ACKNOWLEDGED
        attempt.first, attempt.ended = done.first_sequence, now
        if attempt.epoch != self.epoch:
            attempt.epoch = None
        self.acknowledged += 1
        is_of_them = not self._mended_places or attempt.place in self._mended_places
        if self._mended is not None and attempt.began >= self._mended and is_of_them:
            self.recoveries.append(now - self._mended)
            self._mended = None

    def fail(self, attempt: Attempt, error: AsyncStoreError) -> None:
        """Note a refusal. It does not take back an answer, or a doubt, of an earlier sending."""
        self.errors[_name_of(error)] += 1
        if isinstance(error, OutcomeUnknown | DurabilityNotReached):
            return
        if not isinstance(error, REFUSALS):
            self.wrong.append(f"{attempt.place}: {type(error).__name__}: {error}")

    # What who plays the faults tells

    def is_quiet(self) -> bool:
        return self.epoch % 2 == 0

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """The time from before a fault until it is over."""
        self.epoch += 1
        recovered = len(self.recoveries)
        yield
        if self.is_recovered() and len(self.recoveries) == recovered:
            self.mended()
        self.epoch += 1

    def mended(self, places: Iterable[Aggregate] = ()) -> None:
        """Begin to count the time to recover, of some places or of all.

        From when the cause of the trouble is gone, or where others have to see to it, is there.
        """
        self._mended, self._mended_places = time.monotonic(), frozenset(places)

    def is_recovered(self) -> bool:
        return self._mended is None

    # What readers tell

    def saw(self, place: Aggregate, epoch: int, start: int, ids: list[UUID]) -> None:
        """Compare what was read with what others have read, and keep the longer one."""
        known = self.seen.setdefault((place, epoch), [])
        self.reads += 1
        if start > len(known):
            return
        for offset, (one, other) in enumerate(zip(known[start:], ids, strict=False)):
            if one != other:
                self.wrong.append(f"{place}: two readers saw other events at {start + offset}")
                return
        known.extend(ids[len(known) - start :])


def _name_of(error: AsyncStoreError) -> str:
    """Return the kind of an error, with the reason where the kind has many."""
    why = f": {error.why}" if isinstance(error, StoreUnavailable) else ""
    return type(error).__name__ + why


@dataclass
class Writer:
    """Appends one batch after the other: to a known place, to any, or with an idempotency key."""

    number: int
    store: Store
    history: History
    dice: random.Random
    options: Mapping[str, Any]
    expected: dict[Aggregate, int] = field(default_factory=dict)

    async def work(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.append_once()
            await asyncio.sleep(self.dice.random() * PACE)

    async def append_once(self) -> None:
        place = self.dice.choice(self.history.places)
        kind = self.number % 3
        attempt = self.history.begin(
            place, self.dice.randrange(1, 4), self.number, f"k{self.dice.random()}" * (kind == 2)
        )
        at = self.expected.get(place, 0) if kind == 0 or self.dice.random() < 0.1 else None
        if await self._first(attempt, at) and attempt.key:
            await self._repeat(attempt, at)

    async def _first(self, attempt: Attempt, expected: int | None) -> bool:
        """Append, note the answer, and return whether it may be stored."""
        try:
            done = await self._append(attempt, expected)
        except AsyncStoreError as error:
            self.history.fail(attempt, error)
            if isinstance(error, REFUSALS):
                attempt.outcome = Outcome.REFUSED
            if isinstance(error, SequenceConflict | HistoryRegressed):
                self.expected[attempt.place] = error.actual
            return attempt.outcome is Outcome.UNKNOWN
        if done.duplicate:
            self.history.wrong.append(f"{attempt.place}: a new key was called a duplicate")
        self.history.acknowledge(attempt, done)
        self.history.answers.append((attempt.place, attempt.ended, attempt.ended - attempt.began))
        self.expected[attempt.place] = done.last_sequence + 1
        return True

    async def _repeat(self, attempt: Attempt, expected: int | None) -> None:
        """Append the same again with the same key: it is there once, and at the same place."""
        was_known = attempt.outcome is Outcome.ACKNOWLEDGED
        if was_known and self.dice.random() > _OFTEN:
            return
        epoch, first = self.history.epoch, attempt.first
        try:
            done = await self._append(attempt, expected)
        except AsyncStoreError as error:
            self.history.fail(attempt, error)
            return
        self.history.acknowledge(attempt, done)
        if not was_known:
            return
        if done.first_sequence != first:
            self.history.lost_before_repeated += len(attempt.ids)
        # Where the answer to the repeated call was lost too, the driver can't tell the two apart.
        if attempt.epoch == epoch == self.history.epoch and not done.duplicate:
            self.history.wrong.append(f"{attempt.place}: a key was forgotten in quiet times")

    async def _append(self, attempt: Attempt, expected: int | None) -> Appended:
        return await self.store.events.append(
            attempt.place,
            attempt.events(),
            expected=ANY if expected is None else expected,
            idempotency_key=attempt.key or None,
            **self.options,
        )


@dataclass
class Reader:
    """Reads one aggregate after the other, and keeps what it saw.

    Where events may be lost, what was seen in one epoch need not hold in the next one. An edition
    may then even diverge anew, elsewhere, so there it is main that is looked at.
    """

    store: Store
    history: History
    dice: random.Random
    may_lose: bool

    async def work(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.read_once()
            await asyncio.sleep(self.dice.random() * 20 * PACE)

    async def read_once(self) -> None:
        history = self.history
        place = self.dice.choice(history.main if self.may_lose else history.places)
        epoch = self.history.epoch
        key = epoch if self.may_lose else 0
        known = len(self.history.seen.get((place, key), ()))
        start = max(0, known - _READ_AGAIN) if self.dice.random() < 0.8 else 0
        try:
            events = await self.store.events.read(place, start=start)
            ids = [event.id for event in events]
        except StoreUnavailable:
            return
        except AsyncStoreError as error:
            self.history.wrong.append(f"reading {place}: {type(error).__name__}: {error}")
            return
        if not self.may_lose or (epoch == self.history.epoch and self.history.is_quiet()):
            self.history.saw(place, key, start, ids)


async def prepare(store: Store, history: History) -> None:
    """Write what the editions diverge from, and let them diverge."""
    writer = Writer(-1, store, history, random.Random(0), {})
    for place in history.main:
        for sequence in range(3):
            await writer._first(history.begin(place, 1, -1, None), sequence)
    for branch in history.branches:
        await store.events.branch(branch, at=2)
