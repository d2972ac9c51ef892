"""The front door: `open` a store, and what hangs on it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

from asyncstore import checks, cluster_checks, codec, embedded, forms, scripts
from asyncstore.admission import Admission
from asyncstore.cluster import Cluster
from asyncstore.doorbell import Doorbell
from asyncstore.erasing import Eraser
from asyncstore.errors import (
    AsyncStoreError,
    ConfigurationError,
    StoreClosed,
    UnexpectedReply,
)
from asyncstore.events import Events
from asyncstore.folding import DEFAULT_TRIES, Fold, Folder
from asyncstore.keys import Keys
from asyncstore.listening import DEFAULT_BUFFER, Listener, Wanted
from asyncstore.listing import Listing
from asyncstore.names import (
    MAIN,
    check_edition,
    check_name,
    check_seconds,
    check_whole_number,
)
from asyncstore.nodes import Node, Ways
from asyncstore.positions import Positions
from asyncstore.progress import Subscriptions
from asyncstore.reading import Reader
from asyncstore.registering import Registry
from asyncstore.router import OneServer, Router
from asyncstore.running import Function, Handler, run
from asyncstore.settings import (
    EMBEDDED,
    REPLICA,
    Options,
    Settings,
    embedded_directory_of,
    seeds_of,
    server_url_of,
)
from asyncstore.snapshots import Snapshots
from asyncstore.subscriptions import SubscribeOptions, Subscription
from asyncstore.sweeping import Sweeper
from asyncstore.transport import Bounds
from asyncstore.values import FIRST, Durability, check_start, check_trace, check_types
from asyncstore.worker import Means, Worker
from asyncstore.worklist import Terms
from asyncstore.writing import Limits, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime
    from types import TracebackType
    from uuid import UUID

    from asyncstore.folding import Decide, FoldOptions
    from asyncstore.recorded import Loaded, RecordedEvent
    from asyncstore.router import Servers
    from asyncstore.values import Aggregate, Appended, Source, Start

S = TypeVar("S")


def open(where: str | Settings | None = None, **options: Unpack[Options]) -> Store:  # noqa: A001
    """Return a store to be used in `async with`.

    `where` is a URL: `redis://`, `rediss://`, `unix://` (`valkey://` and `valkeys://` are the
    same as `redis://` and `rediss://`), `embedded://` for a throw-away server of your own, or
    `embedded:///path` for one whose data lasts; or Settings, which are then all there is.
    Otherwise each setting comes from `options` (the fields of Settings), or the environment, or
    `asyncstore.toml`, and without any of them the store is an embedded server that keeps its data
    in `.asyncstore` in the current directory.

    Reads the environment and that file; no other I/O happens before `async with`. Raises
    `ConfigurationError`, and entering may raise `StoreUnavailable`, `UnsafeServer` and, if the
    server can't give the level that the setting `durability` names, `DurabilityUnavailable`.

        async with asyncstore.open() as store:
            await store.events.append(order, [event], expected=NEW)
    """
    if isinstance(where, Settings):
        if options:
            why = "give Settings or options, not both"
            raise ConfigurationError(next(iter(options)), why)
        return Store(where)
    if where is not None and options.get("url") is not None:
        raise ConfigurationError("url", "it is given twice")
    if where is not None:
        options["url"] = where
    return Store(Settings.resolve(options))


async def examine(settings: Settings) -> checks.Report:
    """Return what `Store.check` says, also of a server that `open` refuses or can't reach.

    Nothing is written, not even into an empty store. Raises `ConfigurationError`.
    """
    store = Store(settings)
    try:
        async with AsyncExitStack() as stack:
            await store._connect(stack, partly=True)
            return await store.check()
    except ConfigurationError:
        raise
    except AsyncStoreError as error:
        return checks.unreachable(settings, error)


class Store:
    """An event store, made by `open`.

    Bound to the event loop in which it is entered, and to its process: after a fork, open another.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys = Keys(settings.key_prefix)
        self._router = Router(settings.where(), settings.timeout)
        self._cleanup = AsyncExitStack()
        self._entered = False
        self._durability = cast(Durability, settings.durability)
        self._admission = Admission(settings, self._durability)
        router, names = self._router, self._keys
        limits = Limits(
            settings.max_event_bytes, settings.max_append_bytes, settings.max_append_events
        )
        listing = Listing(router, names)
        eraser = Eraser(router, names, listing)
        reader = Reader(router, names)
        self._writer = Writer(router, names, eraser, limits, self._durability)
        self.events = Events(router, names, listing, reader, eraser, self._writer)
        self.positions = Positions(router, names)
        self.snapshots = Snapshots(router, names)
        registry = Registry(router, names, reader)
        self.subscriptions = Subscriptions(router, names, registry, self.positions)
        self._folder = Folder(router, self.events, self.snapshots)
        self._reader = reader
        self._handlers: list[Handler] = []
        self._doorbell = Doorbell(router, names, settings.timeout)
        self._sweeper = Sweeper(router, names, self._doorbell)
        self._means = Means(router, names, self._doorbell, self._sweeper, registry, self._writer)

    @property
    def settings(self) -> Settings:
        """The settings that the store was opened with."""
        return self._settings

    async def load(self, aggregate: Aggregate, *, schema_version: int | None = None) -> Loaded:
        """Return the newest snapshot of an aggregate and the events after it.

        All that is needed to go on with it, as of one moment: see `Events.load`.
        """
        return await self.events.load(aggregate, schema_version=schema_version)

    async def fold(
        self,
        aggregate: Aggregate,
        apply: Callable[[S, RecordedEvent], S],
        initial: S,
        **options: Unpack[FoldOptions],
    ) -> S:
        """Return the state of an aggregate: `apply(state, event)` for each event, from `initial`.

        Starts from the newest snapshot if there is one that can be used: one of another
        `schema_version`, or that can't be decoded or restored, is passed over with a warning, and
        all events are applied. With `snapshot_every` a new one is kept when so many events came
        after it; `dump` and `restore` say what it holds. See `FoldOptions`. `apply` must return
        the new state rather than change the old one, for `initial` is used again.

        A snapshot is the state of its aggregate: who folds the same aggregates to another state
        must name another `schema_version`, or would take the one for the other.
        """
        folded = await self._folder.fold(aggregate, Fold(apply, initial, **options))
        return folded.state

    async def update(
        self,
        aggregate: Aggregate,
        decide: Decide[S],
        apply: Callable[[S, RecordedEvent], S],
        initial: S,
        *,
        tries: int = DEFAULT_TRIES,
        idempotency_key: str | None = None,
        correlation_id: str | None = None,
        source: Source | None = None,
        **options: Unpack[FoldOptions],
    ) -> Appended:
        """Append the events that `decide(state)` returns, and decide again when others are faster.

        The state is what `fold` returns. `decide` may be async; if it returns no events, nothing
        is written. When somebody else has appended in between, the state is taken on with the
        events that were missed, which come with the refusal, and `decide` is asked again, after a
        short random pause; updates of this store take turns then. After `tries` refusals the last
        `SequenceConflict` is raised. What `decide` raises ends the update, with nothing written. It
        must not change the state that it gets. With an `idempotency_key` that was used before,
        `decide` is not asked.
        """
        trace = check_trace(idempotency_key, correlation_id, source)
        how = Fold(apply, initial, **options)
        return await self._folder.update(aggregate, decide, how, tries, trace)

    def listen(
        self,
        domain: str | None = None,
        *,
        root: str | UUID | None = None,
        edition: str | None = MAIN,
        types: Iterable[str] | None = None,
        buffer: int = DEFAULT_BUFFER,
    ) -> Listener:
        """Return what hears events as they are appended, at most once; no I/O happens before it.

        To be used in `async with`: once that is entered, all that is appended later is heard, in
        order per aggregate, as long as the connection holds. None means all domains, all roots,
        all editions, all types. An event that was deleted before it could be read is left out.

        A listener that is too slow for its `buffer` of events, or whose connection was gone for a
        while, gets `ListenerLagged` in the place of what it missed, and can go on after it.
        Entering raises `StoreUnavailable`. Who must not miss anything uses `subscribe`.

            async with store.listen("orders") as live:
                async for event in live:
                    print(event.aggregate, event.type)
        """
        wanted = Wanted.of(domain, root, edition, types)
        return Listener(self._doorbell, self._reader, wanted, buffer)

    def subscribe(
        self,
        handler: str,
        domain: str | None,
        *,
        edition: str = MAIN,
        start: Start | datetime = FIRST,
        types: Iterable[str] | None = None,
        batch: int = 64,
        lease: float = 30.0,
        sweep: float = 5.0,
        retries: int | None = 5,
        close_timeout: float = 10.0,
    ) -> Subscription:
        """Return a worker of a handler, to be used in `async with`; no I/O happens before it.

        It is given every event of the domain (None: of all domains) at least once, and in order per
        aggregate: the next event of an aggregate comes when the one before was acked. Workers and
        processes that name the same handler share its work. How far it has come is in the store,
        as its `positions`; `start` counts the first time only: `FIRST`, `NOW` for what is
        appended after a moment within the entering, or a moment: then each aggregate begins with
        its first event that happened then or later, which is looked for by reading it; where there
        is none, with what is appended next.

        Events of other types than `types` are passed over. A worker leases an aggregate for `lease`
        seconds and keeps it while it works on it; if it dies, others go on when the lease ends. It
        takes up to `batch` events at once. Appends wake it up; what was not heard is found every
        `sweep` seconds. An event that was tried and refused `retries` times more (None: for ever)
        becomes a dead letter, and its aggregate goes on. Leaving waits for deliveries that other
        tasks have in progress, at most `close_timeout` seconds, and gives the leases back.

            async with store.subscribe("projector", "orders") as sub:
                async for delivery in sub:
                    await project(delivery.event)
                    await delivery.ack()
        """
        terms = Terms(
            check_name("handler", handler),
            check_edition(edition),
            check_start("start", start),
            check_types(types),
            check_whole_number("batch", batch, least=1),
            check_seconds("lease", lease, least=0.05),
            None if retries is None else check_whole_number("retries", retries),
        )
        worker = Worker(
            self._means,
            None if domain is None else check_name("domain", domain),
            terms,
            sweep=check_seconds("sweep", sweep, least=0.01),
            close_timeout=check_seconds("close_timeout", close_timeout),
        )
        return Subscription(worker, self.subscriptions)

    def handler(
        self,
        name: str,
        domain: str | None,
        *,
        concurrency: int = 8,
        **options: Unpack[SubscribeOptions],
    ) -> Callable[[Function], Function]:
        """Return a decorator for an async function that gets the events of a handler.

        `run_handlers` runs it: up to `concurrency` events of different aggregates at once. Each is
        acked when the function returns, and while acks are under way, of at most 16 events more, it
        is called with others. If it raises, the event comes again after a pause that grows from a
        tenth of a second to half a minute. The options are those of `subscribe`.

            @store.handler("projector", "orders")
            async def project(event): ...
        """
        check_whole_number("concurrency", concurrency, least=1)
        subscribe = partial(self.subscribe, name, domain, **options)
        limit = subscribe().close_timeout  # checks the arguments, too

        def decorator(function: Function) -> Function:
            self._handlers.append(Handler(name, function, subscribe, concurrency, limit))
            return function

        return decorator

    async def run_handlers(self) -> None:
        """Run all functions that `handler` has decorated, until a SIGTERM or cancellation.

        At a SIGTERM, in the main thread, nothing more is given out; functions that are running
        finish, for at most `close_timeout` seconds, and this returns. Cancelled, it cancels them.
        Either way leases are given back, and what was not acked goes to others at once.
        """
        await run(self._handlers)

    async def check(self) -> checks.Report:
        """Look whether the server is fit for events, and return what was found.

        What it keeps on disk, what it does when memory is full, its replicas, clocks, and more:
        see `Report`. On a cluster it looks at each primary and at the cluster as a whole. What an
        ACL hides is a warning. Takes about 25 round trips, writes nothing, and scans nothing.

            report = await store.check()
            assert report.level != "bad", [f for f in report.findings if f.level == "bad"]
        """
        check = cluster_checks.check if self._keys.by_slot else checks.check
        return await check(self._router, self._keys, self._settings)

    async def __aenter__(self) -> Self:
        if self._entered:
            raise StoreClosed("a store is entered once: call asyncstore.open() again")
        self._entered = True
        async with AsyncExitStack() as stack:
            await self._connect(stack)
            await self._admission.open(self._router.nodes())
            await self._check_layout()
            self._cleanup = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._cleanup.aclose()

    def __repr__(self) -> str:
        return f"<Store {self._settings.where()} prefix={self._settings.key_prefix!r}>"

    async def _connect(self, stack: AsyncExitStack, *, partly: bool = False) -> None:
        seeds = seeds_of(self._settings)
        if seeds:
            await self._connect_to_cluster(seeds, stack, partly=partly)
            return
        url = await self._url(stack)
        node = Node(url, self._settings.where(), self._ways())
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(node.aclose)
            await node.transport.open()
            if await _is_of_cluster(node):
                await node.aclose()
                await self._connect_to_cluster([url], stack, partly=partly)
            else:
                self._use(OneServer(node), stack)
            on_failure.pop_all()

    async def _connect_to_cluster(
        self, seeds: list[str], stack: AsyncExitStack, *, partly: bool
    ) -> None:
        cluster = Cluster(seeds, self._ways(), self._admission.newcomer)
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(cluster.aclose)
            await cluster.open(partly=partly)
            self._keys.by_slot = True
            self._use(cluster, stack)
            on_failure.pop_all()

    def _use(self, servers: Servers, stack: AsyncExitStack) -> None:
        self._router.opened(servers)
        stack.push_async_callback(self._router.aclose)
        stack.push_async_callback(self._doorbell.aclose)
        stack.push_async_callback(self._sweeper.aclose)
        stack.push_async_callback(self._admission.aclose)

    def _ways(self) -> Ways:
        settings = self._settings
        return Ways(
            Bounds(settings.timeout, settings.max_in_flight, settings.max_in_flight_bytes),
            self._keys,
            self._router.tally,
            always=settings.appendfsync_always,
            is_own=settings.backend == EMBEDDED and self._durability.fsynced,
            max_replica_lag=settings.max_replica_lag if settings.read_from == REPLICA else None,
        )

    async def _url(self, stack: AsyncExitStack) -> str:
        if self._settings.backend == EMBEDDED:
            directory = embedded_directory_of(self._settings)
            return await stack.enter_async_context(embedded.running(directory))
        return server_url_of(self._settings)

    async def _check_layout(self) -> None:
        wanted = codec.layout(by_slot=self._keys.by_slot)
        key = self._keys.layout()
        found: Any = await self._router.read(forms.is_text_or_nil, "GET", key)
        if found is None:
            (found,) = await self._router.run(scripts.OPEN, [key], [wanted])
        if found == wanted:
            return
        text = found.decode(errors="replace")
        if found == codec.layout(by_slot=not self._keys.by_slot):
            origin = "one server" if self._keys.by_slot else "a cluster"
            why = (
                f"the store has layout {text!r}, that of {origin}, and {wanted.decode()!r} is "
                "needed here: move it with `asyncstore export` and `asyncstore import`"
            )
        else:
            why = (
                f"the store has layout {text!r}, and this version of asyncstore knows "
                f"{wanted.decode()!r}: use a version that knows it"
            )
        raise ConfigurationError("url", why, "the settings")


async def _is_of_cluster(node: Node) -> bool:
    """Whether a server says that it is a node of a cluster."""
    try:
        info: bytes = await node.transport.command(forms.is_text, "INFO", "cluster")
    except UnexpectedReply:  # an ACL hides it
        return False
    return b"cluster_enabled:1" in info
