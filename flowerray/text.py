"""Text for a terminal of 80 columns; and foreign text, made safe to show."""

import os
import textwrap
from collections.abc import Sequence
from hashlib import blake2b

WIDTH = 80
_JOINERS = "\u00a0\u200c\u200d"  # a space, and what Persian and emoji are written with


def visible(text: str) -> str:
    """Foreign text (a name of a file, a class, a run) as one line that does nothing: line breaks,
    escape sequences and marks that turn the direction of text show as `\\n`, `\\x1b`, `\\u202e`.
    Everything that goes to a terminal, a page, a table or a picture goes through here.
    """
    return "".join(
        c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in text
    )


def cell(value: object) -> object:
    """A value for a CSV file: what a spreadsheet would take for a formula is marked as text."""
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def labelled(label: str, text: str) -> str:
    """Text with its label in a column of ten, folded; a long word, such as a path, stays whole."""
    return textwrap.fill(
        f"{visible(label):<10}{visible(text)}", WIDTH, subsequent_indent=" " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def typed(command: str) -> str:
    """A command of this environment as the user has to type it: after `uv run`, where that started
    us.
    """
    return f"uv run {command}" if "UV_RUN_RECURSION_DEPTH" in os.environ else command


def file_name(text: str, most: int = 100) -> str:
    """A text as part of a file's name: no separators or control characters, and what is longer than
    so many bytes is cut and ends with a hash of the whole. Most file systems take 255 bytes.
    """
    clean = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in text)
    if len(clean.encode(errors="surrogateescape")) <= most:
        return clean
    mark = blake2b(clean.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    cut = clean.encode(errors="surrogateescape")[: most - len(mark) - 1]
    return f"{cut.decode(errors='ignore')}-{mark}"


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def some(names: Sequence[str], most: int) -> str:
    """`a, b and 3 more`: the first of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
