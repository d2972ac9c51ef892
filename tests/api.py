"""The public API as text: names, signatures, fields. `make api` writes it to tests/api.txt.

It is read from the source, so it is the same on every version of Python.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import griffe

import asyncstore

SNAPSHOT: Final = Path(__file__).with_name("api.txt")

# What the documentation tells users to import, beside the package itself.
MODULES: Final = {
    "asyncstore.comparing": ["differences", "Difference"],
    "asyncstore.embedded_cluster": ["running", "Cluster", "Node"],
    "asyncstore.migrating": ["Migration", "Caught", "Switch"],
    "asyncstore.telemetry": ["instrument", "record_progress", "watch_progress", "TRACEPARENT"],
    "asyncstore.verify": ["problems", "repair", "Problem"],
}
WITH_EXPORTS: Final = [
    "asyncstore.integrations.aiohttp",
    "asyncstore.integrations.fastapi",
    "asyncstore.testing",
    "asyncstore.typed",
]

_WIDTH: Final = 100
_NOT_CALLED = {"__init__", "__post_init__", "__reduce__", "__repr__", "__str__"}


def snapshot() -> str:
    """Return the API as text."""
    return "".join(f"{part}\n" for line in _lines() for part in _folded(line))


def _folded(line: str) -> list[str]:
    """Return a line in several, a parameter in each, where it is long: so changes are seen."""
    head, opening, rest = line.partition("(")
    if len(line) <= _WIDTH or not opening:
        return [line]
    parameters, closing, result = rest.rpartition(") -> ")
    indent = " " * (len(line) - len(line.lstrip()))
    parts = [f"{indent}    {parameter}," for parameter in _apart(parameters)]
    return [head + opening, *parts, f"{indent}{closing}{result}"]


def _apart(parameters: str) -> Iterator[str]:
    """Yield what commas separate that are in no brackets."""
    depth, start = 0, 0
    for place, letter in enumerate(parameters):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            yield parameters[start:place].strip()
            start = place + 1
    yield parameters[start:].strip()


def public_names() -> dict[str, list[str]]:
    """Return the public names of each module that users import from."""
    package = _load()
    names = {"asyncstore": list(asyncstore.__all__), **MODULES}
    for module in WITH_EXPORTS:
        exports = package[module.removeprefix("asyncstore.")].exports or []
        names[module] = [str(name) for name in exports]
    return names


def _load() -> griffe.Module:
    found = griffe.load("asyncstore", search_paths=[Path(asyncstore.__file__).parent.parent])
    assert isinstance(found, griffe.Module)
    return found


def _lines() -> Iterator[str]:
    package = _load()
    for module, names in public_names().items():
        yield module
        here = package if module == "asyncstore" else package[module.removeprefix("asyncstore.")]
        for name in names:
            yield from _lines_of(name, here[name], "    ")


def _lines_of(name: str, found: griffe.Object | griffe.Alias, indent: str) -> Iterator[str]:
    thing = found.final_target if isinstance(found, griffe.Alias) else found
    if isinstance(thing, griffe.Class):
        yield from _lines_of_class(name, thing, indent)
    elif isinstance(thing, griffe.Function):
        yield indent + _signature(name, thing)
    elif isinstance(thing, griffe.Attribute):
        yield indent + _attribute(name, thing)


def _lines_of_class(name: str, found: griffe.Class, indent: str) -> Iterator[str]:
    bases = ", ".join(str(base) for base in found.bases)
    yield f"{indent}class {name}({bases})" if bases else f"{indent}class {name}"
    if _is_made_by_users(found):
        yield indent + "    " + _signature("__init__", found.members["__init__"])
    for member in found.members.values():
        if _is_public(member):
            yield from _lines_of(member.name, member, indent + "    ")


def _is_made_by_users(found: griffe.Class) -> bool:
    """Whether users call the class: other classes are what the store gives them."""
    made = found.members.get("__init__")
    if "dataclass" not in found.labels or not isinstance(made, griffe.Function):
        return False
    return not any(parameter.name.startswith("_") for parameter in made.parameters)


def _is_public(member: griffe.Object | griffe.Alias) -> bool:
    if member.name.startswith("__"):
        return member.is_function and member.name not in _NOT_CALLED
    return not member.name.startswith("_")


def _signature(name: str, found: griffe.Object | griffe.Alias) -> str:
    assert isinstance(found, griffe.Function)
    kind = "async " if "async" in found.labels else ""
    kind += "static " if "staticmethod" in found.labels else ""
    return kind + found.signature(name=name)


def _attribute(name: str, found: griffe.Attribute) -> str:
    if str(found.annotation) == "Final":
        return f"{name}: Final = {found.value}"
    if found.annotation is not None:
        return f"{name}: {found.annotation}"
    # What an instance's attribute is made of is no part of the API; a constant's value is.
    return name if found.labels == {"instance-attribute"} else f"{name} = {found.value}"


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
    sys.stdout.write(f"{SNAPSHOT} is up to date\n")
