"""Runs all cases against the stores that a factory opens, and says what came of each."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import pytest

from asyncstore.errors import ConfigurationError
from asyncstore.testing import conformance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractAsyncContextManager

    from asyncstore.store import Store
    from asyncstore.testing.parts import Terms

    Factory = Callable[[], AbstractAsyncContextManager[Store]]

Result = Literal["passed", "failed", "skipped"]

_HERE: Final = Path(__file__).parent
MODULES: Final = ("events", "editions", "positions", "snapshots", "traces", "listening")
# Nothing of the place where it is run: its plugins, settings, conftest.py and variables.
_ARGUMENTS: Final = (
    *("-p", "no:terminal"),
    *("-p", "no:cacheprovider"),
    *("-p", conformance.__name__),
    "--disable-plugin-autoload",
    "--noconftest",
    f"--config-file={os.devnull}",
    f"--rootdir={_HERE}",
)
_VARIABLES: Final = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case. `why` is short, `text` shows the place; both are empty if it passed."""

    case: str
    result: Result
    seconds: float
    why: str = ""
    text: str = ""


def factory_of(name: str) -> Factory:
    """Return the factory that `MODULE:FACTORY` names; the current directory comes first."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError("factory", f"it is {name!r}: write MODULE:FACTORY")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError("factory", f"there is no module {error.name!r}") from None
    factory: Factory | None = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigurationError("factory", f"{module_name!r} has no function {attribute!r}")
    return factory


def run(factory: Factory, terms: Terms, told: Callable[[Outcome], object]) -> list[Outcome]:
    """Run the cases one after the other, and tell of each when it is done.

    Each case calls the factory, and uses what it opens in a task and an event loop of its own.
    Raises `ConfigurationError` if the factory opens no store, or if there is no such case.
    """
    _try(factory, terms.seconds)
    player = _Player(factory, terms.seconds, told)
    with pytest.MonkeyPatch.context() as environment:
        for name in _VARIABLES:
            environment.delenv(name, raising=False)
        code = pytest.main([*_ARGUMENTS, *_asked(terms)], plugins=[player])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ConfigurationError("only", f"no case has a name that matches {terms.only!r}")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ConfigurationError("only", f"pytest did not run the cases: {code!r}")
    return player.outcomes


def _try(factory: Factory, seconds: float) -> None:
    """Open and close a store, or all cases would say the same of a factory that can't."""

    async def open_one() -> None:
        async with asyncio.timeout(seconds), factory():
            pass

    try:
        asyncio.run(open_one())
    except Exception as error:
        raise ConfigurationError("factory", f"it opens no store: {error!r}") from error


def _asked(terms: Terms) -> Iterable[str]:
    yield f"--override-ini={conformance.LACKS}={' '.join(terms.lacks)}"
    if terms.only:
        yield f"-k={terms.only}"
    yield from (str(_HERE / f"{name}.py") for name in MODULES)


class _Player:
    """The plugin that gives cases their stores, and notes what comes of them."""

    def __init__(self, factory: Factory, seconds: float, told: Callable[[Outcome], object]) -> None:
        self.outcomes: list[Outcome] = []
        self._factory = factory
        self._seconds = seconds
        self._told = told

    @pytest.fixture
    def store(self) -> None:
        """Stand for the store, which is opened, used and closed in one task: see `_play`."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool:
        """Run a case, which is a coroutine function."""
        asyncio.run(self._play(pyfuncitem))
        return True

    async def _play(self, item: pytest.Function) -> None:
        wanted = inspect.signature(item.obj).parameters
        arguments = {name: item.funcargs[name] for name in wanted}
        patience = asyncio.timeout(self._seconds)
        try:
            async with patience, self._factory() as store:
                await item.obj(**(arguments | {"store": store}))
        except TimeoutError:
            if not patience.expired():
                raise
            pytest.fail(f"it was not done in {self._seconds:g} seconds")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what came of a case: of its run, or of what went wrong around it."""
        if report.when != "call" and report.passed:
            return
        why = "" if report.passed else _reason(report)
        text = report.longreprtext if report.failed else ""
        outcome = Outcome(_name(report.nodeid), report.outcome, report.duration, why, text)
        self.outcomes.append(outcome)
        self._told(outcome)


def _name(nodeid: str) -> str:
    return nodeid.replace(".py::", "::", 1)


def _reason(report: pytest.TestReport) -> str:
    """Return in a line why a case was skipped, or what failed."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longreprtext).splitlines()
    return lines[0].removeprefix("Failed: ") if lines else "it failed, and said nothing"
