"""What tests of an application, and of another store, can use.

`pytest_plugins = ["asyncstore.testing"]` in the conftest.py at the root of your tests switches the
fixtures on: `event_store`, an empty store for each test, and what it is made of. Comes with the
extra `testing`; builders, clock and proxy need no pytest.
"""

from asyncstore.testing.builders import history, listed, numbered, sequences
from asyncstore.testing.clock import Clock
from asyncstore.testing.proxy import Cut, FaultProxy, Way, fault_proxy
from asyncstore.testing.servers import remove_all

__all__ = [  # noqa: RUF022 - grouped by topic
    # events
    "Clock",
    "history",
    "listed",
    "numbered",
    "sequences",
    # stores
    "remove_all",
    # faults
    "Cut",
    "FaultProxy",
    "Way",
    "fault_proxy",
]

pytest_plugins = ["asyncstore.testing.fixtures"]
