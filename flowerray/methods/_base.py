"""What all methods share: the Method module, its Config, the gather across workers, pairs.

Letters: B images of the global batch, b of this worker's slice, D embedding dimensions, C H W an
image.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowerray.config import Config

if TYPE_CHECKING:  # the methods can be listed and configured without loading timm
    from flowerray.model.embedder import Embedder, Head


class MethodConfig(Config):
    """The base of each method's Config."""


class Loss(NamedTuple):
    """What a method says of one batch."""

    total: Tensor
    """The scalar to minimise, connected to the graph also when no tuple is active."""
    curves: dict[str, Tensor]
    """Detached scalars worth a curve: those of `common_curves`, and the method's own."""
    over_all: Tensor | None = None
    """Detached: the loss as a mean over all tuples, those that cause none included, where `total`
    is not that. The LGA schedule of attacks goes by it."""


class Output(NamedTuple):
    """What `Method.forward` returns."""

    loss: Loss
    emb_BD: Tensor
    """The global batch's embeddings, detached."""
    labels_B: Tensor
    """The global batch's labels."""


class _Gather(torch.autograd.Function):
    """All ranks' rows, by rank; the gradient of the own rows comes back times the world size.

    Every rank computes the same loss of the same global batch, so the gradient that reaches the own
    rows is already whole; DDP then averages over ranks, which the factor undoes. Backward needs no
    communication, and parameters of the loss itself (equal gradients on every rank) stay right
    under DDP's average. An attack's gradient by its images has the factor too: use its direction.
    """

    @staticmethod
    def forward(ctx, rows_bD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _all_rows(rows_bD)

    @staticmethod
    def backward(ctx, grad_BD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        world, rank = dist.get_world_size(), dist.get_rank()
        return grad_BD.chunk(world)[rank] * world


def _all_rows(rows_b: Tensor) -> Tensor:
    blocks = [torch.empty_like(rows_b) for _ in range(dist.get_world_size())]
    dist.all_gather(blocks, rows_b.contiguous())
    return torch.cat(blocks)


def gather(rows_b: Tensor) -> Tensor:
    """The global batch from the workers' equal slices, by rank, with gradient.

    With one worker it is the input itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows_b
    return _Gather.apply(rows_b) if rows_b.is_floating_point() else _all_rows(rows_b)


class Method(nn.Module, ABC):
    """An embedder and a loss with its parameters: one module, so that DDP keeps all of it equal."""

    def __init__(self, config: MethodConfig, embedder: "Embedder | Head", num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.embedder = embedder
        self.num_classes = num_classes
        self.seed: tuple[int, ...] = (embedder.seed,)
        """The loop sets (seed, epoch, step) before each step; the loss draws from it alone."""

    def forward(self, images_bCHW: Tensor, labels_b: Tensor) -> Output:
        """Embeds this worker's slice, gathers the global batch, and calls `loss`.

        The loss is computed in float32 (float64 for a double model) also under autocast: squared
        distances overflow in float16 and lose the small ones in bfloat16.

        Args:
            images_bCHW: float pixels in [0,1].
            labels_b: int64 classes, 0..num_classes-1.
        """
        emb_BD = self.embed(images_bCHW)
        labels_B = gather(labels_b)
        with torch.autocast(emb_BD.device.type, enabled=False):
            return Output(self.loss(emb_BD, labels_B), emb_BD.detach(), labels_B)

    def embed(self, images_bCHW: Tensor) -> Tensor:
        """The global batch's embeddings BD from this worker's slice, in float32 or float64."""
        return widen(gather(self.embedder(images_bCHW)))

    @abstractmethod
    def loss(self, emb_BD: Tensor, labels_B: Tensor) -> Loss:
        """The loss of a global batch of unit embeddings.

        A pure function of its input, the parameters and `seed`: attacks call it many times a step.
        """

    def attack_loss(self, emb_BD: Tensor, labels_B: Tensor, last_loss: Tensor) -> Tensor:
        """What an attack in adversarial training raises, a scalar; by default the loss itself.

        Args:
            emb_BD: the global batch as the attack has moved it so far.
            labels_B: its classes.
            last_loss: scalar. With `harden.destination` zero it is 0; with lga the last training
                step's loss on adversarial images as a mean over all tuples, also those without any,
                and infinite before the first step.
        """
        return self.loss(emb_BD, labels_B).total

    def divergence(self, clean_BD: Tensor, moved_BD: Tensor) -> Tensor:
        """How far an attack moved what the method says of each image, B, not negative (TRADES).

        By default half the squared distance of the embeddings over the clean batch's variance. An
        embedding without class posteriors has no KL divergence; where it is taken for the mean of a
        normal distribution of that variance, the KL is this up to a constant factor. A plain
        distance would not do: pulling all embeddings together lowers it (in two short trainings the
        spread fell to 0.19 and 0.08).
        """
        variance = (clean_BD - clean_BD.mean(0)).square().sum(1).mean()
        return 0.5 * (clean_BD - moved_BD).square().sum(1) / variance.clamp(min=1e-6)

    def after_step(self, output: Output) -> None:
        """What changes outside the optimizer, once an optimizer step (centers); by default nothing.

        Args:
            output: the step's own output; it holds the global batch, so every worker does the same.
        """

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by `seed`: equal on every worker and for every call in a step."""
        # torch keeps 32 bits of a CPU seed, so (seed, epoch, step) is hashed and not just packed.
        mixed = np.random.SeedSequence(self.seed).generate_state(1)[0]
        return torch.Generator().manual_seed(int(mixed))


def widen(emb_BD: Tensor) -> Tensor:
    """The embeddings in float32, or in float64 where they are that already."""
    return emb_BD if emb_BD.dtype == torch.float64 else emb_BD.float()


def distances(emb_BD: Tensor, p: float = 2.0) -> Tensor:
    """Distances of all pairs, BB: 0..2 between unit vectors for the Euclidean p = 2.

    Differences are taken before squares, which a matrix product would not do: near pairs keep their
    digits, and identical images have distance 0 with gradient 0 (and not NaN).
    """
    with torch.autocast(emb_BD.device.type, enabled=False):
        emb_BD = widen(emb_BD)
        return torch.cdist(emb_BD, emb_BD, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def pair_masks(labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Which ordered pairs are positive (two images, one class) and negative (two classes), BB."""
    same_BB = labels_B[:, None] == labels_B[None, :]
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    return same_BB & ~itself_BB, ~same_BB


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` holds; 0, still in the graph, where it holds nowhere."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def mean_nonzero(losses: Tensor, valid: Tensor) -> Tensor:
    """The mean of the valid losses that are not 0, so that solved tuples do not dilute it.

    NaN counts as not 0: a broken embedding must not read as a perfect one.
    """
    return mean_where(losses, valid & ~(losses <= 0))


def common_curves(
    emb_BD: Tensor,
    labels_B: Tensor,
    dist_BB: Tensor | None = None,
    active: Tensor | None = None,
) -> dict[str, Tensor]:
    """The curves that every method logs, since they show a collapse; detached scalars.

    `d_ap`, `d_an`: mean distance of the batch's positive and negative pairs (0..2). `spread`: root
    mean square distance of the embeddings from their mean, 0 (all in one point) to 1. `active`: the
    share that the method passes in, of tuples that still cause loss; left out where it passes none.
    """
    emb_BD = widen(emb_BD.detach())
    dist_BB = distances(emb_BD) if dist_BB is None else dist_BB.detach()
    positive_BB, negative_BB = pair_masks(labels_B)
    spread = (emb_BD - emb_BD.mean(0)).square().sum(1).mean().sqrt()
    return {
        "d_ap": mean_where(dist_BB, positive_BB),
        "d_an": mean_where(dist_BB, negative_BB),
        "spread": spread,
        **({} if active is None else {"active": active.detach()}),
    }
