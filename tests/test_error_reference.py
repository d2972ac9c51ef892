"""docs/errors.md has every public error: the words that it says, its status, and what to do."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import asyncstore.typed
from asyncstore import Aggregate, AsyncStoreError, Durability, errors
from asyncstore.integrations import http
from tests import markdown

PAGE = Path("docs/errors.md")
ORDER = Aggregate("orders", "8f1c")
WHERE = "redis://localhost:6379"

SAMPLES = [
    errors.InvalidName(
        "domain", "or/ders", "only letters A-Z a-z, digits, '.', '_' and '-' are allowed"
    ),
    errors.InvalidValue("limit", "-1 is negative"),
    errors.InvalidType("data", "it can't be written as JSON: Type is not JSON serializable: set"),
    errors.EventTooLarge("max_event_bytes", 16_777_216, 20_000_000, 0),
    errors.ConfigurationError("timeout", "0 is not between 0.001 and 86400"),
    errors.SequenceConflict(ORDER, 1, 2),
    errors.HistoryRegressed(ORDER, 7, 5),
    errors.BranchExists(ORDER.on("what-if"), 3, 2),
    errors.ProtectedEdition("main", "it is the one that others diverge from"),
    errors.CorruptEvent("events:orders:main:{8f1c}", 3, "events 3 to 5 are missing"),
    errors.CorruptPosition("positions:projector:orders:main:{8f1c}"),
    errors.MoveRefused(ORDER, "its source can't be read"),
    errors.ListenerLagged(250, 1000),
    errors.LeaseLost("projector", ORDER, 4),
    errors.StillBehind("projector", ORDER, 4, 2),
    errors.InvalidEvent(
        "OrderPlaced", 2, "ValidationError when it was written and read back", "total"
    ),
    errors.UnreadableEvent(
        ORDER, 3, "OrderPlaced", 2, "ValidationError when it was made of the data", "total"
    ),
    errors.UnknownEvent(ORDER, 3, "OrderPlaced", 3, 2),
    errors.ForgottenEvent(ORDER, 3, "Moved", 1, "c-17"),
    errors.UnsafeServer(WHERE, "allkeys-lru"),
    errors.StoreUnavailable(
        WHERE, "no connection in 10.0 s (nobody listens there); nothing was changed"
    ),
    errors.DurabilityUnavailable(
        WHERE, Durability.FSYNC, "its appendfsync is everysec, and always is needed"
    ),
    errors.DurabilityNotReached(ORDER, 4, 5, Durability.replicas(2), False, 1),
    errors.OutcomeUnknown(WHERE, "append: no answer in 10.0 s"),
    errors.StoreFull(WHERE),
    errors.UnexpectedReply(WHERE, "append", "NOPERM"),
    errors.StoreClosed("the store is not open: use it inside `async with asyncstore.open()`"),
]

SECTIONS = markdown.sections_of(PAGE, 3)


def test_every_public_error_has_its_section() -> None:
    public = {
        name
        for module in (asyncstore, asyncstore.typed)
        for name in module.__all__
        if isinstance(found := getattr(module, name), type) and issubclass(found, AsyncStoreError)
    }
    assert set(SECTIONS) == public - {"AsyncStoreError"}
    assert {type(sample).__name__ for sample in SAMPLES} == set(SECTIONS)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_section_says_when_and_what_to_do(
    sample: AsyncStoreError, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    section = SECTIONS[type(sample).__name__]
    assert f"```text\n{sample}\n```" in section
    when, _, todo = section.partition("**What to do.** ")
    assert len(when.strip()) > 20
    assert len(todo.strip()) > 20
    status = re.search(r"^Over HTTP: (\d+)", section, re.M)
    assert status is not None
    assert int(status[1]) == http.problem_of(sample).status
