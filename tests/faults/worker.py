"""A worker of a handler in a process of its own, to be killed: python -m tests.faults.worker …

Writes a line for each delivery, each ack that was answered, and when it blocks its event loop:
time, what it was, root, sequence.
With a seed it also misbehaves now and then: refuses events, drops them, and blocks its event loop
until its leases have ended.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncstore
from asyncstore import (
    Bundle,
    Delivery,
    LeaseLost,
    OutcomeUnknown,
    StoreUnavailable,
    Subscription,
)

HANDLER = "projector"
LEASE, SWEEP = 0.5, 0.1
EVENTS, BUNDLES = "events", "bundles"

Note = Callable[[str, Delivery], None]


async def work(url: str, prefix: str, log: Path, manner: str, seed: str) -> None:
    dice = random.Random(seed) if seed else None
    with log.open("a", buffering=1) as file:

        def note(what: str, delivery: Delivery) -> None:
            for event in delivery.events:
                moment = time.monotonic_ns()
                file.write(f"{moment} {what} {event.aggregate.root} {event.sequence}\n")

        async with (
            asyncstore.open(url, key_prefix=prefix) as store,
            store.subscribe(HANDLER, "orders", lease=LEASE, sweep=SWEEP, retries=None) as sub,
        ):
            async for some in taken(sub, manner):
                deliveries = some.deliveries if isinstance(some, Bundle) else [some]
                for delivery in deliveries:
                    note("delivered", delivery)
                try:
                    if dice is not None and await is_mischief(sub, deliveries, dice, note):
                        continue
                    await some.ack()
                except (LeaseLost, StoreUnavailable, OutcomeUnknown):
                    continue
                for delivery in deliveries:
                    note("acked", delivery)


def taken(sub: Subscription, manner: str) -> AsyncIterator[Delivery | Bundle]:
    return sub.bundles() if manner == BUNDLES else aiter(sub)


async def is_mischief(
    sub: Subscription, deliveries: list[Delivery], dice: random.Random, note: Note
) -> bool:
    """Whether something was done that should not be, and nothing more is to be done."""
    await asyncio.sleep(0)
    outcome = dice.random()
    if outcome < 0.01:
        await dice.choice(deliveries).nack(delay=dice.choice([0, 0.05]), reason="on purpose")
        return True
    if outcome < 0.012:
        note("blocked", deliveries[0])
        time.sleep(1.3 * LEASE)  # noqa: ASYNC251 - it renews nothing meanwhile
    if outcome < 0.995:
        return False
    for delivery in deliveries:
        sub.give_up(delivery)
    return True


if __name__ == "__main__":
    where, name, file_name, *how = sys.argv[1:]
    asyncio.run(work(where, name, Path(file_name), *(how or (EVENTS, ""))))
