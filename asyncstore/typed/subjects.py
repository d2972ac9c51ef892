"""The keys of subjects: whoever forgets a key makes all that it has locked unreadable.

Keys must not lie where the events lie. A backup, an AOF or an RDB that has both gives back what
was forgotten: keep keys on a server of their own, with backups that are short-lived or none.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from asyncstore.errors import ConfigurationError, CorruptEvent, SequenceConflict
from asyncstore.settings import REPLICA, servers_of
from asyncstore.sharing import all_of
from asyncstore.values import NEW, Aggregate, Event

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from asyncstore.recorded import RecordedEvent
    from asyncstore.store import Store

_SECRET_BYTES: Final = 32  # AES-256
_ID_DIGITS: Final = 16
_TYPE: Final = "KeyMade"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """The key of a subject. `id` tells it from those that the subject had before it was forgotten.

    Events have the id beside them; `secret` are 32 bytes, which are not in the repr.
    """

    id: str
    secret: bytes = field(repr=False)


class KeyStore(Protocol):
    """Where the keys of subjects are kept."""

    async def make(self, subjects: Collection[str]) -> Mapping[str, Key]:
        """Return the key of each subject; one that has none gets one, the same for all who ask."""

    async def find(self, subjects: Collection[str]) -> Mapping[str, Key]:
        """Return the keys of those subjects that have one."""

    async def forget(self, subject: str) -> bool:
        """Destroy the key of a subject; whether it had one."""


class MemoryKeys:
    """Keys that are gone with the process: for tests."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}

    async def make(self, subjects: Collection[str]) -> Mapping[str, Key]:
        """Return the key of each subject, a new one where it has none."""
        for subject in subjects:
            if subject not in self._keys:
                self._keys[subject] = Key(secrets.token_hex(_ID_DIGITS // 2), _new_secret())
        return await self.find(subjects)

    async def find(self, subjects: Collection[str]) -> Mapping[str, Key]:
        """Return the keys of those subjects that have one."""
        return {subject: self._keys[subject] for subject in subjects if subject in self._keys}

    async def forget(self, subject: str) -> bool:
        """Destroy the key of a subject; whether it had one."""
        return self._keys.pop(subject, None) is not None


class StoredKeys:
    """Keys in a store of their own: each is the one event of the aggregate of its subject.

    So they are as durable as that store's setting `durability` says, on one server or a cluster.
    A subject is any text that can be a root: an opaque number rather than a name, for it stands
    beside each event and stays there.

    THE STORE MUST NOT BE THAT OF THE EVENTS, nor share its AOF, RDB or backups. `forget` deletes
    the key from the server's memory and its replicas; out of its files it goes with their next
    rewrite (`BGREWRITEAOF`, `BGSAVE`), out of its backups when those are deleted. And a key that is
    lost is forgotten: have keys fsynced, `durability="fsync"`.

    Nothing is cached: what is forgotten, no process reads any more. Each time events are written or
    read, their keys are fetched at once.
    """

    def __init__(self, store: Store, *, domain: str = "subjects") -> None:
        if store.settings.read_from == REPLICA:
            why = "keys are read from primaries only: a replica may still have what was forgotten"
            raise ConfigurationError("read_from", why, "the settings of the store of keys")
        self._store = store
        self._domain = domain

    async def make(self, subjects: Collection[str]) -> Mapping[str, Key]:
        """Return the key of each subject, a new one where it has none."""
        places = [self._place(subject) for subject in subjects]
        keys = await all_of(self._make(place) for place in places)
        return dict(zip(subjects, keys, strict=True))

    async def find(self, subjects: Collection[str]) -> Mapping[str, Key]:
        """Return the keys of those subjects that have one."""
        places = [self._place(subject) for subject in subjects]
        found = await all_of(self._find(place) for place in places)
        keys = zip(subjects, found, strict=True)
        return {subject: key for subject, key in keys if key is not None}

    async def forget(self, subject: str) -> bool:
        """Destroy the key of a subject; whether it had one.

        After `OutcomeUnknown`, call it again.
        """
        return await self._store.events.delete(self._place(subject)) > 0

    def _warn_if_beside(self, store: Store) -> None:
        """Warn in the log where keys lie on the server of the events that they lock."""
        ours, theirs = self._store.settings, store.settings
        if set(servers_of(ours)) & set(servers_of(theirs)):
            _log.warning(
                "keys of subjects are on %s, where the events are: each backup of it gives back "
                "what was forgotten; keep keys on a server of their own",
                theirs.where(),
            )

    def _place(self, subject: str) -> Aggregate:
        return Aggregate(self._domain, subject)

    async def _find(self, place: Aggregate) -> Key | None:
        found = await self._store.events.read(place, limit=1)
        return _key_of(found[0]) if found else None

    async def _make(self, place: Aggregate) -> Key:
        while True:
            known = await self._find(place)
            if known is not None:
                return known
            made = Event(_TYPE, _new_secret())
            try:
                await self._store.events.append(place, [made], expected=NEW)
            except SequenceConflict:
                continue  # somebody else was faster: theirs is the key
            return Key(made.id.hex[-_ID_DIGITS:], made.data)


def _key_of(event: RecordedEvent) -> Key:
    secret = event.data
    if event.type != _TYPE or not isinstance(secret, bytes) or len(secret) != _SECRET_BYTES:
        raise CorruptEvent(f"{event.aggregate}", event.sequence, "it is not the key of a subject")
    return Key(event.id.hex[-_ID_DIGITS:], secret)


def _new_secret() -> bytes:
    return secrets.token_bytes(_SECRET_BYTES)
