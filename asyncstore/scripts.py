"""The Lua scripts, each a value with what the transport must know of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from asyncstore import forms
from asyncstore.wire import Repeat, Request

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from asyncstore.forms import Form
    from asyncstore.wire import Argument, Reply

_INCLUDE = "-- include: "


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the server gets it.

    `form` tells whether a reply is one of this script.
    `mark` is the place in its ARGV, from 0, that tells it of a second sending; None if it has none.
    `is_idempotent` says that it changes nothing more when it arrives twice.
    """

    name: str
    source: str
    sha: str
    writes: bool
    form: Form
    mark: int | None = None
    is_idempotent: bool = False

    @property
    def repeat(self) -> Repeat:
        """What may be done when its reply was lost."""
        if not self.writes:
            return Repeat.FREELY
        if self.is_idempotent:
            return Repeat.ALIKE
        return Repeat.NEVER if self.mark is None else Repeat.MARKED

    def request(
        self,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        callers: Sequence[asyncio.Future[Reply]],
        born: float,
        *,
        is_group: bool = False,
        slot: int | None = None,
    ) -> Request:
        """Return a call by its digest, to the node that has the slot.

        With `is_group` its reply has a part for each caller.
        """
        command: list[Argument] = ["EVALSHA", self.sha, len(keys), *keys, *arguments]
        return Request(
            command,
            self.name,
            self.repeat,
            callers,
            born,
            mark=0 if self.mark is None else 3 + len(keys) + self.mark,
            source=self.source,
            is_group=is_group,
            slot=slot,
        )


def load(name: str, form: Form, mark: int | None = None, *, is_idempotent: bool = False) -> Script:
    """Read `lua/{name}.lua` from the package, with what it includes."""
    lines = [
        _read(line.removeprefix(_INCLUDE)) if line.startswith(_INCLUDE) else line
        for line in _read(f"{name}.lua").splitlines()
    ]
    source = "\n".join(lines)
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    writes = "no-writes" not in lines[0]
    return Script(name, source, sha, writes, form, mark, is_idempotent)


def _read(file_name: str) -> str:
    return resources.files("asyncstore").joinpath("lua", file_name).read_text(encoding="utf-8")


APPEND = load("append", forms.is_anything, mark=0)  # a group's parts are looked at one by one
READ = load("read", forms.is_page)
NEXT = load("next", forms.is_count)
LOAD = load("load", forms.is_loaded)
FIND = load("find", forms.is_found)
BRANCH = load("branch", forms.is_branched)
DELETE = load("delete", forms.is_deleted)
ERASE = load("erase", forms.is_left)
GET_POSITION = load("get_position", forms.is_text_or_nil)
PUT_POSITION = load("put_position", forms.is_one_text)
PUT_SNAPSHOT = load("put_snapshot", forms.is_one_text)
GET_SNAPSHOT = load("get_snapshot", forms.is_snapshot)
DELETE_SNAPSHOTS = load("delete_snapshots", forms.is_one_text)
SUBSCRIBE = load("subscribe", forms.is_subscribed, is_idempotent=True)
POLL = load("poll", forms.is_polled, is_idempotent=True)
SWEEP = load("sweep", forms.is_swept, is_idempotent=True)
LEASE = load("lease", forms.are_leased, is_idempotent=True)
BEGIN = load("begin", forms.is_one_text, is_idempotent=True)
ACK = load("ack", forms.is_one_text, is_idempotent=True)
ACKS = load("acks", forms.is_anything, is_idempotent=True)  # its parts, as with APPEND
ACK_APPEND = load("ack_append", forms.is_acked, is_idempotent=True)
NACK = load("nack", forms.is_one_text, is_idempotent=True)
RENEW = load("renew", forms.is_texts, is_idempotent=True)
LAG = load("lag", forms.is_texts)
RESET = load("reset", forms.is_one_text, is_idempotent=True)
RETRY = load("retry", forms.is_one_text)
RELEASE = load("release", forms.is_texts, is_idempotent=True)
OPEN = load("open", forms.is_one_text)

# What only `verify` runs, for an operator.
MEND_ROOT = load("mend_root", forms.is_one_text)
MEND_NAME = load("mend_name", forms.is_one_text)
MEND_HANDLER = load("mend_handler", forms.is_one_text)
MEND_CLAIM = load("mend_claim", forms.is_one_text)
MEND_COMMITS = load("mend_commits", forms.is_one_text)
MEND_CORRELATED = load("mend_correlated", forms.is_one_text)
MEND_SCORES = load("mend_scores", forms.is_one_text)

MENDING = (
    MEND_ROOT,
    MEND_NAME,
    MEND_HANDLER,
    MEND_CLAIM,
    MEND_COMMITS,
    MEND_CORRELATED,
    MEND_SCORES,
)

ALL = (
    APPEND,
    READ,
    NEXT,
    LOAD,
    FIND,
    BRANCH,
    DELETE,
    ERASE,
    GET_POSITION,
    PUT_POSITION,
    PUT_SNAPSHOT,
    GET_SNAPSHOT,
    DELETE_SNAPSHOTS,
    SUBSCRIBE,
    POLL,
    SWEEP,
    LEASE,
    BEGIN,
    ACK,
    ACKS,
    ACK_APPEND,
    NACK,
    RENEW,
    RELEASE,
    LAG,
    RESET,
    RETRY,
    OPEN,
    *MENDING,
)
