"""What an attacker faces: a model, its gallery, and the queries whose pixels may be changed.

Letters: N images of a split, Q attacked queries, M queries of one batch, C H W an image, G gallery
images, D embedding dimensions.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.evaluate.embed import Images
from flowerray.evaluate.retrieval import retrieval_per_query
from flowerray.model import Embedder


@dataclass(frozen=True)
class Arena:
    """What the attacker faces: a model, its gallery, and the queries that may be changed."""

    embedder: Embedder
    """In eval mode, its parameters without gradients: see `frozen_copy`."""
    store: Images
    """The N photographs of the split."""
    chosen_Q: NDArray[np.int64]
    """Positions in the split of the attacked queries, ascending."""
    labels_Q: NDArray[np.int64]
    """Their classes."""
    emb_QD: NDArray[np.float32]
    """Unit embeddings of their photographs."""
    gallery_GD: NDArray[np.float32]
    """Unit embeddings."""
    gallery_labels_G: NDArray[np.int64]

    @property
    def device(self) -> torch.device:
        """Where the embedder is."""
        return next(self.embedder.parameters()).device

    def images(self, positions_M: NDArray[np.int64]) -> Tensor:
        """Photographs of the split as float MCHW in [0,1], channels last, on the device."""
        images_MCHW = self.store.centre(positions_M, self.embedder.image_size).to(self.device)
        return (images_MCHW.float() / 255).contiguous(memory_format=torch.channels_last)

    def gallery(self) -> tuple[Tensor, Tensor]:
        """Embeddings and labels as tensors on the device."""
        labels_G = torch.from_numpy(self.gallery_labels_G).to(self.device)
        return torch.from_numpy(self.gallery_GD).to(self.device), labels_G

    def chance(self) -> float:
        """R@1 of a gallery in random order."""
        share_C = np.bincount(self.gallery_labels_G, minlength=int(self.labels_Q.max()) + 1)
        return float(share_C[self.labels_Q].mean() / len(self.gallery_labels_G))


def frozen_copy(embedder: Embedder) -> Embedder:
    """A copy in eval mode without parameter gradients: an attack leaves no trace on the original,
    and autograd keeps only what the gradient of the pixels needs.
    """
    return copy.deepcopy(embedder).eval().requires_grad_(False)


def narrow(arena: Arena, number: int, seed: int) -> tuple[Arena, NDArray[np.int64]]:
    """The arena with a seeded draw of its queries, and their places among them."""
    size = len(arena.chosen_Q)
    rows = np.sort(np.random.default_rng((seed, 4)).permutation(size)[:number])
    return (
        replace(
            arena,
            chosen_Q=arena.chosen_Q[rows],
            labels_Q=arena.labels_Q[rows],
            emb_QD=arena.emb_QD[rows],
        ),
        rows,
    )


def embed_images(arena: Arena, images_MCHW: Tensor) -> NDArray[np.float32]:
    """(M, D) unit embeddings."""
    with torch.inference_mode():
        return arena.embedder(images_MCHW).float().cpu().numpy()


def rank(arena: Arena, emb_MD: NDArray, labels_M: NDArray) -> dict[str, NDArray]:
    """`retrieval_per_query` in the arena's gallery: the judge of every attack."""
    return retrieval_per_query(emb_MD, labels_M, arena.gallery_GD, arena.gallery_labels_G)
