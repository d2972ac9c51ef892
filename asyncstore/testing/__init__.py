"""What tests of an application, and of another store, can use.

`pytest_plugins = ["asyncstore.testing"]` in the conftest.py at the root of your tests switches the
fixtures on: `event_store`, an empty store for each test, and what it is made of. Comes with the
extra `testing`; builders, clock and proxy need no pytest.
"""

from asyncstore.testing.builders import history, listed, numbered, sequences
from asyncstore.testing.clock import Clock

__all__ = ["Clock", "history", "listed", "numbered", "sequences"]

pytest_plugins = ["asyncstore.testing.fixtures"]
