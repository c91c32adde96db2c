"""The Empirical Robustness Score, for comparison with the literature only.

Zhou & Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", CVPR 2022, section 3: the
mean of ten terms, each 0 (no robustness) to 100. It rewards collapse: a constant embedding gets
100 where a shift is measured and about 84 for ranks that cannot move. So it is never shown without
the clean R@1, nor believed where the embedding has collapsed.

We differ from the authors' code in three places that look like mistakes there: GTM pulls towards
the wrong-class item that really is nearest (theirs takes an index within a masked subset for one
of the whole); no query is in its own ranking (the gallery holds none); the shift of ES is measured
on the image that is returned. The best step is kept, ES starts at random (its gradient at the
photograph is 0), and LTM's means run over all items. So the figures compare roughly, not exactly.

Letters: Q queries, B images, G gallery images, D embedding dimensions, C H W an image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.attacks.objectives import match, shift
from flowerray.attacks.pgd import Objective, PGDConfig
from flowerray.model.modes import full_precision
from flowerray.robustness.victim import Victim

EPSILON, ALPHA, NUM_STEPS = 8.0, 3.0, 32
"""Radius and step in 1/255, and steps, of the authors' profile at 224 px."""
TOP = 0.01
"""CA- and QA- begin with an item of this nearest share of the gallery."""
RETAIN = 4


@full_precision()
def ers(victim: Victim, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """The ten terms and their mean, of all the victim's queries.

    Args:
        progress: called with 1 after each of the nine attacks (ES gives two terms).

    Returns:
        `ers`, `terms` (name -> 0..100, higher is more robust), `raw` (before they are scaled),
        `num_queries`, `eps`, `steps`.
    """
    return _Attack(victim, progress).all_terms()


class _Attack:
    """The queries, the gallery, and the items that the attacks are about, as gallery indices:
    `lifted_Q` is a random one, `lowered_Q` one of the nearest, `target_Q` another random one.
    """

    def __init__(self, victim: Victim, progress: Callable[[int], object] | None) -> None:
        self.victim, self.embedder = victim, victim.embedder
        self.progress = progress or (lambda _: None)
        self.attacks = 0
        self.gallery_GD, labels_G = victim.gallery()
        labels_Q = torch.from_numpy(victim.labels_Q).to(victim.device)
        self.same_QG = labels_Q[:, None] == labels_G
        self.query_QD = torch.from_numpy(victim.emb_QD).to(victim.device)
        self.cosine_QG = self.query_QD @ self.gallery_GD.T
        self.order_QG = self.cosine_QG.argsort(dim=1, descending=True)
        rng, count = np.random.default_rng((victim.config.seed, 5)), len(labels_G)

        def drawn(highest: int) -> Tensor:
            return torch.from_numpy(rng.integers(highest, size=len(labels_Q))).to(victim.device)

        near_Q1 = drawn(max(1, int(TOP * count)))[:, None]
        self.lifted_Q, self.target_Q = drawn(count), drawn(count)
        self.lowered_Q = self.order_QG.gather(1, near_Q1)[:, 0]

    def all_terms(self) -> dict[str, Any]:
        """See `ers`."""
        nearest_Q = self.order_QG[:, 0]
        wrong_Q = self.cosine_QG.masked_fill(self.same_QG, -torch.inf).argmax(1)
        es_QD = self._queries(shift(self.embedder, self.query_QD), random_start=True)
        tma_QD = self._queries(match(self.embedder, self.gallery_GD[self.target_Q]))
        gtm_QD = self._queries(match(self.embedder, self.gallery_GD[wrong_Q]))
        gtt_QD = self._queries(self._away(nearest_Q))
        cosine_QG = gtt_QD @ self.gallery_GD.T
        ahead_Q = (cosine_QG > cosine_QG.gather(1, nearest_Q[:, None])).sum(1)
        raw = {
            "CA+": self._percentile(self._items(self.lifted_Q, 1.0), self.lifted_Q, None),
            "CA-": self._percentile(self._items(self.lowered_Q, -1.0), self.lowered_Q, None),
            "QA+": self._percentile(None, self.lifted_Q, self._queries(self._rank(1.0))),
            "QA-": self._percentile(None, self.lowered_Q, self._queries(self._rank(-1.0))),
            "TMA": float((tma_QD * self.gallery_GD[self.target_Q]).sum(1).mean()),
            "ES:D": float((es_QD - self.query_QD).norm(dim=1).mean()),
            "ES:R": self._recall(es_QD),
            "LTM": self._recall(self._queries(self._misrank())),
            "GTM": self._recall(gtm_QD),
            "GTT": 100 * float((ahead_Q < RETAIN).float().mean()),
        }
        terms = {
            "CA+": min(100.0, 2 * raw["CA+"]),
            "CA-": 100 - raw["CA-"],
            "QA+": min(100.0, 2 * raw["QA+"]),
            "QA-": 100 - raw["QA-"],
            "TMA": 100 * (1 - raw["TMA"]),
            "ES:D": 50 * (2 - raw["ES:D"]),
            **{name: raw[name] for name in ("ES:R", "LTM", "GTM", "GTT")},
        }
        return {
            "ers": float(np.mean(list(terms.values()))),
            "terms": terms,
            "raw": raw,
            "num_queries": len(self.query_QD),
            "eps": EPSILON,
            "steps": NUM_STEPS,
        }

    def _rank(self, sign: float) -> Objective:
        """QA: the query's rank of one item, raised (1) or lowered (-1): a hinge for each item that
        stands on the wrong side of it.
        """
        item_Q = self.lifted_Q if sign > 0 else self.lowered_Q
        gallery_GD = self.gallery_GD

        def value(images_BCHW: Tensor, item_B: Tensor) -> Tensor:
            cosine_BG = self.embedder(images_BCHW) @ gallery_GD.T
            behind_BG = sign * (cosine_BG - cosine_BG.gather(1, item_B[:, None]))
            return -behind_BG.clamp(min=0).mean(1)

        return Objective(value, (item_Q,), (self.embedder,))

    def _items(self, item_Q: Tensor, sign: float) -> Tensor:
        """CA: the item's own pixels are changed, so that its rank for the query rises or falls."""

        def value(images_BCHW: Tensor, query_BD: Tensor, cosine_BG: Tensor) -> Tensor:
            own_B1 = (self.embedder(images_BCHW) * query_BD).sum(1, keepdim=True)
            return -(sign * (cosine_BG - own_B1)).clamp(min=0).mean(1)

        objective = Objective(value, (self.query_QD, self.cosine_QG), (self.embedder,))

        items, store = item_Q.cpu().numpy(), self.victim.gallery_store
        return self._run(objective, lambda rows: self.victim.images(items[rows], store))

    def _away(self, nearest_Q: Tensor) -> Objective:
        """GTT: the nearest item is pushed behind the others."""

        def value(images_BCHW: Tensor, nearest_B: Tensor) -> Tensor:
            cosine_BG = self.embedder(images_BCHW) @ self.gallery_GD.T
            top_B = cosine_BG.topk(min(RETAIN + 1, cosine_BG.shape[1]), dim=1).values[:, -1]
            return top_B - cosine_BG.gather(1, nearest_B[:, None])[:, 0]

        return Objective(value, (nearest_Q,), (self.embedder,))

    def _misrank(self) -> Objective:
        """LTM: items of other classes pulled, those of the query's class pushed."""

        def value(images_BCHW: Tensor, same_BG: Tensor) -> Tensor:
            cosine_BG = self.embedder(images_BCHW) @ self.gallery_GD.T
            same = same_BG.to(cosine_BG.dtype)
            pushed_B = (cosine_BG * same).sum(1) / same.sum(1)
            return (cosine_BG * (1 - same)).sum(1) / (1 - same).sum(1).clamp(min=1) - pushed_B

        return Objective(value, (self.same_QG,), (self.embedder,))

    def _queries(self, objective: Objective, random_start: bool = False) -> Tensor:
        return self._run(objective, lambda rows: self.victim.queries(rows)[0], random_start)

    def _run(
        self,
        objective: Objective,
        images: Callable[[NDArray[np.int64]], Tensor],
        random_start: bool = False,
    ) -> Tensor:
        """(Q, D): embeddings after PGD."""
        config = PGDConfig(
            epsilon=EPSILON,
            steps=NUM_STEPS,
            alpha_ratio=NUM_STEPS * ALPHA / EPSILON,
            random_start=random_start,
        )
        self.attacks += 1
        emb_QD = self.victim.moved(f"ers {self.attacks}", objective, images, config)
        self.progress(1)
        return torch.from_numpy(emb_QD).to(self.victim.device)

    def _percentile(self, item_QD: Tensor | None, item_Q: Tensor, query_QD: Tensor | None) -> float:
        """Mean share of the gallery, in %, that is nearer to the query than the item."""
        query_QD = self.query_QD if query_QD is None else query_QD
        item_QD = self.gallery_GD[item_Q] if item_QD is None else item_QD
        cosine_QG = query_QD @ self.gallery_GD.T
        own_Q1 = (query_QD * item_QD).sum(1, keepdim=True)
        nearer_QG = (cosine_QG > own_Q1).scatter(1, item_Q[:, None], False)
        return 100 * float(nearer_QG.float().mean())

    def _recall(self, emb_QD: Tensor) -> float:
        nearest_Q = (emb_QD @ self.gallery_GD.T).argmax(1)
        return 100 * float(self.same_QG.gather(1, nearest_Q[:, None]).float().mean())
