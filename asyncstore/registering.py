"""Notes which handlers there are, and marks where they begin.

A handler that begins at its first event needs no mark: where it has no position, that is where it
begins. Any other is marked in the aggregates that are there when it is registered: they get a
position. What there was then, under which tags, is kept with the registration as long as that goes
on, and is the same for all workers that do it at once. So nobody marks what came later, however
late he is: under other tags nothing is ever marked, and under these it is done once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from asyncstore import codec, forms, keys, scripts
from asyncstore.keys import ALL
from asyncstore.reading import Range
from asyncstore.sharing import all_of
from asyncstore.values import FIRST, NOW, Aggregate, Start
from asyncstore.worklist import Worklist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.keys import Keys
    from asyncstore.reading import Reader
    from asyncstore.router import Router
    from asyncstore.worklist import Terms

EVERY_DOMAIN: Final = "*"  # no name of a domain: stands where a handler works on all of them
_AT_ONCE: Final = 100
_UNKNOWN: Final = "?"


@dataclass(frozen=True, slots=True)
class Registry:
    """The handlers of a store."""

    _router: Router
    _keys: Keys
    _reader: Reader

    async def domains(self, tags: Sequence[str]) -> dict[str, list[str]]:
        """Return the domains that there are under each of some tags."""
        found = await self._router.read_each(
            forms.is_texts,
            [["ZRANGE", self._keys.domains(tag), "-", "+", "BYLEX"] for tag in tags],
        )
        names = zip(tags, found, strict=True)
        return {tag: [name.decode() for name in some] for tag, some in names if some}

    async def filled(self) -> list[str]:
        """Return the tags under which there ever was something."""
        tags = self._keys.tags()
        numbers = await self._router.read_each(
            forms.is_text_or_nil, [["GET", self._keys.commits(tag)] for tag in tags]
        )
        return [tag for tag, number in zip(tags, numbers, strict=True) if number is not None]

    async def begin_everywhere(self, terms: Terms) -> set[str]:
        """Register a handler of all domains; return those that there are, all registered."""
        there = await self.domains(self._keys.tags())
        domains = {name for names in there.values() for name in names}
        marking = await self._register(EVERY_DOMAIN, terms, terms.start, sorted(domains))
        if marking is not None:
            _, before = marking
            for domain in before:
                await self.begin(domain, terms)
            await self._is_marked(EVERY_DOMAIN, terms)
        for domain in domains:
            await self.begin(domain, terms, FIRST)  # unless it was there before
        return domains

    async def begin(self, domain: str, terms: Terms, start: Start | datetime | None = None) -> None:
        """Register a handler of a domain, and mark where it begins, if nobody did before."""
        chosen = terms.start if start is None else start
        marking = await self._register(domain, terms, chosen, None)
        if marking is None:
            return
        begins, tags = marking
        for first in range(0, len(tags), _AT_ONCE):
            some = tags[first : first + _AT_ONCE]
            await all_of(self._mark(domain, terms, tag, begins) for tag in some)
        await self._is_marked(domain, terms)

    async def keep(self, domain: str | None, domains: Sequence[str], terms: Terms) -> None:
        """Register a handler that works already, where a failover may have lost that.

        It has begun: what has no position by now is handled from its first event on.
        """
        names = [*domains, EVERY_DOMAIN] if domain is None else [domain]
        for name in names:
            await self._register(name, terms, FIRST, [])

    async def _register(
        self,
        domain: str,
        terms: Terms,
        start: Start | datetime,
        there: list[str] | None,
    ) -> tuple[Start | datetime, list[str]] | None:
        """Return where the handler begins and what is to be marked, None if nothing is."""
        where = [self._registration(domain, terms), self._keys.subscribed(ALL)]
        name = keys.subscription_in_index(terms.handler, domain, terms.edition)
        text = _text_of(start)
        names = _UNKNOWN if there is None else "\n".join(there)
        state, *rest = await self._router.run(scripts.SUBSCRIBE, where, [name, text, names])
        if state == b"new":
            return await self._register(domain, terms, start, await self._with_roots(domain, terms))
        if state == b"live":
            return None
        begins, before = (part.decode() for part in rest)
        return _start_of(begins), before.split("\n") if before else []

    async def _with_roots(self, domain: str, terms: Terms) -> list[str]:
        """Return the tags under which a domain has roots."""
        tags = await self.filled()
        counts = await self._router.read_each(
            forms.is_count,
            [["ZCARD", self._keys.roots(domain, terms.edition, tag)] for tag in tags],
        )
        return [tag for tag, count in zip(tags, counts, strict=True) if count]

    async def _mark(self, domain: str, terms: Terms, tag: str, start: Start | datetime) -> None:
        worklist = Worklist(self._router, self._keys, domain, tag, terms)
        is_marked = False
        while not is_marked:
            polled = await worklist.poll(0)
            places = [Aggregate(domain, root, terms.edition) for root, _ in polled.changed]
            is_marked = await worklist.mark(polled, await self.starts_of(places, start))

    async def _is_marked(self, domain: str, terms: Terms) -> None:
        key = self._registration(domain, terms)
        await self._router.change(forms.is_count, "HSET", key, "state", "live", "there", "")

    def _registration(self, domain: str, terms: Terms) -> str:
        return self._keys.subscription(terms.handler, domain, terms.edition, ALL)

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


async def _first_since(reader: Reader, place: Aggregate, moment: datetime) -> int:
    following = 0
    async for event in reader.stream(Range(place)):
        if event.time >= moment:
            return event.sequence
        following = event.sequence + 1
    return following


def _text_of(start: Start | datetime) -> str:
    """Return what subscribe.lua takes."""
    return start.value if isinstance(start, Start) else f"{codec.to_microseconds(start)}"


def _start_of(text: str) -> Start | datetime:
    """Return what `_text_of` was made of."""
    return Start(text) if text.isalpha() else codec.from_microseconds(int(text))
