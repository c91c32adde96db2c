"""The methods' losses for somebody's own loop: unit embeddings and labels in, a scalar out.

Each is the formula of the method of `flowerray train`, see flowerray/methods; it knows no network.
The batch is that of this process; nothing is gathered from other workers.

Letters: B images of the batch, D embedding dimensions.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.methods import center, siamese, triplet
from flowerray.methods._base import Method, Output
from flowerray.methods.triplet import Miner

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class _NoNetwork(nn.Module):
    """What a method asks of its embedder when it is built."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.dim, self.seed = dim, seed


class _Loss(nn.Module):
    """A method's loss without its network."""

    def __init__(self, kind: type[Method], config: Any, seed: int, classes: int, dim: int) -> None:
        super().__init__()
        self.method = kind(config, _NoNetwork(dim, seed), classes)  # type: ignore[arg-type]
        self.seed, self.calls = seed, 0
        self.curves: dict[str, Tensor] = {}
        """Detached scalars of the last call: mean distances, spread, share of active tuples."""

    def forward(self, emb_BD: Tensor, labels_B: Tensor) -> Tensor:
        """The loss of a batch: a scalar, in the graph also where no tuple causes any.

        What a call draws is decided by `seed` and the number of calls before it, which the
        state_dict carries; no global generator is touched.

        Args:
            emb_BD: unit vectors, float32 or float64 (halves are widened).
            labels_B: int64 classes.

        Raises:
            UserError: shapes or types that do not fit; in the first call rows that are no unit
                vectors.
        """
        if not isinstance(emb_BD, Tensor) or not isinstance(labels_B, Tensor):
            raise UserError("a loss takes `emb_BD` and `labels_B` as torch tensors.")
        if (
            emb_BD.ndim != 2 or not emb_BD.is_floating_point()
            or labels_B.shape != emb_BD.shape[:1] or labels_B.dtype not in _INTEGERS
        ):  # fmt: skip
            raise UserError(
                "a loss takes float `emb_BD` of shape (B, D) and integer `labels_B` of shape (B,), "
                f"and was given {emb_BD.dtype} {tuple(emb_BD.shape)} and {labels_B.dtype} "
                f"{tuple(labels_B.shape)}."
            )
        self._check(emb_BD, labels_B)
        if not self.calls and ((emb_BD.detach().norm(dim=1) - 1).abs() > 0.01).any():
            raise UserError("`emb_BD` has rows that are no unit vectors: normalise them first.")
        self.method.seed, self.calls = (self.seed, self.calls), self.calls + 1
        with torch.autocast(emb_BD.device.type, enabled=False):
            loss = self.method.loss(emb_BD, labels_B.long())
        if self.training:
            self.method.after_step(Output(loss, emb_BD.detach(), labels_B.long()))
        self.curves = loss.curves
        return loss.total

    def _check(self, emb_BD: Tensor, labels_B: Tensor) -> None:
        """Raises UserError where the batch does not fit this loss."""

    def get_extra_state(self) -> int:
        """The number of calls so far."""
        return self.calls

    def set_extra_state(self, calls: int) -> None:
        """Goes on after so many calls."""
        self.calls = calls


class Center(_Loss):
    """Cosine-softmax cross-entropy plus the center loss (Wen et al., ECCV 2016).

    It has parameters: give them to the optimizer, and move it to the embeddings' device. In train
    mode each call moves the centers by the paper's rule, after the loss was taken.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        center_weight: float = 1.0,
        center_rate: float = 0.5,
        scale: float = 8.0,
        seed: int = 0,
    ) -> None:
        """See `methods.center.Config`; labels are 0..num_classes-1, `dim` is D."""
        config = center.Config(center_weight=center_weight, center_rate=center_rate, scale=scale)
        if not all(isinstance(count, int) and count > 0 for count in (num_classes, dim)):
            raise UserError(
                f"`num_classes` = {num_classes!r}, `dim` = {dim!r}: give integers of at least 1."
            )
        super().__init__(center.Center, config, seed, num_classes, dim)
        self.num_classes, self.dim = num_classes, dim

    def _check(self, emb_BD: Tensor, labels_B: Tensor) -> None:
        if (found := emb_BD.shape[1]) != self.dim:
            raise UserError(f"`emb_BD` has D = {found}, and this loss `dim` = {self.dim}.")
        if labels_B.device.type != "cpu" or not len(labels_B):  # a GPU would be waited for
            return
        low, high = int(labels_B.min()), int(labels_B.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"`labels_B` has classes {low} to {high}: with `num_classes` = {self.num_classes} "
                f"they are 0 to {self.num_classes - 1}."
            )


class Contrastive(_Loss):
    """Contrastive loss with a margin on either side (Hadsell et al., CVPR 2006)."""

    def __init__(
        self,
        *,
        positive_margin: float = 0.0,
        negative_margin: float = 0.8,
        power: Literal[1, 2] = 1,
        negatives: Literal["all", "balanced", "hard"] = "hard",
        seed: int = 0,
    ) -> None:
        """See `methods.siamese.Config`; margins in embedding distance, 0..2."""
        config = siamese.Config(
            positive_margin=positive_margin, negative_margin=negative_margin, power=power,
            negatives=negatives,
        )  # fmt: skip
        super().__init__(siamese.Siamese, config, seed, 0, 0)


class Triplet(_Loss):
    """Triplet loss with five miners (FaceNet; Hermans et al. 2017; Wu et al., ICCV 2017)."""

    def __init__(
        self,
        margin: float = 0.2,
        *,
        miner: Miner = "distance-weighted",
        soft: bool = False,
        seed: int = 0,
    ) -> None:
        """See `methods.triplet.Config`; the margin in embedding distance, 0..2."""
        config = triplet.Config(margin=margin, miner=miner, soft=soft)
        super().__init__(triplet.Triplet, config, seed, 0, 0)
