"""Fixtures: a cluster without replicas, shared by tests that break nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import anyio.from_thread
import pytest

from asyncstore import embedded_cluster


@dataclass(frozen=True)
class SmallCluster:
    """A running cluster; tests keep apart by their prefixes."""

    urls: list[str]


@pytest.fixture(scope="session")
def small_cluster() -> Iterator[SmallCluster]:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(
            embedded_cluster.running(primaries=3, replicas=0)
        ) as cluster,
    ):
        yield SmallCluster(cluster.urls)
