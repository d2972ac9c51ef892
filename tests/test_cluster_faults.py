"""The short form of each fault of a cluster, and proof that the checker can fail there, too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import anyio.from_thread
import pytest
from anyio.from_thread import BlockingPortal

from asyncstore import cluster, embedded, transport, wire
from tests.faults.clusters import (
    CLUSTER_FAULTS,
    ClusterFault,
    Theatre,
    cut_and_fail_over,
    isolate_primary,
    play_on,
    theatre,
)
from tests.faults.run import Row
from tests.faults.stage import FSYNC, SHORT

VALKEY = str(embedded.find_binary())
SEED = 20
FAULTS = [fault for fault in CLUSTER_FAULTS if not fault.is_long]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

Play = Callable[[ClusterFault], Row]


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    """The event loop in which the clusters of this file live."""
    with anyio.from_thread.start_blocking_portal() as running:
        yield running


@asynccontextmanager
async def both() -> AsyncIterator[dict[bool, Theatre]]:
    """Run a cluster, and one whose bus can be cut; of a node of that, nothing is known anew."""
    async with (
        theatre("Valkey", VALKEY, FSYNC) as plain,
        theatre("Valkey", VALKEY, FSYNC, with_bus=True) as on_bus,
    ):
        yield {False: plain, True: on_bus}


@pytest.fixture(scope="module")
def play(portal: BlockingPortal) -> Iterator[Play]:
    """Play a fault on one of the clusters, and return what became of it."""
    with portal.wrap_async_context_manager(both()) as theatres:

        def played(fault: ClusterFault) -> Row:
            if why := fault.missing():
                pytest.skip(why)
            row = portal.call(play_on, theatres[fault.on_bus], fault, SHORT, SEED)
            print(row.errors, row.recovery, row.p99, row.p99_others)
            return row

        yield played


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}, {fault.level.name}")
def test_no_law_is_broken_by(play: Play, fault: ClusterFault) -> None:
    row = play(fault)
    assert row.why == []
    assert (row.doubled, row.wrong) == (0, 0)
    assert row.lost == 0 or fault.may_lose
    assert row.lost > 0 or fault.strike is not isolate_primary
    assert row.writers >= 32
    assert len(row.recovery) == row.rounds


def test_a_second_sending_without_its_mark_is_seen(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (wire, "ELSEWHERE"),
        (cluster, "ELSEWHERE"),
        (transport, "ELSEWHERE"),
        (transport, "AGAIN"),
    ):
        monkeypatch.setattr(module, name, "")
    row = play(ClusterFault("cut, and failed over", cut_and_fail_over))
    assert row.doubled > 0, row.why[:5]
    assert any("twice" in why for why in row.why), row.why[:20]


def test_a_level_that_is_too_weak_is_seen(play: Play) -> None:
    row = play(ClusterFault("primary isolated", isolate_primary, on_bus=True))
    assert row.lost > 0
    assert any("lost from" in why for why in row.why), row.why[:20]
