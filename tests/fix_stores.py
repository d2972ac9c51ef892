"""Fixtures: the servers of the matrix, one after the other, and a fresh store on each."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

import asyncstore
from asyncstore import Store
from tests import servers

BINARIES = servers.binaries()
AVAILABLE = [kind for kind in servers.kinds() if kind.missing is None]


CONTRACT = re.compile(r"test_(contract_\w+|old_mistakes|model)\.py")
"""What each server and topology has to do alike."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run on some servers the tests of the contract only."""
    left_out = [item for item in items if _is_left_out(item)]
    items[:] = [item for item in items if not _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)


def _is_left_out(item: pytest.Item) -> bool:
    if CONTRACT.fullmatch(item.path.name):
        return False
    parameters = getattr(item, "callspec", None)
    kind = parameters.params.get("server") if parameters else None
    return isinstance(kind, servers.Kind) and kind.only_contract


@pytest.fixture(scope="session", params=AVAILABLE, ids=lambda kind: kind.name)
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """Each server that this machine has; what needs no other kind runs on all of them."""
    with request.param.running() as running:
        yield running


@pytest.fixture(scope="session")
def one_server() -> Iterator[servers.Server]:
    """The embedded server, for tests that would say the same of every server."""
    with AVAILABLE[0].running() as running:
        yield running


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4().hex}:"


@pytest.fixture
async def store(server: servers.Server, prefix: str) -> AsyncIterator[Store]:
    """An empty store, apart from all others by its prefix."""
    async with asyncstore.open(server.url, key_prefix=prefix) as opened:
        yield opened
    servers.sweep(server, prefix)


@pytest.fixture(params=BINARIES)
def binary(request: pytest.FixtureRequest) -> str:
    """Each server that a test can start with settings of its own."""
    found = BINARIES[request.param]
    if found is None:
        pytest.skip("this machine does not have it")
    return found
