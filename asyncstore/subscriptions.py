"""Durable subscriptions: every event at least once, in order per aggregate, shared by workers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self, TypedDict

from asyncstore.deliveries import Bundle
from asyncstore.names import check_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from datetime import datetime
    from types import TracebackType

    from asyncstore.deliveries import Delivery
    from asyncstore.progress import Subscriptions
    from asyncstore.values import Start
    from asyncstore.worker import Worker


class SubscribeOptions(TypedDict, total=False):
    """The options of `Store.subscribe`, for handlers that are decorated."""

    edition: str
    start: Start | datetime
    types: Iterable[str] | None
    batch: int
    lease: float
    sweep: float
    retries: int | None
    close_timeout: float


class Subscription:
    """A worker of a handler; made by `Store.subscribe`.

    Leases aggregates that the handler is behind in, a few ahead, delivers their events, and keeps
    the leases while it lives. Several tasks may iterate over it at once.
    """

    def __init__(self, worker: Worker, progress: Subscriptions) -> None:
        self._worker = worker
        self._progress = progress

    async def __aenter__(self) -> Self:
        await self._worker.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what others have in progress, with a limit, and give all leases back.

        What the leaving task itself has taken and not acked is given back at once.
        """
        await self._worker.close()

    @property
    def close_timeout(self) -> float:
        """How many seconds leaving waits at most for what is in progress."""
        return self._worker.close_timeout

    def stop(self) -> None:
        """Deliver nothing more: those who iterate come to an end. Deliveries can still be acked."""
        self._worker.stop()

    def give_up(self, delivery: Delivery) -> None:
        """Say that nobody works on a delivery any more; it comes again when its lease ends.

        Or at once, when the subscription is left.
        """
        self._worker.give_up(delivery)

    async def wait_until_caught_up(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - as other stores have it
    ) -> None:
        """Wait until the handler has handled all that was appended before this call.

        Whichever worker of the handler does it; another task must take deliveries meanwhile. Raises
        `StillBehind` after `timeout` seconds.
        """
        terms = self._worker.terms
        ends = None if timeout is None else time.monotonic() + check_seconds("timeout", timeout)
        for domain in await self._worker.domains.now():
            left = None if ends is None else max(ends - time.monotonic(), 0.0)
            await self._progress.wait_until_caught_up(
                terms.handler, domain, edition=terms.edition, timeout=left
            )

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        """Return the next delivery of one event, or wait for it."""
        return await self._worker.take(1)

    async def batches(self) -> AsyncIterator[Delivery]:
        """Iterate over deliveries of all events of an aggregate that were leased at once.

        At most `batch` of them. `ack()` is for all; `ack(through=…)` for those up to a sequence.
        """
        while True:
            try:
                yield await self._worker.take(self._worker.terms.batch)
            except StopAsyncIteration:
                return

    async def bundles(self) -> AsyncIterator[Bundle]:
        """Iterate over what can be handled at once: deliveries of several aggregates.

        Those that are there, with at most `batch` events in all: for handlers that write many
        events in one go, such as to another database. `Bundle.ack()` is for all of them.
        """
        worker, batch = self._worker, self._worker.terms.batch
        while True:
            try:
                first = await worker.take(batch)
            except StopAsyncIteration:
                return
            more = worker.take_ready(batch - len(first.events))
            yield Bundle(worker, [first, *more])
