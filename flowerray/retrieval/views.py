"""Features of the views of training images, computed once and kept: what a head is trained on.

Letters: N images, V views, B of a batch, F backbone features, U random numbers an image.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flowerray import cache
from flowerray.data.augment import AugmentConfig, augment, draw
from flowerray.data.batches import Batch
from flowerray.data.store import Store, floats
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating, full_precision
from flowerray.model.precision import device_name
from flowerray.retrieval.embed import gathered, in_group, own_part

VIEW_SEED = 0
"""Of the views: the same for every run, so that trials and seeds share what is kept."""
BATCH = 64


class Views:
    """Features of N images as `Batches` reads them: a batch is their indices, and the features of
    its views are taken from where all of them lie.
    """

    def __init__(
        self, features_NVF: NDArray[np.float32], device: torch.device | str = "cpu"
    ) -> None:
        """Copies the features where they lie elsewhere, or cannot be written to (Ray's cannot)."""
        self.features_NVF = torch.as_tensor(np.require(features_NVF, requirements="W"))
        self.features_NVF = self.features_NVF.to(device)

    def padded(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The indices, b, and no sizes."""
        return torch.tensor(indices), torch.zeros(len(indices), 2, dtype=torch.int64)

    def view(self, batch: Batch) -> Tensor:
        """A view of each image, bF, drawn by the first of its random numbers."""
        number = self.features_NVF.shape[1]
        view_b = (batch.uniforms[:, 0] * number).long().clamp(max=number - 1)
        return self.features_NVF[batch.images, view_b]


def kept_views(
    embedder: Embedder,
    store: Store,
    config: AugmentConfig,
    views: int,
    *,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """L2-normalised features (N, 1 + V, F) of each image's centre crop and V augmented views, kept
    beside the store; the workers of a process group share the work.

    Args:
        progress: called with a number of views that are done; N x (1 + V) in all.
    """
    weights, device = embedder.backbone.state_dict(), next(embedder.parameters()).device
    facts = embedder.config.backbone, embedder.mean.flatten().tolist(), embedder.image_size
    own_facts = embedder.std.flatten().tolist(), views, VIEW_SEED, config.model_dump_json()
    key = cache.key(weights, device_name(device), *facts, *own_facts)
    file = store.folder / f"views-{key}.npz"
    kept = cache.read_arrays(file)
    if all(gathered(kept is not None and "features" in kept)):
        assert kept is not None
        if progress is not None:
            progress(len(store) * (1 + views))
        return kept["features"]
    own_MVF = _features(embedder, store, config, views, own_part(len(store)), progress)
    features_NVF = np.concatenate(gathered(own_MVF))
    if not in_group() or dist.get_rank() == 0:
        with suppress(OSError):  # it only saves time
            cache.write_arrays(file, features=features_NVF)
    return features_NVF


def _features(
    embedder: Embedder,
    store: Store,
    config: AugmentConfig,
    views: int,
    indices_M: NDArray[np.int64],
    progress: Callable[[int], object] | None,
) -> NDArray[np.float32]:
    """Of some images."""
    device, size = next(embedder.parameters()).device, embedder.image_size
    uniforms_VNU = [draw(VIEW_SEED, view, 0, len(store)) for view in range(views)]
    features_MVF = np.empty((len(indices_M), 1 + views, embedder.num_features), np.float32)
    with evaluating(embedder), torch.inference_mode(), full_precision():
        for start in range(0, len(indices_M), BATCH):
            batch = indices_M[start : start + BATCH]
            images, sizes = (part.to(device) for part in store.padded(batch))
            pixels = [floats(store.centre(batch, size), device)]
            pixels += [
                augment(images, sizes, uniforms_NU[batch].to(device), size, config)
                for uniforms_NU in uniforms_VNU
            ]
            for view, images_BCHW in enumerate(pixels):
                images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
                found_BF = F.normalize(embedder.features(images_BCHW).float(), dim=1)
                features_MVF[start : start + len(batch), view] = found_BF.cpu().numpy()
                if progress is not None:
                    progress(len(batch))
    return features_MVF
