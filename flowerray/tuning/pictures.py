"""A study as pictures and as a table: how the search went, what mattered, what won."""

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowerray.show.columns import columns
from flowerray.show.interval import words
from flowerray.show.style import (
    BLUE,
    GREY,
    GRID,
    INK,
    ORANGE,
    legend_below,
    panels,
    plain_axes,
    save,
)
from flowerray.statistics import front
from flowerray.text import labelled, typed
from flowerray.tuning.config import label

FEWEST = 4
"""Trials below which nothing can be said of a knob's importance."""


@dataclass(frozen=True)
class Row:
    """A trial of a study that ended."""

    number: int
    outcome: Literal["complete", "stopped", "failed"]
    params: Mapping[str, Any]
    values: tuple[float, ...]
    """The objectives that it reached."""
    curve: tuple[tuple[int, float], ...]
    """(epoch, first objective so far); empty where it failed early."""


def plot_study(
    rows: Sequence[Row], distributions: Mapping[str, Any], labels: Sequence[str], folder: Path
) -> list[Path]:
    """Draws history.png, slice.png, parallel.png, importance.png and, for two objectives,
    front.png; what the trials are too few for is left out.

    Args:
        rows: the trials by number; failed ones are left out, except in the count.
        distributions: Optuna's, by knob.
        labels: of the objectives.
    """
    alive = [row for row in rows if row.outcome != "failed"]
    if not alive:
        return []
    figures = {
        "history": history_figure(alive, len(rows) - len(alive), labels[0]),
        "slice": slice_figure(alive, distributions, labels[0]),
        "parallel": parallel_figure(alive, distributions, labels[0]),
    }
    if found := importances(alive, distributions):
        epoch = common_epoch(alive)
        figures["importance"] = importance_figure(found, epoch, len(alive), labels[0])
    if len(labels) > 1:
        figures["front"] = front_figure(alive, labels)
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def write_rows(rows: Sequence[Row], labels: Sequence[str], path: Path) -> None:
    """The trials as a table, a line each: number, outcome, what it reached, epochs, knobs."""
    knobs = sorted({name for row in rows for name in row.params})
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", "outcome", *labels, "epochs", *knobs])
        for row in rows:
            values = row.values or ("",) * len(labels)
            epochs = row.curve[-1][0] if row.curve else 0
            params = (row.params.get(name, "") for name in knobs)
            table.writerow([row.number, row.outcome, *values, epochs, *params])


def history_figure(rows: Sequence[Row], failed: int, label: str) -> Any:
    """Each trial's value, and the best complete one so far."""
    figure, ((axes,),) = panels(7, 3.6)
    title = f"Search history ({len(rows)} trials" + (f", {failed} more failed)" if failed else ")")
    plain_axes(axes, title, "trial", label)
    axes.locator_params(axis="x", integer=True)
    _scatter(axes, rows, [row.number for row in rows], label="trial")
    complete = [row for row in rows if row.outcome == "complete"]
    best = [max(r.values[0] for r in complete[: i + 1]) for i in range(len(complete))]
    axes.step([r.number for r in complete], best, where="post", color=ORANGE, label="best so far")
    legend_below(figure)
    return figure


def slice_figure(rows: Sequence[Row], distributions: Mapping[str, Any], label: str) -> Any:
    """The first objective over each knob."""
    names = list(distributions)
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure, grid = panels(3.1 * across, 2.7 * down, down, across, sharey=True)
    grid = grid.ravel()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        plain_axes(axes, "", name, label if axes in grid[::across] else "")
        places, ticks = scale(distributions[name], [row.params[name] for row in rows])
        _scatter(axes, rows, places)
        _ticks(axes, distributions[name], ticks)
    legend_below(figure, 3)
    return figure


def parallel_figure(rows: Sequence[Row], distributions: Mapping[str, Any], label: str) -> Any:
    """Each trial as a line through its knobs, coloured by the first objective."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = list(distributions)
    figure, ((axes,),) = panels(max(6, 1.5 * len(names) + 1), 4)
    values = [row.values[0] for row in rows]
    colour: Any = ScalarMappable(Normalize(min(values), max(values)), colormaps["viridis_r"])
    heights = []
    for x, name in enumerate(names):
        numbers, ticks = scale(distributions[name], [row.params[name] for row in rows])
        low, high = span(distributions[name], numbers)
        heights.append([(n - low) / (high - low) for n in numbers])
        axes.axvline(x, color=GRID, linewidth=1)
        shown = [(low, _text(low, distributions[name])), (high, _text(high, distributions[name]))]
        for place, text in ticks or shown:
            y = (place - low) / (high - low)
            axes.annotate(
                text, (x, y), (4, 0), "data", "offset points", fontsize=8, va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
    for i in sorted(range(len(rows)), key=lambda i: values[i]):
        axes.plot(
            range(len(names)),
            [height[i] for height in heights],
            color=colour.to_rgba(values[i]),
            alpha=0.9 if rows[i].outcome == "complete" else 0.35,
            linewidth=1.4,
        )
    plain_axes(axes, "Trials through their knobs (stopped ones faint)")
    axes.grid(visible=False)
    wrapped = [name.replace(".", ".\n").replace("_", "_\n", 1) for name in names]
    axes.set_xticks(range(len(names)), wrapped, fontsize=8)
    axes.set_xlim(-0.15, len(names) - 0.4)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.colorbar(colour, ax=axes, label=label, pad=0.01)
    return figure


def common_epoch(rows: Sequence[Row]) -> int:
    """The last epoch that every trial reached: there they can be compared."""
    return min(row.curve[-1][0] for row in rows)


def importances(rows: Sequence[Row], distributions: Mapping[str, Any]) -> dict[str, float]:
    """Each knob's share of the variance of the first objective after `common_epoch`; nothing where
    the trials are too few or alike.

    fANOVA: Hutter, Hoos, Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter
    Importance", ICML 2014.
    """
    import optuna

    epoch = common_epoch(rows)
    values = [dict(row.curve)[epoch] for row in rows]
    if len(rows) < FEWEST or max(values) - min(values) < 1e-9:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's notes on experimental parts
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize")
        for row, value in zip(rows, values, strict=True):
            params = {name: row.params[name] for name in distributions}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=dict(distributions), value=value
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def importance_figure(found: Mapping[str, float], epoch: int, trials: int, label: str) -> Any:
    """Bars, the largest on top."""
    names = sorted(found, key=lambda name: found[name])
    figure, ((axes,),) = panels(7, 0.9 + 0.34 * len(names))
    title = f"What mattered for {label} after epoch {epoch} ({trials} trials)"
    plain_axes(axes, title, "share of the variance (fANOVA)", "")
    axes.barh(names, [found[name] for name in names], color=BLUE, height=0.6)
    for y, name in enumerate(names):
        axes.annotate(f"{found[name]:.2f}", (found[name], y), (4, 0), "data", "offset points",
                      va="center", fontsize=9, color=INK)  # fmt: skip
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    return figure


def front_figure(rows: Sequence[Row], labels: Sequence[str]) -> Any:
    """Both objectives of the complete trials, and the front."""
    figure, ((axes,),) = panels(5.6, 4.2)
    plain_axes(axes, "Clean against adversarial retrieval", *reversed(labels))
    complete = [row for row in rows if row.outcome == "complete"]
    for row in complete:
        axes.plot(row.values[1], row.values[0], "o", color=GREY, markersize=5)
    best = sorted((complete[i] for i in front([r.values for r in complete])),
                  key=lambda r: r.values[1])  # fmt: skip
    axes.plot([r.values[1] for r in best], [r.values[0] for r in best], "o-", color=BLUE)
    for row in best:
        place = (row.values[1], row.values[0])
        axes.annotate(str(row.number), place, (5, 4), "data", "offset points", fontsize=8)
    return figure


def scale(distribution: Any, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where values stand on a knob's axis (logarithmic ones as log10), and the names of choices."""
    if hasattr(distribution, "choices"):
        choices = list(distribution.choices)
        if all(isinstance(c, int) and not isinstance(c, bool) for c in choices):
            choices.sort()
        ticks = [(float(i), str(choice)) for i, choice in enumerate(choices)]
        return [float(choices.index(value)) for value in values], ticks
    if distribution.log:
        return [math.log10(value) for value in values], []
    return [float(value) for value in values], []


def span(distribution: Any, places: Sequence[float]) -> tuple[float, float]:
    """The ends of a knob's axis, never equal."""
    if hasattr(distribution, "choices"):
        return (0.0, max(1.0, len(distribution.choices) - 1.0))
    (low, high), _ = scale(distribution, [distribution.low, distribution.high])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _text(place: float, distribution: Any) -> str:
    value = 10**place if getattr(distribution, "log", False) else place
    return f"{value:.2g}"


def _ticks(axes: Any, distribution: Any, ticks: Sequence[tuple[float, str]]) -> None:
    low, high = span(distribution, [])
    if ticks:
        steep = sum(len(text) for _, text in ticks) > 24
        places, texts = zip(*ticks, strict=True)
        axes.set_xticks(places, texts, rotation=20 if steep else 0, fontsize=8)
    elif getattr(distribution, "log", False):
        powers = [p for p in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        if len(powers) > 1:
            axes.set_xticks(powers, [f"{10.0**p:g}" for p in powers], fontsize=8)
        else:
            marks = [low, (low + high) / 2, high]
            axes.set_xticks(marks, [f"{10**p:.2g}" for p in marks], fontsize=8)
    margin = 0.06 * (high - low)
    axes.set_xlim(low - margin, high + margin)


def _scatter(axes: Any, rows: Sequence[Row], places: Sequence[float], label: str = "") -> None:
    """Complete trials filled, stopped ones hollow, the default as a diamond."""
    for kind, face in (("complete", BLUE), ("stopped", "none")):
        points = [(x, r) for x, r in zip(places, rows, strict=True) if r.outcome == kind]
        if points:
            axes.scatter(
                [x for x, _ in points], [r.values[0] for _, r in points],
                s=26, facecolors=face, edgecolors=BLUE, linewidths=1.1,
                label=f"{kind} {label}".strip(),
            )  # fmt: skip
    first = [(x, r.values[0]) for x, r in zip(places, rows, strict=True) if r.number == 0]
    if first:
        axes.scatter(*first[0], s=60, marker="D", facecolors="none", edgecolors=ORANGE,
                     label="the default")  # fmt: skip


# ---- the table


def study_table(result: Mapping[str, Any]) -> str:
    """The result of a study in 80 columns: the best configuration beside the default, and the gain
    on fresh seeds.
    """
    trials = result["trials"]
    total = sum(trials.values())
    rows = [["knob", f"trial {result['best_trial']}", "default"]]
    rows += [[n, _short(v), _short(result["default"][n])] for n, v in result["best"].items()]
    rows.append(["", "", ""])
    for name, value in result["searched"].items():
        rows.append([f"{label(name)} in the search", f"{value:.3f}", ""])
    confirmed = result.get("confirmed", {})
    rows += _confirmed(result["objectives"], confirmed)
    lines = [
        f"{result['method']}: {total} trials ({trials['complete']} complete, {trials['stopped']} "
        f"stopped early, {trials['failed']} failed),",
        f"{result['images']:,} images drawn",
        "",
        *columns(rows, "<<<", indent=2),
    ]
    if then_all := result.get("then_all"):
        lines += [
            "",
            f"  the best {then_all} heads were trained in full; trial "
            f"{result['best_trial']} went on best,",
            "  and is confirmed beside the default trained in full",
        ]
    if not confirmed:
        lines += ["", "  not confirmed on fresh seeds (--confirm-seeds 0)"]
    elif "gain" not in confirmed:
        lines.append("  no trial was better than the default")
    if lost := confirmed.get("diverged"):
        trainings = len(confirmed["seeds"]) * sum(side in confirmed for side in _SIDES)
        said = f"{len(lost)} of {trainings} trainings with fresh seeds diverged and count as 0:"
        lines += ["", f"  {said}", *(f"  {name}" for name in lost)]
    registered = result["registered"]
    lines += ["", f"champion  {result['winner']}: {result['champion']}"]
    if why := registered.get("withheld"):
        lines.append(labelled("model", f"not registered: {why}"))
    elif registered["version"] is not None:
        address = f"models:/{registered['name']}@{registered['alias']}"
        lines.append(f"model     {address}  (version {registered['version']})")
    else:
        lines += ["model     not registered, since MLflow could not be used; to do it:"]
        lines += [" " * 10 + typed(f"flowerray tune {result['method']} --resume {result['study']}")]
    lines.append(f"next      {typed('flowerray evaluate ' + result['champion'])}")
    return "\n".join(lines)


_SIDES = ("tuned", "default")


def _confirmed(objectives: Sequence[str], confirmed: Mapping[str, Any]) -> list[list[str]]:
    """Each objective's means over fresh seeds, and the gain."""
    rows = []
    for name in objectives if confirmed else ():
        values = (confirmed.get(side, {}).get(name) for side in _SIDES)
        means = ("" if v is None else f"{sum(v) / len(v):.3f}" for v in values)
        rows.append([f"{label(name)}, {len(confirmed['seeds'])} fresh seeds", *means])
        if "gain" in confirmed:
            gain = confirmed["gain"][name]
            rows.append(["gain", words(gain, "+.3f"), "" if gain["low"] is None else "(95 %)"])
    return rows


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
