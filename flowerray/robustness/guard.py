"""What adversarial training is watched by after each epoch: val adversarial R@1, a probe for
catastrophic overfitting, and whether the embedding has collapsed.

Letters: Q val images, A of them attacked, G gallery items, D embedding dimensions, C H W an image.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray

from flowerray.attacks.objectives import margin
from flowerray.attacks.pgd import PGDConfig, pgd, quiet
from flowerray.data.store import Store, floats
from flowerray.model.embedder import Embedder
from flowerray.model.modes import full_precision
from flowerray.robustness.attack import collapse
from flowerray.robustness.victim import choose_queries
from flowerray.training.harden import HardenConfig, nfgsm

QUERY_SEED = 0
"""Of the val images that are attacked and of their random starts: the same for every run."""
PROBE_STEPS = 10
PROBE_GAP = 0.3
"""R@1 under one step minus R@1 under ten, above which one-step training has overfitted."""
BATCH = 64


@full_precision()
def guard(
    config: HardenConfig,
    embedder: Embedder,
    val_store: Store,
    val_emb_QD: NDArray[np.float32],
    val_labels_Q: ArrayLike,
    gallery: tuple[NDArray[np.float32], ArrayLike] | None,
) -> dict[str, float]:
    """The metrics of one epoch; every worker calls it, attacks its share, and gets the same.

    Queries are attacked in the gallery of clean images by PGD on the retrieval margin (the largest
    cosine to a wrong class minus the largest to the right one), in full precision; a query is given
    up once it has fallen.

    Args:
        config: budgets.
        embedder: with the weights that would be exported; nothing of it changes.
        val_store, val_emb_QD, val_labels_Q: the val images, their clean embeddings and classes.
        gallery: embeddings and classes to search in; None = val searches itself, and then half of
            each class at most is attacked, and the rest is the gallery.

    Returns:
        `val/adversarial_recall_at_1` at `val_epsilon`; `val/mean_cosine`, `val/effective_rank` and
        `alarm/collapse`; for one-step kinds `val/probe_single_step`, `val/probe` (R@1 at the
        training's epsilon under N-FGSM's own step and under ten steps) and `alarm/overfitting`.
        Alarms are 0 or 1. What there is nothing to measure of is left out.
    """
    labels_Q = np.asarray(val_labels_Q)
    chosen_A = choose_queries(
        labels_Q, config.val_queries, QUERY_SEED, share=0.5 if gallery is None else 1.0
    )
    if gallery is None:
        rest = np.setdiff1d(np.arange(len(labels_Q)), chosen_A)
        gallery = val_emb_QD[rest], labels_Q[rest]
    gallery_GD, gallery_labels_G = gallery[0], np.asarray(gallery[1])
    # A class that the gallery lacks is lost before any attack.
    chosen_A = chosen_A[np.isin(labels_Q[chosen_A], gallery_labels_G)]
    target = _Target(embedder, val_store, labels_Q, gallery_GD, gallery_labels_G)

    metrics = {}
    if len(chosen_A):
        recall = target.recall(chosen_A, config.val_epsilon, config.val_steps)
        metrics["val/adversarial_recall_at_1"] = recall
    if len(val_emb_QD) > 1:
        found = collapse(val_emb_QD, len(np.unique(labels_Q)))
        metrics["val/mean_cosine"] = float(found["mean_cosine"])
        metrics["val/effective_rank"] = float(found["effective_rank"])
        metrics["alarm/collapse"] = float(found["collapsed"])
    if len(chosen_A) and config.one_step and config.probe_queries:
        probed_A = chosen_A[:: math.ceil(len(chosen_A) / config.probe_queries)]
        single = target.recall(probed_A, config.epsilon, steps=0)
        strong = target.recall(probed_A, config.epsilon, PROBE_STEPS)
        metrics["val/probe_single_step"], metrics["val/probe"] = single, strong
        metrics["alarm/overfitting"] = float(single - strong > PROBE_GAP)
    return metrics


def alarms(metrics: dict[str, float]) -> list[str]:
    """One sentence for each alarm among the metrics of `guard`."""
    said = []
    if metrics.get("alarm/collapse"):
        said.append(
            f"the embedding has collapsed (mean cosine {metrics['val/mean_cosine']:.2f}, effective "
            f"rank {metrics['val/effective_rank']:.1f}): lower --harden.epsilon or --train.lr, or "
            "start from a trained model with --init."
        )
    if metrics.get("alarm/overfitting"):
        said.append(
            f"catastrophic overfitting: R@1 {metrics['val/probe_single_step']:.2f} under one step, "
            f"{metrics['val/probe']:.2f} under {PROBE_STEPS}: lower --harden.epsilon, or use "
            "--harden.kind pgd --harden.steps 2."
        )
    return said


class _Target:
    """The attacked search: an embedder and a gallery of clean images."""

    def __init__(
        self,
        embedder: Embedder,
        store: Store,
        labels_Q: NDArray[np.int64],
        gallery_GD: NDArray[np.float32],
        gallery_labels_G: NDArray[np.int64],
    ) -> None:
        self.embedder, self.store, self.labels_Q = embedder, store, labels_Q
        self.device = next(embedder.parameters()).device
        self.gallery_GD = torch.from_numpy(gallery_GD).to(self.device)
        self.gallery_labels_G = torch.from_numpy(gallery_labels_G).to(self.device)

    def recall(self, chosen_A: NDArray[np.int64], epsilon: float, steps: int) -> float:
        """R@1 of the images under margin-PGD, or under one N-FGSM step where `steps` is 0."""
        up = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if up else (1, 0)
        bounds = np.linspace(0, len(chosen_A), world + 1).astype(int)
        own = chosen_A[bounds[rank] : bounds[rank + 1]]
        hits = sum(
            self._hits(own[start : start + BATCH], epsilon, steps)
            for start in range(0, len(own), BATCH)
        )
        counts = [hits] * world
        if up:
            dist.all_gather_object(counts, hits)
        return sum(counts) / len(chosen_A)

    def _hits(self, index_A: NDArray[np.int64], epsilon: float, steps: int) -> int:
        pixels_ACHW = self.store.centre(index_A, self.embedder.image_size)
        images_ACHW = floats(pixels_ACHW, self.device, next(self.embedder.parameters()).dtype)
        labels_A = torch.from_numpy(self.labels_Q[index_A]).to(self.device)
        objective = margin(self.embedder, self.gallery_GD, self.gallery_labels_G, labels_A)
        seed, places = (QUERY_SEED,), index_A.tolist()
        if steps:
            config = PGDConfig(epsilon=epsilon, steps=steps)
            value_A = pgd(
                objective, images_ACHW, config, seed=seed, positions=places, stop_above=0.0
            ).value_B
        else:
            with quiet(self.embedder), torch.no_grad():
                moved_ACHW = nfgsm(objective, images_ACHW, epsilon, seed=seed, positions=places)
                value_A = objective(moved_ACHW)
        return int((value_A <= 0).sum())  # above 0 a wrong class is nearer
