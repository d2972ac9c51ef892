"""What bodies go through between an event and the store: compression, encryption, both, neither.

An event that went through something has a body of bytes, and says in its metadata what it was,
from the inside out, such as `"$body": "json+zlib+aes-gcm"`; and with whose key, as `"$key":
["c-17", "9c41…"]`, the subject and the id of the key. Who reads it without this module gets the
bytes. Metadata are not encrypted.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from asyncstore import codec
from asyncstore.errors import AsyncStoreError, ConfigurationError, InvalidType, InvalidValue
from asyncstore.names import check_whole_number
from asyncstore.recorded import RecordedEvent
from asyncstore.typed.registry import CODINGS, VERSION, Forgotten, unreadable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from types import ModuleType

    from asyncstore.typed.subjects import Key, KeyStore
    from asyncstore.values import Aggregate, Event

KEY: Final = "$key"
_LOCKED: Final = "aes-gcm"
_JOIN: Final = "+"
_ENCODINGS: Final = ("json", "bytes")


class Compression(Protocol):
    """A way to make bodies smaller."""

    @property
    def name(self) -> str:
        """What stands in the metadata: letters, digits and `-`; it must not change."""

    def compress(self, body: bytes) -> bytes:
        """Return a body that `decompress` gives back."""

    def decompress(self, body: bytes) -> bytes:
        """Return what was compressed; raises where it is none."""


class Zlib:
    """The compression of the standard library. Gives back at most `most` bytes."""

    def __init__(self, *, level: int = 6, most: int = 64 * 2**20) -> None:
        if check_whole_number("level", level) > 9:
            raise InvalidValue("level", "it must be 0 to 9")
        self._level = level
        self._most = check_whole_number("most", most, least=1)

    @property
    def name(self) -> str:
        """What stands in the metadata."""
        return "zlib"

    def compress(self, body: bytes) -> bytes:
        """Return a body that `decompress` gives back."""
        if len(body) > self._most:
            raise InvalidValue("data", f"{len(body)} bytes are more than Zlib(most={self._most})")
        return zlib.compress(body, self._level)

    def decompress(self, body: bytes) -> bytes:
        """Return what was compressed; raises where it is none, or too much."""
        inflate = zlib.decompressobj()
        whole = inflate.decompress(body, self._most + 1)
        if len(whole) > self._most:
            raise InvalidValue("most", f"the body has more bytes than Zlib(most={self._most})")
        if not inflate.eof:
            raise ValueError("it is cut off")
        return whole


@dataclass(frozen=True, slots=True)
class _Seal:
    """What the metadata of an event say of its body."""

    codings: list[str]  # from the inside out
    subject: str | None
    key_id: str | None

    @classmethod
    def of(cls, event: RecordedEvent) -> _Seal | None:
        """Return the seal of an event; None for one that went through nothing."""
        codings, key = event.metadata.get(CODINGS), event.metadata.get(KEY)
        if codings is None:
            return None
        if not isinstance(codings, str) or not isinstance(event.data, bytes):
            raise unreadable(event, f"its {CODINGS} is none, or its body no bytes")
        names = codings.split(_JOIN)
        if _LOCKED not in names:
            return cls(names, None, None)
        if not (isinstance(key, list) and [type(part) for part in key] == [str, str]):
            raise unreadable(event, f"its {KEY} is not a subject and the id of a key")
        return cls(names, *key)


class Bodies:
    """What the bodies of events go through on their way into the store, and back.

    `compressions`: the first of them compresses bodies of `compress_above` bytes and more, if it
    makes them smaller; each can read what it has compressed. `keys` has the keys of subjects, which
    takes `pip install 'asyncstore[crypto]'`. A body is bound to the domain, root, id and type of
    its event: put elsewhere, it can't be opened. It is not bound to an edition, as editions share
    what is before their divergence.
    """

    def __init__(
        self,
        *,
        compressions: Sequence[Compression] = (),
        compress_above: int = 512,
        keys: KeyStore | None = None,
    ) -> None:
        for one in compressions:
            _check_compression(one)
        self._compressions = {one.name: one for one in compressions}
        self._compression = compressions[0] if compressions else None
        self._compress_above = check_whole_number("compress_above", compress_above)
        self._keys = keys
        self._aes = None if keys is None else _load_aes()

    # Into the store

    async def _seal(
        self, aggregate: Aggregate, events: Sequence[Event], subjects: Sequence[str | None]
    ) -> list[Event]:
        """Return events as they are stored; those with a subject can be read with its key only.

        All is checked and encoded before keys are asked for.
        """
        squeezed = [
            self._squeeze(event, must=subject is not None)
            for event, subject in zip(events, subjects, strict=True)
        ]
        keys = await self._keys_for({subject for subject in subjects if subject is not None})
        return [
            event if subject is None else self._lock(aggregate, event, subject, keys[subject])
            for event, subject in zip(squeezed, subjects, strict=True)
        ]

    def _squeeze(self, event: Event, *, must: bool) -> Event:
        """Return the event with a smaller body, or as it is; with `must` its body is bytes."""
        if self._compression is None and not must:
            return event
        body, encoding = codec.encode_data(event.data)
        if self._compression is not None and len(body) >= self._compress_above:
            small = self._compression.compress(body)
            if len(small) < len(body):
                return _with_body(event, small, [encoding, self._compression.name])
        return _with_body(event, body, [encoding]) if must else event

    async def _keys_for(self, subjects: set[str]) -> Mapping[str, Key]:
        if not subjects:
            return {}
        if self._keys is None:
            why = "an event is to be kept secret: give Bodies(keys=…) to the TypedStore"
            raise InvalidValue("subject", why)
        return await self._keys.make(subjects)

    def _lock(self, aggregate: Aggregate, event: Event, subject: str, key: Key) -> Event:
        metadata = dict(event.metadata or {})
        metadata[CODINGS] += _JOIN + _LOCKED
        metadata[KEY] = [subject, key.id]
        event = replace(event, metadata=metadata)
        place = _place(aggregate, event, metadata)
        return replace(event, data=self._cipher().lock(key.secret, event.data, place))

    # Out of the store

    async def _open(self, events: Sequence[RecordedEvent]) -> list[RecordedEvent]:
        """Return stored events as they were before; the data of forgotten ones are `Forgotten`.

        Raises `UnreadableEvent`.
        """
        seals = [_Seal.of(event) for event in events]
        keys = await self._find({seal.subject for seal in seals if seal and seal.subject})
        return [
            event if seal is None else self._opened(event, seal, keys)
            for event, seal in zip(events, seals, strict=True)
        ]

    async def _find(self, subjects: Collection[str]) -> Mapping[str, Key]:
        if not subjects or self._keys is None:
            return {}
        return await self._keys.find(subjects)

    def _opened(self, event: RecordedEvent, seal: _Seal, keys: Mapping[str, Key]) -> RecordedEvent:
        if seal.subject is None:
            return _as_before(event, self._decode(event, seal.codings, event.data))
        if self._keys is None:
            raise unreadable(event, "it is kept secret for a subject: give Bodies(keys=…)")
        key = keys.get(seal.subject)
        if key is None or key.id != seal.key_id:
            return _as_before(event, Forgotten(event.type, seal.subject))
        place = _place(event.aggregate, event, event.metadata)
        body = self._cipher().unlock(key.secret, event.data, place)
        if body is None:
            raise unreadable(event, "its body is not the one that was locked for this event")
        return _as_before(event, self._decode(event, seal.codings[:-1], body))

    def _decode(self, event: RecordedEvent, codings: Sequence[str], body: bytes) -> Any:
        encoding, *names = codings
        if encoding not in _ENCODINGS or len(names) > 1:
            raise unreadable(event, f"its {CODINGS} is not known to this version")
        for name in names:
            body = self._decompressed(event, name, body)
        try:
            return codec.decode_body(body, encoding)
        except codec.Undecodable:
            raise unreadable(event, "its body is not what was stored") from None

    def _decompressed(self, event: RecordedEvent, name: str, body: bytes) -> bytes:
        if name not in self._compressions:
            why = f"its body went through {name[:20]!r}: give that to Bodies(compressions=…)"
            raise unreadable(event, why)
        try:
            return self._compressions[name].decompress(body)
        except Exception as error:  # each library has its own, and they may show data
            is_own = isinstance(error, AsyncStoreError)
            why = f"{error}" if is_own else f"{type(error).__name__} when it was decompressed"
            raise unreadable(event, why) from None

    def _cipher(self) -> ModuleType:
        assert self._aes is not None  # noqa: S101 - there are keys
        return self._aes


def is_sealed(event: RecordedEvent) -> bool:
    """Whether the body of a stored event went through something."""
    return CODINGS in event.metadata


def _with_body(event: Event, body: bytes, codings: list[str]) -> Event:
    metadata = {**(event.metadata or {}), CODINGS: _JOIN.join(codings)}
    return replace(event, data=body, metadata=metadata)


def _as_before(event: RecordedEvent, data: Any) -> RecordedEvent:
    """Return the event with other data, and without what is said of its body."""
    kept = {name: value for name, value in event.metadata.items() if name not in (CODINGS, KEY)}
    return RecordedEvent(
        aggregate=event.aggregate,
        sequence=event.sequence,
        type=event.type,
        data=data,
        metadata=kept,
        id=event.id,
        time=event.time,
        correlation_id=event.correlation_id,
        source=event.source,
        idempotency_key=event.idempotency_key,
    )


def _place(
    aggregate: Aggregate, event: Event | RecordedEvent, metadata: Mapping[str, Any]
) -> bytes:
    """Return what a body is bound to."""
    said = [metadata.get(VERSION, 1), metadata[CODINGS], metadata[KEY]]
    place = [aggregate.domain, aggregate.root, event.id.hex, event.type, *said]
    return codec.encode_json("metadata", place)


def _check_compression(one: Compression) -> None:
    parts = ("name", "compress", "decompress")
    if isinstance(one, type) or not all(hasattr(one, part) for part in parts):
        raise InvalidType("compressions", f"a Compression is wanted, not {type(one).__name__}")
    if _JOIN in one.name or one.name == _LOCKED:
        raise InvalidValue("compressions", f"{one.name!r} can't be the name of one")


def _load_aes() -> ModuleType:
    try:
        from asyncstore.typed import aes
    except ImportError:
        why = "they take cryptography, which is not installed: pip install 'asyncstore[crypto]'"
        raise ConfigurationError("keys", why) from None
    return aes
