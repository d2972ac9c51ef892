"""The forms that replies can have. A reply of another form is not believed, whoever sent it.

What makes the forms of RESP2 and RESP3 alike, and what INFO says in its lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Form = Callable[[Any], bool]

_TEXT = {bytes}  # the types of what a list of texts holds


def is_text(reply: Any) -> bool:
    """A bulk string."""
    return type(reply) is bytes


def is_text_or_nil(reply: Any) -> bool:
    """A bulk string, or nothing."""
    return reply is None or type(reply) is bytes


def is_count(reply: Any) -> bool:
    """A whole number that is not negative."""
    return type(reply) is int and reply >= 0


def is_count_or_nil(reply: Any) -> bool:
    """A whole number that is not negative, or nothing."""
    return reply is None or is_count(reply)


def is_score(reply: Any) -> bool:
    """A double, which is text in RESP2, or nothing."""
    return is_text_or_nil(reply) or type(reply) is float


def is_texts(reply: Any) -> bool:
    """A list of bulk strings; it may be empty."""
    return type(reply) is list and set(map(type, reply)) <= _TEXT


def is_appended(reply: Any) -> bool:
    """What append.lua answers for one aggregate: a tag, and what belongs to it."""
    if type(reply) is not list or len(reply) < 2:
        return False
    tag, value, *rest = reply
    if tag in (b"ok", b"regressed", b"erased"):
        return is_count(value) and not rest
    if tag == b"conflict":
        return is_count(value) and (not rest or is_page(rest))
    if tag == b"duplicate":
        return is_count(value) and len(rest) == 1 and is_count(rest[0]) and rest[0] > 0
    return bool(tag == b"error" and is_text(value) and not rest)


def is_acked(reply: Any) -> bool:
    """What ack_append.lua answers: a tag, and what became of the append if something did."""
    if type(reply) is not list or not reply or not is_text(reply[0]):
        return False
    tag, *rest = reply
    if tag == b"lost":
        return not rest
    return len(rest) == 1 and is_appended(rest[0])


def is_page(reply: Any) -> bool:
    """A list of bulk strings: where to go on, where the timeline has diverged, members."""
    return is_texts(reply) and len(reply) > 1 and all(map(_is_place, reply[:2]))


def is_found(reply: Any) -> bool:
    """A list of bulk strings: where to go on, members."""
    return is_texts(reply) and bool(reply) and _is_place(reply[0])


def is_place_or_nil(reply: Any) -> bool:
    """A sequence as text, or nothing."""
    return reply is None or (is_text(reply) and reply.isdigit())


def _is_place(text: bytes) -> bool:
    return not text or text.isdigit()


def is_one_text(reply: Any) -> bool:
    """A list of one bulk string."""
    return is_texts(reply) and len(reply) == 1


def is_scored(reply: Any) -> bool:
    """Members and scores: in pairs in RESP3, in a flat list in RESP2."""
    if is_texts(reply):
        return len(reply) % 2 == 0
    return type(reply) is list and all(
        type(pair) is list and len(pair) == 2 and is_text(pair[0]) and type(pair[1]) is float
        for pair in reply
    )


def is_scan(reply: Any) -> bool:
    """What SCAN and its kin answer: where to go on, and what was found."""
    return type(reply) is list and len(reply) == 2 and is_text(reply[0]) and is_texts(reply[1])


def is_snapshot(reply: Any) -> bool:
    """Nothing, one member, or the fields and values of a hash."""
    return is_texts(reply) and (len(reply) == 1 or len(reply) % 2 == 0)


def is_loaded(reply: Any) -> bool:
    """What load.lua answers: next sequence, snapshot, start of the page, page of events."""
    if type(reply) is not list or len(reply) != 4:
        return False
    next_sequence, snapshot, start, page = reply
    return is_count(next_sequence) and is_snapshot(snapshot) and is_count(start) and is_page(page)


def is_subscribed(reply: Any) -> bool:
    """What subscribe.lua answers: a state, and while it marks beginning and names."""
    if not is_texts(reply) or not reply:
        return False
    return reply in ([b"live"], [b"new"]) or (reply[0] == b"marking" and len(reply) == 3)


def is_polled(reply: Any) -> bool:
    """What poll.lua answers: number of a commit, changed roots, those that are due, a wait."""
    if type(reply) is not list or len(reply) != 4:
        return False
    swept, changed, ready, wait = reply
    return (
        is_text(swept)
        and swept.isdigit()
        and is_scored(changed)
        and is_texts(ready)
        and is_text(wait)
        and _is_place(wait)
    )


def is_swept(reply: Any) -> bool:
    """What sweep.lua answers: a tag, and whether it is behind somewhere."""
    return reply in ([b"moved"], [b"marked"], [b"swept", b""], [b"swept", b"behind"])


def is_leased(reply: Any) -> bool:
    """What lease.lua answers for one aggregate: a tag, and what belongs to it."""
    if type(reply) is not list or not reply:
        return False
    tag, *rest = reply
    if tag in (b"leased", b"again"):
        return (
            len(rest) == 7
            and all(map(is_count, rest[:4]))
            and is_texts(rest[4:6])
            and is_texts(rest[6])
        )
    counts = {b"taken": 1, b"regressed": 2, b"idle": 0, b"more": 0, b"unreadable": 0}
    return len(rest) == counts.get(tag, -1) and all(map(is_count, rest))


def is_failure(reply: Any) -> bool:
    """What is answered for one of many when the server has refused something in it."""
    return is_texts(reply) and len(reply) == 2 and reply[0] == b"error"


def are_leased(reply: Any) -> bool:
    """What lease.lua answers: a reply for each aggregate."""
    return type(reply) is list and all(is_leased(one) or is_failure(one) for one in reply)


def is_branched(reply: Any) -> bool:
    """What branch.lua answers: a tag and a sequence."""
    if type(reply) is not list or len(reply) != 2:
        return False
    return reply[0] in (b"ok", b"exists", b"conflict") and is_count(reply[1])


def is_deleted(reply: Any) -> bool:
    """What delete.lua answers: 'ok', a number, names and a number, or 'more' and names."""
    if type(reply) is not list or len(reply) < 2:
        return False
    if reply[0] == b"ok" and len(reply) == 4:
        _, count, ids, erasures = reply
        return is_count(count) and is_texts(ids) and is_count(erasures)
    return reply[0] == b"more" and len(reply) == 2 and is_texts(reply[1])


def is_left(reply: Any) -> bool:
    """What erase.lua answers: a count as text, names."""
    return is_texts(reply) and bool(reply) and reply[0].isdigit()


def pairs_of(reply: Any) -> list[tuple[Any, Any]]:
    """Return members and scores, or names and values: RESP2 has them in a flat list."""
    if type(reply) is dict:
        return list(reply.items())
    if reply and type(reply[0]) is list:
        return [(one, other) for one, other in reply]
    return list(zip(reply[::2], reply[1::2], strict=True))


def is_settings(reply: Any) -> bool:
    """Names and values: a map in RESP3, a flat list in RESP2."""
    if type(reply) is dict:
        return is_texts([*reply, *reply.values()])
    return is_texts(reply) and len(reply) % 2 == 0


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica, as its primary sees it. `lag` are the seconds since it was last heard."""

    is_online: bool
    offset: int
    lag: int


def fields_of(info: bytes) -> dict[str, str]:
    """Return the fields of INFO's answer."""
    pairs = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


def replicas_of(fields: Mapping[str, str]) -> list[Replica]:
    """Return the replicas in the fields of INFO.

    Such as `slave0`, which is `ip=…,port=…,state=online,offset=42,lag=1`.
    """
    return [_replica(text) for name, text in fields.items() if re.fullmatch(r"slave\d+", name)]


def _replica(text: str) -> Replica:
    said = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    return Replica(said.get("state") == "online", _number(said, "offset"), _number(said, "lag"))


def _number(said: Mapping[str, str], name: str) -> int:
    """Return a number; 0 where there is none, as of a replica that was not heard of yet."""
    return int(said[name]) if said.get(name, "").isdigit() else 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A node of a cluster as one of them sees it: a line of CLUSTER NODES.

    `address` is its host and port, `primary` the id of a replica's, or "-". `epoch` grows when it
    takes over slots. `moving` are slots on their way to or from other nodes, of which only the node
    itself speaks.
    """

    id: str
    address: str
    flags: frozenset[str]
    primary: str
    epoch: str
    link: str
    slots: tuple[str, ...]
    moving: tuple[str, ...]

    @staticmethod
    def parse(line: str) -> Peer:
        """Read a line."""
        node, address, flags, primary, _, _, epoch, link, *slots = line.split()
        settled = tuple(part for part in slots if not part.startswith("["))
        moving = tuple(part for part in slots if part.startswith("["))
        where = address.partition("@")[0]
        return Peer(node, where, frozenset(flags.split(",")), primary, epoch, link, settled, moving)

    @property
    def is_primary(self) -> bool:
        """Whether it takes changes, if it has slots."""
        return "master" in self.flags

    @property
    def is_asked(self) -> bool:
        """Whether it is the one that says all this."""
        return "myself" in self.flags

    @property
    def trouble(self) -> str:
        """What is not well with it, or nothing."""
        bad = self.flags & {"fail", "fail?", "handshake", "noaddr"}
        return ", ".join(sorted(bad)) or ("" if self.link == "connected" else self.link)


def peers_of(text: str) -> list[Peer]:
    """Return the nodes in the answer of CLUSTER NODES."""
    return [Peer.parse(line) for line in text.splitlines()]


def is_time(reply: Any) -> bool:
    """Seconds since 1970 and microseconds, as text."""
    return is_texts(reply) and len(reply) == 2 and all(map(bytes.isdigit, reply))


def is_slots(reply: Any) -> bool:
    """What CLUSTER SLOTS answers: for each range its ends, and the primary and its replicas."""
    return type(reply) is list and all(type(entry) is list and _is_span(entry) for entry in reply)


def _is_span(entry: list[Any]) -> bool:
    if len(entry) < 3 or not all(map(is_count, entry[:2])):
        return False
    return all(
        type(node) is list and len(node) >= 2 and is_text_or_nil(node[0]) and is_count(node[1])
        for node in entry[2:]
    )


def is_anything(_: Any) -> bool:
    """Whatever it is: it is looked at elsewhere."""
    return True
