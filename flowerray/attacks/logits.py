"""An embedder and a gallery as a classifier, so that attacks on classifiers attack retrieval.

Letters: B images, C channels of an image and classes of logits, H W pixels, D embedding dimensions,
G gallery items, K items of the largest class, Q queries.
"""

import torch
from torch import Tensor, nn

from flowerray.errors import UserError

TEMPERATURE = 10.0
"""Factor from cosine to logit. At 1000 softmax leaves every image a gradient of exactly 0, which
looks like robustness; cross-entropy is an honest guide up to about 10."""

_TIE = 1e-13
"""What each place in the gallery takes from a score: far below what float32 embeddings can tell
apart, and above float64's rounding, so that equal distances rank by gallery index."""


class MaxSimLogits(nn.Module):
    """The logit of a class is the largest cosine to its gallery items, times a temperature.

    The arg max is the decision of 1-nearest-neighbour search as `evaluate.retrieval` makes it
    (Euclidean distance of the embeddings as given, equal distances by gallery index), so that an
    attack's success rate on these logits is 1 - adversarial Recall@1. The gallery must not hold the
    attacked images themselves (`refuse_own_images`).
    """

    gallery_CKD: Tensor
    offset_CK: Tensor
    classes_C: Tensor

    def __init__(
        self,
        embedder: nn.Module,
        gallery_GD: Tensor,
        gallery_labels_G: Tensor,
        temperature: float = TEMPERATURE,
    ) -> None:
        """Sorts the gallery by class.

        Args:
            embedder: pixels in [0,1] -> unit emb_BD; it is not copied.
            gallery_GD: unit embeddings, on the embedder's device.
            gallery_labels_G: int64 classes; `classes_C` holds them, sorted, in the logits' order.
            temperature: factor from cosine to logit.

        Raises:
            UserError: a gallery of fewer than two classes.
        """
        super().__init__()
        self.embedder = embedder
        self.temperature = temperature
        self.dtype = gallery_GD.dtype
        with torch.inference_mode(False), torch.no_grad():
            exact_GD = gallery_GD.detach().clone().double()
            labels_G = gallery_labels_G.detach().clone().to(exact_GD.device)
            classes_C, class_G, count_C = labels_G.unique(return_inverse=True, return_counts=True)
            if len(classes_C) < 2:
                raise UserError(
                    "The gallery holds a single class, so that no attack can change a decision: "
                    "give a gallery of at least two classes."
                )
            order_G = torch.sort(class_G, stable=True).indices
            # Short classes repeat their first item, which changes no maximum.
            place_K = torch.arange(int(count_C.max()), device=exact_GD.device)
            place_CK = place_K.where(place_K < count_C[:, None], 0)
            items_CK = order_G[(count_C.cumsum(0) - count_C)[:, None] + place_CK]
            gallery_CKD = exact_GD[items_CK]
            offset_CK = 0.5 * gallery_CKD.square().sum(2) - 0.5 + _TIE * items_CK
        self.register_buffer("gallery_CKD", gallery_CKD, persistent=False)
        self.register_buffer("offset_CK", offset_CK, persistent=False)
        self.register_buffer("classes_C", classes_C, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits BC in the gallery's dtype, computed outside autocast."""
        # Flat and back: the gradient then comes contiguous, of which torchattacks takes views.
        emb_BD = self.embedder(images_BCHW.flatten(1).view_as(images_BCHW))
        with torch.autocast(emb_BD.device.type, enabled=False):
            # -|q - g|^2 / 2 up to a constant of the query: for unit vectors their cosine, and in
            # float64 the order of the distances also where rounding left them not quite unit.
            similarity_BCK = (
                emb_BD.double() @ self.gallery_CKD.flatten(0, 1).T - self.offset_CK.flatten()
            ).unflatten(1, self.offset_CK.shape)
            exact_BC = self.temperature * similarity_BCK.amax(2)
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
    distance_QG = torch.cdist(query_QD, gallery_GD, compute_mode="donot_use_mm_for_euclid_dist")
    itself_Q = (distance_QG.amin(1) < 1e-5) & (distance_QG.median(1).values > 1e-3)
    if int(itself_Q.sum()) * 2 > len(query_QD):
        raise UserError(
            f"{int(itself_Q.sum())} of {len(query_QD)} attacked images are in the gallery "
            "themselves, where each would find its clean self: leave them out of the gallery."
        )
