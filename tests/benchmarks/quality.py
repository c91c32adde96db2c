"""Retrieval quality of every method beside frozen features, over seeds, with intervals.

    uv run python -m tests.benchmarks.quality --out DIR [--root DATA] [--seeds 0 1 2] [--option ...]

Each training is a RUN below `--out`; a run that is there already is not trained again, so the
command may be stopped and repeated. The test split is read once, at the end of each run. The
settings of `--methods` are `NAME` or `NAME:option=value,...` (options of the command line without
dashes):

    --methods triplet siamese center center:method.center-weight=0
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowerray.data.source import DataConfig
from flowerray.opening import open_model
from flowerray.report.numbers import PER_QUERY
from flowerray.retrieval.command import evaluate_frozen, evaluate_model
from flowerray.retrieval.measure import EvaluateConfig, Measurement
from flowerray.statistics import mean_interval, paired_difference, t_interval
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from tests.benchmarks.command import about, flowerray

DEFAULT = ["triplet", "siamese", "center", "center:method.center-weight=0"]
METRICS = ("recall_at_1", "map_at_r", "recall_at_1_per_class_mean", "pair_auc", "pair_accuracy")


def main() -> None:
    """Trains what is missing, measures, prints the table and writes DIR/quality.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="data set; by default the synthetic one")
    parser.add_argument("--methods", nargs="+", default=DEFAULT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    options, extra = parser.parse_known_args()
    jobs = [(setting, seed) for setting in options.methods for seed in options.seeds]
    with ThreadPoolExecutor(options.parallel) as pool:
        folders = list(pool.map(lambda job: train(options, extra, *job), jobs))

    results: dict[str, list[Measurement]] = {}
    for (setting, _), folder in zip(jobs, folders, strict=True):
        results.setdefault(setting, []).append(measured(folder, options.split))
    first = Run.from_dict(RunDir(folders[0]).read())
    config = EvaluateConfig(split=options.split)
    frozen = evaluate_frozen(first.embedder, first.data, config, torch.device("cpu"), quiet=True)
    report = {"frozen": floor(frozen)}
    for setting, runs in results.items():
        report[setting] = summary(runs, frozen)
    print(table(report, options.split))
    content = {
        **about(),
        "split": options.split,
        "seeds": options.seeds,
        "results": report,
    }
    (options.out / f"quality-{options.split}.json").write_text(json.dumps(content, indent=2) + "\n")


def train(options: argparse.Namespace, extra: list[str], setting: str, seed: int) -> Path:
    """One run, by the command line that a user would type."""
    method, _, changes = setting.partition(":")
    name = setting.replace(":", "-").replace("=", "").replace(",", "-").replace("method.", "")
    folder = options.out.absolute() / f"{name}-seed{seed}"
    if (folder / "thresholds.json").exists():
        return Path(folder)
    words = ["train", method, "--train.seed", str(seed), "--resources.workers", "0", *extra]
    for change in filter(None, changes.split(",")):
        option, equals, value = change.partition("=")
        words += [f"--{option}", value] if equals else [f"--{option}"]
    if options.root is not None:
        words += ["--data.root", str(options.root)]
    words += ["--resume" if folder.exists() else "--out", str(folder)]
    log = options.out.absolute() / f"{name}-seed{seed}.log"
    threads = str(max(1, (os.cpu_count() or 1) // options.parallel))
    flowerray(words, log, {**os.environ, "OMP_NUM_THREADS": threads})
    return Path(folder)


def measured(folder: Path, split: str) -> Measurement:
    """The evaluation of a finished run."""
    model = open_model(str(folder), torch.device("cpu"))
    data: DataConfig = model.run.data
    return evaluate_model(model, data, False, EvaluateConfig(split=split), quiet=True)


def floor(frozen: Measurement) -> dict[str, Any]:
    """The frozen backbone's figures, with an interval over queries."""
    ci = mean_interval(frozen.per_query["hit"].astype(float))
    return {
        "recall_at_1": {"mean": ci.mean, "low": ci.low, "high": ci.high, "n": ci.n},
        "map_at_r": {"mean": frozen.metrics["map_at_r"]},
    }


def summary(runs: list[Measurement], frozen: Measurement) -> dict[str, Any]:
    """Means, and the paired gain over frozen features, with intervals over queries and seeds."""
    found: dict[str, Any] = {}
    for key in METRICS:
        values = [run.metrics[key] for run in runs if key in run.metrics]
        ci = t_interval(values) if len(values) > 1 else None
        if key in PER_QUERY:
            ci = mean_interval([run.per_query[PER_QUERY[key]] for run in runs])
        found[key] = {"mean": float(np.mean(values)), "values": values}
        if ci is not None:
            found[key] |= {"low": ci.low, "high": ci.high}
    hits_SQ = np.stack([run.per_query["hit"] for run in runs]).astype(float)
    gain = paired_difference(hits_SQ, frozen.per_query["hit"])
    found["gain_over_frozen"] = {"mean": gain.mean, "low": gain.low, "high": gain.high}
    return found


def table(report: dict[str, Any], split: str) -> str:
    """The report in 80 columns."""
    lines = [f"{split:<30}{'R@1':<22}{'MAP@R':<8}{'R@1 gain over frozen':<24}"]
    for name, row in report.items():
        r1, gain = row["recall_at_1"], row.get("gain_over_frozen")
        cells = f"{r1['mean']:.3f}"
        if "low" in r1:
            cells += f" [{r1['low']:.3f}, {r1['high']:.3f}]"
        more = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else ""
        label = name.replace("method.", "")[:29]
        lines.append(f"{label:<30}{cells:<22}{row['map_at_r']['mean']:<8.3f}{more}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
