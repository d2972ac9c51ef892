"""Which kinds of classes can be events, and how each becomes plain data and comes back.

Plain data are what the store keeps: JSON, or bytes. A class brings its library with it, so a
library is looked for only where a class of it may be, and imported only when one is. Dataclasses
have no library that reads them back: msgspec does.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asyncstore import codec
from asyncstore.errors import ConfigurationError, InvalidType

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic.fields import FieldInfo

_NO_EQUALITY: Final[Any] = object.__eq__
_PATH: Final = re.compile(r".* - at `\$\.?([\w.\[\]]*)`", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Kind:
    """How objects of one class become plain data and come back.

    `blame` names the fields that an error of `load` is about; never what they hold. `fields` are
    those that could come back changed: a library may write less than there is, or read back
    something else.
    """

    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]
    blame: Callable[[Exception], str]
    fields: tuple[str, ...]

    def changed(self, value: Any, back: Any) -> list[str]:
        """Return the names of the fields that have come back as something else."""
        if value == back:
            return []
        return [name for name in self.fields if not _is_same(_of(value, name), _of(back, name))]


def kind_of(cls: type) -> Kind:
    """Return how a class is dumped and loaded.

    Raises `InvalidType` for a class of no known kind, or one that could not be read back, and
    `ConfigurationError` where the library that it takes is missing.
    """
    for is_of, make in _KINDS:
        if is_of(cls):
            try:
                return make(cls)
            except ImportError as error:
                raise _missing(cls, error) from None
            except Exception as error:
                # What a library says of a class holds no event's data.
                raise InvalidType("event", f"{cls.__name__} can't be read back: {error}") from error
    why = "a dataclass, a pydantic model, a msgspec Struct or a protobuf message is wanted"
    raise InvalidType("event", f"{why}, and {cls.__name__} is none of them")


def _missing(cls: type, error: ImportError) -> ConfigurationError:
    why = f"it takes {error.name}, which is not installed: pip install 'asyncstore[typed]'"
    return ConfigurationError(cls.__name__, why, "the registry")


# pydantic


def _is_pydantic(cls: type) -> bool:
    return "pydantic" in sys.modules and hasattr(cls, "__pydantic_validator__")


def _pydantic(cls: type) -> Kind:
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[Any] = TypeAdapter(cls)
    adapter.json_schema()  # raises for types that JSON can't hold
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]  # is one
    left_out = [name for name, field in fields.items() if field.exclude]
    if left_out:
        raise ValueError(f"{', '.join(left_out)} would not be stored, by exclude=True")

    # By the names of the fields: an alias is for the edge, and may change with it.
    def dump(value: Any) -> Any:
        return adapter.dump_python(
            value, mode="json", by_alias=False, round_trip=True, warnings="error"
        )

    def load(data: Any) -> Any:
        # As JSON: a strict model takes no text for a datetime from anything else.
        text = codec.encode_json("data", data)
        return adapter.validate_json(text, by_alias=False, by_name=True)

    def blame(error: Exception) -> str:
        if not isinstance(error, ValidationError):
            return ""
        places = [one["loc"] for one in error.errors(include_input=False, include_context=False)]
        # Below a field, and where extras are forbidden, a place may be a key of the data.
        return ", ".join(sorted({str(place[0]) for place in places if place} & fields.keys()))

    return Kind(dump, load, blame, _fields_of(cls))


# msgspec, and dataclasses by it


def _is_msgspec(cls: type) -> bool:
    return "msgspec" in sys.modules and hasattr(cls, "__struct_fields__")


def _msgspec(cls: type) -> Kind:
    import msgspec

    msgspec.json.schema(cls)  # raises for types that it can't read back

    # Keys of JSON are text: those of a dict[int, …] are numbers again when they come back.
    dump = partial(msgspec.to_builtins, str_keys=True)
    load = partial(msgspec.convert, type=cls, str_keys=True)
    return Kind(dump, load, _blame_msgspec, _fields_of(cls))


def _blame_msgspec(error: Exception) -> str:
    # It shows the names of fields only: keys of a dict are `[...]`.
    found = _PATH.fullmatch(str(error))
    return found[1] if found else ""


# protobuf


def _is_protobuf(cls: type) -> bool:
    library = sys.modules.get("google.protobuf.message")
    return library is not None and issubclass(cls, library.Message)


def _protobuf(cls: Any) -> Kind:
    def dump(value: Any) -> bytes:
        return bytes(value.SerializeToString(deterministic=True))

    return Kind(dump, cls.FromString, lambda _: "", ())  # its bytes are all of it


_KINDS: Final = (
    (_is_pydantic, _pydantic),  # before dataclasses: it has some of its own
    (_is_msgspec, _msgspec),
    (_is_protobuf, _protobuf),
    (dataclasses.is_dataclass, _msgspec),
)


# What comes back


def _is_same(value: Any, back: Any) -> bool:
    """Whether what came back is as good as what went out.

    A tuple may come back as a list, as where `Sequence[int]` is wanted; a moment in another zone;
    objects that know no `==` are looked into.
    """
    if value == back:
        return True
    if isinstance(value, list | tuple) and isinstance(back, list | tuple):
        return len(value) == len(back) and all(map(_is_same, value, back))
    if isinstance(value, Mapping) and isinstance(back, Mapping):
        return value.keys() == back.keys() and all(_is_same(value[key], back[key]) for key in value)
    if isinstance(value, datetime) and isinstance(back, datetime):
        return value.isoformat() == back.isoformat()  # where clocks are set back, == is never so
    return type(value) is type(back) and _is_alike(value, back)


def _is_alike(value: Any, back: Any) -> bool:
    names = _fields_of(type(value))
    if names:
        return all(_is_same(_of(value, name), _of(back, name)) for name in names)
    return type(value).__eq__ is _NO_EQUALITY  # nobody can tell


def _of(value: Any, name: str) -> Any:
    return getattr(value, name, None)  # a field without a value has no attribute


def _fields_of(cls: Any) -> tuple[str, ...]:
    """Return the names of the fields that two objects of a class are compared by."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls) if field.compare)
    if hasattr(cls, "__pydantic_fields__"):
        return (*cls.__pydantic_fields__, "__pydantic_extra__")
    return tuple(getattr(cls, "__struct_fields__", ()))
