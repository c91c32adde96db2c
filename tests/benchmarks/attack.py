"""Adversarial R@1: our evaluation beside the same written with torchattacks.PGD, README style.

    python tests/benchmarks/attack.py RUN --out attack.json

Both sides attack the same queries with the same objective (cross-entropy of the 1-NN logits),
radius, steps and step size, in the same batches, against a gallery that is embedded once
beforehand. The peer is what the library's README shows: it attacks each batch, then embeds the
result and ranks it. It knows no restarts, so there is one start. Ours leaves out queries that were
wrong from the start, and an image's steps end once its neighbour is wrong; both are off in the
third side, which shows what that gives. The sides take turns; times are medians.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchattacks
from torch import Tensor

from flowerray.attacks.logits import MaxSimLogits
from flowerray.data.source import open_dataset
from flowerray.opening import open_model
from flowerray.retrieval.search import retrieval_metrics
from flowerray.robustness.attack import attack
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.victim import Victim, open_victim


def ours(victim: Victim, eps: float) -> float:
    """R@1 by the command's own loop."""
    return attack(victim).worst[eps].recall_at_1


def readme(victim: Victim, eps: float) -> float:
    """R@1 as the library's README attacks a model."""
    config = victim.config
    logits_of = MaxSimLogits(victim.embedder, *victim.gallery()).eval()
    place_Q = logits_of.places(torch.from_numpy(victim.labels_Q).to(victim.device))
    pgd = torchattacks.PGD(
        logits_of,
        eps=eps / 255,
        alpha=config.alpha_ratio * eps / 255 / config.steps,
        steps=config.steps,
        random_start=True,
    )
    parts: list[Tensor] = []
    for start in range(0, len(place_Q), config.batch_size):
        rows = np.arange(start, min(start + config.batch_size, len(place_Q)))
        images = victim.images(victim.chosen_Q[rows])
        attacked = pgd(images, place_Q[torch.from_numpy(rows).to(victim.device)])
        with torch.no_grad():
            parts.append(victim.embedder(attacked))
    emb_QD = torch.cat(parts)
    found = retrieval_metrics(emb_QD, victim.labels_Q, *victim.gallery())
    return found["recall_at_1"]


def main() -> None:
    """Times the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a trained RUN")
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--eps", type=float, default=2.0, help="in 1/255")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("attack.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = AttackConfig(
        attacks=("pgd",), eps=(options.eps,), steps=options.steps, restarts=1,
        max_queries=options.queries, max_pairs=0, batch_size=options.batch_size,
    )  # fmt: skip
    model = open_model(options.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = open_dataset(model.run.data)
    victim = open_victim(model, dataset, config, quiet=False)
    every = replace(victim, config=config.model_copy(update={"independent": True}))
    sides: dict[str, Any] = {
        "flowerray": lambda: ours(victim, options.eps),
        "torchattacks README": lambda: readme(victim, options.eps),
        "flowerray, every query and step": lambda: ours(every, options.eps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    recall: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            recall[name] = side()
            seconds[name].append(time.perf_counter() - began)
            print(f"{name:<34}{seconds[name][-1]:8.1f} s   R@1 {recall[name]:.3f}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peer = medians["torchattacks README"]
    content = {
        "run": options.run,
        "clean_recall_at_1": attack(
            replace(victim, config=config.model_copy(update={"eps": (0.0,)}))
        ).clean.recall_at_1,
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "run")},
        "seconds": seconds,
        "median_seconds": medians,
        "peer_over_ours": {name: peer / median for name, median in medians.items()},
        "recall_at_1": recall,
        "torch": torch.__version__,
        "torchattacks": version("torchattacks"),
        "device": str(victim.device),
        "machine": platform.processor() or platform.machine(),
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(f"torchattacks / flowerray: {content['peer_over_ours']['flowerray']:.2f} in time")


if __name__ == "__main__":
    main()
