"""An INDEX is whole after any kill, refuses what is not its own, and stays inside its folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from flowerray.errors import UserError
from flowerray.index import contents
from flowerray.index.contents import (
    Photograph,
    begin_beside,
    change,
    checksum,
    create,
    exchange,
    model_file,
    open_index,
)
from flowerray.retrieval import neighbours
from tests.killed import killed_at
from tests.retrieval.test_neighbours import unit

DIM = 12


def photographs(count: int, seed: int = 0, place: str = "/photos") -> list[Photograph]:
    return [
        Photograph(Path(f"{place}/{n:04}-\udce4.jpg"), bytes([seed % 256]) * 16, f"c{n % 3}", emb_D)
        for n, emb_D in enumerate(unit(count, DIM, seed))
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An INDEX of 20 photographs."""
    model = tmp_path / "model.pth"
    model.write_bytes(b"weights")
    create(tmp_path / "index", model, "runs/mine", DIM)
    change(tmp_path / "index", photographs(20))
    return tmp_path / "index"


def content(folder: Path) -> dict[Path, Any]:
    """Everything that an INDEX says of each photograph."""
    index = open_index(folder)
    return {
        index.path(row): (index.digest(row), index.label(row), index.vectors_ND[row].tolist())
        for row in range(len(index))
    }


def expected(photos: list[Photograph]) -> dict[Path, Any]:
    return {photo.path: (photo.digest, photo.label, photo.emb_D.tolist()) for photo in photos}


@pytest.mark.parametrize("exact", [neighbours.EXACT, 600])
def test_what_goes_in_comes_out(folder: Path, exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "EXACT", exact)
    first, more = photographs(20), photographs(1500, seed=1, place="/more")
    assert content(folder) == expected(first)
    index, gone = change(folder, more, lambda path: path.startswith(b"/photos/0001"))
    assert gone == 1 and (index.cells is None) == (exact > 1500)
    del first[1]
    assert content(folder) == expected(first + more)
    again = photographs(40, seed=2, place="/more")  # other photographs at known paths
    assert change(folder, again)[1] == 40
    assert content(folder) == expected(first + again + more[40:])
    parts = index.manifest["parts"]
    index, _ = change(folder, gone=lambda path: path.startswith(b"/more/"))
    assert index.cells is None and content(folder) == expected(first)
    assert not (folder / parts).exists()
    assert {entry.name for entry in folder.iterdir()} == {
        ".index.json.lock", "index.json", "model.pth", index.manifest["parts"],
    }  # fmt: skip
    index, _ = change(folder, gone=lambda path: True)
    assert len(index) == 0 and index.nearest(unit(1, DIM)[0], 3)[0].tolist() == []


def test_cells_are_kept_until_the_index_has_doubled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "EXACT", 600)
    index, _ = change(folder, photographs(1000, seed=1, place="/a"))
    before = index.centroids_CD.copy()
    index, _ = change(folder, photographs(900, seed=2, place="/b"))
    assert len(before) and np.array_equal(before, index.centroids_CD)
    assert index.manifest["partitioned"] == 1020
    assert neighbours.recall(index.vectors_ND, index.cells).mean() >= 0.98
    index, _ = change(folder, photographs(300, seed=3, place="/c"))
    assert index.manifest["partitioned"] == 2220


@pytest.mark.parametrize("exact", [neighbours.EXACT, 600])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    folder: Path, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "EXACT", exact)
    more = photographs(650, seed=1, place="/more")
    old, new = expected(photographs(20)), expected(photographs(20)[1:] + more)
    seen = []
    for event in range(1, 200):
        copy = shutil.copytree(folder, folder.with_name(f"copy-{event}"))

        def work(copy: Path = copy) -> None:
            change(copy, more, lambda path: path.startswith(b"/photos/0000"))

        killed = killed_at(event, copy, work)
        found = content(copy)
        assert found in (old, new), event
        seen.append(found == new)
        for name, known in open_index(copy).manifest["checksums"].items():
            assert checksum(copy / open_index(copy).manifest["parts"] / name) == known
        work()  # goes on, and clears away what the kill left
        assert content(copy) == new and len(open_index(copy)) == len(new)
        assert len(list(copy.iterdir())) == 4
        shutil.rmtree(copy)
        if not killed:
            break
    assert not killed and seen == sorted(seen) and 12 < len(seen) and sum(seen) > 2


def test_a_kill_while_it_is_made_leaves_none(tmp_path: Path) -> None:
    model = tmp_path / "model.pth"
    model.write_bytes(b"weights")
    for event in range(1, 100):
        out = tmp_path / f"index-{event}"
        if not killed_at(event, tmp_path, lambda: create(out, model, "m", DIM)):  # noqa: B023
            break
        if out.exists():
            assert content(out) == {}
        else:
            create(out, model, "m", DIM)
    assert event > 8 and content(out) == {}


def test_a_kill_while_another_model_takes_over_leaves_the_old_or_the_new(
    folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "other.pth"
    model.write_bytes(b"other weights")
    old, new = expected(photographs(20)), expected(photographs(20, seed=1)[1:])
    change(folder, gone=lambda path: path.startswith(b"/photos/0000"))
    del old[Path("/photos/0000-\udce4.jpg")]
    seen = []
    for event in range(1, 300, 2):
        copy = shutil.copytree(folder, tmp_path / f"copy-{event}")

        def work(copy: Path = copy) -> None:
            if (ours := begin_beside(copy, model, "other", DIM)) is not None:
                change(ours, photographs(20, seed=1))
                assert exchange(copy, ours, [])

        killed = killed_at(event, copy, work)
        found, manifest = content(copy), open_index(copy).manifest
        assert found in (old, new), event
        seen.append(found == new)
        weights = model_file(copy, manifest).read_bytes()
        assert weights == (b"other weights" if found == new else b"weights")
        work()
        assert content(copy) == new and open_index(copy).manifest["model"]["name"] == "other"
        assert sorted(entry.name for entry in copy.iterdir()) == [
            ".index.json.lock", "index.json", f"model-{checksum(model)[:8]}.pth",
            open_index(copy).manifest["parts"],
        ]  # fmt: skip
        shutil.rmtree(copy)
        if not killed:
            break
    assert not killed and seen == sorted(seen) and len(seen) > 15 and sum(seen) > 2


def test_what_is_added_meanwhile_is_not_lost(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "other.pth"
    model.write_bytes(b"other weights")
    ours = begin_beside(folder, model, "other", DIM)
    assert ours is not None
    change(ours, photographs(20, seed=1))
    change(folder, photographs(1, seed=2, place="/new"))
    before = content(folder)
    assert not exchange(folder, ours, []) and content(folder) == before
    assert exchange(folder, ours, [Path("/new/0000-\udce4.jpg")])
    assert content(folder) == expected(photographs(20, seed=1))
    assert begin_beside(folder, model, "other", DIM) is None
    (folder / "next-0badf00d").symlink_to(tmp_path)
    with pytest.raises(UserError, match="next-0badf00d is a link, which an INDEX has none of"):
        begin_beside(folder, model, "other", DIM)


def test_another_model_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(b"other weights")
    with pytest.raises(UserError, match="was built with runs/mine, another model than runs/other"):
        create(folder, other, "runs/other", DIM)
    with pytest.raises(UserError, match="exists: `flowerray index add"):
        create(folder, tmp_path / "model.pth", "runs/mine", DIM)
    manifest = open_index(folder).manifest
    assert model_file(folder, manifest).read_bytes() == b"weights"
    shutil.copy(other, folder / "model.pth")
    with pytest.raises(UserError, match=r"model.pth is not runs/mine, the model that .* with"):
        model_file(folder, manifest)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def pickled(file: Path) -> None:
    np.save(file, np.array([{}], object), allow_pickle=True)


def narrow(file: Path) -> None:
    np.save(file, np.load(file)[:-1])


@pytest.mark.parametrize("harm", [cut, zeros, pickled, narrow, Path.unlink])
@pytest.mark.parametrize("name", ["vectors", "entries", "names", "cells"])
def test_a_damaged_file_is_one_sentence(
    folder: Path, name: str, harm: Callable[[Path], NoReturn]
) -> None:
    if (harm, name) == (narrow, "cells"):
        pytest.skip("there are none")
    harm(folder / open_index(folder).manifest["parts"] / f"{name}.npy")
    with pytest.raises(UserError, match="is damaged .*: build it again.$"):
        open_index(folder)


def test_labels_and_ends_beyond_their_files_are_refused(folder: Path) -> None:
    file = folder / open_index(folder).manifest["parts"] / "entries.npy"
    good = np.load(file)
    for field, value in (("label", 3), ("end", 10**9), ("end", -5), ("cell", 1), ("cell", -1)):
        bad = good.copy()
        bad[field][3] = value
        np.save(file, bad)
        with pytest.raises(UserError, match="entries.npy does not fit"):
            open_index(folder)


def test_a_development_version_s_index_is_refused(folder: Path) -> None:
    """Its entries had no cells, and its rows another order."""
    file = folder / open_index(folder).manifest["parts"] / "entries.npy"
    np.save(file, np.load(file)[["end", "digest", "label"]])
    with pytest.raises(UserError, match="is damaged .*: build it again.$"):
        open_index(folder)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", ".", "", "parts-0000000g"])
def test_the_manifest_names_nothing_outside(folder: Path, name: str) -> None:
    file = folder / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parts": name}))
    with pytest.raises(UserError, match="is damaged"):
        open_index(folder)


@pytest.mark.parametrize("name", ["index.json", "model.pth", "PARTS", "PARTS/vectors.npy"])
def test_links_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    manifest = open_index(folder).manifest
    file = folder / name.replace("PARTS", manifest["parts"])
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="is a link, which an INDEX has none of"):
        model_file(folder, open_index(folder).manifest)


def test_no_index_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no INDEX: `flowerray index build RUN DIR"):
        open_index(tmp_path)


def test_a_reader_meets_a_writer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is read, then its parts are replaced: the newer ones are opened."""
    old = open_index(folder).manifest
    change(folder, photographs(5, seed=1, place="/more"))
    answers = [old, contents.read_manifest(folder)]
    monkeypatch.setattr(contents, "read_manifest", lambda _: answers.pop(0))
    assert len(open_index(folder)) == 25
