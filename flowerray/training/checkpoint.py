"""Checkpoints, exports, and what loads them again.

A checkpoint folder holds `state.pt` (everything that exact resume needs) and `run.json`. An export
is one `.pth` file that `torch.load(file, weights_only=True)` reads: embedder, method, run,
threshold, classes."""

import json
import math
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NotRequired

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from flowerray import methods
from flowerray.calibration import Calibration
from flowerray.errors import UserError
from flowerray.files import as_json, atomic_file, read_json, saving
from flowerray.methods._base import Method
from flowerray.model.embedder import Embedder, EmbedderConfig

STATE = "state.pt"
RUN = "run.json"
OTHERS = (
    "go on with the other one of checkpoints/best and checkpoints/last: put a copy of it in its "
    "place, then --resume"
)
AGAIN = (
    "use another one; of a RUN with its checkpoints, remove this file and thresholds.json, and "
    "--resume writes them again"
)
EXPORT_KEYS = {"embedder", "method", "run", "threshold", "classes"}


class Trained(TypedDict):
    """What a checkpoint's run.json has beside the Run."""

    dataset: NotRequired[str | None]
    photographs: NotRequired[list[str]]
    """Fingerprints of the stores of train and val; since 0.2.0."""


def split_state(method: Method) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The embedder's state, and the rest of the method's (class weights, centers, a head)."""
    prefix = "embedder."
    state = method.state_dict()
    return (
        {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        },
        {name: value for name, value in state.items() if not name.startswith(prefix)},
    )


def join_state(embedder: dict[str, Tensor], method: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_state`."""
    return {**{f"embedder.{name}": value for name, value in embedder.items()}, **method}


def save_state(folder: Path, state: dict[str, Any], run: dict[str, Any]) -> None:
    """Writes a checkpoint into an existing folder (the caller makes the folder atomic)."""
    _save(state, folder / STATE)
    (folder / RUN).write_text(as_json(run))


def trained_on(folder: Path) -> str | None:
    """The fingerprint of the data that a checkpoint was trained on, where it says so."""
    return noted(folder).get("dataset")


def noted(folder: Path) -> Trained:
    """What a checkpoint says of its data."""
    found: Trained = read_json(folder / RUN, Trained, advice=OTHERS)
    return found


def load_state(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint folder.

    Raises:
        UserError: the folder holds no readable checkpoint.
    """
    return _load(folder / STATE, device, OTHERS)


def export(
    path: Path,
    method: Method,
    embedder_state: dict[str, Tensor],
    run: dict[str, Any],
    threshold: float,
    classes: tuple[str, ...],
) -> None:
    """Writes an export file atomically.

    Args:
        path: `best_model_<name>.pth` or `robust_model_<name>.pth`.
        method: whose loss parameters are kept beside the embedder.
        embedder_state: the weights to export (the moving average's where there is one).
        run: the Run as a plain dict, with "dataset", the fingerprint of what it was trained on, and
            "calibration", of its cosine, and "seen", checksums of its images in hexadecimal.
        threshold: cosine from which two photographs count as the same class, fitted on val.
        classes: names of the training classes, in the order of the method's targets.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in embedder_state.items()}
    content = {
        "embedder": tensors,
        "method": {name: value.detach().cpu() for name, value in split_state(method)[1].items()},
        "run": json.dumps(run),
        "threshold": float(threshold),
        "classes": list(classes),
    }
    with saving(path.parent), atomic_file(path) as temporary:
        _save(content, temporary)


def _save(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, whose own error would hide that the disk is full."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def export_file(path: Path) -> Path:
    """The export that `path` (a RUN folder or the file itself) means.

    Raises:
        UserError: there is none, or there are several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such RUN folder or exported .pth file.")
    found = sorted(path.glob("best_model_*.pth")) + sorted(path.glob("robust_model_*.pth"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} holds several exported models ({names}); name the file itself.")
    if not found:
        unfinished = " (its training has not finished: `flowerray train METHOD --resume` ends it)"
        hint = unfinished if (path / "run.json").exists() else ""
        if not hint and (runs := sorted(path.glob("*/run.json"))):
            hint = f"; name one of the runs in it, such as {runs[0].parent}"
        raise UserError(f"{path} holds no exported model best_model_*.pth{hint}.")
    return found[0]


def load_export(run_or_file: str | Path) -> dict[str, Any]:
    """The content of an export: "embedder", "method", "run" (as a dict), "threshold", "classes",
    "dataset", the fingerprint of the training's data, "seen", checksums of its images, and its
    "calibration" (None: not known).

    Raises:
        UserError: nothing there, or not a flowerray export.
    """
    file = export_file(Path(run_or_file).expanduser())
    content = _load(file, "cpu", AGAIN)
    if not isinstance(content, dict) or set(content) != EXPORT_KEYS:
        raise UserError(f"{file} is not a flowerray model (expected keys {sorted(EXPORT_KEYS)}).")
    try:
        run = dict(json.loads(content["run"]))
        known = run.pop("calibration", None)
        calibration = None if known is None else Calibration(**known)
        known = run.pop("seen", None)
        seen = None if known is None else np.frombuffer(bytes.fromhex(known), ">u4")
    except (UserError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a flowerray model: its run cannot be read.") from error
    _refuse_infinite(file, content["embedder"], content["threshold"])
    dataset = run.pop("dataset", None)
    return {**content, "dataset": dataset, "calibration": calibration, "seen": seen, "run": run}


def initialise(method: Method, embedder: Embedder, source: Path, classes: tuple[str, ...]) -> None:
    """Gives a method the weights of a finished RUN or an export, as the start of a training.

    The embedder's weights always; the loss's own parameters where they are of the same method and
    classes.

    Args:
        method: on any device.
        embedder: the method's, or the one whose head it trains.
        source: a RUN folder or an export.
        classes: names of the classes that are about to be trained, in the targets' order.

    Raises:
        UserError: nothing there; an embedder of another backbone or embedding size.
    """
    content = load_export(source)
    own = embedder.config
    old = EmbedderConfig(**content["run"]["embedder"])
    for field in ("backbone", "dim"):
        if getattr(own, field) != getattr(old, field):
            raise UserError(
                f"`init` {source} has embedder.{field} {getattr(old, field)}, and this run "
                f"{getattr(own, field)}: give `embedder.{field}` {getattr(old, field)}."
            )
    rest = split_state(method)[1]
    same = content["run"]["method"]["name"] == methods.name_of(type(method.config))
    if same and tuple(content["classes"]) == classes and content["method"].keys() == rest.keys():
        rest = content["method"]
    try:
        embedder.load_state_dict(content["embedder"])
        method.load_state_dict(join_state(split_state(method)[0], rest))
    except RuntimeError as error:  # a backbone that is tied to its image size
        raise UserError(
            f"`init` {source} does not fit {own.backbone} at {own.image_size} px: give its "
            f"`embedder.image_size` {old.image_size}."
        ) from error


def build_embedder(content: dict[str, Any]) -> Embedder:
    """The embedder of a loaded export, in eval mode on the CPU; no other weights are fetched."""
    config = EmbedderConfig(**{**content["run"]["embedder"], "weights": "none"})
    embedder = Embedder(config)
    embedder.load_state_dict(content["embedder"])
    return embedder.eval()


def load_embedder(run_or_file: str | Path) -> Embedder:
    """See `flowerray.load`."""
    return build_embedder(load_export(run_or_file))


def _load(file: Path, device: torch.device | str, advice: str) -> Any:
    """Tensors of a file, whose checksums are compared first: torch itself does not."""
    try:
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile("its content is not what was written")
        return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no checkpoint there.") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError ... by fault
        reason = str(error).splitlines()[0][:120] if str(error) else "cut short"
        if isinstance(error, UnpicklingError):  # torch's own text tells how to load it all the same
            reason = "it holds other things than tensors"
        elif file.is_file() and not zipfile.is_zipfile(file):
            reason = "it is none, or was cut short"
        raise UserError(f"{file} cannot be read as a checkpoint ({reason}): {advice}.") from error


def _refuse_infinite(file: Path, tensors: dict[str, Tensor], threshold: float) -> None:
    finite = all(v.isfinite().all() for v in tensors.values() if isinstance(v, Tensor))
    if not (finite and math.isfinite(threshold) and abs(threshold) <= 1):
        raise UserError(f"{file} has weights or a threshold that are no numbers: {AGAIN}.")
