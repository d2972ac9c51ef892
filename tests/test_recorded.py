"""An event as it is read: a value, whatever of it has been decoded."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime
from uuid import UUID

import pytest

from asyncstore import Aggregate, Event, RecordedEvent, codec
from asyncstore.keys import Places
from asyncstore.recorded import event_of_member

ORDER = Aggregate("orders", "1")
EVENT = Event(
    "OrderPlaced",
    {"total": "s3cret"},
    metadata={"user": "hush"},
    id=UUID(int=7),
    time=datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
)


def read() -> RecordedEvent:
    time, rest = codec.encode_event(EVENT)
    return event_of_member(ORDER, Places("events:orders"), b"[3,%s,%s" % (time, rest))


def made() -> RecordedEvent:
    assert EVENT.time is not None
    return RecordedEvent(
        aggregate=ORDER,
        sequence=3,
        type="OrderPlaced",
        data={"total": "s3cret"},
        metadata={"user": "hush"},
        id=EVENT.id,
        time=EVENT.time,
    )


def test_it_has_what_was_appended() -> None:
    event = read()
    assert (event.aggregate, event.sequence, event.type) == (ORDER, 3, EVENT.type)
    assert (event.data, event.metadata) == (EVENT.data, EVENT.metadata)
    assert (event.id, event.time) == (EVENT.id, EVENT.time)
    assert (event.correlation_id, event.source, event.idempotency_key) == (None, None, None)


def test_what_was_decoded_is_decoded_once() -> None:
    event = read()
    assert event.data is event.data
    assert event.metadata is event.metadata
    assert event.time is event.time
    assert event.id is event.id


def test_events_are_equal_by_what_they_say() -> None:
    assert read() == made()
    assert hash(read()) == hash(made())
    assert read() != 3
    other = made()
    other.data["total"] = 5
    assert read() != other


def test_events_whose_data_are_broken_can_be_compared() -> None:
    member = b'[3,0,"00000000000000000000000000000000","A"]\nnot json'
    places = Places("events:orders")
    event, same = (event_of_member(ORDER, places, member) for _ in range(2))
    assert event == same
    assert event != read()
    assert event in {same}


@pytest.mark.parametrize("decoded", [False, True])
def test_copies_and_pickles_are_equal(decoded: bool) -> None:
    event = read()
    if decoded:
        _ = event.data
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(event, protocol)) == event  # noqa: S301
    assert copy.copy(event) == copy.deepcopy(event) == event


@pytest.mark.parametrize("name", ["sequence", "type", "data", "time", "nothing_like_it"])
def test_it_cannot_be_changed(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(read(), name, 1)


def test_its_repr_keeps_what_was_appended_to_itself() -> None:
    for event in (read(), made()):
        assert "s3cret" not in repr(event)
        assert "hush" not in repr(event)
        assert "sequence=3" in repr(event)
        assert "OrderPlaced" in repr(event)
