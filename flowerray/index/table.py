"""What `flowerray index` prints."""

from typing import Any

from flowerray.show.columns import columns
from flowerray.show.interval import words
from flowerray.text import counted, visible

NAMED = 10
"""Unreadable files that are named."""


def changed(result: dict[str, Any]) -> str:
    """What was added or removed."""
    said = [
        f"{result[key]:,} {text}"
        for key, text in (
            ("added", "added"),
            ("replaced", "replaced, since their content is new"),
            ("relabelled", "of another class now"),
            ("known", "there already"),
            ("removed", "removed"),
            ("embedded", f"embedded by {visible(result.get('model', ''))}"),
        )
        if result.get(key)
    ]
    bad = result.get("unreadable", {})
    lines = [f"{visible(result['index'])}: {counted(result['photographs'], 'photograph')}"]
    lines[0] += f" ({'; '.join(said)})" if said else ""
    lines += [f"left out  {visible(path)} ({why})" for path, why in list(bad.items())[:NAMED]]
    if len(bad) > NAMED:
        lines.append(f"left out  {len(bad) - NAMED:,} more that cannot be read")
    return "\n".join(lines)


def neighbours(result: dict[str, Any]) -> str:
    """Ranks, similarities, probabilities, classes and files."""
    rows = [["rank", "cosine", "probability", "class", "image"]]
    for rank, n in enumerate(result["neighbours"], start=1):
        probability = n["probability"]
        rows.append([
            str(rank), f"{n['similarity']:.3f}", "" if probability is None else words(probability),
            visible(n["label"] or ""), visible(n["image"]),
        ])  # fmt: skip
    lines = columns(rows, ">>><<")
    if result["unknown"]:
        lines.append("none of these: the nearest is below the threshold of its model")
    return "\n".join(lines)


def checked(result: dict[str, Any]) -> str:
    """What an INDEX holds and how well it is searched."""
    how = "exact" if result["exact"] else f"recall@10 {words(result['recall_at_10'])}"
    return (
        f"{visible(result['index'])}: {counted(result['photographs'], 'photograph')} in "
        f"{result['classes']:,} classes, as they were written; model "
        f"{visible(result['model'])}; search {how}"
    )
