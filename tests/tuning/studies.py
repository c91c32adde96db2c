"""Small studies, and trials that were never trained, for the tests of the tuner."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from flowerray.cluster.watch import Ending
from flowerray.files import write_json
from flowerray.training.rundir import RunDir
from flowerray.tuning.config import StudyConfig
from flowerray.tuning.study import Study
from tests.small import small, words

KNOBS: dict[str, dict[str, Any]] = {
    "method.margin": {"low": 0.03, "high": 0.5, "log": True},
    "method.miner": {"choices": ["all", "distance-weighted"]},
}


def make_study(out: Path, root: Path, epochs: int = 4, **config: Any) -> Study:
    """A study of two knobs over `tests.small`'s run."""
    study = Study.create(out, small(root, epochs=epochs), StudyConfig(**config), KNOBS)
    study.see({}, np.repeat(np.arange(6), 10))  # `small_set`'s
    return study


def pretend(folder: RunDir, values: list[float], done: bool, spread: float = 0.5) -> None:
    """Writes what a training of 6 steps an epoch leaves, with these val MAP@R."""
    lines = []
    for epoch, value in enumerate(values, start=1):
        metrics = {"val/map_at_r": value, "epoch/seconds": 1.0, "epoch/spread": spread}
        lines.append({"step": 6 * epoch, "epoch": epoch, "time": 0.0, "metrics": metrics})
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        write_json(folder.thresholds, {"threshold": 0.5, "best_epoch": 1})


def run_trial(study: Study, values: list[float], done: bool = True, **result: Any) -> Ending:
    """One trial, asked for, pretended and told."""
    trial, folder, _ = study.open_trial()
    pretend(folder, values, done)
    last = {"epoch": len(values), "val/map_at_r": max(values, default=0.0), **result}
    return study.close_trial(trial, last)


def tune_words(root: Path, **changes: Any) -> list[str]:
    """The command line of a small search."""
    found = words(root, **changes)
    place = found.index("--resources.workers")
    return found[:place] + found[place + 2 :]
