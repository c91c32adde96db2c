"""What `flowerray explain` prints, in 80 columns."""

from collections.abc import Mapping
from typing import Any

from flowerray.explain.cam import Explainer
from flowerray.retrieval.table import similar
from flowerray.show.columns import columns
from flowerray.show.interval import words
from flowerray.show.style import short
from flowerray.text import labelled

_BLOCKS = (("energy", "pointing", "iou"), ("deletion", "insertion", "road_morf"))
HEADINGS = {
    "energy": "energy in mask",
    "pointing": "pointing game",
    "iou": "IoU",
    "deletion": "deletion (lower)",
    "insertion": "insertion",
    "road_morf": "ROAD MoRF drop",
}


def pair(result: dict[str, Any]) -> str:
    """Two photographs: the verdict, what carries it, and where the picture is."""
    lines = [similar(result), f"map       {result['method']}"]
    for number, match in enumerate(result["matches"], 1):
        first, second = (
            f"row {m[0] + 1} column {m[1] + 1}" for m in (match["first"], match["second"])
        )
        lines.append(f"match {number}   {first}  with  {second}: {match['share']:+.3f}")
    for concept in result["concepts"]:
        first, second = (f"{share:.0%}" for share in concept["shares"])
        lines.append(
            f"{concept['name']:<10}  {first} and {second} of the images; without it "
            f"{-concept['drop']:+.3f}"
        )
    lines += [labelled("note", note) for note in result["notes"]]
    lines.append(f"picture   {result['picture']}")
    return "\n".join(lines)


def split(result: Mapping[str, Any]) -> str:
    """Scores of the chosen map and of what it has to beat, differences, checks."""
    lines = _model(result)
    if "beside" in result:
        other = result["beside"]
        lines += ["", *_model(other)]
        if other["gain_over_run"]:
            lines += ["", f"{other['run']} better than {result['run']} by"]
            lines += _table({"chosen map": other["gain_over_run"]}, signed=True)
    return "\n".join(lines)


def concepts(result: Mapping[str, Any]) -> str:
    """TCAV scores of named concepts."""
    whose = f" of {result['class']}" if result["class"] else ""
    head = f"{result['images']} {result['split']} images{whose}, layer {result['layer']}"
    table = [["concept", "score", "random", "accuracy", "p (Holm)", ""]]
    for found in result["concepts"]:
        numbers = (f"{found[name]:.2f}" for name in ("score", "random", "accuracy"))
        mark = "depends on it" if found["significant"] else ""
        table.append([short(found["name"]), *numbers, f"{found['p_value']:.2g}", mark])
    return "\n".join([head, *columns(table, "<>>>><", indent=1)])


def _model(result: Mapping[str, Any]) -> list[str]:
    chosen = result["chosen"]
    lines = [
        str(result["run"]),
        f"{result['images']} {result['split']} images, each against its class's prototype",
        f"map       {Explainer(chosen['method'], chosen['layer'], chosen['norm'])}",
    ]
    if chosen["on"]:
        lines.append(
            f"chosen    of {chosen['candidates']} maps on {chosen['images']} other "
            f"{chosen['on']} images, then judged once"
        )
    scores = {"chosen map" if k == "chosen" else k: v for k, v in result["scores"].items()}
    lines += ["", "mean and 95 % interval", *_table(scores)]
    tested = scores["chosen map"]["deletion"].get("n", result["images"])
    if tested < result["images"]:
        lines.append(f" (deletion, insertion and ROAD on {tested} of the images)")
    lines += ["", "chosen map better by (above 0 is better)"]
    lines += _table(result["gain_over"], signed=True)
    checks = [["sanity check", "chosen map", "edges", "passes"]]
    for check, found in result["sanity"]["chosen"].items():
        edge = result["sanity"]["edges"].get(check)
        cells = [_check(found), "" if edge is None else _check(edge)]
        checks.append([f"  {check}", *cells, found["rule"]])
    return [*lines, "", *columns(checks, "<>><", gap=3)]


def _table(rows: Mapping[str, Mapping[str, Any]], signed: bool = False) -> list[str]:
    lines: list[str] = []
    for block in _BLOCKS:
        metrics = [m for m in block if all(m in row for row in rows.values())]
        if metrics:
            spec = "+.2f" if signed else ".2f"
            table = [["", *(HEADINGS[m] for m in metrics)]]
            table += [[n, *(words(row[m], spec) for m in metrics)] for n, row in rows.items()]
            lines += columns(table, "<" * len(table[0]), indent=1, gap=1)
    return lines


def _check(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.2g} {'passed' if found['passed'] else 'FAILED'}"
