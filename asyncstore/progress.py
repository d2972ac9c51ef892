"""How far handlers are, what they could not handle, and putting them back."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final

from asyncstore import codec, forms, scripts
from asyncstore.keys import ALL
from asyncstore.names import MAIN, check_edition, check_name, check_seconds
from asyncstore.reading import Range
from asyncstore.sharing import all_of
from asyncstore.values import FIRST, NOW, Aggregate, Start, check_start
from asyncstore.worklist import EVERY_DOMAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from asyncstore.keys import Keys
    from asyncstore.positions import Positions
    from asyncstore.reading import Reader
    from asyncstore.router import Router
    from asyncstore.wire import Argument

_PAGE: Final = 200
_AT_ONCE: Final = 100
_LETTER: Final = re.compile(r"(.+)\n(\d{16}) ([0-9a-f]*) (\d+) (\d+) (.*)", re.S)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a handler is in a domain and edition.

    `oldest` is the time of the oldest event that is not handled yet, `retrying` counts aggregates
    whose next event was tried before.
    """

    handler: str
    domain: str
    edition: str
    aggregates_behind: int = 0
    events_behind: int = 0
    oldest: datetime | None = None
    retrying: int = 0
    dead_letters: int = 0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that a handler could not handle, and that its position has passed.

    `event_id` is the event's id in hexadecimal, '' if it can't be read. `time` is when it was given
    up, `attempts` how often it was delivered, `reason` what the last `nack` said.
    """

    handler: str
    aggregate: Aggregate
    sequence: int
    event_id: str
    attempts: int
    time: datetime
    reason: str
    _member: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Lag:
    """How far a handler is behind in an aggregate; `last` is the last sequence there."""

    aggregate: Aggregate
    events: int
    last: int
    oldest: int | None  # microseconds since 1970
    tries: int


@dataclass(frozen=True, slots=True)
class Subscriptions:
    """What the handlers of a store have done and have before them."""

    _router: Router
    _keys: Keys
    _reader: Reader
    _positions: Positions

    async def status(self, handler: str | None = None) -> list[Progress]:
        """Return how far each handler is, or one of them, in each domain and edition.

        Takes a call for every 200 aggregates that it is behind in.
        """
        wanted = None if handler is None else check_name("handler", handler)
        key = self._keys.subscribed(ALL)
        names = await self._texts(key)
        found = [tuple(name.split(":", 2)) for name in names]
        return [
            await self._progress(name, domain, edition)
            for name, domain, edition in found
            if domain != EVERY_DOMAIN and wanted in (None, name)
        ]

    async def _progress(self, handler: str, domain: str, edition: str) -> Progress:
        aggregates = events = retrying = 0
        oldest: int | None = None
        async for lag in self._behind(handler, domain, edition):
            aggregates += 1
            events += lag.events
            retrying += lag.tries > 1
            if lag.oldest is not None:
                oldest = lag.oldest if oldest is None else min(oldest, lag.oldest)
        letters = await self._router.read(
            forms.is_count, "ZCARD", self._keys.dead_letters(handler, domain, edition, ALL)
        )
        moment = None if oldest is None else codec.from_microseconds(oldest)
        return Progress(handler, domain, edition, aggregates, events, moment, retrying, letters)

    async def _behind(self, handler: str, domain: str, edition: str) -> AsyncIterator[_Lag]:
        """Iterate over the aggregates that the handler is behind in."""
        page: list[Aggregate] = []
        async for root in self._candidates(handler, domain, edition):
            page.append(Aggregate(domain, root, edition))
            if len(page) == _PAGE:
                for one in await self._lags(handler, page):
                    yield one
                page = []
        for one in await self._lags(handler, page):
            yield one

    async def _lags(self, handler: str, page: list[Aggregate]) -> list[_Lag]:
        if not page:
            return []
        where: list[str] = []
        for one in page:
            own = [self._keys.position(handler, one), self._keys.lease(handler, one)]
            where += [*own, *self._keys.timeline(one)]
        replies = await self._router.run(scripts.LAG, where, [len(where) // len(page)])
        lags = zip(page, *(replies[number::4] for number in range(4)), strict=True)
        return [
            _Lag(one, int(behind), int(last), int(oldest) if oldest else None, int(tries))
            for one, behind, last, oldest, tries in lags
            if int(behind)
        ]

    async def _candidates(self, handler: str, domain: str, edition: str) -> AsyncIterator[str]:
        """Iterate over roots that the handler may be behind in, each once."""
        given: set[str] = set()
        subscription = self._keys.subscription(handler, domain, edition, ALL)
        swept = await self._router.read(forms.is_place_or_nil, "HGET", subscription, "swept")
        # First what a sweep has not seen: it may move among those that are due, and not back.
        roots = self._keys.roots(domain, edition, ALL)
        due = self._keys.due(handler, domain, edition, ALL)
        for key, start in ((roots, b"(" + (swept or b"0")), (due, b"-inf")):
            async for page in self._by_score(key, start):
                for root in page:
                    if root not in given:
                        given.add(root)
                        yield root

    async def _by_score(self, key: str, start: bytes) -> AsyncIterator[list[str]]:
        by = ("+inf", "BYSCORE", "LIMIT")
        skip = 0
        while True:
            reply = await self._router.read(
                forms.is_scored, "ZRANGE", key, start, *by, skip, _PAGE, "WITHSCORES"
            )
            page = forms.pairs_of(reply)
            yield [root.decode() for root, _ in page]
            if len(page) < _PAGE:
                return
            # Many may be due at the same moment: then those that were given are skipped.
            last = page[-1][1]
            score = last if isinstance(last, bytes) else b"%.17g" % last
            same = sum(1 for _, other in page if other == last)
            skip = skip + same if same == len(page) and start == score else same
            start = score

    async def _texts(self, key: str) -> list[str]:
        reply = await self._router.read(forms.is_texts, "ZRANGE", key, "-", "+", "BYLEX")
        return [text.decode() for text in reply]

    # Dead letters

    async def dead_letters(
        self, handler: str, domain: str | None = None, *, edition: str = MAIN
    ) -> AsyncIterator[DeadLetter]:
        """Iterate over the events that a handler could not handle, by aggregate and sequence.

        None means all domains.
        """
        check_name("handler", handler)
        check_edition(edition)
        names = [domain] if domain is not None else await self._texts(self._keys.domains(ALL))
        for name in names:
            key = self._keys.dead_letters(handler, check_name("domain", name), edition, ALL)
            start = b"-"
            while True:
                page = await self._router.read(
                    forms.is_texts, "ZRANGE", key, start, "+", "BYLEX", "LIMIT", 0, _PAGE
                )
                for member in page:
                    letter = _letter_of(handler, name, edition, member.decode())
                    if letter is not None:
                        yield letter
                if len(page) < _PAGE:
                    break
                start = b"(" + page[-1]

    async def retry(self, letter: DeadLetter) -> bool:
        """Have the event of a dead letter delivered once more; False if it is gone already.

        It comes by itself, before what is next in its aggregate: what was handled after it stays
        handled. If it is refused again, it becomes a dead letter again.
        """
        return await self._take_away(letter, letter.sequence)

    async def drop(self, letter: DeadLetter) -> bool:
        """Forget a dead letter for good; False if it is gone already. The event stays."""
        return await self._take_away(letter, "")

    async def _take_away(self, letter: DeadLetter, sequence: int | str) -> bool:
        place = letter.aggregate
        tag = self._keys.tag_of(place.root)
        where = [
            self._keys.due(letter.handler, place.domain, place.edition, tag),
            self._keys.dead_letters(letter.handler, place.domain, place.edition, tag),
            self._keys.lease(letter.handler, place),
        ]
        arguments: list[Argument] = [place.root, letter._member, sequence]
        (outcome,) = await self._router.run(scripts.RETRY, where, arguments)
        return bool(outcome == b"ok")

    # Putting handlers back

    async def reset(
        self,
        handler: str,
        domain: str,
        *,
        edition: str = MAIN,
        to: Start | datetime = FIRST,
    ) -> None:
        """Put a handler back in all aggregates of a domain: it handles them anew from there.

        `to` is `FIRST`; or a moment: then each aggregate is handled from its first event on that
        happened then or later; or `NOW`. What workers have in progress is refused with `LeaseLost`
        when they ack it. Dead letters are forgotten. If it is cut off, call it again.
        """
        check_name("handler", handler)
        check_name("domain", domain)
        check_start("to", to)
        given: set[str] = set()
        async for page in self._by_score(
            self._keys.roots(domain, check_edition(edition), ALL), b"-inf"
        ):
            new = [root for root in page if root not in given]
            given.update(new)
            places = [Aggregate(domain, root, edition) for root in new]
            starts = await self.starts_of(places, to)
            if places:
                await self._reset(handler, places, starts)

    async def starts_of(
        self, places: Sequence[Aggregate], start: Start | datetime
    ) -> list[int | None]:
        """Return the sequence at which to begin in each aggregate, None for its end."""
        if not isinstance(start, datetime):
            return [None if start is NOW else 0 for _ in places]
        found: list[int | None] = []
        for first in range(0, len(places), _AT_ONCE):
            some = places[first : first + _AT_ONCE]
            found += await all_of(_first_since(self._reader, place, start) for place in some)
        return found

    async def _reset(self, handler: str, places: list[Aggregate], starts: list[int | None]) -> None:
        domain, edition = places[0].domain, places[0].edition
        due = self._keys.due(handler, domain, edition, ALL)
        where: list[str] = []
        arguments: list[Argument] = []
        for place, start in zip(places, starts, strict=True):
            where += [self._keys.position(handler, place), self._keys.lease(handler, place)]
            where += [self._keys.handlers(place), *self._keys.timeline(place)]
            if edition != MAIN:
                where.append(self._keys.attached_of(place))
            arguments += [place.root, "" if start is None else start]
        width = len(where) // len(places)
        shared = [due, self._keys.dead_letters(handler, domain, edition, ALL)]
        await self._router.run(scripts.RESET, [*shared, *where], [handler, width, *arguments])

    # Waiting

    async def wait_until_caught_up(
        self,
        handler: str,
        domain: str,
        *,
        edition: str = MAIN,
        timeout: float | None = None,  # noqa: ASYNC109 - as those of other stores have it
    ) -> None:
        """Wait until the handler has handled all that was appended before this call.

        Raises `StillBehind` after `timeout` seconds. Events that become dead letters count as
        handled.
        """
        check_name("handler", handler)
        check_name("domain", domain)
        ends = _ends_of(timeout)
        behind = [lag async for lag in self._behind(handler, domain, check_edition(edition))]
        for lag in behind:
            await self._positions.wait(handler, lag.aggregate, lag.last, timeout=_left(ends))


async def _first_since(reader: Reader, place: Aggregate, moment: datetime) -> int:
    following = 0
    async for event in reader.stream(Range(place)):
        if event.time >= moment:
            return event.sequence
        following = event.sequence + 1
    return following


def _letter_of(handler: str, domain: str, edition: str, member: str) -> DeadLetter | None:
    parts = _LETTER.fullmatch(member)
    if parts is None:
        return None
    root, sequence, number, attempts, moment, reason = parts.groups()
    place = Aggregate(domain, root, edition)
    when = codec.from_microseconds(int(moment))
    return DeadLetter(handler, place, int(sequence), number, int(attempts), when, reason, member)


def _ends_of(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + check_seconds("timeout", timeout)


def _left(ends: float | None) -> float | None:
    return None if ends is None else max(ends - time.monotonic(), 0.0)
