"""What the README and the documentation say is so: each code block runs, each link leads somewhere.

What a block is for is its language:

- `python` is a program, or with pytest's markers a file of tests; `sh` is for a shell, on a store
  of the page's own; the URL of such pages, `redis://localhost:6379`, stands for it;
- `output` is what the block before it has printed, with … for anything;
- `toml` is read as settings, `ini` by a server as its configuration; `json` is JSON, in all or a
  value a line;
- `text` is none of these.

A block that can't run begins with the line `# not run:` and the reason. The blocks of a page run
one after the other in one directory.
"""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import typer.main

import asyncstore
from asyncstore import Settings, embedded
from asyncstore.commands.app import app
from tests import api, markdown, servers
from tests.markdown import FILES, ROOT, Block

PAGE_URL = "redis://localhost:6379"
BLOCK_SECONDS = 60
NO_CODE = {"text", "output"}
PYTEST = [
    *("-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:valkey", "-p", "asyncstore.testing"),
    *("-o", "asyncio_default_fixture_loop_scope=function"),
]


@dataclass
class Page:
    """Where the blocks of a page run."""

    directory: Path
    url: str
    printed: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        RUNNERS[block.language](self, block.text.replace(PAGE_URL, self.url))

    def run_python(self, text: str) -> None:
        if "@pytest.mark." in text:
            file = self.directory / "test_page.py"
            file.write_text(text)
            self._run(sys.executable, "-m", "pytest", *PYTEST, str(file))
        else:
            self._run(sys.executable, "-W", "error", "-c", text)

    def run_shell(self, text: str) -> None:
        lines = [line for line in text.splitlines() if not is_checked_only(line)]
        self._run("bash", "-euo", "pipefail", "-c", "\n".join(lines))

    def _run(self, *command: str) -> None:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={**os.environ, **self.environment},
            process_group=0,
        ) as process:
            try:
                self.printed, complaints = process.communicate(timeout=BLOCK_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with what a shell has started
                raise
        assert process.returncode == 0, self.printed + complaints

    def compare_output(self, text: str) -> None:
        pattern = re.escape(text.strip()).replace("…", ".*?")
        printed = "\n".join(line.rstrip() for line in self.printed.strip().splitlines())
        assert re.fullmatch(pattern, printed, re.S), f"it printed\n{self.printed}"

    def read_settings(self, text: str) -> None:
        file = self.directory / "asyncstore.toml"
        file.write_text(text)
        Settings.from_toml(file)
        file.unlink()

    def start_server(self, text: str) -> None:
        with servers.redis_server(str(embedded.find_binary()), config=text):
            pass  # it has answered

    def read_json(self, text: str) -> None:
        try:
            json.loads(text)
        except ValueError:
            for line in text.splitlines():
                json.loads(line)


RUNNERS: dict[str, Callable[[Page, str], None]] = {
    "python": Page.run_python,
    "sh": Page.run_shell,
    "output": Page.compare_output,
    "toml": Page.read_settings,
    "ini": Page.start_server,
    "json": Page.read_json,
    "text": lambda page, text: None,
}


def is_checked_only(line: str) -> bool:
    """Whether a line would take too long, and is held against what there is instead."""
    return line.startswith(("make ", "pip install "))


def outcome_of(block: Block) -> str:
    """Say what was done with a block."""
    if block.language == "sh" and all(map(is_checked_only, block.text.splitlines())):
        return "what it names is there"
    outcomes = {"python": "ran", "sh": "ran", "output": "is what was printed", "text": "no code"}
    return outcomes.get(block.language, "read")


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    """A directory with a store, and the `asyncstore` command."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "asyncstore"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m asyncstore "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    # Held open, so that no block has to wait for its start.
    async with embedded.running(tmp_path / ".asyncstore") as url:
        yield Page(tmp_path, url, environment={"PATH": path, "COLUMNS": "100"})


@pytest.fixture(scope="module")
def ran() -> Iterator[list[str]]:
    """What became of each block, for build/docs-blocks.txt."""
    lines: list[str] = []
    yield lines
    if lines:
        file = ROOT / "build" / "docs-blocks.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))


def test_there_is_code() -> None:
    assert len([block for file in FILES for block in markdown.blocks_of(file)]) > 50


@pytest.mark.parametrize("file", [f for f in FILES if markdown.blocks_of(f)], ids=str)
def test_the_blocks_of_a_page_run(file: Path, page: Page, ran: list[str]) -> None:
    failed = []
    for block in markdown.blocks_of(file):
        place = f"{file}:{block.line}"
        assert block.language in RUNNERS, f"{place}: no known language"
        if block.not_run is not None:
            assert block.language not in NO_CODE, f"{place}: it would not run anyway"
            ran.append(f"{place}: {block.language}, not run: {block.not_run}")
            continue
        try:
            page.run(block)
        except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
            failed.append(f"{place}: {error}")
            ran.append(f"{place}: {block.language}, failed")
        else:
            ran.append(f"{place}: {block.language}, {outcome_of(block)}")
    assert not failed, "\n\n".join(failed)


def lines_of_shell(command: str) -> Iterator[str]:
    for file in FILES:
        for block in markdown.blocks_of(file):
            if block.language == "sh":
                yield from (line for line in block.text.splitlines() if line.startswith(command))


RIVALS = ["redis-py evalsha", "redis-py pipelines", "coredis", "valkey-glide (TCP)"]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_the_figures_are_those_that_were_measured(page: str) -> None:
    text = (ROOT / page).read_text()
    measured = results("bench")
    alone, many = measured["appends of 200 bytes"].values()
    loads = measured["load of a snapshot and 10 events"]
    slower = [alone["asyncstore"]["p50_us"] / alone[side]["p50_us"] for side in RIVALS]
    faster = [many["asyncstore"]["rate"] / many[side]["rate"] for side in RIVALS]
    assert f"{alone['asyncstore']['p50_us']:.0f} µs: {slower[0]:.2f} × redis-py, " in text
    assert f" {slower[2]:.2f} × coredis, {slower[3]:.2f} × valkey-glide" in text
    assert f"{many['asyncstore']['rate']:,.0f}/s: {faster[0]:.1f} × redis-py, " in text
    assert f" {faster[1]:.1f} × its pipelines, {faster[2]:.1f} × coredis, " in text
    assert f" {faster[3]:.1f} × valkey-glide" in text
    assert f"{loads['asyncstore'] / loads['redis-py evalsha']:.2f} × two commands" in text
    assert "{:.1f}, {:.1f} and {:.1f} × UmaDB".format(*fsynced_beside_umadb(8, 32, 128)) in text


def test_the_figures_of_subscriptions_and_http_are_those_that_were_measured() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    subscriptions, http = results("bench-subscriptions"), results("bench-http")["rounds"]
    ours, streams = (subscriptions["delay_us"][side]["p50"] for side in ("asyncstore", "streams"))
    assert f"{ours:.0f} µs where an aggregate is busy: {ours / streams:.2f} × a blocked" in text
    rates = subscriptions["events_per_second"]
    handler, handlers, one, eight, bundle, bundles = (
        rates[f"{count} at once, {way}"]["asyncstore"] / rates[f"{count} at once, {way}"]["streams"]
        for way in ("@store.handler", "an ack each event", "an ack each bundle")
        for count in (1, 8)
    )
    assert f"`@store.handler` {handler:.2f} × with one function at a time, " in text
    assert f" {handlers:.2f} with 8, and an ack each event; " in text
    assert f"a loop that awaits each ack {one:.2f} and {eight:.2f} ×; " in text
    assert f"an ack each bundle of 64 {bundle:.2f} and {bundles:.2f} × |" in text
    rate, p99 = (
        {side: median(row[what] for row in rows) for side, rows in http.items()}
        for what in ("rate", "p99_ms")
    )
    sides = "redis-py commands", "redis-py evalsha"
    commands, script = (rate["asyncstore"] / rate[side] for side in sides)
    assert f"{rate['asyncstore']:,.0f}/s: {commands:.2f} × separate commands of redis-py, " in text
    assert f"{script:.2f} × its `evalsha` of our script; " in text
    assert "p99 {:.2f} and {:.2f} ×".format(*(p99["asyncstore"] / p99[s] for s in sides)) in text


def fsynced_beside_umadb(*writers: int) -> Iterator[float]:
    rates = {
        (row["writers"], row["side"]): row["rate"]
        for row in results("bench-rivals")["rows"]
        if row["does"] == "append" and row["count"] == 1
    }
    for count in writers:
        ours, theirs = "asyncstore, AOF always", "UmaDB, fdatasync a commit"
        yield rates[count, ours] / rates[count, theirs]


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_blocks_pass_a_strict_type_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: it checks types")
    for file in FILES:
        for block in markdown.blocks_of(file):
            if block.language == "python" and block.not_run is None:
                name = re.sub(r"\W", "_", f"{file}_{block.line}")
                (tmp_path / f"{name}.py").write_text(block.text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(asyncstore.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"`make ([a-z-]+)", "".join((ROOT / file).read_text() for file in FILES))
    used = {*named, *(line.split()[1] for line in lines_of_shell("make "))}
    assert {"demo", "test", "bench", "faults"} <= used <= targets


def test_what_pip_is_told_to_install_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = {
        extra
        for line in lines_of_shell("pip install ")
        for extras in re.findall(r"\[([\w,]+)\]", line)
        for extra in extras.split(",")
    }
    assert {"cli", "embedded"} <= used <= set(project["optional-dependencies"])


# What must not be left out


def test_every_setting_is_told_of() -> None:
    (table,) = [text for name, text in settings_page().items() if name == "All settings"]
    told = set(re.findall(r"^\| `(\w+)`", table, re.M))
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert told == fields


def settings_page() -> dict[str, str]:
    return markdown.sections_of(Path("docs/configuration.md"), 2)


def test_every_command_is_told_of() -> None:
    page = (ROOT / "docs/command-line.md").read_text()
    told = set(re.findall(r"^\| `asyncstore ([a-z -]+)`", page, re.M))
    assert told == set(commands_of(typer.main.get_command(app)))


def commands_of(command: Any, before: str = "") -> Iterator[str]:
    """Yield the commands that do something, with those of groups behind the group's name."""
    for name, found in command.commands.items():
        if hasattr(found, "commands"):
            yield from commands_of(found, f"{before}{name} ")
        else:
            yield f"{before}{name}"


# Links


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_links_of_a_file_lead_somewhere(file: Path) -> None:
    dead = [link for link in markdown.links_of(file) if is_dead(file, link)]
    assert not dead


def is_dead(file: Path, link: str) -> bool:
    """Whether a link within the project goes to no file, or to no heading in it."""
    if re.match(r"\w+:", link):
        return False
    where, anchor = urldefrag(unquote(link))
    target = Path(os.path.normpath(file.parent / where)) if where else file
    if not (ROOT / target).exists():
        return True
    return bool(anchor) and anchor not in markdown.anchors_of(target)


class Html(html.parser.HTMLParser):
    """What a page of the built site links to, and what can be linked to in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Html]:
    """The site as `make docs` builds it, any warning an error."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed: it builds the documentation")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, "-d", str(directory / "cache"), str(ROOT / "docs"), str(directory / "html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {file: Html(file) for file in (directory / "html").rglob("*.html")}


def test_every_page_is_in_the_site(site: dict[Path, Html]) -> None:
    assert {file.stem for file in site} >= {f.stem for f in FILES if f.parent == Path("docs")}


def test_the_links_of_the_site_lead_somewhere(site: dict[Path, Html]) -> None:
    dead = []
    for file, page in site.items():
        for link in page.links:
            where, anchor = urldefrag(unquote(link.partition("?")[0] or link))
            if re.match(r"\w+:", link):
                continue
            target = Path(os.path.normpath(file.parent / where)) if where else file
            if not target.exists() or (anchor and anchor not in site[target].anchors):
                dead.append(f"{file.name}: {link}")
    assert not dead


def test_every_public_name_is_in_the_reference(site: dict[Path, Html]) -> None:
    (page,) = [page for file, page in site.items() if file.name == "reference.html"]
    text = (ROOT / "docs/reference.md").read_text()
    missing = [
        f"{module}.{name}"
        for module, names in api.public_names().items()
        for name in names
        if f"{module}.{name}" not in page.anchors and f"`{name}`" not in text
    ]
    assert not missing
