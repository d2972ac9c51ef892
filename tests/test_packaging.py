"""What a release has in it: the sdist, and the wheel that is built from it."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests import wheel_results

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncstore"

needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed: it builds"
)
needs_sources = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason="the package is not beside the tests: they run on a wheel"
)
pytestmark = [needs_hatchling, needs_sources]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources that users get, unpacked."""
    directory = tmp_path_factory.mktemp("sdist")
    build("sdist", ROOT, directory)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build("wheel", sdist, directory)
    (found,) = directory.glob("*.whl")
    return found


def build(target: str, source: Path, directory: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(directory)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def sources_of_the_package() -> set[str]:
    paths = (path for path in PACKAGE.rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == sources_of_the_package()
    assert {"asyncstore/py.typed", "asyncstore/lua/append.lua"} <= package
    rest = {name.partition(".dist-info/")[2] for name in names - package}
    assert rest == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    (name,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")]
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    readme = (ROOT / "README.md").read_text()
    assert metadata["Name"] == "asyncstore"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload() == readme


@pytest.mark.parametrize("directory", ["benchmarks", "examples", "tests"])
def test_the_sources_have_all_that_the_tests_need(sdist: Path, directory: str) -> None:
    wanted = {
        path.relative_to(ROOT)
        for path in (ROOT / directory).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= {path.relative_to(sdist) for path in sdist.rglob("*")}


def test_the_results_have_a_line_for_each_python(tmp_path: Path) -> None:
    report, results = tmp_path / "junit.xml", tmp_path / "results.txt"
    suite = '<testsuite errors="1" failures="2" skipped="3" tests="10" time="4.2"/>'
    report.write_text(f"<testsuites>{suite}</testsuites>")
    results.write_text(f"Python 3.10.0: 1 passed\nPython {platform.python_version()}: old\n")
    wheel_results.main(report, results)
    other, ours = results.read_text().splitlines()
    assert other == "Python 3.10.0: 1 passed"
    assert "4 passed, 2 failed, 1 errors, 3 skipped, 4 s" in ours


def test_the_sources_have_all_that_is_read_first(sdist: Path) -> None:
    wanted = {"README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "Makefile"}
    assert wanted <= {path.name for path in sdist.iterdir()}
