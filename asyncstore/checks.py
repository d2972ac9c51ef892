"""Whether a server is fit for events: what `Store.check` and `asyncstore doctor` say.

A line is judged by a function that gets what INFO and CONFIG GET say and returns a verdict; where
it takes a question of its own, the function is a coroutine of `_Questions`. A field that the
server does not show raises `Hidden`, and all lines that miss the same command become one finding.
Nothing is written, nothing is scanned, and no root or event is part of a finding. Of a node of a
cluster some slots are looked at, taken by chance: all of them would be thousands of commands.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from asyncstore import codec, forms
from asyncstore.errors import InvalidName, StoreUnavailable, UnexpectedReply
from asyncstore.names import MAIN
from asyncstore.settings import EMBEDDED, is_throw_away
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from asyncstore.errors import AsyncStoreError
    from asyncstore.keys import Keys
    from asyncstore.nodes import Node
    from asyncstore.router import Router
    from asyncstore.settings import Settings
    from asyncstore.transport import Transport

T = TypeVar("T")

Level = Literal["good", "warning", "bad"]

OLDEST_SERVER: Final = (7, 0)
_FIRST_WITH_WAITAOF: Final = (7, 2)
_FIRST_HONEST_WAITAOF: Final = (8, 0)

_WORST_LAST: Final[tuple[Level, ...]] = ("good", "warning", "bad")
_CONFIG: Final = (
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "save",
    "maxmemory",
    "maxmemory-policy",
    "min-replicas-to-write",
)
_NO_EVICTION: Final = "noeviction"
_PINGS: Final = 20
_CLOCK_SECONDS: Final = 2.0  # two clocks that differ by more are worth a word
_LAG_SECONDS: Final = 10
_LAG_BYTES: Final = 16 * 1024 * 1024
_MEMORY_TIGHT: Final = 0.8  # of maxmemory
_MEMORY_FULL: Final = 0.95
_SLOTS: Final = 256  # of a node of a cluster
_DOMAINS: Final = 20  # of each index of domains
_ROOTS: Final = 100  # of each domain
_AGGREGATES: Final = _DOMAINS * _ROOTS
_LONG: Final = 100_000  # events or claims
_LARGE: Final = 64 * 1024 * 1024  # bytes of one key


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    `level` is "good", "warning" or "bad". `found` is what was seen, `meaning` what that means for
    events, and `remedy` the setting that mends it; it is empty when all is good.
    """

    name: str
    level: Level
    found: str
    meaning: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Whether a server is fit for events: what `Store.check` returns.

    `server` says which one it is, without a password. No finding holds event data or a root.
    """

    server: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The worst level of all findings."""
        return max((finding.level for finding in self.findings), key=_WORST_LAST.index)


@dataclass(frozen=True, slots=True)
class Said:
    """What a server says in answer to one command. `refused` is its error, if it gave one."""

    command: str
    fields: Mapping[str, str]
    refused: UnexpectedReply | None = None

    def __getitem__(self, field: str) -> str:
        if field not in self.fields:
            code = self.refused.code if self.refused is not None else "nothing"
            raise Hidden(self.command, code)
        return self.fields[field]

    def number(self, field: str) -> int:
        """Return the field as a whole number."""
        text = self[field]
        if not re.fullmatch(r"-?\d+", text):
            raise Hidden(self.command, "no number")
        return int(text)


class Hidden(Exception):
    """The server does not show what a line needs."""

    def __init__(self, command: str, code: str) -> None:
        super().__init__(command, code)
        self.source = command, code


async def ask_info(transport: Transport) -> Said:
    """Return what INFO says."""
    return await _said(transport, forms.fields_of, forms.is_text, "INFO")


async def ask_cluster(transport: Transport) -> tuple[Said, Said]:
    """Return what CLUSTER INFO says, and CLUSTER NODES in its only field, `nodes`."""
    return await asyncio.gather(
        _said(transport, forms.fields_of, forms.is_text, "CLUSTER", "INFO"),
        _said(transport, _parse_nodes, forms.is_text, "CLUSTER", "NODES"),
    )


async def ask_config(transport: Transport, *names: str) -> Said:
    """Return what CONFIG GET says of these settings."""
    return await _said(transport, _parse_config, forms.is_settings, "CONFIG", "GET", *names)


def keeps_nothing(info: Said, config: Said) -> bool:
    """Whether a restart is known to lose every event: there is no AOF, and no RDB save point."""
    return info.fields.get("aof_enabled") == "0" and config.fields.get("save") == ""


def is_too_old(info: Said) -> bool:
    """Whether the server lacks what the scripts need."""
    return _version(info.fields.get("redis_version", "0")) < OLDEST_SERVER


async def check(router: Router, keys: Keys, settings: Settings) -> Report:
    """Look at everything that decides whether one server keeps events, and what it takes."""
    (node,) = router.nodes()
    lines = Lines()
    info = await look_at(node, router, keys, settings, lines)
    name = _server_name(info) if "redis_version" in info.fields else "a server"
    return Report(f"{name} at {settings.where()}", tuple(lines.all()))


async def look_at(node: Node, router: Router, keys: Keys, settings: Settings, lines: Lines) -> Said:
    """Look at one server and put the lines about it; return what its INFO says."""
    transport = node.transport
    info, config = await asyncio.gather(ask_info(transport), ask_config(transport, *_CONFIG))
    seen = _Seen(info, config, settings)
    for name, judge in _JUDGES.items():
        lines.add(name, judge, seen)
    await _Questions(node, router, keys).put(lines)
    return info


async def judge_layout(router: Router, keys: Keys) -> Verdict:
    """Judge the layout that the store is marked with."""
    wanted = codec.layout(by_slot=keys.by_slot)
    found: bytes | None = await router.read(forms.is_text_or_nil, "GET", keys.layout())
    if found is None:
        return Verdict("good", "none yet", "the store is empty")
    if found == wanted:
        return Verdict("good", wanted.decode(), "it is the one that this version knows")
    why = f"this version of asyncstore knows {wanted.decode()}: `open` refuses it"
    shown = found.decode(errors="replace")[:20]
    return Verdict("bad", shown, why, "use a version of asyncstore that knows it")


def unreachable(settings: Settings, error: AsyncStoreError) -> Report:
    """Return what there is to say of a server that does not answer, or not as it should."""
    return Report(settings.where(), (trouble(str(error), "nothing can be stored or read"),))


def trouble(found: str, meaning: str) -> Finding:
    """Return what there is to say of a server that does not answer, and what that means."""
    remedy = "start the server or mend its trouble; or mend the url"
    return Finding("connection", "bad", found, meaning, remedy)


# What a line is made of


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a line says."""

    level: Level
    found: str
    meaning: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the lines are judged by."""

    info: Said
    config: Said
    settings: Settings

    @property
    def has_aof(self) -> bool:
        if "aof_enabled" in self.info.fields:
            return self.info["aof_enabled"] == "1"
        return self.config["appendonly"] == "yes"


class Lines:
    """Findings in their order; those that the server hides become one for each command."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []
        self._hidden: dict[tuple[str, str], list[str]] = {}

    def add(self, name: str, judge: Callable[[T], Verdict | None], seen: T) -> None:
        """Put what a judge says, if it has something to say."""
        try:
            verdict = judge(seen)
        except Hidden as hidden:
            self._hidden.setdefault(hidden.source, []).append(name)
        else:
            self._add(name, verdict)

    async def add_answer(self, name: str, answer: Awaitable[Verdict]) -> None:
        """Put what the answer to a question is."""
        try:
            self._add(name, await answer)
        except UnexpectedReply as error:
            self._hidden.setdefault((error.command, error.code), []).append(name)

    def add_trouble(self, found: str, names: Sequence[str]) -> None:
        """Put that the server did not answer, and which lines are missing for it."""
        self._findings.append(trouble(found, f"not judged: {', '.join(names)}"))

    def _add(self, name: str, verdict: Verdict | None) -> None:
        if verdict is not None:
            words = verdict.found, verdict.meaning, verdict.remedy
            self._findings.append(Finding(name, verdict.level, *words))

    def all(self) -> list[Finding]:
        """Return all findings."""
        hidden = [_hidden(*source, names) for source, names in self._hidden.items()]
        return [*self._findings, *hidden]


_GRANTS: Final = {
    "CONFIG": "config|get",
    "MEMORY": "memory|usage",
    "CLUSTER": "cluster|info +cluster|nodes",
}


def _hidden(command: str, code: str, names: list[str]) -> Finding:
    unjudged = f"not judged: {', '.join(names)}"
    if code == "WRONGTYPE":
        remedy = "find out what else writes keys with this key_prefix, and give one of them another"
        return Finding(f"{command} of a key", "bad", "a key of another kind", unjudged, remedy)
    grant = _GRANTS.get(command, command.lower())
    return Finding(
        command, "warning", f"hidden ({code})", unjudged, f"ACL SETUSER <this user> +{grant}"
    )


# Lines that INFO and CONFIG GET decide


def _server(seen: _Seen) -> Verdict:
    name = _server_name(seen.info)
    if is_too_old(seen.info):
        why = "it lacks what the scripts need: `open` refuses it"
        return Verdict("bad", name, why, "upgrade to Redis 7.0 or newer, or to Valkey")
    return Verdict("good", name, "it has what the scripts need")


def _role(seen: _Seen) -> Verdict:
    if seen.info["role"] == "master":
        return Verdict("good", "primary", "it takes appends")
    link = seen.info.fields.get("master_link_status", "unknown")
    found = f"replica; the link to its primary is {link}"
    return Verdict("bad", found, "it takes no appends", "give the store the URL of the primary")


def _cluster(seen: _Seen) -> Verdict | None:
    if seen.info["cluster_enabled"] == "0":
        return Verdict("good", "no", "one server holds all events")
    return None  # see `cluster_checks`


def _aof(seen: _Seen) -> Verdict:
    if seen.has_aof:
        return _aof_that_is_on(seen.info)
    if is_throw_away(seen.settings):
        why = "the events go with the last user, as embedded:// says"
        return Verdict("warning", "off", why, "open embedded:///a/directory to keep them")
    if keeps_nothing(seen.info, seen.config):
        why = "nothing is kept on disk: a restart or a crash loses every event"
    else:
        why = "a restart or a crash loses every event since the last RDB save"
    return Verdict("bad", "off", why, _SWITCH_AOF_ON)


# A server that is started with an AOF for the first time does not read its RDB.
_SWITCH_AOF_ON: Final = (
    "CONFIG SET appendonly yes; when INFO says aof_rewrite_in_progress:0, CONFIG REWRITE. Not by a "
    "restart: it would begin with an empty AOF, and none of the RDB's events"
)


def _aof_that_is_on(info: Said) -> Verdict:
    rewriting = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
    if all(info.fields.get(name) != "1" for name in rewriting) or _has_waitaof(info):
        return Verdict("good", "on", "events are written to disk as they come")
    why = (
        "if the AOF was switched on just now, no event is kept before this rewrite is over, and "
        "FSYNC can't tell on a server without WAITAOF"
    )
    remedy = "wait for aof_rewrite_in_progress:0 in INFO; appendonly yes in the configuration file"
    return Verdict("warning", "on; the file is being rewritten", why, remedy)


def _has_waitaof(info: Said) -> bool:
    return _version(info["redis_version"]) >= _FIRST_WITH_WAITAOF  # every Valkey says 7.2.4


def _fsync(seen: _Seen) -> Verdict | None:
    if not seen.has_aof:
        return None
    policy = seen.config["appendfsync"]
    if policy == "always":
        return Verdict("good", policy, "an answered append survives a power cut")
    if policy == "everysec":
        why = (
            "a power cut loses about the last second, and more on a slow disk, where a server that "
            "is killed loses some, too; FSYNC can't be given"
        )
        return Verdict("warning", policy, why, "appendfsync always")
    why = "a power cut loses what the kernel has not written yet, often 30 seconds of events"
    return Verdict("bad", policy, why, "appendfsync always")


def _fsync_on_rewrite(seen: _Seen) -> Verdict | None:
    if not seen.has_aof:
        return None
    if seen.config["no-appendfsync-on-rewrite"] == "no":
        return Verdict("good", "goes on", "a rewrite of the AOF changes no guarantee")
    why = "while the AOF is rewritten or a save is made nothing is fsynced, whatever appendfsync is"
    return Verdict("bad", "stops", why, "no-appendfsync-on-rewrite no")


def _aof_writes(seen: _Seen) -> Verdict | None:
    if not seen.has_aof:
        return None
    if seen.info["aof_last_write_status"] != "ok":
        why = "the server can't write to its disk: it refuses appends"
        return Verdict("bad", "the last write failed", why, "free or mend the disk of its dir")
    if seen.info["aof_last_bgrewrite_status"] != "ok":
        why = "the AOF grows until the disk is full, and loading it takes longer"
        remedy = "free the disk or memory for it, then BGREWRITEAOF; its log says what failed"
        return Verdict("warning", "the last rewrite failed", why, remedy)
    return Verdict("good", "the last write and rewrite went well", "the AOF is complete")


def _rdb(seen: _Seen) -> Verdict | None:
    if is_throw_away(seen.settings):
        return None
    if seen.info["rdb_last_bgsave_status"] != "ok":
        why = "there is no newer save, and with save points set the server refuses appends"
        remedy = "free the disk or memory for it, then BGSAVE; its log says what failed"
        return Verdict("bad", "the last save failed", why, remedy)
    saves = seen.config["save"]
    if saves:
        last = datetime.fromtimestamp(seen.info.number("rdb_last_save_time"), UTC)
        found = f"save {saves}; last save or start {last:%Y-%m-%d %H:%M:%S} UTC"
        return Verdict("good", found, "there is a second file to restore from")
    if seen.has_aof:
        return Verdict("good", "no save points", "the AOF holds every event")
    why = "there is no file to restore from after a restart"
    return Verdict("bad", "no save points", why, "save 900 1")


def _eviction(seen: _Seen) -> Verdict:
    policy = seen.info.fields.get("maxmemory_policy") or seen.config["maxmemory-policy"]
    if policy == _NO_EVICTION:
        return Verdict("good", policy, "no event is deleted to free memory")
    why = (
        "when memory is full whole histories are deleted in silence, and their sequences are given "
        "again: `open` refuses it"
    )
    return Verdict("bad", policy, why, "maxmemory-policy noeviction")


def _memory(seen: _Seen) -> Verdict:
    used = seen.info.number("used_memory") - seen.info.number("mem_not_counted_for_evict")
    most = seen.info.number("maxmemory")
    if most == 0:
        why = (
            "when the machine's memory is used up the kernel kills the server, where a limit would "
            "refuse appends and go on answering reads"
        )
        half = _setting(seen.info.number("total_system_memory") / 2)
        remedy = f"maxmemory {half}: half of what the machine has, for saves and rewrites need more"
        return Verdict("warning", f"{_size(used)} used, no limit", why, remedy)
    found = f"{_size(used)} of {_size(most)} used"
    if most > seen.info.number("total_system_memory"):
        why = "the limit is above what the machine has: the kernel may kill the server first"
        half = _setting(seen.info.number("total_system_memory") / 2)
        return Verdict("warning", found, why, f"maxmemory {half}, or a larger machine")
    is_safe = seen.info.fields.get("maxmemory_policy", _NO_EVICTION) == _NO_EVICTION
    return _headroom(found, used, most, is_safe=is_safe)


def _headroom(found: str, used: int, most: int, *, is_safe: bool) -> Verdict:
    if used < _MEMORY_TIGHT * most:
        return Verdict("good", found, "there is room for more events")
    level: Level = "bad" if used >= _MEMORY_FULL * most else "warning"
    why = "at the limit every append is refused as StoreFull; reads go on"
    if not is_safe:
        why = "at the limit whole histories are deleted"
    remedy = f"maxmemory {_setting(2 * used)}, if the machine has that; or delete what can go"
    return Verdict(level, found, why, remedy)


def _replicas(seen: _Seen) -> Verdict:
    replicas = forms.replicas_of(seen.info.fields)
    if seen.info.number("connected_slaves") == 0:
        why = "events are on this server alone: replicas(n) can't be given"
        return Verdict("good", "none", why)
    head = seen.info.number("master_repl_offset")
    behind = max((head - replica.offset for replica in replicas if replica.is_online), default=0)
    silent = max((replica.lag for replica in replicas if replica.is_online), default=0)
    online = sum(replica.is_online for replica in replicas)
    found = f"{online} of {len(replicas)} online, {_size(behind)} and {silent} s behind at most"
    if online == len(replicas) and behind < _LAG_BYTES and silent <= _LAG_SECONDS:
        why = "a failover loses little; what was appended with replicas(n) is on n of them"
        return Verdict("good", found, why)
    why = "a failover loses what a replica does not have; replicas(n) waits for it, or fails"
    return Verdict("warning", found, why, "look after the replica, its link and its log")


def _least_replicas(seen: _Seen) -> Verdict:
    least = seen.config.number("min-replicas-to-write")
    if least == 0:
        return Verdict("good", "0", "appends need no replica, but those that ask for replicas(n)")
    if "min_slaves_good_slaves" not in seen.info.fields:
        return Verdict("good", f"{least}; not in force", "min-replicas-max-lag is 0")
    there = seen.info.number("min_slaves_good_slaves")
    found = f"{least}; {there} in step"
    if there < least:
        remedy = "min-replicas-to-write 0, or bring up replicas"
        return Verdict("bad", found, "the server refuses every append (NOREPLICAS)", remedy)
    return Verdict("good", found, "a primary that is cut off from its replicas takes no appends")


def _waitaof(seen: _Seen) -> Verdict | None:
    if not seen.has_aof:
        return None
    is_always = seen.config["appendfsync"] == "always"
    if not _has_waitaof(seen.info):
        why = "fsync_and_replicas(n) can't be given: that takes Redis 7.2 or newer, or Valkey"
        if is_always:
            return Verdict("good", "not there", f"{why}; FSYNC can")
        return Verdict("warning", "not there", f"{why}; nor can FSYNC", "appendfsync always")
    if is_always or _version(seen.info["redis_version"]) >= _FIRST_HONEST_WAITAOF:
        return Verdict("good", "truthful", "it answers after the fsync")
    why = "it says that events are fsynced before they are"
    return Verdict("warning", "answers too early", why, "appendfsync always")


def _restart(seen: _Seen) -> Verdict | None:
    if is_throw_away(seen.settings):
        return None
    if seen.settings.backend == EMBEDDED:
        return Verdict("good", "asyncstore starts it", "it gets the same settings each time")
    if seen.info["config_file"]:
        why = "its settings are those of the file; after CONFIG SET they need CONFIG REWRITE"
        return Verdict("good", "it has a configuration file", why)
    why = (
        "what was set by CONFIG SET is lost at a restart; only the arguments of its command line "
        "come back"
    )
    remedy = "start it with a configuration file that holds its settings"
    return Verdict("warning", "it has no configuration file", why, remedy)


_JUDGES: Final[dict[str, Callable[[_Seen], Verdict | None]]] = {
    "server": _server,
    "role": _role,
    "cluster": _cluster,
    "AOF": _aof,
    "fsync": _fsync,
    "fsync while rewriting": _fsync_on_rewrite,
    "WAITAOF": _waitaof,
    "AOF writes": _aof_writes,
    "RDB": _rdb,
    "after a restart": _restart,
    "eviction": _eviction,
    "memory": _memory,
    "replicas": _replicas,
    "min-replicas-to-write": _least_replicas,
}


# Lines that take a question of their own


class _Questions:
    """What is asked of one server, about what it holds and how it answers."""

    def __init__(self, node: Node, router: Router, keys: Keys) -> None:
        self._transport = node.transport
        self._router = router
        self._keys = keys
        slots = router.servers().slots_of(node)
        looked_at = random.sample(slots, min(len(slots), _SLOTS))
        self._tags = [keys.tag_of_slot(slot) for slot in looked_at]

    async def put(self, lines: Lines) -> None:
        """Ask one after the other, as long as the server answers."""
        questions = self._all()
        names = list(questions)
        for place, (name, question) in enumerate(questions.items()):
            try:
                await lines.add_answer(name, question())
            except StoreUnavailable as error:
                # On a cluster, whoever puts the lines of all together names the node.
                found = error.why if self._keys.by_slot else str(error)
                lines.add_trouble(found, names[place:])
                return

    def _all(self) -> dict[str, Callable[[], Awaitable[Verdict]]]:
        of_all = {} if self._keys.by_slot else {"layout": self._layout}
        return {
            **of_all,
            "clock": self._clock,
            "the store's clock": self._store_clock,
            "big aggregates": self._sizes,
            "latency": self._latency,
        }

    async def _layout(self) -> Verdict:
        return await judge_layout(self._router, self._keys)

    async def _clock(self) -> Verdict:
        before = time.time()
        server = await self._time()
        after = time.time()
        # It was read in between: how far it is off is known to half a round trip.
        ahead = server - (before + after) / 2
        sure = max(0.0, abs(ahead) - (after - before) / 2)
        where = "ahead of" if ahead > 0 else "behind"
        if sure <= _CLOCK_SECONDS:
            found = f"within {abs(ahead) + 0.05:.1f} s of this machine's"
            return Verdict("good", found, "events get the server's time")
        found = f"{_duration(sure)} {where} this machine's"
        why = "events get the server's time: reading `until` a time of this machine misses some"
        return Verdict("warning", found, why, "synchronize both clocks (NTP)")

    async def _store_clock(self) -> Verdict:
        # Asked for in this order on one connection: an honest commit is older than the clock.
        texts = [self._text_or_nil(self._keys.commits(tag)) for tag in self._tags]
        commits, now = await asyncio.gather(asyncio.gather(*texts), self._time())
        ahead = max(map(_last_commit, commits), default=0.0) - now
        seen_in = f" (in {len(self._tags)} of its slots)" if self._keys.by_slot else ""
        if ahead <= _CLOCK_SECONDS:
            found = f"not ahead of the server's{seen_in}"
            return Verdict("good", found, "events get the server's time")
        why = (
            "the server's clock was ahead once, and times never run backwards: every event gets "
            "that one time until it is reached"
        )
        remedy = "wait, or set the second number of the key `commits` back while nobody appends"
        found = f"{_duration(ahead)} ahead of the server's{seen_in}"
        return Verdict("warning", found, why, remedy)

    async def _sizes(self) -> Verdict:
        aggregates = await self._last_changed()
        if not aggregates:
            return Verdict("good", "no aggregates", "none is so long that it shows")
        events = await self._longest([(a.domain, self._keys.events(a)) for a in aggregates])
        claims = await self._longest([(a.domain, self._keys.claims(a)) for a in aggregates])
        size = await self._size_of(events.key)
        found = (
            f"of the {len(aggregates):,} looked at (last changed, main), the longest has "
            f"{events.count:,} events, {_size(size)}, in {events.domain!r}"
        )
        if claims.count:
            found += (
                f"; most keys, sources and correlation ids: {claims.count:,}, in {claims.domain!r}"
            )
        if max(events.count, claims.count) < _LONG and size < _LARGE:
            return Verdict("good", found, "none is so long that it shows")
        why = "an aggregate is one key: reading all of it is slow, and it can't be spread"
        return Verdict("warning", found, why, "snapshots, and aggregates that come to an end")

    async def _last_changed(self) -> list[Aggregate]:
        """Return some of the last changed aggregates of each domain: a bounded number of them."""
        names = await asyncio.gather(
            *(self._first_of(self._keys.domains(tag), _DOMAINS) for tag in self._tags)
        )
        found = zip(self._tags, names, strict=True)
        indexes = [(name.decode(errors="replace"), tag) for tag, some in found for name in some]
        del indexes[_AGGREGATES:]
        most = max(1, min(_ROOTS, _AGGREGATES // max(1, len(indexes))))
        roots = await asyncio.gather(
            *(
                self._first_of(self._keys.roots(domain, MAIN, tag), most, "REV")
                for domain, tag in indexes
            )
        )
        pairs = zip(indexes, roots, strict=True)
        named = [_aggregate(domain, root) for (domain, _), some in pairs for root in some]
        return [aggregate for aggregate in named if aggregate is not None]

    async def _first_of(self, index: str, most: int, *order: str) -> list[bytes]:
        found: list[bytes] = await self._router.read(
            forms.is_texts, "ZRANGE", index, 0, most - 1, *order
        )
        return found

    async def _longest(self, places: Sequence[tuple[str, str]]) -> _Counted:
        counts = await asyncio.gather(
            *(self._router.read(forms.is_count, "ZCARD", key) for _, key in places)
        )
        counted = [_Counted(n, *place) for n, place in zip(counts, places, strict=True)]
        return max(counted, key=lambda one: one.count)

    async def _size_of(self, key: str) -> int:
        """Return the bytes of a key; 0 where it is on its way to another node."""
        try:
            return await self._command(forms.is_count_or_nil, "MEMORY", "USAGE", key) or 0
        except UnexpectedReply as error:
            if error.code in ("ASK", "MOVED"):
                return 0
            raise

    async def _latency(self) -> Verdict:
        taken = []
        for _ in range(_PINGS):
            started = time.perf_counter()
            await self._command(forms.is_text, "PING")
            taken.append(time.perf_counter() - started)
        found = f"{statistics.median(taken) * 1000:.2f} ms for a PING (median of {_PINGS})"
        return Verdict("good", found, "an append alone takes at least as long")

    async def _time(self) -> float:
        seconds, microseconds = await self._command(forms.is_time, "TIME")
        return float(int(seconds) + int(microseconds) / 1_000_000)

    async def _text_or_nil(self, key: str) -> bytes | None:
        found: bytes | None = await self._router.read(forms.is_text_or_nil, "GET", key)
        return found

    async def _command(self, form: forms.Form, *command: str | int) -> Any:
        return await self._transport.command(form, *command)


@dataclass(frozen=True, slots=True)
class _Counted:
    count: int
    domain: str
    key: str


def _last_commit(commits: bytes | None) -> float:
    """Return the time of the last commit, in seconds."""
    _, _, last = (commits or b"").partition(b" ")
    return int(last) / 1_000_000 if last.isdigit() else 0.0


def _aggregate(domain: str, root: bytes) -> Aggregate | None:
    try:
        return Aggregate(domain, root.decode())
    except (InvalidName, UnicodeDecodeError):
        return None  # not the store's; `asyncstore verify` looks for such


# What the server says


async def _said(
    transport: Transport,
    parse: Callable[[Any], dict[str, str]],
    form: forms.Form,
    *command: str,
) -> Said:
    try:
        return Said(command[0], parse(await transport.command(form, *command)))
    except UnexpectedReply as error:
        return Said(command[0], {}, error)


def _parse_nodes(reply: bytes) -> dict[str, str]:
    return {"nodes": reply.decode(errors="replace")}


def _parse_config(reply: dict[bytes, bytes] | list[bytes]) -> dict[str, str]:
    return {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in forms.pairs_of(reply)
    }


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _server_name(info: Said) -> str:
    if "valkey_version" in info.fields:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


# How it is shown


def _size(count: int) -> str:
    size = float(max(count, 0))
    for unit in ("B", "kB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"


def _setting(count: float) -> str:
    """Return a number of bytes as servers take it."""
    return f"{max(1, round(count / 1024**2))}mb"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"
