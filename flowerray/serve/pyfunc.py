"""The model that MLflow serves: image files' bytes in, embeddings out.

MLflow stores and runs this file (models-from-code). flowerray itself has to be installed where it
serves: `mlflow models serve --env-manager local -m models:/...`.
"""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

from flowerray.data.store import eval_image
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
            flowerray.errors.UserError: bytes that are no image.
        """
        files = list(model_input["image"])
        embeddings = [np.zeros((0, self.embedder.dim), np.float32)]
        for start in range(0, len(files), BATCH):
            size = self.embedder.image_size
            images = np.stack([eval_image(file, size) for file in files[start : start + BATCH]])
            with torch.inference_mode():
                embeddings.append(self.embedder(torch.from_numpy(images) / 255).numpy())
        return np.concatenate(embeddings)


mlflow.models.set_model(EmbedderModel())
