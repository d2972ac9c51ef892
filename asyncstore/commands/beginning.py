"""`init`: an `asyncstore.toml` with all settings, each with a line about it."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from asyncstore.commands.exits import FAILED, end_with
from asyncstore.commands.options import AsJson, Level, options_at
from asyncstore.commands.output import RED, print_json, print_line, say
from asyncstore.errors import ConfigurationError, InvalidValue
from asyncstore.settings import (
    DEFAULT_DIRECTORY,
    EMBEDDED,
    FILE_NAME,
    REDIS,
    Settings,
    has_password_in_url,
)
from asyncstore.store import examine

if TYPE_CHECKING:
    from asyncstore.settings import Options

ABOUT: Final = {
    "storage.backend": '"embedded", a server of its own, or "redis", one that is there',
    "storage.key_prefix": "what stands in front of every key",
    "storage.max_event_bytes": "the most bytes of one event",
    "storage.max_append_events": "the most events of one append",
    "storage.max_append_bytes": "the most bytes of one append",
    "storage.max_in_flight": "the most calls that were sent and not answered yet; others wait",
    "storage.max_in_flight_bytes": "the same, in bytes",
    "storage.timeout": "seconds for a whole call",
    "storage.allow_eviction": "accept a server that deletes histories when its memory is full",
    "storage.durability": '"memory", "fsync", "replicas(n)" or "fsync_and_replicas(n)"',
    "storage.redis.url": "one server: redis://, rediss://, unix://",
    "storage.redis.urls": "some nodes of a cluster",
    "storage.redis.password": "where it is not in the URL; ASYNCSTORE_PASSWORD is another place",
    "storage.redis.appendfsync_always": "your word for it, where an ACL hides CONFIG",
    "storage.redis.read_from": '"primary", or "replica" for reads that may be a little old',
    "storage.redis.max_replica_lag": "how old: at most so many bytes of what was written",
    "storage.embedded.path": "the directory of the events; it is made by the first use",
}
_HEAD: Final = (
    "# Where the events are, and how the store behaves. Arguments and the environment (REDIS_URL,",
    "# ASYNCSTORE_…) come before this file. What is commented out has its default.",
)

app = typer.Typer()


@app.command("init")
def init_(
    url: Annotated[
        str | None, typer.Option(help="A server; of a cluster, some nodes with commas.")
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="The directory of an embedded server's data.")
    ] = None,
    key_prefix: Annotated[str | None, typer.Option(help="In front of every key.")] = None,
    durability: Level = None,
    file: Annotated[Path, typer.Option(help="The file that is written.")] = Path(FILE_NAME),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write it only if the server is fit for events.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an `asyncstore.toml`, with comments. Asks on a terminal, if no setting is given.

    The file is readable for its owner only: a URL may hold a password.
    """
    given = _Given(url, path, key_prefix, durability)
    end_with(lambda: _init(given, _Target(file, force), check, as_json))


@dataclass(frozen=True, slots=True)
class _Given:
    """The settings that were given, or answered; None is not given."""

    url: str | None = None
    path: str | None = None
    key_prefix: str | None = None
    durability: str | None = None

    def settings(self) -> Settings:
        """Return them as settings; those of the environment have no part in it."""
        options: Options = options_at(self.url, self.key_prefix)
        if self.path is not None or self.url is None:
            options["path"] = self.path or DEFAULT_DIRECTORY
        if self.durability is not None:
            options["durability"] = self.durability
        return Settings(**options)


@dataclass(frozen=True, slots=True)
class _Target:
    """The file that is written."""

    path: Path
    may_overwrite: bool

    def refuse_if_there(self) -> None:
        """Raise if it is there and must stay."""
        if self.path.exists() and not self.may_overwrite:
            raise InvalidValue("--file", f"{self.path} is there already; --force overwrites it")

    def write(self, text: str) -> None:
        """Write it, readable for its owner only."""
        how = os.O_TRUNC if self.may_overwrite else os.O_EXCL
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        except FileExistsError:
            self.refuse_if_there()
            raise
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            self.path.chmod(0o600)
            file.write(text)


def _init(given: _Given, target: _Target, check: bool, as_json: bool) -> int:
    target.refuse_if_there()
    if given == _Given() and sys.stdin.isatty():
        given, check = _answers(check)
    settings = given.settings()
    if check and not _is_fit(settings):
        say("nothing was written")
        return FAILED
    target.write(commented(settings))
    if as_json:
        print_json({"file": str(target.path), "store": settings.where()})
    else:
        print_line(f"{target.path}: the store is at {settings.where()}")
    if has_password_in_url(settings):
        say(
            f"{target.path} has the password in it, readable for you alone: keep the file out of "
            "version control, or take it out of the URL and give it by ASYNCSTORE_PASSWORD"
        )
    return 0


def _is_fit(settings: Settings) -> bool:
    """Whether nothing is bad of the server; what is, is said. An embedded one is not there yet."""
    if settings.backend == EMBEDDED:
        say("an embedded server is made by the first use: there is nothing to check")
        return True
    report = asyncio.run(examine(settings))
    for finding in report.findings:
        if finding.level == "bad":
            say(f"{finding.name}: {finding.found}: {finding.meaning}", RED)
    say(f"{report.server}: {report.level}; `asyncstore doctor` says more")
    return report.level != "bad"


# Asking


def _answers(check: bool) -> tuple[_Given, bool]:
    backend = _prompt(f"A server of its own ({EMBEDDED}), or one that is there ({REDIS})", EMBEDDED)
    if backend not in (EMBEDDED, REDIS):
        raise ConfigurationError("backend", f"{EMBEDDED} or {REDIS} is wanted")
    url = path = None
    if backend == EMBEDDED:
        path = _prompt("The directory of its data", DEFAULT_DIRECTORY)
    else:
        url = _prompt("Its URL; of a cluster, some nodes with commas", "redis://localhost:6379")
        check = check or typer.confirm("Look whether it is fit for events?", True, err=True)
    key_prefix = _prompt("In front of every key, such as shop:", "")
    durability = _prompt("How durable: memory, fsync, replicas(n), fsync_and_replicas(n)", "memory")
    return _Given(url, path, key_prefix, durability), check


def _prompt(question: str, default: str) -> str:
    answer: str = typer.prompt(question, default=default, err=True)
    return answer.strip()


# The file


def commented(settings: Settings) -> str:
    """Return the text of the file: each setting with what it is about."""
    defaults = Settings().to_toml().splitlines()
    lines, table = [*_HEAD], ""
    for line in settings.to_toml().splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        key = f"{table}.{line.partition(' = ')[0]}"
        if key in ABOUT:
            lines.append(f"# {ABOUT[key]}")
        is_needless = line in defaults and key in ABOUT and key != "storage.backend"
        lines.append(f"# {line}" if is_needless else line)
    return "\n".join(lines) + "\n"
