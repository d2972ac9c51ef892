"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio

DEADLINE_SECONDS = 30


async def eventually(condition: Callable[[], Awaitable[bool] | bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        outcome = condition()
        if outcome if isinstance(outcome, bool) else await outcome:
            return
        await anyio.sleep(0.01)
    raise AssertionError(f"in {DEADLINE_SECONDS} seconds it did not happen that {what}")
