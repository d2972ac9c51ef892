"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio

DEADLINE_SECONDS = 30


async def eventually(
    condition: Callable[[], Awaitable[bool] | bool],
    what: str,
    seconds: float = DEADLINE_SECONDS,
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        outcome = condition()
        if outcome if isinstance(outcome, bool) else await outcome:
            return
        await anyio.sleep(0.01)
    raise AssertionError(f"in {seconds} seconds it did not happen that {what}")
