"""A model as a file that runs without flowerray: ONNX, torch.export, or its weights alone.

Letters: B images, H W pixels, D embedding dimensions.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowerray.errors import UserError
from flowerray.model.embedder import Embedder

Format = Literal["onnx", "torch", "safetensors"]
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}
LEAST = 0.9999
"""Cosine with the model's own embedding that every image has to reach."""
_OPSET = 18


class Portable(nn.Module):
    """Pixels as decoders give them -> unit vectors; scaling and normalisation inside."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3), RGB, resized and cropped -> float32 (B, D)."""
        return self.embedder(pixels.permute(0, 3, 1, 2).to(torch.float32) / 255)


def write(embedder: Embedder, kind: Format, folder: Path) -> Path:
    """Writes the model's file.

    Args:
        embedder: on the CPU, in eval mode.

    Raises:
        UserError: the extra `onnx` is not installed, or a backbone that cannot be traced.
    """
    file = folder / FILES[kind]
    if kind == "safetensors":
        from safetensors.torch import save

        facts = {"embedder": json.dumps(embedder.config.model_dump(mode="json"))}
        state = {name: value.contiguous() for name, value in embedder.state_dict().items()}
        file.write_bytes(save(state, metadata=facts))
        return file
    module, size = Portable(embedder).eval(), embedder.image_size
    example = torch.randint(256, (2, size, size, 3), dtype=torch.uint8)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
        if kind == "torch":
            with warnings.catch_warnings():  # of weights that share memory, as ours do not
                warnings.simplefilter("ignore", UserWarning)
                torch.export.save(program, file)
        else:
            _onnx_installed()
            torch.onnx.export(
                program, f=file, input_names=["pixels"], output_names=["embedding"],
                dynamic_shapes=shapes, opset_version=_OPSET, external_data=False, dynamo=True,
                verbose=False,
            )  # fmt: skip
    except (RuntimeError, ValueError, TypeError) as error:  # what torch.export and ONNX raise
        raise UserError(
            f"{embedder.config.backbone} cannot be exported as {kind} "
            f"({str(error).splitlines()[0][:120]}): choose another `format`."
        ) from error
    return file


def _onnx_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"`format` onnx needs {error.name}: `pip install flowerray[onnx]`, or take torch."
        ) from error


def opened(file: Path, kind: Format) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """The written file as a function of uint8 pixels (B, H, W, 3)."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(None, {"pixels": pixels})[0]
    if kind == "torch":
        program = torch.export.load(file).module()
        return lambda pixels: program(torch.from_numpy(pixels)).detach().numpy()
    from safetensors import safe_open
    from safetensors.torch import load_file

    from flowerray.model.embedder import EmbedderConfig

    with safe_open(file, "pt") as content:
        config = EmbedderConfig(**json.loads(content.metadata()["embedder"]))
    embedder = Embedder(config.model_copy(update={"weights": "none"}))
    embedder.load_state_dict(load_file(file))
    module = Portable(embedder).eval()
    return lambda pixels: module(torch.from_numpy(pixels)).detach().numpy()


def check(embedder: Embedder, file: Path, kind: Format, pixels_BHWC: NDArray[np.uint8]) -> float:
    """The least cosine between the file's embeddings and the model's own, in batches of several
    sizes.

    Raises:
        UserError: it is below `LEAST`.
    """
    run = opened(file, kind)
    with torch.no_grad():
        own_BD = Portable(embedder)(torch.from_numpy(pixels_BHWC)).numpy()
    sizes = [1, *[7] * (len(pixels_BHWC) // 7), len(pixels_BHWC)]
    ends = np.minimum(np.cumsum(sizes), len(pixels_BHWC))
    parts = [part for part in np.split(pixels_BHWC, ends[:-1]) if len(part)]
    found_BD = np.concatenate([run(np.ascontiguousarray(part)) for part in parts])
    least = float((own_BD * found_BD).sum(1).min())
    if not least >= LEAST:
        raise UserError(
            f"the exported {kind} file gives other embeddings than the model (cosine {least:.5f}, "
            f"at least {LEAST} is needed), and was removed: choose another `format`."
        )
    return least
