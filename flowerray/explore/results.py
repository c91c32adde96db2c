"""The files of an exploration: tables as CSV, pictures as PNG."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flowerray.explore import counts, pictures
from flowerray.explore.exploration import Exploration
from flowerray.files import atomic_file
from flowerray.show.contact import Group, Tile, contact_sheet
from flowerray.show.style import save
from flowerray.text import cell

SHEET_PAIRS = 24
"""Near-duplicates on the contact sheet, the surest first, leaks before others."""
SHEET_CLASSES = 6
"""Classes on the sheet of variation: half of them the most varied, half the least."""
_HIGHLIGHTED = 8


def write_tables(found: Exploration, out: Path) -> None:
    """images.csv, classes.csv, duplicates.csv."""
    survey, dataset = found.survey, found.survey.dataset
    split_N, names, labels_N = survey.split_names(), dataset.classes, dataset.labels_N
    _csv(
        out / "images.csv",
        "image class split width height brightness contrast saturation hue".split(),
        (
            [
                survey.name(i), names[labels_N[i]], split_N[i], *survey.size_N2[i].tolist(),
                *(round(float(v[i]), 4) for v in (survey.brightness_N, survey.contrast_N,
                                                  survey.saturation_N, survey.hue_N)),
            ]
            for i in range(len(labels_N))
        ),
    )  # fmt: skip
    _csv(
        out / "classes.csv",
        "class images brightness contrast saturation hue".split(),
        (
            [r.name, r.images, *(round(v, 4) for v in (r.brightness, r.contrast, r.saturation,
                                                       r.hue))]
            for r in counts.class_table(survey)
        ),
    )  # fmt: skip
    _csv(
        out / "duplicates.csv",
        "first second first_split second_split first_class second_class "
        "score change mirrored turned area".split(),
        (
            [
                survey.name(p.first), survey.name(p.second), split_N[p.first], split_N[p.second],
                names[labels_N[p.first]], names[labels_N[p.second]],
                round(p.score, 4), p.change(), int(p.mirrored), round(p.turned, 1),
                round(p.area, 3),
            ]
            for p in found.duplicates
        ),
    )  # fmt: skip


def write_pictures(found: Exploration, out: Path) -> dict[str, Any]:
    """PNG files: classes, sizes, colours, and where there is something to show maps, map_pictures,
    look_alikes, variation, duplicates.

    Returns:
        The charts as matplotlib figures by the stem of their file, for a page that draws them in
        its own colours.
    """
    survey, dataset = found.survey, found.survey.dataset
    charts = {
        "classes": pictures.class_bars(counts.counts_by_class(dataset.labels_N, dataset.classes)),
        "sizes": pictures.size_panels(survey),
        "colours": pictures.colour_panels(counts.class_table(survey)),
    }
    for name, figure in charts.items():
        save(figure, out / f"{name}.png")
    if found.maps:
        labels_M = dataset.labels_N[found.map_images]
        figure = pictures.map_panels(found.maps, labels_M, dataset.classes, highlighted(found))
        save(figure, out / "maps.png")
    if "embeddings" in found.maps:
        small = survey.colour_NSS3[found.map_images]
        image = pictures.picture_map(found.maps["embeddings"].tsne_M2, small)
        save(image, out / "map_pictures.png")
    for name, rows in (
        ("look_alikes", _look_alike_rows(found)),
        ("variation", _variation_rows(found)),
        ("duplicates", _duplicate_rows(found)),
    ):
        if rows:
            contact_sheet(rows, out / f"{name}.png", whole=True)
    return charts


def highlighted(found: Exploration) -> list[int]:
    """Labels that stand out on the maps: the classes that look most alike, else the first ones."""
    pairs = [label for pair in found.look_alikes for label in (pair.first, pair.second)]
    return list(dict.fromkeys(pairs))[:_HIGHLIGHTED]


def _look_alike_rows(found: Exploration) -> list[list[Group]]:
    names = found.survey.dataset.classes
    return [
        [
            Group(
                f"{names[a.first]}: {a.crossing:.0%} of nearest neighbours cross",
                _tiles(found, a.first_images),
            ),
            Group(f"{names[a.second]}: mean cosine {a.cosine:.2f}", _tiles(found, a.second_images)),
        ]
        for a in found.look_alikes
    ]


def _variation_rows(found: Exploration) -> list[list[Group]]:
    varied = list(found.variations)
    if len(varied) > SHEET_CLASSES:
        half = SHEET_CLASSES // 2
        varied = varied[:half] + varied[-half:]
    names = found.survey.dataset.classes
    return [
        [
            Group(
                f"{names[v.label]}, mean cosine {v.cosine:.2f}: most typical",
                _tiles(found, v.typical),
            ),
            Group("least typical", _tiles(found, v.odd)),
        ]
        for v in varied
    ]


def _duplicate_rows(found: Exploration) -> list[list[Group]]:
    groups = [
        Group(
            f"score {p.score:.2f}, {p.change()}",
            _tiles(found, (p.first, p.second), split=True),
        )
        for p in found.leaks_first()[:SHEET_PAIRS]
    ]
    return [groups[start : start + 3] for start in range(0, len(groups), 3)]


def _tiles(found: Exploration, images: Sequence[int], split: bool = False) -> tuple[Tile, ...]:
    dataset, split_N = found.survey.dataset, found.survey.split_names()
    return tuple(
        Tile(dataset.paths[i], (f"{split_N[i]} " * split + dataset.paths[i].stem,)) for i in images
    )


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(map(cell, row) for row in rows)
