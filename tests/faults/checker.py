"""The laws that a store keeps whatever happens, held against all that it has stored.

Each is linear in the size of the history:

1. every acknowledged event is there exactly once, at the sequence that was answered, with its data;
2. sequences are dense;
3. what was refused is not there, and nothing is there that nobody wrote;
4. an append whose outcome is unknown is there once and as a whole, or not at all;
5. two readers never disagree about a prefix, nor does what they saw with what is there;
6. of two appends to an aggregate, one that was answered before the other began comes first;
7. where acknowledged events may be lost, it is the end of a stream that is lost.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from asyncstore import Aggregate, CorruptEvent, RecordedEvent, Store
from tests.faults.history import Attempt, History, Outcome, data_of


@dataclass
class Verdict:
    """Counts of events, and in words what is wrong."""

    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    unknown: int = 0
    refused: int = 0
    why: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return len(self.why)


Stored = dict[Aggregate, list[RecordedEvent]]


async def check(
    store: Store, history: History, *, may_lose: bool = False, may_see_unproven: bool = False
) -> Verdict:
    """Read everything back, and judge. With `may_lose`, lost events are counted and no more.

    With `may_see_unproven`, what readers saw before a fault may be gone after it: a primary shows
    events that its replicas do not have yet. What was acknowledged is there all the same.
    """
    verdict = Verdict(why=list(history.wrong))
    stored: Stored = {}
    for place in {attempt.place for attempt in history.attempts}:
        stored[place] = await _read(store, place, verdict)
    own = {place: await _own(store, place, stored, verdict) for place in stored}
    attempts = [_checked(attempt, stored, may_lose, verdict) for attempt in history.attempts]
    _check_ids(history, own, verdict)
    _check_order(history, verdict)
    _check_readers(history, stored, may_lose or may_see_unproven, verdict)
    lost = [attempt for attempt, there in zip(history.attempts, attempts, strict=True) if not there]
    _check_ends(lost, history, verdict)
    if may_lose:
        verdict.lost += history.lost_before_repeated
    elif history.lost_before_repeated:
        verdict.why.append(f"{history.lost_before_repeated} events of known keys moved")
    return verdict


async def _read(store: Store, place: Aggregate, verdict: Verdict) -> list[RecordedEvent]:
    """Return all events; where one is missing or no event, that is a law broken, and it goes on."""
    events: list[RecordedEvent] = []
    start = 0
    while True:
        try:
            async for event in store.events.stream(place, start=start):
                events.append(event)  # noqa: PERF401, for what came before the error is kept
            break
        except CorruptEvent as error:
            verdict.why.append(f"{place}: {error}")
            start = max(start, error.sequence) + 1
    if [event.sequence for event in events] != list(range(len(events))):
        verdict.why.append(f"{place}: the sequences are not dense")
    return events


async def _own(
    store: Store, place: Aggregate, stored: Stored, verdict: Verdict
) -> list[RecordedEvent]:
    """Return the events that are a timeline's own, and compare the others with main's."""
    divergence = await store.events.divergence(place)
    if divergence is None:
        return stored[place] if place.edition == "main" else []
    shared = [event.id for event in stored[place][:divergence]]
    main = stored.get(place.on("main"), [])
    if shared != [event.id for event in main[:divergence]]:
        verdict.why.append(f"{place}: it does not begin as main does")
    return stored[place][divergence:]


def _checked(attempt: Attempt, stored: Stored, may_lose: bool, verdict: Verdict) -> bool:
    """Hold one append against the events; return whether it is at its place."""
    count = len(attempt.ids)
    if attempt.outcome is Outcome.REFUSED:
        verdict.refused += count
    elif attempt.outcome is Outcome.UNKNOWN:
        verdict.unknown += count
    if attempt.outcome is not Outcome.ACKNOWLEDGED:
        return True
    verdict.acknowledged += count
    events = stored[attempt.place][attempt.first : attempt.first + count]
    there = [event for event, own in zip(events, attempt.ids, strict=False) if event.id == own]
    for event in there:
        if event.data != data_of(attempt.writer, event.id):
            verdict.why.append(f"{attempt.place}, {event.sequence}: it has other data")
    missing = count - len(there)
    verdict.lost += missing
    if missing and not may_lose:
        verdict.why.append(f"{attempt.place}: {missing} of {count} lost from {attempt.first}")
    return not missing


def _check_ids(history: History, own: Stored, verdict: Verdict) -> None:
    """Nothing twice, nothing half, nothing refused, nothing foreign; and nothing elsewhere."""
    places = {
        event.id: (place, event.sequence) for place, events in own.items() for event in events
    }
    times = Counter(event.id for events in own.values() for event in events)
    verdict.doubled = sum(count - 1 for count in times.values())
    if verdict.doubled:
        verdict.why.append(f"{verdict.doubled} events are there twice")
    for attempt in history.attempts:
        found = [places.pop(event_id, None) for event_id in attempt.ids]
        if why := _why_not(attempt, found):
            verdict.why.append(f"{attempt.place}: {why}")
    verdict.why.extend(
        f"{place}, {sequence}: nobody wrote it" for place, sequence in places.values()
    )


def _why_not(attempt: Attempt, found: list[tuple[Aggregate, int] | None]) -> str | None:
    """Say what is wrong with where the events of an append are; None if nothing is."""
    there = [place for place in found if place is not None]
    if not there:
        return None
    if attempt.outcome is Outcome.REFUSED:
        return f"an append that was refused is there, from {there[0][1]}"
    if len(there) < len(found):
        return f"{len(there)} of {len(found)} events of an append are there"
    first = there[0][1]
    if attempt.outcome is Outcome.ACKNOWLEDGED and first != attempt.first:
        return f"an append was answered with {attempt.first} and is at {first}"
    if there != [(attempt.place, first + offset) for offset in range(len(there))]:
        return f"the events of the append at {first} are not one after the other"
    return None


def _by_place(attempts: Iterable[Attempt]) -> dict[Aggregate, list[Attempt]]:
    """Return the acknowledged ones of each aggregate, in the order of their sequences."""
    places: dict[Aggregate, list[Attempt]] = {}
    for attempt in attempts:
        if attempt.outcome is Outcome.ACKNOWLEDGED:
            places.setdefault(attempt.place, []).append(attempt)
    for found in places.values():
        found.sort(key=lambda attempt: attempt.first)
    return places


def _check_order(history: History, verdict: Verdict) -> None:
    """What was answered before the other began comes first: in quiet times, of which all are."""
    quiet = [attempt for attempt in history.attempts if attempt.epoch is not None]
    by_epoch = itertools.groupby(sorted(quiet, key=_epoch), _epoch)
    for _, attempts in by_epoch:
        for place, found in _by_place(attempts).items():
            earliest = float("inf")
            for attempt in reversed(found):
                if earliest < attempt.began:
                    verdict.why.append(f"{place}: {attempt.first} is before what was there first")
                    break
                earliest = min(earliest, attempt.ended)


def _epoch(attempt: Attempt) -> int:
    return -1 if attempt.epoch is None else attempt.epoch


def _check_readers(history: History, stored: Stored, may_lose: bool, verdict: Verdict) -> None:
    """What was seen, and not taken back by a fault that may lose events, is still there."""
    for (place, epoch), ids in history.seen.items():
        if may_lose and epoch != history.epoch:
            continue
        there = [event.id for event in stored.get(place, [])[: len(ids)]]
        if there != ids:
            verdict.why.append(f"{place}: of {len(ids)} events that were seen, the end is another")


def _check_ends(lost: list[Attempt], history: History, verdict: Verdict) -> None:
    """What was lost of a quiet time is the end: nothing after it, of the same time, was kept."""
    gone: dict[tuple[Aggregate, int], int] = {}
    gone_ids: set[UUID] = set()
    for attempt in lost:
        gone_ids.add(attempt.ids[0])
        if attempt.epoch is not None:
            key = attempt.place, attempt.epoch
            gone[key] = min(gone.get(key, attempt.first), attempt.first)
    for attempt in history.attempts:
        first = gone.get((attempt.place, _epoch(attempt)))
        is_kept = attempt.outcome is Outcome.ACKNOWLEDGED and attempt.ids[0] not in gone_ids
        if first is not None and is_kept and attempt.first > first:
            verdict.why.append(f"{attempt.place}: {first} was lost, and {attempt.first} was kept")
            break
