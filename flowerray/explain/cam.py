"""Heat maps: grad-cam's weightings on similarity targets of our own.

Letters: B images, C channels, H W cells of a map (or pixels where said), D embedding dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.explain import decompose
from flowerray.explain.layers import Captured, Norm, capture
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating

Cam = Literal[
    "gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "eigencam", "eigengradcam"
]
"""GradCAM (Selvaraju 2017, eq. 1-2 without its ReLU), GradCAM++ (Chattopadhay 2018, eq. 19),
HiResCAM (Draelos 2020), XGradCAM (Fu 2020), LayerCAM (Jiang 2021), EigenCAM (Muhammad 2020; it
ignores the target) and EigenGradCAM. ScoreCAM is left out: its softmax over the channels' cosines,
all within -1..1, gives each channel nearly the same weight at one forward pass a channel."""

MethodName = Literal["decomposition", "ablationcam", Cam]
"""The methods of `Cam`, the exact decomposition, and AblationCAM (both in decompose.py)."""

CAMS: tuple[Cam, ...] = get_args(Cam)
METHODS: tuple[MethodName, ...] = get_args(MethodName)
HEAD_METHODS = ("decomposition", "ablationcam")
"""Those that need an additive head; their layer is what the head pools."""

_SAME = 1 - 1e-6
_NEAR_ZERO = 1e-3
"""Where activations below 0 cancel the 2 of GradCAM++'s denominator."""


@dataclass(frozen=True)
class Explainer:
    """One way to explain: a method at a layer. Called with a model, it gives raw maps."""

    method: MethodName
    layer: str = ""
    """Dotted name within the backbone; empty for `HEAD_METHODS`."""
    norm: Norm = "free"
    """Whether the embedding's length is held fixed; `HEAD_METHODS` have their own rule."""

    def __call__(
        self, embedder: Embedder, images_BCHW: Tensor, reference_BD: Tensor
    ) -> NDArray[np.float32]:
        """Raw maps (B, H, W) of the images' cosine to their references.

        Raises:
            UserError: see `check_references` and `decompose.parts`.
        """
        reference_BD = reference_BD.to(images_BCHW.device)
        if self.method == "decomposition":
            return decompose.contributions(embedder, images_BCHW, reference_BD)
        if self.method == "ablationcam":
            return decompose.ablation(embedder, images_BCHW, reference_BD)
        with evaluating(embedder), torch.no_grad():
            check_references(embedder(images_BCHW), reference_BD)
        (captured,) = capture(embedder, images_BCHW, [self.layer], reference_BD, self.norm)
        if captured is None:
            raise UserError(f"{self.layer} of {embedder.config.backbone} gives no map: choose "
                            "another layer.")  # fmt: skip
        return cam_maps(self.method, captured)

    def __str__(self) -> str:
        at = f" at {self.layer}" if self.layer else ""
        return f"{self.method}{at}" + (", length held" if self.norm == "held" else "")


def cam_maps(method: str, captured: Captured) -> NDArray[np.float32]:
    """The raw maps (B, H, W) of a captured layer: no ReLU, no scaling to each image's own range.

    They are signed where the method is: below 0, a cell makes the likeness smaller. The sign of a
    principal component is arbitrary, so EigenCAM's is turned to where the layer is active, and
    EigenGradCAM's to where the gradient times the map is.
    """
    maps, grads = (t.detach().cpu().numpy() for t in captured)
    if method == "eigencam":
        return _turned(_principal(maps), np.linalg.norm(maps, axis=1))
    if method == "eigengradcam":
        return _turned(_principal(maps * grads), (maps * grads).sum(1))
    if method == "gradcam++":
        return _plus_plus(maps, grads)
    # grad-cam sees arrays only: its pass through a model has side effects (see `capture`).
    found = _weighting(method).get_cam_image(None, None, None, maps, grads, False)
    return np.asarray(found, np.float32)


def _plus_plus(
    maps_BCHW: NDArray[np.float32], grads_BCHW: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Eq. 19 with its squares cancelled: alpha = 1 / (2 + sum(A) g) where the gradient g is not 0.

    grad-cam's own form adds 1e-6 to a denominator of the size of g squared. A cosine's gradients
    have g squared of 1e-9 to 1e-7, so that its weights are about the cube of g instead.
    """
    below = 2 + maps_BCHW.sum((2, 3), keepdims=True, dtype=np.float64) * grads_BCHW
    below = np.where(np.abs(below) < _NEAR_ZERO, np.copysign(_NEAR_ZERO, below), below)
    weight_BC = np.where(grads_BCHW > 0, grads_BCHW / below, 0).sum((2, 3))
    return np.einsum("bc,bchw->bhw", weight_BC, maps_BCHW).astype(np.float32)


def _turned(found_BHW: NDArray[np.float32], towards_BHW: NDArray) -> NDArray[np.float32]:
    """Each map, or its negative, whichever goes with the other one."""
    centred = towards_BHW - towards_BHW.mean((1, 2), keepdims=True)
    sign_B = np.where((found_BHW * centred).sum((1, 2)) < 0, -1, 1).astype(np.float32)
    return found_BHW * sign_B[:, None, None]


def _principal(maps_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each image's positions along their first principal direction, up to its sign.

    grad-cam's own form takes the whole singular value decomposition, whose P x P matrix costs ten
    seconds an image at 64 x 64 positions (CPU) and holds nothing that is used.
    """
    batch, channels, *grid = maps_BCHW.shape
    rows_BPC = maps_BCHW.astype(np.float64).reshape(batch, channels, -1).transpose(0, 2, 1)
    rows_BPC = rows_BPC - rows_BPC.mean(1, keepdims=True)
    if channels <= rows_BPC.shape[1]:
        _, vectors = np.linalg.eigh(rows_BPC.transpose(0, 2, 1) @ rows_BPC)
        along_BP = np.einsum("bpc,bc->bp", rows_BPC, vectors[:, :, -1])
    else:
        values, vectors = np.linalg.eigh(rows_BPC @ rows_BPC.transpose(0, 2, 1))
        along_BP = vectors[:, :, -1] * np.sqrt(values[:, -1:].clip(0))
    return along_BP.reshape(batch, *grid).astype(np.float32)


@cache
def _weighting(method: str) -> Any:
    """grad-cam's class for a method, around a stand-in instead of a model."""
    import pytorch_grad_cam as library

    classes = {
        "gradcam": library.GradCAM,
        "hirescam": library.HiResCAM,
        "xgradcam": library.XGradCAM,
        "layercam": library.LayerCAM,
    }
    if method not in classes:
        raise UserError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}.")
    return classes[method](nn.Linear(1, 1), [])


def check_references(emb_BD: Tensor, reference_BD: Tensor) -> None:
    """Refuses what has no explanation.

    Raises:
        UserError: an image that is its own reference: the cosine is 1 whatever the pixels, its
            gradient is 0 and the map is rounding noise. A number of references that does not fit.
    """
    if len(reference_BD) not in (1, len(emb_BD)):
        raise UserError(
            f"{len(emb_BD)} images and {len(reference_BD)} references: give one for each image."
        )
    cosine_B = (emb_BD * reference_BD.to(emb_BD)).sum(1)
    if bool((cosine_B > _SAME).any()):
        raise UserError(
            "An image cannot be explained by itself: its cosine to itself is 1 whatever it shows; "
            "take another image, or a class prototype without it."
        )


def prototypes(
    gallery_GD: ArrayLike,
    gallery_labels_G: ArrayLike,
    labels_B: ArrayLike,
    own_B: Sequence[int | None] | None = None,
) -> NDArray[np.float32]:
    """The reference of each image: the mean of its class's gallery embeddings, at unit length.

    Args:
        own_B: where an image stands in the gallery itself; it is left out of its prototype.

    Raises:
        UserError: a class with no other image in the gallery.
    """
    gallery = np.asarray(gallery_GD, np.float64)
    labels_G, rows = np.asarray(gallery_labels_G), []
    for b, label in enumerate(np.asarray(labels_B)):
        members = labels_G == label
        if own_B is not None and own_B[b] is not None:
            members = members & (np.arange(len(labels_G)) != own_B[b])
        if not members.any():
            raise UserError(f"Class {label} has no image in the gallery to be compared with.")
        mean_D = gallery[members].mean(0)
        rows.append(mean_D / max(float(np.linalg.norm(mean_D)), 1e-12))
    return np.asarray(rows, np.float32)


def upsample(maps_BHW: ArrayLike, size: int) -> NDArray[np.float32]:
    """Maps at `size` x `size` pixels, bilinear between the centres of cells."""
    maps = torch.from_numpy(np.ascontiguousarray(maps_BHW, dtype=np.float32))
    shape = (size, size)
    return F.interpolate(maps[:, None], shape, mode="bilinear", align_corners=False)[:, 0].numpy()
