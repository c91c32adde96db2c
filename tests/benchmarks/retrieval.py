"""Retrieval metrics of a large set: time and added memory beside pytorch-metric-learning.

    python tests/benchmarks/retrieval.py --out retrieval.json

Each measurement is a process of its own, the two sides take turns, both have the same threads. The
peer is AccuracyCalculator with its own exact search in batches, at `k="max_bin_count"`, which
MAP@R needs.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

DIM = 128
PER_CLASS = 100
SIDES = ("flowerray", "pytorch-metric-learning")


def draw(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in overlapping classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), PER_CLASS)
    means = rng.normal(size=(num_classes, DIM)).astype(np.float32)
    emb = means[labels] + 2.5 * rng.normal(size=(len(labels), DIM)).astype(np.float32)
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    return emb, labels


def peak_mib() -> float:
    """The most that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def once(side: str, num_classes: int, threads: int, batch: int) -> dict[str, float]:
    """Seconds, added MiB and the three metrics that both sides have, measured in this process."""
    torch.set_num_threads(threads)
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    from flowerray.retrieval.search import retrieval_metrics

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(
        include=names,
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False), batch_size=batch),
        device=torch.device("cpu"),
    )
    emb, labels = (torch.from_numpy(part) for part in draw(num_classes))
    emb[:64] @ emb[:64].T  # the thread pool starts outside the clock
    before, start = psutil.Process().memory_info().rss / 2**20, time.perf_counter()
    if side == SIDES[0]:
        found = retrieval_metrics(emb, labels)
        values = [found[name] for name in ("recall_at_1", "r_precision", "map_at_r")]
    else:
        accuracy = calculator.get_accuracy(emb, labels)
        values = [float(accuracy[name]) for name in names]
    seconds = time.perf_counter() - start
    measured = {"seconds": seconds, "added_mib": peak_mib() - before}
    return measured | dict(zip(("recall_at_1", "r_precision", "map_at_r"), values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--classes", type=int, default=600, help="of 100 images each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256, help="queries at a time of the peer")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(once(args.side, args.classes, args.threads, args.batch)))
        return
    options = ["--classes", args.classes, "--threads", args.threads, "--batch", args.batch]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, *map(str, options)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[side].append(json.loads(output.splitlines()[-1]))
            print(side, runs[side][-1], file=sys.stderr)
    best = {side: min(run["seconds"] for run in runs[side]) for side in SIDES}
    report = {
        "images": args.classes * PER_CLASS,
        "dimensions": DIM,
        "threads": args.threads,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "runs": runs,
        "speed_ratio": best[SIDES[1]] / best[SIDES[0]],
        "added_mib": {side: max(run["added_mib"] for run in runs[side]) for side in SIDES},
    }
    text = json.dumps(report, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
