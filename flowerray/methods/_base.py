"""What the three methods share: the Method module, its configuration, and the gather across workers.

Letters: B images of the global batch, b of this worker's slice, D embedding dimensions, C H W an image.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowerray.config import Config
from flowerray.model import Embedder


class MethodConfig(Config):
    """The base of each method's Config."""


class Loss(NamedTuple):
    """What a method says of one batch."""

    total: Tensor
    """The scalar to minimise, connected to the graph also when no tuple is active."""
    curves: dict[str, Tensor]
    """Detached scalars worth a curve; names alike across methods: `d_ap`, `d_an`, `active`, `spread`, ..."""


class Output(NamedTuple):
    """What `Method.forward` returns."""

    loss: Loss
    emb_BD: Tensor
    """The global batch's embeddings, detached."""
    labels_B: Tensor
    """The global batch's labels."""


class _Gather(torch.autograd.Function):
    """All ranks' rows, concatenated by rank; the gradient of the own rows comes back times the world size.

    Every rank computes the same loss of the same global batch, so the gradient that reaches the own rows is already
    whole; DDP then averages over ranks, which the factor undoes. No communication is needed in backward, and
    parameters of the loss itself (equal gradients on every rank) stay right under DDP's average.
    """

    @staticmethod
    def forward(ctx, rows_bD: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        blocks = [torch.empty_like(rows_bD) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, rows_bD.contiguous())
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx, grad_BD: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        world, rank = dist.get_world_size(), dist.get_rank()
        return grad_BD.chunk(world)[rank] * world


def gather(rows_bD: Tensor) -> Tensor:
    """The global batch from each worker's equal slice, with gradient; the input itself where there is one worker."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows_bD
    return _Gather.apply(rows_bD) if rows_bD.is_floating_point() else _gather_labels(rows_bD)


def _gather_labels(labels_b: Tensor) -> Tensor:
    blocks = [torch.empty_like(labels_b) for _ in range(dist.get_world_size())]
    dist.all_gather(blocks, labels_b.contiguous())
    return torch.cat(blocks)


class Method(nn.Module, ABC):
    """An embedder and a loss with its parameters, as one module, so that DDP keeps all of it equal between workers."""

    def __init__(self, config: MethodConfig, embedder: Embedder, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.embedder = embedder
        self.num_classes = num_classes
        self.seed: tuple[int, ...] = (0,)
        """Set by the loop to (seed, epoch, step) before each step: what the loss draws is a function of it alone."""

    def forward(self, images_bCHW: Tensor, labels_b: Tensor) -> Output:
        """Embeds this worker's slice, gathers the global batch, and calls `loss`.

        Args:
            images_bCHW: float pixels in [0,1].
            labels_b: int64 classes, 0..num_classes-1.
        """
        emb_BD = gather(self.embedder(images_bCHW))
        labels_B = gather(labels_b)
        return Output(self.loss(emb_BD, labels_B), emb_BD.detach(), labels_B)

    @abstractmethod
    def loss(self, emb_BD: Tensor, labels_B: Tensor) -> Loss:
        """The loss of a global batch of unit embeddings; a pure function of its input, the parameters and `seed`."""

    def after_step(self, output: Output) -> None:
        """What changes outside the optimizer, once per optimizer step (the centers); by default nothing."""

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by `seed`: equal on every worker, and equal each time that one step calls the loss."""
        mixed = 0
        for part in self.seed:
            mixed = (mixed * 1_000_003 + part + 1) % (2**63)
        return torch.Generator().manual_seed(mixed)
