"""What the search is worth: TPE with ASHA against random search without pruning, at equal images.

    uv run python -m tests.benchmarks.search --out DIR [--root DATA] [--seeds 0 1 2] [--trials 16]
        [--method triplet] [--confirm 3] [--concurrent 2] [--option ...]

For each search seed random search makes `--trials` full trials; TPE + ASHA makes trials until it
has trained as many images. The best of each within that budget is trained again with fresh seeds.
Every search is a study below `--out` and goes on where it stopped, so the command may be stopped
and repeated. Writes DIR/search.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from flowerray.show.interval import words
from flowerray.statistics import Interval, t_interval
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from flowerray.tuning.confirm import measured, pick, retrain
from flowerray.tuning.database import outcome
from flowerray.tuning.study import Study
from tests.benchmarks.command import about, flowerray

SETTING = ["--embedder.image-size", "96", "--train.epochs", "12"]
"""About 12,000 images a full trial on 1,020 training images."""
SIDES = {"random": ["random", "none"], "tpe+asha": ["tpe", "asha"]}


def main() -> None:
    """Runs what is missing, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="data set; by default the synthetic one")
    parser.add_argument("--method", default="triplet")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=16, help="of the random search")
    parser.add_argument("--confirm", type=int, default=3, help="fresh seeds")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at a time")
    options, extra = parser.parse_known_args()
    options.out = options.out.absolute()
    results = [one_seed(options, extra, seed) for seed in options.seeds]
    content = {
        **about(),
        "seeds": results,
        "summary": summary(results),
    }
    (options.out / "search.json").write_text(json.dumps(content, indent=2) + "\n")
    print(table(results))


def one_seed(options: argparse.Namespace, extra: list[str], seed: int) -> dict[str, Any]:
    """Both searches with one seed, and the confirmation of their winners."""
    random = search(options, extra, "random", seed, options.trials)
    budget = images(random)
    trials = 2 * options.trials
    guided = search(options, extra, "tpe+asha", seed, trials)
    while images(guided) < budget:
        trials += options.trials // 2 or 1
        guided = search(options, extra, "tpe+asha", seed, trials)
    found: dict[str, Any] = {"seed": seed, "budget_images": budget}
    for side, study in (("random", random), ("tpe+asha", guided)):
        found[side] = best_within(study, budget)
        found[side] |= costs(study)
        found[side]["confirmed"] = confirmed(study, found[side]["best_number"], options.confirm)
    needed = images_to_reach(guided, found["random"]["best"])
    found["share_of_images_to_reach_random"] = None if needed is None else needed / budget
    return found


def search(
    options: argparse.Namespace, extra: list[str], side: str, seed: int, trials: int
) -> Study:
    """A study, by the command line that a user would type; made, continued, or only read."""
    folder = options.out / f"{side.replace('+', '-')}-seed{seed}"
    sampler, pruner = SIDES[side]
    if not (folder / "study.json").exists():
        words = [*SETTING, *extra, "--sampler", sampler, "--pruner", pruner, "--seed", str(seed)]
        words += ["--confirm-seeds", "0", "--out", str(folder)]
        if options.root is not None:
            words += ["--data.root", str(options.root)]
    elif len(by_time(Study.read(folder))) >= trials:
        return Study.read(folder)
    else:
        words = ["--resume", str(folder)]
    words += ["--trials", str(trials), "--max-concurrent", str(options.concurrent)]
    flowerray(["tune", options.method, *words], options.out / f"{folder.name}.log")
    return Study.read(folder)


def by_time(study: Study) -> list[Any]:
    """The trials that ended, in the order in which they did."""
    return sorted(study.ended(), key=lambda t: t.datetime_complete)


def images(study: Study) -> int:
    """Trained in the whole search."""
    return sum(trial.user_attrs["images"] for trial in by_time(study))


def best_within(study: Study, budget: int) -> dict[str, Any]:
    """The best complete trial among those that ended within the budget."""
    spent, kept = 0, []
    for trial in by_time(study):
        spent += trial.user_attrs["images"]
        if spent <= budget:
            kept.append(trial)
    complete = [trial for trial in kept if outcome(trial) == "complete"]
    best = complete[pick([trial.values for trial in complete])]
    return {
        "trials": len(kept),
        "complete": len(complete),
        "best": best.value,
        "best_number": best.number,
        "params": best.params,
    }


def images_to_reach(study: Study, value: float) -> int | None:
    """Images trained when a complete trial first reached `value`; None where none did."""
    spent = 0
    for trial in by_time(study):
        spent += trial.user_attrs["images"]
        if outcome(trial) == "complete" and trial.value >= value:
            return spent
    return None


def confirmed(study: Study, number: int, seeds: int) -> list[float]:
    """Val MAP@R of a trial's configuration with seeds that the search did not use."""
    optuna_study = study.optuna
    folder = study.trial_dir(optuna_study.trials[number])
    study.config = study.config.model_copy(update={"confirm_seeds": seeds})
    sides: dict[str, Run] = {"tuned": Run.from_dict(folder.read())}
    folders, _ = retrain(study, sides, folder.path.name, cpus=1, gpus=0, quiet=False)
    return measured(study, folders)["tuned"][study.config.objectives[0]]


def costs(study: Study) -> dict[str, float]:
    """A trial's fixed cost and Ray's share of its time, as medians over the trials."""
    starts, shares = [], []
    for trial in by_time(study):
        folder: RunDir = study.trial_dir(trial)
        began, told = (folder.series(f"trial/{name}_seconds") for name in ("start", "report"))
        records = folder.records()
        if began and told:
            starts.append(began[0][1])
            total = records[-1]["time"] - records[0]["time"] + began[0][1]
            shares.append((began[0][1] + told[-1][1]) / total)
    return {"median_start_seconds": median(starts), "median_ray_share": median(shares)}


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the search seeds."""
    gains = t_interval([_mean(r["tpe+asha"]) - _mean(r["random"]) for r in results])
    shares = [r["share_of_images_to_reach_random"] for r in results]
    return {
        "confirmed_gain": gains.to_dict(),
        "shares": shares,
        "reached": sum(share is not None and share <= 1 for share in shares),
    }


def _mean(side: dict[str, Any]) -> float:
    return float(sum(side["confirmed"]) / len(side["confirmed"]))


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in 80 columns."""
    lines = [
        f"{'seed':<6}{'images':>9}  {'random':>8}{'tpe+asha':>10}   confirmed, and images needed"
    ]
    for r in results:
        share = r["share_of_images_to_reach_random"]
        reached = "not reached" if share is None else f"{share:.2f} of random's images"
        lines.append(
            f"{r['seed']:<6}{r['budget_images']:>9,}  {_mean(r['random']):>8.3f}"
            f"{_mean(r['tpe+asha']):>10.3f}   {reached}"
        )
    gain: Interval = t_interval([_mean(r["tpe+asha"]) - _mean(r["random"]) for r in results])
    return "\n".join([*lines, f"gain of TPE + ASHA in confirmed val MAP@R: {words(gain, '+.3f')}"])


if __name__ == "__main__":
    main()
