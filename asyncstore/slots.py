"""The 16,384 slots of a cluster: which one a key is in, and for each a short tag that is in it.

A slot is the CRC16 (XMODEM) of the key, or of what stands in its first braces, modulo 16,384: see
the Redis cluster specification, "Key distribution model" and "Hash tags".
"""

from __future__ import annotations

import itertools
from binascii import crc_hqx
from functools import cache
from typing import Final

COUNT: Final = 16384

_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_LETTERS_A_TAG: Final = 4  # with three, some slots have none


def slot_of(key: str | bytes) -> int:
    """Return the slot of a key."""
    name = key.encode() if isinstance(key, str) else key
    start = name.find(b"{")
    end = name.find(b"}", start + 1)
    if start >= 0 and end > start + 1:
        name = name[start + 1 : end]
    return crc_hqx(name, 0) % COUNT


def slot_of_tag(tag: str) -> int:
    """Return the slot of the keys that have this in their first braces."""
    return crc_hqx(tag.encode(), 0) % COUNT


@cache
def tags() -> tuple[str, ...]:
    """Return a tag for each slot, by its number: the first in the alphabet that is in it.

    Stores have them in their keys: they must never change. Takes about 20 ms, once.
    """
    found: dict[int, str] = {}
    for letters in itertools.product(_LETTERS, repeat=_LETTERS_A_TAG):
        tag = "".join(letters)
        found.setdefault(slot_of_tag(tag), tag)
        if len(found) == COUNT:
            break
    return tuple(found[slot] for slot in range(COUNT))
