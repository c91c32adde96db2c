"""What `flowerray explain` prints, in 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowerray.text import labelled

_BLOCKS = (("energy", "pointing", "iou"), ("deletion", "insertion", "road_morf"))
_HEADS = {
    "energy": "energy in mask",
    "pointing": "pointing game",
    "iou": "IoU",
    "deletion": "deletion (lower)",
    "insertion": "insertion",
    "road_morf": "ROAD MoRF drop",
}


def pair(result: Mapping[str, Any]) -> str:
    """Two photographs: the verdict, what carries it, and where the picture is."""
    verdict = "same class" if result["same"] else "different classes"
    lines = [
        f"similarity {result['similarity']:.3f}, threshold {result['threshold']:.3f}: {verdict}"
    ]
    lines.append(f"map       {result['method']}")
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
    lines = [
        f"{result['images']} {result['split']} images{whose}, layer {result['layer']}",
        f" {'concept':<24}{'score':>7}{'random':>8}{'accuracy':>10}{'p (Holm)':>10}",
    ]
    for found in result["concepts"]:
        mark = "depends on it" if found["significant"] else ""
        lines.append(
            f" {found['name'][:23]:<24}{found['score']:7.2f}{found['random']:8.2f}"
            f"{found['accuracy']:10.2f}{found['p_value']:10.2g}  {mark}".rstrip()
        )
    return "\n".join(lines)


def _model(result: Mapping[str, Any]) -> list[str]:
    chosen = result["chosen"]
    name = " at ".join(filter(None, (chosen["method"], chosen["layer"])))
    name += ", length held" if chosen["norm"] == "held" else ""
    lines = [
        str(result["run"]),
        f"{result['images']} {result['split']} images, each against its class's prototype",
        f"map       {name}",
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
    lines += ["", f"{'sanity check':<16}{'chosen map':>16}{'edges':>18}   passes"]
    for check, found in result["sanity"]["chosen"].items():
        edge = result["sanity"]["edges"].get(check)
        cells = [_check(found), "" if edge is None else _check(edge)]
        lines.append(f"  {check:<14}{cells[0]:>16}{cells[1]:>18}   {found['rule']}".rstrip())
    return lines


def _table(rows: Mapping[str, Mapping[str, Any]], signed: bool = False) -> list[str]:
    lines: list[str] = []
    sign = "+" if signed else ""
    for block in _BLOCKS:
        metrics: Sequence[str] = [m for m in block if all(m in row for row in rows.values())]
        if not metrics:
            continue
        lines.append(f" {'':<16}" + "".join(f"{_HEADS[m]:<21}" for m in metrics).rstrip())
        for name, row in rows.items():
            cells = "".join(_interval(row[m], sign).ljust(21) for m in metrics)
            lines.append(f" {name:<16}{cells}".rstrip())
    return lines


def _interval(found: Mapping[str, Any], sign: str) -> str:
    if found["low"] is None:  # of a single image
        return f"{found['mean']:{sign}.2f}"
    return f"{found['mean']:{sign}.2f} [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]"


def _check(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.2g} {'passed' if found['passed'] else 'FAILED'}"
