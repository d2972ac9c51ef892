"""Whether what the store has of one aggregate is sound; `verify` asks it of all of them."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from asyncstore import codec, keys, scripts
from asyncstore.names import MAIN, MAX_SEQUENCE
from asyncstore.sharing import all_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncstore.codec import Extras
    from asyncstore.keys import Keys
    from asyncstore.looking import Looker
    from asyncstore.router import Router
    from asyncstore.scripts import Script
    from asyncstore.values import Aggregate
    from asyncstore.wire import Argument

MOST_OF_ONE: Final = 1000
"""How many problems of one aggregate are told; its reading ends there."""

_CLAIM: Final = re.compile(r"((?:key|source|correlation):[^\n]+)\n(\d{16}) ([1-9]\d{0,15})")
_EMPTY_CLAIM: Final = re.compile(r"correlation:[^\n]+\n0{16} 0")
_CLAIMED: Final = {"key": "idempotency key", "source": "source", "correlation": "correlation id"}
_CLAIMS_A_PAGE: Final = 1000
_CORRELATION: Final = "correlation:"
_BEHIND: Final = "~"  # comes after all that follows the sequence in a claim
_POSITION: Final = re.compile(r"([0-9]{1,16})(\*?)")  # see positions.lua for the mark


@dataclass(frozen=True, slots=True)
class Call:
    """A script that mends an index. It looks again what is there, and does only what is right."""

    script: Script
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a store that is not as it should be.

    `kind` names it in a word or two. `key` is the key on the server, `sequence` the place in the
    history that it is about, if it is about one, and `text` says what is wrong; it shows neither
    event data nor idempotency keys. `is_note` is True for what does no harm. `mending` is what
    `repair` would run: nothing where the events themselves are concerned.
    """

    kind: str
    key: str
    sequence: int | None
    text: str
    is_note: bool = False
    mending: tuple[Call, ...] = field(default=(), repr=False)
    about: str = field(default="", repr=False)

    @property
    def identity(self) -> tuple[str, str, str]:
        """What tells it from others, also when it is met a second time."""
        return self.kind, self.key, self.about


class Findings(dict[tuple[str, str, str], Problem]):
    """The problems that were found, each once."""

    def add(self, problem: Problem) -> None:
        """Note a problem."""
        self.setdefault(problem.identity, problem)

    def is_full(self) -> bool:
        """Whether there are so many that looking for more is of no use."""
        return len(self) >= MOST_OF_ONE


@dataclass(frozen=True, slots=True)
class _Entry:
    """An event as far as it is needed here: what it should be claimed for."""

    sequence: int
    id: str
    claims: tuple[str, ...]


@dataclass(slots=True)
class _Run:
    """Events next to each other that all carry the same key, source or correlation id."""

    what: str
    entries: list[_Entry]

    @property
    def first(self) -> int:
        """The sequence of the first."""
        return self.entries[0].sequence

    @property
    def last(self) -> int:
        """The sequence of the last."""
        return self.entries[-1].sequence

    def parts_outside(self, ranges: list[tuple[int, int]]) -> list[_Run]:
        """Return the parts of it that are in none of the ranges (first, after the last)."""
        rest = [
            entry
            for entry in self.entries
            if not any(start <= entry.sequence < end for start, end in ranges)
        ]
        return _runs_of(self.what, rest)


@dataclass(slots=True)
class Timeline:
    """How far the history of an aggregate goes, as a position or a snapshot sees it."""

    look: Looker
    keys: Keys
    aggregate: Aggregate
    diverges_at: int | None = None  # None: it reads as main, or is main

    async def find_divergence(self) -> str | None:
        """Learn where an edition has left main; return the text that should say so, if it is bad.

        Nothing is learned from a text that is no sequence.
        """
        if self.aggregate.edition == MAIN:
            return None
        key = self.keys.divergence(self.aggregate)
        text = await self.look.text(key) if await self.look.kind(key) == "string" else None
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,16}", text) or int(text) > MAX_SEQUENCE:
            return text
        self.diverges_at = int(text)
        return None

    async def reaches(self, sequence: int) -> bool:
        """Whether there is an event at that sequence or after it."""
        place = self.aggregate
        if place.edition != MAIN:
            if self.diverges_at is None:
                place = place.on(MAIN)
            elif sequence < self.diverges_at:
                return True  # an event of main's that is missing is told by itself
        key = self.keys.events(place)
        if await self.look.kind(key) not in ("zset", "none"):
            return True  # that is told by itself, too
        return await self.look.count(key, sequence, "+inf") > 0


class Check:
    """One look at all that the store has of an aggregate on one edition."""

    def __init__(
        self,
        look: Looker,
        router: Router,
        keys: Keys,
        aggregate: Aggregate,
        on_events: Callable[[int], None],
    ) -> None:
        self.found = Findings()
        self._look = look
        self._router = router
        self._keys = keys
        self._aggregate = aggregate
        self._on_events = on_events
        self._timeline = Timeline(look, keys, aggregate)
        self._events = keys.events(aggregate)
        self._claims = keys.claims(aggregate)
        self._divergence = keys.divergence(aggregate)
        self._handlers = keys.handlers(aggregate)
        self._snapshots = keys.snapshots(aggregate)
        self._kinds: dict[str, str] = {}
        self._due: int | None = 0  # the sequence of the next event; None: that of any
        self._good_claims = 0
        self._overlapping: set[str] = set()  # what has claims that are not apart
        self._unclaimed: dict[str, _Run] = {}  # events without a claim at the end of a page

    async def run(self) -> Findings:
        """Look, and return what is wrong.

        What depends on events is read before them or after them in such an order that a store
        which others write to looks sound as a rule; `verify` looks twice to be sure.
        """
        await self._check_types()
        await self._check_divergence()
        await self._check_order_of_claims()
        if self._has(self._events):
            await self._check_events()
        can_look_up = self._kinds[self._events] in ("zset", "none")
        if self._has(self._claims) and can_look_up and not self.found.is_full():
            await self._check_claims()
        await self._check_snapshots()
        await self._check_handlers()
        await self._check_indexes()
        return self.found

    def _tell(
        self,
        kind: str,
        key: str,
        sequence: int | None,
        text: str,
        *mending: Call,
        about: str | None = None,
    ) -> None:
        if about is None:
            about = "" if sequence is None else f"{sequence}"
        self.found.add(Problem(kind, key, sequence, text, mending=mending, about=about))

    def _has(self, key: str) -> bool:
        """Whether the key is there, and holds what it should."""
        return self._kinds[key] == _type_of(self._keys, key)

    async def _check_types(self) -> None:
        own = (self._events, self._claims, self._divergence, self._handlers, *self._snapshots)
        for key in own:
            self._kinds[key] = kind = await self._look.kind(key)
            problem = wrong_type(self._keys, key, kind)
            if problem is not None:
                self.found.add(problem)

    # Where it has left main

    async def _check_divergence(self) -> None:
        key = self._divergence
        if self._aggregate.edition == MAIN:
            if self._kinds[key] != "none":
                self._tell("divergence", key, None, "main diverges from nothing")
            return
        bad = await self._timeline.find_divergence()
        self._due = at = self._timeline.diverges_at
        if bad is not None:
            self._tell("divergence", key, None, "it is not a sequence")
        elif at is None and self._has(self._events):
            self._tell("divergence", key, None, "it is missing, and the edition has events")
        elif at:
            await self._check_main_before(at)

    async def _check_main_before(self, at: int) -> None:
        main = self._keys.events(self._aggregate.on(MAIN))
        if await self._look.kind(main) not in ("zset", "none"):
            return
        there = await self._look.count(main, 0, f"({at}")
        if there >= at:
            return
        text = f"the edition has left main at {at}, and {at - there} of main's events before are"
        if await self._look.count(main, at - 1, "+inf"):
            self._tell("main-missing", main, None, f"{text} missing", about=self._divergence)
        else:
            text = f"it is beyond the end of main: {at - there} of its events before are missing"
            self._tell("divergence", self._divergence, at, text)

    # Events

    async def _check_events(self) -> None:
        async for page in self._look.pages(self._events):
            entries = [entry for scored in page if (entry := self._look_at(*scored))]
            if self._kinds[self._claims] in ("zset", "none"):
                parts = await all_of(self._check_run(run) for run in _runs(entries))
                await self._join_unclaimed([run for runs in parts for run in runs])
            self._on_events(len(page))
            if self.found.is_full():
                text = f"{MOST_OF_ONE} problems were found: the rest of it was not read"
                self._tell("more", self._events, None, text)
                return
        await self._join_unclaimed([])

    def _look_at(self, member: bytes, score: float) -> _Entry | None:
        """Check one event; return what it should be claimed for, if it can be decoded."""
        key = self._events
        if not (score.is_integer() and 0 <= score <= MAX_SEQUENCE):
            text = f"a member has the score {score:.17g}, which is no sequence"
            self._tell("score", key, None, text, about=f"{score:.17g}")
            return None
        place = int(score)
        self._check_place(place)
        try:
            sequence, _, number, _, extras, body = codec.decode_member(member)
            codec.decode_body(body, extras.encoding)
        except codec.Undecodable as error:
            self._tell("undecodable", key, place, str(error))
            return None
        if sequence != place:
            self._tell("header", key, place, f"its header names another sequence, {sequence}")
        return _Entry(place, number.hex(), _claims_of(extras))

    def _check_place(self, place: int) -> None:
        at = self._timeline.diverges_at
        if at is not None and place < at:
            text = f"the edition has left main at {at}, and has an event of its own before"
            self._tell("before-divergence", self._events, place, text)
            return
        due = place if self._due is None else self._due
        if place < due:
            self._tell("doubled", self._events, place, "two members stand there")
        elif place > due:
            one = place == due + 1
            text = "the event is missing" if one else f"events {due} to {place - 1} are missing"
            self._tell("hole", self._events, due, text)
        self._due = max(due, place + 1)

    # Claims

    async def _check_order_of_claims(self) -> None:
        if self._has(self._claims) and not await self._look.is_in_order(self._claims):
            self.found.add(out_of_order(self._claims))
            self._kinds[self._claims] = "out of order"  # none of them could be found

    async def _check_run(self, run: _Run) -> list[_Run]:
        """Return the parts of a run that are not claimed for what they carry."""
        ranges: list[tuple[int, int]] = []
        for claim in await self._claims_on(run.what, run.first, run.last):
            parts = _CLAIM.fullmatch(claim)
            if parts is None:
                continue  # told when all claims are looked at
            start, count = int(parts[2]), int(parts[3])
            if ranges and start < ranges[-1][1]:
                self._tell_overlapping(run.what, start)
            ranges.append((start, start + count))
            if run.first <= start <= run.last:
                self._good_claims += 1
                if start + count > run.last + 1:
                    await self._check_claim(claim)
        if run.what.startswith(_CORRELATION):
            await self._check_correlated(run)
        return run.parts_outside(ranges)

    async def _claims_on(self, what: str, first: int, last: int) -> list[str]:
        """Return the claims of `what` that may name one of these events."""
        lowest, at = f"[{what}\n", f"[{what}\n{first:016}{_BEHIND}"
        before = await self._look.last_texts(self._claims, lowest, at, 2)
        if first == last:
            return before
        start = f"({before[-1]}" if before else lowest
        stop = f"[{what}\n{last:016}{_BEHIND}"
        return before + await self._look.texts(self._claims, start, stop, _CLAIMS_A_PAGE)

    def _tell_overlapping(self, what: str, start: int) -> None:
        self._overlapping.add(what)
        text = f"two claims of the same {_claimed(what)} name the event: one of them is wrong"
        self._tell("claim-twice", self._claims, start, text, about=f"{start} {what}")

    async def _join_unclaimed(self, runs: list[_Run]) -> None:
        """Tell of events without a claim once it is known how far they go: one claim is missing.

        `runs` are those of the next page; a run may go on from page to page.
        """
        open_runs, self._unclaimed = self._unclaimed, {}
        for run in runs:
            before = open_runs.get(run.what)
            if before is not None and before.last + 1 == run.first:
                del open_runs[run.what]
                run = _Run(run.what, [before.entries[0], *run.entries[-1:]])
            if run.what in self._unclaimed:
                await self._tell_unclaimed(self._unclaimed[run.what])
            self._unclaimed[run.what] = run
        for run in open_runs.values():
            await self._tell_unclaimed(run)

    async def _tell_unclaimed(self, run: _Run) -> None:
        if run.what in self._overlapping:
            return  # the wrong one hides what is claimed
        ids = (run.entries[0].id, run.entries[-1].id)
        mending: list[Call] = []
        if run.what.startswith(_CORRELATION):  # the index first: it may name too much
            index = self._keys.correlated(run.what.removeprefix(_CORRELATION))
            mending.append(Call(scripts.MEND_CORRELATED, (index,), (await self._place(),)))
        arguments = (run.what, run.first, run.last, *ids)
        mending.append(Call(scripts.MEND_CLAIM, (self._events, self._claims), arguments))
        text = f"there is no claim of the {_claimed(run.what)} that the event carries"
        about = f"{run.first} {run.what}"
        self._tell("claim-missing", self._claims, run.first, text, *mending, about=about)

    async def _check_correlated(self, run: _Run) -> None:
        index = self._keys.correlated(run.what.removeprefix(_CORRELATION))
        if await self._look.kind(index) not in ("zset", "none"):
            return
        if not await self._is_named_in(index):
            text = f"it does not name {self._aggregate}, which has events of the correlation id"
            mend = Call(scripts.MEND_CORRELATED, (index,), (await self._place(),))
            about = keys.place_in_index(self._aggregate)
            self._tell("correlated-missing", index, run.first, text, mend, about=about)

    async def _is_named_in(self, index: str) -> bool:
        if await self._look.is_scored(index, keys.place_in_index(self._aggregate)):
            return True
        return bool(await self._look.texts(index, *keys.places_in_index(self._aggregate), 1))

    async def _place(self) -> str:
        """Return what an index of a correlation id is to name the aggregate by now."""
        if not self._keys.by_slot:
            return keys.place_in_index(self._aggregate)
        erasures = self._keys.erasures(self._keys.tag_of(self._aggregate.root))
        count = await self._look.text(erasures) or "0"
        return keys.place_in_index(self._aggregate, int(count))

    async def _check_claims(self) -> None:
        """Check that all claims name events; most of them have been met with their events."""
        if await self._look.size(self._claims) == self._good_claims:
            return
        start = "-"
        while page := await self._look.texts(self._claims, start, "+", _CLAIMS_A_PAGE):
            for claim in page:
                await self._check_claim(claim)
                if self.found.is_full():
                    return
            start = f"({page[-1]}"

    async def _check_claim(self, claim: str) -> None:
        parts = _CLAIM.fullmatch(claim)
        if parts is None and self._keys.by_slot and _EMPTY_CLAIM.fullmatch(claim):
            return  # of an append that was refused: see append.lua
        if parts is None:
            self._tell("claim", self._claims, None, "a member is not a claim", about=claim)
            return
        what, first, count = parts[1], int(parts[2]), int(parts[3])
        due = first
        async for member, score in self._look.between(self._events, first, first + count - 1):
            if score != due or not _may_carry(member, what):
                break
            due += 1
        if due < first + count:
            text = f"a claim ({_claimed(what)}) names the event, which does not carry it"
            if not await self._look.count(self._events, due, f"{due}"):
                text = f"a claim ({_claimed(what)}) names the event, which is not there"
            self._tell("claim", self._claims, due, text, about=claim)

    # Snapshots, positions, indexes

    async def _check_snapshots(self) -> None:
        newest, *older = self._snapshots
        if self._has(newest):
            reply = await self._router.run(scripts.GET_SNAPSHOT, self._snapshots, [""])
            await self._check_snapshot(newest, None, reply)
        for key in older:
            if self._has(key):
                async for page in self._look.pages(key):
                    for member, score in page:
                        await self._check_snapshot(key, score, [member])

    async def _check_snapshot(self, key: str, score: float | None, reply: list[bytes]) -> None:
        place = int(score) if score is not None and score.is_integer() else None
        about = "" if score is None else f"{score:.17g}"
        try:
            snapshot = codec.decode_snapshot(reply)
        except codec.Undecodable as error:
            self._tell("snapshot", key, place, str(error), about=about)
            return
        if snapshot is None:
            return
        if score is not None and score != snapshot.sequence:
            text = f"it is of sequence {snapshot.sequence}"
            self._tell("snapshot", key, place, text, about=about)
        if not await self._timeline.reaches(snapshot.sequence):
            text = "the snapshot is ahead of the history"
            self._tell("snapshot-ahead", key, snapshot.sequence, text, about=about)

    async def _check_handlers(self) -> None:
        if not self._has(self._handlers):
            return
        async for names in self._look.members(self._handlers):
            for name in names:
                position = self._keys.position(name, self._aggregate)
                lease = self._keys.lease(name, self._aggregate)
                if not await self._look.exists(position, lease):
                    text = f"handler {name!r} is listed, and has no position"
                    mend = Call(scripts.MEND_HANDLER, (self._handlers, position, lease), (name,))
                    self._tell("handler-too-much", self._handlers, None, text, mend, about=name)

    async def _check_indexes(self) -> None:
        place = self._aggregate
        roots, _, _ = self._keys.indexes_of(place)
        if await self._look.kind(roots) in ("zset", "none"):
            is_there = await self._look.exists(self._events, self._divergence)
            number = await self._look.score(roots, place.root)
            if is_there and number is None:
                text = f"it does not name {place}, which is there"
                self._tell("root-missing", roots, None, text, *self._list_root(), about=place.root)
            elif number is not None and not is_there:
                text = f"it names {place}, which has no events"
                self._tell("root-too-much", roots, None, text, *self._list_root(), about=place.root)
            elif number is not None and not await self._is_number_of_one(roots, number):
                text = f"it gives {place} the number {number:.17g}, which is not that of its commit"
                self._tell("root-number", roots, None, text, *self._list_root(), about=place.root)
        attached = self._keys.attached_of(place)
        if place.edition != MAIN and await self._look.kind(attached) in ("zset", "none"):
            belongings = (self._handlers, *self._snapshots)
            if await self._look.exists(*belongings) and not await self._look.is_scored(
                attached, place.root
            ):
                text = f"it does not name {place}, which has positions or snapshots"
                mend = Call(scripts.MEND_NAME, (attached, *belongings), (place.root,))
                self._tell("attached-missing", attached, None, text, mend, about=place.root)

    async def _is_number_of_one(self, roots: str, number: float) -> bool:
        """Whether it can be the number of a commit, and no other root has it."""
        is_one = number.is_integer() and 0 < number <= MAX_SEQUENCE
        # None has it where somebody has appended meanwhile.
        return is_one and await self._look.count(roots, int(number), f"{int(number)}") <= 1

    def _list_root(self) -> tuple[Call, ...]:
        place = self._aggregate
        roots, _, _ = self._keys.indexes_of(place)
        tag = self._keys.tag_of(place.root)
        where = (self._keys.commits(tag), roots, self._events, self._divergence)
        root = Call(scripts.MEND_ROOT, where, (place.root,))
        return root, *list_edition(self._keys, place.domain, place.edition, tag)


async def check_position(look: Looker, keys: Keys, handler: str, aggregate: Aggregate) -> Findings:
    """Look at one position, and return what is wrong with it."""
    found = Findings()
    key, handlers = keys.position(handler, aggregate), keys.handlers(aggregate)
    kind = await look.kind(key)
    if kind != "string":
        problem = wrong_type(keys, key, kind)
        return Findings({problem.identity: problem}) if problem else found
    if await look.kind(handlers) in ("set", "none") and not await look.is_member(handlers, handler):
        text = f"it does not name {handler!r}, which has a position of {aggregate}"
        lease = keys.lease(handler, aggregate)
        mending = [Call(scripts.MEND_HANDLER, (handlers, key, lease), (handler,))]
        if aggregate.edition != MAIN:
            attached = keys.attached_of(aggregate)
            mending.append(Call(scripts.MEND_NAME, (attached, handlers, key), (aggregate.root,)))
        found.add(
            Problem("handler-missing", handlers, None, text, mending=tuple(mending), about=handler)
        )
    timeline = Timeline(look, keys, aggregate)
    parts = _POSITION.fullmatch(await look.text(key) or "")
    if parts is None or (parts[2] and aggregate.edition == MAIN):
        found.add(Problem("position", key, None, "it is not a sequence"))
        return found
    await timeline.find_divergence()
    number = int(parts[1])
    is_cut = bool(parts[2]) and timeline.diverges_at is not None  # it counts as before that
    if not is_cut and not await timeline.reaches(number):
        why = "the position is ahead of the history"
        found.add(Problem("position-ahead", key, number, why))
    return found


def list_edition(keys: Keys, domain: str, edition: str, tag: str) -> tuple[Call, Call]:
    """Return what lists an edition and its domain if they are there, and not if they are not."""
    roots, editions = keys.roots(domain, edition, tag), keys.editions(domain, tag)
    return (
        Call(scripts.MEND_NAME, (editions, roots), (edition,)),
        Call(scripts.MEND_NAME, (keys.domains(tag), editions), (domain,)),
    )


def out_of_order(index: str) -> Problem:
    """Return the problem of an index that has scores by which its names are not found."""
    text = "not all its scores are 0, so that what it holds is not found"
    return Problem("scores", index, None, text, mending=(Call(scripts.MEND_SCORES, (index,), ()),))


def wrong_type(own: Keys, key: str, kind: str) -> Problem | None:
    """Return the problem of a key that is of another type than it should be."""
    wanted = _type_of(own, key)
    if kind in (wanted, "none"):
        return None
    return Problem("type", key, None, f"its type is {kind}, and should be {wanted}")


def _type_of(own: Keys, key: str) -> str:
    return keys.TYPES[own.word_of(key) or ""]


def _claims_of(extras: Extras) -> tuple[str, ...]:
    claims: list[str] = []
    if extras.idempotency_key is not None:
        claims.append(keys.claim_of_key(extras.idempotency_key))
    source = extras.source
    if source is not None:
        read = codec.decode_source(source) if isinstance(source, list) else source
        claims.append(keys.claim_of_source(read))
    if extras.correlation_id is not None:
        claims.append(keys.claim_of_correlation(extras.correlation_id))
    return tuple(claims)


def _may_carry(member: bytes, what: str) -> bool:
    """Whether an event carries what is claimed; one that can't be decoded may."""
    try:
        *_, extras, _ = codec.decode_member(member)
    except codec.Undecodable:
        return True
    return what in _claims_of(extras)


def _claimed(what: str) -> str:
    return _CLAIMED[what.partition(":")[0]]


def _runs(entries: list[_Entry]) -> list[_Run]:
    found: defaultdict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        for what in entry.claims:
            found[what].append(entry)
    return [run for what, carriers in found.items() for run in _runs_of(what, carriers)]


def _runs_of(what: str, entries: list[_Entry]) -> list[_Run]:
    runs: list[_Run] = []
    for entry in entries:
        if runs and runs[-1].last == entry.sequence - 1:
            runs[-1].entries.append(entry)
        else:
            runs.append(_Run(what, [entry]))
    return runs
