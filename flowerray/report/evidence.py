"""The report's sections that are made of pictures: galleries, failures, explanations."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowerray.errors import UserError
from flowerray.explain.pair import Faithfulness
from flowerray.explain.table import HEADINGS
from flowerray.files import read_json
from flowerray.report.gather import Setting
from flowerray.report.numbers import FROZEN, Evaluations, evaluations
from flowerray.report.sections import missing
from flowerray.show.contact import Group, Tile, draw_sheet
from flowerray.show.interval import MISSING, words
from flowerray.show.page import Block, Note, Picture, Pictures, Table, Text

WORST = 8
"""Failures, and classes, that are shown."""
EXPLANATIONS = 6
"""Explanation pictures shown of a run; the others are in its folder."""


@dataclass(frozen=True)
class Failure:
    """A query whose nearest gallery image is of another class."""

    query: str
    class_name: str
    nearest: str
    """The gallery image of the surest miss."""
    nearest_class: str
    similarity: float
    """Its cosine."""
    missed: int
    """Runs that missed the query."""
    runs: int
    root: Path


def galleries(setting: Setting) -> list[Block]:
    """What the first seed of the shown variants found."""
    blocks: list[Block] = []
    for name, _, files in setting.pictured("plots/retrieval_*.png"):
        for file in files:
            about = f"{name}: {_words(file.stem)}"
            alt = f"Queries and their nearest gallery images, {about}; hits green, misses orange."
            blocks.append(Picture(file, alt, f"{about}."))
    if not blocks:
        return [missing("No retrieval gallery was drawn", "flowerray evaluate RUN --split test")]
    text = (
        "One seed of each variant; the other seeds' pictures are in `RUN/plots/`. Queries are "
        "drawn at random, half of them misses as far as there are any. Green with a tick: the "
        "query's class; orange with a cross: another."
    )
    return [Text(text), *blocks]


def failures(setting: Setting) -> list[Block]:
    """The classes and the queries that go wrong most, over all trained runs."""
    blocks: list[Block] = []
    for table in evaluations(setting):
        records = [
            record
            for name, rows in table.records.items()
            if not name.startswith(FROZEN)
            for record in rows
            if "class" in record.get("per_query", {})
        ]
        if records:
            blocks += [_worst_classes(records, table), *_worst_queries(records)]
    if not blocks:
        what = "No evaluation kept what each query found"
        return [missing(what, "flowerray evaluate RUN --split test")]
    return blocks


def find_failures(records: Sequence[dict]) -> list[Failure]:
    """Missed queries of several evaluations: those that most runs missed first, then by the cosine
    of the surest miss.
    """
    misses: dict[str, list[tuple[float, str, str, str, str]]] = {}
    asked: Counter[str] = Counter()
    keys = ("num_relevant", "hit", "similarity", "nearest", "nearest_class", "class")
    for record in records:
        columns = (record["per_query"][key] for key in keys)
        for query, relevant, hit, *miss in zip(record["queries"], *columns, strict=True):
            asked[query] += bool(relevant)
            if relevant and not hit:
                misses.setdefault(query, []).append((*miss, record["root"]))
    found = []
    for query, own in misses.items():
        similarity, nearest, nearest_class, class_name, root = max(own)
        pair = query, class_name, nearest, nearest_class
        found.append(Failure(*pair, similarity, len(own), asked[query], Path(root)))
    return sorted(found, key=lambda f: (-f.missed / f.runs, -f.similarity, f.query))


def _worst_classes(records: Sequence[dict], table: Evaluations) -> Block:
    hits: dict[str, list[int]] = {}
    taken: dict[str, Counter[str]] = {}
    for record in records:
        per = record["per_query"]
        rows = zip(per["class"], per["hit"], per["nearest_class"], per["num_relevant"], strict=True)
        for class_name, hit, nearest_class, relevant in rows:
            if relevant:
                hits.setdefault(class_name, []).append(hit)
                if not hit:
                    taken.setdefault(class_name, Counter())[nearest_class] += 1
    order = sorted(hits, key=lambda name: (sum(hits[name]) / len(hits[name]), name))[:WORST]
    shown: list[list[str | float | None]] = []
    for name in order:
        others = taken.get(name, Counter()).most_common(3)
        wrong = ", ".join(f"{other} ({n})" for other, n in others) or MISSING
        shown.append([name, sum(hits[name]) / len(hits[name]), len(hits[name]), wrong])
    caption = (
        f"The classes with the lowest R@1 over all trained runs ({len(records)} evaluations of "
        f"{table.title}), and what their queries were taken for."
    )
    return Table(["class", "R@1", "queries x runs", "taken for"], shown, caption)


def _worst_queries(records: Sequence[dict]) -> list[Block]:
    found = find_failures(records)
    if not found:
        return [Text("Every query of every run found an image of its class first.")]
    pictures = []
    for failure in found[:WORST]:
        text = (
            f"{failure.class_name} taken for {failure.nearest_class}, cosine "
            f"{failure.similarity:.2f}, in {failure.missed} of {failure.runs} runs. "
            f"`{failure.query}` and `{failure.nearest}`"
        )
        try:
            data = side_by_side(failure.root / failure.query, failure.root / failure.nearest)
        except UserError:
            rows: list[list[str | float | None]] = [
                [f.query, f.class_name, f.nearest_class, f.missed] for f in found[:WORST]
            ]
            note = f"The photographs are not at {failure.root} any more, so files are named only."
            header = ["query", "class", "taken for", "runs that missed it"]
            return [Note(note), Table(header, rows)]
        alt = f"A {failure.class_name} query, left, and the {failure.nearest_class} found, right."
        pictures.append(Picture(data, alt, text))
    about = (
        f"{len(found)} queries were missed by at least one run. The surest of those that most runs "
        "missed: left the query, right the image that was found for it."
    )
    return [Text(about), Pictures(*pictures, width=260)]


def side_by_side(first: Path, second: Path) -> bytes:
    """Two photographs as one JPEG.

    Raises:
        UserError: one cannot be read.
    """
    buffer = io.BytesIO()
    draw_sheet([[Group("", (Tile(first), Tile(second)))]]).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def explanations(setting: Setting) -> list[Block]:
    """RUN/explanations/: how well the heat maps say what the model looks at, and pictures."""
    blocks: list[Block] = []
    for about, run, _ in setting.pictured("explanations/faithfulness.json"):
        content = read_json(run.folder.path / "explanations" / "faithfulness.json", Faithfulness)
        blocks += _faithfulness(about, content)
    for about, run, files in setting.pictured("explanations/**/*.png"):
        for file in files[:EXPLANATIONS]:
            text = f"{about}: {_words(file.stem)}."
            blocks.append(Picture(file, f"Explanation, {text}", text))
        if len(files) > EXPLANATIONS:
            more = f"{len(files) - EXPLANATIONS} more are in"
            blocks.append(Text(f"{more} `{run.folder.path / 'explanations'}`."))
    return blocks or [missing("No run has been explained", "flowerray explain RUN")]


def _faithfulness(about: str, content: dict) -> list[Block]:
    """Scores of the chosen map and its rivals, and what its sanity checks said."""
    scores = content["scores"]
    metrics = [m for m in HEADINGS if all(m in row for row in scores.values())]
    rows = [
        ["chosen map" if name == "chosen" else name, *(words(row[m]) for m in metrics)]
        for name, row in scores.items()
    ]
    chosen = content["chosen"]
    where = " at ".join(filter(None, (chosen["method"], chosen["layer"])))
    on = f", chosen on {chosen['images']} {chosen['on']} images" if chosen["on"] else ""
    images = f"{content['images']} {content['split']} images"
    tested = scores["chosen"].get("deletion", {}).get("n", content["images"])
    if tested < content["images"]:
        images += f" (deletion, insertion and ROAD on {tested} of them)"
    caption = f"{about}: {where}{on}, on {images}; 95 % CI."
    blocks: list[Block] = [Table(["", *(HEADINGS[m] for m in metrics)], rows, caption)]
    checks = content["sanity"]["chosen"]
    failed = [f"{_words(name)} ({c['rule']})" for name, c in checks.items() if not c["passed"]]
    if failed:
        text = f"{about}: the map fails the sanity checks {', '.join(failed)}."
        return [Note(text, "warn"), *blocks]
    return [*blocks, Text(f"The map passes its sanity checks: {', '.join(map(_words, checks))}.")]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
