"""What every server must do for those who listen. Runs on each server of the matrix."""

from __future__ import annotations

import pytest

import asyncstore
from asyncstore import (
    MAIN,
    NEW,
    Aggregate,
    InvalidName,
    InvalidType,
    Store,
)
from asyncstore.testing.conformance.listening import *  # noqa: F403 - the cases of every store
from asyncstore.testing.conformance.listening import taken
from tests.builders import numbered, sequences
from tests.servers import Server


async def test_another_store_hears_it(
    server: Server, prefix: str, store: Store, order: Aggregate
) -> None:
    async with (
        asyncstore.open(server.url, key_prefix=prefix) as other,
        other.listen("orders") as live,
    ):
        await store.events.append(order, numbered(2), expected=NEW)
        assert sequences(await taken(live, 2)) == [0, 1]


async def test_another_prefix_does_not(
    server: Server, prefix: str, store: Store, order: Aggregate
) -> None:
    async with (
        asyncstore.open(server.url, key_prefix=prefix + "2:") as other,
        other.listen("orders") as live,
    ):
        await store.events.append(order, numbered(1), expected=NEW)
        await other.events.append(order, numbered(2), expected=NEW)
        try:
            assert sequences(await taken(live, 2)) == [0, 1]
        finally:
            await other.events.delete(order)


def test_bad_input(store: Store) -> None:
    with pytest.raises(InvalidName, match="domain"):
        store.listen("a:b")
    with pytest.raises(InvalidName, match="edition"):
        store.listen(edition="Main")
    with pytest.raises(InvalidName, match="root"):
        store.listen("orders", root="{")
    with pytest.raises(InvalidType, match="buffer"):
        store.listen(buffer="many")  # type: ignore[arg-type]
    assert MAIN == "main"
