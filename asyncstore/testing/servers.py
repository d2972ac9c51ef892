"""The servers that tests can run on, and leaving them as they were."""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from asyncstore import forms, walking
from asyncstore.errors import ConfigurationError
from asyncstore.sharing import all_of
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncstore.settings import Settings

URL_VARIABLE: Final = "ASYNCSTORE_TEST_URL"
_IMAGE: Final = "redis:7.4-alpine"
_DOCKER: Final = "unix:///var/run/docker.sock"


def container_missing() -> str | None:
    """Return why no container can be started here; None if one can."""
    if not importlib.util.find_spec("testcontainers"):
        return "testcontainers is not installed"
    host = os.environ.get("DOCKER_HOST", _DOCKER)
    if host.startswith("unix://") and not Path(host.removeprefix("unix://")).exists():
        return f"neither Docker nor podman is there: no {host}"
    import docker

    try:
        client = docker.from_env(timeout=5)
    except docker.errors.DockerException:
        return f"neither Docker nor podman answers at {host}"
    client.close()
    return None


@contextmanager
def container() -> Iterator[str]:
    """Run a Redis in a container, and give its URL."""
    from testcontainers.community.redis import RedisContainer

    with RedisContainer(_IMAGE) as running:
        host, port = running.get_container_host_ip(), running.get_exposed_port(6379)
        yield f"redis://{host}:{port}/0"


async def remove_all(settings: Settings) -> None:
    """Remove every key of a store, which has a prefix of its own on its server.

    Looks through all keys of the server with SCAN. Raises `ConfigurationError` without a prefix:
    then everything on the server would be the store's.
    """
    if not settings.key_prefix:
        raise ConfigurationError("key_prefix", "only the keys of one prefix can be removed")
    async with open_store(settings) as store:
        router = store._router
        async for keys in walking.keys(router, settings.key_prefix):
            await all_of(router.change(forms.is_count, "UNLINK", key) for key in keys)
