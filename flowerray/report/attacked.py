"""The report's section on attacks: RUN/robustness.json of all runs, and whether to believe it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.report.gather import Setting
from flowerray.report.numbers import Comparison, corrected, over_seeds
from flowerray.report.sections import cell, highest, missing, p_text
from flowerray.robustness.config import AttackConfig
from flowerray.show import charts
from flowerray.show.interval import read_score, words
from flowerray.show.page import Block, Details, Note, Picture, Table, Text
from flowerray.statistics import Interval, mean_interval, paired_difference

Record = dict[str, Any]
"""An attack on one run, as `results` of RUN/robustness.json holds it."""
FREE = {"batch_size", "eps", "max_pairs"}
"""Settings of an attack that may differ within a table."""
PAIRED_EPS = ("1", "2", "4", "8")
"""Radii at which robust and standard runs are compared, in 1/255."""
SHEETS = 4
"""Pictures of turned queries that are shown of a variant."""


@dataclass(frozen=True)
class Attacks:
    """Attacks of one kind: the same queries, gallery, norm, attacks and effort."""

    records: dict[str, list[Record]]
    """Variant -> one a seed; each has its training's `seed`."""

    @property
    def first(self) -> Record:
        """Any of them, for what they share."""
        return next(iter(self.records.values()))[0]

    @property
    def eps(self) -> list[str]:
        """Every radius, ascending."""
        found = {e for rows in self.records.values() for r in rows for e in r["worst_case"]}
        return sorted(found, key=float)

    @property
    def radii(self) -> list[str]:
        """The headings of `eps`."""
        return ["clean" if float(e) == 0 else f"{e}/255" for e in self.eps]

    @property
    def shared_eps(self) -> list[str]:
        """The radii that every record has, ascending."""
        records = [r for rows in self.records.values() for r in rows]
        return [e for e in self.eps if all(e in r["worst_case"] for r in records)]


def attacked(setting: Setting) -> list[Block]:
    """Tables, curves, audits and turned queries."""
    found = attacks_of(setting)
    if not found:
        return [missing("No run has been attacked", "flowerray attack RUN --audit")]
    blocks: list[Block] = []
    for attacks in found:
        blocks += [*_audits(attacks), _about(attacks), _worst_case(attacks)]
        blocks.append(_curve(setting, attacks))
        if rows := comparisons(setting, attacks):
            blocks.append(_paired(rows))
        blocks += _pairs(attacks)
        blocks += [_each_attack(attacks), _checks(attacks)]
    return [*blocks, *_sheets(setting)]


def attacks_of(setting: Setting) -> list[Attacks]:
    """The setting's attacks, those that can be compared together."""
    found: dict[str, dict[str, list[Record]]] = {}
    for variant in setting.variants:
        for run in variant.runs:
            own: dict[str, Record] = {}
            for record in sorted((run.robustness or {}).get("results", []), key=_weight):
                # Records of older versions lack some options: they had these defaults.
                config = AttackConfig(**record["config"]).model_dump(mode="json", exclude=FREE)
                shared = [config, record["num_queries"], record["num_gallery"], record["gallery"]]
                own[json.dumps(shared, sort_keys=True)] = {**record, "seed": run.seed}
            for kind, record in own.items():
                found.setdefault(kind, {}).setdefault(variant.label, []).append(record)
    return [Attacks(rows) for rows in found.values()]


def _weight(record: Record) -> tuple[bool, int, float]:
    """Of a RUN's attacks of one kind the last by this order counts."""
    return bool(record["audit"]), len(record["worst_case"]), record["time"]


def worst_case(records: Sequence[Record], eps: str, key: str = "recall_at_1") -> Interval | None:
    """A figure of the worst case at a radius: R@1 with its interval over queries and seeds, others
    with the interval of their record, of several seeds Student's.
    """
    records = [r for r in records if key in r["worst_case"].get(eps, {})]
    at = [r["worst_case"][eps] for r in records]
    if not at:
        return None
    if key == "recall_at_1" and len({tuple(r["queries"]) for r in records}) == 1:
        return mean_interval(_hits(records, eps))
    if len(at) == 1:
        return read_score(at[0], key)
    return over_seeds([score[key] for score in at])


def _audits(attacks: Attacks) -> list[Block]:
    """A warning for every failed audit and collapsed embedding, before any figure; a note where
    nothing was audited.
    """
    blocks: list[Block] = []
    unaudited = 0
    for label, records in attacks.records.items():
        for record in records:
            name, audit = f"{label} ({Path(record['run']).name})", record.get("audit")
            unaudited += audit is None
            if audit is not None and not audit["passed"]:
                text = (
                    f"AUDIT FAILED for {name}: {', '.join(audit['failed'])}. Its robustness below "
                    "is not to be believed before that is explained."
                )
                blocks.append(Note(text, "warn"))
            if record.get("collapse", {}).get("collapsed"):
                blocks.append(Note(f"The embedding of {name} has collapsed.", "warn"))
    if unaudited:
        blocks.append(Note(
            f"Not audited: {unaudited} of {sum(map(len, attacks.records.values()))} results. "
            "`flowerray attack RUN --audit` asks whether the figures can be believed."
        ))  # fmt: skip
    return blocks


def _about(attacks: Attacks) -> Text:
    record, config = attacks.first, attacks.first["config"]
    text = (
        f"{record['num_queries']:,} {record['split']} queries, {record['num_gallery']:,} images of "
        f"gallery {record['gallery']}, norm {record['norm']}, attacks "
        f"{', '.join(config['attacks'])}; {config['steps']} steps, {config['restarts']} restarts. "
        "A query counts as right at a radius only if no attack within it turned it."
    )
    return Text(f"Threat model: {record['threat_model']}\n\n{text}")


def _worst_case(attacks: Attacks) -> Table:
    columns = {e: [worst_case(rows, e) for rows in attacks.records.values()] for e in attacks.eps}
    best = {e: highest(found) for e, found in columns.items()}
    rows: list[list[str | float | None]] = []
    for number, (label, records) in enumerate(attacks.records.items()):
        at = [r["worst_case"][e]["recall_at_1"] for r in records for e in attacks.shared_eps]
        cells = [cell(columns[e][number], best[e]) for e in attacks.eps]
        expected = float(np.mean(at)) if at else None
        rows.append([_shout(label, records), str(len(records)), *cells, expected])
    caption = (
        "R@1 in the worst case over all attacks, by radius. Mean and 95 % interval over queries "
        "and seeds. Expected: mean over the radii that "
        f"all were attacked at ({', '.join(attacks.shared_eps) or 'none'})."
    )
    return Table(["", "seeds", *attacks.radii, "expected"], rows, caption)


def _shout(label: str, records: Sequence[Record]) -> str:
    failed = [r for r in records if r.get("audit") and not r["audit"]["passed"]]
    return f"{label} (AUDIT FAILED)" if failed else label


def _curve(setting: Setting, attacks: Attacks) -> Picture:
    shown = [v.label for v in setting.shown if v.label in attacks.records] or attacks.records
    content = {
        _shout(label, attacks.records[label]): {
            e: found
            for e in attacks.eps
            if (found := worst_case(attacks.records[label], e)) is not None
        }
        for label in shown
    }
    figure = charts.bands(content, attacks.eps, "R@1 in the worst case", "radius, in 1/255")
    alt = "R@1 in the worst case over the radius of the attack, one curve a variant."
    return Picture(figure, alt, "Bands are the intervals of the table.")


def comparisons(setting: Setting, attacks: Attacks) -> list[tuple[str, Comparison]]:
    """(radius, robust against standard of the same method), corrected together."""
    known = [v for v in setting.shown if v.label in attacks.records]
    found: list[tuple[str, Comparison]] = []
    for robust in (v for v in known if v.robust):
        for standard in (v for v in known if not v.robust and v.method == robust.method):
            sides = [{r["seed"]: r for r in attacks.records[v.label]} for v in (robust, standard)]
            shared = sorted(sides[0].keys() & sides[1].keys())
            both = [[side[seed] for seed in shared] for side in sides]
            if len({tuple(r["queries"]) for records in both for r in records}) != 1:
                continue
            for eps in PAIRED_EPS if attacks.first["norm"] == "linf" else attacks.shared_eps[1:]:
                if all(eps in r["worst_case"] for records in both for r in records):
                    gain = paired_difference(*(_hits(records, eps) for records in both))
                    found.append((eps, Comparison(robust.label, standard.label, gain, None)))
    tested = corrected([comparison for _, comparison in found])
    return [(eps, c) for (eps, _), c in zip(found, tested, strict=True)]


def _hits(records: Sequence[Record], eps: str) -> NDArray[np.int64]:
    """(S, Q): 1 where a query is right in the worst case."""
    return np.array([[int(bit) for bit in r["worst_case"][eps]["right"]] for r in records])


def _paired(rows: Sequence[tuple[str, Comparison]]) -> Table:
    cells = [
        [c.first, c.second, f"{eps}/255", words(c.recall, "+.3f"), p_text(c.recall.p_value),
         p_text(c.p_holm)]
        for eps, c in rows
    ]  # fmt: skip
    caption = (
        "Robust against standard on the same attacked queries, tested as in the clean table; Holm "
        "corrects for all rows."
    )
    return Table(["A", "B", "radius", "R@1, A - B", "p", "p, Holm"], cells, caption)


def _pairs(attacks: Attacks) -> list[Block]:
    rows = []
    for label, records in attacks.records.items():
        found = [worst_case(records, e, "pair_accuracy") for e in attacks.eps]
        rows += [[label, *(None if i is None else i.mean for i in found)]] if any(found) else []
    if not rows:
        return []
    caption = "Pair accuracy where one photograph of each pair is attacked; mean over seeds."
    return [Table(["", *attacks.radii], rows, caption)]


def _each_attack(attacks: Attacks) -> Details:
    rows: list[list[str | float | None]] = []
    for label, records in attacks.records.items():
        for name in records[0]["attacks"]:
            values = [
                [r["attacks"][name][e]["recall_at_1"] for r in records if e in r["attacks"][name]]
                for e in attacks.eps
            ]
            seconds = sum(r["seconds"].get(name, 0.0) for r in records)
            means = [sum(v) / len(v) if v else None for v in values]
            rows.append([f"{label}: {name}", *means, f"{seconds:.0f}"])
    cumulative = attacks.first["rows"] == "cumulative"
    got = "Cumulative: an attack got only the queries that those above it left right."
    got = got if cumulative else "Every attack got every query."
    caption = f"R@1 under each attack, mean over seeds. {got}"
    return Details("Every attack", Table(["", *attacks.radii, "seconds"], rows, caption))


def _checks(attacks: Attacks) -> Block:
    rows: list[list[str | float | None]] = [
        [
            f"{label}: {check['name']}",
            "not asked" if check["passed"] is None else "yes" if check["passed"] else "NO",
            check["text"],
        ]
        for label, records in attacks.records.items()
        for record in records
        for check in (record.get("audit") or {}).get("checks", [])
    ]
    table = Table(["check", "passed", "what was found"], rows)
    return Details("Audit, check by check", table if rows else Text("Nothing was audited."))


def _sheets(setting: Setting) -> list[Block]:
    """Queries that an attack turned, as `flowerray attack` drew them."""
    return [
        Picture(file, f"Queries that an attack turned. {text}", text)
        for name, _, files in setting.pictured("plots/worst_queries*.png")
        for file in files[:SHEETS]
        for text in [f"{name}: {file.stem.replace('_', ' ')}."]
    ]
