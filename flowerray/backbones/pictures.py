"""Backbones as a table of 80 columns and as a picture of accuracy against cost."""

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowerray.show.columns import columns
from flowerray.show.interval import MISSING, words
from flowerray.show.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    legend_below,
    panels,
    plain_axes,
    save,
    short,
)

NAME = 28
"""Columns of a model's name."""
_PANELS = (
    ("latency_ms", 1.0, "front_latency", "ms for one image alone"),
    ("params", 1e-6, "front_params", "million parameters"),
)


def backbones_table(content: dict[str, Any]) -> str:
    """What was measured, who was skipped and why, and which model to take."""
    c = content
    rows = c["models"]
    cost = [["model", "M par", "GFLOP", "ms", "infer img/s", "train img/s"]]
    found = [["", "model", "weights", "R@1, 95 % CI", "MAP@R", "linear", "IN-1k"]]
    for row in rows:
        name = short(row["model"], NAME)
        speeds = (
            f"{row[f'{kind}_img_s']:,.0f} x{row[f'{kind}_ratio']:.2f}"
            for kind in ("inference", "training")
        )
        cost.append(
            [
                name, f"{row['params'] / 1e6:.1f}", f"{row['flops'] / 1e9:.2f}",
                f"{row['latency_ms']:.1f}", *speeds,
            ]
        )  # fmt: skip
        found.append(
            [
                "*" if row["front_latency"] or row["front_params"] else "",
                name,
                "RANDOM" if row["weights"] == "random" else row["weights"],
                words(row["recall_at_1"]),
                f"{row['map_at_r']['mean']:.3f}",
                MISSING if row["linear"] is None else f"{row['linear']['mean']:.3f}",
                words(row["imagenet_top1"], ".1f"),
            ]
        )
    lines = [
        f"Cost at {c['image_size']} px, {c['precision']}, threads {c['threads']}",
        f"on {c['device']}",
        *columns(cost, "<>>>>>", indent=2),
        _wrap(
            "  ",
            f"ms: one image alone; img/s: batches of {c['batch_size']}; x: share of the fastest's "
            f"speed here. Medians of {c['rounds']} interleaved rounds, which differed by up to "
            f"{_spread(rows):.0%} (infer img/s).",
        ),
        "",
        f"Frozen features: {rows[0]['queries']:,} {c['split']} queries, gallery {c['gallery']}",
        *columns(found, "<<<<>>>", gap=1),
        "  * on the Pareto front of R@1 against ms or parameters (trained weights only)",
        f"  linear: logistic regression on train, C = {c['linear_c']:g}; IN-1k: published",
    ]
    if c["random_weights"]:
        lines.append(
            f"  RANDOM weights ({c['random_weights']} of {len(rows)} models): their accuracy says "
            "nothing of trained ones."
        )
    lines += ["", *_skipped(c["skipped"])]
    chosen = c["recommended"]
    lines.append(_wrap("recommended ", f"{chosen['model'] or 'none'}. {chosen['why']}"))
    return "\n".join(lines)


def plot_backbones(content: dict[str, Any], out_png: Path) -> Path:
    """R@1 with its interval against latency and against size, the fronts as lines, random weights
    hollow and named so; numbers at the points stand for the names at the side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.ticker import LogLocator, NullLocator

    rows = content["models"]
    height = max(5.2, 1.4 + 0.19 * len(rows))
    figure, ((*pair, side),) = panels(13, height, 1, 3, width_ratios=(4, 4, 2.4))
    canvas = FigureCanvasAgg(figure)
    pair[1].sharey(pair[0])
    side.set_axis_off()
    names = [
        f"{number:>2}  {row['model']}" + (" (random)" if row["weights"] == "random" else "")
        for number, row in enumerate(rows, start=1)
    ]
    side.text(0, 1, "\n".join(names), fontsize=9, color=INK, va="top", linespacing=1.5)
    for axes, (cost, scale, front, label) in zip(pair, _PANELS, strict=True):
        plain_axes(axes, "", label, "R@1 of frozen features" if axes is pair[0] else "")
        axes.set_xscale("log")
        for row in rows:
            random = row["weights"] == "random"
            colour = GREY if random else ORANGE if row[front] else BLUE
            found, x = row["recall_at_1"], row[cost] * scale
            if found["low"] is not None:
                axes.plot([x, x], [found["low"], found["high"]], color=colour, linewidth=1,
                          alpha=0.5, zorder=1)  # fmt: skip
            axes.plot(
                x, found["mean"], "s" if random else "D" if row[front] else "o", markersize=6,
                color=colour, markerfacecolor="white" if random else colour, zorder=3,
            )  # fmt: skip
        best = sorted((r[cost] * scale, r["recall_at_1"]["mean"]) for r in rows if r[front])
        if len(best) > 1:
            axes.step(*zip(*best, strict=True), where="post", color=ORANGE, zorder=2)
        xs = [row[cost] * scale for row in rows]
        axes.set_xlim(min(xs) / 1.5, max(xs) * 1.7)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    keys = [("D", ORANGE, ORANGE, "Pareto front"), ("o", BLUE, BLUE, "trained weights"),
            ("s", GREY, "white", "RANDOM weights: says nothing of trained ones")]  # fmt: skip
    for marker, edge, face, text in keys:
        pair[0].plot([], [], marker, color=edge, markerfacecolor=face, label=text)
    legend_below(figure, 3)
    figure.suptitle(
        f"Backbones at {content['image_size']} px, {content['split']} queries; {content['device']},"
        f" threads {content['threads']}", fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    for axes, (cost, scale, _, _) in zip(pair, _PANELS, strict=True):
        points = [(row[cost] * scale, row["recall_at_1"]["mean"]) for row in rows]
        numbers = [str(number) for number in range(1, len(rows) + 1)]
        place_labels(canvas, axes, points, numbers)
    return save(figure, out_png)


def place_labels(
    canvas: Any, axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str]
) -> list[Any]:
    """Names points so that no name lies on another name or on a point: of places around the point,
    ever further out, the first that is free; a thin line leads to far ones.

    Args:
        canvas: the figure's, which is laid out here.

    Returns:
        The annotations.
    """
    from matplotlib.transforms import Bbox

    canvas.draw()
    axes.figure.set_layout_engine("none")  # a label must not move the axes again
    frame = axes.get_window_extent()
    size = axes.figure.dpi / 72
    spots = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    made = []
    for (x, y), point, text in sorted(
        zip(spots.tolist(), points, texts, strict=True), key=lambda item: item[0][1]
    ):
        label = axes.annotate(
            text, point, (0, 0), textcoords="offset points", fontsize=8, color=INK, va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 3},
        )  # fmt: skip
        extent = label.get_window_extent(canvas.get_renderer())
        width, height = extent.width, extent.height
        fallback = (6.0, -8.0)
        for dx, dy in _offsets():
            left = x + dx * size - (0 if dx > 0 else width)
            middle = y + dy * size
            box = Bbox.from_extents(left, middle - height / 2, left + width, middle + height / 2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                fallback = (dx, dy)
                taken.append(box)
                break
        dx, dy = fallback
        label.set_position((dx, dy))
        label.set_horizontalalignment("left" if dx > 0 else "right")
        if abs(dx) < 10 and abs(dy) < 14:
            label.arrow_patch.set_visible(False)
        made.append(label)
    return made


def _offsets() -> list[tuple[float, float]]:
    """Places of a label in points, the nearest first: above left and below right, where no front
    passes, come before the others.
    """
    near = [(-6.0, 8.0), (6.0, -8.0), (6.0, 8.0), (-6.0, -8.0)]
    far = [
        (side * across, up * rise)
        for rise in range(12, 200, 6)
        for across in (7, 24)
        for up in (1, -1)
        for side in (1, -1)
    ]
    return near + [(float(dx), float(dy)) for dx, dy in far]


def _spread(rows: Sequence[dict[str, Any]]) -> float:
    """The widest range of a model's rounds, as a share of its median."""
    ranges = []
    for row in rows:
        seen = [visit["inference_img_s"] for visit in row["rounds"]]
        ranges.append((max(seen) - min(seen)) / row["inference_img_s"])
    return max(ranges)


def _skipped(skipped: Sequence[dict[str, str]]) -> list[str]:
    """Models with the same reason in one paragraph."""
    if not skipped:
        return []
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in skipped:
        reason = row["why"].partition(": ")[0].rstrip(".")
        reasons[reason.replace(row["model"], "the model")].append(row["model"])
    lines = [f"skipped {len(skipped)}"]
    lines += [_wrap("  ", f"{', '.join(names)}: {why}.") for why, names in reasons.items()]
    lines.append("  (--files takes weight files; --random-weights measures them all the same)")
    return [*lines, ""]


def _wrap(head: str, text: str) -> str:
    return textwrap.fill(
        head + text, 80, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
