"""A gallery whose own images are attacked: each one is pushed out of its class.

Letters: M images of one batch, C H W an image, C classes, G gallery images, D embedding dimensions.
"""

from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from flowerray.attacks.objectives import margin
from flowerray.attacks.pgd import pgd
from flowerray.model.modes import full_precision
from flowerray.robustness.victim import Victim


@full_precision()
def attack_gallery(
    victim: Victim, eps: float, progress: Callable[[int], object] | None = None
) -> NDArray[np.float32]:
    """(G, D): embeddings of the gallery's images after PGD.

    The attacker does not know the queries. He raises, for each image, the largest cosine to the
    mean embedding of another class less that to its own class's mean; the means are of the clean
    gallery, so that no image stands against itself. This is one attack, not the worst case over
    several: robustness against an attacked gallery is at most what is reported.

    Args:
        eps: radius in 1/255.
        progress: called with a number of images that are done, G in all where eps is above 0.
    """
    if not eps:
        return victim.gallery_GD
    gallery_GD, labels_G = victim.gallery()
    classes_C, class_G = labels_G.unique(return_inverse=True)
    sum_CD = gallery_GD.new_zeros(len(classes_C), gallery_GD.shape[1])
    means_CD = F.normalize(sum_CD.index_add_(0, class_G, gallery_GD), dim=1)
    config, parts = victim.config, []
    for start in range(0, len(labels_G), config.batch_size):
        rows = np.arange(start, min(start + config.batch_size, len(labels_G)))

        def push(rows: NDArray = rows) -> dict[str, NDArray]:
            found = pgd(
                margin(victim.embedder, means_CD, classes_C, labels_G[rows[0] : rows[-1] + 1]),
                victim.images(rows, victim.gallery_store),
                config.pgd(config.norm, eps),
                seed=(config.seed, 1),
                positions=rows.tolist(),
            )
            return {"emb": victim.embed(found.images_BCHW)}

        parts.append(victim.journal.once(f"gallery {eps:g} {start}", push)["emb"])
        if progress is not None:
            progress(len(rows))
    return np.concatenate(parts)
