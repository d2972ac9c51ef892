"""Locks bodies with AES-256-GCM: the only file that knows `cryptography`.

Nonces are random, which is safe for four billion bodies a key: a key is that of one subject.
"""

from __future__ import annotations

import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NAME: Final = "aes-gcm"
_NONCE_BYTES: Final = 12


def lock(secret: bytes, body: bytes, place: bytes) -> bytes:
    """Return a body that `unlock` gives back with the same key and place: a nonce, the rest."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(secret).encrypt(nonce, body, place)


def unlock(secret: bytes, locked: bytes, place: bytes) -> bytes | None:
    """Return the body, or None where key, place or bytes are not those it was locked with."""
    try:
        return AESGCM(secret).decrypt(locked[:_NONCE_BYTES], locked[_NONCE_BYTES:], place)
    except (InvalidTag, ValueError):  # a nonce that is too short
        return None
