"""How events are shown, to those who asked to read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from asyncstore import lines

if TYPE_CHECKING:
    from asyncstore.recorded import RecordedEvent


def fields_of(event: RecordedEvent) -> dict[str, Any]:
    """Return an event as a line of an export, which `import` takes. Raises `CorruptEvent`."""
    fields: dict[str, Any] = json.loads(lines.write_event(event))
    return fields


def time_of(event: RecordedEvent) -> str:
    """Return when it happened, in UTC, for people."""
    return f"{event.time:%Y-%m-%d %H:%M:%S.%f}"[:-3]


def data_of(event: RecordedEvent) -> str:
    """Return its data in one line; of bytes, how many. Raises `CorruptEvent`."""
    data = event.data
    if isinstance(data, bytes):
        return f"<{len(data):,} bytes>"
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
