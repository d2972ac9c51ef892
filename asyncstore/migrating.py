"""Moving a store to another one while the application goes on: what `asyncstore migrate` does.

`catch_up` copies the aggregates that have changed since the last time, which at first are all. An
index of roots is in the order of commits, so those are found without looking at the others. Events
that have arrived stay, so a migration that was cut off goes on where it was. What changes without a
commit (positions, snapshots, deletions) is made good in the end: `finish`, for which everybody has
stopped to write, compares the two stores as a whole, and copies again what differs.

What is only in the new store is deleted there. So the new one must be empty at first; it is marked
then, and the mark stays until all has arrived.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import forms
from asyncstore.attached import Attachments
from asyncstore.comparing import Difference, compare, differences
from asyncstore.errors import ConfigurationError, MoveRefused
from asyncstore.lines import write_branch
from asyncstore.names import MAIN
from asyncstore.sharing import all_of
from asyncstore.transfer import CHUNK_BYTES, CHUNK_LINES, History, Import, put_snapshot
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from asyncstore.store import Store

_AT_ONCE: Final = 32  # aggregates
_PAGE: Final = 1000  # roots
_LARGEST_CHUNK: Final = CHUNK_BYTES // _AT_ONCE
_DIFFERENCES: Final = 20


@dataclass(slots=True)
class Caught:
    """What a catch-up has brought: how many events, and of how many aggregates."""

    aggregates: int = 0
    events: int = 0


@dataclass(slots=True)
class Switch:
    """How the last catch-up went, for which nobody wrote.

    `seconds` is how long all of it took, `catching_up` and `comparing` are its parts. `mended`
    aggregates differed until they were copied again. `differences` are the first that are left.
    `is_quiet` is False if somebody has appended to the old store meanwhile.
    """

    caught: Caught
    catching_up: float
    comparing: float
    mended: int = 0
    is_quiet: bool = True
    differences: list[Difference] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long nobody could write."""
        return self.catching_up + self.comparing

    @property
    def is_done(self) -> bool:
        """Whether all has arrived."""
        return self.is_quiet and not self.differences


class Migration:
    """Moves what `old` has to `new`, both open. `on_events` is told how many more have arrived."""

    def __init__(
        self, old: Store, new: Store, on_events: Callable[[int], None] = lambda _: None
    ) -> None:
        self._old = old
        self._new = new
        self._on_events = on_events
        self._copied: dict[str, int] = {}  # the number of the last commit, by tag

    async def begin(self) -> bool:
        """Mark the new store, or return True if a migration from the old one is under way there.

        Raises `ConfigurationError` for one that has something already.
        """
        mark, router = self._new._keys.migration(), self._new._router
        name = f"{self._old.settings.where()} {self._old._keys.prefix}".rstrip().encode()
        found = await router.read(forms.is_text_or_nil, "GET", mark)
        if found is None:
            await self._see_that_it_is_empty()
            await router.change(forms.is_text, "SET", mark, name)
        elif found != name:
            why = (
                f"it is being filled from {found.decode(errors='replace')}: name that, or empty it"
            )
            raise ConfigurationError("new", why, "the arguments")
        return found is not None

    async def _see_that_it_is_empty(self) -> None:
        async for domain in self._new.events.domains():
            why = f"it has events already, of domain {domain!r}; what is moved needs an empty store"
            raise ConfigurationError("new", why, "the arguments")

    async def catch_up(self) -> Caught:
        """Copy what has changed since the last time, which at first is everything."""
        caught = Caught()
        numbers = await self._old.events._listing.commits()
        # What has one of these numbers is in the indexes now; later ones are for the next time.
        changed = {tag: to for tag, to in numbers.items() if to > self._copied.get(tag, 0)}
        if changed:
            async for domain, edition in self._editions():
                await self._catch_up(domain, edition, changed, caught)
        self._copied = numbers
        return caught

    async def finish(self) -> Switch:
        """Copy what is left, compare everything, and copy again what differs.

        Nobody must write to the old store any more, also not handlers and what makes snapshots. If
        the switch that is returned is done, the new store may be used; if not, call it again.
        """
        started = time.perf_counter()
        numbers = await self._old.events._listing.commits()
        caught = await self.catch_up()
        compared = time.perf_counter()
        switch = Switch(caught, compared - started, 0.0)
        await self._mend(switch)
        switch.is_quiet = await self._old.events._listing.commits() == numbers
        if switch.is_done:
            router = self._new._router
            await router.change(forms.is_count, "UNLINK", self._new._keys.migration())
        switch.comparing = time.perf_counter() - compared
        return switch

    # What has changed

    async def _editions(self) -> AsyncIterator[tuple[str, str]]:
        """Iterate over domains and editions, of each domain main first: others diverge from it."""
        async for domain in self._old.events.domains():
            names = [name async for name in self._old.events.editions(domain)]
            for edition in sorted(names, key=lambda name: name != MAIN):
                yield domain, edition

    async def _catch_up(
        self, domain: str, edition: str, changed: dict[str, int], caught: Caught
    ) -> None:
        async for roots in self._changed(domain, edition, changed):
            for first in range(0, len(roots), _AT_ONCE):
                some = [Aggregate(domain, r, edition) for r in roots[first : first + _AT_ONCE]]
                caught.events += sum(await all_of(self._copy(place) for place in some))
                caught.aggregates += len(some)

    async def _changed(
        self, domain: str, edition: str, changed: dict[str, int]
    ) -> AsyncIterator[list[str]]:
        """Iterate over the roots under all tags that have changed since the last time."""
        tags = {self._old._keys.roots(domain, edition, tag): tag for tag in changed}
        async for there in self._old.events._listing.those_there(list(tags)):
            for index in there:
                tag = tags[index]
                after = self._copied.get(tag, 0)
                async for roots in self._changed_in(index, after, changed[tag]):
                    yield roots

    async def _changed_in(self, index: str, after: int, to: int) -> AsyncIterator[list[str]]:
        """Iterate over roots whose last commit is after a number, and not after another."""
        while after < to:
            reply = await self._old._router.read(
                *(forms.is_scored, "ZRANGE", index, f"({after}", to, "BYSCORE"),
                *("LIMIT", 0, _PAGE, "WITHSCORES"),
            )
            found = forms.pairs_of(reply)
            yield [root.decode(errors="replace") for root, _ in found]
            after = int(float(found[-1][1])) if len(found) == _PAGE else to

    # Copying

    async def _copy(self, aggregate: Aggregate) -> int:
        """Make an aggregate the same in the new store; return how many events were copied."""
        count = 0
        at = await self._old.events.divergence(aggregate)
        if aggregate.edition == MAIN or at is not None:
            count = await self._copy_events(aggregate, at)
        elif await self._new.events.divergence(aggregate) is not None:
            await self._new.events.delete(aggregate)
        await self._copy_positions(aggregate)
        await self._copy_snapshots(aggregate)
        return count

    async def _copy_events(self, aggregate: Aggregate, at: int | None) -> int:
        end = await self._old.events.next_sequence(aggregate)
        start = await self._copied_until(aggregate, at)
        if start is None:
            await self._new.events.delete(aggregate)
            start = at or 0
        if at is not None and await self._new.events.divergence(aggregate) is None:
            await self._copy_branch(aggregate, at)
        if start < end:
            history = History(self._old, aggregate, None, at)
            await self._load(aggregate, start, history.lines(start, end))
        self._on_events(max(end - start, 0))
        return max(end - start, 0)

    async def _copied_until(self, aggregate: Aggregate, at: int | None) -> int | None:
        """Return the sequence to go on at; None if something else is there, or too much."""
        there = await self._new.events.divergence(aggregate)
        if there is None and at is not None:
            return at
        end = await self._new.events.next_sequence(aggregate)
        if there != at:
            return None
        if end == (at or 0):
            return end
        last = [
            await store.events.read(aggregate, start=end - 1, limit=1)
            for store in (self._old, self._new)
        ]
        return end if last[0] == last[1] else None

    async def _copy_branch(self, aggregate: Aggregate, at: int) -> None:
        main = aggregate.on(MAIN)
        if await self._new.events.next_sequence(main) < at:
            await self._copy_events(main, None)  # it has grown since it was copied

        async def line() -> AsyncIterator[bytes]:
            yield write_branch(aggregate, at)

        await self._load(aggregate, at, line())

    async def _load(self, aggregate: Aggregate, start: int, lines: AsyncIterator[bytes]) -> None:
        loading = Import(self._new)
        loading.begin_at(aggregate, start)
        chunk: list[tuple[int, bytes]] = []
        size = 0
        async for line in lines:
            chunk.append((len(chunk) + 1, line))
            size += len(line)
            if len(chunk) == CHUNK_LINES or size > _LARGEST_CHUNK:
                await self._load_chunk(aggregate, loading, chunk)
                chunk, size = [], 0
        await self._load_chunk(aggregate, loading, chunk)

    async def _load_chunk(
        self, aggregate: Aggregate, loading: Import, chunk: list[tuple[int, bytes]]
    ) -> None:
        await loading.load(chunk)
        if loading.report.bad_lines:
            raise MoveRefused(aggregate, loading.report.bad_lines[0].why)

    async def _copy_positions(self, aggregate: Aggregate) -> None:
        attached = Attachments(self._new)
        wanted, found = await asyncio.gather(
            Attachments(self._old).positions(aggregate), attached.positions(aggregate)
        )
        for handler, position in wanted.items():
            if found.get(handler) != position:
                await self._new.positions.put(handler, aggregate, position)
        for handler in found.keys() - wanted.keys():
            await attached.remove_position(handler, aggregate)

    async def _copy_snapshots(self, aggregate: Aggregate) -> None:
        attached = Attachments(self._old)
        wanted, found = await asyncio.gather(
            attached.fingerprints(aggregate), Attachments(self._new).fingerprints(aggregate)
        )
        if wanted == found:
            return
        await self._new.snapshots.delete(aggregate)
        async for snapshot in attached.snapshots(aggregate, max(wanted, default=-1)):
            await put_snapshot(self._new, aggregate, snapshot)

    # In the end

    async def _mend(self, switch: Switch) -> None:
        batch: dict[Aggregate, None] = {}
        async for difference in differences(self._old, self._new):
            batch[difference.aggregate] = None
            if len(batch) == _AT_ONCE:
                await self._mend_all(batch, switch)
                batch = {}
            if len(switch.differences) >= _DIFFERENCES:
                return
        await self._mend_all(batch, switch)

    async def _mend_all(self, batch: Iterable[Aggregate], switch: Switch) -> None:
        for left in await all_of(self._mend_one(aggregate) for aggregate in batch):
            switch.differences += left
            switch.mended += not left

    async def _mend_one(self, aggregate: Aggregate) -> list[Difference]:
        """Copy an aggregate again; return what differs all the same."""
        await self._copy(aggregate)
        return await compare(self._old, self._new, aggregate)
