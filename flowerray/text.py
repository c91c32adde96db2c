"""Text for a terminal of 80 columns."""

import textwrap

WIDTH = 80


def labelled(label: str, text: str) -> str:
    """Text with its label in a column of ten, folded; a long word, such as a path, stays whole."""
    return textwrap.fill(
        f"{label:<10}{text}", WIDTH, subsequent_indent=" " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
