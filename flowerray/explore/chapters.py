"""The page of an exploration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowerray.explore import counts
from flowerray.explore.duplicates import MIN_SCORE, DuplicatePair
from flowerray.explore.exploration import Exploration
from flowerray.explore.results import SHEET_PAIRS
from flowerray.show.charts import svg
from flowerray.show.page import Block, Details, Note, Page, Picture, Table, Text
from flowerray.text import counted

LISTED = 200
"""Rows of a long list that the page shows; the CSV files hold all."""


def build_page(
    found: Exploration, facts: dict[str, Any], charts: Mapping[str, Any], out: Path
) -> Page:
    """The page, from the facts of explore.json and the pictures in `out`."""
    images, classes = facts["images"], facts["imbalance"]["classes"]
    page = Page(
        f"Data set {found.survey.dataset.root.name}",
        f"{images:,} images, {classes} {'class' if classes == 1 else 'classes'}, protocol "
        f"{facts['protocol']}; embeddings by {found.model}",
    )
    page.section("In short", *_short(facts))
    page.section("Files", *_files(facts))
    page.section("Classes", *_classes(facts, charts))
    page.section("Splits", *_splits(facts))
    page.section("Sizes", *_sizes(facts, charts))
    page.section("Light and colour", *_light(found, facts, charts))
    page.section("Variation within classes", *_variation(found, out))
    page.section("Look-alike classes", *_look_alikes(found, out))
    page.section("Maps", *_maps(found, facts, out))
    page.section("Near-duplicates", *_duplicates(found, facts, out))
    return page


def _short(facts: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if facts["note"]:
        blocks.append(Note(facts["note"]))
    leaks = facts["duplicates"]["across_splits"]
    if leaks:
        blocks.append(
            Note(
                f"Near-duplicates across splits: {counted(leaks, 'pair')}. A score on these images "
                "is partly memory; see Near-duplicates.",
                "warn",
            )
        )
    shared = sum(row["files"] + row["contents"] for row in facts["overlaps"])
    if shared:
        blocks.append(Note(f"In two splits: {counted(shared, 'file')}; see Splits.", "warn"))
    imbalance, duplicates = facts["imbalance"], facts["duplicates"]
    rows: list[list[str | float | None]] = [
        ["images", facts["images"]],
        ["unreadable files", len(facts["unreadable"])],
        ["other problems", len(facts["problems"]) - len(facts["unreadable"])],
        ["classes", imbalance["classes"]],
        ["largest / smallest class", f"{imbalance['ratio']:.1f}"],
        ["near-duplicate pairs", duplicates["pairs"]],
        ["... across splits", duplicates["across_splits"]],
        ["... with different labels", duplicates["across_classes"]],
    ]
    blocks.append(Table(["", "count"], rows))
    return blocks


def _files(facts: dict[str, Any]) -> list[Block]:
    if not facts["problems"]:
        return [Text("Every file was read; nothing is wrong with files, labels or split lists.")]
    rows = [[problem] for problem in facts["problems"][:LISTED]]
    return [
        Text(
            f"{counted(len(facts['problems']), 'problem')} found. Unreadable files are left out of "
            "everything below." + _cut(len(facts["problems"]))
        ),
        Table(["problem"], rows),
    ]


def _classes(facts: dict[str, Any], charts: Mapping[str, Any]) -> list[Block]:
    i = facts["imbalance"]
    return [
        Text(
            f"{i['smallest']:,} to {i['largest']:,} images a class: ratio {i['ratio']:.2f}, Gini "
            f"coefficient {i['gini']:.3f} (0 = balanced). The classes are as uncertain as "
            f"{i['effective_classes']:.1f} equally large ones would be."
        ),
        Picture(svg(charts["classes"]), "Bars: images of each class, the largest first"),
    ]


def _splits(facts: dict[str, Any]) -> list[Block]:
    header = ["split", "images", "classes", "smallest class", "largest class"]
    keys = ("name", "images", "classes", "smallest", "largest")
    blocks: list[Block] = [Table(header, [[row[k] for k in keys] for row in facts["splits"]])]
    if facts["overlaps"]:
        rows = [
            [f"{o['first']} and {o['second']}", o["files"], o["contents"], o["classes"]]
            for o in facts["overlaps"]
        ]
        header = ["splits", "files in both", "files with equal bytes", "classes in both"]
        caption = "Files in both and equal bytes must be 0; disjoint splits share no class."
        blocks.append(Table(header, rows, caption))
    return blocks


def _sizes(facts: dict[str, Any], charts: Mapping[str, Any]) -> list[Block]:
    sizes = facts["sizes"]
    rows = [
        [name, *(f"{v:.2f}" if name == "aspect" else f"{v:,.0f}" for v in sizes[name])]
        for name in ("width", "height", "shorter side", "aspect")
    ]
    header = ["pixels (aspect: width / height)", "least", "5 %", "median", "95 %", "most"]
    frequent = ", ".join(f"{size} ({count:,})" for size, count in sizes["most_frequent"])
    return [
        Table(header, rows, f"Most frequent: {frequent}."),
        Picture(svg(charts["sizes"]), "Widths against heights, and a histogram of aspect ratios"),
    ]


def _light(found: Exploration, facts: dict[str, Any], charts: Mapping[str, Any]) -> list[Block]:
    rows = [[name, v["mean"], v["between_classes"]] for name, v in facts["light"].items()]
    classes: list[list[str | float | None]] = [
        [r.name, r.images, r.brightness, r.contrast, r.saturation, f"{r.hue:.0f}"]
        for r in counts.class_table(found.survey)
    ]
    header = ["class", "images", "brightness", "contrast", "saturation", "hue (degrees)"]
    return [
        Text(
            "Brightness is the mean luma, contrast its standard deviation, saturation that of HSV, "
            "hue the most frequent one weighted by colour strength; all measured on the whole "
            "image, background included."
        ),
        Table(
            ["", "mean", "share between classes"],
            rows,
            "Share of the variance that lies between classes: near 0, the value says nothing about "
            "the class; a high share of brightness or contrast is a shortcut that a model can "
            "take.",
        ),
        Picture(
            svg(charts["colours"]),
            "Each class as a dot: brightness and contrast; hue and saturation",
            "One dot a class, in the mean colour of its images' middle; outlying ones are named.",
        ),
        Details(f"All {len(classes)} classes", Table(header, classes)),
    ]


def _variation(found: Exploration, out: Path) -> list[Block]:
    if not found.variations:
        return [Text("No class has two images.")]
    return [
        Text(
            "The typical images of a class lie closest to the mean of its others, by embedding; "
            "the least typical ones are the first place to look for wrong labels. Shown are the "
            "most varied classes, then the most uniform ones."
        ),
        Picture(out / "variation.png", "Typical and odd images of some classes"),
    ]


def _look_alikes(found: Exploration, out: Path) -> list[Block]:
    if not found.look_alikes:
        return [Text("There is one class, so none can look like another.")]
    return [
        Text(
            "Pairs of classes by how many of their images have their nearest neighbour in the "
            "other one, then by mean cosine; found from the embeddings alone. Each row shows the "
            "images of both classes that come closest to the other class."
        ),
        Picture(
            out / "look_alikes.png", "Images of classes that look alike, a pair of classes a row"
        ),
    ]


def _maps(found: Exploration, facts: dict[str, Any], out: Path) -> list[Block]:
    if not found.maps:
        return [Text("Too few different images for a map.")]
    shares = ", ".join(
        f"{share:.0%} by {name}"
        for name, share in facts["nearest_agrees"].items()
        if share is not None
    )
    blocks: list[Block] = [
        Text(
            f"{len(found.map_images):,} of {facts['images']:,} images. The nearest other image is "
            f"of the same class for {shares}. In t-SNE only neighbourhoods mean something, not "
            "distances between groups nor their sizes."
        ),
        Picture(
            out / "maps.png",
            "PCA and t-SNE of pixels and of embeddings",
            "Coloured: the classes of the first look-alike pairs; grey: all others.",
        ),
    ]
    if (out / "map_pictures.png").exists():
        caption = "t-SNE of the embeddings, with the images at their places."
        blocks.append(Picture(out / "map_pictures.png", "A map made of the images", caption))
    return blocks


def _duplicates(found: Exploration, facts: dict[str, Any], out: Path) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "The same photograph twice: recompressed, resized, stretched, in other light, "
            "watermarked, mirrored, turned, cropped or framed. Candidates share local features; a "
            "candidate counts where its structure, once aligned, correlates with at least "
            f"{MIN_SCORE}."
        )
    ]
    if not found.duplicates:
        return [*blocks, Text("None found.")]
    shown, leaks = found.leaks_first(), facts["duplicates"]["across_splits"]
    header = ["first", "second", "splits", "classes", "score", "change"]
    table = Table(header, [_pair_row(found, p) for p in shown[:LISTED]])
    pairs = counted(len(shown), "pair")
    blocks += [
        Text(f"{pairs}, {leaks:,} across splits." + _recall(facts)),
        Picture(
            out / "duplicates.png",
            "Near-duplicate pairs side by side",
            f"The {min(len(shown), SHEET_PAIRS)} surest pairs, those across splits first.",
        ),
        Details(f"{pairs} as a table" + _cut(len(shown)), table),
    ]
    return blocks


def _recall(facts: dict[str, Any]) -> str:
    recall = facts["recall_at_1"]
    if recall is None:
        return ""
    every, clean, where = recall["every"], recall["clean"], recall["gallery"]
    start = (
        f" Recall@1 of the test images ({'each other' if where == 'self' else where} searched): "
        f"{every['mean']:.4f} (n = {every['n']:,})"
    )
    if clean is None:
        return f"{start}; every query has a near-duplicate in the gallery."
    return (
        f"{start}; without the {recall['removed']:,} that have a near-duplicate in the gallery "
        f"{clean['mean']:.4f} (n = {clean['n']:,})."
    )


def _pair_row(found: Exploration, pair: DuplicatePair) -> list[str | float | None]:
    survey, dataset = found.survey, found.survey.dataset
    split_N, labels_N = survey.split_names(), dataset.labels_N
    one, two = (dataset.classes[labels_N[i]] for i in (pair.first, pair.second))
    return [
        survey.name(pair.first),
        survey.name(pair.second),
        f"{split_N[pair.first]}, {split_N[pair.second]}",
        one if one == two else f"{one} and {two}",
        pair.score,
        pair.change(),
    ]


def _cut(number: int) -> str:
    return f" The first {LISTED} are shown; the files hold all." if number > LISTED else ""
