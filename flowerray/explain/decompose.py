"""The cosine of two images as an exact sum over positions, where the head allows it.

Source: Zhu et al. 2019 (arXiv 1909.12977), the decomposition of a similarity behind global average
pooling; here with a linear projection between pooling and norm.

Letters: B images, F backbone features, P positions (H W rows and columns), D embedding dimensions.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.errors import UserError
from flowerray.explain.layers import to_map
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating

_TOLERANCE = 1e-4
"""How far the pooled map may be from the features, as a share of their length; rounding is 1e-6."""


class Parts(NamedTuple):
    """Images cut into positions: their embeddings are the sums of the parts."""

    maps_BFHW: Tensor
    """What the head pools; float64."""
    parts_BPD: Tensor
    """W a_p / (HW ||z||), float64: sums to the unit embedding."""
    length_B: Tensor
    """||z||, the length of the embedding before its norm."""
    grid: tuple[int, int]


def parts(embedder: Embedder, images_BCHW: Tensor) -> Parts:
    """Splits each unit embedding into one vector a position.

    z = W mean_p(a_p) for a projection W without bias, so z / ||z|| = sum_p W a_p / (HW ||z||).

    Raises:
        UserError: the backbone's features are not the mean of its last map (ConvNeXt normalises
            after pooling, a ViT reads its class token), or this map has no grid or a single cell.
    """
    with evaluating(embedder), torch.no_grad():
        native = embedder.feature_map(images_BCHW)
        maps_BFHW = to_map(embedder.backbone, native)
        features_BF = embedder.features(images_BCHW).double()
    shape_fits = maps_BFHW is not None and maps_BFHW.shape[1] == features_BF.shape[1]
    if maps_BFHW is None or not shape_fits:
        raise _not_additive(embedder)
    if maps_BFHW.shape[2] * maps_BFHW.shape[3] == 1:
        raise UserError(
            f"The last map of {embedder.config.backbone} has one cell at {embedder.image_size} px: "
            "nothing can be split; choose another `method`, such as hirescam."
        )
    maps_BFHW = maps_BFHW.double()
    gap_B = (maps_BFHW.mean((2, 3)) - features_BF).norm(dim=1)
    if bool((gap_B > _TOLERANCE * features_BF.norm(dim=1)).any()):
        raise _not_additive(embedder)
    weight_DF = embedder.projection.weight.detach().double()
    rows, columns = maps_BFHW.shape[2:]
    parts_BPD = maps_BFHW.flatten(2).transpose(1, 2) @ weight_DF.T / (rows * columns)
    length_B = parts_BPD.sum(1).norm(dim=1).clamp_min(1e-6)
    return Parts(maps_BFHW, parts_BPD / length_B[:, None, None], length_B, (rows, columns))


def contributions(
    embedder: Embedder, images_BCHW: Tensor, reference_BD: Tensor
) -> NDArray[np.float32]:
    """Maps (B, H, W) whose cells sum to each image's cosine to its reference.

    Raises:
        UserError: see `parts`.
    """
    found = parts(embedder, images_BCHW)
    reference_BD = reference_BD.to(found.parts_BPD).expand(len(images_BCHW), -1)
    maps_BP = torch.einsum("bpd,bd->bp", found.parts_BPD, reference_BD)
    return maps_BP.unflatten(1, found.grid).float().cpu().numpy()


def pairwise(first: Tensor, second: Tensor) -> NDArray[np.float64]:
    """Which region of one image goes with which of the other.

    Args:
        first: parts_PD of an image.
        second: parts_PD of another.

    Returns:
        (P, P) entries that sum to the cosine of the two images; a row's sum is that cell's entry in
        the first image's map, a column's that in the second's.
    """
    return (first.double() @ second.double().T).cpu().numpy()


def ablation(embedder: Embedder, images_BCHW: Tensor, reference_BD: Tensor) -> NDArray[np.float32]:
    """AblationCAM (Desai and Ramaswamy 2020) of the map that the head pools, without a pass a
    channel.

    A channel's weight is the drop of the cosine when it is set to 0; the paper's division by the
    cosine, which would blow up near 0, only scales a map and is left out.

    Raises:
        UserError: see `parts`.
    """
    found = parts(embedder, images_BCHW)
    weight_DF = embedder.projection.weight.detach().double()
    pooled_BF = found.maps_BFHW.mean((2, 3))
    raw_BD = pooled_BF @ weight_DF.T
    reference_BD = reference_BD.to(raw_BD).expand(len(raw_BD), -1)
    cosine_B = (raw_BD * reference_BD).sum(1) / found.length_B
    # z - w_k m_k for each channel k: its dot product with r and its squared length.
    dot_BF = (raw_BD * reference_BD).sum(1, keepdim=True) - pooled_BF * (reference_BD @ weight_DF)
    square_BF = (
        raw_BD.square().sum(1, keepdim=True)
        - 2 * pooled_BF * (raw_BD @ weight_DF)
        + pooled_BF.square() * weight_DF.square().sum(0)
    )
    without_BF = dot_BF / square_BF.clamp_min(1e-12).sqrt()
    drop_BF = cosine_B[:, None] - without_BF
    return torch.einsum("bf,bfhw->bhw", drop_BF, found.maps_BFHW).float().cpu().numpy()


def _not_additive(embedder: Embedder) -> UserError:
    return UserError(
        f"{embedder.config.backbone} does not average its last map into its features, so that its "
        "similarity is no sum over positions: choose another `method`, such as hirescam."
    )
