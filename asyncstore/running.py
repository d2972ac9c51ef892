"""Handlers of an application: functions that get events, and run until they are told to stop.

A handler has more tasks than functions may run at once: while one waits for the answer to its ack,
another goes on with an event of another aggregate. So no ack has a task of its own, and each task
does one thing after the other: take, handle, ack.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from asyncstore.errors import (
    AsyncStoreError,
    LeaseLost,
    OutcomeUnknown,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
)
from asyncstore.observing import ATTEMPT, ERROR, HANDLER, SEQUENCE, named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncstore.deliveries import Delivery
    from asyncstore.observing import Processing
    from asyncstore.recorded import RecordedEvent
    from asyncstore.subscriptions import Subscription

_log = logging.getLogger(__name__)

_FIRST_DELAY: Final = 0.1  # seconds before an event is tried again; doubled each time
_LONGEST_DELAY: Final = 30.0
_SETTLE_PAUSE: Final = 0.1

# Events of a handler that may wait for the answers to their acks while as many functions as may are
# running. They come again if the process dies. 8 were slower, 32 no faster; each has an idle task.
_MOST_UNSETTLED: Final = 16
_LONGEST_TURN: Final = 0.001  # seconds of the event loop in which functions begin, one by one

Function = Callable[["RecordedEvent"], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Handler:
    """A function, what makes subscriptions for it, and how many of it may run at once."""

    name: str
    function: Function
    subscribe: Callable[[], Subscription]
    concurrency: int
    close_timeout: float


async def run(handlers: Sequence[Handler]) -> None:
    """Run handlers until a SIGTERM, or until it is cancelled.

    At a SIGTERM those that are running come to their end, for at most their `close_timeout`.
    """
    async with AsyncExitStack() as stack:
        subs = [await stack.enter_async_context(handler.subscribe()) for handler in handlers]
        limit = max((handler.close_timeout for handler in handlers), default=0.0)
        async with anyio.create_task_group() as watching:
            async with anyio.create_task_group() as working:
                watching.start_soon(_stop_at_sigterm, subs, limit, working.cancel_scope)
                for handler, sub in zip(handlers, subs, strict=True):
                    slots = _Slots(handler.concurrency)
                    for _ in range(handler.concurrency + _MOST_UNSETTLED):
                        working.start_soon(_work, handler, sub, slots)
            watching.cancel_scope.cancel()


async def _stop_at_sigterm(
    subs: Sequence[Subscription], limit: float, working: anyio.CancelScope
) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # signals are for the main thread
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            _log.info("SIGTERM: handlers finish what they have in progress")
            for sub in subs:
                sub.stop()
            await anyio.sleep(limit)
            working.cancel()


class _Slots:
    """Room for so many functions at once; those that only compute let others of the loop run.

    Many tasks may come in one turn of the event loop, when the acks of all were answered together.
    """

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._turn_ends = 0.0  # by the clock of the event loop
        self._is_turn_over = False

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() >= self._turn_ends:
            if not self._is_turn_over:
                self._is_turn_over = True
                loop.call_soon(self._begin_turn, loop)  # before those who wait for it
            await asyncio.sleep(0)
        await self._free.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._free.release()

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_turn_over = False
        self._turn_ends = loop.time() + _LONGEST_TURN


async def _work(handler: Handler, sub: Subscription, slots: _Slots) -> None:
    """Handle one event after the other until the subscription ends."""
    while True:
        with ExitStack() as handling:
            async with slots:
                delivery = await _next(handler, sub)
                if delivery is None:
                    return
                processing = handling.enter_context(_handling(sub, delivery))
                say = await _call(handler, delivery, processing)
            await _settle(handler, say)


async def _next(handler: Handler, sub: Subscription) -> Delivery | None:
    """Return the next delivery, None at the end."""
    while True:
        try:
            return await anext(sub)
        except StopAsyncIteration:
            return None
        except StoreClosed:
            raise
        except AsyncStoreError as error:
            _log.error("%s: %s", handler.name, error, extra={HANDLER: handler.name})


@contextmanager
def _handling(sub: Subscription, delivery: Delivery) -> Iterator[Processing]:
    """Show a delivery being handled and settled; let it come again where that is broken off."""
    with delivery.observed() as processing:
        try:
            yield processing
        except BaseException:
            sub.give_up(delivery)
            raise


async def _call(
    handler: Handler, delivery: Delivery, processing: Processing
) -> Callable[[], Awaitable[object]]:
    """Call the function; return what is to be said of the event."""
    try:
        await handler.function(delivery.event)
    except Exception as error:
        processing.failed(error)
        delay = min(_FIRST_DELAY * 2 ** (delivery.attempt - 1), _LONGEST_DELAY)
        reason = type(error).__name__
        _log.warning(
            "%s has failed with %s at %r, attempt %s",
            handler.name, reason, delivery, delivery.attempt, exc_info=error,
            extra=_about(delivery, reason),
        )  # fmt: skip
        return partial(delivery.nack, delay=delay, reason=reason)
    return delivery.ack


def _about(delivery: Delivery, reason: str) -> dict[str, Any]:
    event = delivery.event
    place = {**named(event.aggregate), SEQUENCE: event.sequence, ATTEMPT: delivery.attempt}
    return {HANDLER: delivery.handler, **place, ERROR: reason}


async def _settle(handler: Handler, say: Callable[[], Awaitable[object]]) -> None:
    """Say what became of an event, as long as that can be said; warn of it once that it waits."""
    level = logging.WARNING
    while True:
        try:
            await say()
        except LeaseLost as error:
            _log.warning("%s", error, extra={HANDLER: handler.name})
            return
        except (StoreUnavailable, OutcomeUnknown, StoreFull) as error:
            extra = {HANDLER: handler.name}
            _log.log(level, "%s can't settle an event yet: %s", handler.name, error, extra=extra)
            level = logging.DEBUG
            await anyio.sleep(_SETTLE_PAUSE)
        else:
            return
