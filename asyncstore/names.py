"""Which names can be part of a key, and which numbers can be a sequence.

Names never hold what separates the parts of a key (`:`), and a root never holds what marks the
hash tag (`{`, `}`), so no two aggregates can share a key.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from asyncstore.errors import InvalidName, InvalidType, InvalidValue

MAIN: Final = "main"
"""The edition that everything happens on unless told otherwise; the others diverge from it."""
MAX_NAME = 128  # characters
MAX_ROOT = 512  # bytes of UTF-8
MAX_ID = 512  # bytes of UTF-8
MAX_SEQUENCE = 2**53 - 1
"""The largest sequence: scores of a sorted set are doubles, exact up to here."""

MAX_SCHEMA_VERSION = 2**31 - 1
MAX_SECONDS = 10 * 365 * 24 * 3600

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def check_name(part: str, value: str) -> str:
    """Return `value` if it can name a domain, an edition or a handler; `part` says which.

    What comes back is a plain str: a key must not depend on how a subclass, such as an enum, shows
    itself.
    """
    _check_is_str(part, value)
    if not value:
        raise InvalidName(part, value, "it is empty")
    if len(value) > MAX_NAME:
        shown = value[:40] + "…"
        raise InvalidName(part, shown, f"it has {len(value)} characters, {MAX_NAME} are allowed")
    if not _NAME.fullmatch(value):
        raise InvalidName(part, value, "only letters A-Z a-z, digits, '.', '_' and '-' are allowed")
    return str.__str__(value)


def check_root(value: str) -> str:
    """Return `value`, as a plain str, if it can be the root of an aggregate."""
    _check_is_str("root", value)
    if not value:
        raise InvalidName("root", value, "it is empty")
    if "{" in value or "}" in value:
        raise InvalidName("root", value, "braces are kept for the cluster's hash tag")
    why = _why_no_line(value, MAX_ROOT)
    if why:
        shown = value if len(value) <= 40 else value[:40] + "…"
        raise InvalidName("root", shown, why)
    return str.__str__(value)


def check_edition(value: str) -> str:
    """Return `value` if it can name an edition. The main timeline has one spelling."""
    if value is MAIN:
        return MAIN
    edition = check_name("edition", value)
    if edition != MAIN and edition.lower() == MAIN:
        raise InvalidName("edition", edition, f"the main timeline is spelled {MAIN!r}")
    return edition


def check_id(argument: str, value: str | None) -> str | None:
    """Return `value` if it can be an idempotency key or a correlation id; empty means None.

    Its text is not in the errors: it may be a secret.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidType(argument, f"a str is wanted, not {type(value).__name__}")
    why = _why_no_line(value, MAX_ID)
    if why:
        raise InvalidValue(argument, why)
    return str.__str__(value) or None


def _why_no_line(value: str, most: int) -> str:
    """Return why a text is not a line of at most that many bytes; empty if it is."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "it has a lone surrogate, which is not a text"
    if size > most:
        return f"it has {size} bytes of UTF-8, {most} are allowed"
    if not value.isprintable() and any(unicodedata.category(char) == "Cc" for char in value):
        return "it has a control character"
    return ""


def check_sequence(argument: str, value: int) -> int:
    """Return `value` if it is a whole number that can be a sequence."""
    check_whole_number(argument, value)
    if value > MAX_SEQUENCE:
        why = f"{_shown(value)} is beyond the largest sequence, {MAX_SEQUENCE}"
        raise InvalidValue(argument, why)
    return int(value)


def check_whole_number(argument: str, value: int, *, least: int = 0) -> int:
    """Return `value` if it is an int, not a bool, and neither negative nor less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(argument, f"a whole number is wanted, not {type(value).__name__}")
    if value < 0:
        raise InvalidValue(argument, f"{_shown(value)} is negative")
    if value < least:
        raise InvalidValue(argument, f"it must be {least} or more")
    return int(value)


def check_seconds(argument: str, value: float, *, least: float = 0.0) -> float:
    """Return `value` if it is a number of seconds that is not less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType(argument, f"a number of seconds is wanted, not {type(value).__name__}")
    if not least <= value <= MAX_SECONDS:
        raise InvalidValue(argument, f"it must be {least} to {MAX_SECONDS} seconds")
    return float(value)


def check_schema_version(value: int) -> int:
    """Return `value` if it can be the schema version of a snapshot."""
    check_whole_number("schema_version", value)
    if value > MAX_SCHEMA_VERSION:
        raise InvalidValue("schema_version", f"it is beyond the largest, {MAX_SCHEMA_VERSION}")
    return int(value)


def check_bool(argument: str, value: bool) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise InvalidType(argument, f"True or False is wanted, not {type(value).__name__}")
    return value


def _shown(value: int) -> str:
    """Return the number, or for one that is too long to be shown that it is."""
    return str(value) if value.bit_length() <= 64 else "a number of many digits"


def _check_is_str(part: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidName(part, f"<{type(value).__name__}>", "a str is wanted")
