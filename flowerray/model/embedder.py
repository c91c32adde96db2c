"""The Embedder: pixels in [0,1] -> normalise -> timm backbone -> linear projection -> unit norm.

Letters: B images, C channels, H W pixels (or cells of a feature map), F backbone features,
D embedding dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.model.config import EmbedderConfig
from flowerray.model.fold import PairFinder, fold, skip_pixels_first
from flowerray.model.modes import own_draws
from flowerray.model.weights import first_line, load_backbone, pretrained_cfg

_LOWEST, _HIGHEST = -0.25, 2.0
"""Pixels beyond are no rounding or resampling, but normalised, or 0..255."""
_LOOK_EVERY = 64
"""Calls between two looks at the pixels on a GPU, which each look makes wait."""


class Embedder(nn.Module):
    """An image as a point on the unit sphere; the cosine of two points is their likeness.

    The projection has no bias: with a backbone that averages its last map, the embedding before its
    norm is then a mean over positions, and the cosine splits into one exact part per position.

    With `freeze_bn` each convolution whose output only a BatchNorm reads is computed together with
    it (fold.py): the same function, gradients and state_dict up to rounding. A forward hook on such
    a convolution sees the normalised output, and one on its timm BatchNorm the activated one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EmbedderConfig, seed: int = 0) -> None:
        """Builds the backbone and loads its weights.

        Args:
            config: what to build.
            seed: of the projection, of the backbone where `weights` is "none", and of what a method
                adds at random; the global generators are left as they were.

        Raises:
            UserError: an unknown backbone, weights that are missing or do not fit, an image size
                that the backbone cannot take.
        """
        super().__init__()
        self.config, self.seed = config, seed
        with own_draws():
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` seeds GPUs too
            self.backbone = load_backbone(config).to(memory_format=torch.channels_last)
            skip_pixels_first(self.backbone)
            self.num_features, pairs = _probe(self.backbone, config)
            self.projection = nn.Linear(self.num_features, config.dim, bias=False)
            nn.init.orthogonal_(self.projection.weight)
        self.num_folded = len(pairs) if config.freeze_bn else 0
        for conv, norm in pairs[: self.num_folded]:
            fold(conv, norm)
        cfg = pretrained_cfg(config.backbone)
        self.register_buffer("mean", torch.tensor(cfg.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(1, 3, 1, 1), persistent=False)
        self._calls = 0
        self.train()

    @property
    def dim(self) -> int:
        """D, the length of the embedding."""
        return self.config.dim

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.config.image_size

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embeds images.

        Args:
            images_BCHW: float RGB pixels in [0,1]; outside training values that are clearly beyond
                are refused, on a GPU at the first and every 64th call.

        Returns:
            Unit-norm emb_BD: float32, also under autocast; float64 from a double model. A zero
            vector stays zero.

        Raises:
            UserError: images that are no tensor, not float, not (B, 3, H, W), of 0..255, or
                normalised.
        """
        return projected(self.projection, self.features(images_BCHW))

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Pooled backbone features (B, F), not normalised; input as for `forward`."""
        return self.backbone(self._normalise(images_BCHW))

    def feature_map(self, images_BCHW: Tensor) -> Tensor:
        """What the backbone's `forward_features` returns.

        (B, F, H, W) from most, (B, H, W, F) from Swin, (B, tokens, F) from a ViT.
        """
        return self.backbone.forward_features(self._normalise(images_BCHW))  # type: ignore[operator]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Parameters that come with the backbone."""
        return list(self.backbone.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters that start at random, for their own learning rate."""
        return list(self.projection.parameters())

    def train(self, mode: bool = True) -> "Embedder":
        """Sets the mode; BatchNorm stays in eval mode where `freeze_bn` is on."""
        super().train(mode)
        if self.config.freeze_bn:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _normalise(self, images_BCHW: Tensor) -> Tensor:
        if not isinstance(images_BCHW, Tensor):
            raise UserError(
                "The embedder takes a torch tensor of float pixels in [0,1] and was given "
                f"{type(images_BCHW).__name__}: convert it first."
            )
        shape = tuple(images_BCHW.shape)
        if not images_BCHW.is_floating_point() or len(shape) != 4 or shape[1] != 3:
            raise UserError(
                "The embedder takes float pixels in [0,1] of shape (B, 3, H, W) and was given "
                f"{images_BCHW.dtype} of shape {shape}: convert them first."
            )
        self._look(images_BCHW)
        images_BCHW = (images_BCHW.to(self.mean.dtype) - self.mean) / self.std
        return images_BCHW.contiguous(memory_format=torch.channels_last)

    def _look(self, images_BCHW: Tensor) -> None:
        """Refuses what is clearly no pixels in [0,1]: outside training, on the CPU at each call, on
        a GPU at the first and every 64th. A traced model has no such look.
        """
        if self.training or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        self._calls += 1
        on_cpu = images_BCHW.device.type == "cpu"
        attacked = not self.projection.weight.requires_grad  # the attack has looked
        due = self._calls == 1 or (self._calls % _LOOK_EVERY == 1 and not attacked)
        if not len(images_BCHW) or not (on_cpu or due):
            return
        low, high = torch.stack(images_BCHW.detach().aminmax()).tolist()
        if low < _LOWEST or high > _HIGHEST:
            raise UserError(
                f"The embedder takes pixels in [0,1] and was given values from {low:.4g} to "
                f"{high:.4g}: divide those of 0..255 by 255, and leave the normalisation to it."
            )


class Head(nn.Module):
    """The projection of an embedder on features that were kept: what is trained, checkpointed and
    averaged in the embedder's place where its backbone stays as it is.
    """

    def __init__(self, embedder: Embedder) -> None:
        """Shares the embedder's projection: what is trained here is trained there."""
        super().__init__()
        self.config, self.seed, self.dim = embedder.config, embedder.seed, embedder.dim
        self.image_size = embedder.image_size
        self.projection = embedder.projection

    def forward(self, features_BF: Tensor) -> Tensor:
        """Unit-norm emb_BD, as `Embedder.forward` makes them of the same images."""
        return projected(self.projection, features_BF)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []


def projected(projection: nn.Linear, features_BF: Tensor) -> Tensor:
    """Unit-norm emb_BD of features of any length, under autocast in the projection's precision."""
    with torch.autocast(features_BF.device.type, enabled=False):
        emb_BD = projection(features_BF.to(projection.weight.dtype))
        return F.normalize(emb_BD, dim=1, eps=1e-6)


@torch.no_grad()
def start_from_pca(projection: nn.Linear, features_NF: Tensor) -> None:
    """Sets a projection to the first D principal components of features, each scaled to variance 1
    and all to the mean length 1; what N features of rank below D leave open stays as it is.
    """
    centred_NF = (features_NF - features_NF.mean(0)).double()
    _, spread_R, components_RF = torch.linalg.svd(centred_NF, full_matrices=False)
    rank = min(int((spread_R > 1e-6 * spread_R[0]).sum()), projection.out_features)
    whitened_RF = components_RF[:rank] / spread_R[:rank, None]
    projection.weight[:rank] = (whitened_RF / whitened_RF.norm(dim=1).mean()).to(projection.weight)


def _probe(
    backbone: nn.Module, config: EmbedderConfig
) -> tuple[int, list[tuple[nn.Module, nn.Module]]]:
    """Sends one random image through; returns F and the pairs of layers that can be folded."""
    finder = PairFinder(backbone.eval())
    image = torch.rand(1, 3, config.image_size, config.image_size).requires_grad_()
    try:
        with torch.enable_grad():
            features_BF = backbone(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{config.backbone} cannot take images of {config.image_size} px "
            f"({first_line(error)}): choose another image_size."
        ) from error
    finally:
        finder.close()
    if features_BF.ndim != 2:
        raise UserError(
            f"{config.backbone} gives features of shape {tuple(features_BF.shape)} where (B, F) is "
            "needed: choose another backbone."
        )
    return features_BF.shape[1], finder.pairs(features_BF)
