"""What a worker remembers of the aggregates that it has handled last."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from asyncstore.values import Aggregate
    from asyncstore.worklist import Known

_MOST: Final = 10_000  # aggregates; the others are forgotten


class Memory:
    """Which event was handled last of an aggregate, and when."""

    def __init__(self) -> None:
        self._last: OrderedDict[Aggregate, tuple[Known, float]] = OrderedDict()

    def note(self, aggregate: Aggregate, known: Known, moment: float) -> None:
        """Remember an event, and when it was handled."""
        self._last[aggregate] = known, moment
        self._last.move_to_end(aggregate)
        if len(self._last) > _MOST:
            self._last.popitem(last=False)

    def known(self, aggregate: Aggregate) -> Known | None:
        """Return the last event of an aggregate that was handled, if that is remembered."""
        known, _ = self._last.get(aggregate, (None, 0.0))
        return known

    def when(self, aggregate: Aggregate) -> float:
        """Return when that was; before all times if it is not remembered."""
        _, moment = self._last.get(aggregate, (None, -math.inf))
        return moment

    def forget(self, aggregate: Aggregate) -> None:
        """Forget what was handled of an aggregate: it is another by now."""
        self._last.pop(aggregate, None)
