"""What tuning brings: the best of each method's search beside its default, on the test split.

    uv run python -m tests.benchmarks.tuned --out DIR [--root DATA] [--methods triplet ...]
        [--trials 16] [--option ...]

For each method `flowerray tune` searches, with TPE and ASHA, and trains the best configuration and
the default again with three seeds that the search never used. These trainings are then measured on
test. Every study is a folder below `--out` and goes on where it stopped, so the command may be
stopped and repeated. Writes DIR/tuned.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from flowerray.statistics import mean_interval, paired_difference
from flowerray.tuning.study import Study
from tests.benchmarks.command import about, flowerray
from tests.benchmarks.flowers import measured
from tests.benchmarks.search import SETTING

METHODS = ("triplet", "siamese", "center")
METRICS = {"R@1": ("recall_at_1", "hit"), "MAP@R": ("map_at_r", "average_precision")}
"""Column -> metric, and its value of each query."""


def main() -> None:
    """Searches what is missing, measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="data set; by default the synthetic one")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--trials", type=int, default=16)
    options, extra = parser.parse_known_args()
    options.out = options.out.absolute()
    results = {method: one_method(options, extra, method) for method in options.methods}
    content = {
        **about(),
        "results": results,
    }
    (options.out / "tuned.json").write_text(json.dumps(content, indent=2) + "\n")
    print(table(results))


def one_method(options: argparse.Namespace, extra: list[str], method: str) -> dict[str, Any]:
    """A study with its confirmation, and what its trainings do on test."""
    folder = options.out / f"tune-{method}"
    if not (folder / "result.json").exists():
        if (folder / "study.json").exists():
            words = ["--resume", str(folder)]
        else:
            words = [*SETTING, *extra, "--out", str(folder)]
            if options.root is not None:
                words += ["--data.root", str(options.root)]
        words += ["--trials", str(options.trials)]
        flowerray(["tune", method, *words], options.out / f"{folder.name}.log")
    result = json.loads((folder / "result.json").read_text())
    label = f"trial-{result['best_trial']}"
    sides = {"default": "default"}
    if result["best"] != result["default"]:
        sides["tuned"] = label
    of_query: dict[str, dict[str, Any]] = {column: {} for column in METRICS}
    found: dict[str, Any] = {
        name: result[name]
        for name in ("trials", "images", "best", "default", "winner", "confirmed")
    }
    for side, prefix in sides.items():
        runs = [measured(run, "test") for run in folders(folder, prefix)]
        found[side] = {}
        for column, (metric, key) in METRICS.items():
            values = [run.metrics[metric] for run in runs]
            rows = [run.per_query[key].astype(float) for run in runs]
            ci = mean_interval(rows)
            found[side][column] = {
                "values": values, "mean": ci.mean, "low": ci.low, "high": ci.high,
            }  # fmt: skip
            of_query[column][side] = np.stack(rows)
    if "tuned" in sides:
        found["gain"] = {}
        for column, by_side in of_query.items():
            test = paired_difference(by_side["tuned"], by_side["default"])
            found["gain"][column] = {
                "mean": test.mean, "low": test.low, "high": test.high, "p": test.p_value,
            }  # fmt: skip
    return found


def folders(study: Path, label: str) -> list[Path]:
    """The confirmation's trainings of one side, by seed."""
    count = Study.read(study).config.confirm_seeds
    found = sorted((study / "confirm").glob(f"{label}-seed-*"))
    assert len(found) == count, f"{study}: {len(found)} of {count} trainings of {label}"
    return found


def table(results: dict[str, Any]) -> str:
    """The results in 80 columns."""
    lines = [f"{'method':<9}{'':<9}{'R@1':<24}{'MAP@R':<24}p of both"]
    for method, found in results.items():
        for side in ("default", "tuned", "gain"):
            if side not in found:
                continue
            cells = []
            for column in METRICS:
                row = found[side][column]
                sign = "+" if side == "gain" else ""
                cells.append(
                    f"{row['mean']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"
                )
            if side == "gain":
                cells.append(" ".join(f"{found[side][column]['p']:.3f}" for column in METRICS))
            line = f"{method:<9}{side:<9}" + "".join(f"{cell:<24}" for cell in cells)
            lines.append(line.rstrip())
        if "tuned" not in found:
            total = sum(found["trials"].values())
            lines.append(f"{method:<9}no trial of {total} was better than the default")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
