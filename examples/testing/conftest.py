"""Switches the fixtures of asyncstore on: the one line that a suite needs."""

pytest_plugins = ["asyncstore.testing"]
