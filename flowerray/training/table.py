"""What a training prints when it has ended."""

from pathlib import Path
from typing import Any

from flowerray.text import typed


def training(out: Path, summary: dict[str, Any]) -> str:
    """How a training ended and what to do next."""
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    took = f"{minutes} min {seconds:02d} s, {summary['precision']}"
    lines = [f"trained   {summary['epochs']} epochs, {summary['steps']} steps, {took}"]
    selected = {"val MAP@R": "val_map_at_r", "val adversarial R@1": "val_adversarial_recall_at_1"}
    for label, name in selected.items():
        if summary.get(name) is not None:
            value, epoch = summary[name], summary["best_epoch"]
            lines.append(f"best      {label} {value:.3f} after epoch {epoch}")
    following = typed(f"flowerray evaluate {out} --split test")
    lines += [f"model     {summary['model']}", f"next      {following}"]
    return "\n".join(lines)
