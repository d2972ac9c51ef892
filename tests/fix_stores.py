"""Fixtures: the servers of the matrix, one after the other, and a fresh store on each."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

import asyncstore
from asyncstore import Aggregate, Store
from tests import servers

AVAILABLE = [kind for kind in servers.kinds() if kind.missing is None]


@pytest.fixture(scope="session", params=AVAILABLE, ids=lambda kind: kind.name)
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """Each server that this machine has; what needs no other kind runs on all of them."""
    with request.param.start() as url:
        yield servers.Server(request.param.name, url)


@pytest.fixture(scope="session")
def one_server() -> Iterator[servers.Server]:
    """The embedded server, for tests that would say the same of every server."""
    with AVAILABLE[0].start() as url:
        yield servers.Server(AVAILABLE[0].name, url)


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4().hex}:"


@pytest.fixture
async def store(server: servers.Server, prefix: str) -> AsyncIterator[Store]:
    """An empty store, apart from all others by its prefix."""
    async with asyncstore.open(server.url, key_prefix=prefix) as opened:
        yield opened
    servers.sweep(server, prefix)


@pytest.fixture
def order() -> Aggregate:
    return Aggregate("orders", uuid.uuid4())
