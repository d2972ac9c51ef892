"""The replicas of a primary, for reads whose callers take what may be a little old.

A replica is read from while its link to the primary is up and it is not further behind than the
setting `max_replica_lag`, in bytes of the replication stream. That is looked at once a second while
there are reads. One that does not answer is left alone until the next look, and what it was asked
is asked of the primary.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from asyncstore import forms
from asyncstore.errors import AsyncStoreError
from asyncstore.sharing import all_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from asyncstore.transport import Transport

_SECONDS_KNOWN: Final = 1.0

A = TypeVar("A", bound="Hashable")


class Replicas(Generic[A]):
    """The replicas of one primary, by their addresses. `connect` makes a connection to one."""

    def __init__(self, primary: Transport, connect: Callable[[A], Transport], max_lag: int) -> None:
        self._primary = primary
        self._connect = connect
        self._max_lag = max_lag
        self._addresses: tuple[A, ...] = ()
        self._open: dict[A, Transport] = {}
        self._fit: list[Transport] = []
        self._look: asyncio.Task[None] | None = None
        self._until = 0.0

    def update(self, addresses: Iterable[A]) -> None:
        """Take the replicas that there are now, and let go of the others."""
        self._addresses = tuple(addresses)
        for address in set(self._open) - set(self._addresses):
            self.leave(address)

    def pick(self) -> Transport | None:
        """Return the connection to one that can be read from, or None if there is none."""
        loop = asyncio.get_running_loop()
        if self._addresses and self._look is None and loop.time() >= self._until:
            self._look = loop.create_task(self._look_at_all())
        return random.choice(self._fit) if self._fit else None  # noqa: S311

    def leave(self, address: A) -> None:
        """Give a connection up: what is open on it goes to the primary."""
        transport = self._open.pop(address, None)
        if transport is not None:
            self._fit = [fit for fit in self._fit if fit is not transport]
            transport.leave()

    async def aclose(self) -> None:
        """Close all connections; calls in flight fail."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait([self._look])
        for transport in self._open.values():
            await transport.aclose()

    async def _look_at_all(self) -> None:
        try:
            written = await _offset(self._primary, "master_repl_offset")
            fit = await all_of(self._look_at(address, written) for address in self._addresses)
            self._fit = [transport for transport in fit if transport is not None]
        finally:
            self._until = asyncio.get_running_loop().time() + _SECONDS_KNOWN
            self._look = None

    async def _look_at(self, address: A, written: int | None) -> Transport | None:
        """Return the connection to a replica if it can be read from.

        A primary that is down tells nothing: then its replicas are as good as what there is.
        """
        if address not in self._open:
            self._open[address] = self._connect(address)
            self._open[address].start()
        transport = self._open[address]
        applied = await _offset(transport, "slave_repl_offset")
        if applied is None or (written is not None and written - applied > self._max_lag):
            return None
        return transport if self._open.get(address) is transport else None


async def _offset(server: Transport, name: str) -> int | None:
    """Return how far a server is in the replication stream; None if it is out of step or silent."""
    try:
        info: bytes = await server.command(forms.is_text, "INFO", "replication")
    except AsyncStoreError:
        return None
    fields = forms.fields_of(info)
    is_cut_off = fields.get("role") == "slave" and (
        fields.get("master_link_status") != "up" or fields.get("master_sync_in_progress") == "1"
    )
    text = fields.get(name, "")
    return int(text) if text.isdigit() and not is_cut_off else None
