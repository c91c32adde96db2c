"""The model that MLflow serves: image files' bytes in, embeddings out.

MLflow stores and runs this file (models-from-code). flowerray itself has to be installed where it
serves: `mlflow models serve --env-manager local -m models:/...`.
"""

import base64
from contextlib import suppress
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

from flowerray.data.store import eval_image
from flowerray.errors import UserError
from flowerray.opening import load

BATCH = 64  # images embedded at once


class EmbedderModel(PythonModel):
    """Wraps an exported `.pth` (the artifact `model`)."""

    def load_context(self, context: Any) -> None:
        """Loads the embedder on the CPU."""
        self.embedder = load(context.artifacts["model"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Embeds a table's column `image`: JPEG or PNG files as bytes.

        Returns:
            Unit-norm embeddings, float32 (N, D).

        Raises:
            flowerray.errors.UserError: no bytes, or bytes that are no image.
        """
        files = [_bytes(content) for content in model_input["image"]]
        embeddings = [np.zeros((0, self.embedder.dim), np.float32)]
        for start in range(0, len(files), BATCH):
            size = self.embedder.image_size
            images = np.stack([eval_image(file, size) for file in files[start : start + BATCH]])
            with torch.inference_mode():
                embeddings.append(self.embedder(torch.from_numpy(images) / 255).numpy())
        return np.concatenate(embeddings)


def _bytes(content: object) -> bytes:
    """An image file's bytes. MLflow's server hands text on as it came, where a form of input has no
    other way: then it is their base64, never a path on the server.
    """
    if isinstance(content, str):
        with suppress(ValueError):
            return base64.b64decode(content, validate=True)
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    raise UserError(
        "an image is given by the bytes of its file (in JSON their base64), not by path."
    )


mlflow.models.set_model(EmbedderModel())
