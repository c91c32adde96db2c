"""The model card that goes with an exported model, as the Hugging Face Hub reads it."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from timm.models import get_pretrained_cfg

from flowerray.description import VERSION
from flowerray.opening import Model
from flowerray.retrieval.floor import SCORES
from flowerray.show.interval import words
from flowerray.statistics import Interval, mean_interval

LABELS = {
    "recall_at_1": "R@1",
    "map_at_r": "MAP@R",
    "tar_at_far_0.1": "TAR at FAR 0.1",
    "tar_at_far_0.01": "TAR at FAR 0.01",
    "tar_at_far_0.001": "TAR at FAR 0.001",
    "calibration_error": "calibration error",
}
IDENTIFIERS = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
"""Licences that the Hub knows by these names, of those that timm names."""
_PIXELS = """
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
scale = {side} / min(image.size)
image = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
left, top = ((n - {size}) // 2 for n in image.size)
pixels = np.asarray(image.crop((left, top, left + {size}, top + {size})))[None]
"""
_LOADING = {
    "onnx": """import numpy as np
import onnxruntime
from PIL import Image, ImageOps
{pixels}
session = onnxruntime.InferenceSession("model.onnx")
embedding = session.run(None, {{"pixels": pixels}})[0]""",
    "torch": """import numpy as np
import torch
from PIL import Image, ImageOps
{pixels}
embed = torch.export.load("model.pt2").module()
embedding = embed(torch.from_numpy(pixels))""",
    "safetensors": """import json
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from flowerray.model.embedder import Embedder, EmbedderConfig
{pixels}
with safe_open("model.safetensors", "pt") as file:
    config = EmbedderConfig(**{{**json.loads(file.metadata()["embedder"]), "weights": "none"}})
embedder = Embedder(config).eval()
embedder.load_state_dict(load_file("model.safetensors"))
embedding = embedder(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)""",
}


def figures(record: Mapping[str, Any] | None) -> dict[str, Interval | float]:
    """The figures of RUN/evaluation/<split>.json, with intervals where it allows them."""
    if record is None:
        return {}
    metrics, scores = record["metrics"], record["per_query"]
    counted_Q = np.asarray(scores["num_relevant"]) > 0
    found: dict[str, Interval | float] = {k: metrics[k] for k in LABELS if k in metrics}
    for name, score in SCORES.items():
        found[name] = mean_interval(np.asarray(scores[score], float)[counted_Q])
    for name, told in record.get("intervals", {}).items():
        if name in LABELS:
            found[name] = Interval(told["n"], told["mean"], told["low"], told["high"])
    return found


def licence(model: Model) -> str | None:
    """Of the backbone's pretrained weights, where timm knows it."""
    config = model.run.embedder
    if config.weights not in ("bundled", "hub"):
        return None
    cfg = get_pretrained_cfg(config.backbone)
    return cfg.license if cfg else None


def front_matter(model: Model, record: Mapping[str, Any] | None) -> str:
    """YAML between two lines of dashes; every value is JSON, which is YAML too."""
    facts: dict[str, Any] = {
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-similarity", "metric-learning", "flowerray"],
    }
    if (name := licence(model)) is not None:
        known = name in IDENTIFIERS
        facts |= {"license": name} if known else {"license": "other", "license_name": name}
    cfg = get_pretrained_cfg(model.run.embedder.backbone)
    if model.run.embedder.weights in ("bundled", "hub") and cfg and cfg.hf_hub_id:
        facts["base_model"] = cfg.hf_hub_id
    if found := figures(record):
        data = {"type": "images", "name": _data(model), "split": (record or {})["split"]}
        values = [
            {"type": key, "value": round(v.mean if isinstance(v, Interval) else v, 4)}
            for key, v in found.items()
        ]
        result = {"task": {"type": "image-feature-extraction"}, "dataset": data, "metrics": values}
        name = f"flowerray-{model.run.method_name}"
        facts["model-index"] = [{"name": name, "results": [result]}]
    return "\n".join(["---", *(f"{key}: {json.dumps(v)}" for key, v in facts.items()), "---"])


def card(model: Model, kind: str, record: Mapping[str, Any] | None, checked: int) -> str:
    """The whole README.md.

    Args:
        record: RUN/evaluation/<split>.json; None: it has not been evaluated.
        checked: images that the file was compared with the model on.
    """
    run, embedder = model.run, model.embedder
    size, calibration = embedder.image_size, model.calibration
    splits = f"protocol {run.data.protocol}, seed {run.data.seed}"
    side = round(size / 0.875)
    pixels = _PIXELS.format(side=side, size=size)
    lines = [
        front_matter(model, record),
        f"# {embedder.config.backbone}, trained for image similarity",
        f"Method `{run.method_name}` of flowerray {VERSION}; {embedder.dim} dimensions, of unit "
        "length: the cosine of two embeddings is the likeness of two photographs.",
        "## Data",
        f"{_data(model)}; {splits}. Fingerprint of files, labels and splits: "
        f"`{model.dataset or 'not known'}`.",
        "## Figures",
        *_figures(record),
        "## Decisions",
        f"Two photographs count as one class from a cosine of {model.threshold:.4f}, which was "
        "fitted on validation pairs.",
    ]
    if calibration is not None:
        lines.append(
            "Probability of one class, at even odds beforehand, with s = (1 + cosine) / 2: "
            f"1 / (1 + exp(-({calibration.a:.6g} log(s) - {calibration.b:.6g} log(1 - s) + "
            f"{calibration.c:.6g})))."
        )
        rows = [f"| {m.far:g} | {m.low:.2g} to {m.high:.2g} | {m.cosine:.4f} |"
                for m in calibration.false_match]  # fmt: skip
        if rows:
            head = ["| false-match rate | 95 % interval | from cosine |", "|---|---|---|"]
            lines.append("\n".join([*head, *rows]))
    lines += [
        "## Preprocessing",
        f"Shorter side to {side} px (bicubic, antialiased), the middle {size} x "
        f"{size} px, RGB, uint8 (B, {size}, {size}, 3). Scaling and normalisation are inside.",
        "## Use",
        f"```python\n{_LOADING[kind].format(pixels=pixels)}\n```",
        f"Compared with the model that it was made from on {checked} photographs. `model.json` has "
        "threshold, calibration, classes and options.",
        "## Licence",
        f"Weights of the backbone before training: {licence(model) or 'not known'}.",
    ]
    return "\n\n".join(lines) + "\n"


def _data(model: Model) -> str:
    root = model.run.data.root
    return f"data set {root.name}" if root else "rendered flowers"


def _figures(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return ["It has not been evaluated yet: `flowerray evaluate` before the export."]
    m = record["metrics"]
    rows = [f"| {LABELS[key]} | {words(v)} |" for key, v in figures(record).items()]
    return [
        f"{m['num_queries']} {m['split']} queries, gallery {m['gallery']} of {m['num_gallery']} "
        "images; 95 % intervals. How they are computed: docs/decisions.md and docs/statistics.md "
        "of flowerray.",
        "\n".join(["| | |", "|---|---|", *rows]),
    ]
