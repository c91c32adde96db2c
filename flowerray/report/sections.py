"""The report's sections that are made of tables and curves: clean results, training, cost, data,
and how to make it all again. Each returns blocks; one that lacks its data says what brings it.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from flowerray.report.gather import Setting, StoredRun, Variant
from flowerray.report.numbers import (
    FROZEN,
    Comparison,
    Evaluations,
    comparisons,
    evaluations,
    over_floor,
    summary,
)
from flowerray.retrieval.floor import warning
from flowerray.retrieval.table import LABELS
from flowerray.show import charts
from flowerray.show.interval import MISSING, words
from flowerray.show.page import Block, Bold, Commands, Details, Note, Picture, Table, Text
from flowerray.show.style import GREY
from flowerray.statistics import Interval
from flowerray.text import counted

METRICS = {
    key: LABELS[key]
    for key in (
        "recall_at_1", "recall_at_5", "map_at_r", "recall_at_1_per_class_mean", "pair_auc",
        "pair_accuracy",
    )
}  # fmt: skip
CURVES = {
    "val/map_at_r": "val MAP@R",
    "val/recall_at_1": "val R@1",
    "val/adversarial_recall_at_1": "val R@1 under attack",
    "epoch/loss": "training loss",
}
DATA_FACTS = {
    "dataset/kind": "kind",
    "dataset/images": "images",
    "dataset/classes": "classes",
    "dataset/train": "train images",
    "dataset/val": "val images",
    "dataset/test": "test images",
    "dataset/fingerprint": "fingerprint of files, labels and splits",
}


def summary_of(setting: Setting) -> list[Block]:
    """What was run and what came out, in a few sentences."""
    seeds = sorted({len(variant.runs) for variant in setting.variants})
    fewest = "" if len(seeds) == 1 else f"{seeds[0]} to "
    said = [
        f"{counted(len(setting.runs), 'run')}: {counted(len(setting.variants), 'variant')} with "
        f"{fewest}{counted(seeds[-1], 'seed')} each."
    ]
    for table in evaluations(setting):
        found = {name: summary(records, "recall_at_1") for name, records in table.records.items()}
        trained = {n: i for n, i in found.items() if i is not None and not n.startswith(FROZEN)}
        best = max(trained, key=lambda name: trained[name].mean)
        said.append(f"Highest R@1 on {table.title}: {best}, {cell(trained[best])}.")
        frozen = [i for n, i in found.items() if i is not None and n.startswith(FROZEN)]
        if frozen:
            said[-1] += f" Frozen features: {', '.join(str(cell(i)) for i in frozen)}."
    if len(setting.shown) < len(setting.variants):
        said.append(f"Pictures and paired tests are of {_selection(setting)}; tables are of all.")
    if robust := [variant.label for variant in setting.variants if variant.robust]:
        said.append(f"Trained against attacks: {', '.join(robust)}.")
    return [*below_floor(setting), Text("\n\n".join(said))]


def below_floor(setting: Setting) -> list[Block]:
    """A warning for each variant that its backbone's features may do as well without."""
    return [
        Note(told, "warn")
        for table in evaluations(setting)
        for variant, c in over_floor(setting, table)
        if (told := warning(f"{variant.label}, on {table.split},", c.recall, variant.robust))
    ]


def clean(setting: Setting) -> list[Block]:
    """Retrieval and verification on clean photographs, with paired tests."""
    tables = evaluations(setting)
    if not tables:
        return [missing("No run has been evaluated", "flowerray evaluate RUN --split test")]
    blocks: list[Block] = []
    for table in tables:
        blocks += _clean_table(table, setting.shown)
        if rows := comparisons(setting, table):
            blocks.append(_paired(rows))
        elif any("per_query" not in r for found in table.records.values() for r in found):
            blocks.append(
                Text(
                    "Paired tests need the scores of each query, which these evaluations did not "
                    "keep: `flowerray evaluate RUN --split test` writes them."
                )
            )
    return blocks


def _clean_table(table: Evaluations, shown: Sequence[Variant]) -> list[Block]:
    metrics = {
        key: label
        for key, label in METRICS.items()
        if any(key in r["metrics"] for found in table.records.values() for r in found)
    }
    found = {
        name: {key: summary(records, key) for key in metrics}
        for name, records in table.records.items()
    }
    best = {key: highest([row[key] for row in found.values()]) for key in metrics}
    rows: list[list[str | float | None]] = []
    for name, row in found.items():
        cells = [cell(row[key], best[key]) for key in metrics]
        seeds = MISSING if name.startswith(FROZEN) else str(len(table.records[name]))
        rows.append([name, seeds, *cells])
    caption = (
        f"{table.title}. Mean and 95 % interval: of R@1 and MAP@R over queries and seeds, of the "
        "others Student's t over seeds. The best mean of a column is bold."
    )
    drawn = [n for n in found if n.startswith(FROZEN) or any(n == v.label for v in shown)]
    picture = charts.forest(
        {
            metrics[key]: {name: i for name in drawn if (i := found[name][key]) is not None}
            for key in ("recall_at_1", "map_at_r")
            if key in metrics
        },
        {name: GREY for name in drawn if name.startswith(FROZEN)},
    )
    alt = "R@1 and MAP@R of each variant with intervals, as in the table above."
    return [
        Table(["", "seeds", *metrics.values()], rows, caption),
        Picture(picture, alt, f"Means and 95 % intervals, {table.split} split."),
    ]


def _paired(rows: Sequence[Comparison]) -> Table:
    return Table(
        ["A", "B", "R@1, A - B", "MAP@R, A - B", "p", "p, Holm"],
        [
            [
                c.first, c.second, words(c.recall, "+.3f"), words(c.average_precision, "+.3f"),
                p_text(c.recall.p_value), p_text(c.p_holm),
            ]
            for c in rows
        ],
        "Paired comparisons on the same queries, with 95 % intervals over queries and seeds. p, of "
        "no difference in R@1: McNemar's exact test for one run against one, else where the "
        "interval begins to hold 0; the last column corrects for all rows (Holm).",
    )  # fmt: skip


def training(setting: Setting) -> list[Block]:
    """Validation and loss by epoch, all runs overlaid."""
    shown = {variant.label for variant in setting.shown}
    panels: dict[str, dict[str, list[charts.Curve]]] = {}
    others: dict[str, list[charts.Curve]] = {}
    for metric, title in CURVES.items():
        for variant in setting.variants:
            seeds: list[charts.Curve] = [s for run in variant.runs if (s := run.series(metric))]
            if seeds and variant.label in shown:
                panels.setdefault(title, {})[variant.label] = seeds
            others.setdefault(title, []).extend(seeds if variant.label not in shown else [])
    if not panels:
        return [missing("No run has finished an epoch", "flowerray train METHOD --resume RUN")]
    caption = (
        "By epoch. Faint lines are single seeds, the marked line is their mean. Losses of "
        "different methods are on different scales: compare a method with itself only."
    )
    if len(shown) < len(setting.variants):
        caption += f" In colour: {_selection(setting)}; grey: the others."
    figure = charts.curves(panels, "epoch", others=others)
    return [Picture(figure, "Training curves by epoch.", caption)]


def _selection(setting: Setting) -> str:
    return f"the {len(setting.shown)} variants with the highest and the lowest R@1"


def cost(setting: Setting, parameters: Mapping[StoredRun, int]) -> list[Block]:
    """Time, throughput and size of each variant; and the runs themselves.

    Args:
        parameters: of the exported embedder, where there is one.
    """
    rows = [
        [
            variant.label,
            _middle(variant, lambda r: len(r.series("epoch/seconds")) or None),
            _middle(variant, lambda r: r.records[-1]["step"] if r.records else None),
            _middle(variant, lambda r: sum(v for _, v in r.series("epoch/seconds")) or None),
            _middle(variant, _throughput),
            _middle(variant, lambda r: n / 1e6 if (n := parameters.get(r)) else None, ".2f"),
        ]
        for variant in setting.variants
    ]
    header = ["", "epochs", "steps", "training, s", "images/s", "parameters, M"]
    caption = (
        "Medians over seeds; training time without start-up, images/s while training. Times "
        "compare only where the runs had the same machine to themselves."
    )
    runs = Table(
        ["run", "variant", "seed", "status", "best val MAP@R", "folder"],
        [
            [
                e.name, variant.label, str(e.seed), e.status or "unknown",
                max((v for _, v in e.series("val/map_at_r")), default=None), str(e.folder.path),
            ]
            for variant in setting.variants
            for e in variant.runs
        ],
    )  # fmt: skip
    blocks: list[Block] = [Table(header, rows, caption)]
    if unfinished := [e.name for e in setting.runs if not e.finished]:
        blocks.append(
            Note(
                f"Not finished: {', '.join(unfinished)}. Their rows say what there was when they "
                "stopped; `flowerray train METHOD --resume RUN` continues one.",
                "warn",
            )
        )
    return [*blocks, Details("The runs", runs)]


def data_card(setting: Setting) -> list[Block]:
    """What is known of the data, without opening it."""
    run = setting.runs[0]
    noted = {k: v for k, v in run.tags.items() if k.startswith("dataset/")}
    order = [*(k for k in DATA_FACTS if k in noted), *(k for k in noted if k not in DATA_FACTS)]
    hidden = "data.synthetic." if run.options.get("data.root") else "data.root"
    facts = {DATA_FACTS.get(k, _plain(k)): noted[k] for k in order if k != "dataset/protocol"}
    for key, value in run.options.items():
        if key.startswith("data.") and not key.startswith(hidden):
            facts[_plain(key)] = str(value)
    blocks: list[Block] = [Table(["fact", "value"], list(facts.items()))]
    if not noted:
        what = "The data's counts were not noted with these runs"
        blocks.append(missing(what, "flowerray explore DIR"))
    return blocks


def _plain(key: str) -> str:
    """`dataset/train_images` or `data.train_images` in words."""
    return key.removeprefix("dataset/").removeprefix("data.").replace("_", " ")


def reproduce(setting: Setting, commands: Mapping[StoredRun, str]) -> list[Block]:
    """The command of every run, and the versions that it ran with.

    Args:
        commands: of the runs that this version understands.
    """
    blocks: list[Block] = []
    if lines := [commands[e] for e in setting.runs if e in commands]:
        blocks.append(Commands("\n".join(lines)))
    if unknown := [e.name for e in setting.runs if e not in commands]:
        blocks.append(Note(f"Written by another version, so without a command: {unknown}.", "warn"))
    versions: dict[str, Counter[str]] = {}
    for run in setting.runs:
        for key, value in run.tags.items():
            if key.startswith("version.") or key == "git_commit":
                name = key.removeprefix("version.").replace("git_commit", "commit")
                versions.setdefault(name, Counter())[value] += 1
    if not versions:
        return [*blocks, Text("The versions were not noted with these runs.")]
    rows = []
    for name, found in versions.items():
        several = (f"{value} ({counted(number, 'run')})" for value, number in found.items())
        rows.append([name, "; ".join(found if len(found) == 1 else several)])
    return [*blocks, Table(["package", "version"], rows, "What the runs noted when they started.")]


def missing(what: str, command: str) -> Text:
    """One sentence: what is not there, and the command that brings it."""
    return Text(f"{what}: `{command}` fills this section.")


def cell(found: Interval | None, best: float | None = None) -> str | None:
    """A mean with its interval, bold where it is the best."""
    if found is None:
        return None
    return Bold(words(found)) if found.mean == best else words(found)


def highest(found: Sequence[Interval | None]) -> float | None:
    """The best of several means; None where there is nothing to choose from."""
    means = [i.mean for i in found if i is not None]
    return max(means) if len(means) > 1 else None


def p_text(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _middle(variant: Variant, of: Callable[[StoredRun], float | None], spec: str = ",.0f") -> str:
    values = [value for run in variant.runs if (value := of(run)) is not None]
    return format(statistics.median(values), spec) if values else MISSING


def _throughput(run: StoredRun) -> float | None:
    found = [value for _, value in run.series("train/images_per_second")]
    return statistics.median(found) if found else None
