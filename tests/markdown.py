"""The Markdown files of the project: their code blocks, headings and links."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)

_NOT_RUN = re.compile(r"(?:#|//) not run: (.+)\n")
_DIRECTIVE = re.compile(r"\{(\w[\w-]*)\}")


@dataclass(frozen=True)
class Block:
    """A code block. `not_run` is the reason that its first line gives, or None."""

    language: str
    text: str
    line: int
    not_run: str | None


@cache
def _tokens(file: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / file).read_text())


def blocks_of(file: Path) -> list[Block]:
    """Return the code blocks of a file; what Sphinx is told in such a block is none."""
    return [_block(token) for token in _tokens(file) if _is_code(token)]


def _is_code(token: Token) -> bool:
    return token.type in ("fence", "code_block") and not _DIRECTIVE.match(token.info)


def _block(token: Token) -> Block:
    assert token.map is not None
    reason = _NOT_RUN.match(token.content)
    return Block(token.info.strip(), token.content, token.map[0] + 1, reason[1] if reason else None)


def sections_of(file: Path, level: int) -> dict[str, str]:
    """Return the text below each heading of a level, by the heading's text."""
    parts = re.split(rf"^{'#' * level} (.+)\n", (ROOT / file).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def anchors_of(file: Path) -> set[str]:
    """Return what links can name in a file: its headings, as GitHub spells them."""
    found: list[str] = []
    for heading in _headings(file):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def _headings(file: Path) -> Iterator[str]:
    tokens = _tokens(file)
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            children = inline.children or []
            yield "".join(part.content for part in children if part.type in ("text", "code_inline"))


def links_of(file: Path) -> list[str]:
    """Return where the links and pictures of a file go."""
    inline = (token.children or [] for token in _tokens(file) if token.type == "inline")
    found = [part.attrs.get("href") or part.attrs.get("src") for line in inline for part in line]
    return [str(where) for where in found if where]
