"""What every store must do, as cases for pytest, each of which gets an empty `store`.

`asyncstore conformance MODULE:FACTORY` runs all of them. A suite of your own runs them when its
conftest.py has `pytest_plugins = ["asyncstore.testing.conformance"]` and an async fixture `store`,
and a test module `from asyncstore.testing.conformance.events import *`.

A store that lacks a part says so in the setting `asyncstore_lacks` of pytest; cases that need
it are skipped then.
"""

from __future__ import annotations

import uuid
from typing import Final

import pytest

from asyncstore.testing.parts import Part
from asyncstore.values import Aggregate

pytest.register_assert_rewrite("asyncstore.testing.conformance")

LACKS: Final = "asyncstore_lacks"


def needs(*parts: str) -> pytest.MarkDecorator:
    """Mark a case that makes no sense for a store without these parts."""
    return pytest.mark.needs(*map(Part, parts))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting that names what a store lacks."""
    parser.addini(LACKS, f"parts that the store lacks, of: {', '.join(Part)}", "args")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse parts that there are not."""
    config.addinivalue_line("markers", "needs(*parts): parts of a store that a case needs")
    unknown = sorted(set(config.getini(LACKS)) - set(Part))
    if unknown:
        raise pytest.UsageError(f"{LACKS} names {unknown[0]!r}, and knows {', '.join(Part)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a case that needs what the store lacks."""
    wanted = {part for mark in item.iter_markers("needs") for part in mark.args}
    missing = sorted(wanted.intersection(item.config.getini(LACKS)))
    if missing:
        pytest.skip(f"the store has no {', '.join(missing)}")


@pytest.fixture
def order() -> Aggregate:
    """An aggregate that nobody else has."""
    return Aggregate("orders", uuid.uuid4())
