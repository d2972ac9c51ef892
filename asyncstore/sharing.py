"""The event loop of a store, and calls in it: many at once, or one for many who want its result."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from asyncstore.errors import AsyncStoreError, StoreClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

T = TypeVar("T")


def running_loop(opened_in: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
    """Return the event loop in which a store was opened; None is that of one which is not open.

    Raises `StoreClosed` if it is not the one that runs.
    """
    if opened_in is None:
        raise StoreClosed("the store is not open: use it inside `async with asyncstore.open()`")
    if opened_in is not asyncio.get_running_loop():
        raise StoreClosed(
            "the store was opened in another event loop: open one in each loop and process"
        )
    return opened_in


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Make calls at the same time. If one fails, the others are cancelled, and its error raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        # Not gather: when the caller is cancelled it would cancel them, too, and `end_all` again,
        # in the middle of what they clean up.
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and not _has_succeeded(task):
                task.result()  # raises why
        return [task.result() for task in tasks]
    finally:
        await end_all(tasks)


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
        await end_all(tasks)
    return list(map(_outcome, tasks))


async def end_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what is not done, and wait for it, also when the caller is cancelled once more."""
    for task in tasks:
        task.cancel()
    with anyio.CancelScope(shield=True):
        await asyncio.gather(*tasks, return_exceptions=True)


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
