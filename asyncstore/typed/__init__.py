"""Events as objects: dataclasses, pydantic models, msgspec Structs, protobuf messages.

A layer that may be left out: what it stores are plain events. `Registry` names the
types, their versions and what turns old ones into new ones; `TypedStore` appends, reads, folds and
handles them; `Bodies` compress and encrypt them on the way, so that a subject can be forgotten.
"""

from asyncstore.errors import ForgottenEvent, InvalidEvent, UnknownEvent, UnreadableEvent
from asyncstore.typed.bodies import Bodies, Compression, Zlib
from asyncstore.typed.registry import EventOptions, Forgotten, Policy, Registry
from asyncstore.typed.store import AppendOptions, ReadOptions, Typed, TypedStore
from asyncstore.typed.subjects import Key, KeyStore, MemoryKeys, StoredKeys

__all__ = [  # noqa: RUF022 - grouped by topic
    "Registry",
    "EventOptions",
    "Policy",
    "TypedStore",
    "Typed",
    "AppendOptions",
    "ReadOptions",
    # what bodies go through
    "Bodies",
    "Compression",
    "Zlib",
    "Forgotten",
    "Key",
    "KeyStore",
    "MemoryKeys",
    "StoredKeys",
    # errors
    "ForgottenEvent",
    "InvalidEvent",
    "UnknownEvent",
    "UnreadableEvent",
]
