"""`event_store` for pytest-asyncio: a fixture for each of the loops in which a test may run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest_asyncio

from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncstore.settings import Settings
    from asyncstore.store import Store


def _opening_in(scope: Literal["function", "class", "module", "package", "session"]) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_event_store_in_{scope}_loop")
    async def event_store(event_store_settings: Settings) -> AsyncIterator[Store]:
        async with open_store(event_store_settings) as store:
            yield store

    return event_store


in_function = _opening_in("function")
in_class = _opening_in("class")
in_module = _opening_in("module")
in_package = _opening_in("package")
in_session = _opening_in("session")
