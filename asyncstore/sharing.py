"""Work that is done once for all who want its result while it is under way."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from asyncstore.errors import AsyncStoreError, StoreClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


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
