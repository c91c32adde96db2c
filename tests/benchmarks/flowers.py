"""Retrieval figures of every method on one data set, kept seed by seed in docs/results.

    uv run python -m tests.benchmarks.flowers --data.root FLOWERS --out DIR
        [--protocol official] [--size 128] [--rows frozen center ...] [--seeds 0 1 2] [--split test]

A row is `frozen`, or a training as a user would type it: `METHOD` or `METHOD:option=value,...` with
options of the command line without dashes (`center:init=head,train.ema=0.98`). Each training is a
RUN below `--out`, interrupted ones go on, and what stands in the results file is not made again:
all of it may be done in pieces, on several machines. Without `--data.root` the set is the rendered
one. Results of `--split val`, for choosing, stay in `--out`. Other options go to every training.
"""

import argparse
import base64
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowerray.cluster.worker import pick_device
from flowerray.data.images import resize_side
from flowerray.data.source import DataConfig
from flowerray.data.store import build_store
from flowerray.files import write_json
from flowerray.model.embedder import Embedder
from flowerray.opening import open_model
from flowerray.retrieval.command import evaluate_frozen, evaluate_model
from flowerray.retrieval.measure import EvaluateConfig, Measurement, frozen_pairs
from flowerray.retrieval.pairs import pair_metrics
from flowerray.training.run import Run
from tests.benchmarks.command import about, flowerray

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ROWS = ["frozen", "center:method.center-weight=0", "center", "siamese", "triplet"]
PROBE_C = 100.0
"""Inverse L2 penalty of the linear probe on unit vectors."""


def main() -> None:
    """Makes what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data.root", dest="root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the results; by default flowers102 or rendered")
    parser.add_argument(
        "--protocol", choices=["official", "trainval", "disjoint"], default="official"
    )
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=["val", "test"], default="test")
    options, extra = parser.parse_known_args()
    options.out = options.out.absolute()
    name = options.name or ("flowers102" if options.root else "rendered")
    folder = RESULTS if options.split == "test" else options.out
    file = folder / f"{name}-{options.protocol}-{options.size}.json"
    content = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    for seed in options.seeds:
        for row in options.rows:
            seeds = content["rows"].setdefault(row, {})
            if str(seed) in seeds or (row == "frozen" and seeds):
                continue
            found = one(options, extra, row, seed)
            content = json.loads(file.read_text()) if file.exists() else content  # others wrote
            content["rows"].setdefault(row, {})[str(seed)] = found
            write_json(file, content)
    from tests.benchmarks.tables import table

    print(table(content))


def one(options: argparse.Namespace, extra: list[str], row: str, seed: int) -> dict[str, Any]:
    """The figures of one training, or of the frozen backbone."""
    config, device = EvaluateConfig(split=options.split), pick_device("auto")
    if row == "frozen":
        run = Run.from_dict(described(options, extra))
        started = time.perf_counter()
        measurement = frozen(run, config, device)
    else:
        folder = train(options, extra, row, seed)
        started = time.perf_counter()
        model = open_model(str(folder), device)
        measurement = evaluate_model(model, model.run.data, False, config, quiet=True)
    return {
        "metrics": {k: v for k, v in measurement.metrics.items() if not isinstance(v, str)},
        "hits": packed(measurement.per_query["hit"]),
        "probe_accuracy": probe(measurement),
        "evaluation_seconds": time.perf_counter() - started,
        "commit": head(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "timm": version("timm"),
        **about(),
        "command": " ".join(["python -m tests.benchmarks.flowers", *anonymous(sys.argv[1:])]),
    }


def described(options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """A training of these options as a dict, for what is not trained."""
    from flowerray.cli.options import parse_run

    return parse_run("train center", "center", words(options, extra, options.protocol))[1].to_dict()


def words(options: argparse.Namespace, extra: list[str], protocol: str) -> list[str]:
    """What every training is typed with."""
    found = ["--data.protocol", protocol, "--embedder.image-size", str(options.size)]
    found += ["--data.root", str(options.root.absolute())] if options.root else []
    return ["--resources.workers", "0", *found, *extra]


def train(options: argparse.Namespace, extra: list[str], row: str, seed: int) -> Path:
    """One RUN by the command line; `trainval` follows the official one, made first."""
    method, _, changes = row.partition(":")
    name = row.replace(":", "-").replace("=", "").replace(",", "-").replace("method.", "")
    end = f"{options.size}-seed{seed}"

    def made(name: str, more: list[str]) -> Path:
        folder = Path(options.out) / f"{name}-{end}"
        if not (folder / "thresholds.json").exists():
            where = ["--resume" if folder.exists() else "--out", str(folder)]
            flowerray(["train", method, *more, *where], folder.with_name(f"{folder.name}.log"))
        return folder

    first = "official" if options.protocol == "trainval" else options.protocol
    own = [*words(options, extra, first), "--train.seed", str(seed)]
    for change in filter(None, changes.split(",")):
        option, equals, value = change.partition("=")
        own += [f"--{option}", value] if equals else [f"--{option}"]
    source = made(f"{name}-{first}", own)
    if options.protocol != "trainval":
        return source
    return made(f"{name}-trainval", ["--from", str(source), "--resources.workers", "0"])


def measured(folder: Path, split: str) -> Measurement:
    """The evaluation of a finished run."""
    model = open_model(str(folder), torch.device("cpu"))
    data: DataConfig = model.run.data
    return evaluate_model(model, data, False, EvaluateConfig(split=split), quiet=True)


def frozen(run: Run, config: EvaluateConfig, device: torch.device) -> Measurement:
    """The frozen backbone, with the pairs that a trained model is asked."""
    found = evaluate_frozen(run.embedder, run.data, config, device, quiet=True)
    store = build_store(found.query_paths, resize_side(run.embedder.image_size), progress=False)
    embedder = Embedder(run.embedder, seed=run.train.seed).to(device)
    pairs = frozen_pairs(embedder, store, found.query_labels)
    found.metrics.update(pair_metrics(found.query_emb, pairs))
    return found


def probe(found: Measurement) -> float | None:
    """Accuracy of a logistic regression on the gallery's unit vectors; None where queries are of
    other classes.
    """
    from sklearn.linear_model import LogisticRegression

    if found.metrics["gallery"] == "self":
        return None

    def unit(emb: NDArray) -> NDArray:
        return emb / np.maximum(np.linalg.norm(emb, axis=1, keepdims=True), 1e-12)

    model = LogisticRegression(C=PROBE_C, max_iter=1000)
    model.fit(unit(found.gallery_emb), found.gallery_labels)
    return float(model.score(unit(found.query_emb), found.query_labels))


def packed(hits_Q: NDArray) -> str:
    """Who was right, a bit each."""
    return base64.b64encode(np.packbits(hits_Q.astype(bool)).tobytes()).decode()


def unpacked(text: str, number: int) -> NDArray[np.float64]:
    """The inverse of `packed`: 0 or 1 of each query, (Q,)."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=number).astype(np.float64)


def head() -> str:
    """The commit that is measured, with a + where code differs from it."""

    def git(*what: str) -> str:
        done = subprocess.run(["git", *what], capture_output=True, text=True, cwd=RESULTS.parent)
        return done.stdout.strip()

    code = ":(top)", ":(top,exclude)docs"
    changed = git("status", "--porcelain", "-uno", "--", *code)
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def anonymous(argv: list[str]) -> list[str]:
    """A command line without this machine's paths."""
    names = {"--data.root": "FLOWERS", "--out": "DIR"}
    return [names.get(before, word) for before, word in zip(["", *argv], argv, strict=False)]


if __name__ == "__main__":
    main()
