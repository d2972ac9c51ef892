"""A worker of a handler in a process of its own, to be killed: python -m tests.faults.worker …

Writes a line for each delivery and each ack that was answered: time, what it was, root, sequence.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import asyncstore
from asyncstore import LeaseLost

HANDLER = "projector"
LEASE, SWEEP = 0.5, 0.1


async def work(url: str, prefix: str, log: Path) -> None:
    with log.open("a", buffering=1) as file:

        def note(what: str, root: str, sequence: int) -> None:
            file.write(f"{time.monotonic_ns()} {what} {root} {sequence}\n")

        async with (
            asyncstore.open(url, key_prefix=prefix) as store,
            store.subscribe(HANDLER, "orders", lease=LEASE, sweep=SWEEP, retries=None) as sub,
        ):
            async for delivery in sub:
                event = delivery.event
                note("delivered", event.aggregate.root, event.sequence)
                await asyncio.sleep(0)
                try:
                    await delivery.ack()
                except LeaseLost:
                    continue
                note("acked", event.aggregate.root, event.sequence)


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
