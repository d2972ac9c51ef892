"""Calls that are made together: many at the same time, or one for many who want its result."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from asyncstore.errors import AsyncStoreError, StoreClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

T = TypeVar("T")


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Make calls at the same time. If one fails, the others are cancelled, and its error raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quickest(
    calls: Iterable[Coroutine[Any, Any, T]], seconds: float, grace: float
) -> list[T | BaseException]:
    """Make calls at the same time until one of them succeeds; the others have `grace` seconds more.

    Returns what each brought, or raised: `TimeoutError` if it was too late, after `seconds` at
    most, and was cancelled.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    loop = asyncio.get_running_loop()
    end, late = loop.time() + seconds, set(tasks)
    try:
        while late and loop.time() < end and not any(map(_has_succeeded, tasks)):
            left = end - loop.time()
            _, late = await asyncio.wait(late, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if late:
            await asyncio.wait(late, timeout=grace)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return list(map(_outcome, tasks))


def _outcome(task: asyncio.Task[T]) -> T | BaseException:
    return TimeoutError() if task.cancelled() else task.exception() or task.result()


def _has_succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


class Shared(Generic[T]):
    """Does `work` when somebody asks, and never twice at a time.

    Whoever is cancelled stops waiting; the work goes on for the others.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._is_closed = False

    async def result(self) -> T:
        """Return what the work under way brings, or begin it; an error is raised in all."""
        if self._is_closed:
            raise StoreClosed("the store was closed; nothing was changed")
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
            # All who waited may be gone: then nobody hears how it ended.
            self._task.add_done_callback(lambda done: done.cancelled() or done.exception())
        task = self._task
        try:
            return await asyncio.shield(task)
        except AsyncStoreError as error:
            raise copy.copy(error) from None  # one error can't be raised in many tasks
        except asyncio.CancelledError:
            if task.cancelled() and self._is_closed:
                raise StoreClosed("the store was closed; nothing was changed") from None
            raise

    async def aclose(self) -> None:
        """End the work under way; who waits for it gets `StoreClosed`."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
