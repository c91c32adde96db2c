"""Worst-case R@1 under our attacks beside those of adv-lib, foolbox and torchattacks.

    uv pip install --no-deps adv-lib foolbox eagerpy
    uv run --no-sync python -m tests.benchmarks.reference RUN --eps 2 4 --queries 64 --out FILE

All attack the same 1-NN decisions on the same queries, each part only what withstood those before
it: ours with the command's default budget (`--attacks`, `--steps`); adv-lib's APGD-CE and targeted
APGD-DLR (9 targets; `--fab` adds its FAB) and foolbox's PGD with `--times` our steps; torchattacks'
four parts of AutoAttack with our steps, 9 targets and 1,000 queries. A library that is not
installed is left out. With `--survivors` the others attack only what ours left, which is enough to
see whether they are stronger, and far cheaper. What counts is the search's own decision on the
attacked pixels. Passes are images sent forward and gradients taken, a query.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowerray.attacks.library import attack_within, settings
from flowerray.attacks.logits import MaxSimLogits
from flowerray.data.source import open_dataset
from flowerray.opening import open_model
from flowerray.robustness.attack import attack
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.victim import Victim, open_victim
from tests.benchmarks.command import about

TARGETS = 9
ROUNDING = 1e-6
"""By which a pixel may leave the radius in float32."""
Part = Callable[[MaxSimLogits, Tensor, Tensor, float], Tensor]
"""Attacked pixels of pixels, their columns of the logits, and a radius in the pixels' unit."""


class Passes:
    """Counts the images that go through a module, and those whose gradient comes back."""

    def __init__(self, module: nn.Module) -> None:
        self.forward = self.backward = 0
        module.register_forward_hook(self._seen)

    def _seen(self, _: nn.Module, __: Any, emb_BD: Tensor) -> None:
        self.forward += len(emb_BD)
        if emb_BD.requires_grad:
            emb_BD.register_hook(self._returned)

    def _returned(self, grad_BD: Tensor) -> None:
        self.backward += len(grad_BD)

    def each(self, queries: int) -> dict[str, float]:
        """Both for one of so many queries; starts anew."""
        found = {"forward": self.forward / queries, "backward": self.backward / queries}
        self.forward = self.backward = 0
        return found


def adv_lib(steps: int, with_fab: bool) -> dict[str, Part]:
    """adv-lib's attacks."""
    sys.modules.setdefault("visdom", ModuleType("visdom"))  # draws curves; no attack needs it
    sys.modules["visdom"].Visdom = object  # type: ignore[attr-defined]
    from adv_lib.attacks import fab
    from adv_lib.attacks.auto_pgd import apgd, apgd_targeted

    linf = float("inf")
    parts: dict[str, Part] = {
        "apgd-ce": lambda model, images, places, radius: apgd(
            model, images, places, radius, linf, n_iter=steps, loss_function="ce"
        ),
        "apgd-dlr": lambda model, images, places, radius: apgd_targeted(
            model, images, places, radius, linf, n_iter=steps, num_targets=TARGETS
        ),
    }
    if with_fab:
        parts["fab"] = lambda model, images, places, radius: fab(
            model, images, places, linf, n_iter=steps, restarts=TARGETS, targeted_restarts=True
        )
    return parts


def foolbox(steps: int) -> dict[str, Part]:
    """foolbox's PGD; its steps of radius / 40 are the library's own."""
    import foolbox as peer

    def run(model: MaxSimLogits, images: Tensor, places: Tensor, radius: float) -> Tensor:
        wrapped = peer.PyTorchModel(model, bounds=(0, 1), device=images.device)
        clipped: Tensor = peer.attacks.LinfPGD(steps=steps)(
            wrapped, images, places, epsilons=radius
        )[1]
        return clipped

    return {"pgd": run}


def torchattacks(steps: int) -> dict[str, Part]:
    """The parts of AutoAttack as torchattacks has them."""
    budget = settings(steps=steps, restarts=1, targets=TARGETS, queries=1000, rescale=True)

    def part(name: str) -> Part:
        return lambda model, images, places, radius: attack_within(
            name, model, images, places, norm="linf", radius=radius, seed=0, options=budget[name]
        )

    return {name: part(name) for name in budget}


def installed(name: str) -> str | None:
    """Its version, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        print(f"{name} is not installed and is left out")
        return None


def withstand(
    victim: Victim, parts: Mapping[str, Part], right_Q: NDArray[np.bool_], eps: float, size: int
) -> dict[str, NDArray[np.bool_]]:
    """By part, which of these queries (Q,) are still right after it and all before it."""
    logits = MaxSimLogits(victim.embedder, *victim.gallery()).eval()
    places_Q = logits.places(torch.from_numpy(victim.labels_Q).to(victim.device))
    right_Q, found = right_Q.copy(), {}
    torch.manual_seed(0)
    for name, part in parts.items():
        left = np.flatnonzero(right_Q)
        for start in range(0, len(left), size):
            rows = left[start : start + size]
            images = victim.images(victim.chosen_Q[rows]).contiguous()  # FAB takes views
            attacked = part(logits, images, places_Q[torch.from_numpy(rows)], eps / 255).detach()
            within = (attacked - images).abs().flatten(1).amax(1).cpu().numpy() <= (
                eps / 255 + ROUNDING
            )
            hit = victim.rank(victim.embed(attacked), victim.labels_Q[rows])["hit"]
            right_Q[rows] = hit | ~within
        found[name] = right_Q.copy()
    return found


def main() -> None:
    """Attacks with all, prints a line for each, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a trained RUN")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--eps", type=float, nargs="+", default=[2.0, 4.0], help="in 1/255")
    parser.add_argument("--attacks", default="margin,apgd-ce,apgd-dlr", help="ours")
    parser.add_argument("--steps", type=int, default=AttackConfig().steps)
    parser.add_argument("--times", type=int, default=5, help="steps of the others over ours")
    parser.add_argument("--fab", action="store_true", help="adv-lib's FAB too")
    parser.add_argument("--survivors", action="store_true", help="the others attack what ours left")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("reference.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = AttackConfig(
        attacks=tuple(options.attacks.split(",")), eps=tuple(options.eps), steps=options.steps,
        max_queries=options.queries, max_pairs=0, batch_size=options.batch_size,
    )  # fmt: skip
    model = open_model(options.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = open_dataset(model.run.data)
    victim = open_victim(model, dataset, config, quiet=False)
    many = options.times * options.steps
    versions = {name: installed(name) for name in ("adv-lib", "foolbox", "torchattacks")}
    peers = {
        "adv-lib": lambda: adv_lib(many, options.fab),
        "foolbox": lambda: foolbox(many),
        "torchattacks": lambda: torchattacks(options.steps),
    }
    clean_Q = victim.rank(victim.emb_QD, victim.labels_Q)["hit"].astype(bool)
    passes, results = Passes(victim.embedder), []
    for eps in config.eps:
        began = time.perf_counter()
        ours_Q = (
            attack(replace(victim, config=config.model_copy(update={"eps": (eps,)})))
            .alone[eps]
            .hit_Q
        )
        row: dict[str, Any] = {
            "eps": eps,
            "flowerray": {
                "recall_at_1": float(ours_Q.mean()),
                "passes": passes.each(int(clean_Q.sum())),
                "seconds": time.perf_counter() - began,
            },
        }
        for name, parts in peers.items():
            if versions[name] is None:
                continue
            began = time.perf_counter()
            start_Q = ours_Q if options.survivors else clean_Q
            found = withstand(victim, parts(), start_Q, eps, options.batch_size)
            left_Q = list(found.values())[-1]
            row[name] = {
                "after": {part: float(right_Q.mean()) for part, right_Q in found.items()},
                "only_ours_breaks": int((left_Q & ~ours_Q).sum()),
                "only_theirs_breaks": int((ours_Q & ~left_Q).sum()),
                "attacked": int(start_Q.sum()),
                "passes": passes.each(max(1, int(start_Q.sum()))),
                "seconds": time.perf_counter() - began,
            }
        results.append(row)
        print(json.dumps(row), flush=True)
    content = {
        **about(),
        "versions": versions,
        "queries": len(clean_Q),
        "clean": float(clean_Q.mean()),
        "results": results,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
