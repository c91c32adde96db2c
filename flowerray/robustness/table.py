"""What `flowerray attack` prints: one record of robustness.json as text of at most 80 columns."""

import textwrap
from typing import Any

from flowerray.show.interval import MISSING, read_score, words
from flowerray.text import WIDTH

_NAME = 12
_RADII = 11
"""Columns of numbers that fit beside each other."""


def attack_table(content: dict[str, Any]) -> str:
    """The curve of the worst case, each attack, the model beside it and the audit.

    Args:
        content: see `record.record`.
    """
    lines = [
        f"{content['run']}"[-WIDTH:],
        *textwrap.wrap(f"threat     {content['threat_model']}", WIDTH, subsequent_indent=" " * 11),
        "",
        *_table(content),
    ]
    other = content["beside"]
    if other is not None:
        lines += ["", f"beside it  {other['run']}"[:WIDTH], *_table(other)]
    elif content["hardening"] != "none":
        lines += ["", "No standard model beside it: give one with --beside RUN."]
    else:
        lines.append("")
    if content["audit"] is not None:
        lines += ["", *_audit(content["audit"])]
    else:
        lines += ["Not audited: --audit checks whether these figures can be believed."]
    return "\n".join(lines)


def _table(content: dict[str, Any]) -> list[str]:
    radii, clean = list(content["worst_case"]), content["clean"]
    lines: list[str] = []
    for start in range(0, len(radii), _RADII):
        lines += [*[""] * bool(start), *_columns(content, radii[start : start + _RADII])]
    expected, found = content["expected_robustness"], content["collapse"]
    lines += [
        f"clean R@1 {clean['recall_at_1']:.3f}, expected robustness (mean of the curve) "
        f"{words(read_score(expected))}",
        f"mean cosine {found['mean_cosine']:.3f}, effective rank {found['effective_rank']:.1f}",
    ]
    if content.get("ers") is not None:
        lines += ["", *_ers(content)]
    return [*lines, *_shout(content)]


def _columns(content: dict[str, Any], radii: list[str]) -> list[str]:
    worst = content["worst_case"]
    lines, shown = [_row("eps (/255)", radii)], {}
    if content["perturb"] != "gallery":
        how = "under each attack alone"
        if content["rows"] == "cumulative":
            how = "left after each attack and those above it"
        shown[f"R@1 {how}:"] = "recall_at_1"
    attacks = content["attacks"]
    if any("pair_accuracy" in score for scores in attacks.values() for score in scores.values()):
        shown["pair accuracy under each attack alone:"] = "pair_accuracy"
    for title, field in shown.items():
        lines.append(title)
        lines += [_row(f"  {n}", _cells(scores, radii, field)) for n, scores in attacks.items()]
    lines.append("worst case of all attacks:")
    lines.append(_row("  R@1", _cells(worst, radii, "recall_at_1")))
    scores = [read_score(worst[eps]) for eps in radii]
    for side, label in (("low", "  95 % from"), ("high", "  to")):
        lines.append(_row(label, [words(score and getattr(score, side)) for score in scores]))
    further = {"MAP@R": "map_at_r", "retention": "retention"}
    if any("pair_accuracy" in worst[eps] for eps in radii):
        further |= {"pair acc.": "pair_accuracy", "pair AUC": "pair_auc"}
    lines += [_row(f"  {label}", _cells(worst, radii, name)) for label, name in further.items()]
    return lines


def _ers(content: dict[str, Any]) -> list[str]:
    ers = content["ers"]
    terms = ", ".join(f"{name} {value:.1f}" for name, value in ers["terms"].items())
    text = (
        f"ERS {ers['ers']:.1f} beside a clean R@1 of {100 * content['clean']['recall_at_1']:.1f} % "
        f"({ers['num_queries']} queries, {ers['eps']:g}/255, {ers['steps']} steps): {terms}"
    )
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ")


def _shout(content: dict[str, Any]) -> list[str]:
    """What must not be overlooked beside the figures."""
    lines = []
    if content["collapse"]["collapsed"]:
        lines.append("COLLAPSED: this embedding tells images hardly apart; it is not robust.")
    audit = content.get("audit")
    if audit is not None and audit["failed"]:
        text = f"AUDIT FAILED, do not believe these figures: {', '.join(audit['failed'])}."
        lines += textwrap.wrap(text, WIDTH)
    return lines


def _audit(audit: dict[str, Any]) -> list[str]:
    verdict = "passed" if audit["passed"] else "FAILED"
    lines = [f"audit {verdict} ({audit['queries']} queries, mostly at {audit['eps']:g}/255)"]
    for check in audit["checks"]:
        mark = {True: "pass", False: "FAIL", None: MISSING}[check["passed"]]
        wrapped = textwrap.wrap(
            f"  {mark:<5}{check['name']}: {check['text']}", WIDTH, subsequent_indent=" " * 9
        )
        lines += wrapped
    return lines


def _row(name: str, cells: list[str]) -> str:
    width = min(8, (WIDTH - _NAME) // max(len(cells), 1))
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _cells(scores: dict[str, Any], radii: list[str], field: str) -> list[str]:
    return [words(scores.get(eps, {}).get(field)) for eps in radii]
