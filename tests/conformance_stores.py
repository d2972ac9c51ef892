"""Factories for `asyncstore conformance`: a sound store, and some with one fault each.

They are on the server that CONFORMANCE_URL names.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncstore
from asyncstore import (
    ANY,
    MAIN,
    Aggregate,
    Appended,
    Event,
    RecordedEvent,
    Store,
)
from asyncstore.testing import remove_all


@asynccontextmanager
async def sound() -> AsyncIterator[Store]:
    prefix = f"test-{uuid.uuid4().hex}:"
    async with asyncstore.open(os.environ["CONFORMANCE_URL"], key_prefix=prefix) as store:
        yield store
    await remove_all(store.settings)


class Part:
    """Hands on to a part of a store whatever it does not do itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Unchecked(Part):
    """Appends wherever the end is."""

    async def append(self, place: Aggregate, events: list[Event], **asked: Any) -> Appended:
        appended: Appended = await self.inner.append(place, events, **asked | {"expected": ANY})
        return appended


class Doubling(Part):
    """Stores what it appends twice, as a client does that sends again after a lost reply."""

    async def append(self, place: Aggregate, events: list[Event], **asked: Any) -> Appended:
        appended: Appended = await self.inner.append(place, events, **asked)
        await self.inner.append(place, events, expected=ANY)
        return appended


class Disordered(Part):
    """Returns the last two events that it has read the other way round."""

    async def read(self, place: Aggregate, **asked: Any) -> list[RecordedEvent]:
        events: list[RecordedEvent] = await self.inner.read(place, **asked)
        return events[:-2] + events[-2:][::-1]


class Forgetful(Part):
    """Takes every position, also one that goes back."""

    async def advance(self, handler: str, place: Aggregate, sequence: int) -> bool:
        await self.inner.put(handler, place, sequence)
        return True


class Stuck(Part):
    """Never answers what a position is."""

    async def get(self, handler: str, place: Aggregate) -> int:
        await asyncio.Event().wait()
        raise AssertionError


class OneTimeLine(Part):
    """Has no editions but main, and says so; nothing about it is broken."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def call(*arguments: Any, **asked: Any) -> Any:
            places = [each for each in arguments if isinstance(each, Aggregate)]
            if any(place.edition != MAIN for place in places) or name == "editions":
                raise NotImplementedError("editions")
            return method(*arguments, **asked)

        return call


class WithParts(Part):
    def __init__(self, store: Store, **parts: Any) -> None:
        super().__init__(store)
        vars(self).update(parts)


def _with(**parts: Callable[[Any], Any]) -> Any:
    @asynccontextmanager
    async def factory() -> AsyncIterator[WithParts]:
        async with sound() as store:
            made = {name: part(getattr(store, name)) for name, part in parts.items()}
            yield WithParts(store, **made)

    return factory


@asynccontextmanager
async def closed() -> AsyncIterator[Store]:
    raise OSError("closed")
    yield  # which makes this a generator


unchecked = _with(events=Unchecked)
doubling = _with(events=Doubling)
disordered = _with(events=Disordered)
forgetful = _with(positions=Forgetful)
stuck = _with(positions=Stuck)
one_time_line = _with(events=OneTimeLine, positions=OneTimeLine, snapshots=OneTimeLine)
