"""Which layer of a backbone a heat map is taken from, and its output as a map over positions.

Letters: B images, C channels, H W cells of a map, S side of the input in pixels, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating

Norm = Literal["free", "held"]
"""free: the gradient of the cosine itself, which is blind to the length of the embedding. held: the
length is taken as given, as the additive decomposition does, so that a part that makes the
embedding longer in the direction of the reference counts as well."""

_BEFORE_POOLING = ("bn2", "final_conv", "norm", "features.norm5", "norm_features")
"""Where timm's families keep a map that comes after their last stage."""


@dataclass(frozen=True)
class Layer:
    """A module of the backbone whose output is a map over positions."""

    name: str
    """Dotted, within the backbone."""
    channels: int
    grid: tuple[int, int]
    """Rows and columns."""


class Captured(NamedTuple):
    """What a layer put out for some images, and how their cosines depend on it."""

    maps_BCHW: Tensor
    grads_BCHW: Tensor


def candidates(backbone: nn.Module) -> list[str]:
    """Names of modules that may serve, the nearest to the embedding first.

    Convolutional and hierarchical families: a map behind the last stage, then the stages from last
    to first. Plain transformers: the final norm, then the last block's first norm, then earlier
    blocks; where the class token is the embedding, whatever comes after the last attention has no
    gradient at the other tokens, and `find_layers` drops it.
    """
    known = dict(backbone.named_modules())
    blocks = known.get("blocks")
    names: list[str] = []
    plain = not isinstance(getattr(blocks, "0", None), nn.Sequential) and hasattr(
        backbone, "patch_embed"
    )
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and plain:
        last = len(blocks) - 1
        names = ["norm", f"blocks.{last}.norm1", f"blocks.{last - 1}", f"blocks.{last // 2}"]
    else:
        names = list(_BEFORE_POOLING)
    info = getattr(backbone, "feature_info", None)
    stages = list(info) if isinstance(info, Sequence) else []
    names += [str(stage["module"]) for stage in reversed(stages) if "module" in stage]
    return [name for name in dict.fromkeys(names) if name in known]


def to_map(backbone: nn.Module, output: Any) -> Tensor | None:
    """A module's output as maps_BCHW; None where it has no two-dimensional grid.

    Tokens (B, T, C) lose the leading ones that stand for no position (class, registers,
    distillation); families that keep channels last say so by `output_fmt`.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        maps = output.permute(0, 3, 1, 2) if _channels_last(backbone) else output
        return maps if maps.shape[2] == maps.shape[3] else None  # some keep channels last unsaid
    if output.ndim == 3 and (last := getattr(backbone, "tokens_spatial_shape_final", None)):
        if output.shape[1] != math.prod(last):
            return None  # Hiera: before its last stage tokens stand in another order
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if output.ndim != 3:
        return None
    rows, columns = grid or 2 * (math.isqrt(output.shape[1]),)  # our images are square
    prefix = output.shape[1] - rows * columns  # 0 where a block sees the patches alone
    if prefix not in (0, getattr(backbone, "num_prefix_tokens", 0)):
        return None
    return output[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))


def from_map(backbone: nn.Module, maps_BCHW: Tensor) -> Tensor:
    """The inverse of `to_map` for outputs that are a map already."""
    return maps_BCHW.permute(0, 2, 3, 1) if _channels_last(backbone) else maps_BCHW


def find_layers(embedder: Embedder) -> list[Layer]:
    """The layers that a heat map can be taken from, the default first.

    A candidate counts only if its output is a grid of more than one cell, finite, and has a
    gradient that is finite and not zero, for the likeness of two images of noise.

    Raises:
        UserError: none does.
    """
    generator = torch.Generator().manual_seed(0)
    side = embedder.image_size
    images_BCHW = torch.rand(2, 3, side, side, generator=generator)
    images_BCHW = images_BCHW.to(embedder.projection.weight.device)
    names = candidates(embedder.backbone)
    found = []
    with evaluating(embedder):
        emb_BD = embedder(images_BCHW).detach()
    for name, captured in zip(
        names, capture(embedder, images_BCHW, names, emb_BD.flip(0)), strict=True
    ):
        if captured is None:
            continue
        channels, *grid = captured.maps_BCHW.shape[1:]
        good = bool(captured.maps_BCHW.isfinite().all() & captured.grads_BCHW.isfinite().all())
        if good and grid[0] * grid[1] > 1 and float(captured.grads_BCHW.abs().sum()) > 0:
            found.append(Layer(name, channels, (grid[0], grid[1])))
    if not found:
        tried = ", ".join(names) or "none known"
        raise UserError(
            f"{embedder.config.backbone} has no layer with a map over positions that the embedding "
            f"depends on (tried: {tried}): choose a backbone that timm describes by feature_info."
        )
    return found


def capture(
    embedder: Embedder,
    images_BCHW: Tensor,
    names: Sequence[str],
    reference_BD: Tensor,
    norm: Norm = "free",
) -> list[Captured | None]:
    """One forward and one backward pass; the maps and gradients of several layers.

    Nothing is left behind: no hooks, no `.grad`, each submodule in its mode; parameters may be
    frozen and the caller in `no_grad` or `inference_mode`. (grad-cam's own pass leaves eval mode,
    filled gradients and live hooks, and needs parameters that are not frozen.)

    Args:
        reference_BD: what the images' cosines are to, another image's embedding or a class
            prototype: unit norm, one row an image (or a single row for all).

    Returns:
        One entry a name; None where the output is no map.
    """
    outputs: dict[str, Any] = {}
    raw: list[Tensor] = []
    modules = dict(embedder.backbone.named_modules())

    def keep(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            outputs[name] = output
            # The next layer may change its input in place.
            return output.clone() if isinstance(output, Tensor) else output

        return hook

    with evaluating(embedder), torch.inference_mode(False), torch.enable_grad():
        handles = [modules[name].register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
        handles.append(embedder.projection.register_forward_hook(lambda *a: raw.append(a[2])))
        try:
            embedder(images_BCHW.detach().clone().requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        length_B1 = raw[0].norm(dim=1, keepdim=True).clamp_min(1e-6)
        emb_BD = F.normalize(raw[0], eps=1e-6) if norm == "free" else raw[0] / length_B1.detach()
        # A clone, since a tensor made in inference mode cannot take part in a backward pass.
        cosine_B = (emb_BD * reference_BD.to(emb_BD).clone()).sum(1)
        usable = [n for n in outputs if to_map(embedder.backbone, outputs[n]) is not None]
        grads = dict(zip(usable, torch.autograd.grad(
            cosine_B.sum(), [outputs[n] for n in usable], allow_unused=True
        ), strict=True)) if usable else {}  # fmt: skip

    def entry(name: str) -> Captured | None:
        if name not in grads:
            return None
        output, grad = outputs[name], grads[name]
        grad = torch.zeros_like(output) if grad is None else grad
        pair = (to_map(embedder.backbone, t.detach().float().contiguous()) for t in (output, grad))
        return Captured(*pair)  # type: ignore[arg-type]

    return [entry(name) for name in names]


def _channels_last(backbone: nn.Module) -> bool:
    return str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
