"""What the tests on an installed wheel have come to, a line for each version of Python.

python -m tests.wheel_results junit.xml results.txt
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree


def line_of(report: str) -> str:
    """Return the line of this Python for what pytest has reported as JUnit's XML."""
    (suite,) = ElementTree.fromstring(report).iter("testsuite")  # noqa: S314 - pytest wrote it
    count = {what: int(suite.get(what, 0)) for what in ("tests", "failures", "errors", "skipped")}
    tests, failures, errors, skipped = count.values()
    passed = tests - failures - errors - skipped
    took = round(float(suite.get("time", 0)))
    return (
        f"{_name()}: {passed} passed, {failures} failed, {errors} errors, {skipped} skipped, "
        f"{took} s, asyncstore {metadata.version('asyncstore')} from the wheel"
    )


def with_line(results: str, line: str) -> str:
    """Return the results with the line in place of that of the same Python."""
    others = [other for other in results.splitlines() if not other.startswith(f"{_name()}:")]
    return "".join(f"{one}\n" for one in sorted([*others, line]))


def _name() -> str:
    return f"Python {platform.python_version()}"


def main(report: Path, results: Path) -> None:
    """Put a line for this Python into the results."""
    if not report.exists():
        sys.exit("the tests have not run to their end")
    before = results.read_text() if results.exists() else ""
    results.write_text(with_line(before, line_of(report.read_text())))
    sys.stdout.write(results.read_text())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
