"""Which servers a store works with: none that is too old, or that throws histories away.

All are looked at when the store is opened, and one that is not fit is refused. A node that could
not be looked at then, or that a cluster has made a primary since, may have slots already: it can't
be refused any more, and the log says what is wrong with it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from asyncstore import checks
from asyncstore.cluster import OTHER_NODES
from asyncstore.errors import (
    AsyncStoreError,
    ConfigurationError,
    StoreUnavailable,
    UnsafeServer,
)
from asyncstore.observing import SERVER_ADDRESS
from asyncstore.settings import is_throw_away
from asyncstore.sharing import end_all, quickest
from asyncstore.values import Durability

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.nodes import Node
    from asyncstore.settings import Settings

_log = logging.getLogger(__name__)

_PAUSE: Final = 1.0  # seconds until a node that could not be looked at is looked at again


class Admission:
    """Looks at servers, for a store with these settings that gives its appends `durability`."""

    def __init__(self, settings: Settings, durability: Durability) -> None:
        self._settings = settings
        self._durability = durability
        self._late: set[asyncio.Task[None]] = set()
        self._is_open = False

    async def open(self, nodes: Sequence[Node]) -> None:
        """Look at the servers of a store that is being opened; some of a cluster may be down.

        Raises `UnsafeServer`, `ConfigurationError` for one that is too old, `DurabilityUnavailable`
        for one that can't give the level, and `StoreUnavailable` if none can be looked at.
        """
        asked = (self._admit(node) for node in nodes)
        outcomes = await quickest(asked, self._settings.timeout, OTHER_NODES)
        absent = (StoreUnavailable, TimeoutError)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if not isinstance(error, absent):
                raise error
        if len(errors) == len(nodes):
            why = getattr(errors[0], "why", "it did not answer in time; nothing was changed")
            raise StoreUnavailable(nodes[0].where, why)
        self._is_open = True
        for node, outcome in zip(nodes, outcomes, strict=True):
            if isinstance(outcome, absent):
                self.newcomer(node)

    def newcomer(self, node: Node) -> None:
        """Look, in the background, at a node that was not there when the store was opened."""
        if not self._is_open:
            return
        task = asyncio.get_running_loop().create_task(self._look_until_seen(node))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def aclose(self) -> None:
        """Look at nothing more."""
        self._is_open = False
        await end_all(list(self._late))

    async def _look_until_seen(self, node: Node) -> None:
        while not node.is_left:
            try:
                await self._look(node)
            except StoreUnavailable:
                await asyncio.sleep(_PAUSE)
            except AsyncStoreError as error:
                _log.error(
                    "a server of the cluster is not fit for events: %s",
                    error,
                    extra={SERVER_ADDRESS: node.where},
                )
                return
            else:
                return

    async def _admit(self, node: Node) -> None:
        await self._look(node)
        if self._durability != Durability.MEMORY:
            await node.ensure(self._durability)

    async def _look(self, node: Node) -> None:
        said = await checks.ask_info(node.transport)
        if said.refused is not None:
            _log.warning(
                "the settings of %s can't be checked: %s",
                node.where,
                said.refused,
                extra={SERVER_ADDRESS: node.where},
            )
            return
        if checks.is_too_old(said):
            version = said.fields.get("redis_version", "0")
            why = f"{node.where} is Redis {version}; Redis 7.0 or newer, or Valkey, is needed"
            raise ConfigurationError("url", why, "the settings")
        policy = said.fields.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and not self._settings.allow_eviction:
            raise UnsafeServer(node.where, policy)
        await self._warn_if_nothing_is_kept(node, said)

    async def _warn_if_nothing_is_kept(self, node: Node, info: checks.Said) -> None:
        # The save points cost a round trip, which a server with an AOF is spared.
        if info.fields.get("aof_enabled") != "0" or is_throw_away(self._settings):
            return
        if checks.keeps_nothing(info, await checks.ask_config(node.transport, "save")):
            _log.warning(
                "%s keeps nothing on disk: a restart loses every event. Switch its AOF on, by "
                "CONFIG SET appendonly yes; `asyncstore doctor` says more",
                node.where,
                extra={SERVER_ADDRESS: node.where},
            )
