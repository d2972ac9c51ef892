"""Where the store is and how it behaves: arguments, environment, `asyncstore.toml`, in that order.

A setting is described once, in `_SETTINGS`: its field, its key in the file, its environment
variable. Where the store is (`backend`, `url`, `urls`, `path`) is settled as one thing: a source
that names a place without a backend, such as a REDIS_URL in the environment, overrides the backend
and the places of the sources after it. The environment and the file may describe places of both
backends, and `backend` chooses.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit, urlunsplit

import tomli_w

from asyncstore.errors import ConfigurationError, InvalidValue
from asyncstore.values import Durability, check_durability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

EMBEDDED: Final = "embedded"
REDIS: Final = "redis"
PRIMARY: Final = "primary"
REPLICA: Final = "replica"

FILE_NAME: Final = "asyncstore.toml"
DEFAULT_DIRECTORY: Final = ".asyncstore"
DEFAULT_PORT: Final = 6379
URLS_VARIABLE: Final = "ASYNCSTORE_URLS"

_ENVIRONMENT: Final = "the environment"
_ARGUMENTS: Final = "the arguments"
_SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}
# What a URL may set behind its "?"; all else is the driver's business.
_OPTIONS = re.compile(r"db|protocol|username|password|client_name|cluster|ssl_[a-z_]+")
_CLUSTER = re.compile(r"[?&]cluster=(true|false)(?=&|$)")
_ONE_MORE = re.compile(r",\s*(redis|valkey)s?://")
_MAX_PREFIX: Final = 128
_BIGGEST_VALUE: Final = 512 * 1024 * 1024  # what Redis takes in one value, by default

Layer = dict[str, Any]


class Options(TypedDict, total=False):
    """The fields of Settings, as keywords of `open`."""

    backend: str | None
    url: str | None
    urls: Sequence[str]
    path: str | Path | None
    password: str | None
    key_prefix: str
    max_event_bytes: int
    max_append_events: int
    max_append_bytes: int
    max_in_flight: int
    max_in_flight_bytes: int
    timeout: float
    allow_eviction: bool
    durability: Durability | str
    appendfsync_always: bool
    read_from: str
    max_replica_lag: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """All settings of a store. Wrong ones are a `ConfigurationError`; no password is in the repr.

    `backend` is "redis" or "embedded"; None derives it from the rest. `url` names one server
    (`redis://`, `rediss://`, `unix://`, `valkey://`, `valkeys://`, `embedded://`), `urls` the
    nodes of a cluster, `path` the directory of an embedded server whose data lasts. `password` is
    that of all these URLs, for whoever has it apart from them and as it is, without %-escapes.
    `key_prefix` goes in front of every key. `max_event_bytes` bounds one event,
    `max_append_events` and `max_append_bytes` the events of one append. `timeout` is in seconds,
    for a whole call. `max_in_flight` and `max_in_flight_bytes` bound what is sent and not answered
    yet: calls beyond them wait. `allow_eviction` accepts a server
    that deletes histories when its memory is full. `durability` is that of appends that name none:
    a Durability, or its text, such as "fsync" or "replicas(1)"; with "fsync" an embedded server
    syncs each write. `appendfsync_always` says that the server does, where its ACL hides that.
    `read_from` is "primary", or "replica" for a cluster whose reads may be a little old: at most by
    `max_replica_lag` bytes of what its primaries have written, or the primary is read from.
    """

    backend: str | None = None
    url: str | None = None
    urls: Sequence[str] = ()
    path: str | Path | None = None
    password: str | None = None
    key_prefix: str = ""
    max_event_bytes: int = 16 * 1024 * 1024
    max_append_events: int = 10_000
    max_append_bytes: int = 64 * 1024 * 1024
    max_in_flight: int = 2048
    max_in_flight_bytes: int = 32 * 1024 * 1024
    timeout: float = 10.0
    allow_eviction: bool = False
    durability: Durability | str = Durability.MEMORY
    appendfsync_always: bool = False
    read_from: str = PRIMARY
    max_replica_lag: int = 1024 * 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", _check_urls(self.urls))
        object.__setattr__(self, "backend", _check_where(self))
        _check_password(self)
        _check_prefix(self.key_prefix)
        for name, most in _WHOLE_NUMBERS.items():
            _check_between(name, getattr(self, name), 1, most)
        _check_between("timeout", self.timeout, 0.001, 86_400)
        for name in ("allow_eviction", "appendfsync_always"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(name, "True or False is wanted")
        if self.read_from not in (PRIMARY, REPLICA):
            raise ConfigurationError("read_from", f"{PRIMARY!r} or {REPLICA!r} is wanted")
        object.__setattr__(self, "durability", _check_durability(self.durability))

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

        Passwords are part of it: the file is made readable for its owner only.
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
        """Return where the store is, without the password, to be shown."""
        if self.urls:
            return ",".join(mask(url) for url in self.urls)
        if self.url is not None:
            return mask(self.url)
        return f"embedded://{Path(self.path or DEFAULT_DIRECTORY).absolute()}"

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "url" and value is not None:
                value = mask(value)
            elif field.name == "urls":
                value = tuple(mask(url) for url in value)
            elif field.name == "password" and value is not None:
                value = "***"
            shown.append(f"{field.name}={value!r}")
        return f"Settings({', '.join(shown)})"


# What a store makes of them


def server_url_of(settings: Settings) -> str:
    """Return the URL in the form that redis-py knows."""
    return _dialled(settings, settings.url or "")


def seeds_of(settings: Settings) -> list[str]:
    """Return the URLs of some nodes of a cluster, as redis-py knows them; [] for one server.

    One URL is that of a cluster if it ends in `?cluster=true`. Without that, the server is asked.
    """
    if settings.urls:
        return [_dialled(settings, url) for url in settings.urls]
    found = _CLUSTER.search(settings.url or "")
    return [server_url_of(settings)] if found and found[1] == "true" else []


def servers_of(settings: Settings) -> list[tuple[str, int | None]]:
    """Return host and port of the servers that are named; a throw-away one has no place.

    Those of a socket or a directory are a path, and no port.
    """
    if settings.backend == EMBEDDED:
        directory = embedded_directory_of(settings)
        return [] if directory is None else [(str(directory), None)]
    parts = map(urlsplit, settings.urls or (settings.url or "",))
    return [
        (part.path, None)
        if part.scheme == "unix"
        else (part.hostname or "", part.port or DEFAULT_PORT)
        for part in parts
    ]


def _dialled(settings: Settings, url: str) -> str:
    return _with_password(_for_redis_py(url), settings.password)


def embedded_directory_of(settings: Settings) -> Path | None:
    """Return the directory of the embedded server's data; None for a throw-away one."""
    if settings.url is None:
        return Path(settings.path or DEFAULT_DIRECTORY).absolute()
    path = unquote(urlsplit(settings.url).path)
    return Path(path) if path else None


def is_throw_away(settings: Settings) -> bool:
    """Whether the data go with the last user: an embedded server without a directory."""
    return settings.backend == EMBEDDED and embedded_directory_of(settings) is None


def mask(url: str) -> str:
    """Return the URL with `***` for its password, however wrong it is."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        scheme, rest = "", url
    return f"{scheme}{slashes}{_mask_query(_mask_login(rest))}"


def _mask_login(rest: str) -> str:
    if rest.startswith("/"):
        return rest  # the path of a socket or a directory: nobody logs in there
    login, at, host = rest.rpartition("@")
    if at:
        user, colon, _ = login.partition(":")
        return f"{user}:***@{host}" if colon else f"***@{host}"
    if _HOST_AND_PORT.fullmatch(rest):
        return rest
    # Whoever forgot the host has left a user and a password.
    return f"{rest.partition(':')[0]}:***"


def _mask_query(rest: str) -> str:
    return re.sub(r"([?&][^=&#]*=)([^&#]*)", _mask_option, rest)


def _mask_option(option: re.Match[str]) -> str:
    is_password = "password" in unquote(option[1]).lower()
    return option[1] + "***" if is_password else option[0]


_HOST_AND_PORT = re.compile(r"([^:#?/]*|\[[0-9a-fA-F:.]*\])(:\d{0,5})?(/\d*)?(\?[^#]*)?")


# Checks


_WHOLE_NUMBERS: Final = {
    "max_event_bytes": _BIGGEST_VALUE,
    "max_append_events": 100_000,
    "max_append_bytes": _BIGGEST_VALUE,
    "max_in_flight": 100_000,
    "max_in_flight_bytes": _BIGGEST_VALUE,
    "max_replica_lag": 2**40,
}


def _check_where(settings: Settings) -> str:
    if settings.backend not in (None, EMBEDDED, REDIS):
        named = mask(str(settings.backend))
        why = f"there is no backend {named!r}: choose {EMBEDDED!r} or {REDIS!r}"
        raise ConfigurationError("backend", why)
    if settings.url is not None and settings.urls:
        raise ConfigurationError("urls", "give url for one server or urls for a cluster, not both")
    if settings.url is not None:
        derived = _check_url("url", settings.url)
    else:
        derived = REDIS if settings.urls else EMBEDDED
    if settings.backend == REDIS and derived != REDIS:
        raise ConfigurationError("url", "the URL of a server is missing, and the backend is redis")
    if settings.backend == EMBEDDED and derived != EMBEDDED:
        raise ConfigurationError("backend", "it is embedded, but the URL is one of a server")
    if settings.path is not None:
        _check_path(settings, derived)
    return derived


def _check_path(settings: Settings, backend: str) -> None:
    if backend != EMBEDDED or settings.url is not None:
        why = "there is a url too: name the one that counts by backend"
        raise ConfigurationError("path", why)
    if not isinstance(settings.path, (str, Path)) or not str(settings.path):
        raise ConfigurationError("path", "the name of a directory is wanted")


def _check_password(settings: Settings) -> None:
    password: object = settings.password
    if password is None:
        return
    if not isinstance(password, str) or not password:
        raise ConfigurationError("password", "a str that is not empty is wanted")
    if not password.isprintable():
        why = "it has a line break or the like in it: was it written to a file with its line?"
        raise ConfigurationError("password", why)
    if settings.backend != REDIS:
        raise ConfigurationError("password", "an embedded server has none: which url is it for?")
    if has_password_in_url(settings):
        raise ConfigurationError("password", "the URL has one, too: leave one of them out")


def has_password_in_url(settings: Settings) -> bool:
    """Whether a URL of the settings has a password in it."""
    parts = [urlsplit(url) for url in (settings.url or "", *settings.urls)]
    return any(
        one.password is not None or "password" in dict(parse_qsl(one.query)) for one in parts
    )


def _with_password(url: str, password: str | None) -> str:
    if password is None:
        return url
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def _for_redis_py(url: str) -> str:
    """Return a URL without what redis-py does not know."""
    scheme, colon, rest = url.partition(":")
    bare = _CLUSTER.sub("", rest)
    if "?" not in bare:
        bare = bare.replace("&", "?", 1)
    return _SCHEMES[scheme] + colon + bare


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
    _check_is_one(key, url)
    parts = _split(url)
    if parts is None:
        raise ConfigurationError(key, f"{mask(url)!r} is not a URL")
    if parts.scheme == EMBEDDED:
        return _check_embedded(key, url, parts)
    if parts.scheme not in _SCHEMES or not url.startswith(f"{parts.scheme}://"):
        schemes = ", ".join(f"{scheme}://" for scheme in (*_SCHEMES, EMBEDDED))
        why = f"{mask(url)!r} is not a URL such as redis://localhost:6379; it starts with {schemes}"
        raise ConfigurationError(key, why)
    if not (parts.path if parts.scheme == "unix" else parts.hostname):
        missing = "the path of a socket" if parts.scheme == "unix" else "a host"
        raise ConfigurationError(key, f"{mask(url)!r} is without {missing}")
    if parts.fragment:
        raise ConfigurationError(key, f"{mask(url)!r}: a # in a URL is to be written as %23")
    if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d{1,5}", parts.path):
        why = f"{mask(url)!r}: after the host, only the number of a database can follow"
        raise ConfigurationError(key, why)
    _check_options(key, parts)
    return REDIS


def _check_is_one(key: str, url: str) -> None:
    if _ONE_MORE.search(url):
        why = f"it is several URLs: the nodes of a cluster go into urls, or {URLS_VARIABLE}"
        raise ConfigurationError(key, why)


def _check_options(key: str, parts: SplitResult) -> None:
    for option, value in parse_qsl(parts.query, keep_blank_values=True):
        if not _OPTIONS.fullmatch(option):
            named = repr(option) if option.isidentifier() else "something behind the ?"
            raise ConfigurationError(key, f"{named} is not an option that a URL can set")
        if option == "db" and not value.isdecimal():
            raise ConfigurationError(key, "the option db wants the number of a database")
        if option == "cluster" and value not in ("true", "false"):
            raise ConfigurationError(key, "the option cluster wants true or false")
        if option == "protocol" and value not in ("2", "3"):
            raise ConfigurationError(key, "the option protocol wants 2 or 3, for RESP2 or RESP3")


def _split(url: str) -> SplitResult | None:
    # Not raised from here: what Python says of a bad port may show the password.
    if not url.isprintable():
        return None
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.hostname else None
    except ValueError:
        return None


def _check_embedded(key: str, url: str, parts: SplitResult) -> str:
    if not url.startswith("embedded://") or parts.netloc or parts.query or parts.fragment:
        why = f"{mask(url)!r}: embedded:// or embedded:///absolute/path is wanted"
        raise ConfigurationError(key, why)
    path = unquote(parts.path)
    if not path.isprintable() or (path and not path.strip("/")):
        raise ConfigurationError(key, f"{url!r} does not name a directory")
    return EMBEDDED


def _check_durability(level: object) -> Durability:
    if isinstance(level, Durability):
        return check_durability(level)
    if not isinstance(level, str):
        raise ConfigurationError("durability", "a Durability, or its text, is wanted")
    try:
        return Durability.parse(level)
    except InvalidValue as error:
        raise ConfigurationError("durability", error.why) from None


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
    _Setting("urls", "storage.redis.urls", URLS_VARIABLE, _parse_list),
    _Setting("path", "storage.embedded.path", "ASYNCSTORE_PATH"),
    _Setting("password", "storage.redis.password", "ASYNCSTORE_PASSWORD"),
    _Setting("key_prefix", "storage.key_prefix", "ASYNCSTORE_KEY_PREFIX"),
    _Setting("max_event_bytes", "storage.max_event_bytes", "ASYNCSTORE_MAX_EVENT_BYTES", int),
    _Setting("max_append_events", "storage.max_append_events", "ASYNCSTORE_MAX_APPEND_EVENTS", int),
    _Setting("max_append_bytes", "storage.max_append_bytes", "ASYNCSTORE_MAX_APPEND_BYTES", int),
    _Setting("max_in_flight", "storage.max_in_flight", "ASYNCSTORE_MAX_IN_FLIGHT", int),
    _Setting(
        "max_in_flight_bytes",
        "storage.max_in_flight_bytes",
        "ASYNCSTORE_MAX_IN_FLIGHT_BYTES",
        int,
    ),
    _Setting("timeout", "storage.timeout", "ASYNCSTORE_TIMEOUT", float),
    _Setting("allow_eviction", "storage.allow_eviction", "ASYNCSTORE_ALLOW_EVICTION", _parse_bool),
    _Setting("durability", "storage.durability", "ASYNCSTORE_DURABILITY"),
    _Setting(
        "appendfsync_always",
        "storage.redis.appendfsync_always",
        "ASYNCSTORE_APPENDFSYNC_ALWAYS",
        _parse_bool,
    ),
    _Setting("read_from", "storage.redis.read_from", "ASYNCSTORE_READ_FROM"),
    _Setting("max_replica_lag", "storage.redis.max_replica_lag", "ASYNCSTORE_MAX_REPLICA_LAG", int),
)
_WANTED: Final[Mapping[Callable[[str], Any], str]] = {
    int: "a whole number, in digits,",
    float: "a number",
    _parse_bool: "true or false",
}
_CONFIG_VARIABLE: Final = "ASYNCSTORE_CONFIG"
_PLACES: Final = ("url", "urls", "path")

_OURS: Final = "ASYNCSTORE_"
_OF_TESTS: Final = "ASYNCSTORE_TEST_"
_SERVICE_HOST: Final = "SERVICE_HOST"


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
    values = {name: value for name, value in options.items() if value not in (None, [], ())}
    named: Layer = {name: values[name] for name in ("backend", *_PLACES) if name in values}
    if len(named) > 1:
        Settings(**named)  # they must make sense together; none of them is passed over
    return _Said(values, _ARGUMENTS, {})


def _from_env(environ: Mapping[str, str]) -> _Said:
    known = {setting.variable for setting in _SETTINGS} | {_CONFIG_VARIABLE}
    others = (_OF_TESTS, *_of_kubernetes(environ))
    for name in environ:
        if name.startswith(_OURS) and not name.startswith(others) and name not in known:
            raise ConfigurationError(name, "there is no such setting", _ENVIRONMENT)
    values = {}
    for setting in _SETTINGS:
        text = environ.get(setting.variable)
        if text:
            try:
                values[setting.field] = setting.parse(text)
            except (ValueError, KeyError):
                why = f"{_WANTED[setting.parse]} is wanted"
                raise ConfigurationError(setting.variable, why, _ENVIRONMENT) from None
    return _Said(values, _ENVIRONMENT, {s.field: s.variable for s in _SETTINGS})


def _of_kubernetes(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield how variables begin that Kubernetes sets in a pod for services named "asyncstore…"."""
    for name in environ:
        if name.startswith(_OURS) and name.endswith(_SERVICE_HOST):
            service = name.removesuffix(_SERVICE_HOST)
            yield from (f"{service}SERVICE_", f"{service}PORT")


def _find_file(environ: Mapping[str, str]) -> _Said:
    named = environ.get(_CONFIG_VARIABLE)
    if named:
        return _from_toml(Path(named))
    path = Path(FILE_NAME)
    return _from_toml(path) if path.exists() else _Said({}, FILE_NAME, {})


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
        overridden: set[str] = set()
        if not said.values.keys().isdisjoint(("url", "urls")):
            overridden = {"url", "urls", "password"}  # nobody else's password goes there
        if "backend" not in said.values and not said.values.keys().isdisjoint(_PLACES):
            overridden = {"backend", "password", *_PLACES}
        merged = {name: value for name, value in merged.items() if name not in overridden}
        merged |= said.values
    try:
        return Settings(**_without_other_backend(merged))
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
        dropped = ("urls", "password") if is_embedded else ("url", "urls", "password")
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
    return str(value) if isinstance(value, Path | Durability) else value


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        path.chmod(0o600)  # it may have been there before, for everybody to read
        file.write(text)
