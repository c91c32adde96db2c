"""What the tests of the methods share: a small embedder, seeded batches, every variant.

Letters: B images, D embedding dimensions, C H W an image.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowerray import methods
from flowerray.methods._base import Method

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "center": ("center", {}),
    "center-heavy": ("center", {"center_weight": 1.0}),
    "center-0": ("center", {"center_weight": 0.0}),
    "siamese": ("siamese", {}),
    "siamese-all": ("siamese", {"negatives": "all", "positive_margin": 0.2, "power": 2}),
    "siamese-balanced": ("siamese", {"negatives": "balanced", "negative_margin": 1.2}),
    "siamese-bce": ("siamese", {"head": "bce"}),
    "triplet": ("triplet", {}),
    "triplet-soft": ("triplet", {"soft": True}),
    "triplet-random": ("triplet", {"miner": "random"}),
    "triplet-all": ("triplet", {"miner": "all"}),
    "triplet-semi-hard": ("triplet", {"miner": "semi-hard"}),
    "triplet-distance-weighted": ("triplet", {"miner": "distance-weighted"}),
}
"""Name of the case -> method and the fields of its Config."""

CLASSES, DIM, SIDE = 5, 8, 4


class StandIn(nn.Module):
    """An embedder of 3 x 4 x 4 images that is quick and smooth."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.dim, self.seed = dim, 0
        generator = torch.Generator().manual_seed(11)
        self.inner = nn.Linear(3 * SIDE * SIDE, 16)
        self.outer = nn.Linear(16, dim)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return F.normalize(self.outer(self.inner(images_BCHW.flatten(1)).tanh()))


def build(name: str, **fields: Any) -> Method:
    """A method of the small embedder, in float64."""
    record = methods.get(name)
    embedder: Any = StandIn()
    return record.method(record.config(**fields), embedder, CLASSES).double()


def images_of(labels_B: Tensor, seed: int = 0) -> Tensor:
    """float64 images in [0,1]: a pattern a class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(100, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)[labels_B]
    noise = torch.rand(patterns.shape, dtype=torch.float64, generator=generator)
    return 0.5 * patterns + 0.5 * noise


def units(num: int, seed: int, dim: int = DIM, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random vectors that require grad; `F.normalize` of them are random unit embeddings.

    They lean to one side, so that distances of every size come up.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(num, dim, dtype=torch.float64, generator=generator)
    raw[:, 0] += 1.0
    return raw.to(dtype).requires_grad_()


def labels_of(num: int, seed: int, classes: int = CLASSES) -> Tensor:
    """Random labels: class sizes differ and some class may hold one image."""
    return torch.randint(classes, (num,), generator=torch.Generator().manual_seed(1000 + seed))


def gradients(method: Method) -> dict[str, Tensor]:
    """Gradients by parameter name."""
    assert all(p.grad is not None for p in method.parameters())
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


def two_steps(method: Method, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Two SGD steps with center updates: the last gradients, the state after, the loss."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(2):
        method.seed = (3, 0, step)
        output = model(images, labels)
        optimizer.zero_grad()
        output.loss.total.backward()
        optimizer.step()
        method.after_step(output)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    return {
        "loss": output.loss.total.detach(),
        "curves": output.loss.curves,
        "gradients": gradients(method),
        "state": state,
        "labels": output.labels_B,
    }


def global_batch() -> tuple[Tensor, Tensor]:
    labels_B = torch.arange(12) // 3 % CLASSES
    return images_of(labels_B, seed=5), labels_B


def run_rank(rank: int, world: int, folder: str) -> None:
    """One process of the gloo test: every variant under DDP on its slice; results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    images, labels = global_batch()
    share = len(labels) // world
    rows = slice(rank * share, (rank + 1) * share)
    results = {}
    for case, (name, fields) in VARIANTS.items():
        method = build(name, **fields)
        model = DistributedDataParallel(method, broadcast_buffers=False)
        results[case] = two_steps(method, model, images[rows], labels[rows])
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
