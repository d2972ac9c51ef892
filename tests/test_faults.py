"""The short form of each fault, and proof that the checker can fail."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from functools import partial

import pytest

from asyncstore import embedded, scripts
from asyncstore.scripts import Script
from tests.faults.faults import FAULTS, Fault, cut_power
from tests.faults.run import Row, play
from tests.faults.soak import soak
from tests.faults.stage import EVERYSEC, SHORT, Stage

VALKEY = str(embedded.find_binary())
SEED = 20
LOSERS = {"kill -9, no AOF", "power cut, everysec", "failover, replica cut off", "stale primary"}

pytestmark = pytest.mark.faults


async def played(fault: Fault) -> Row:
    if why := fault.missing():
        pytest.skip(why)
    return await play(fault, "Valkey", VALKEY, SHORT, SEED)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_no_law_is_broken_by(fault: Fault) -> None:
    row = await played(fault)
    assert row.why == []
    assert (row.doubled, row.wrong) == (0, 0)
    assert row.lost == 0 or fault.may_lose
    assert row.lost > 0 or fault.name not in LOSERS
    assert row.writers >= 32
    assert len(row.recovery) == row.rounds


# The checker can fail: the script is broken on purpose, and that is seen


def broken(*changes: tuple[str, str]) -> Script:
    source = scripts.APPEND.source
    for old, new in changes:
        assert old in source, "the script has changed: break it in another way"
        source = source.replace(old, new)
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return replace(scripts.APPEND, source=source, sha=sha)


async def quiet(stage: Stage) -> None:
    """Nothing happens."""
    await stage.more(500)


NOTHING = Fault("nothing", quiet)
LOST_REPLIES = next(fault for fault in FAULTS if fault.name == "cut after a request")
STORE = "add(events, next_sequence, first, last)"
SKIP = "if sequence % 40 == 39 then return { 'ok', sequence } end "
ADD = "  announce(root, sequence, (last - first + 1) / 2, add(events, sequence, first, last))"


async def test_without_a_fault_and_a_broken_script_all_is_well() -> None:
    row = await played(NOTHING)
    assert (row.why, row.lost, row.doubled, row.unknown) == ([], 0, 0, 0)


@pytest.mark.parametrize(
    ("fault", "changes", "seen"),
    [
        (NOTHING, [("if sequence ~= next_sequence and not", "if false and not")], "not dense"),
        (LOST_REPLIES, [("if mark ~= '' or (trace", "if (trace")], "twice"),
        (NOTHING, [(ADD, SKIP + ADD)], "lost"),
        (NOTHING, [(ADD, ADD.replace("last)", "first + 1)"))], "of an append are there"),
        (NOTHING, [("claimed = find_claims", "claimed = nil and find_claims")], "twice"),
        (NOTHING, [("return conflict(", f"{STORE} return conflict(")], "refused is there"),
        (NOTHING, [("return { 'ok', sequence }", "return { 'ok', sequence + 1 }")], "and is at"),
    ],
    ids=[
        "the sequence is not checked",
        "the mark of a second sending is not looked at",
        "an answer comes without the events",
        "half an append is stored",
        "a key is not looked up",
        "what is refused is stored",
        "another sequence is answered",
    ],
)  # fmt: skip
async def test_a_broken_script_is_seen(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, changes: list[tuple[str, str]], seen: str
) -> None:
    monkeypatch.setattr(scripts, "APPEND", broken(*changes))
    row = await played(fault)
    print(row.lost, row.doubled, row.wrong, row.why[:5])
    assert any(seen in why for why in row.why), row.why[:20]


async def test_a_level_that_is_too_weak_is_seen() -> None:
    row = await played(Fault("power cut", cut_power, EVERYSEC, preload=True))
    assert row.lost > 0
    assert any("lost from" in why for why in row.why)


async def test_a_clock_that_the_store_follows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = [fault for fault in FAULTS if fault.name.startswith("clock")]
    change = (
        "local function next_commit()\n",
        "local function next_commit()\n  redis.call('SET', commits, '1 0')\n",
    )
    monkeypatch.setattr(scripts, "APPEND", broken(change))
    row = await played(fault)
    assert any("its times run back" in why for why in row.why), row.why[:20]


# The long run


@pytest.mark.skipif(not importlib.util.find_spec("resource"), reason="it measures memory by that")
async def test_a_short_soak() -> None:
    result = await soak(VALKEY, 1.0, SEED, partial(print, flush=True))
    assert result.why == []
    assert result.generations > 2
    assert result.acknowledged > 1000
