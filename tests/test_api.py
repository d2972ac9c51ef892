"""What users import is as tests/api.txt says; `make api` writes it anew."""

from __future__ import annotations

import difflib

from tests import api


def test_the_public_api_is_as_agreed() -> None:
    agreed, found = api.SNAPSHOT.read_text().splitlines(), api.snapshot().splitlines()
    changes = difflib.unified_diff(agreed, found, "tests/api.txt", "the code", lineterm="", n=2)
    difference = "\n".join(changes)
    assert not difference, f"if this is wanted: make api, and a line in CHANGELOG.md\n{difference}"
