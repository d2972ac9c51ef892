"""Objects become events and come back, by the names of their types: no server is needed."""

from __future__ import annotations

import dataclasses
import enum
import logging
import pickle
import re
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from asyncstore import (
    Aggregate,
    AsyncStoreError,
    ConfigurationError,
    Event,
    InvalidType,
    InvalidValue,
    RecordedEvent,
    codec,
)
from asyncstore.keys import Places
from asyncstore.recorded import event_of_member
from asyncstore.typed import (
    Forgotten,
    ForgottenEvent,
    InvalidEvent,
    Policy,
    Registry,
    UnknownEvent,
    UnreadableEvent,
    kinds,
)

ORDER = Aggregate("orders", "1")
MARK = "5ecret-marker"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal


@dataclass(frozen=True)
class Placed:
    total: int
    when: datetime
    lines: tuple[Line, ...] = ()
    by: uuid.UUID | None = None
    colour: Colour = Colour.RED
    tags: frozenset[str] = frozenset()
    notes: dict[str, int] = field(default_factory=dict)
    counts: dict[int, bytes] = field(default_factory=dict)
    took: timedelta | None = None


@pydantic.dataclasses.dataclass(frozen=True)
class PydanticPlaced:
    total: pydantic.PositiveInt
    notes: dict[str, int] = field(default_factory=dict)


class ModelPlaced(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    total: int = pydantic.Field(alias="TOTAL")
    when: pydantic.AwareDatetime
    notes: dict[str, int] = {}
    colours: tuple[Colour, ...] = ()


class StructPlaced(msgspec.Struct, frozen=True, tag="placed"):
    total: int
    when: datetime
    lines: list[Line] = []
    notes: dict[str, int] = {}


@dataclass
class Address:
    street: str


@dataclass
class ForeignAddress(Address):
    country: str


@dataclass
class Held:
    what: Any


@dataclass(eq=False)
class NoEquality:
    number: int


class AddressStruct(msgspec.Struct):
    street: str


class ForeignStruct(AddressStruct):
    country: str


class StructHeld(msgspec.Struct):
    address: AddressStruct


class AddressModel(pydantic.BaseModel):
    street: str


class ForeignModel(AddressModel):
    country: str


class Partly(pydantic.BaseModel):
    left_out: int = pydantic.Field(default=0, exclude=True)


class ModelHeld(pydantic.BaseModel, extra="allow"):
    address: AddressModel | None = None
    secret: pydantic.SecretStr | None = None
    partly: Partly | None = None


def protobuf_class() -> Any:
    """A class as protoc makes them: a total and a currency."""
    file = descriptor_pb2.FileDescriptorProto(name="placed.proto", package="shop", syntax="proto3")
    message = file.message_type.add(name="ProtoPlaced")
    message.field.add(name="total", number=1, type="TYPE_INT64", label="LABEL_OPTIONAL")
    message.field.add(name="currency", number=2, type="TYPE_STRING", label="LABEL_OPTIONAL")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.ProtoPlaced"))


ProtoPlaced = protobuf_class()

OBJECTS: dict[str, Any] = {
    "dataclass": Placed(
        12,
        NOON,
        (Line("a", Decimal("1.10")),),
        uuid.UUID(int=7),
        tags=frozenset("x"),
        counts={7: b"\x00\xff"},
        took=timedelta(seconds=1.5),
    ),
    "pydantic-dataclass": PydanticPlaced(12, {"a": 1}),
    "pydantic": ModelPlaced(TOTAL=12, when=NOON, notes={"a": 1}, colours=(Colour.RED,)),
    "msgspec": StructPlaced(12, NOON, [Line("a", Decimal("2.5"))], {"a": 1}),
    "protobuf": ProtoPlaced(total=12, currency="EUR"),
}


def stored(event: Event, *, place: Aggregate = ORDER, sequence: int = 0) -> RecordedEvent:
    """The event as a store gives it back: through its stored form."""
    _, rest = codec.encode_event(event)
    return event_of_member(place, Places(""), b"[%d,0," % sequence + rest)


def recorded(name: str, data: Any, **metadata: Any) -> RecordedEvent:
    return stored(Event(name, data, metadata=metadata))


class TestKinds:
    @pytest.mark.parametrize("kind", OBJECTS)
    def test_come_back(self, kind: str) -> None:
        shop = Registry()
        value = OBJECTS[kind]
        shop.event("Placed")(type(value))
        event = shop.to_event(value, metadata={"user": "u1"}, time=NOON, id=uuid.UUID(int=1))
        assert (event.type, event.metadata, event.time) == ("Placed", {"user": "u1"}, NOON)
        found = shop.from_event(stored(event))
        assert found == value
        assert type(found) is type(value)

    def test_stored_form_is_what_one_would_write(self) -> None:
        shop = Registry()
        shop.event("Placed")(ModelPlaced)
        event = shop.to_event(OBJECTS["pydantic"])
        assert event.metadata is None
        assert event.data["total"] == 12, "by the name of the field, not by its alias"
        assert shop.from_event(recorded("Placed", event.data)) == OBJECTS["pydantic"]

    def test_protobuf_is_stored_as_its_bytes(self) -> None:
        shop = Registry()
        shop.event("Placed")(ProtoPlaced)
        event = shop.to_event(OBJECTS["protobuf"])
        assert event.data == OBJECTS["protobuf"].SerializeToString()

    @pytest.mark.parametrize(
        ("value", "fields"),
        [
            (Placed(MARK, NOON), "total"),  # type: ignore[arg-type]  # on purpose
            (Placed(1, NOON, (Line("a", MARK),)), "lines[0].price"),  # type: ignore[arg-type]
            (Placed(1, NOON, notes={MARK: MARK}), "notes[...]"),  # type: ignore[dict-item]
            (Placed(1, NOON, colour=MARK), "colour"),  # type: ignore[arg-type]
            (Placed(1, object()), ""),  # type: ignore[arg-type]
            (StructPlaced(MARK, NOON), "total"),  # type: ignore[arg-type]
            (ModelPlaced.model_construct(total=MARK, when=NOON), ""),
            (ModelPlaced(TOTAL=1, when=NOON).model_copy(update={"notes": {MARK: None}}), "notes"),
        ],
        ids=[
            "dataclass",
            "nested",
            "key",
            "enum",
            "no-json",
            "msgspec",
            "pydantic",
            "pydantic-nested",
        ],
    )
    def test_what_would_not_come_back_is_refused(self, value: Any, fields: str) -> None:
        shop = Registry()
        shop.event("Placed", version=1)(type(value))
        with pytest.raises(InvalidEvent, match="Placed version 1 can't be stored") as caught:
            shop.to_event(value)
        assert caught.value.fields == fields
        assert_shows_no_data(caught.value)

    @pytest.mark.parametrize(
        ("value", "fields"),
        [
            (Held(ForeignAddress("Elm Street", "DE")), "what"),
            (Held(NOON), "what"),
            (Held({"at": [NOON]}), "what"),
            (StructHeld(ForeignStruct("Elm Street", "DE")), "address"),
            (ModelHeld(address=ForeignModel(street="Elm Street", country="DE")), "address"),
            (ModelHeld(secret=pydantic.SecretStr(MARK)), "secret"),
            (ModelHeld(partly=Partly(left_out=7)), "partly"),
            (ModelHeld.model_validate({"more": NOON}), "__pydantic_extra__"),
        ],
        ids=["subclass", "any", "within", "struct", "model", "masked", "excluded", "extra"],
    )
    def test_what_would_come_back_as_something_else_is_refused(
        self, value: Any, fields: str
    ) -> None:
        shop = Registry()
        shop.event("Placed")(type(value))
        with pytest.raises(InvalidEvent, match="it would come back as something else") as caught:
            shop.to_event(value)
        assert caught.value.fields == fields
        assert_shows_no_data(caught.value)

    @pytest.mark.parametrize(
        ("wanted", "what"),
        [
            (Sequence[int], (1, 2)),
            (dict[str, list[Sequence[int]]], {"lines": [(1, 2)]}),
            (datetime, datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))),
            (NoEquality, NoEquality(7)),
        ],
        ids=["tuple", "within", "zone", "no-equality"],
    )
    def test_what_is_as_good_as_before_is_taken(self, wanted: Any, what: Any) -> None:
        made = dataclasses.make_dataclass("Held", [("what", wanted)])
        shop = Registry()
        shop.event("Placed")(made)
        assert shop.from_event(stored(shop.to_event(made(what)))) != made(what), "see to_event"

    def test_nan_in_json_is_refused(self) -> None:
        @dataclass
        class Weighed:
            kilos: float

        shop = Registry()
        shop.event("Weighed")(Weighed)
        with pytest.raises((InvalidEvent, InvalidValue)):
            codec.encode_event(shop.to_event(Weighed(float("nan"))))

    @pytest.mark.parametrize(
        ("kind", "data", "fields"),
        [
            (Placed, {"total": MARK, "when": NOON.isoformat()}, "total"),
            (Placed, {"total": 1, "when": MARK}, "when"),
            (Placed, {"total": 1}, ""),
            (Placed, [MARK], ""),
            (PydanticPlaced, {"total": -1}, "total"),
            (PydanticPlaced, {"total": 1, "notes": {MARK: MARK}}, "notes"),
            (ModelPlaced, {"total": 1, "when": NOON.isoformat(), MARK: 1}, ""),
            (ModelPlaced, {"total": "1", "when": MARK}, "total, when"),
            (StructPlaced, {"type": MARK, "total": 1}, "type"),
            (ProtoPlaced, b"\xff\xff" + MARK.encode(), ""),
            (ProtoPlaced, {"total": MARK}, ""),
        ],
        ids=lambda part: part.__name__ if isinstance(part, type) else None,
    )
    def test_data_that_are_not_what_the_class_takes(
        self, kind: type, data: Any, fields: str
    ) -> None:
        shop = Registry()
        shop.event("Placed")(kind)
        event = stored(Event("Placed", data), sequence=3)
        with pytest.raises(UnreadableEvent, match="orders/1, sequence 3: Placed version 1") as bad:
            shop.from_event(event)
        assert bad.value.fields == fields
        assert_shows_no_data(bad.value)

    def test_a_library_is_imported_for_its_own_classes_only(self) -> None:
        code = """
import sys
from dataclasses import dataclass
import asyncstore
assert "asyncstore.typed" not in sys.modules
libraries = {"msgspec", "pydantic", "google.protobuf", "cryptography"}
libraries -= sys.modules.keys()  # redis-py may use one
from asyncstore.typed import Bodies, Registry, TypedStore, Zlib
Bodies(compressions=[Zlib()])
assert not libraries & sys.modules.keys()
@Registry().event("Placed")
@dataclass
class Placed:
    total: int
assert libraries & sys.modules.keys() == {"msgspec"}
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_a_library_that_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "msgspec", None)
        with pytest.raises(ConfigurationError, match=r"Placed in the registry: .*typed\]"):
            Registry().event("Placed")(Placed)


class TestRegistering:
    @pytest.mark.parametrize("cls", [int, dict, str, Colour, uuid.UUID, Registry])
    def test_a_class_of_no_known_kind(self, cls: type) -> None:
        with pytest.raises(InvalidType, match=f"{cls.__name__} is none of them"):
            Registry().event("Placed")(cls)

    @pytest.mark.parametrize("value", [Placed(1, NOON), "Placed", None], ids=["object", "str", "-"])
    def test_no_class(self, value: Any) -> None:
        with pytest.raises(InvalidType, match="a class is wanted"):
            Registry().event("Placed")(value)

    def test_what_could_not_be_read_back(self) -> None:
        class Opaque:
            pass

        @dataclass
        class Nested:
            what: list[Opaque]

        class Model(pydantic.BaseModel):
            model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
            what: Opaque

        class Struct(msgspec.Struct):
            what: Callable[[], None]

        class Partly(pydantic.BaseModel):
            left: int = pydantic.Field(default=0, exclude=True)

        @dataclass
        class Initialised:
            what: dataclasses.InitVar[int]

        @dataclass
        class Local:
            what: Undefined  # type: ignore[name-defined]  # noqa: F821

        for cls in (Nested, Model, Struct, Partly, Initialised, Local):
            with pytest.raises(InvalidType, match=f"{cls.__name__} can't be read back"):
                Registry().event("Placed")(cls)

    def test_a_type_has_one_class_and_a_class_one_type(self) -> None:
        shop = Registry()
        shop.event("Placed")(Placed)
        with pytest.raises(InvalidValue, match="'Placed' is registered already"):
            shop.event("Placed", version=2, upcasters={1: dict})(ModelPlaced)
        with pytest.raises(InvalidValue, match="Placed is registered already, for 'Placed'"):
            shop.event("Ordered")(Placed)

    @pytest.mark.parametrize(
        ("version", "steps", "why"),
        [
            (2, {}, "none from version 1 to 2"),
            (4, {1: dict, 3: dict}, "none from version 2 to 3"),
            (2, {1: dict, 2: dict}, "each version before 2"),
            (1, {0: dict}, "each version before 1"),
            (2, {1: "dict"}, "a function is wanted for version 1"),
        ],
        ids=["none", "gap", "too-many", "zero", "no-function"],
    )
    def test_a_chain_with_gaps(self, version: int, steps: Any, why: str) -> None:
        with pytest.raises((InvalidValue, InvalidType), match=why):
            Registry().event("Placed", version=version, upcasters=steps)

    @pytest.mark.parametrize(
        "options",
        [{"name": ""}, {"name": 7}, {"version": 0}, {"version": True}, {"subject": "customer"}],
        ids=["empty", "number", "zero", "bool", "subject"],
    )
    def test_bad_options(self, options: Any) -> None:
        with pytest.raises((InvalidValue, InvalidType)):
            Registry().event(**{"name": "Placed", **options})

    @pytest.mark.parametrize("argument", ["unknown", "forgotten"])
    def test_bad_policies(self, argument: str) -> None:
        options: Any = {argument: "skip"}
        with pytest.raises(InvalidType, match=f"{argument}: a Policy is wanted"):
            Registry(**options)

    def test_objects_of_other_classes(self) -> None:
        @dataclass(frozen=True)
        class Special(Placed):
            pass

        shop = Registry()
        shop.event("Placed")(Placed)
        for value in (Special(1, NOON), None, {"total": 1}):
            with pytest.raises(InvalidType, match=f"{type(value).__name__} is not registered"):
                shop.to_event(value)

    @pytest.mark.parametrize("metadata", [{"$version": 7}, {"$mine": 1}, ["x"]], ids=str)
    def test_metadata_with_our_names(self, metadata: Any) -> None:
        shop = Registry()
        shop.event("Placed")(Placed)
        with pytest.raises((InvalidValue, InvalidType), match="metadata"):
            shop.to_event(Placed(1, NOON), metadata=metadata)


@dataclass(frozen=True)
class Paid:
    cents: int
    currency: str


def in_cents(data: dict[str, Any]) -> dict[str, Any]:
    return {"cents": data["euros"] * 100}


def with_currency(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "currency": "EUR"}


class TestVersions:
    @pytest.fixture
    def shop(self) -> Registry:
        shop = Registry()
        shop.event("Paid", version=3, upcasters={1: in_cents, 2: with_currency})(Paid)
        return shop

    @pytest.mark.parametrize(
        ("data", "metadata"),
        [
            ({"euros": 7}, {}),
            ({"euros": 7}, {"$version": 1, "user": "u1"}),
            ({"cents": 700}, {"$version": 2}),
            ({"cents": 700, "currency": "EUR"}, {"$version": 3}),
        ],
        ids=["by-hand", "1", "2", "3"],
    )
    def test_each_becomes_the_newest(self, shop: Registry, data: Any, metadata: Any) -> None:
        assert shop.from_event(recorded("Paid", data, **metadata)) == Paid(700, "EUR")

    def test_the_version_stands_in_the_metadata(self, shop: Registry) -> None:
        given = {"user": "u1"}
        event = shop.to_event(Paid(1, "EUR"), metadata=given)
        assert event.metadata == {"user": "u1", "$version": 3}
        assert given == {"user": "u1"}

    @pytest.mark.parametrize("version", [0, -1, "2", 2.0, True, None, [MARK]], ids=repr)
    def test_a_version_that_is_none(self, shop: Registry, version: Any) -> None:
        with pytest.raises(UnreadableEvent, match=r"its \$version is not a number") as caught:
            shop.from_event(recorded("Paid", {}, **{"$version": version}))
        assert_shows_no_data(caught.value)

    def test_an_upcaster_that_fails(self, shop: Registry) -> None:
        event = recorded("Paid", {MARK: MARK})
        with pytest.raises(UnreadableEvent, match="KeyError in its upcaster from version 1") as bad:
            shop.from_event(event)
        assert_shows_no_data(bad.value)

    def test_upcasters_of_protobuf_get_bytes(self) -> None:
        shop = Registry()
        seen: list[Any] = []

        def from_json(data: Any) -> bytes:
            seen.append(data)
            return bytes(ProtoPlaced(total=data["total"], currency="EUR").SerializeToString())

        def add_one(data: bytes) -> bytes:
            old = ProtoPlaced.FromString(data)
            return bytes(ProtoPlaced(total=old.total + 1, currency="EUR").SerializeToString())

        shop.event("Placed", version=3, upcasters={1: from_json, 2: add_one})(ProtoPlaced)
        assert shop.from_event(recorded("Placed", {"total": 4})).total == 5
        assert seen == [{"total": 4}]


class TestPolicies:
    def test_unknown_types_fail_by_default(self) -> None:
        event = stored(Event("Cancelled", {MARK: 1}), sequence=5)
        with pytest.raises(UnknownEvent, match="sequence 5: Cancelled version 1: no class") as bad:
            Registry().from_event(event)
        assert (bad.value.type, bad.value.newest) == ("Cancelled", None)
        assert_shows_no_data(bad.value)

    def test_newer_versions_fail_by_default(self) -> None:
        shop = Registry()
        shop.event("Placed", version=2, upcasters={1: dict})(Placed)
        with pytest.raises(UnknownEvent, match="version 2 is the newest") as caught:
            shop.from_event(recorded("Placed", {MARK: 1}, **{"$version": 3}))
        assert (caught.value.version, caught.value.newest) == (3, 2)

    def test_kept_as_they_are(self) -> None:
        event = recorded("Cancelled", {"why": "late"})
        assert Registry(unknown=Policy.KEEP).from_event(event) is event

    @pytest.mark.parametrize("policy", [Policy.KEEP, Policy.SKIP])
    def test_what_is_unknown_is_not_decoded(self, policy: Policy) -> None:
        _, rest = codec.encode_event(Event("Cancelled", {}))
        broken = event_of_member(ORDER, Places(""), b"[0,0," + rest[:-1])
        kept = broken if policy is Policy.KEEP else None
        assert Registry(unknown=policy).from_event(broken) is kept

    def test_passed_over_with_a_report(self, caplog: pytest.LogCaptureFixture) -> None:
        shop = Registry(unknown=Policy.SKIP)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert shop.from_event(recorded("Cancelled", {MARK: 1})) is None
        assert shop.skipped == {"Cancelled": 3}
        assert caplog.text.count("events of type Cancelled are passed over") == 1
        assert MARK not in caplog.text

    @pytest.mark.parametrize("policy", [Policy.KEEP, Policy.SKIP, Policy.FAIL])
    def test_forgotten(self, policy: Policy) -> None:
        gone = Forgotten("Moved", "c-17")
        event = RecordedEvent(
            aggregate=ORDER, sequence=2, type="Moved", data=gone, metadata={"$version": 2},
            id=uuid.UUID(int=1), time=NOON,
        )  # fmt: skip
        shop = Registry(forgotten=policy)
        shop.event("Moved", version=2, upcasters={1: dict})(Placed)
        if policy is Policy.FAIL:
            with pytest.raises(ForgottenEvent, match="Moved version 2: its subject, c-17, has"):
                shop.from_event(event)
        else:
            assert shop.from_event(event) == (gone if policy is Policy.KEEP else None)
        assert shop.skipped["Moved"] == (policy is Policy.SKIP)

    def test_a_body_that_went_through_something(self) -> None:
        shop = Registry()
        shop.event("Placed")(Placed)
        with pytest.raises(UnreadableEvent, match="compressed or secret: read it by a TypedStore"):
            shop.from_event(recorded("Placed", b"\x00", **{"$body": "json+zlib"}))


@pytest.mark.parametrize(
    "error",
    [
        InvalidEvent("Placed", 2, "KeyError", "total"),
        UnreadableEvent(ORDER, 1, "Placed", 2, "KeyError"),
        UnknownEvent(ORDER, 1, "Placed", 2, None),
        ForgottenEvent(ORDER, 1, "Placed", 2, "c-17"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error: AsyncStoreError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_msgspec_shows_paths_as_we_take_them_apart() -> None:
    blame = kinds.kind_of(Placed).blame
    assert blame(ValueError(f"{MARK} - at `{MARK} {MARK}`")) == ""
    assert blame(ValueError(MARK)) == ""


def assert_shows_no_data(error: Exception) -> None:
    assert MARK not in f"{error} {error!r}"
    shown = "".join(traceback.format_exception(error))
    assert not re.search(rf"^\w.*{MARK}", shown, re.M), "neither do the errors that it came of"
