"""What every server must do with snapshots. Runs on each server of the matrix."""

from __future__ import annotations

from asyncstore.testing.conformance.snapshots import *  # noqa: F403 - the cases of every store
