"""What every server must do with positions. Runs on each server of the matrix."""

from __future__ import annotations

from asyncstore.testing.conformance.positions import *  # noqa: F403 - the cases of every store
