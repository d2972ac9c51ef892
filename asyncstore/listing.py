"""What there is: the names in the indexes, of which a cluster has some for each slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asyncstore import forms
from asyncstore.sharing import all_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from asyncstore.keys import Keys
    from asyncstore.router import Router

PAGE: Final = 1000
_INDEXES_AT_ONCE: Final = 1024


class Page(NamedTuple):
    """Names of an index, and after what the next ones come; empty if there are no more."""

    names: list[str]
    last: bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """Goes through indexes page by page, through many at a time.

    A cluster has 16,384 of each kind, most of them empty in all but large stores. So it is asked
    first which are there.
    """

    _router: Router
    _keys: Keys

    async def names(self, indexes: list[str]) -> AsyncIterator[str]:
        """Iterate over the names in some indexes, each once, in alphabetical order."""
        if len(indexes) == 1:
            async for page in self.pages_of_names(indexes):
                for name in page:
                    yield name
            return
        found: set[str] = set()
        async for page in self.pages_of_names(indexes):
            found.update(page)
        for name in sorted(found, key=str.encode):
            yield name

    def pages_of_names(self, indexes: list[str], most: int = PAGE) -> AsyncIterator[list[str]]:
        """Iterate over the names in some indexes, those of each in alphabetical order."""
        return self._pages(indexes, self.names_in, most)

    def pages_of_roots(
        self, domain: str, edition: str, most: int = PAGE
    ) -> AsyncIterator[list[str]]:
        """Iterate over the roots of a domain, those of each index in the order of their commits."""
        indexes = [self._keys.roots(domain, edition, tag) for tag in self._keys.tags()]
        return self._pages(indexes, self.roots_in, most)

    async def _pages(
        self,
        indexes: list[str],
        page_of: Callable[[str, bytes, int], Coroutine[Any, Any, Page]],
        most: int,
    ) -> AsyncIterator[list[str]]:
        async for there in self.those_there(indexes):
            first_pages = await all_of(page_of(key, b"", most) for key in there)
            for key, page in zip(there, first_pages, strict=True):
                yield page.names
                # An append moves its root to the end of its index. So a root may come by again, but
                # can't slip past: what is before the place we have come to was given out.
                given = set(page.names)
                while page.last:
                    page = await page_of(key, page.last, most)
                    new = [name for name in page.names if name not in given]
                    given.update(new)
                    yield new

    async def those_there(self, indexes: list[str]) -> AsyncIterator[list[str]]:
        """Iterate over the indexes to look at, many at a time."""
        if len(indexes) == 1:  # it costs less to look than to ask before
            yield indexes
            return
        rounds = -(-len(indexes) // _INDEXES_AT_ONCE)
        for first in range(rounds):
            some = indexes[first::rounds]  # of all nodes, as each has slots that are neighbours
            yield await self._router.those_there(some)

    async def commits(self) -> dict[str, int]:
        """Return the number of the last commit under each tag that has one."""
        tags = {self._keys.commits(tag): tag for tag in self._keys.tags()}
        found: dict[str, int] = {}
        async for there in self.those_there(list(tags)):
            reads = (self._router.read(forms.is_text_or_nil, "GET", key) for key in there)
            for key, text in zip(there, await all_of(reads), strict=True):
                if text is not None:
                    found[tags[key]] = int(text.split()[0])
        return found

    async def names_in(self, key: str, after: bytes = b"", most: int = PAGE) -> Page:
        """Return the names of an index after one of them, in alphabetical order."""
        start = b"(" + after if after else b"-"
        found: list[bytes] = await self._router.read(
            forms.is_texts, "ZRANGE", key, start, "+", "BYLEX", "LIMIT", 0, most
        )
        return Page(_decoded(found), found[-1] if len(found) == most else b"")

    async def roots_in(self, key: str, after: bytes = b"", most: int = PAGE) -> Page:
        """Return the roots of an index after a commit's number, in the order of their commits."""
        start = b"(" + after if after else b"-inf"
        by = ("BYSCORE", "LIMIT", 0, most, "WITHSCORES")
        reply = await self._router.read(forms.is_scored, "ZRANGE", key, start, "+inf", *by)
        found = forms.pairs_of(reply)
        last = b"%d" % int(float(found[-1][1])) if len(found) == most else b""
        return Page(_decoded([root for root, _ in found]), last)


async def in_portions(pages: AsyncIterator[list[str]], size: int) -> AsyncIterator[list[str]]:
    """Iterate over what is on pages, so much at a time: many slots have one name each."""
    portion: list[str] = []
    async for page in pages:
        portion += page
        while len(portion) >= size:
            yield portion[:size]
            del portion[:size]
    if portion:
        yield portion


async def flat(pages: AsyncIterator[list[str]]) -> AsyncIterator[str]:
    """Iterate over what is on pages."""
    async for page in pages:
        for name in page:
            yield name


def _decoded(names: list[bytes]) -> list[str]:
    return [name.decode(errors="replace") for name in names]
