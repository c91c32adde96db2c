"""Tables and pictures of an exploration whose content is known."""

import csv
from pathlib import Path

import numpy as np
import pytest

from flowerray.data.folder import read_folder
from flowerray.explore.exploration import Exploration, explore
from flowerray.explore.maps import Map, MapConfig
from flowerray.explore.pictures import class_bars, map_panels
from flowerray.explore.results import highlighted, write_pictures, write_tables
from flowerray.explore.scan import take_survey
from flowerray.show.style import save
from tests.data.pictures import class_folders
from tests.explore.test_scan import flat


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Exploration:
    """Three classes of 5 with one file twice, in train and in test."""
    root = class_folders(tmp_path_factory.mktemp("results") / "set", {"a, b": 5, "c": 5, "d": 5})
    dataset = read_folder(root, 2, 1)
    train, test = dataset.splits["train"][0], dataset.splits["test"][0]
    dataset.paths[test].write_bytes(dataset.paths[train].read_bytes())
    survey = take_survey(dataset, 8, flat, progress=False)
    return explore(survey, ["a fault"], "a model", MapConfig())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables(found: Exploration, tmp_path: Path) -> None:
    write_tables(found, tmp_path)
    images = rows(tmp_path / "images.csv")
    assert len(images) == 15 and {row["class"] for row in images} == {"a, b", "c", "d"}
    assert sum(row["split"] == "train" for row in images) == 6
    assert images[0]["image"] == "a, b/000.jpg" and images[0]["width"] == "16"
    assert [row["images"] for row in rows(tmp_path / "classes.csv")] == ["5", "5", "5"]
    first, *_ = rows(tmp_path / "duplicates.csv")
    assert {first["first_split"], first["second_split"]} == {"train", "test"}
    assert (first["score"], first["change"], first["mirrored"]) == ("1.0", "same framing", "0")


def test_facts(found: Exploration) -> None:
    facts = found.facts()
    across = facts["duplicates"]["across_splits"]
    assert 1 <= across <= facts["duplicates"]["pairs"]
    (train_test,) = (o for o in facts["overlaps"] if (o["first"], o["second"]) == ("train", "test"))
    assert (train_test["files"], train_test["contents"]) == (0, 1)
    recall = facts["recall_at_1"]
    assert recall["every"]["n"] == 6 and recall["clean"]["n"] == 6 - recall["removed"] < 6
    assert facts["problems"] == ["a fault"] and facts["unreadable"] == []


def test_pictures(found: Exploration, tmp_path: Path) -> None:
    charts = write_pictures(found, tmp_path)
    assert set(charts) == {"classes", "sizes", "colours"}
    written = {path.stem for path in tmp_path.glob("*.png")}
    assert written == {*charts, "maps", "map_pictures", "look_alikes", "variation", "duplicates"}
    bars = charts["classes"].axes[0].patches
    heights = [bar.get_height() for bar in bars]
    assert heights == sorted(heights, reverse=True) and sum(heights) == len(found.survey.size_N2)
    sizes, ratios = charts["sizes"].axes
    shown = {tuple(place) for place in sizes.collections[0].get_offsets().data.tolist()}
    assert shown == {tuple(size) for size in found.survey.size_N2.tolist()}
    assert sum(bar.get_height() for bar in ratios.patches) == len(found.survey.size_N2)
    dots = charts["colours"].axes[0].collections[0].get_offsets()
    assert len(dots) == len(found.survey.dataset.classes)
    assert sorted(highlighted(found)) == [0, 1, 2]


def test_names_that_a_plot_would_read_as_mathematics_or_hide(tmp_path: Path) -> None:
    names = ["a$b_c_d$", "_hidden", "plain"]
    save(class_bars(dict.fromkeys(names, 3)), tmp_path / "a.png")
    points = np.random.default_rng(0).random((30, 2))
    maps = {"pixels": Map(points, (0.5, 0.2), points)}
    figure = map_panels(maps, np.arange(30) % 3, names, [0, 1, 2])
    save(figure, tmp_path / "b.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
