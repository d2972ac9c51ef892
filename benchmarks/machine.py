"""Where and on what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import redis.asyncio

_PACKAGES = (
    "asyncstore",
    "coredis",
    "eventsourcing",
    "hiredis",
    "redis",
    "umadb",
    "uvloop",
    "valkey-glide",
)


def describe() -> dict[str, Any]:
    """Return the commit, the time, the machine, Python, and the versions of all sides."""
    return {
        "commit": _commit(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


async def server(client: redis.asyncio.Redis) -> str:
    """Return the name and version of the server."""
    info = await client.info("server")
    version = info.get("valkey_version") or info["redis_version"]
    return f"{info.get('server_name', 'redis')} {version}"


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"
