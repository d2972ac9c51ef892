"""One connection to the server, shared by all callers.

A request that finds the connection idle leaves at once; those that come while another is under way
leave together at the end of the turn of the event loop, or when they are flushed. Replies come back
in their order. A caller that was cancelled leaves its place in the queue: its reply is read and
dropped, so that the connection stays in step for everybody else.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, cast

import hiredis

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Argument = str | bytes | int
Reply = Any

AGAIN: Final = "again"
ELSEWHERE: Final = "elsewhere"
"""The marks of a second sending: to the process that the first went to, and to another one."""

_ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"
_NOT_YET: Final = object()
_LARGEST_REPLY: Final = 512 * 1024 * 1024  # bytes; what Redis takes as one value, by default


class ReplyError(Exception):
    """An error that the server answered with. Only its first word is safe to be shown."""

    @property
    def code(self) -> str:
        """The first word of the answer, such as NOSCRIPT."""
        return str(self).split(" ", 1)[0]


class Repeat(Enum):
    """What may be done with a request whose reply was lost."""

    FREELY = "it changes nothing"
    ALIKE = "a second arrival changes nothing more"
    MARKED = "its script can tell a second arrival from the first, by a mark"
    NEVER = "a second arrival would change something again"


class Request:
    """A command on its way, and the callers who wait for its reply.

    Most have one caller. A group has many, and a reply with a part for each of them.
    """

    __slots__ = (
        "asking",
        "born",
        "callers",
        "command",
        "detours",
        "doubt",
        "is_group",
        "is_hopeless",
        "is_simple",
        "mark",
        "name",
        "packet",
        "repeat",
        "sent",
        "slot",
        "source",
    )

    def __init__(
        self,
        command: list[Argument],
        name: str,
        repeat: Repeat,
        callers: Sequence[asyncio.Future[Reply]],
        born: float,
        *,
        mark: int = 0,
        source: str | None = None,
        is_group: bool = False,
        slot: int | None = None,
    ) -> None:
        self.command = command
        self.slot = slot  # of a cluster, that its keys are in; None for a matter of one server
        self.detours = 0  # how often it was sent to another node, or again
        self.asking = False  # whether it goes where its slot is still on its way to
        self.is_simple = True  # one command and one reply
        self.name = name
        self.repeat = repeat
        self.callers = callers
        self.born = born
        self.mark = mark  # where in the command the mark of a second sending goes
        self.source = source  # of the script that the command names by its digest
        self.is_group = is_group
        self.sent = False
        self.is_hopeless = False  # not to be sent again on another connection
        self.doubt: Exception | None = None
        self.pack()

    def pack(self) -> None:
        """Make the bytes to send; again when the command has changed."""
        self.packet = (_ASKING if self.asking else b"") + _packed(self.command)
        self.is_simple = not self.asking

    @property
    def may_have_changed_something(self) -> bool:
        """Whether the server may have carried out a change that nobody heard of."""
        was_sent = self.sent or self.doubt is not None
        return was_sent and self.repeat is not Repeat.FREELY

    def send_again(self, mark: str, doubt: Exception) -> None:
        """Prepare the second sending.

        If it is refused, that does not say that the first one was: then the callers get `doubt`.
        """
        # One that was sent elsewhere stays so: one of the sendings was.
        if self.repeat is Repeat.MARKED and self.command[self.mark] != ELSEWHERE:
            self.command[self.mark] = mark
        self.doubt = doubt
        self.sent = False
        self.pack()

    def send_elsewhere(self, *, asking: bool) -> None:
        """Prepare to go to another server, which is asked to serve it if the slot comes there."""
        self.asking = asking
        self.detours += 1
        if self.doubt is not None and self.mark:
            self.command[self.mark] = ELSEWHERE
        self.sent = False
        self.pack()

    def is_answered_by(self, _: Reply) -> bool:
        """Take one of several replies; return whether it was the last one."""
        self.is_simple = True  # that was the reply to ASKING, and one more comes
        return False

    def name_source(self) -> bool:
        """Name the script by its source: the server may not have it. False if that was done."""
        if self.source is None:
            return False
        self.command[:2] = ["EVAL", self.source]
        self.source = None
        self.sent = False
        self.pack()
        return True

    def is_over(self) -> bool:
        """Whether nobody waits any more: all were answered, or cancelled."""
        for caller in self.callers:  # noqa: SIM110 - a generator takes four times as long
            if not caller.done():
                return False
        return True

    def settle(self, reply: Reply) -> Sequence[tuple[Request, ReplyError]]:
        """Hand over the last reply. Return what was refused as a whole, which still waits."""
        if type(reply) is ReplyError:
            return [(self, reply)]
        self.finish(reply)
        return ()

    def finish(self, reply: Reply, proofs: Sequence[Reply] | None = None) -> None:
        """Hand the reply to the callers that there still are, with those of the proofs if any."""
        is_parted = self.is_group and type(reply) is list and len(reply) == len(self.callers)
        # An error is one for all. What else has no part for each is none of this request.
        alike = reply if not self.is_group or type(reply) is ReplyError else None
        parts = reply if is_parted else [alike] * len(self.callers)
        for caller, part in zip(self.callers, parts, strict=True):
            if caller.done():
                continue
            if self.doubt is not None and _is_refusal(part):
                caller.set_exception(copy.copy(self.doubt))
            else:
                caller.set_result(part if proofs is None else (part, proofs))

    def fail(self, error: Exception) -> None:
        """Raise the error in the callers that there still are, in each its own."""
        for caller in self.callers:
            if not caller.done():
                caller.set_exception(copy.copy(error))


class Shipment(Request):
    """Groups that travel together, and behind them the commands that prove what became of them.

    All of it goes on one connection with nothing in between, and if that breaks, all of it goes
    again. Each caller gets its part of its group's reply, and the replies to the proofs, None for
    those that did not come.

    `prove` returns these commands. It is told for how many seconds the first of the callers has
    waited: a proof may take the time that is left.
    """

    __slots__ = ("_loop", "_prove", "_to_skip", "groups", "over", "proofs", "replies")

    def __init__(
        self, groups: Sequence[Request], prove: Callable[[float], Sequence[Sequence[Argument]]]
    ) -> None:
        first = groups[0]
        callers = [caller for group in groups for caller in group.callers]
        self.groups = groups
        self._prove = prove
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = self._loop.create_future()
        born = min(group.born for group in groups)
        super().__init__([], first.name, first.repeat, callers, born, slot=first.slot)
        self.detours = first.detours
        self.doubt = first.doubt

    def pack(self) -> None:
        """Make the bytes to send; replies to an earlier sending are of no use any more."""
        self.proofs = self._prove(self._loop.time() - self.born)
        groups = [group.packet for group in self.groups]
        self.packet = b"".join([*groups, *map(_packed, self.proofs)])
        self.is_simple = False
        self.replies: list[Reply] = []
        self._to_skip = self.groups[0].asking

    def send_again(self, mark: str, doubt: Exception) -> None:
        """Prepare the second sending of all groups."""
        for group in self.groups:
            group.send_again(mark, doubt)
        self.doubt = doubt
        self.sent = False
        self.pack()

    def send_elsewhere(self, *, asking: bool) -> None:
        """Prepare to go to another server; only one group can, for each has its own slot."""
        self.groups[0].send_elsewhere(asking=asking)
        self.detours += 1
        self.sent = False
        self.pack()

    def split(self) -> list[Shipment]:
        """Return a shipment for each group. This one is over."""
        self._end()
        return [Shipment([group], self._prove) for group in self.groups]

    def name_source(self) -> bool:
        """Name the script by its source, once: the groups behind find it there."""
        is_new = self.groups[0].name_source()
        self.sent = False
        self.pack()
        return is_new

    def is_over(self) -> bool:
        """Whether there is nothing left to do: who waits for the connection has to know."""
        return self.over.done()

    def is_answered_by(self, reply: Reply) -> bool:
        """Take the reply to one of the commands; return whether it was the last one."""
        if self._to_skip:
            self._to_skip = False  # the first one was that of ASKING
            return False
        self.replies.append(reply)
        return len(self.replies) == len(self.groups) + len(self.proofs)

    def settle(self, _: Reply) -> Sequence[tuple[Request, ReplyError]]:
        """Hand the replies to the callers. Return the groups that were refused as a whole."""
        proofs = self.replies[len(self.groups) :]
        refused: list[tuple[Request, ReplyError]] = []
        for group, reply in zip(self.groups, self.replies, strict=False):
            if type(reply) is ReplyError:
                refused.append((Shipment([group], self._prove), reply))
            else:
                group.finish(reply, proofs)
        self._end()
        return refused

    def finish(self, reply: Reply, proofs: Sequence[Reply] | None = None) -> None:
        """Hand one reply to all groups."""
        for group in self.groups:
            group.finish(reply, proofs or [None] * len(self.proofs))
        self._end()

    def fail(self, error: Exception) -> None:
        """Raise the error in the callers whose group has no answer; the others have no proof."""
        known = len(self.replies)
        proofs = self.replies[len(self.groups) :]
        proofs += [None] * (len(self.proofs) - len(proofs))
        for place, group in enumerate(self.groups):
            if place < known and type(self.replies[place]) is not ReplyError:
                group.finish(self.replies[place], proofs)
            else:
                group.fail(error)
        self._end()

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


class Survey(Request):
    """Many short questions to one server, for one caller, who gets a list of the answers.

    An answer may be an error. Asked this way a question costs a fifth of what it costs alone.
    """

    __slots__ = ("questions", "replies")

    def __init__(
        self, questions: Sequence[Sequence[Argument]], caller: asyncio.Future[Reply], born: float
    ) -> None:
        self.questions = questions
        super().__init__([], str(questions[0][0]), Repeat.FREELY, [caller], born)

    def pack(self) -> None:
        """Make the bytes to send; answers to an earlier sending are of no use any more."""
        self.packet = b"".join(map(_packed, self.questions))
        self.is_simple = False
        self.replies: list[Reply] = []

    def is_answered_by(self, reply: Reply) -> bool:
        """Take the answer to one of the questions; return whether it was the last one."""
        self.replies.append(reply)
        return len(self.replies) == len(self.questions)

    def settle(self, _: Reply) -> Sequence[tuple[Request, ReplyError]]:
        """Hand the answers to the caller."""
        self.finish(self.replies)
        return ()


class Wire(asyncio.Protocol):
    """The protocol of one connection.

    `on_reply` is called after replies, `on_room` when there is room again without one, `on_refusal`
    when a request was refused as a whole: it returns whether the request goes on by another way;
    `on_lost` once, with the reason, when the connection is gone; then `waiting` are the requests
    that were sent and have no reply, `outbox` those that surely never left.
    """

    def __init__(
        self,
        *,
        max_commands: int,
        max_bytes: int,
        on_reply: Callable[[Wire], None],
        on_room: Callable[[], None],
        on_refusal: Callable[[Wire, Request, ReplyError], bool],
        on_lost: Callable[[Wire, str], None],
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.outbox: list[Request] = []
        self.last_heard = 0.0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOT_YET, replyError=ReplyError)
        self._max_commands = max_commands
        self._max_bytes = max_bytes
        self._calls = 0  # in flight or about to be
        self._bytes = 0  # of requests in flight
        self._partial = 0  # bytes of a reply that is not complete
        self._paused = False
        self._aborted = False
        self._reason = "the server closed the connection"
        self._on_reply = on_reply
        self._on_room = on_room
        self._on_refusal = on_refusal
        self._on_lost = on_lost

    # Sending

    def has_room(self) -> bool:
        """Whether another request can go now, by the bounds on calls and bytes in flight."""
        is_open = self.is_alive() and not self._paused
        return is_open and self._calls < self._max_commands and self._bytes < self._max_bytes

    def in_flight(self) -> int:
        """Return how many callers wait for an answer on it."""
        return self._calls

    def is_idle(self) -> bool:
        """Whether nothing is under way or about to be, and a request can go now."""
        return not self._calls and self.has_room()

    def is_alive(self) -> bool:
        """Whether the connection is there, and was not given up."""
        transport = self._transport
        return transport is not None and not self._aborted and not transport.is_closing()

    def push(self, request: Request) -> None:
        """Send a request with all others of this turn of the event loop; at once when idle.

        Waiting for the end of the turn costs a lone request 5 µs of about 100, and gains nothing.
        """
        was_idle = not self._calls
        if not self.outbox and not was_idle:
            self._loop.call_soon(self.flush)
        self.outbox.append(request)
        self._calls += len(request.callers)
        self._bytes += len(request.packet)
        if was_idle:
            self.flush()

    def flush(self) -> None:
        """Send what there is to be sent."""
        if not self.outbox or self._transport is None or self._transport.is_closing():
            return  # it has been sent; or it never will be, and is handed over with the connection
        outbox, self.outbox = self.outbox, []
        live = [request for request in outbox if not request.is_over()]
        for request in live:
            request.sent = True
        self.waiting.extend(live)
        self._transport.write(b"".join([request.packet for request in live]))
        if len(live) < len(outbox):
            for request in outbox:
                if not request.sent:
                    self._leave(request)
            self._on_room()

    def _leave(self, request: Request) -> None:
        self._calls -= len(request.callers)
        self._bytes -= len(request.packet)

    # The transport's calls

    def take(self, writer: asyncio.StreamWriter) -> None:
        """Take over a connection that was dialled, with nothing unread on it."""
        self._writer = writer  # it closes its transport when nobody holds it
        self._transport = transport = cast(asyncio.Transport, writer.transport)
        self.last_heard = self._loop.time()
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """Match replies with requests, in order."""
        self.last_heard = self._loop.time()
        self._reader.feed(data)
        self._partial += len(data)
        try:
            while (reply := self._next_reply()) is not _NOT_YET:
                self._partial = 0
                if type(reply) is not hiredis.PushNotification:  # RESP3: nobody's reply
                    self._match(self.waiting[0], reply)
        except (hiredis.HiredisError, IndexError):
            self.abort("what answers there does not speak the protocol of Redis")
            return
        if self._partial > _LARGEST_REPLY:
            if self.waiting:
                self.waiting[0].is_hopeless = True  # asking again would bring the same
            self.abort(f"an answer has more than {_LARGEST_REPLY} bytes")
            return
        self._on_reply(self)

    def _next_reply(self) -> Reply:
        try:
            return self._reader.gets()
        except Exception as error:
            # Not only its own errors: a map whose keys are lists, or a list of 2^32 items.
            raise hiredis.ProtocolError(type(error).__name__) from error

    def _match(self, request: Request, reply: Reply) -> None:
        if not request.is_simple and not request.is_answered_by(reply):
            return
        self.waiting.popleft()
        self._leave(request)
        for refused, error in request.settle(reply):
            if not self._on_refusal(self, refused, error):
                refused.finish(error)

    def pause_writing(self) -> None:
        """Stop taking requests: the server does not read what was sent."""
        self._paused = True

    def resume_writing(self) -> None:
        """Take requests again."""
        self._paused = False
        self._on_room()

    def eof_received(self) -> bool:
        """Close: the server has said its last."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand over what is open."""
        self._transport = None
        if exc is not None:
            self._reason = f"the connection broke ({type(exc).__name__})"
        if not self.closed.done():
            self.closed.set_result(None)
        self._on_lost(self, self._reason)

    def abort(self, reason: str) -> None:
        """Give the connection up."""
        self._reason = reason
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()


def _packed(command: Sequence[Argument]) -> bytes:
    packet: bytes = hiredis.pack_command(cast(Any, tuple(command)))
    return packet


def _is_refusal(part: Reply) -> bool:
    """Whether the server refused a command, or the script one part of a group."""
    return type(part) is ReplyError or (type(part) is list and part[:1] == [b"error"])
