"""Looking at the server's keys one by one, whatever they hold: what `verify` does.

Names that are no text have a lone surrogate for each byte that is none, as file names do in Python,
so that they can be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from asyncstore import forms, walking
from asyncstore.names import MAX_SEQUENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncstore.router import Router
    from asyncstore.wire import Argument

_FIRST_PAGE: Final = 4
_LARGEST_PAGE: Final = 32  # members
_BYTES_A_PAGE: Final = 1024 * 1024  # what has more is followed by a smaller one
_NO_TEXT: Final = "surrogateescape"
_KEYS_A_SCAN: Final = 1000

Scored = tuple[bytes, float]
"""A member of a sorted set and its score."""


@dataclass(frozen=True, slots=True)
class Looker:
    """Asks the servers what is there. Nothing is changed, and no answer is large."""

    _router: Router

    async def kind(self, key: str) -> str:
        """Return the type of a key's value, such as 'zset'; 'none' where there is nothing."""
        reply: bytes = await self._ask(forms.is_text, "TYPE", key)
        return reply.decode(errors="replace")

    async def exists(self, *keys: str) -> bool:
        """Whether one of the keys is there."""
        return bool(await self._ask(forms.is_count, "EXISTS", *keys))

    async def text(self, key: str) -> str | None:
        """Return a string; None where there is none."""
        reply = await self._ask(forms.is_text_or_nil, "GET", key)
        return None if reply is None else str(reply.decode(errors="replace"))

    async def size(self, key: str) -> int:
        """Return how many members a sorted set has."""
        count: int = await self._ask(forms.is_count, "ZCARD", key)
        return count

    async def count(self, key: str, lowest: int | str, highest: str) -> int:
        """Return how many members of a sorted set have a score in the range."""
        count: int = await self._ask(forms.is_count, "ZCOUNT", key, lowest, highest)
        return count

    async def is_scored(self, key: str, member: str) -> bool:
        """Whether a sorted set has the member."""
        return await self.score(key, member) is not None

    async def score(self, key: str, member: str) -> float | None:
        """Return the score of a member of a sorted set; None if it is not one."""
        reply = await self._ask(forms.is_score, "ZSCORE", key, member)
        return None if reply is None else float(reply)

    async def is_member(self, key: str, member: str) -> bool:
        """Whether a set has the member."""
        return bool(await self._ask(forms.is_count, "SISMEMBER", key, member))

    async def highest(self, key: str) -> float | None:
        """Return the highest score that can be a commit's of a sorted set of short members."""
        by = ("BYSCORE", "REV", "LIMIT", 0, 1)
        reply = await self._scored(key, MAX_SEQUENCE, 0, *by)
        return reply[0][1] if reply else None

    async def is_in_order(self, key: str) -> bool:
        """Whether all scores of a sorted set are 0: only then it can be searched by its members."""
        return not (await self.count(key, "-inf", "(0") or await self.count(key, "(0", "+inf"))

    async def pages(self, key: str) -> AsyncIterator[list[Scored]]:
        """Iterate over a sorted set in its order, a few members at a time."""
        start, size = 0, _FIRST_PAGE
        while page := await self._scored(key, start, start + size - 1):
            yield page
            start += len(page)
            size = _next_size(size, page)

    async def between(self, key: str, first: int, last: int) -> AsyncIterator[Scored]:
        """Iterate over the members of a sorted set with scores in the range."""
        start, size = f"{first}", _FIRST_PAGE
        while page := await self._scored(key, start, last, "BYSCORE", "LIMIT", 0, size):
            for entry in page:
                yield entry
            start, size = f"({page[-1][1]:.17g}", _next_size(size, page)

    async def texts(self, key: str, start: str, stop: str, most: int) -> list[str]:
        """Return the members of a sorted set in a range of the alphabet; `(` or `[` in front."""
        return await self._texts(key, start, stop, "BYLEX", "LIMIT", 0, most)

    async def last_texts(self, key: str, start: str, stop: str, most: int) -> list[str]:
        """Return the last members of a sorted set in a range of the alphabet, the first first."""
        found = await self._texts(key, stop, start, "BYLEX", "REV", "LIMIT", 0, most)
        return found[::-1]

    async def keys(self, prefix: str) -> AsyncIterator[list[str]]:
        """Iterate over the keys with a prefix; one may come twice."""
        async for page in walking.keys(self._router, prefix):
            yield [name.decode(errors=_NO_TEXT) for name in page]

    async def names(self, key: str) -> AsyncIterator[list[str]]:
        """Iterate over a sorted set of names, in no order; one may come twice."""
        async for page in self._scan("ZSCAN", key):
            yield page[::2]

    async def members(self, key: str) -> AsyncIterator[list[str]]:
        """Iterate over a set of names, in no order; one may come twice."""
        async for page in self._scan("SSCAN", key):
            yield page

    async def _scan(self, command: str, key: str) -> AsyncIterator[list[str]]:
        cursor, count = b"0", ("COUNT", _KEYS_A_SCAN)
        while True:
            cursor, found = await self._ask(forms.is_scan, command, key, cursor, *count)
            yield [name.decode(errors=_NO_TEXT) for name in found]
            if cursor == b"0":
                return

    async def _scored(self, key: str, *arguments: str | int) -> list[Scored]:
        reply = await self._ask(forms.is_scored, "ZRANGE", key, *arguments, "WITHSCORES")
        return [(member, float(score)) for member, score in forms.pairs_of(reply)]

    async def _ask(self, form: forms.Form, command: str, key: str, *arguments: Argument) -> Any:
        return await self._router.read(
            form, command, key.encode(errors=_NO_TEXT), *map(_sent, arguments)
        )

    async def _texts(self, key: str, *arguments: str | int) -> list[str]:
        reply = await self._ask(forms.is_texts, "ZRANGE", key, *arguments)
        return [text.decode(errors=_NO_TEXT) for text in reply]


def _sent(argument: Argument) -> Argument:
    return argument.encode(errors=_NO_TEXT) if isinstance(argument, str) else argument


def _next_size(size: int, page: list[Scored]) -> int:
    """Return how many members the next page should have."""
    if sum(len(member) for member, _ in page) > _BYTES_A_PAGE:
        return max(1, size // 4)
    return min(4 * size, _LARGEST_PAGE)
