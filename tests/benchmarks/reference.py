"""Worst-case R@1 under `standard` (AutoAttack's protocol) beside adv-lib's APGD, APGD-T and FAB.

    uv pip install --no-deps adv-lib
    uv run --no-sync python -m tests.benchmarks.reference RUN --eps 4 --queries 100 --out FILE

Both sides attack the same 1-NN decisions on the same queries with 100 steps and 9 targets, each
part only what withstood those before it. adv-lib has no Square, which is the last part of
`standard`. Its FAB seeks the least change and counts where that lies within the radius. What counts
is the search's own decision on the attacked pixels.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flowerray.attacks.logits import MaxSimLogits
from flowerray.data.source import open_dataset
from flowerray.opening import open_model
from flowerray.robustness.attack import attack
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.subject import Arena, attacked_queries, embed_images, prepare, rank
from tests.benchmarks.command import about

STEPS, TARGETS = 100, 9
ROUNDING = 1e-6
"""By which a pixel may leave the radius in float32."""
Part = Callable[[MaxSimLogits, Tensor, Tensor, float], Tensor]


def adv_lib_parts() -> dict[str, Part]:
    """adv-lib's attacks with the settings of AutoAttack's `standard`."""
    sys.modules.setdefault("visdom", ModuleType("visdom"))  # draws curves; no attack needs it
    sys.modules["visdom"].Visdom = object  # type: ignore[attr-defined]
    from adv_lib.attacks import fab
    from adv_lib.attacks.auto_pgd import apgd, apgd_targeted

    linf = float("inf")
    return {
        "apgd-ce": lambda model, images, places, eps: apgd(
            model, images, places, eps, linf, n_iter=STEPS, loss_function="ce"
        ),
        "apgd-dlr": lambda model, images, places, eps: apgd_targeted(
            model, images, places, eps, linf, n_iter=STEPS, num_targets=TARGETS
        ),
        "fab": lambda model, images, places, eps: fab(
            model, images, places, linf, n_iter=STEPS, restarts=TARGETS, targeted_restarts=True
        ),
    }


def withstand(arena: Arena, eps: float, batch_size: int) -> dict[str, NDArray[np.bool_]]:
    """By part, whether each query (Q,) is still right after it and all before it."""
    logits = MaxSimLogits(arena.embedder, *arena.gallery()).eval()
    places_Q = logits.places(torch.from_numpy(arena.labels_Q).to(arena.device))
    right_Q = rank(arena, arena.emb_QD, arena.labels_Q)["hit"]
    found = {}
    for name, part in adv_lib_parts().items():
        left = np.flatnonzero(right_Q)
        for start in tqdm(range(0, len(left), batch_size), desc=f"adv-lib {name}", unit="batch"):
            rows = left[start : start + batch_size]
            images = arena.images(arena.chosen_Q[rows])
            attacked = part(logits, images, places_Q[torch.from_numpy(rows)], eps / 255).detach()
            within = (attacked - images).abs().flatten(1).amax(1).cpu().numpy() <= (
                eps / 255 + ROUNDING
            )
            hit = rank(arena, embed_images(arena, attacked), arena.labels_Q[rows])["hit"]
            right_Q[rows] = hit | ~within
        found[name] = right_Q.copy()
    return found


def main() -> None:
    """Attacks with both, prints both, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a trained RUN")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--eps", type=float, default=4.0, help="in 1/255")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("reference.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = AttackConfig(
        attacks=("standard",), eps=(options.eps,), max_queries=options.queries, max_pairs=0,
        batch_size=options.batch_size,
    )  # fmt: skip
    model = open_model(options.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = open_dataset(model.run.data)
    arena = prepare(model, dataset, attacked_queries(dataset, config), config, quiet=False).arena
    began = time.perf_counter()
    ours = attack(arena, config)
    seconds = {"flowerray": time.perf_counter() - began}
    began = time.perf_counter()
    theirs = withstand(arena, options.eps, options.batch_size)
    seconds["adv-lib"] = time.perf_counter() - began
    right_Q, peer_Q = ours.worst[options.eps].hit_Q.astype(bool), theirs["fab"]
    content = {
        **about(),
        "adv_lib": version("adv-lib"),
        "queries": len(peer_Q),
        "eps": options.eps,
        "clean": ours.clean.recall_at_1,
        "standard": float(right_Q.mean()),
        "adv_lib_after": {name: float(found.mean()) for name, found in theirs.items()},
        "only_ours_breaks": int((~right_Q & peer_Q).sum()),
        "only_theirs_breaks": int((right_Q & ~peer_Q).sum()),
        "seconds": seconds,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
