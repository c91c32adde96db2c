"""RUN folders as a training, an evaluation and an attack would leave them, made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowerray import methods
from flowerray.data.source import DataConfig
from flowerray.files import write_json
from flowerray.tracking import sync
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir

CLASSES = ("rose", "tulip")
QUERIES = 20


def make_run(
    path: Path,
    method: str = "triplet",
    seed: int = 0,
    *,
    robust: bool = False,
    hits: float | None = None,
    right: float | None = None,
    audit: bool | None = None,
    root: Path = Path("flowers"),
    fingerprint: str = "f",
    **changes: Any,
) -> Path:
    """A RUN of two epochs.

    Args:
        hits: share of queries that hit in its evaluation, drawn by seed; None = not evaluated.
        right: share of queries right at 2/255; None = not attacked.
        audit: whether its audit passed; None = none made.
        changes: of the method's options.
    """  # fmt: skip
    run = Run(
        method=methods.get(method).config(**changes),
        data=DataConfig(root=root),
        train=TrainConfig(seed=seed),
        harden=HardenConfig(kind="pgd" if robust else "none"),
    )
    folder = RunDir(path)
    folder.create(run.to_dict())
    tags = {
        "dataset/fingerprint": fingerprint, "dataset/kind": "folder", "dataset/classes": "2",
        "dataset/images": "1234", "dataset/test": str(QUERIES),
    }  # fmt: skip
    sync.start(path, path.name, run.to_dict(), tags)
    reporter = FolderReporter(path)
    for epoch in (1, 2):
        reporter.report(epoch * 10, epoch, {"train/images_per_second": 40.0})
        numbers = {"epoch/loss": 1 / epoch, "val/map_at_r": 0.3 * epoch, "epoch/seconds": 6.0}
        reporter.report(epoch * 10, epoch, numbers)
    if hits is not None:
        write_json(path / "evaluation" / "test.json", evaluation(hits, seed, root))
    if right is not None:
        write_json(path / "robustness.json", {"results": [attack(path, right, seed, audit)]})
    return path


def evaluation(hits: float, seed: int, root: Path) -> dict[str, Any]:
    """RUN/evaluation/test.json with that share of hits."""
    hit = draw(hits, seed)
    labels = np.arange(QUERIES) % 2
    shared = {"protocol": "official", "split": "test", "gallery": "train"}
    names = [f"{CLASSES[label]}/{i}.png" for i, label in enumerate(labels)]
    found = labels ^ ~hit  # the other class where it missed
    return {
        "metrics": {
            "recall_at_1": float(hit.mean()), "map_at_r": float(hit.mean()) / 2,
            "pair_auc": 0.9, "num_queries": QUERIES, "num_gallery": 10, **shared,
        },
        **shared,
        "root": str(root),
        "per_query": {
            "hit": hit.astype(int).tolist(),
            "average_precision": (hit / 2).tolist(),
            "num_relevant": [5] * QUERIES,
            "class": [CLASSES[label] for label in labels],
            "nearest": [f"{CLASSES[label]}/{label}.png" for label in found],
            "nearest_class": [CLASSES[label] for label in found],
            "similarity": np.linspace(0.5, 0.9, QUERIES).tolist(),
        },
        "queries": names,
        "seconds": 1.0,
    }  # fmt: skip


def attack(path: Path, right: float, seed: int, audit: bool | None) -> dict[str, Any]:
    """A record of RUN/robustness.json."""
    worst = {}
    for eps, share in (("0", 1.0), ("2", right)):
        hit = draw(share, seed)
        worst[eps] = {
            "recall_at_1": float(hit.mean()), "ci": [0.1, 0.9], "map_at_r": 0.3, "n": QUERIES,
            "retention": share, "pair_accuracy": share, "num_pairs": 8,
            "right": "".join(str(int(h)) for h in hit),
        }  # fmt: skip
    check = {"name": "gradients", "passed": audit, "value": 0.5, "text": "half are zero"}
    return {
        "run": str(path), "split": "test", "gallery": "train", "norm": "linf", "perturb": "query",
        "time": 0.0, "num_queries": QUERIES, "num_gallery": 10,
        "threat_model": "the pixels are changed.",
        "config": {"attacks": ["fgsm", "pgd"], "eps": [0, 2], "steps": 20, "restarts": 3},
        "rows": "cumulative", "clean": {}, "worst_case": worst,
        "attacks": {name: {"2": {"recall_at_1": right}} for name in ("fgsm", "pgd")},
        "expected_robustness": {"recall_at_1": (1 + right) / 2, "ci": [0.1, 0.9]},
        "collapse": {"collapsed": False}, "seconds": {"fgsm": 1.0, "pgd": 2.0},
        "audit": None if audit is None else {
            "passed": audit, "failed": [] if audit else ["gradients"], "checks": [check],
        },
        "queries": [str(i) for i in range(QUERIES)],
    }  # fmt: skip


def draw(share: float, seed: int) -> np.ndarray:
    """Exactly that share of QUERIES, at random."""
    order = np.random.default_rng(seed).permutation(QUERIES)
    return order < round(share * QUERIES)


def photographs(root: Path) -> Path:
    """The images that the evaluations name."""
    for i in range(QUERIES):
        file = root / CLASSES[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), ("red", "gold")[i % 2]).save(file)
    return root


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
