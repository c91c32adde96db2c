"""The robust version of each method beside its standard twin, over seeds, under the same attacks.

    uv run python -m tests.benchmarks.robust --out DIR [--root DATA] [--seeds 0 1 2] [--audit]
        [--base-epochs 12] [--own-epochs 4] [--eps 0,2,4,8]

For each seed: the three standard models; a base, the standard `center` hardened for
`--base-epochs`; and from it the robust version of each method, trained for `--own-epochs`. Then
every robust model is attacked beside its twin, on the test split. Each training and attack is a RUN
below `--out`; what is there already is not made again, so the command may be stopped and repeated.
Writes DIR/robust.json and prints the table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from flowerray.statistics import mean_interval, paired_difference
from tests.benchmarks.command import about, flowerray

METHODS = ("center", "siamese", "triplet")
HARDEN = ["--harden.kind", "pgd", "--harden.epsilon", "4"]
BASE = [*HARDEN, "--train.lr", "7e-4"]
OWN = [*HARDEN, "--train.lr", "5e-4", "--harden.ramp", "0"]
ATTACK = [
    "--attacks", "margin,apgd-ce,apgd-dlr", "--max-queries", "512",
    "--steps", "20", "--restarts", "3", "--max-pairs", "0",
]  # fmt: skip


def main() -> None:
    """Makes what is missing, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="data set; by default the synthetic one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--base-epochs", default="12")
    parser.add_argument("--own-epochs", default="4")
    parser.add_argument("--eps", default="0,2,4,8", help="radii; those of all seeds are reported")
    parser.add_argument("--audit", action="store_true", help="of each robust model; slow")
    options, extra = parser.parse_known_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    common = [*extra, "--resources.workers", "0"]
    if options.root is not None:
        common += ["--data.root", str(options.root)]
    audit = ["--audit"] if options.audit else []
    pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for seed in options.seeds:
        words = [*common, "--train.seed", str(seed)]
        first = [*BASE, "--train.epochs", options.base_epochs]
        then = [*OWN, "--train.epochs", options.own_epochs]
        for method in METHODS:
            train(method, out / f"{method}-seed{seed}", words)
        base = out / f"base-seed{seed}"
        train("center", base, [*words, "--init", str(out / f"center-seed{seed}"), *first])
        for method in METHODS:
            twin, robust = out / f"{method}-seed{seed}", out / f"robust-{method}-seed{seed}"
            train(method, robust, [*words, "--init", str(base), *then])
            if not (robust / "robustness.json").exists():
                attack = ["attack", str(robust), "--beside", str(twin), "--eps", options.eps]
                attack += [*ATTACK, *audit]
                flowerray(attack, robust.with_suffix(".log"))
            content = json.loads((robust / "robustness.json").read_text())["results"][0]
            pairs.setdefault(method, []).append((content, content["beside"]))
    report = {method: summary(found) for method, found in pairs.items()}
    print(table(report))
    content = {
        **about(),
        "seeds": options.seeds,
        "results": report,
    }
    (out / "robust.json").write_text(json.dumps(content, indent=2) + "\n")


def train(method: str, folder: Path, words: list[str]) -> None:
    """One training, by the command line that a user would type, unless it is there."""
    if not (folder / "thresholds.json").exists():
        where = ["--resume" if folder.exists() else "--out", str(folder)]
        flowerray(["train", method, *words, *where], folder.with_suffix(".log"))


def summary(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """By radius the worst-case R@1 of both models over seeds, and their paired difference; and of
    each seed the audit's failed checks, None where none was asked for.
    """
    by_eps: dict[str, Any] = {}
    for eps in pairs[0][0]["worst_case"]:
        if any(eps not in robust["worst_case"] for robust, _ in pairs):
            continue
        row = {}
        hits = []
        for name, side in (("robust", 0), ("standard", 1)):
            right_SQ = np.stack([right(pair[side], eps) for pair in pairs])
            values = right_SQ.mean(1).tolist()
            ci = mean_interval(right_SQ)
            row[name] = {"values": values, "mean": ci.mean, "low": ci.low, "high": ci.high}
            hits.append(right_SQ)
        gain = paired_difference(*hits)
        row["difference"] = {"mean": gain.mean, "low": gain.low, "high": gain.high}
        by_eps[eps] = row
    audits = [robust["audit"]["failed"] if robust["audit"] else None for robust, _ in pairs]
    return {"by_eps": by_eps, "audits_failed": audits}


def right(content: dict[str, Any], eps: str) -> Any:
    """Whether each query withstands all attacks at a radius, Q."""
    return np.array([c == "1" for c in content["worst_case"][eps]["right"]], dtype=float)


def table(report: dict[str, Any]) -> str:
    """The report in 80 columns."""
    lines = [f"{'method':<8}{'eps':>3}  {'robust R@1':<21} {'standard R@1':<21} difference"]
    for method, found in report.items():
        for eps, row in found["by_eps"].items():
            cells = [f"{method:<8}{eps:>3} "]
            for name in ("robust", "standard", "difference"):
                value = row[name]
                text = f"{value['mean']:.3f}"
                if "low" in value:
                    text += f" [{value['low']:.3f}, {value['high']:.3f}]"
                cells.append(f"{text:<21}")
            lines.append(" ".join(cells).rstrip())
        for place, failed in enumerate(found["audits_failed"], start=1):
            if failed is None:
                lines.append(f"{method}, {place}. seed: not audited")
            elif failed:
                lines.append(f"{method}, {place}. seed: AUDIT FAILED {', '.join(failed)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
