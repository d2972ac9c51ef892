"""The server binaries that this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from asyncstore import embedded
from tests import servers


def binaries(name_contains: str = "") -> Iterator[tuple[str, str, bool]]:
    """Give name and path of each, and whether it is the first, on which all is played."""
    found = [("Valkey", str(embedded.find_binary()))]
    if path := shutil.which("redis-server"):
        found.append(("Redis on PATH", path))
    if servers._wheel_missing() is None:
        found.append(("Redis 8.2", servers._wheel_binary()))
    for number, (name, path) in enumerate(found):
        if name_contains.lower() in name.lower():
            yield name, path, number == 0
