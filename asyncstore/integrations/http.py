"""What a store says in terms of HTTP. No framework is known here.

Errors become problems (RFC 9457). An ETag is the number of events that a representation was made
of, so what comes back in If-Match is the sequence that the next event must get. The health of a
store is what probes may ask for often, and its live events are Server-Sent Events.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import logging
import re
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import UUID
from weakref import WeakKeyDictionary

from asyncstore import codec, errors
from asyncstore.names import MAIN, check_seconds, check_sequence
from asyncstore.sharing import Shared
from asyncstore.values import ANY, NEW, check_aggregate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from asyncstore.checks import Report
    from asyncstore.recorded import RecordedEvent
    from asyncstore.store import Store
    from asyncstore.values import Aggregate, Expected

_log = logging.getLogger(__name__)
_RETRY: Final = 1.0  # seconds until a store that was away is tried again, and a client comes back

# The store of an application


@dataclass
class HeldStore:
    """The store of an application, or why there is none; made by `held_store`."""

    store: Store | None
    why: errors.AsyncStoreError | None = None

    def get(self) -> Store:
        """Return the store, or raise why there is none."""
        if self.store is None:
            # A copy: one error can't be raised in many requests.
            raise copy.copy(self.why) or errors.StoreClosed("the application stops")
        return self.store

    async def hold(self, make: Callable[[], Store]) -> None:
        """Open a store as soon as that can be done, and hold it until cancelled."""
        while True:
            await asyncio.sleep(_RETRY)
            try:
                async with make() as self.store:
                    _log.info("the store is there now")
                    await asyncio.Event().wait()
            except errors.AsyncStoreError as error:
                self.why = error
                _log.warning("still without the store: %s", error)


@asynccontextmanager
async def held_store(
    make: Callable[[], Store], *, start_without_store: bool
) -> AsyncIterator[HeldStore]:
    """Open a store while the application runs.

    With `start_without_store` one whose server is away is tried again until it is there. Anything
    else that is wrong is raised all the same.
    """
    async with AsyncExitStack() as stack:
        held = HeldStore(None)
        try:
            held.store = await stack.enter_async_context(make())
        except (errors.StoreUnavailable, errors.DurabilityUnavailable) as error:
            if not start_without_store:
                raise
            held.why = error
            _log.warning("starting without the store: %s", error)
            stack.push_async_callback(_end, asyncio.create_task(held.hold(make)))
        try:
            yield held
        finally:
            held.store = held.why = None


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


# Errors


PROBLEM_JSON: Final = "application/problem+json"
_RETRY_AFTER: Final = 1  # seconds


@dataclass(frozen=True, slots=True)
class Problem:
    """A response of RFC 9457: the body for a client, and the headers that belong to it."""

    status: int
    title: str
    detail: str
    members: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    type: str = "about:blank"

    def body(self) -> bytes:
        """Return the body, of the media type `PROBLEM_JSON`."""
        fixed = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return codec.encode_json("the problem", {**self.members, **fixed})


@dataclass(frozen=True, slots=True)
class _Kind:
    """What becomes of one class of errors. `detail` is filled in with the fields that are shown."""

    status: int
    detail: str
    shown: tuple[str, ...] = ()
    retry_after: int | None = None

    def problem(self, error: errors.AsyncStoreError) -> Problem:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__)
        members = {shown: getattr(error, shown) for shown in self.shown}
        retry = self.retry_after
        return Problem(
            self.status,
            name.capitalize(),
            self.detail.format_map(members),
            members,
            {} if retry is None else {"Retry-After": str(retry)},
            f"urn:asyncstore:problem:{name.lower().replace(' ', '-')}",
        )


# A client is told what it can mend. What is wrong with the server, and where that is, stands in
# the log: an address is nothing for strangers.
_BROKEN: Final = _Kind(500, "The service can't do this. Its log says why.")
_KINDS: Final[Mapping[type[errors.AsyncStoreError], _Kind]] = {
    errors.InvalidName: _Kind(422, "{part}: {why}.", ("part", "why")),
    errors.InvalidValue: _Kind(422, "{argument}: {why}.", ("argument", "why")),
    errors.InvalidType: _Kind(422, "{argument}: {why}.", ("argument", "why")),
    errors.ProtectedEdition: _Kind(422, "Edition {edition!r}: {why}.", ("edition", "why")),
    errors.EventTooLarge: _Kind(
        413,
        "{setting} is {limit}, and {actual} is more: send less at once.",
        ("setting", "limit", "actual", "index"),
    ),
    errors.SequenceConflict: _Kind(
        409,
        "Expected to go on at sequence {expected}, but the next one is {actual}, and nothing was "
        "written. Read what is new and decide again; then send its ETag as If-Match.",
        ("expected", "actual"),
    ),
    errors.HistoryRegressed: _Kind(
        409,
        "The history went back from sequence {expected} to {actual} when a server was replaced, "
        "and nothing was written. Read it anew before you decide.",
        ("expected", "actual"),
    ),
    errors.BranchExists: _Kind(
        409,
        "The edition has diverged at sequence {diverged_at} already, not at {at}.",
        ("at", "diverged_at"),
    ),
    errors.StoreUnavailable: _Kind(
        503, "The store can't be reached now. Nothing was written.", retry_after=_RETRY_AFTER
    ),
    errors.StoreClosed: _Kind(
        503, "The service is about to stop. Nothing was written.", retry_after=_RETRY_AFTER
    ),
    errors.DurabilityUnavailable: _Kind(
        503,
        "The store can't keep events as safely as this asks for. Nothing was written.",
        retry_after=_RETRY_AFTER,
    ),
    errors.StillBehind: _Kind(
        503, "What is read here has not come that far yet.", retry_after=_RETRY_AFTER
    ),
    # Not 202, although the events are stored: whoever asked for a level must not take less for
    # it. With its Idempotency-Key the request can be repeated, and then waits for the level only.
    errors.DurabilityNotReached: _Kind(
        504,
        "Events {first_sequence} to {last_sequence} are stored, but not yet as safely as this "
        "asks for. Repeat the request with the same Idempotency-Key to wait for that; without one "
        "don't repeat it.",
        ("first_sequence", "last_sequence"),
    ),
    errors.OutcomeUnknown: _Kind(
        504,
        "No answer came in time: the change may have been made, or not. Repeat the request with "
        "the same Idempotency-Key, or read to see.",
    ),
    errors.StoreFull: _Kind(507, "The store is out of memory. Nothing was written; reads go on."),
}


def problem_of(error: errors.AsyncStoreError) -> Problem:
    """Return what a client is told of an error; what is not the client's fault is logged.

    No event data, no address and no password is in it.
    """
    kinds = (_KINDS[base] for base in type(error).__mro__ if base in _KINDS)
    problem = next(kinds, _BROKEN).problem(error)
    if problem.status >= 500:
        _log.error("answered with %s: %s", problem.status, error)
    return problem


def problem_of_status(
    status: int, detail: str = "", headers: Mapping[str, str] | None = None
) -> Problem:
    """Return the problem of a status by which a framework answers: 404, 405, …"""
    title = HTTPStatus(status).phrase
    return Problem(status, title, detail or title, headers=headers or {})


def unusable(why: Iterable[Mapping[str, str]]) -> Problem:
    """Return the problem of a request that is not what it should be.

    Each thing that is wrong has its place (`where`: names of fields) and a reason (`why`), never
    the value that was sent.
    """
    return Problem(422, "Unusable request", "See `errors`.", {"errors": list(why)})


# Headers


ETAG_PATTERN: Final = r'^"(0|[1-9][0-9]{0,14})"$'
IF_MATCH_PATTERN: Final = r'^(?:"(0|[1-9][0-9]{0,14})"|(0|[1-9][0-9]{0,14}))$'
_IF_MATCH: Final = re.compile(IF_MATCH_PATTERN)
KEY_PATTERN: Final = r'^(?:"([!#-~]{1,255})"|([!#-~]{1,255}))$'
_KEY: Final = re.compile(KEY_PATTERN)


def header_of(values: Sequence[str]) -> str | None:
    """Return what a header says that came once, several times or not at all; several are a list."""
    return ", ".join(values) if values else None


def etag(next_sequence: int) -> str:
    """Return the ETag of what was made of the events before that sequence: that number, quoted."""
    return f'"{next_sequence}"'


def expected_of(if_match: str | None, if_none_match: str | None = None) -> Expected:
    """Return the sequence that the headers of a change expect; ANY where neither is there.

    `If-Match: "3"` is an ETag that was read before, and expects just these 3 events; the quotes
    may be missing.
    `If-None-Match: *` is NEW: the aggregate must have none. Anything else can't be checked in one
    step with the append, and is `InvalidValue`: `If-Match: *`, lists, weak tags (`W/"3"`: made by
    a proxy that compresses; let it leave ETags alone), and both headers at once.
    """
    if if_match is not None and if_none_match is not None:
        raise errors.InvalidValue("If-Match", "give it or If-None-Match, not both")
    if if_none_match is not None:
        if if_none_match.strip() != "*":
            raise errors.InvalidValue("If-None-Match", "only * can be used here: no events yet")
        return NEW
    if if_match is None:
        return ANY
    found = _IF_MATCH.fullmatch(if_match.strip())
    if not found:
        why = 'one ETag that was read here is wanted, such as "3": a strong one, and no *'
        raise errors.InvalidValue("If-Match", why)
    return int(found[1] or found[2])


def key_of(header: str | None) -> str | None:
    """Return the idempotency key that an Idempotency-Key header names, with or without quotes.

    None if there is none. Anything but 1-255 visible ASCII characters is `InvalidValue`, an empty
    key too: the client counts on something that it would not get.
    """
    if header is None:
        return None
    found = _KEY.fullmatch(header.strip())
    if not found:
        why = "1-255 visible ASCII characters are wanted; quotes around them are fine"
        raise errors.InvalidValue("Idempotency-Key", why)
    return found[1] or found[2]


def event_json(event: RecordedEvent) -> bytes:
    """Return an event as a JSON object; data that are bytes are `data_base64`.

    Without its idempotency key, which is the business of whoever sent it.
    """
    fields = {
        "sequence": event.sequence,
        "type": event.type,
        "time": event.time,
        "id": event.id,
        "metadata": event.metadata,
        "correlation_id": event.correlation_id,
    }
    # The data by themselves: they may be nested as deep as JSON can be written.
    if isinstance(event.data, bytes):
        name, data = b"data_base64", b'"' + base64.b64encode(event.data) + b'"'
    else:
        name, data = b"data", codec.encode_json("data", event.data)
    return b'%s,"%s":%s}' % (codec.encode_json("the event", fields)[:-1], name, data)


def events_json(events: Iterable[RecordedEvent]) -> bytes:
    """Return events as a JSON array."""
    return b"[%s]" % b",".join(map(event_json, events))


# Health


@dataclass(frozen=True, slots=True)
class Ready:
    """Whether a store can serve, and what `Store.check` found. It names no server and no root."""

    is_ready: bool
    report: Report | None

    @property
    def status(self) -> int:
        """The HTTP status for it: 200 or 503."""
        return 200 if self.is_ready else 503

    def fields(self) -> dict[str, Any]:
        """Return it as what JSON can be made of."""
        if self.report is None:
            return {"status": "unavailable", "level": "bad", "findings": []}
        found = [f for f in self.report.findings if f.level != "good"]
        return {
            "status": "ready" if self.is_ready else "unfit",
            "level": self.report.level,
            "findings": [{"name": f.name, "level": f.level} for f in found],
        }


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """How a readiness probe is answered.

    A report is good for `max_age` seconds, however many ask; one that takes longer than `timeout`
    counts as none. `strict`: a finding that is bad makes the service unready. Without it only a
    store that does not answer does, for a server that could lose events is worse off when all
    instances of the service leave at once; `asyncstore doctor` says more of it.
    """

    max_age: float = 5.0
    timeout: float = 1.0
    strict: bool = False

    def __post_init__(self) -> None:
        check_seconds("max_age", self.max_age)
        check_seconds("timeout", self.timeout)


@dataclass
class _Asked:
    """The last report of a store; `check` never runs twice at a time."""

    check: Shared[Report]
    report: Report | None = None
    at: float = 0.0


class Health:
    """The health of a service, asked for by probes. Each store that it opens is asked by itself."""

    def __init__(self, options: HealthOptions) -> None:
        self._options = options
        self._asked: WeakKeyDictionary[Store, _Asked] = WeakKeyDictionary()

    async def ready(self, store: Store | None) -> Ready:
        """Return whether the store can serve; as of the last `max_age` seconds."""
        if store is None:
            return Ready(False, None)
        asked = self._asked.setdefault(store, _Asked(Shared(store.check)))
        if asked.report is None or time.monotonic() - asked.at >= self._options.max_age:
            asked.report = await self._report(asked.check)
            asked.at = time.monotonic()
        if asked.report is None:
            return Ready(False, None)
        return Ready(not (self._options.strict and asked.report.level == "bad"), asked.report)

    async def _report(self, check: Shared[Report]) -> Report | None:
        try:
            async with asyncio.timeout(self._options.timeout):
                return await check.result()
        except TimeoutError:
            _log.warning("not ready: no report in %s seconds", self._options.timeout)
        except errors.AsyncStoreError as error:
            _log.warning("not ready: %s", error)
        return None


# Live events


EVENT_STREAM: Final = "text/event-stream"
STREAM_HEADERS: Final[Mapping[str, str]] = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
LAST_EVENT_ID_PATTERN: Final = r"^([0-9]{1,16})(?:-([0-9a-f]{32}))?$"
_LAST_EVENT_ID: Final = re.compile(LAST_EVENT_ID_PATTERN)


@dataclass(frozen=True, slots=True)
class _Place:
    """The event that a client has seen last: its sequence, and its id if that is known."""

    sequence: int
    id: UUID | None

    @classmethod
    def of_event(cls, event: RecordedEvent) -> _Place:
        return cls(event.sequence, event.id)

    @classmethod
    def of_header(cls, text: str | None) -> _Place | None:
        """Return what a Last-Event-ID header says; an empty one is that of a new client."""
        if not text:
            return None
        found = _LAST_EVENT_ID.fullmatch(text)
        if not found:
            why = "the id of an event that was sent here is wanted, or its sequence"
            raise errors.InvalidValue("Last-Event-ID", why)
        sequence = check_sequence("Last-Event-ID", int(found[1]))
        return cls(sequence, UUID(found[2]) if found[2] else None)

    def is_of(self, event: RecordedEvent) -> bool:
        return event.sequence == self.sequence and self.id in (None, event.id)


@dataclass
class LiveEvents:
    """The events of an aggregate as Server-Sent Events: those that are there, then each new one.

    None is left out and none comes twice, in the order of their sequences, from the one after
    `last_event_id` on: the listener only says that something is new, and whatever it missed is
    read. An event comes as `message`, with the JSON of `event_json` as its data. Its id is its
    sequence, a hyphen and its event id in hex, so that a client who comes back with an event that
    is not there any more (the aggregate was deleted, a failover lost the end of it, an edition
    has diverged) is told: a `reset` comes, and then all events from the first one. While the
    stream goes on, that is seen within a heartbeat.

    After `heartbeat` seconds of silence a comment comes, and the store is looked at again. A store
    that is away is waited for. Any other error comes as `problem`, and ends the stream. For
    `async with`, which raises `StoreUnavailable`; a Last-Event-ID that is none is `InvalidValue`,
    at once.
    """

    store: Store
    aggregate: Aggregate
    last_event_id: str | None = None
    heartbeat: float = 15.0
    _last: _Place | None = field(init=False)
    _stack: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)

    def __post_init__(self) -> None:
        check_seconds("heartbeat", self.heartbeat, least=0.01)
        self._last = _Place.of_header(self.last_event_id)
        main = check_aggregate(self.aggregate).edition == MAIN
        # What main gets is an event of an edition, too, as long as that has not diverged.
        self._live = self.store.listen(
            self.aggregate.domain,
            root=self.aggregate.root,
            edition=MAIN if main else None,
            buffer=1_000,
        )

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._live)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def frames(self) -> AsyncIterator[bytes]:
        """Iterate over what is to be sent, for ever."""
        yield b"retry: %d\n\n" % (_RETRY * 1000)
        try:
            async for frame in self._frames():
                yield frame
        except errors.StoreClosed:
            return
        except errors.AsyncStoreError as error:
            yield b"event: problem\ndata: %s\n\n" % problem_of(error).body()

    async def _frames(self) -> AsyncIterator[bytes]:
        event: RecordedEvent | None = None  # None: whether something is new is to be looked up
        while True:
            try:
                if event is not None and self._is_next(event):
                    yield self._frame(event)
                elif event is None or not self._is_known(event):
                    async for frame in self._missed():
                        yield frame
                async with asyncio.timeout(self.heartbeat):
                    event = await anext(self._live)
            except TimeoutError:
                event = None
                yield b":\n\n"
            except errors.ListenerLagged:
                event = None
            except (errors.StoreUnavailable, errors.OutcomeUnknown) as error:
                # An answer other than 200 would make browsers give up: the stream stays.
                _log.warning("live events wait for the store: %s", error)
                event = None
                await asyncio.sleep(min(_RETRY, self.heartbeat))
                yield b":\n\n"

    def _is_next(self, event: RecordedEvent) -> bool:
        expected = 0 if self._last is None else self._last.sequence + 1
        return event.sequence == expected and event.aggregate == self.aggregate

    def _is_known(self, event: RecordedEvent) -> bool:
        """Whether it was read before it was heard.

        One from before the last may also be that of a new history; the next look finds out.
        """
        if self._last is None or event.aggregate != self.aggregate:
            return False
        return event.sequence < self._last.sequence or self._last.is_of(event)

    async def _missed(self) -> AsyncIterator[bytes]:
        """Read on from the event that was sent last, which must still be there."""
        if self._last is not None:
            events = self.store.events.stream(self.aggregate, start=self._last.sequence)
            known = await anext(events, None)
            if known is not None and self._last.is_of(known):
                self._last = _Place.of_event(known)
                async for event in events:
                    yield self._frame(event)
                return
            self._last = None
            yield b'id\nevent: reset\ndata: {"why":"the history is another one now"}\n\n'
        async for event in self.store.events.stream(self.aggregate):
            yield self._frame(event)

    def _frame(self, event: RecordedEvent) -> bytes:
        self._last = _Place.of_event(event)
        mark = b"%d-%s" % (event.sequence, event.id.hex.encode())
        return b"id: %s\ndata: %s\n\n" % (mark, event_json(event))
