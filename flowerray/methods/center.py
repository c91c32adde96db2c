"""Center loss: softmax cross-entropy keeps classes apart, centers pull each class together.

Wen, Zhang, Li, Qiao, "A Discriminative Feature Learning Approach for Deep Face Recognition",
ECCV 2016, eq. 5 (loss) and eq. 4 (centers):

    L = cross-entropy + lambda / 2 * ||x_i - c_yi||^2    both as means over the batch (paper: sums)
    delta c_j = sum over y_i = j of (c_j - x_i) / (1 + n_j);   c_j <- c_j - alpha * delta c_j

We differ: x and the class weights are unit vectors and logits are their cosine times `scale`, so
that the cosine that retrieval uses is what is trained. Centers are moved by the rule, never by the
optimizer, once a step and from the global batch.

Letters: B images of the batch, D embedding dimensions, C classes.
"""

from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flowerray.methods._base import (
    Loss,
    Method,
    MethodConfig,
    Output,
    common_curves,
    distances,
    widen,
)

if TYPE_CHECKING:
    from flowerray.model.embedder import Embedder, Head

EXPORT_NAME = "center_loss"


class Config(MethodConfig):
    """The center loss."""

    center_weight: float = Field(1.0, ge=0)
    """lambda, the weight of the center term; 0 is plain cross-entropy."""
    center_rate: float = Field(0.5, gt=0, le=1)
    """alpha, the share of the paper's step that centers move after each batch."""
    scale: float = Field(8.0, gt=0)
    """Factor from cosine (-1..1) to logit."""


# On the unit sphere distances are at most 2, so lambda works at larger values than in the paper's
# unbounded space: measured, 0.01 is hardly felt and 10 holds all classes close together.
space: dict[str, dict[str, Any]] = {
    "method.center_weight": {"low": 1e-2, "high": 10.0, "log": True},
    "method.center_rate": {"low": 0.05, "high": 1.0, "log": True},
    "method.scale": {"low": 4.0, "high": 32.0, "log": True},
}

# Val MAP@R of Flowers-102 (128 px, 15 epochs, one seed): 3e-4 0.842, 6e-4 0.858; 1.2e-3 diverged.
defaults: dict[str, dict[str, Any]] = {"all": {"lr": 6e-4}, "head": {"epochs": 45, "lr": 1e-3}}


@final
class Center(Method):
    """Cosine-softmax cross-entropy plus the center loss."""

    config: Config
    centers_CD: Tensor

    def __init__(self, config: Config, embedder: "Embedder | Head", num_classes: int) -> None:
        super().__init__(config, embedder, num_classes)
        # Rows of length 1: AdamW steps by an absolute amount, which would turn longer rows slowly.
        rows_CD = F.normalize(torch.randn(num_classes, embedder.dim, generator=self.generator()))
        self.weight_CD = nn.Parameter(rows_CD)
        # Zeros, not random points: a center at 0 is equally far from the whole sphere and does not
        # turn any embedding; it starts to pull as it moves out to the images of its class.
        self.register_buffer("centers_CD", torch.zeros(num_classes, embedder.dim))

    def loss(self, emb_BD: Tensor, labels_B: Tensor) -> Loss:
        """Cross-entropy plus lambda / 2 times the mean squared distance to the own center.

        Curves besides the common ones: `accuracy`, `d_center` (mean distance to the own center);
        `active` is the share of images whose class gets less than even odds.
        """
        with torch.autocast(emb_BD.device.type, enabled=False):
            emb_BD = widen(emb_BD)
            logits_BC = self.logits(emb_BD)
            total = F.cross_entropy(logits_BC, labels_B)
            square_B = (emb_BD - self.centers_CD[labels_B]).square().sum(1)
            if self.config.center_weight:
                total = total + self.config.center_weight * 0.5 * square_B.mean()
        with torch.no_grad():
            odds_B = logits_BC.softmax(1).gather(1, labels_B[:, None])
            active = (odds_B < 0.5).to(emb_BD.dtype).mean()
            curves = common_curves(emb_BD, labels_B, distances(emb_BD), active)
            curves["accuracy"] = (logits_BC.argmax(1) == labels_B).to(emb_BD.dtype).mean()
            curves["d_center"] = square_B.sqrt().mean()
        return Loss(total, curves)

    def logits(self, emb_BD: Tensor) -> Tensor:
        """Cosine to each class's weights times `scale`, BC."""
        return self.config.scale * F.linear(emb_BD, F.normalize(widen(self.weight_CD)))

    def divergence(self, clean_BD: Tensor, moved_BD: Tensor) -> Tensor:
        """KL divergence (nats) of the class posteriors, from the clean one to the moved one, B.

        Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML
        2019: the second term of TRADES, without its weight.
        """
        clean_BC, moved_BC = (self.logits(emb).log_softmax(1) for emb in (clean_BD, moved_BD))
        return F.kl_div(moved_BC, clean_BC, reduction="none", log_target=True).sum(1)

    @torch.no_grad()
    def after_step(self, output: Output) -> None:
        """Moves the centers by the paper's rule, from the global batch's sums and counts.

        Every worker holds that batch, so all compute the same without a word between them.
        """
        emb_BD = widen(output.emb_BD)
        classes_C = torch.arange(self.num_classes, device=output.labels_B.device)
        # A product with a 0/1 matrix: unlike a scatter, its sums come in one order on a GPU too.
        own_CB = (classes_C[:, None] == output.labels_B).to(emb_BD.dtype)
        count_C1 = own_CB.sum(1, keepdim=True)
        delta_CD = (count_C1 * self.centers_CD - own_CB @ emb_BD) / (1 + count_C1)
        self.centers_CD -= self.config.center_rate * delta_CD
