"""What can be seen of a store at work, and who sees it; OpenTelemetry is one way: see `telemetry`.

Calls are told to an `Observer`, if there is one: without it they pay one comparison. What happens
rarely is counted in a `Tally` whether somebody looks or not, so that nothing has to be called where
connections break. Log lines have the same facts as extras, under the names that spans use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, TypeVar

from asyncstore.names import MAIN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from contextlib import AbstractContextManager
    from typing import Concatenate

    from asyncstore.deliveries import Delivery
    from asyncstore.values import Aggregate, Event

P = ParamSpec("P")
R = TypeVar("R")

# The names of facts, as the semantic conventions of OpenTelemetry have them, or else our own.
SERVER_ADDRESS: Final = "server.address"
DOMAIN: Final = "db.collection.name"
HANDLER: Final = "messaging.consumer.group.name"
DESTINATION: Final = "messaging.destination.name"
EDITION: Final = "asyncstore.edition"
ROOT: Final = "asyncstore.root"
SEQUENCE: Final = "asyncstore.sequence"
EVENT_COUNT: Final = "asyncstore.event.count"
ATTEMPT: Final = "asyncstore.attempt"
ERROR: Final = "error.type"
STATUS_CODE: Final = "db.response.status_code"


@dataclass(slots=True)
class Tally:
    """What has happened to a store since it was made."""

    reconnects: int = 0
    """Connections that were made anew after one had broken."""
    retries: int = 0
    """Decisions of `update` that were made again after a conflict."""
    resends: Counter[str] = field(default_factory=Counter)
    """Requests that were sent again as their answer was lost, by name."""
    redirects: Counter[str] = field(default_factory=Counter)
    """Requests that a node of a cluster could not take, by the first word of its answer."""
    redeliveries: Counter[str] = field(default_factory=Counter)
    """Deliveries of an event that had been delivered before, by handler."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    """Events that became a dead letter, by handler."""


class Processing(Protocol):
    """What is in the hands of a handler."""

    def failed(self, error: BaseException) -> None:
        """Hear that the handler has failed."""


class Observer(Protocol):
    """Sees the calls of a store. What it raises, the caller of the store gets."""

    def call(
        self, name: str, work: Callable[[], Awaitable[R]], about: tuple[object, ...]
    ) -> Coroutine[Any, Any, R]:
        """Do a call, and see how it ends; `about` are its arguments."""

    def outgoing(self, batch: list[Event]) -> list[Event]:
        """Return events that are about to be appended, with what is to travel along."""

    def process(self, deliveries: Sequence[Delivery]) -> AbstractContextManager[Processing]:
        """See what is handled together being handled, until the end of the context."""


class _Watched(Protocol):
    @property
    def observer(self) -> Observer | None: ...


class _Observable(Protocol):
    @property
    def _router(self) -> _Watched: ...


S = TypeVar("S", bound=_Observable)


def observed(
    name: str,
) -> Callable[
    [Callable[Concatenate[S, P], Coroutine[Any, Any, R]]],
    Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
]:
    """Return a decorator for a method whose calls an observer is told of."""

    def decorator(
        method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
    ) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
        @wraps(method)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
            observer = self._router.observer
            if observer is None:
                return method(self, *args, **kwargs)
            work = partial(method, self, *args, **kwargs)
            return observer.call(name, work, (*args, *kwargs.values()))

        return call

    return decorator


class Unobserved:
    """A delivery that nobody looks at."""

    def __enter__(self) -> Unobserved:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def failed(self, _: BaseException) -> None:
        """Do nothing."""


UNOBSERVED: Final = Unobserved()


def named(aggregate: Aggregate) -> dict[str, Any]:
    """Return the extras of a log line about an aggregate, which the line names as well."""
    facts = {DOMAIN: aggregate.domain, ROOT: aggregate.root}
    return facts if aggregate.edition == MAIN else {**facts, EDITION: aggregate.edition}
