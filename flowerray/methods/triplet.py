"""Triplet loss with five miners: an anchor lies nearer to its positive than to its negative.

Batch-hard and soft margin: Hermans, Beyer, Leibe 2017, arXiv:1703.07737, eq. 5 and section 2.
Hinge and semi-hard: Schroff, Kalenichenko, Philbin, CVPR 2015, arXiv:1503.03832, eq. 1 and 4.
Distance-weighted: Wu, Manmatha, Smola, Kraehenbuehl, ICCV 2017, arXiv:1706.07567, eq. 5.

    L = mean over the triplets with loss > 0 of max(0, d_ap - d_an + margin)
    soft: mean over the triplets of log(1 + exp(d_ap - d_an))

d is the Euclidean distance of unit vectors, not squared (FaceNet squares it); solved triplets do
not dilute the mean. Semi-hard takes every negative inside the margin's band, FaceNet one of them.

Letters: B images of the batch, D embedding dimensions.
"""

from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

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

EXPORT_NAME = "triplet_loss"

# Wu et al.'s own code: nearer negatives count as this near, farther ones are not drawn.
NEAREST, FARTHEST = 0.5, 1.4

Miner = Literal["random", "all", "semi-hard", "batch-hard", "distance-weighted"]


class Config(MethodConfig):
    """The triplet loss."""

    margin: float = Field(0.2, gt=0, le=2)
    """How much farther the negative must be, in embedding distance (0..2 between unit vectors)."""
    miner: Miner = "distance-weighted"
    """Which triplets of the batch count. random, distance-weighted: each positive pair with one
    drawn negative. all: every triplet. semi-hard: those whose negative is farther than the positive
    by less than the margin. batch-hard: each anchor's farthest positive and nearest negative; in
    short trainings it can pull all embeddings together first (watch `spread`)."""
    soft: bool = False
    """log(1 + exp(d_ap - d_an)) in place of the hinge; the margin then only bounds semi-hard."""


space: dict[str, dict[str, Any]] = {
    "method.margin": {"low": 0.03, "high": 0.5, "log": True},
    "method.miner": {"choices": ["all", "semi-hard", "batch-hard", "distance-weighted"]},
}

# Val MAP@R of Flowers-102 (128 px, 15 epochs, one seed): 1e-4 0.753, 2.5e-4 0.766.
defaults: dict[str, dict[str, Any]] = {"all": {"lr": 2.5e-4}, "head": {"epochs": 45, "lr": 1e-3}}


@final
class Triplet(Method):
    """The triplet loss of the global batch."""

    config: Config

    def loss(self, emb_BD: Tensor, labels_B: Tensor) -> Loss:
        """The triplet loss; 0, connected to the graph, where the batch has no triplet.

        Memory is B^3 for the miners all and semi-hard, B^2 for the others.
        """
        emb_BD = widen(emb_BD)
        dist_BB = distances(emb_BD)
        d_ap, d_an, valid = self.mine(dist_BB, labels_B, emb_BD.shape[1])
        if self.config.soft:
            violation = d_ap - d_an
            terms = F.softplus(violation)
        else:
            violation = d_ap - d_an + self.config.margin
            terms = violation.relu()
        total = mean_nonzero(terms, valid)
        active = mean_where((violation.detach() > 0).to(dist_BB.dtype), valid)
        curves = common_curves(emb_BD, labels_B, dist_BB, active)
        return Loss(total, curves, mean_where(terms.detach(), valid))

    def attack_loss(self, emb_BD: Tensor, labels_B: Tensor, last_loss: Tensor) -> Tensor:
        """Minus the squared lack of hardness H = d_ap - d_an below a destination: at most 0.

        Zhou & Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", CVPR 2022:
        an attack that maximises the loss without end makes this training collapse, so images move
        only until their triplets are as hard as the destination, here 0: the positive as far as the
        negative. There the loss is that of an embedding which maps all images to one point.

        With `last_loss` above 0 it is their LGA schedule, destination = -gamma min(last loss,
        gamma) / gamma with the margin as gamma: from -gamma (hardly a loss) towards 0 as training
        succeeds. With miners that choose hard triplets the loss stays at the margin, and so the
        attack at its weakest.
        """
        d_ap, d_an, valid = self.mine(distances(emb_BD), labels_B, emb_BD.shape[1])
        lack = (-last_loss.clamp(max=self.config.margin) - (d_ap - d_an)).relu()
        return -mean_where(lack.square(), valid)

    def mine(self, dist_BB: Tensor, labels_B: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Anchor-positive and anchor-negative distances and which are triplets; they broadcast."""
        positive_BB, negative_BB = pair_masks(labels_B)
        plain_BB = dist_BB.detach()
        miner = self.config.miner
        if miner == "batch-hard":
            far_B = plain_BB.where(positive_BB, -torch.inf).argmax(1)
            near_B = plain_BB.where(negative_BB, torch.inf).argmin(1)
            valid_B = positive_BB.any(1) & negative_BB.any(1)
            return _pick(dist_BB, far_B), _pick(dist_BB, near_B), valid_B
        if miner in ("all", "semi-hard"):
            d_ap, d_an = dist_BB[:, :, None], dist_BB[:, None, :]
            valid_BBB = positive_BB[:, :, None] & negative_BB[:, None, :]
            if miner == "semi-hard":
                gap_BBB = plain_BB[:, None, :] - plain_BB[:, :, None]
                # Put this way round, NaN stays in and reaches the loss.
                valid_BBB = valid_BBB & ~((gap_BBB <= 0) | (gap_BBB >= self.config.margin))
            return d_ap, d_an, valid_BBB
        if miner == "random":
            weights_BB = negative_BB.to(dist_BB.dtype)
        else:
            weights_BB = distance_weights(plain_BB, negative_BB, dim)
        drawn_BB, found_BB = draw_columns(weights_BB, self.generator())
        return dist_BB, dist_BB.gather(1, drawn_BB), positive_BB & found_BB


def _pick(dist_BB: Tensor, column_B: Tensor) -> Tensor:
    return dist_BB.gather(1, column_B[:, None])[:, 0]


def distance_weights(dist_BB: Tensor, negative_BB: Tensor, dim: int) -> Tensor:
    """Wu et al.'s weight of each negative, 1 / q(d), scaled to a maximum of 1 a row; 0 elsewhere.

    q(d) = d^(D-2) (1 - d^2/4)^((D-3)/2) is how often two random points of the sphere are d apart.
    """
    near_BB = dist_BB.clamp(NEAREST, FARTHEST)
    log_BB = (2 - dim) * near_BB.log() - (dim - 3) / 2 * (1 - near_BB.square() / 4).log()
    allowed_BB = negative_BB & ~(dist_BB >= FARTHEST)
    log_BB = log_BB.where(allowed_BB, -torch.inf)
    top_B1 = log_BB.amax(1, keepdim=True).clamp(min=torch.finfo(log_BB.dtype).min)
    return (log_BB - top_B1).exp()


def draw_columns(weights_BB: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each place of a row one column, drawn by the row's weights, and whether there was any."""
    sums_BB = weights_BB.cumsum(1)
    uniform_BB = torch.rand(weights_BB.shape, generator=generator, dtype=torch.float64)
    uniform_BB = to_device(uniform_BB.to(weights_BB.dtype), weights_BB.device)
    target_BB = uniform_BB * sums_BB[:, -1:]
    column_BB = torch.searchsorted(sums_BB, target_BB, right=True).clamp(
        max=weights_BB.shape[1] - 1
    )
    # Where rounding lifts the target to the whole sum, the last column comes, whatever its weight.
    return column_BB, ~(weights_BB.gather(1, column_BB) <= 0)
