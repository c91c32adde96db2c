"""Text for a terminal of 80 columns."""

import os
import textwrap

WIDTH = 80


def labelled(label: str, text: str) -> str:
    """Text with its label in a column of ten, folded; a long word, such as a path, stays whole."""
    return textwrap.fill(
        f"{label:<10}{text}", WIDTH, subsequent_indent=" " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def typed(command: str) -> str:
    """A command of this environment as the user has to type it: after `uv run`, where that started
    us.
    """
    return f"uv run {command}" if "UV_RUN_RECURSION_DEPTH" in os.environ else command


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
