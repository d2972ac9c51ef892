"""The fixtures for pytest: an empty store for each test, with a prefix of its own.

A store belongs to the event loop in which it was opened. So `event_store` is opened in the loop in
which the test runs: by pytest-asyncio, in either of its modes and for each `loop_scope`, or by
anyio's plugin where the test has its marker. A test that starts its application elsewhere, such as
in a thread or a process, takes `event_store_settings`, which belongs to no loop.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Final

import anyio.from_thread
import pytest

from asyncstore import embedded
from asyncstore.settings import Settings
from asyncstore.store import Store
from asyncstore.store import open as open_store
from asyncstore.testing import servers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from anyio.from_thread import BlockingPortal

_OPTION: Final = "--event-store-server"
_SERVERS: Final = ("embedded", "url", "container")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that chooses the server."""
    how = (
        f"where tests have their event stores: on an embedded server, at {servers.URL_VARIABLE} "
        "(the default where that is set), or in a container"
    )
    parser.getgroup("asyncstore").addoption(_OPTION, choices=_SERVERS, help=how)


def pytest_configure(config: pytest.Config) -> None:
    """Add what needs pytest-asyncio, where that is in use."""
    if config.pluginmanager.has_plugin("asyncio"):
        from asyncstore.testing import loops

        config.pluginmanager.register(loops)


@pytest.fixture(scope="session")
def event_store_portal() -> Iterator[BlockingPortal]:
    """A loop in a thread, for what is done around tests."""
    with anyio.from_thread.start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def event_store_url(request: pytest.FixtureRequest) -> str:
    """Where the stores of all tests are. Override it for a server of your own."""
    given = "url" if os.environ.get(servers.URL_VARIABLE) else "embedded"
    chosen = request.config.getoption(_OPTION) or given
    url: str = request.getfixturevalue(f"_event_store_by_{chosen}")
    return url


@pytest.fixture(scope="session")
def _event_store_by_embedded(event_store_portal: BlockingPortal) -> Iterator[str]:
    with event_store_portal.wrap_async_context_manager(embedded.running(None)) as url:
        yield url


@pytest.fixture(scope="session")
def _event_store_by_url() -> str:
    url = os.environ.get(servers.URL_VARIABLE)
    if not url:
        pytest.skip(f"{servers.URL_VARIABLE} is not set")
    return url


@pytest.fixture(scope="session")
def _event_store_by_container() -> Iterator[str]:
    missing = servers.container_missing()
    if missing:
        pytest.skip(missing)
    with servers.container() as url:
        yield url


@pytest.fixture
def event_store_settings(
    event_store_url: str, event_store_portal: BlockingPortal
) -> Iterator[Settings]:
    """The settings of an empty store that is the test's own; its keys are removed afterwards."""
    settings = Settings(url=event_store_url, key_prefix=f"test-{uuid.uuid4().hex}:")
    yield settings
    event_store_portal.call(servers.remove_all, settings)


@pytest.fixture
def event_store(request: pytest.FixtureRequest) -> Store:
    """An empty store that is the test's own, open in the event loop in which the test runs."""
    store: Store = request.getfixturevalue(_opener(request))
    return store


@pytest.fixture
async def _event_store_by_anyio(event_store_settings: Settings) -> AsyncIterator[Store]:
    async with open_store(event_store_settings) as store:
        yield store


def _opener(request: pytest.FixtureRequest) -> str:
    """Return the fixture that opens the store in the loop of the test."""
    if "anyio_backend" in request.fixturenames:
        _check_backend(request.getfixturevalue("anyio_backend"))
        return "_event_store_by_anyio"
    if not request.config.pluginmanager.has_plugin("asyncio"):
        pytest.fail(
            "event_store needs pytest-asyncio, or a test that is marked with pytest.mark.anyio; "
            "event_store_settings needs neither",
            pytrace=False,
        )
    return f"_event_store_in_{_loop_scope(request)}_loop"


def _check_backend(backend: str | tuple[str, object]) -> None:
    name = backend if isinstance(backend, str) else backend[0]
    if name != "asyncio":
        pytest.skip(f"asyncstore runs on asyncio, not on {name}")


def _loop_scope(request: pytest.FixtureRequest) -> str:
    """Return for how long pytest-asyncio keeps the loop of the test."""
    mark = request.node.get_closest_marker("asyncio")
    of_test = mark.kwargs.get("loop_scope") if mark else None
    return str(of_test or request.config.getini("asyncio_default_test_loop_scope"))
