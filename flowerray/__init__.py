"""flowerray: image-similarity models that are trained, tuned, hardened, measured and explained.

`flowerray.load(RUN_or_file)` gives a trained `Embedder`: float32 pixels in [0,1] (BCHW) in,
unit-norm embeddings (BD) out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from flowerray.model import Embedder

__version__ = "0.1.0"


def load(run_or_file: "str | Path") -> "Embedder":
    """A trained embedder, on the CPU, in eval mode.

    Args:
        run_or_file: a RUN folder, an exported `best_model_*.pth` / `robust_model_*.pth` file, or an
            MLflow address `models:/...` or `runs:/...`.

    Raises:
        flowerray.errors.UserError: nothing there, or not a flowerray model.
    """
    from flowerray.checkpoint import load_embedder

    if str(run_or_file).startswith(("models:/", "runs:/")):
        from flowerray.tracking import resolve

        run_or_file = resolve(str(run_or_file))
    return load_embedder(run_or_file)
