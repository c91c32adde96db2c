"""What a version of flowerray reads in the files of 0.1.0, as plain data.

`make.py` notes what 0.1.0 reads; `test_0_1_0.py` compares. The working directory is the unpacked
folder, and FLOWERRAY_HOME its `home`.
"""

import hashlib
import io
import json
import platform
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

import flowerray
from flowerray.cli import dispatch
from tests.compatibility.archive import EXPECTED, HERE

RUNS = ("triplet", "siamese", "center", "robust")
EXPORTS = {
    "triplet": "best_model_triplet_loss",
    "siamese": "best_model_siamese_network",
    "center": "best_model_center_loss",
    "robust": "robust_model_center_loss",
}
ATTACKED = ("siamese", "robust")
UNFINISHED = {"unfinished": "center", "unfinished-robust": "triplet"}
"""Folder and method."""
ATTACK = (
    "--attacks", "fgsm,margin", "--eps", "0,0.1,4", "--max-queries", "12", "--max-pairs", "12",
    "--steps", "3", "--restarts", "1",
)  # fmt: skip
EMBEDDER = ("backbone", "weights", "dim", "image_size")
MACHINE = ("seconds", "time", "torch", "machine", "threads", "flowerray", "device")
"""Keys of results that tell of the machine and the version."""


def said(*words: object) -> str:
    """What a command that must work prints, without the folder's own path."""
    with redirect_stdout(io.StringIO()) as output:
        assert dispatch([str(word) for word in words]) == 0
    return output.getvalue().replace(str(Path.cwd()), HERE)


def told(*words: object) -> Any:
    """The same of its --json."""
    return without(json.loads(said(*words, "--json")), MACHINE)


def without(content: Any, names: tuple[str, ...]) -> Any:
    """JSON without some keys, at any depth."""
    if isinstance(content, list):
        return [without(item, names) for item in content]
    if not isinstance(content, dict):
        return content
    return {key: without(value, names) for key, value in content.items() if key not in names}


def photographs() -> list[Path]:
    """Two of a class and one of another."""
    (folder,) = Path("home/synthetic").glob("*/jpg")
    return [folder.absolute() / f"image_{number:05d}.jpg" for number in (23, 24, 48)]


def machine() -> dict[str, str]:
    """Where all of this is equal, floats have equal bits."""
    cpu = "unknown"
    if (file := Path("/proc/cpuinfo")).exists():
        facts = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.+)$", file.read_text(), re.M))
        cpu = " ".join(facts.values())
    return {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {cpu}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def equal_bits() -> bool:
    """Whether 0.1.0 made its numbers on a machine like this one."""
    return bool(machine() == json.loads(EXPECTED.read_text())["machine"])


def embeddings(run_or_file: str) -> list[list[float]]:
    """`flowerray.load`'s embeddings of the photographs."""
    embedder = flowerray.load(run_or_file)
    size = (embedder.image_size, embedder.image_size)
    pixels = [np.asarray(Image.open(file).resize(size)) for file in photographs()]
    images_BCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        found: list[list[float]] = embedder(images_BCHW).tolist()
    return found


def served(address: str) -> list[list[float]]:
    """The same from a model of MLflow, which takes files' bytes."""
    import mlflow
    import pandas

    model = mlflow.pyfunc.load_model(address)
    table = pandas.DataFrame({"image": [file.read_bytes() for file in photographs()]})
    found: list[list[float]] = np.asarray(model.predict(table)).tolist()
    return found


def evaluated(run: str) -> Any:
    """`evaluate` of the run's own test split."""
    return told("evaluate", f"runs/{run}", "--split", "test")


def similar(run: str) -> list[Any]:
    """`similar` of two photographs of a class, and of two classes."""
    a, b, c = photographs()
    return [told("similar", f"runs/{run}", a, other) for other in (b, c)]


def searched(run: str) -> Any:
    """`search` for the three nearest of the class folders."""
    words = (photographs()[0], "--gallery", "photographs", "--top", 3)
    return told("search", f"runs/{run}", *words)["neighbours"]


def attacked(run: str) -> dict[str, Any]:
    """The figures of `attack`, with those of the run beside it."""
    found = told("attack", f"runs/{run}", *ATTACK)
    names = ("clean", "attacks", "worst_case", "threshold", "num_queries", "num_gallery", "queries")
    parts = {"run": found, "beside": found["beside"] or {}}
    return {side: {n: part[n] for n in names if n in part} for side, part in parts.items()}


def resumed(run: str) -> dict[str, Any]:
    """The end of an unfinished training: weights, state and curves."""
    assert dispatch(["train", UNFINISHED[run], "--resume", f"runs/{run}"]) == 0
    folder = Path("runs") / run
    (export,) = folder.glob("*_model_*.pth")
    content = torch.load(export, weights_only=True)
    state = torch.load(folder / "checkpoints/last/state.pt", weights_only=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    progress = {key: value for key, value in state["progress"].items() if key != "seconds"}
    curves = ("train/images_per_second", "epoch/seconds")
    return {
        "export": export.name,
        "tensors": {
            f"{part}.{name}": [digest(value), float(value.double().norm())]
            for part in ("embedder", "method")
            for name, value in content[part].items()
        },
        "state": {
            part: digest(*tensors(state[part])) for part in ("method", "optimizer", "average")
        },
        "progress": progress,
        "steps": [record["step"] for record in records],
        "metrics": [
            {
                name: value
                for name, value in record["metrics"].items()
                if name not in curves and not name.startswith("system/")
            }
            for record in records[-4:]
        ],
        "thresholds": json.loads((folder / "thresholds.json").read_text()),
    }


def continued() -> dict[str, Any]:
    """The first step of a training that starts from a finished one."""
    embedder = json.loads(Path("runs/center/run.json").read_text())["embedder"]
    options = [f"--embedder.{key.replace('_', '-')}={embedder[key]}" for key in EMBEDDER]
    said(
        "train", "center", "--init", "runs/center", "--out", "runs/continued", "--data.root",
        "photographs", "--data.train-per-class=4", "--data.val-per-class=4", *options,
        "--train.classes-per-batch=3", "--train.epochs=1", "--train.log-every-steps=1",
        "--train.precision=fp32", "--resources.workers=0",
    )  # fmt: skip
    first = json.loads(Path("runs/continued/metrics.jsonl").read_text().splitlines()[0])
    return {"step": first["step"], "loss": first["metrics"]["train/loss"]}


def tensors(content: Any) -> list[Tensor]:
    """All tensors of a nested state, in order."""
    if isinstance(content, Tensor):
        return [content]
    values: list[Any] = []
    if isinstance(content, dict):
        values = list(content.values())
    elif isinstance(content, list | tuple):
        values = list(content)
    return [tensor for value in values for tensor in tensors(value)]


def digest(*values: Tensor) -> str:
    """Of shapes and bits."""
    found = hashlib.sha256()
    for value in values:
        found.update(str((value.dtype, tuple(value.shape))).encode())
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def tuned() -> Any:
    """`tune --resume` of a study that is finished."""
    return told("tune", "siamese", "--resume", "runs/study")


def compared() -> Any:
    """`compare --resume` of a comparison that is finished."""
    return told("compare", "--resume", "runs/compare")


def reported() -> Any:
    """How much `report` shows."""
    folders = [f"runs/{name}" for name in (*RUNS, "study", "compare")]
    return without(told("report", *folders, "--out", "runs/report"), ("page", "bytes"))
