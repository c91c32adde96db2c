"""What the tests attack: tiny embedders, a gallery, queries that are right before any attack.

Letters: Q queries, G gallery items, D embedding dimensions, C H W an image.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.retrieval.search import nearest

CLASSES = 6


class Linear(nn.Module):
    """The smallest embedder: a projection of the pixels, made unit; dropout shows train mode."""

    def __init__(self, side: int = 8, dim: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dim, 3 * side * side, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        centred = self.dropout(images_BCHW.flatten(1) - 0.5)
        return F.normalize(F.linear(centred, self.weight), dim=1)


class Batch(NamedTuple):
    """The tensors of one attack."""

    embedder: nn.Module
    images_QCHW: Tensor
    labels_Q: Tensor
    gallery_GD: Tensor
    gallery_labels_G: Tensor

    def recall(self, images_QCHW: Tensor) -> float:
        """Recall@1 by the package's own search."""
        return float(self.right(images_QCHW).float().mean())

    def right(self, images_QCHW: Tensor) -> Tensor:
        """Whether each nearest neighbour is of the right class, Q."""
        with torch.inference_mode():
            emb_QD = eval_copy(self.embedder)(images_QCHW)
        found_Q = nearest(emb_QD.numpy(), self.gallery_GD.numpy(), k=1)[:, 0]
        return self.gallery_labels_G[torch.from_numpy(found_Q)] == self.labels_Q


def eval_copy(embedder: nn.Module) -> nn.Module:
    """A copy in eval mode, so that looking changes nothing."""
    import copy

    return copy.deepcopy(embedder).eval()


def tiny(seed: int = 0) -> Embedder:
    """A timm backbone with random weights at 32 px, in train mode with frozen BatchNorm."""
    config = EmbedderConfig(backbone="test_efficientnet", dim=16, image_size=32, weights="none")
    return Embedder(config, seed=seed)


def batch(
    embedder: nn.Module,
    side: int,
    queries: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random gallery images of 6 classes; the queries are like some of them."""
    generator = torch.Generator().manual_seed(seed)
    gallery_GCHW = torch.rand(4 * CLASSES, 3, side, side, generator=generator).to(dtype)
    labels_G = torch.arange(4 * CLASSES) % CLASSES
    chosen_Q = torch.randint(len(labels_G), (queries,), generator=generator)
    other_QCHW = torch.rand(queries, 3, side, side, generator=generator)
    images_QCHW = 0.7 * gallery_GCHW[chosen_Q] + 0.3 * other_QCHW
    with torch.no_grad():
        gallery_GD = eval_copy(embedder)(gallery_GCHW)
    made = Batch(embedder, images_QCHW, labels_G[chosen_Q], gallery_GD, labels_G)
    found_Q = made.right(images_QCHW)
    return made._replace(images_QCHW=images_QCHW[found_Q], labels_Q=made.labels_Q[found_Q])


def traces(module: nn.Module) -> dict[str, Any]:
    """All that an attack must leave as it was."""
    return {
        "modes": {name: part.training for name, part in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grad": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone().flatten().tolist())
            for name, p in module.named_parameters()
        },
        "buffers": {name: b.flatten().tolist() for name, b in module.named_buffers()},
        "rng": torch.get_rng_state().tolist(),
        "grad_enabled": torch.is_grad_enabled(),
        "hooks": sum(len(part._forward_hooks) for part in module.modules()),
    }


def marked(module: nn.Module) -> nn.Module:
    """The module with gradients and a frozen parameter, so that a change of either would show."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[-1].requires_grad_(False)
    return module
