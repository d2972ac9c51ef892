"""Fixtures live in fix_*.py, by topic."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.fix_stores"]


@pytest.fixture(autouse=True)
def _no_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep the machine's own configuration out: no variables, an empty current directory."""
    for name in ("REDIS_URL", "STORAGE_BACKEND", "ASYNCSTORE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
