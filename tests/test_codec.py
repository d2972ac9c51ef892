"""The stored form: whatever goes in comes out, and nothing else is taken for an event."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncstore import Aggregate, CorruptEvent, Event, InvalidName, codec
from asyncstore.keys import Keys, Places
from asyncstore.names import check_name, check_root
from asyncstore.recorded import event_of_member

ORDER = Aggregate("orders", "1")

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)
moments = st.datetimes(
    datetime(1, 1, 2),
    datetime(9999, 12, 30),
    timezones=st.timezones() | st.just(UTC),
)
events = st.builds(
    Event,
    texts.filter(bool),
    json_values | st.binary(),
    metadata=st.none() | st.dictionaries(texts, json_values),
    id=st.uuids(),
    time=moments,
)


def member_of(event: Event, sequence: int) -> bytes:
    time, rest = codec.encode_event(event)
    return b"[%d,%s,%s" % (sequence, time, rest)


@given(events, st.integers(0, 2**53 - 1))
def test_an_event_comes_back(event: Event, sequence: int) -> None:
    member = member_of(event, sequence)
    recorded = event_of_member(ORDER, Places("events"), member)
    assert recorded.sequence == sequence
    assert recorded.type == event.type
    assert recorded.data == event.data
    assert json_kind(recorded.data) == json_kind(event.data)
    assert recorded.metadata == (event.metadata or {})
    assert event.time is not None
    assert (recorded.id, recorded.time) == (event.id, event.time.astimezone(UTC))


def json_kind(value: Any) -> Any:
    """The types all the way down: 1, 1.0 and True are equal, but not the same."""
    if isinstance(value, dict):
        return {key: json_kind(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_kind(item) for item in value]
    return type(value)


@given(events)
def test_the_header_is_one_line_of_json_and_the_body_is_opaque(event: Event) -> None:
    head, _, body = member_of(event, 7).partition(b"\n")
    header = json.loads(head)
    assert header[0] == 7
    assert header[2:4] == [event.id.hex, event.type]
    if isinstance(event.data, bytes):
        assert body == event.data
    else:
        assert json.loads(body) == event.data


@given(st.binary() | texts.map(str.encode))
def test_nothing_else_is_an_event(member: bytes) -> None:
    with pytest.raises(codec.Undecodable):
        codec.decode_member(member)


@pytest.mark.parametrize(
    "member",
    [
        b'[0,0,"00000000000000000000000000000000","A"]',
        b'["0",0,"00000000000000000000000000000000","A"]\n1',
        b'[0.5,0,"00000000000000000000000000000000","A"]\n1',
        b'[0,0,"no uuid","A"]\n1',
        b'[0,0,"00000000 00000000 00000000 00000000","A"]\n1',
        b'[0,0,"00 00 00 00 00 00 00 00 00 00 00","A"]\n1',
        b'[0,0,"-0000000000000000000000000000000","A"]\n1',
        b'[0,0,"000000000000000000000000000000000","A"]\n1',
        b'[0,-99999999999999999,"00000000000000000000000000000000","A"]\n1',
        b'[0,0,"00000000000000000000000000000000",5]\n1',
        b'[0,0,"00000000000000000000000000000000","A",[]]\n1',
        b'[0,0,"00000000000000000000000000000000","A",{"encoding":"zip"}]\n1',
        b'[0,0,"00000000000000000000000000000000","A",{"encoding":5}]\n1',
        b'[0,0,"00000000000000000000000000000000","A",{"metadata":5}]\n1',
        b'[0,999999999999999999,"00000000000000000000000000000000","A"]\n1',
        b'{"sequence":0}\n1',
        b"[]\n1",
    ],
)
def test_near_misses_are_not_events(member: bytes) -> None:
    with pytest.raises(codec.Undecodable):
        codec.decode_member(member)


@pytest.mark.parametrize("body", [b"", b"not json", b"\xff"])
def test_a_body_is_decoded_when_it_is_asked_for(body: bytes) -> None:
    member = b'[4,0,"00000000000000000000000000000000","A"]\n' + body
    recorded = event_of_member(ORDER, Places("events:orders"), member)
    assert (recorded.sequence, recorded.type) == (4, "A")
    for _ in range(2):
        with pytest.raises(CorruptEvent) as caught:
            _ = recorded.data
        assert (caught.value.key, caught.value.sequence) == ("events:orders", 4)


@given(moments)
def test_moments_are_exact(moment: datetime) -> None:
    # In UTC: a moment in the gap of a clock change equals nothing in another zone (PEP 495).
    assert codec.from_microseconds(codec.to_microseconds(moment)) == moment.astimezone(UTC)


def test_known_moments() -> None:
    moment = datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert codec.to_microseconds(moment) == 1709148723000004
    assert codec.to_microseconds(datetime(1970, 1, 1, tzinfo=UTC)) == 0


def test_the_stored_form_is_the_documented_one() -> None:
    event = Event(
        "OrderPlaced",
        {"total": 12},
        id=UUID("0193a4c7f2e07cc38e1d2f3a4b5c6d7e"),
        time=datetime(2024, 11, 23, 7, 4, 38, 901234, tzinfo=UTC),
    )
    member = b'[12,1732345478901234,"0193a4c7f2e07cc38e1d2f3a4b5c6d7e","OrderPlaced"]\n{"total":12}'
    assert member_of(event, 12) == member
    raw = Event("Raw", b"\xff", metadata={"by": "u1"}, id=event.id)
    assert codec.encode_event(raw) == (
        b"",
        b'"0193a4c7f2e07cc38e1d2f3a4b5c6d7e","Raw",'
        b'{"encoding":"bytes","metadata":{"by":"u1"}}]\n\xff',
    )


# Names and keys

names = st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True)
roots = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="{}"), min_size=1, max_size=64
)
aggregates = st.builds(Aggregate, names, roots, names)


@given(names, roots)
def test_what_the_rules_allow_is_taken(name: str, root: str) -> None:
    assert check_name("domain", name) == name
    assert check_root(root) == root


@given(st.text(max_size=200))
def test_names_are_taken_or_refused_by_the_rules(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    good = 0 < len(text) <= 128 and set(text) <= allowed
    try:
        check_name("domain", text)
    except InvalidName:
        assert not good
    else:
        assert good


@given(aggregates, aggregates)
def test_two_aggregates_never_share_a_key(one: Aggregate, other: Aggregate) -> None:
    keys = Keys("p:")
    all_keys = [
        {keys.events(a), keys.handlers(a), keys.position("h", a), *keys.snapshots(a)}
        for a in (one, other)
    ]
    if one == other:
        assert all_keys[0] == all_keys[1]
    else:
        assert not all_keys[0] & all_keys[1]


@given(aggregates, names)
def test_the_root_is_the_hash_tag_of_every_key(aggregate: Aggregate, handler: str) -> None:
    keys = Keys("p:")
    for key in (
        keys.events(aggregate),
        keys.handlers(aggregate),
        keys.position(handler, aggregate),
        *keys.snapshots(aggregate),
    ):
        assert key[key.index("{") + 1 : key.index("}")] == aggregate.root


def test_the_keys_are_the_documented_ones() -> None:
    keys, order = Keys("shop:"), Aggregate("orders", "8f1c")
    assert keys.events(order) == "shop:events:orders:main:{8f1c}"
    assert keys.position("projector", order) == "shop:positions:projector:orders:main:{8f1c}"
    assert keys.snapshots(order)[0] == "shop:snapshots:orders:main:{8f1c}"
