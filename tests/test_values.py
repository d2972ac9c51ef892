"""Values: identity, order of ids, pickling."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from uuid import RFC_4122, uuid4

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    AsyncStoreError,
    Durability,
    Event,
    Retention,
    SequenceConflict,
    Snapshot,
)

ORDER = Aggregate("orders", "1")

ERRORS = [
    asyncstore.BranchExists(ORDER.on("what-if"), 3, 5),
    asyncstore.ConfigurationError("url", "it is none", "asyncstore.toml"),
    asyncstore.CorruptEvent("events:orders:main:{1}", 5, "it is not JSON"),
    asyncstore.CorruptPosition("positions:p:orders:main:{1}"),
    asyncstore.LeaseLost("projector", ORDER, 1),
    asyncstore.ListenerLagged(1, 2),
    asyncstore.MoveRefused(ORDER, "its main is not there"),
    asyncstore.StillBehind("projector", ORDER, 1, None),
    asyncstore.DurabilityNotReached(ORDER, 1, 2, Durability.FSYNC, False, 0),
    asyncstore.DurabilityUnavailable("redis://h", Durability.replicas(2), "it has 1 replica"),
    asyncstore.HistoryRegressed(ORDER, 3, 1),
    asyncstore.EventTooLarge("max_event_bytes", 10, 11, 0),
    asyncstore.InvalidName("root", "{", "braces"),
    asyncstore.InvalidType("data", "not JSON"),
    asyncstore.InvalidValue("limit", "negative"),
    asyncstore.OutcomeUnknown("redis://h", "it broke"),
    asyncstore.ProtectedEdition("main", "it stays"),
    asyncstore.SequenceConflict(ORDER, 3, 5),
    asyncstore.StoreClosed("it is closed"),
    asyncstore.StoreFull("redis://h"),
    asyncstore.StoreUnavailable("redis://h", "it is down"),
    asyncstore.UnexpectedReply("redis://h", "append", "WRONGTYPE"),
    asyncstore.UnsafeServer("redis://h", "allkeys-lru"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_can_be_pickled_and_say_something(error: AsyncStoreError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) != ""


@pytest.mark.parametrize(
    ("wanted", "fsynced", "on_replicas", "said"),
    [
        (Durability.FSYNC, False, 0, "reached: they are not known to be fsynced. Don't"),
        (
            Durability.replicas(2),
            False,
            1,
            "reached: 1 of 2 replicas have acknowledged them. Don't",
        ),
        (
            Durability.fsync_and_replicas(1),
            True,
            0,
            "they are fsynced on the server, and 0 of 1 replicas have acknowledged to have fsynced",
        ),
        (
            Durability.fsync_and_replicas(2),
            False,
            2,
            "not known to be fsynced on the server, and 2 of 2 replicas have",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Durability) else "",
)
def test_what_was_reached_is_said_as_the_level_has_it(
    wanted: Durability, fsynced: bool, on_replicas: int, said: str
) -> None:
    error = asyncstore.DurabilityNotReached(ORDER, 1, 2, wanted, fsynced, on_replicas)
    assert said in str(error)


def test_every_error_is_covered_here() -> None:
    exported = {getattr(asyncstore, name) for name in asyncstore.__all__}
    errors = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Exception)}
    assert errors - {AsyncStoreError} == {type(error) for error in ERRORS}
    assert all(issubclass(error, AsyncStoreError) for error in errors)


def test_a_conflict_about_any_names_it() -> None:
    error = pickle.loads(pickle.dumps(SequenceConflict(ORDER, ANY, 5)))  # noqa: S301
    assert error.expected is ANY
    assert "ANY" in str(error)


def test_aggregates_are_values() -> None:
    assert Aggregate("orders", "1", edition="main") == ORDER
    assert {ORDER: 1}[Aggregate("orders", "1")] == 1
    assert ORDER.on("what-if") == Aggregate("orders", "1", "what-if") != ORDER
    assert pickle.loads(pickle.dumps(ORDER)) == ORDER  # noqa: S301
    with pytest.raises(AttributeError):
        ORDER.domain = "carts"  # type: ignore[misc]


@pytest.mark.parametrize("part", ["domain", "root", "edition"])
def test_aggregates_that_differ_in_one_part_have_hashes_of_their_own(part: str) -> None:
    parts = {"domain": "orders", "root": "settings", "edition": "main"}
    places = [Aggregate(**{**parts, part: f"tenant-{n}"}) for n in range(100)]
    assert len(set(map(hash, places))) == 100


def test_ids_are_in_order_and_carry_their_time() -> None:
    before = datetime.now(UTC).timestamp()
    ids = [Event("Made", None).id for _ in range(5000)]
    after = datetime.now(UTC).timestamp()
    assert ids == sorted(ids)
    assert len(set(ids)) == 5000
    for made in ids:
        assert (made.version, made.variant) == (7, RFC_4122)
        assert before - 0.001 <= (made.int >> 80) / 1000 <= after + 1


def test_a_given_id_stays() -> None:
    given = uuid4()
    assert Event("Made", None, id=given).id == given


def test_states_are_not_shown() -> None:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    assert "s3cret" not in repr(Snapshot(1, "s3cret", Retention.DEFAULT, moment))


def test_constants() -> None:
    assert NEW == 0
    assert repr(ANY) == str(ANY) == "ANY"
