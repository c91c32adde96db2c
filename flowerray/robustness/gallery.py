"""A gallery whose own images are attacked: each one is pushed out of its class.

Letters: M images of one batch, C H W an image, C classes, G gallery images, D embedding dimensions.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flowerray.attacks.objectives import margin
from flowerray.attacks.pgd import pgd
from flowerray.model.precision import full_precision
from flowerray.retrieval.embed import Images
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.subject import Arena, embed_images


@full_precision()
def attack_gallery(
    arena: Arena,
    store: Images,
    eps: float,
    config: AttackConfig,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """(G, D): embeddings of the gallery's images after PGD.

    The attacker does not know the queries. He raises, for each image, the largest cosine to the
    mean embedding of another class less that to its own class's mean; the means are of the clean
    gallery, so that no image stands against itself. This is one attack, not the worst case over
    several: robustness against an attacked gallery is at most what is reported.

    Args:
        store: the gallery's images, in the order of `arena.gallery_GD`.
        eps: radius in 1/255.
        progress: called with a number of images that are done, G in all where eps is above 0.
    """
    if not eps:
        return arena.gallery_GD
    gallery_GD, labels_G = arena.gallery()
    classes_C, class_G = labels_G.unique(return_inverse=True)
    sum_CD = gallery_GD.new_zeros(len(classes_C), gallery_GD.shape[1])
    means_CD = F.normalize(sum_CD.index_add_(0, class_G, gallery_GD), dim=1)
    settings = config.pgd(config.norm, eps)
    parts = []
    for start in range(0, len(store), config.batch_size):
        rows = np.arange(start, min(start + config.batch_size, len(store)))
        images_MCHW = store.centre(rows, arena.embedder.image_size).to(arena.device).float() / 255
        images_MCHW = images_MCHW.contiguous(memory_format=torch.channels_last)
        objective = margin(arena.embedder, means_CD, classes_C, labels_G[start : start + len(rows)])
        found = pgd(
            objective, images_MCHW, settings, seed=(config.seed, 1), positions=rows.tolist()
        )
        parts.append(embed_images(arena, found.images_BCHW))
        if progress is not None:
            progress(len(rows))
    return np.concatenate(parts)
