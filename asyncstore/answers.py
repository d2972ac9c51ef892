"""What a server's answer, or the lack of one, means for the caller: the one place that decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncstore.errors import (
    AsyncStoreError,
    OutcomeUnknown,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
    UnexpectedReply,
)
from asyncstore.wire import ReplyError

if TYPE_CHECKING:
    from asyncstore.forms import Form
    from asyncstore.wire import Reply, Request

# The first words of errors after which nothing was done, and what they say of the server.
NOT_NOW: Final = {
    "BUSY": "another client's script keeps it busy",
    "CLUSTERDOWN": "its cluster is down",
    "LOADING": "it is loading its data after a start",
    "MASTERDOWN": "it is a replica that lost its primary",
    "MISCONF": "it can't write to its disk and refuses changes",
    "NOAUTH": "it wants a login: give a user and a password in the URL",
    "NOREPLICAS": "it has fewer replicas than it wants for a change",
    "READONLY": "it is a replica and takes no changes",
    "TRYAGAIN": "it is moving this slot",
    "WRONGPASS": "it refused the user or the password",
}

# Those after which another node of a cluster may serve, or the same one in a moment.
ELSEWHERE_OR_LATER: Final = frozenset(
    {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "READONLY", "LOADING", "MASTERDOWN"}
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What is made of answers. `where` names the server in errors, without a password."""

    where: str

    def checked(self, reply: Reply, name: str) -> Reply:
        """Return the reply, or raise what an error of the server means."""
        if type(reply) is ReplyError:
            raise self.refused(name, reply.code)
        return reply

    def believed(self, reply: Reply, name: str, form: Form) -> Reply:
        """Return the reply if it has the form, or raise what is wrong with it."""
        if form(self.checked(reply, name)):
            return reply
        raise self.misfit(name)

    def misfit(self, name: str) -> UnexpectedReply:
        """Return the error for a reply that is none of this command or script."""
        return UnexpectedReply(self.where, name, "of another form than expected")

    def refused(self, name: str, code: str) -> AsyncStoreError:
        """Return what an error of the server, by its first word, means for the caller."""
        if code == "OOM":
            return StoreFull(self.where)
        if code in NOT_NOW:
            return StoreUnavailable(self.where, NOT_NOW[code])
        return UnexpectedReply(self.where, name, code)

    def missing(self, request: Request, why: str) -> AsyncStoreError:
        """Return the error for a request that gets no answer any more."""
        if request.may_have_changed_something:
            return OutcomeUnknown(self.where, f"{request.name}: {why}")
        return StoreUnavailable(self.where, f"{why}; nothing was changed")

    def closed(self, request: Request) -> AsyncStoreError:
        """Return the error for a request whose store was closed."""
        if request.may_have_changed_something:
            return self.missing(request, "the store was closed")
        return StoreClosed("the store was closed; nothing was changed")
