"""The shape of the code: which way imports point, what Lua may do, what is public."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

import asyncstore
import asyncstore.testing
import asyncstore.typed
from asyncstore import scripts
from asyncstore.testing.conformance import running

PACKAGE = Path(asyncstore.__file__).parent

# From the bottom up: a module imports only from the ones before it.
ORDER = [
    "errors",
    "sharing",
    "names",
    "values",
    "observing",
    "slots",
    "keys",
    "codec",
    "recorded",
    "settings",
    "wire",
    "answers",
    "pubsub",
    "forms",
    "scripts",
    "transport",
    "appends",
    "durability",
    "replicas",
    "nodes",
    "cluster",
    "router",
    "doorbell",
    "sweeping",
    "embedded_keeper",
    "embedded",
    "embedded_cluster",
    "positions",
    "snapshots",
    "reading",
    "listing",
    "erasing",
    "writing",
    "events",
    "listening",
    "acks",
    "worklist",
    "registering",
    "progress",
    "feeding",
    "deliveries",
    "memory",
    "keeping",
    "scouting",
    "worker",
    "subscriptions",
    "running",
    "walking",
    "looking",
    "soundness",
    "folding",
    "checks",
    "cluster_checks",
    "admission",
    "store",
    "__init__",
    "lines",
    "attached",
    "transfer",
    "comparing",
    "migrating",
    "balance",
    "sizes",
    "verify",
    "acl",
    "testing.parts",
    "testing.clock",
    "testing.builders",
    "testing.proxy",
    "testing.servers",
    "testing.__init__",
    "testing.loops",
    "testing.fixtures",
    "testing.conformance.__init__",
    "testing.conformance.events",
    "testing.conformance.editions",
    "testing.conformance.positions",
    "testing.conformance.snapshots",
    "testing.conformance.traces",
    "testing.conformance.listening",
    "testing.conformance.running",
    "telemetry",
    "commands.__init__",
    "commands.output",
    "commands.options",
    "commands.exits",
    "commands.shown",
    "commands.history",
    "commands.tailing",
    "commands.appending",
    "commands.beginning",
    "commands.measuring",
    "commands.benching",
    "commands.transferring",
    "commands.moving",
    "commands.health",
    "commands.access",
    "commands.handlers",
    "commands.clusters",
    "commands.conforming",
    "commands.app",
    "cli",
    "__main__",
    "integrations.__init__",
    "integrations.http",
    "integrations.fastapi",
    "integrations.aiohttp",
    "typed.kinds",
    "typed.registry",
    "typed.subjects",
    "typed.aes",
    "typed.bodies",
    "typed.store",
    "typed.__init__",
]
COMMANDS = {module for module in ORDER if module.startswith("commands.")}


def module_of(source: str, name: str) -> str:
    """Where `from source import name` gets it: in our packages, from a module or the package."""
    package = PACKAGE.parent / source.replace(".", "/")
    if not (package / "__init__.py").is_file():
        return source
    if (package / name / "__init__.py").is_file():
        return f"{source}.{name}.__init__"
    inside = name if (package / f"{name}.py").is_file() else "__init__"
    return f"{source}.{inside}"


@cache
def imports_of(module: str) -> set[str]:
    """The modules that a module imports when it runs; those for type checkers do not count."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {module_of(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return found


def test_every_module_has_its_place() -> None:
    found = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert sorted(ORDER) == sorted(".".join(path.parts) for path in found)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module: str) -> None:
    own = {
        name.removeprefix("asyncstore.")
        for name in imports_of(module)
        if name.startswith("asyncstore.")
    }
    assert own <= set(ORDER[: ORDER.index(module)])


def test_a_framework_is_imported_by_its_integration_only() -> None:
    frameworks = {"fastapi", "starlette", "pydantic", "aiohttp"}
    for module in ORDER:
        libraries = {name.split(".")[0] for name in imports_of(module)} & frameworks
        allowed = {
            "integrations.fastapi": {"fastapi", "starlette", "pydantic"},
            "integrations.aiohttp": {"aiohttp"},
            "typed.kinds": {"pydantic"},
        }
        assert libraries <= allowed.get(module, set()), module
    users = {m for m in ORDER if any("integrations" in name for name in imports_of(m))}
    assert users == {"integrations.fastapi", "integrations.aiohttp"}


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("redis", {"transport"}),
        ("hiredis", {"wire", "pubsub"}),
        ("orjson", {"codec"}),
        ("tomli_w", {"settings"}),
        ("pytest_asyncio", {"testing.loops"}),
        ("testcontainers", {"testing.servers"}),
        ("docker", {"testing.servers"}),
        ("typer", COMMANDS - {"commands.output"}),
        ("rich", {"commands.output"}),
        ("msgspec", {"typed.kinds"}),
        ("cryptography", {"typed.aes"}),
        ("opentelemetry", {"telemetry"}),
        (
            "anyio",
            {
                "cluster",
                "commands.appending",
                "commands.clusters",
                "commands.transferring",
                "doorbell",
                "embedded",
                "embedded_cluster",
                "running",
                "sharing",
                "worker",
                "sweeping",
                "testing.fixtures",
                "transfer",
                "transport",
            },
        ),
    ],
)
def test_who_knows_which_library(library: str, users: set[str]) -> None:
    found = {m for m in ORDER if any(name.split(".")[0] == library for name in imports_of(m))}
    assert found <= users


def test_pytest_is_imported_by_what_only_pytest_runs() -> None:
    found = {module for module in ORDER if "pytest" in imports_of(module)}
    only_pytest = {m for m in ORDER if m.startswith("testing.conformance.")}
    assert found == {"testing.fixtures", *only_pytest} - {"testing.conformance.positions"}


def test_all_cases_of_the_contract_are_run_everywhere() -> None:
    cases = {m for m in ORDER if m.startswith("testing.conformance.")}
    cases -= {"testing.conformance.__init__", "testing.conformance.running"}
    assert {module.rpartition(".")[2] for module in cases} == set(running.MODULES)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_contract_*.py"))
    assert all(f"from asyncstore.{module} import *" in tests for module in cases)


def test_typed_events_may_be_left_out() -> None:
    users = {m for m in ORDER if any("asyncstore.typed" in name for name in imports_of(m))}
    assert all(user.startswith("typed.") for user in users)


def test_telemetry_is_imported_by_its_users_only() -> None:
    assert not [m for m in ORDER if "asyncstore.telemetry" in imports_of(m)]


def test_the_keeper_needs_the_standard_library_only() -> None:
    assert not [name for name in imports_of("embedded_keeper") if name.startswith("asyncstore")]


@pytest.mark.parametrize(
    "package",
    [asyncstore, asyncstore.testing, asyncstore.typed],
    ids=lambda package: package.__name__,
)
def test_public_names_are_listed_and_documented(package: ModuleType) -> None:
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - {"pytest_plugins"} == set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
            for member, function in inspect.getmembers(value, inspect.isfunction):
                assert member.startswith("_") or inspect.getdoc(function), (name, member)


# Lua

LUA = {path.name: path.read_text() for path in (PACKAGE / "lua").glob("*.lua")}
SCRIPTS = {script.name: script for script in scripts.ALL}


def test_every_lua_file_is_a_script_or_part_of_one() -> None:
    included = {
        name for text in LUA.values() for name in re.findall(r"^-- include: (.*)$", text, re.M)
    }
    assert set(LUA) == {f"{name}.lua" for name in SCRIPTS} | included


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_states_its_contract(name: str) -> None:
    lines = SCRIPTS[name].source.splitlines()
    assert re.fullmatch(r"#!lua( flags=(no-writes|allow-oom))?", lines[0])
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("--"), lines[1:]))
    assert "-- KEYS: " in header
    assert "-- Reply: " in header
    if "ARGV[" in SCRIPTS[name].source:
        assert "-- ARGV: " in header


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_touches_declared_keys_only(name: str) -> None:
    source = SCRIPTS[name].source
    declared = set(re.findall(r"^ *local ([\w, ]+) = KEYS\[", source, re.M))
    names = {part for names in declared for part in names.split(", ")}
    # What else may stand for a key: parameters, and what walks over declared ones.
    names |= {"place", "index", "older", "from", "absent", "KEYS[place]", "KEYS[1]"}
    for parameters in re.findall(r"function \w+\(([\w, ]+)\)", source):
        names |= set(parameters.split(", "))
    assert not re.search(r"redis\.p?call\((?!')", source), "a command that can't be checked"
    commands = re.findall(r"redis\.p?call\('(\w+)'(?:, (?:unpack\()?([\w\[\]]+))?", source)
    assert commands
    for command, key in commands:
        assert command not in {"KEYS", "SCAN", "FLUSHALL", "FLUSHDB", "EVAL"}
        assert command in {"TIME", "SPUBLISH", "MSET"} or key in names, (command, key)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_only_reads_says_so(name: str) -> None:
    writes = {"SET", "MSET", "INCR", "ZADD", "ZREM", "SADD", "SREM", "HSET", "UNLINK", "DEL"}
    writes |= {"ZREMRANGEBYSCORE", "ZREMRANGEBYRANK", "ZREMRANGEBYLEX", "ZUNIONSTORE", "RENAME"}
    commands = set(re.findall(r"redis\.call\('(\w+)'", SCRIPTS[name].source))
    assert SCRIPTS[name].writes == bool(commands & writes)


def test_scripts_are_in_the_package() -> None:
    assert resources.files("asyncstore").joinpath("lua", "append.lua").is_file()
    assert (PACKAGE / "py.typed").is_file()
