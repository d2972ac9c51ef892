"""Handlers of an application: functions that get events, and run until they are told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
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
    from collections.abc import Sequence

    from asyncstore.deliveries import Delivery
    from asyncstore.observing import Processing
    from asyncstore.recorded import RecordedEvent
    from asyncstore.subscriptions import Subscription

_log = logging.getLogger(__name__)

_FIRST_DELAY: Final = 0.1  # seconds before an event is tried again; doubled each time
_LONGEST_DELAY: Final = 30.0
_SETTLE_PAUSE: Final = 0.1

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
                    for _ in range(handler.concurrency):
                        working.start_soon(_work, handler, sub)
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


async def _work(handler: Handler, sub: Subscription) -> None:
    """Handle one event after the other until the subscription ends."""
    while True:
        try:
            delivery = await anext(sub)
        except StopAsyncIteration:
            return
        except StoreClosed:
            raise
        except AsyncStoreError as error:
            _log.error("%s: %s", handler.name, error, extra={HANDLER: handler.name})
            continue
        await _handle(handler, sub, delivery)


async def _handle(handler: Handler, sub: Subscription, delivery: Delivery) -> None:
    with delivery.observed() as processing:
        await _handle_observed(handler, sub, delivery, processing)


async def _handle_observed(
    handler: Handler, sub: Subscription, delivery: Delivery, processing: Processing
) -> None:
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
        await _settle(handler, partial(delivery.nack, delay=delay, reason=reason))
    except BaseException:
        sub.give_up(delivery)
        raise
    else:
        await _settle(handler, delivery.ack)


def _about(delivery: Delivery, reason: str) -> dict[str, Any]:
    event = delivery.event
    place = {**named(event.aggregate), SEQUENCE: event.sequence, ATTEMPT: delivery.attempt}
    return {HANDLER: delivery.handler, **place, ERROR: reason}


async def _settle(handler: Handler, say: Callable[[], Awaitable[object]]) -> None:
    """Say what became of an event, as long as that can be said."""
    while True:
        try:
            await say()
        except LeaseLost as error:
            _log.warning("%s", error, extra={HANDLER: handler.name})
            return
        except (StoreUnavailable, OutcomeUnknown, StoreFull) as error:
            _log.warning(
                "%s can't settle an event yet: %s",
                handler.name,
                error,
                extra={HANDLER: handler.name},
            )
            await anyio.sleep(_SETTLE_PAUSE)
        else:
            return
