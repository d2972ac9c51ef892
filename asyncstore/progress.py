"""How far handlers are, what they could not handle, and putting them back."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import codec, forms, scripts
from asyncstore.keys import ALL
from asyncstore.names import MAIN, check_edition, check_name, check_seconds
from asyncstore.registering import EVERY_DOMAIN
from asyncstore.sharing import all_of
from asyncstore.values import FIRST, Aggregate, Start, check_start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime

    from asyncstore.keys import Keys
    from asyncstore.positions import Positions
    from asyncstore.registering import Registry
    from asyncstore.router import Router
    from asyncstore.wire import Argument

_PAGE: Final = 200
_FIRST: Final = b"0"  # the cursor of a scan that begins, or has ended
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
    _registry: Registry
    _positions: Positions

    async def status(self, handler: str | None = None) -> list[Progress]:
        """Return how far each handler is, or one of them, in each domain and edition.

        Takes a call for every 200 aggregates that it is behind in; on a cluster also some commands
        for each slot, in bulk.
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
        letters = await self._router.read_each(
            forms.is_count,
            [
                ["ZCARD", self._keys.dead_letters(handler, domain, edition, tag)]
                for tag in await self._registry.filled()
            ],
        )
        moment = None if oldest is None else codec.from_microseconds(oldest)
        place = handler, domain, edition
        return Progress(*place, aggregates, events, moment, retrying, sum(letters))

    async def _behind(self, handler: str, domain: str, edition: str) -> AsyncIterator[_Lag]:
        """Iterate over the aggregates that the handler is behind in."""
        tags = await self._registry.filled()
        places = [self._keys.subscription(handler, domain, edition, tag) for tag in tags]
        swept = await self._router.read_each(
            forms.is_place_or_nil, [["HGET", place, "swept"] for place in places]
        )
        # First what a sweep has not seen: it may move among those that are due, and not back.
        unseen = [
            (self._keys.roots(domain, edition, tag), b"(" + (number or b"0"))
            for tag, number in zip(tags, swept, strict=True)
        ]
        due = [self._keys.due(handler, domain, edition, tag) for tag in tags]
        given: set[str] = set()
        for found in (self._by_score(unseen), self._scanned(due)):
            async for pages in found:
                new = [[root for root in page if root not in given] for page in pages]
                given.update(root for page in new for root in page)
                for lag in await self._lags(handler, domain, edition, new):
                    yield lag

    async def _lags(
        self, handler: str, domain: str, edition: str, pages: list[list[str]]
    ) -> list[_Lag]:
        """Return how far the handler is behind; the roots of a page are under one tag."""
        found: list[_Lag] = []
        filled = [page for page in pages if page]
        for first in range(0, len(filled), _AT_ONCE):
            some = filled[first : first + _AT_ONCE]
            for lags in await all_of(
                self._lags_of(handler, [Aggregate(domain, root, edition) for root in page])
                for page in some
            ):
                found += lags
        return found

    async def _lags_of(self, handler: str, page: list[Aggregate]) -> list[_Lag]:
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

    async def _by_score(
        self, ranges: Sequence[tuple[str, bytes]]
    ) -> AsyncIterator[list[list[str]]]:
        """Iterate over what some sorted sets have beyond a score: the next page of each.

        No two have the same score, and none gets a lower one.
        """
        left = list(ranges)
        while left:
            replies = await self._router.read_each(
                forms.is_scored,
                [
                    ["ZRANGE", key, start, "+inf", "BYSCORE", "LIMIT", 0, _PAGE, "WITHSCORES"]
                    for key, start in left
                ],
            )
            pages = [forms.pairs_of(reply) for reply in replies]
            yield [[root.decode() for root, _ in page] for page in pages]
            left = [
                (key, f"({float(page[-1][1]):.17g}".encode())
                for (key, _), page in zip(left, pages, strict=True)
                if len(page) == _PAGE
            ]

    async def _scanned(self, keys: Sequence[str]) -> AsyncIterator[list[list[str]]]:
        """Iterate over what some sorted sets hold, whatever the scores become meanwhile.

        By score it could not be read in pages: a lease that is given back is due before all that
        were read, and those would be passed over.
        """
        left = [(key, _FIRST) for key in keys]
        while left:
            replies = await self._router.read_each(
                forms.is_scan, [["ZSCAN", key, cursor, "COUNT", _PAGE] for key, cursor in left]
            )
            yield [
                [root.decode() for root in dict.fromkeys(members[::2])] for _, members in replies
            ]
            left = [
                (key, cursor)
                for (key, _), (cursor, _) in zip(left, replies, strict=True)
                if cursor != _FIRST
            ]

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
        if domain is not None:
            names = [check_name("domain", domain)]
        else:
            there = await self._registry.domains(self._keys.tags())
            names = sorted({name for some in there.values() for name in some})
        for name in names:
            async for letter in self._letters(handler, name, edition):
                yield letter

    async def _letters(self, handler: str, domain: str, edition: str) -> AsyncIterator[DeadLetter]:
        """Iterate over the dead letters of a domain."""
        left = [
            (self._keys.dead_letters(handler, domain, edition, tag), b"-")
            for tag in await self._registry.filled()
        ]
        while left:
            pages = await self._router.read_each(
                forms.is_texts,
                [["ZRANGE", key, start, "+", "BYLEX", "LIMIT", 0, _PAGE] for key, start in left],
            )
            members = sorted(member for page in pages for member in page)
            for member in members:
                letter = _letter_of(handler, domain, edition, member.decode())
                if letter is not None:
                    yield letter
            left = [
                (key, b"(" + page[-1])
                for (key, _), page in zip(left, pages, strict=True)
                if len(page) == _PAGE
            ]

    async def retry(self, letter: DeadLetter) -> bool:
        """Have the event of a dead letter delivered once more; False if it is gone already.

        It comes by itself, before what is next in its aggregate: what was handled after it stays
        handled. If it is refused again, or its workers die with it more than `retries` times (and
        twice at least), it becomes a dead letter again.
        """
        return await self._take_away(letter, letter.sequence)

    async def drop(self, letter: DeadLetter) -> bool:
        """Forget a dead letter for good; False if it is gone already. The event stays."""
        return await self._take_away(letter, "")

    async def _take_away(self, letter: DeadLetter, sequence: int | str) -> bool:
        place = letter.aggregate
        tag = self._keys.tag_of(place.root)
        where = [
            self._keys.commits(tag),
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
        roots = [
            (self._keys.roots(domain, check_edition(edition), tag), b"-inf")
            for tag in await self._registry.filled()
        ]
        async for pages in self._by_score(roots):
            new = [[root for root in page if root not in given] for page in pages]
            given.update(root for page in new for root in page)
            filled = [[Aggregate(domain, root, edition) for root in page] for page in new if page]
            for first in range(0, len(filled), _AT_ONCE):
                some = filled[first : first + _AT_ONCE]
                await all_of(self._reset(handler, places, to) for places in some)

    async def _reset(self, handler: str, places: list[Aggregate], to: Start | datetime) -> None:
        """Put a handler back in some aggregates that are under one tag."""
        starts = await self._registry.starts_of(places, to)
        domain, edition = places[0].domain, places[0].edition
        tag = self._keys.tag_of(places[0].root)
        where: list[str] = []
        arguments: list[Argument] = []
        for place, start in zip(places, starts, strict=True):
            where += [self._keys.position(handler, place), self._keys.lease(handler, place)]
            where += [self._keys.handlers(place), *self._keys.timeline(place)]
            if edition != MAIN:
                where.append(self._keys.attached_of(place))
            arguments += [place.root, "" if start is None else start]
        width = len(where) // len(places)
        shared = [
            self._keys.commits(tag),
            self._keys.due(handler, domain, edition, tag),
            self._keys.dead_letters(handler, domain, edition, tag),
        ]
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
