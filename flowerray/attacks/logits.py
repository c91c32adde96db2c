"""An embedder and a gallery as a classifier, so that attacks on classifiers attack retrieval.

Letters: B images, C channels of an image and classes of logits, H W pixels, D embedding dimensions,
G gallery items, Q queries.
"""

import torch
from torch import Tensor, nn

from flowerray.errors import UserError

TEMPERATURE = 10.0
"""Factor from cosine to logit. At 1000 softmax leaves every image a gradient of exactly 0, which
looks like robustness; cross-entropy is an honest guide up to about 10."""

_TIE, _TIES = 1e-13, 1e-8
"""What each place in the gallery takes from a score, and at most all of them: above float64's
rounding, so that equal distances rank by gallery index, and far below what float32 embeddings can
tell apart (6e-8)."""
LARGEST = 1_000_000
"""Items of a gallery for which there is room between the two."""

_BLOCK = 2**24
"""Distances held at a time."""


class MaxSimLogits(nn.Module):
    """The logit of a class is the largest cosine to its gallery items, times a temperature.

    The arg max is the decision of 1-nearest-neighbour search as `retrieval.search` makes it
    (Euclidean distance of the embeddings as given, equal distances by gallery index), so that an
    attack's success rate on these logits is 1 - adversarial Recall@1. The gallery must not hold the
    attacked images themselves (`refuse_own_images`).
    """

    gallery_GD: Tensor
    """float64, in the gallery's order."""
    offset_G: Tensor
    class_G: Tensor
    """The logits' column of each item."""
    classes_C: Tensor

    def __init__(
        self,
        embedder: nn.Module,
        gallery_GD: Tensor,
        gallery_labels_G: Tensor,
        temperature: float = TEMPERATURE,
    ) -> None:
        """Keeps the gallery in float64.

        Args:
            embedder: pixels in [0,1] -> unit emb_BD; it is not copied.
            gallery_GD: unit embeddings, on the embedder's device.
            gallery_labels_G: int64 classes; `classes_C` holds them, sorted, in the logits' order.
            temperature: factor from cosine to logit.

        Raises:
            UserError: a gallery of fewer than two classes, or of more than `LARGEST` items.
        """
        super().__init__()
        if len(gallery_GD) > LARGEST:
            raise UserError(
                f"The gallery holds {len(gallery_GD):,} items and an attack takes {LARGEST:,} at "
                "most: give a smaller gallery."
            )
        self.embedder = embedder
        self.temperature = temperature
        self.dtype = gallery_GD.dtype
        with torch.inference_mode(False), torch.no_grad():
            exact_GD = gallery_GD.detach().clone().double()
            labels_G = gallery_labels_G.detach().clone().to(exact_GD.device)
            classes_C, class_G = labels_G.unique(return_inverse=True)
            if len(classes_C) < 2:
                raise UserError(
                    "The gallery holds a single class, so that no attack can change a decision: "
                    "give a gallery of at least two classes."
                )
            place_G = torch.arange(len(exact_GD), device=exact_GD.device)
            offset_G = 0.5 * exact_GD.square().sum(1) - 0.5
            offset_G += min(_TIE, _TIES / len(exact_GD)) * place_G
        self.register_buffer("gallery_GD", exact_GD, persistent=False)
        self.register_buffer("offset_G", offset_G, persistent=False)
        self.register_buffer("class_G", class_G, persistent=False)
        self.register_buffer("classes_C", classes_C, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits BC in the gallery's dtype, computed outside autocast."""
        # Flat and back: the gradient then comes contiguous, of which torchattacks takes views.
        emb_BD = self.embedder(images_BCHW.flatten(1).view_as(images_BCHW))
        with torch.autocast(emb_BD.device.type, enabled=False):
            # -|q - g|^2 / 2 up to a constant of the query: for unit vectors their cosine, and in
            # float64 the order of the distances also where rounding left them not quite unit.
            similarity_BG = emb_BD.double() @ self.gallery_GD.T - self.offset_G
            lowest_BC = similarity_BG.new_full((len(emb_BD), len(self.classes_C)), -torch.inf)
            exact_BC = self.temperature * lowest_BC.scatter_reduce(
                1, self.class_G.expand_as(similarity_BG), similarity_BG, "amax"
            )
            logits_BC = exact_BC.to(self.dtype)
            return logits_BC + _lift(exact_BC.detach(), logits_BC.detach())

    def places(self, labels_B: Tensor) -> Tensor:
        """The logits' column of each label.

        Raises:
            UserError: a class that the gallery lacks.
        """
        labels_B = labels_B.to(self.classes_C)
        place_B = torch.searchsorted(self.classes_C, labels_B).clamp(max=len(self.classes_C) - 1)
        missing_B = self.classes_C[place_B] != labels_B
        if bool(missing_B.any()):
            raise UserError(
                f"The gallery holds no image of class {int(labels_B[missing_B][0])}, so that its "
                "queries are lost before any attack: leave them out."
            )
        return place_B


def _lift(exact_BC: Tensor, logits_BC: Tensor) -> Tensor:
    """What makes the exact winner the rounded logits' only maximum: 0 but for near ties."""
    winner_B1 = exact_BC.argmax(1, keepdim=True)
    others_B1 = logits_BC.scatter(1, winner_B1, -torch.inf).amax(1, keepdim=True)
    above_B1 = torch.nextafter(others_B1, torch.full_like(others_B1, torch.inf))
    lift_B1 = (above_B1 - logits_BC.gather(1, winner_B1)).clamp(min=0)
    # Twice, since the logit plus its lift is rounded once more.
    return torch.zeros_like(logits_BC).scatter(1, winner_B1, 2 * lift_B1)


def refuse_own_images(query_QD: Tensor, gallery_GD: Tensor) -> None:
    """Refuses queries that lie in the gallery themselves: each would find its clean self.

    They are told by their embeddings: most queries coincide with an item, though the gallery's
    items do not coincide with each other (as those of a collapsed model do).

    Raises:
        UserError: the gallery holds the queries.
    """
    if not len(query_QD):
        return
    itself = 0
    for part_QD in query_QD.split(max(1, _BLOCK // max(1, len(gallery_GD)))):
        distance_QG = torch.cdist(part_QD, gallery_GD, compute_mode="donot_use_mm_for_euclid_dist")
        most_are_apart_Q = (distance_QG > 1e-3).sum(1) * 2 > len(gallery_GD)
        itself += int(((distance_QG.amin(1) < 1e-5) & most_are_apart_Q).sum())
    if itself * 2 > len(query_QD):
        raise UserError(
            f"{itself} of {len(query_QD)} attacked images are in the gallery "
            "themselves, where each would find its clean self: leave them out of the gallery."
        )
