"""Which levels of durability a server can give, and whether it gave one.

Of the server itself nothing is guessed. `FSYNC` is its `appendfsync always`: then the reply to an
append comes after the fsync. The setting is read before the first append, and again right behind
each group of appends on the same connection, so that a change is noticed by the very appends that
it concerns. While an AOF is being switched on, the setting says `yes` before anything is kept: so
WAITAOF for the server's own disk is asked behind it, where the server has it (Redis 7.2, Valkey);
under `always` it is answered at once. Redis 7.0 has not: there a store that did not see the AOF on
before waits until no rewrite is under way. `replicas(n)` is WAIT right behind the group: it covers
what the same connection wrote before. WAITAOF alone is not enough, for some servers answer it
without an fsync (Redis before 8.0, Valkey 9.1; redis/redis#13793): `fsync_and_replicas(n)` asks for
all three, and takes the replicas' own `appendfsync always` on the operator's word.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from asyncstore import forms
from asyncstore.errors import DurabilityUnavailable, UnexpectedReply
from asyncstore.sharing import Shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.transport import Transport
    from asyncstore.values import Durability
    from asyncstore.wire import Argument, Reply

_SECONDS_KNOWN: Final = 1.0
_AT_ONCE: Final = 50  # milliseconds for what a server that syncs each write has done already
_SYNC_SETTINGS: Final = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",  # or fsyncs are left out while the file is rewritten
}
_ASK_SETTINGS: Final[list[Argument]] = ["CONFIG", "GET", *_SYNC_SETTINGS]
_SYNC_EACH_WRITE: Final[list[Argument]] = ["CONFIG", "SET", "appendfsync", "always"]


@dataclass(frozen=True, slots=True)
class Reached:
    """What was proven of an append."""

    fsynced: bool
    on_replicas: int

    def satisfies(self, wanted: Durability) -> bool:
        """Whether it is as much as was asked for."""
        return self.on_replicas >= wanted.on_replicas and (self.fsynced or not wanted.fsynced)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a server can give. `no_fsync` and `no_wait` say why it can't; empty if it can."""

    no_fsync: str
    no_wait: str
    replicas: int
    until: float


class Levels:
    """What the server of a store can give.

    `always` is the operator's word that the server has `appendfsync always`, for a server whose ACL
    does not let the store see it. `is_own` is a server of the store's own that is to sync each
    write.
    """

    def __init__(
        self, transport: Transport, where: str, *, always: bool, is_own: bool = False
    ) -> None:
        self._transport = transport
        self._where = where
        self._always = always
        self._is_own = is_own
        self._has_waitaof = False
        self._has_synced = False  # when last looked at
        self._facts: _Facts | None = None
        self._asking = Shared(self._ask)

    async def aclose(self) -> None:
        """Stop asking."""
        await self._asking.aclose()

    async def ensure(self, wanted: Durability) -> None:
        """Raise `DurabilityUnavailable` if the server can't give the level now."""
        if not self.knows(wanted):
            self._check(wanted, await self._asking.result())

    def knows(self, wanted: Durability) -> bool:
        """Whether it is known without asking that the server gives the level; else as `ensure`."""
        facts = self._facts
        if facts is None or facts.until <= self._transport.loop().time():
            return False
        self._check(wanted, facts)
        return True

    def _check(self, wanted: Durability, facts: _Facts) -> None:
        why = facts.no_fsync if wanted.fsynced else ""
        if not why and wanted.on_replicas:
            why = facts.no_wait
            if not why and wanted.fsynced and not self._has_waitaof:
                why = "it has no WAITAOF (Redis 7.2 and Valkey do), or its ACL refuses it"
            if not why and wanted.on_replicas > facts.replicas:
                why = f"{facts.replicas} replicas are online"
        if why:
            raise DurabilityUnavailable(self._where, wanted, why)

    def proofs(
        self, wanted: Durability, seconds: float, waited: float = 0.0
    ) -> list[list[Argument]]:
        """Return the commands that prove the level, within `seconds` less those `waited` before."""
        commands: list[list[Argument]] = []
        milliseconds = max(1, int(1000 * (seconds - waited)))
        if wanted.on_replicas and wanted.fsynced:
            half = max(1, milliseconds // 2)
            # WAITAOF alone would take a second: replicas tell of their fsyncs that often.
            commands.append(["WAIT", wanted.on_replicas, half])
            commands.append(["WAITAOF", 1, wanted.on_replicas, half])
        elif wanted.on_replicas:
            commands.append(["WAIT", wanted.on_replicas, milliseconds])
        elif wanted.fsynced and self._has_waitaof:
            commands.append(["WAITAOF", 1, 0, _AT_ONCE])
        if wanted.fsynced and not self._always:
            commands.append(_ASK_SETTINGS)
        return commands

    def reached(self, wanted: Durability, replies: Sequence[Reply]) -> Reached:
        """Return what the replies to the proofs say; what they don't prove was not reached."""
        rest = list(replies)
        on_replicas, fsynced = 0, wanted.fsynced
        if wanted.on_replicas:
            answer = rest.pop(0)
            on_replicas = answer if forms.is_count(answer) else 0
        if wanted.fsynced and not self._always:
            fsynced = not _why_no_fsync(rest.pop())
        if wanted.fsynced and rest:
            local, there = _waitaof(rest.pop(0))
            fsynced = fsynced and local > 0
            on_replicas = min(on_replicas, there) if wanted.on_replicas else 0
        reached = Reached(fsynced, on_replicas)
        if not reached.satisfies(wanted):
            self._facts = None  # look again before the next one
            self._has_synced = False
        return reached

    async def _ask(self) -> _Facts:
        no_fsync, self._has_waitaof, has_wait, replicas = await asyncio.gather(
            self._look_at_fsync(),
            self._may("WAITAOF", 0, 0, 1),
            self._may("WAIT", 0, 1),
            self._count_replicas(),
        )
        if not no_fsync and not self._has_waitaof and not self._has_synced:
            no_fsync = await self._look_at_rewrite()
        self._has_synced = not no_fsync
        no_wait = "" if has_wait else "its ACL refuses WAIT"
        if replicas is None:
            no_wait = no_wait or "its ACL hides its replicas: it needs INFO"
        until = self._transport.loop().time() + _SECONDS_KNOWN
        self._facts = _Facts(no_fsync, no_wait, replicas or 0, until)
        return self._facts

    async def _count_replicas(self) -> int | None:
        """Return how many replicas are online; None if that is hidden."""
        try:
            info: bytes = await self._transport.command(forms.is_text, "INFO", "replication")
        except UnexpectedReply:
            return None
        return sum(one.is_online for one in forms.replicas_of(forms.fields_of(info)))

    async def _look_at_fsync(self) -> str:
        if self._always:
            return ""
        try:
            settings = await self._transport.command(forms.is_settings, *_ASK_SETTINGS)
            if self._is_own and _why_no_fsync(settings):
                # It was started anew, or by somebody who asked for less.
                await self._transport.command(forms.is_text, *_SYNC_EACH_WRITE)
                settings = await self._transport.command(forms.is_settings, *_ASK_SETTINGS)
        except UnexpectedReply:
            return "its ACL hides whether it fsyncs; see the setting appendfsync_always"
        return _why_no_fsync(settings)

    async def _look_at_rewrite(self) -> str:
        """Return what speaks against an AOF that may have been switched on a moment ago.

        Until its first rewrite is over nothing is kept. A server with WAITAOF tells that apart.
        """
        if self._always:
            return ""
        try:
            info: bytes = await self._transport.command(forms.is_text, "INFO", "persistence")
        except UnexpectedReply:
            return ""
        fields = forms.fields_of(info)
        rewrites = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
        if not any(fields.get(name) == "1" for name in rewrites):
            return ""
        return "its AOF is being rewritten, and it can't tell whether for the first time"

    async def _may(self, *command: Argument) -> bool:
        """Whether the server takes a command, which waits for nothing."""
        try:
            await self._transport.command(forms.is_anything, *command)
        except UnexpectedReply:
            return False
        return True


def _why_no_fsync(settings: Any) -> str:
    """Return what is wrong with the reply of CONFIG GET; empty if the server fsyncs each write."""
    if not forms.is_settings(settings):
        return "it does not tell whether it fsyncs"
    found = dict(forms.pairs_of(settings))
    for name, wanted in _SYNC_SETTINGS.items():
        value = found.get(name.encode(), b"").decode(errors="replace")
        if value != wanted:
            return f"its {name} is {value or 'hidden'}, and {wanted} is needed"
    return ""


def _waitaof(reply: Any) -> tuple[int, int]:
    if type(reply) is list and len(reply) == 2 and all(map(forms.is_count, reply)):
        return reply[0], reply[1]
    return 0, 0
