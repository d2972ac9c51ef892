"""Where the store is and how it behaves: arguments, environment, `asyncstore.toml`, in that order.

A setting is described once, in `_SETTINGS`: its field, its key in the file, its environment
variable. Where the store is (`backend`, `url`, `urls`) is settled as one thing: a REDIS_URL in the
environment also overrides a `backend = "embedded"` in the file.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict
from urllib.parse import SplitResult, unquote, urlsplit

import tomli_w

from asyncstore.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

EMBEDDED: Final = "embedded"
REDIS: Final = "redis"

FILE_NAME: Final = "asyncstore.toml"
DEFAULT_DIRECTORY: Final = ".asyncstore"

_ENVIRONMENT: Final = "the environment"
_ARGUMENTS: Final = "the arguments"
_SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}
_MAX_PREFIX: Final = 128
_BIGGEST_VALUE: Final = 512 * 1024 * 1024  # what Redis takes in one value, by default

Layer = dict[str, Any]


class Options(TypedDict, total=False):
    """The fields of Settings, as keywords of `open`."""

    backend: str | None
    url: str | None
    urls: Sequence[str]
    path: str | Path | None
    key_prefix: str
    max_event_bytes: int
    max_append_events: int
    max_connections: int
    timeout: float
    allow_eviction: bool


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """All settings of a store. Wrong ones are a `ConfigurationError`; no password is in the repr.

    `backend` is "redis" or "embedded"; None derives it from the rest. `url` names one server
    (`redis://`, `rediss://`, `unix://`, `valkey://`, `valkeys://`, `embedded://`), `urls` the
    nodes of a cluster, `path` the directory of an embedded server whose data lasts.
    `key_prefix` goes in front of every key. `max_event_bytes` bounds one event, `max_append_events`
    the events of one append. `timeout` is in seconds, for a connection and for one answer;
    `max_connections` bounds the calls in flight. `allow_eviction` accepts a server that deletes
    histories when its memory is full.
    """

    backend: str | None = None
    url: str | None = None
    urls: Sequence[str] = ()
    path: str | Path | None = None
    key_prefix: str = ""
    max_event_bytes: int = 16 * 1024 * 1024
    max_append_events: int = 10_000
    max_connections: int = 64
    timeout: float = 10.0
    allow_eviction: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", _check_urls(self.urls))
        object.__setattr__(self, "backend", _check_where(self))
        _check_prefix(self.key_prefix)
        for name, most in _WHOLE_NUMBERS.items():
            _check_between(name, getattr(self, name), 1, most)
        _check_between("timeout", self.timeout, 0.001, 86_400)
        if not isinstance(self.allow_eviction, bool):
            raise ConfigurationError("allow_eviction", "True or False is wanted")

    @staticmethod
    def from_env(environ: Mapping[str, str] | None = None) -> Settings:
        """Return the settings of the environment; what it does not name has its default."""
        return _build([_from_env(os.environ if environ is None else environ)])

    @staticmethod
    def from_toml(path: str | Path = FILE_NAME) -> Settings:
        """Return the settings of a file; what it does not name has its default."""
        return _build([_from_toml(Path(path))])

    @staticmethod
    def resolve(
        options: Options | None = None, environ: Mapping[str, str] | None = None
    ) -> Settings:
        """Return the settings that `open` uses: `options`, then the environment, then the file.

        The file is what ASYNCSTORE_CONFIG names, or `asyncstore.toml` in the current directory
        if it is there.
        """
        environ = os.environ if environ is None else environ
        return _build([_from_options(options or {}), _from_env(environ), _find_file(environ)])

    def to_toml(self, path: str | Path | None = None) -> str:
        """Return the settings as the text of an `asyncstore.toml`, and write it to `path`.

        Passwords in URLs are part of it: the file is made readable for its owner only.
        """
        table: dict[str, Any] = {}
        for setting in _SETTINGS:
            value = getattr(self, setting.field)
            if value is not None and value != ():
                *outer, key = setting.key.split(".")
                place = table
                for name in outer:
                    place = place.setdefault(name, {})
                place[key] = _plain(value)
        text = tomli_w.dumps(table)
        if path is not None:
            _write_private(Path(path), text)
        return text

    def where(self) -> str:
        """Return where the store is, with the password: `mask` it before showing it."""
        if self.urls:
            return ",".join(self.urls)
        if self.url is not None:
            return self.url
        return f"embedded://{Path(self.path or DEFAULT_DIRECTORY).absolute()}"

    def server_url(self) -> str:
        """Return the URL in the form that redis-py knows."""
        scheme, colon, rest = (self.url or "").partition(":")
        return _SCHEMES[scheme] + colon + rest

    def embedded_directory(self) -> Path | None:
        """Return the directory of the embedded server's data; None for a throw-away one."""
        if self.url is None:
            return Path(self.path or DEFAULT_DIRECTORY).absolute()
        path = unquote(urlsplit(self.url).path)
        return Path(path) if path else None

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "url" and value is not None:
                value = mask(value)
            elif field.name == "urls":
                value = tuple(mask(url) for url in value)
            shown.append(f"{field.name}={value!r}")
        return f"Settings({', '.join(shown)})"


def mask(url: str) -> str:
    """Return the URL with `***` for its password, whatever it looks like."""
    if "," in url:
        return ",".join(mask(part) for part in url.split(","))
    before, at, after = url.rpartition("@")
    if at:
        scheme, slashes, login = before.rpartition("://")
        user = login.split(":", 1)[0]
        shown = f"{user}:***" if ":" in login else "***"
        url = f"{scheme}{slashes}{shown}@{after}"
    return re.sub(r"(?i)([?&][a-z_]*password=)[^&#]*", r"\1***", url)


# Checks


_WHOLE_NUMBERS: Final = {
    "max_event_bytes": _BIGGEST_VALUE,
    "max_append_events": 100_000,
    "max_connections": 10_000,
}


def _check_where(settings: Settings) -> str:
    if settings.backend not in (None, EMBEDDED, REDIS):
        why = f"there is no backend {settings.backend!r}: choose {EMBEDDED!r} or {REDIS!r}"
        raise ConfigurationError("backend", why)
    if settings.url is not None and settings.urls:
        raise ConfigurationError("urls", "give url for one server or urls for a cluster, not both")
    if settings.url is not None:
        derived = _check_url("url", settings.url)
    else:
        derived = REDIS if settings.urls else EMBEDDED
    if settings.backend == REDIS and derived != REDIS:
        raise ConfigurationError("url", "the backend is redis: give the URL of a server")
    if settings.backend == EMBEDDED and derived != EMBEDDED:
        raise ConfigurationError("backend", "it is embedded, but the URL is one of a server")
    if settings.path is not None:
        _check_path(settings, derived)
    return derived


def _check_path(settings: Settings, backend: str) -> None:
    if backend != EMBEDDED or settings.url is not None:
        raise ConfigurationError("path", "it is for an embedded server without a url")
    if not isinstance(settings.path, (str, Path)) or not str(settings.path):
        raise ConfigurationError("path", "the name of a directory is wanted")


def _check_urls(urls: object) -> tuple[str, ...]:
    if isinstance(urls, str) or not isinstance(urls, (list, tuple)):
        raise ConfigurationError("urls", "a list of URLs is wanted")
    for url in urls:
        if _check_url("urls", url) == EMBEDDED:
            raise ConfigurationError("urls", "an embedded server is no node of a cluster")
    return tuple(urls)


def _check_url(key: str, url: object) -> str:
    """Return the backend that the URL stands for."""
    if not isinstance(url, str):
        raise ConfigurationError(key, f"a URL is wanted, not {type(url).__name__}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigurationError(key, f"{mask(url)!r} is not a URL") from None
    if parts.scheme == EMBEDDED:
        return _check_embedded(key, url, parts)
    if parts.scheme not in _SCHEMES or not url.startswith(f"{parts.scheme}://"):
        schemes = ", ".join(f"{scheme}://" for scheme in (*_SCHEMES, EMBEDDED))
        raise ConfigurationError(key, f"{mask(url)!r} is not a URL that starts with {schemes}")
    if not (parts.path if parts.scheme == "unix" else parts.hostname):
        missing = "the path of a socket" if parts.scheme == "unix" else "a host"
        raise ConfigurationError(key, f"{mask(url)!r} is without {missing}")
    if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d{1,5}", parts.path):
        why = f"{mask(url)!r}: after the host, only the number of a database can follow"
        raise ConfigurationError(key, why)
    return REDIS


def _check_embedded(key: str, url: str, parts: SplitResult) -> str:
    if not url.startswith("embedded://") or parts.netloc or parts.query or parts.fragment:
        why = f"{mask(url)!r}: embedded:// or embedded:///absolute/path is wanted"
        raise ConfigurationError(key, why)
    return EMBEDDED


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str):
        raise ConfigurationError("key_prefix", f"a str is wanted, not {type(prefix).__name__}")
    if len(prefix) > _MAX_PREFIX or not re.fullmatch(r"[A-Za-z0-9._:/-]*", prefix):
        why = (
            f"{prefix[:_MAX_PREFIX]!r}: at most {_MAX_PREFIX} letters, digits and . _ : / - "
            f"are allowed"
        )
        raise ConfigurationError("key_prefix", why)


def _check_between(key: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigurationError(key, f"a number is wanted, not {type(value).__name__}")
    if key in _WHOLE_NUMBERS and not isinstance(value, int):
        raise ConfigurationError(key, f"a whole number is wanted, not {value}")
    if not least <= value <= most:
        raise ConfigurationError(key, f"{value} is not between {least} and {most}")


# Layers: what each source says


@dataclass(frozen=True, slots=True)
class _Setting:
    """How a field of Settings is spelled in the file and in the environment."""

    field: str
    key: str
    variable: str
    parse: Callable[[str], Any] = str


def _parse_bool(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    return words[text.lower()]


def _parse_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_SETTINGS: Final = (
    _Setting("backend", "storage.backend", "STORAGE_BACKEND"),
    _Setting("url", "storage.redis.url", "REDIS_URL"),
    _Setting("urls", "storage.redis.urls", "ASYNCSTORE_URLS", _parse_list),
    _Setting("path", "storage.embedded.path", "ASYNCSTORE_PATH"),
    _Setting("key_prefix", "storage.key_prefix", "ASYNCSTORE_KEY_PREFIX"),
    _Setting("max_event_bytes", "storage.max_event_bytes", "ASYNCSTORE_MAX_EVENT_BYTES", int),
    _Setting("max_append_events", "storage.max_append_events", "ASYNCSTORE_MAX_APPEND_EVENTS", int),
    _Setting("max_connections", "storage.max_connections", "ASYNCSTORE_MAX_CONNECTIONS", int),
    _Setting("timeout", "storage.timeout", "ASYNCSTORE_TIMEOUT", float),
    _Setting("allow_eviction", "storage.allow_eviction", "ASYNCSTORE_ALLOW_EVICTION", _parse_bool),
)
_CONFIG_VARIABLE: Final = "ASYNCSTORE_CONFIG"
_WHERE: Final = ("backend", "url", "urls", "path")

# Not settings: the variables of this project's tests, and those that Kubernetes sets in every
# pod for a service that happens to be called "asyncstore".
_NOT_SETTINGS = re.compile(r"ASYNCSTORE_(TEST_.*|SERVICE_(HOST|PORT.*)|PORT(_.*)?)")


@dataclass(frozen=True, slots=True)
class _Said:
    """What one source says: the values by field, and how it calls each field."""

    values: Layer
    source: str
    names: Mapping[str, str]

    def error(self, error: ConfigurationError) -> ConfigurationError:
        """Return the error in the source's own words."""
        return ConfigurationError(self.names.get(error.key, error.key), error.why, self.source)


def _from_options(options: Options) -> _Said:
    known = {setting.field for setting in _SETTINGS}
    for name in options:
        if name not in known:
            raise ConfigurationError(name, "there is no such setting")
    values = {name: value for name, value in options.items() if value is not None}
    return _Said(values, _ARGUMENTS, {})


def _from_env(environ: Mapping[str, str]) -> _Said:
    known = {setting.variable for setting in _SETTINGS} | {_CONFIG_VARIABLE}
    for name in environ:
        is_ours = name.startswith("ASYNCSTORE_") and not _NOT_SETTINGS.fullmatch(name)
        if is_ours and name not in known:
            raise ConfigurationError(name, "there is no such setting", _ENVIRONMENT)
    values = {}
    for setting in _SETTINGS:
        text = environ.get(setting.variable)
        if text:
            try:
                values[setting.field] = setting.parse(text)
            except (ValueError, KeyError):
                why = "its value can't be read"
                raise ConfigurationError(setting.variable, why, _ENVIRONMENT) from None
    return _Said(values, _ENVIRONMENT, {s.field: s.variable for s in _SETTINGS})


def _find_file(environ: Mapping[str, str]) -> _Said:
    named = environ.get(_CONFIG_VARIABLE)
    if named:
        return _from_toml(Path(named))
    path = Path(FILE_NAME)
    return _from_toml(path) if path.is_file() else _Said({}, FILE_NAME, {})


def _from_toml(path: Path) -> _Said:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError("the file", error.strerror or "unreadable", str(path)) from None
    except ValueError as error:
        # TOML's errors speak of lines and columns, not of values.
        raise ConfigurationError("the file", f"it is not TOML: {error}", str(path)) from None
    by_key = {setting.key: setting for setting in _SETTINGS}
    values = {}
    for key, value in _flatten(table):
        if key not in by_key:
            raise ConfigurationError(key, "there is no such setting", str(path))
        values[by_key[key].field] = value
    return _Said(values, str(path), {setting.field: setting.key for setting in _SETTINGS})


def _flatten(table: Mapping[str, Any], outer: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in table.items():
        key = f"{outer}{name}"
        found += _flatten(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
    return found


def _build(sources: list[_Said]) -> Settings:
    """Return the settings of several sources, the first of which counts most."""
    merged: Layer = {}
    for said in reversed(sources):
        values = _without_other_backend(said.values)
        if not values.keys().isdisjoint(("url", "urls", "path")):
            merged = {name: value for name, value in merged.items() if name not in _WHERE}
        merged = _without_other_backend({**merged, **values})
    try:
        return Settings(**merged)
    except ConfigurationError as error:
        raise _blame(sources, error) from None


def _without_other_backend(values: Layer) -> Layer:
    """Leave out where the other backend is: a file may describe both, `backend` chooses."""
    backend, url = values.get("backend"), values.get("url")
    dropped: tuple[str, ...] = ()
    if backend == REDIS:
        dropped = ("path",)
    elif backend == EMBEDDED:
        is_embedded = isinstance(url, str) and url.startswith(f"{EMBEDDED}:")
        dropped = ("urls",) if is_embedded else ("url", "urls")
    return {name: value for name, value in values.items() if name not in dropped}


def _blame(sources: list[_Said], error: ConfigurationError) -> ConfigurationError:
    """Return the error with the source that the setting came from, and its name there."""
    for key in (error.key, "backend"):
        for said in sources:
            if key in said.values:
                return said.error(error)
    return error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
