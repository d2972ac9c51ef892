"""asyncstore: the event store you await, on Redis and Valkey."""

from asyncstore.checks import Finding, Report
from asyncstore.deliveries import Bundle, Delivery
from asyncstore.errors import (
    AsyncStoreError,
    BranchExists,
    ConfigurationError,
    CorruptEvent,
    CorruptPosition,
    DurabilityNotReached,
    DurabilityUnavailable,
    EventTooLarge,
    HistoryRegressed,
    InvalidName,
    InvalidType,
    InvalidValue,
    LeaseLost,
    ListenerLagged,
    MoveRefused,
    OutcomeUnknown,
    ProtectedEdition,
    SequenceConflict,
    StillBehind,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
    UnexpectedReply,
    UnsafeServer,
)
from asyncstore.events import Events
from asyncstore.folding import FoldOptions
from asyncstore.listening import Listener
from asyncstore.names import MAIN
from asyncstore.positions import Positions
from asyncstore.progress import DeadLetter, Progress, Subscriptions
from asyncstore.recorded import EventBook, Loaded, RecordedEvent
from asyncstore.settings import Settings
from asyncstore.snapshots import Snapshots
from asyncstore.store import Store, open
from asyncstore.subscriptions import SubscribeOptions, Subscription
from asyncstore.values import (
    ANY,
    FIRST,
    NEW,
    NOW,
    Aggregate,
    Appended,
    Durability,
    Event,
    Expected,
    Retention,
    Snapshot,
    Source,
    Start,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - grouped by topic
    # the store
    "open",
    "Settings",
    "Store",
    "Events",
    "Positions",
    "Snapshots",
    "Listener",
    "Subscription",
    "Bundle",
    "Delivery",
    "SubscribeOptions",
    "Subscriptions",
    "Progress",
    "DeadLetter",
    "Report",
    "Finding",
    # values
    "Aggregate",
    "Event",
    "RecordedEvent",
    "EventBook",
    "Appended",
    "Loaded",
    "Snapshot",
    "FoldOptions",
    "Source",
    "Retention",
    "Durability",
    "Expected",
    "ANY",
    "MAIN",
    "NEW",
    "Start",
    "FIRST",
    "NOW",
    # errors
    "AsyncStoreError",
    "BranchExists",
    "ConfigurationError",
    "CorruptEvent",
    "CorruptPosition",
    "DurabilityNotReached",
    "DurabilityUnavailable",
    "EventTooLarge",
    "HistoryRegressed",
    "InvalidName",
    "InvalidType",
    "InvalidValue",
    "MoveRefused",
    "LeaseLost",
    "ListenerLagged",
    "OutcomeUnknown",
    "ProtectedEdition",
    "SequenceConflict",
    "StillBehind",
    "StoreClosed",
    "StoreFull",
    "StoreUnavailable",
    "UnexpectedReply",
    "UnsafeServer",
]
