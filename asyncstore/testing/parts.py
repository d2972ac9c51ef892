"""What of the contract is run: the parts that a store has, and which cases."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """A part that a store may lack and still be a store of events."""

    CORRELATION = "correlation"  # correlation ids
    EDITIONS = "editions"  # time lines beside main
    IDEMPOTENCY = "idempotency"  # idempotency keys
    LIMITS = "limits"  # those of asyncstore.Settings for one event and one append
    LISTENING = "listening"  # hearing of events as they are appended
    POSITIONS = "positions"  # how far handlers are
    SNAPSHOTS = "snapshots"  # and loading with them
    SOURCES = "sources"  # which event of which aggregate made a saga write this one


@dataclass(frozen=True, slots=True)
class Terms:
    """What is run: cases whose names match `only`, an expression as in `pytest -k`, or all.

    `lacks` are parts that the stores do not have, `seconds` is how long a case may take.
    """

    lacks: tuple[Part, ...] = ()
    only: str = ""
    seconds: float = 60.0
