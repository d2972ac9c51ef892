"""Fixtures live in fix_*.py, by topic."""

from __future__ import annotations

import os

import pytest

pytest_plugins = [
    "asyncstore.testing.conformance",
    "tests.fix_clusters",
    "tests.fix_stores",
    "tests.fix_telemetry",
]


@pytest.fixture(autouse=True)
def _no_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep the machine's own configuration out: no variables, an empty current directory."""
    for name in list(os.environ):
        ours = name.startswith("ASYNCSTORE_") and not name.startswith("ASYNCSTORE_TEST_")
        if ours or name in ("REDIS_URL", "STORAGE_BACKEND"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
