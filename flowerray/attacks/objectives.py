"""What an attack maximises: one value an image, from pixels.

Letters: B images, C channels, H W pixels, D embedding dimensions, G gallery items.

Values are computed outside autocast, in the dtype of the embeddings they are compared with.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowerray.attacks.logits import MaxSimLogits
from flowerray.attacks.pgd import Objective

WRONG = 1e4
"""What `cross_entropy` can add to the value of an image whose decision is wrong."""


def cross_entropy(
    logits_of: nn.Module, labels_B: Tensor, *, wrong_first: bool = False
) -> Objective:
    """Cross-entropy of a classifier, natural log (Madry et al., ICLR 2018).

    Args:
        logits_of: pixels -> logits_BC.
        labels_B: int64 columns of the true classes.
        wrong_first: add `WRONG` where the arg max is wrong. With many classes the largest
            cross-entropy need not be a wrong decision; gradients stay as they are, but `pgd` then
            keeps a wrong decision wherever it saw one.
    """

    def value(images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        logits_BC = logits_of(images_BCHW)
        with torch.autocast(logits_BC.device.type, enabled=False):
            if logits_BC.dtype != torch.float64:
                logits_BC = logits_BC.float()
            value_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
            if wrong_first:
                value_B = value_B + WRONG * (logits_BC.detach().argmax(1) != labels_B)
            return value_B

    return _objective(value, (labels_B,), logits_of)


def shift(embedder: nn.Module, emb_BD: Tensor) -> Objective:
    """Squared distance (0..4) between the embedding and the clean one: no label is needed.

    ES of Zhou & Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", CVPR 2022. At
    the clean image the distance is at its minimum and the gradient exactly 0, so that a random
    start is required. A large shift need not change a neighbour: alone it overstates robustness.

    Args:
        embedder: pixels -> unit emb_BD.
        emb_BD: the clean images' embeddings.
    """

    def value(images_BCHW: Tensor, clean_BD: Tensor) -> Tensor:
        moved_BD = embedder(images_BCHW)
        with torch.autocast(moved_BD.device.type, enabled=False):
            return (moved_BD.to(clean_BD.dtype) - clean_BD).square().sum(1)

    return _objective(value, (emb_BD,), embedder, needs_random_start=True)


def margin(
    embedder: nn.Module, gallery_GD: Tensor, gallery_labels_G: Tensor, labels_B: Tensor
) -> Objective:
    """Largest cosine to a wrong class minus largest cosine to the right one, -2..2.

    Above 0 the nearest neighbour is of a wrong class: the query's Recall@1 is lost.

    Args:
        embedder: pixels -> unit emb_BD.
        gallery_GD: unit embeddings, without those of the attacked images.
        gallery_labels_G: int64 classes of the gallery.
        labels_B: int64 classes of the images.

    Raises:
        UserError: a gallery of one class, or without an image's class.
    """
    logits_of = MaxSimLogits(embedder, gallery_GD, gallery_labels_G, temperature=1.0)

    def value(images_BCHW: Tensor, place_B: Tensor) -> Tensor:
        cosine_BC = logits_of(images_BCHW)
        own_B1 = place_B[:, None]
        wrong_B = cosine_BC.scatter(1, own_B1, -torch.inf).max(1).values
        return wrong_B - cosine_BC.gather(1, own_B1)[:, 0]

    return _objective(value, (logits_of.places(labels_B),), logits_of)


def match(embedder: nn.Module, target_BD: Tensor) -> Objective:
    """Cosine to a chosen embedding (TMA; Tolias, Radenovic, Chum, ICCV 2019).

    Args:
        embedder: pixels -> unit emb_BD.
        target_BD: unit embeddings that the images shall take.
    """
    different_B = torch.zeros(len(target_BD), dtype=torch.bool, device=target_BD.device)
    return pair_flip(embedder, target_BD, different_B)


def pair_flip(
    embedder: nn.Module, other_BD: Tensor, same_B: Tensor, threshold: float = 0.0
) -> Objective:
    """Makes a pair of one class look different, and a pair of two classes alike.

    The value is threshold - cosine for the former and cosine - threshold for the latter: above 0
    the decision of the pair is wrong. The other image of the pair stays clean.

    Args:
        embedder: pixels -> unit emb_BD.
        other_BD: unit embeddings of the other images.
        same_B: bool, whether the pair is of one class.
        threshold: cosine from which a pair counts as the same.
    """

    def value(images_BCHW: Tensor, other_BD: Tensor, sign_B: Tensor) -> Tensor:
        emb_BD = embedder(images_BCHW)
        with torch.autocast(emb_BD.device.type, enabled=False):
            return sign_B * ((emb_BD.to(other_BD.dtype) * other_BD).sum(1) - threshold)

    sign_B = 1 - 2 * same_B.to(other_BD.dtype)
    return _objective(value, (other_BD, sign_B), embedder)


def _objective(
    value: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    module: nn.Module,
    *,
    needs_random_start: bool = False,
) -> Objective:
    with torch.inference_mode(False):
        # A graph cannot save tensors made in inference mode; their copies outside it can.
        copies = tuple(row.detach().clone() for row in rows)
    return Objective(value, copies, (module,), needs_random_start)
