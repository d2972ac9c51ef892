"""Whether the history that a store holds is sound: what `asyncstore verify` does.

Goes through all keys with SCAN, so it is for operators, and needs a user who may do that. Each
aggregate is looked at by itself: its events one after the other, its claims, snapshots, positions,
and its entries in the indexes.

Others may write meanwhile. What is looked at takes several calls, so something may seem wrong that
was only changed in between. Therefore whatever looks wrong is read again from the beginning, and
only what is wrong each time, in the same place, is told. It is read until nobody has appended to
the aggregate or made it anew during a reading, at least once and at most seven times.

In memory are a page of events for each of some aggregates, at most a thousand problems of each, and
the names of all aggregates, so that none is looked at twice: of the order of 200 bytes each.
"""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from asyncstore import codec, keys, scripts
from asyncstore.errors import UnexpectedReply
from asyncstore.looking import Looker
from asyncstore.names import MAIN
from asyncstore.sharing import all_of
from asyncstore.soundness import (
    Call,
    Check,
    Findings,
    Problem,
    check_position,
    list_edition,
    out_of_order,
    wrong_type,
)
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from asyncstore.keys import Meaning
    from asyncstore.store import Store


__all__ = ["Problem", "problems", "repair"]

_AT_ONCE: Final = 16  # aggregates, positions, …
_LOOKS: Final = 8
_INDEXES: Final = ("roots", "editions", "domains", "correlated", "attached")
_OF_HANDLERS: Final = ("subscribed", "subscriptions", "due", "dead-letters")
_PAUSE: Final = 0.01  # seconds between two looks, at most, for each look that there was


@dataclass(frozen=True, slots=True)
class _Look:
    """Something to look at, and what tells whether it was changed between two moments."""

    run: Callable[[], Awaitable[Findings]]
    state: Callable[[], Awaitable[object]]


async def problems(
    store: Store,
    domains: Collection[str] | None = None,
    on_events: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[Problem]:
    """Iterate over what is wrong in an open store, or in some domains of it.

    `on_events` is called with the number of events that were read since the last call. Nothing is
    changed; see `repair`.
    """
    walk = _Walk(store, domains, on_events)
    looks: list[_Look] = []
    async for look in walk.looks():
        looks.append(look)
        if len(looks) == _AT_ONCE:
            for problem in await _confirm(looks):
                yield problem
            looks.clear()
    for problem in await _confirm(looks):
        yield problem


async def repair(store: Store, problem: Problem) -> bool:
    """Mend what a problem says of an index; return False where that is not possible.

    Only what follows from the events is mended: entries of indexes, lists of handlers, missing
    claims. Never the events. Each script looks again at what is there when it runs, so it can't
    undo what somebody has appended or deleted since the problem was found.
    """
    try:
        for call in problem.mending:
            await store._router.run(call.script, call.keys, call.arguments)
    except UnexpectedReply:  # such as a key of another type, which is a problem by itself
        return False
    except UnicodeEncodeError:  # a name that is no text, which nobody can ask for
        return False
    return bool(problem.mending)


async def _confirm(looks: list[_Look]) -> list[Problem]:
    found = await all_of(_look_well(look) for look in looks)
    return [problem for some in found for problem in some]


async def _look_well(look: _Look) -> list[Problem]:
    """Look, and again if something seems wrong, until nobody has written in between.

    Returns what was wrong each time.
    """
    found: dict[tuple[str, str, str], Problem] = await look.run()
    for number in range(1, _LOOKS):
        if not found:
            break
        # So that a writer who goes round and round is not met at the same place each time.
        await asyncio.sleep(random.uniform(0, number * _PAUSE))  # noqa: S311
        before = await look.state()
        again = await look.run()
        found = {identity: again[identity] for identity in found if identity in again}
        if await look.state() == before:
            break
    return list(found.values())


class _Walk:
    """A way through all keys of a store: what there is to be looked at."""

    def __init__(
        self,
        store: Store,
        domains: Collection[str] | None,
        on_events: Callable[[int], None],
    ) -> None:
        self._router = store._router
        self._keys = store._keys
        self._look = Looker(self._router)
        self._domains = domains
        self._on_events = on_events
        self._met: set[str] = set()

    async def looks(self) -> AsyncIterator[_Look]:
        """Iterate over all that can be looked at by itself."""
        yield self._at_index(self._check_layout)
        async for page in self._look.keys(self._keys.prefix):
            for key in page:
                async for look in self._looks_at(key):
                    yield look

    def _is_wanted(self, domain: str) -> bool:
        return self._domains is None or domain in self._domains

    async def _looks_at(self, key: str) -> AsyncIterator[_Look]:
        meaning = self._keys.explain(key)
        if meaning is None:
            if self._keys.word_of(key) is not None and self._domains is None:
                yield self._at_index(partial(_foreign, key))
        elif meaning.aggregate is not None:
            for look in self._looks_beside(meaning, meaning.aggregate):
                yield look
        elif meaning.word in ("commits", "erasures"):
            check = self._check_commits if meaning.word == "commits" else self._check_erasures
            yield self._at_index(partial(check, meaning.tag), meaning.tag)
        elif not meaning.domain or self._is_wanted(meaning.domain):
            async for look in self._looks_at_shared(key, meaning):
                yield look

    async def _looks_at_shared(self, key: str, meaning: Meaning) -> AsyncIterator[_Look]:
        if meaning.word in _OF_HANDLERS:
            yield self._at_index(partial(self._check_of_handler, key, meaning), meaning.tag)
        elif meaning.word in _INDEXES:
            async for look in self._looks_at_index(key, meaning):
                yield look

    def _looks_beside(self, meaning: Meaning, place: Aggregate) -> list[_Look]:
        """Return what is to be looked at because of a key of an aggregate."""
        looks = self._looks_at_aggregate(place)
        if not self._is_wanted(place.domain):
            return looks
        if meaning.word == "positions":
            check = partial(check_position, self._look, self._keys, meaning.name, place)
            looks.append(self._at_aggregate(check, place))
        elif meaning.word == "leases":
            key = self._keys.lease(meaning.name, place)
            looks.append(self._at_aggregate(partial(self._check_type, key), place))
        return looks

    def _looks_at_aggregate(self, aggregate: Aggregate) -> list[_Look]:
        name = keys.place_in_index(aggregate)
        if name in self._met or not self._is_wanted(aggregate.domain):
            return []
        self._met.add(name)
        return [self._at_aggregate(partial(self._check_aggregate, aggregate), aggregate)]

    async def _check_aggregate(self, aggregate: Aggregate) -> Findings:
        check = Check(self._look, self._router, self._keys, aggregate, self._on_events)
        return await check.run()

    # What tells that somebody has written

    def _at_index(self, check: Callable[[], Awaitable[Findings]], tag: str = "") -> _Look:
        async def last_commit() -> object:
            return await self._last_commit(tag or keys.ALL)

        return _Look(check, last_commit)

    def _at_aggregate(
        self, check: Callable[[], Awaitable[Findings]], aggregate: Aggregate
    ) -> _Look:
        async def last_appends() -> object:
            places = {aggregate, aggregate.on(MAIN)}
            return {place: await self._last_append(place) for place in places}

        return _Look(check, last_appends)

    async def _last_append(self, aggregate: Aggregate) -> object:
        """Return what changes with each append to an aggregate, and if it comes or goes."""
        roots, _, _ = self._keys.indexes_of(aggregate)
        is_index = await self._look.kind(roots) == "zset"
        score = await self._look.score(roots, aggregate.root) if is_index else None
        tag = self._keys.tag_of(aggregate.root)
        return ("not there", await self._last_commit(tag)) if score is None else score

    # Indexes

    async def _looks_at_index(self, key: str, meaning: Meaning) -> AsyncIterator[_Look]:
        """Iterate over what is to be looked at in an index, and because of it."""
        if await self._look.kind(key) != "zset":
            yield self._at_index(partial(self._check_type, key), meaning.tag)
            return
        if meaning.word == "roots":
            yield self._at_index(partial(self._check_roots, key, meaning), meaning.tag)
        else:
            yield self._at_index(partial(self._check_order, key), meaning.tag)
        if meaning.word == "editions":
            check = partial(self._check_domain_is_listed, meaning.domain, meaning.tag)
            yield self._at_index(check, meaning.tag)
        async for look in self._looks_at_names(key, meaning):
            yield look

    async def _looks_at_names(self, key: str, meaning: Meaning) -> AsyncIterator[_Look]:
        if meaning.word == "attached":
            return  # it may name too much
        async for names in self._look.names(key):
            for name in names:
                for look in self._looks_at_name(key, meaning, name):
                    yield look

    def _looks_at_name(self, key: str, meaning: Meaning, name: str) -> list[_Look]:
        if meaning.word == "domains":
            check = partial(self._check_domain, name, meaning.tag)
            return [self._at_index(check, meaning.tag)] if self._is_wanted(name) else []
        if meaning.word == "editions":
            check = partial(self._check_edition, key, meaning, name)
            return [self._at_index(check, meaning.tag)]
        if meaning.word == "correlated":
            return self._looks_at_correlated(key, meaning.name, name)
        try:
            place = Aggregate(meaning.domain, name, meaning.edition)
        except ValueError:  # InvalidName is one
            return [self._at_index(partial(_no_root, key, name), meaning.tag)]
        if self._keys.tag_of(name) != meaning.tag:
            check = partial(self._check_stray, key, meaning, name)
            return [self._at_index(check, meaning.tag), *self._looks_at_aggregate(place)]
        return self._looks_at_aggregate(place)

    def _looks_at_correlated(self, key: str, correlation_id: str, name: str) -> list[_Look]:
        place = keys.find_aggregate(name)
        check = partial(self._check_correlated, key, correlation_id, name, place)
        if place is None:
            return [self._at_index(check)]
        return [self._at_aggregate(check, place)] if self._is_wanted(place.domain) else []

    async def _check_type(self, key: str) -> Findings:
        return _findings(wrong_type(self._keys, key, await self._look.kind(key)))

    async def _check_order(self, key: str) -> Findings:
        is_index = await self._look.kind(key) == "zset"
        if not is_index or await self._look.is_in_order(key):
            return Findings()
        return _findings(out_of_order(key))

    async def _check_of_handler(self, key: str, meaning: Meaning) -> Findings:
        """Check what handlers have under a tag, and that a handler is listed that has begun."""
        found = await self._check_type(key)
        subscribed = self._keys.subscribed(meaning.tag)
        is_index = await self._look.kind(subscribed) in ("zset", "none")
        has_begun = meaning.word == "subscriptions" and meaning.tag == keys.ALL
        if has_begun and not found and is_index:
            name = keys.subscription_in_index(meaning.name, meaning.domain, meaning.edition)
            if not await self._look.is_scored(subscribed, name):
                why = f"it does not name {name!r}, which is there"
                mend = Call(scripts.MEND_NAME, (subscribed, key), (name,))
                found.add(
                    Problem("subscribed-missing", subscribed, None, why, False, (mend,), name)
                )
        return found

    async def _check_layout(self) -> Findings:
        key = self._keys.layout()
        kind = await self._look.kind(key)
        if kind != "string":
            missing = Problem("layout", key, None, "it is missing")
            return _findings(wrong_type(self._keys, key, kind) or missing)
        text = await self._look.text(key)
        wanted = codec.layout(by_slot=self._keys.by_slot).decode()
        if text == wanted:
            return Findings()
        why = f"it is {text!r}, and this version of asyncstore knows {wanted!r}"
        return _findings(Problem("layout", key, None, why))

    async def _check_commits(self, tag: str) -> Findings:
        key = self._keys.commits(tag)
        if await self._look.kind(key) not in ("string", "none"):
            return await self._check_type(key)
        if await self._last_commit(tag) is None:
            return _findings(Problem("commits", key, None, "it is not a number and a time"))
        return Findings()

    async def _check_erasures(self, tag: str) -> Findings:
        key = self._keys.erasures(tag)
        kind = await self._look.kind(key)
        if kind != "string" or re.fullmatch("[0-9]{1,16}", await self._look.text(key) or "0"):
            return await self._check_type(key)
        return _findings(Problem("erasures", key, None, "it is not a number"))

    async def _last_commit(self, tag: str) -> int | None:
        """Return the number of the last commit, 0 if there was none, None if it can't be read."""
        key = self._keys.commits(tag)
        if await self._look.kind(key) not in ("string", "none"):
            return None
        text = await self._look.text(key)
        parts = re.fullmatch(r"([0-9]{1,16}) ?[0-9]*", "0" if text is None else text)
        return None if parts is None else int(parts[1])

    async def _check_roots(self, key: str, meaning: Meaning) -> Findings:
        """Check the scores of an index of roots, and that its edition is listed."""
        found = Findings()
        highest = await self._look.highest(key)
        last, commits = await self._last_commit(meaning.tag), self._keys.commits(meaning.tag)
        if highest is not None and last is not None and highest > last:
            why = f"the last commit is {last}, and {key} has one of number {highest:.0f}"
            mend = Call(scripts.MEND_COMMITS, (commits, key), ())
            found.add(Problem("commits", commits, None, why, False, (mend,), key))
        editions = self._keys.editions(meaning.domain, meaning.tag)
        if await self._look.kind(editions) not in ("zset", "none"):
            return found
        if highest is not None and not await self._look.is_scored(editions, meaning.edition):
            why = f"it does not name {meaning.edition!r}, which has roots"
            mending = list_edition(self._keys, meaning.domain, meaning.edition, meaning.tag)
            found.add(
                Problem("edition-missing", editions, None, why, False, mending, meaning.edition)
            )
        return found

    async def _check_stray(self, key: str, meaning: Meaning, root: str) -> Findings:
        """Check a root that is not of the slot of its index: nobody else would take it out."""
        if not await self._is_still_named(key, root):
            return Findings()
        why = f"it names {root!r}, which is of another slot"
        mending = (
            Call(scripts.MEND_NAME, (key,), (root,)),
            *list_edition(self._keys, meaning.domain, meaning.edition, meaning.tag),
        )
        return _findings(Problem("root-too-much", key, None, why, False, mending, root))

    async def _check_edition(self, key: str, meaning: Meaning, edition: str) -> Findings:
        domain, tag = meaning.domain, meaning.tag
        if await self._look.exists(self._keys.roots(domain, edition, tag)):
            return Findings()
        if not await self._is_still_named(key, edition):
            return Findings()
        why = f"it names {edition!r}, which has no roots"
        mending = list_edition(self._keys, domain, edition, tag)
        return _findings(Problem("edition-too-much", key, None, why, False, mending, edition))

    async def _check_domain_is_listed(self, domain: str, tag: str) -> Findings:
        index, editions = self._keys.domains(tag), self._keys.editions(domain, tag)
        if await self._look.kind(index) not in ("zset", "none"):
            return Findings()
        is_there = await self._look.exists(editions)
        if not is_there or await self._look.is_scored(index, domain):
            return Findings()
        why = f"it does not name {domain!r}, which has editions"
        mend = Call(scripts.MEND_NAME, (index, editions), (domain,))
        return _findings(Problem("domain-missing", index, None, why, False, (mend,), domain))

    async def _check_domain(self, domain: str, tag: str) -> Findings:
        index, editions = self._keys.domains(tag), self._keys.editions(domain, tag)
        if await self._look.exists(editions) or not await self._is_still_named(index, domain):
            return Findings()
        why = f"it names {domain!r}, which has no editions"
        mend = Call(scripts.MEND_NAME, (index, editions), (domain,))
        return _findings(Problem("domain-too-much", index, None, why, False, (mend,), domain))

    async def _check_correlated(
        self, key: str, correlation_id: str, name: str, place: Aggregate | None
    ) -> Findings:
        if place is not None:
            claims = self._keys.claims(place)
            if await self._look.kind(claims) not in ("zset", "none"):
                return Findings()
            what = keys.claim_of_correlation(correlation_id)
            if await self._look.texts(claims, f"[{what}\n", f"({what}\v", 1):
                return Findings()
            if not (await self._look.is_in_order(claims) and await self._is_still_named(key, name)):
                return Findings()
        why = f"it names {name!r}, which has no events of the correlation id; that does no harm"
        return _findings(Problem("correlated-too-much", key, None, why, True, about=name))

    async def _is_still_named(self, index: str, name: str) -> bool:
        return await self._look.kind(index) == "zset" and await self._look.is_scored(index, name)


def _findings(problem: Problem | None) -> Findings:
    return Findings({problem.identity: problem} if problem else {})


async def _foreign(key: str) -> Findings:
    why = "it looks like a key of the store, and is none"
    return _findings(Problem("foreign-key", key, None, why, is_note=True))


async def _no_root(key: str, name: str) -> Findings:
    why = f"it names {name!r}, which can't be a root"
    return _findings(Problem("root-too-much", key, None, why, about=name))
