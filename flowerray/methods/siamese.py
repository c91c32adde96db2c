"""Siamese network: one embedder for both images of a pair, trained to tell same from different.

Contrastive head: Hadsell, Chopra, LeCun, CVPR 2006, eq. 4, with a margin for positives too:

    L = mean of max(0, d - positive_margin)^power + mean of max(0, negative_margin - d)^power

over the positive and the negative pairs whose term is not 0. Hadsell's form is power 2, positive
margin 0, and a factor 1/2 that we leave out.

BCE head: Koch, Zemel, Salakhutdinov, "Siamese Neural Networks for One-shot Image Recognition", ICML
Deep Learning Workshop 2015: P(same) = sigmoid(offset - sum_k w_k |f1_k - f2_k|), here with w_k > 0.
The logit is then an offset minus a weighted Manhattan distance: symmetric, highest for an image
with itself, and falling as embeddings part, so that what it learns is a metric that an index can
hold. It serves training only: retrieval and pairs use the cosine of the embedding.

Pairs are formed inside the global batch; d is the Euclidean distance of unit vectors.

Letters: B images of the batch, D embedding dimensions.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flowerray.gpu import to_device
from flowerray.methods._base import (
    Loss,
    Method,
    MethodConfig,
    common_curves,
    distances,
    mean_nonzero,
    mean_where,
    pair_masks,
    widen,
)

if TYPE_CHECKING:
    from flowerray.model.embedder import Embedder, Head

EXPORT_NAME = "siamese_network"


class Config(MethodConfig):
    """The siamese network."""

    head: Literal["contrastive", "bce"] = "contrastive"
    """What judges a pair: its distance against two margins, or a learned logit on |f1 - f2|."""
    positive_margin: float = Field(0.0, ge=0, le=2)
    """Positives nearer than this cause no loss, in embedding distance (0..2); contrastive only."""
    negative_margin: float = Field(0.8, gt=0, le=2)
    """Negatives farther than this cause no loss, in embedding distance (0..2); contrastive only."""
    power: Literal[1, 2] = 1
    """Exponent of each contrastive term."""
    negatives: Literal["all", "balanced", "hard"] = "hard"
    """Which negatives of an anchor count: all, as many drawn by chance as it has positives
    (balanced), or as many of its nearest (hard)."""


space: dict[str, dict[str, Any]] = {
    "method.negative_margin": {"low": 0.3, "high": 1.2, "log": False},
    "method.positive_margin": {"low": 0.0, "high": 0.3, "log": False},
    "method.negatives": {"choices": ["all", "balanced", "hard"]},
}

defaults: dict[str, dict[str, Any]] = {"head": {"epochs": 45, "lr": 1e-3}}


@final
class Siamese(Method):
    """Pairs of the global batch, judged by distance or by a logit."""

    config: Config

    def __init__(self, config: Config, embedder: "Embedder | Head", num_classes: int) -> None:
        super().__init__(config, embedder, num_classes)
        if config.head == "bce":
            # Evenly weighted |f1 - f2| sums to about sqrt(2 D / pi) d, so this starts near
            # 10 (0.7 - d): even odds at distance 0.7.
            start = math.log(10 / math.sqrt(2 * embedder.dim / math.pi))
            self.log_weight_D = nn.Parameter(torch.full((embedder.dim,), start))
            self.offset = nn.Parameter(torch.tensor(7.0))

    def loss(self, emb_BD: Tensor, labels_B: Tensor) -> Loss:
        """The mean term of the positive pairs plus that of the negative pairs, of those not 0.

        `active` is the share of pairs that cause loss (contrastive) or get under even odds (bce).
        """
        emb_BD = widen(emb_BD)
        dist_BB = distances(emb_BD)
        positive_BB, negative_BB = pair_masks(labels_B)
        negative_BB = self.choose(dist_BB.detach(), positive_BB, negative_BB)
        if self.config.head == "contrastive":
            near_BB = (dist_BB - self.config.positive_margin).relu() ** self.config.power
            far_BB = (self.config.negative_margin - dist_BB).relu() ** self.config.power
            threshold = 0.0
        else:
            logit_BB = self.logits(emb_BD)
            near_BB, far_BB = F.softplus(-logit_BB), F.softplus(logit_BB)
            threshold = math.log(2)
        total = mean_nonzero(near_BB, positive_BB) + mean_nonzero(far_BB, negative_BB)
        with torch.no_grad():
            term_BB = near_BB.where(positive_BB, far_BB)
            active = mean_where((term_BB > threshold).to(emb_BD.dtype), positive_BB | negative_BB)
            over_all = mean_where(near_BB, positive_BB) + mean_where(far_BB, negative_BB)
        return Loss(total, common_curves(emb_BD, labels_B, dist_BB, active), over_all)

    def attack_loss(self, emb_BD: Tensor, labels_B: Tensor, last_loss: Tensor) -> Tensor:
        """Minus the squared lack of hardness below a destination, over anchors: at most 0.

        The rule of the triplet's `attack_loss`, with an anchor's mean distance to its positives and
        to the negatives that count. With positives moved 0.1 farther than negatives the embedding
        collapsed (its spread fell from 0.77 to 0.02 in two epochs of 26 steps, one seed).
        """
        config = self.config
        dist_BB = distances(emb_BD)
        positive_BB, negative_BB = pair_masks(labels_B)
        negative_BB = self.choose(dist_BB.detach(), positive_BB, negative_BB)
        if config.head == "contrastive":
            band = max(0.0, config.negative_margin - config.positive_margin)
        else:
            dist_BB, band = -self.logits(emb_BD), 2 * math.log(2)
        d_ap, d_an = (
            dist_BB.where(mask_BB, 0.0).sum(1) / mask_BB.sum(1).clamp(min=1)
            for mask_BB in (positive_BB, negative_BB)
        )
        lack_B = (-last_loss.clamp(max=band) - (d_ap - d_an)).relu()
        return -mean_where(lack_B.square(), positive_BB.any(1) & negative_BB.any(1))

    def logits(self, emb_BD: Tensor) -> Tensor:
        """The BCE head's logit of "same class" for all pairs, BB."""
        return self.offset - distances(emb_BD * self.log_weight_D.exp(), p=1.0)

    def choose(self, dist_BB: Tensor, positive_BB: Tensor, negative_BB: Tensor) -> Tensor:
        """The negatives that count: all of them, or in each row as many as it has positives."""
        if self.config.negatives == "all":
            return negative_BB
        if self.config.negatives == "balanced":
            key_BB = torch.rand(dist_BB.shape, generator=self.generator())
            key_BB = to_device(key_BB, dist_BB.device)
        else:
            key_BB = dist_BB
        order_BB = key_BB.where(negative_BB, torch.inf).argsort(dim=1, stable=True)
        rank_BB = order_BB.argsort(dim=1)
        return negative_BB & (rank_BB < positive_BB.sum(1, keepdim=True))
