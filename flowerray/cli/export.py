"""`flowerray export`."""

from pathlib import Path
from typing import Annotated, Literal

from flowerray.cli.options import parse


def export(words: list[str]) -> int:
    """`flowerray export RUN --format onnx`."""
    import tyro

    from flowerray.config import Config

    class Options(Config):
        run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A folder, an exported .pth, models:/... or runs:/..."""
        format: Literal["onnx", "torch", "safetensors"] = "onnx"
        """onnx = for onnxruntime (extra `onnx`); torch = a torch.export program (.pt2), for torch
        alone; safetensors = the weights."""
        out: Path | None = None
        """Folder of the file, its model card, threshold and calibration; by default RUN-FORMAT
        here."""
        photographs: Path | None = None
        """Photographs on which the file is compared with the model, a folder or a table; by default
        the training's own."""

    about = "A trained model as a file for other programs: uint8 pixels in, unit vectors out."
    options = parse(Options, words, "export", about)

    import torch

    from flowerray.export import command
    from flowerray.opening import open_model

    model = open_model(options.run, torch.device("cpu"))
    name = options.run.rstrip("/").replace(":", "-").rpartition("/")[2].removesuffix(".pth")
    out = options.out or Path(f"{name}-{options.format}")
    facts = command.export(model, options.format, out, options.photographs)
    print(
        f"model     {out / facts['file']}\ncard      {out / 'README.md'}\n"
        f"checked   {facts['photographs']} photographs, least cosine {facts['least_cosine']:.6f}"
    )
    return 0
