"""`flowerray index`, as a user types it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowerray.cli import dispatch
from flowerray.cluster.driver import train_run
from flowerray.data.images import eval_image
from flowerray.index import command, contents
from flowerray.index.contents import open_index
from flowerray.opening import open_model
from flowerray.retrieval import neighbours
from tests.small import small

Say = Callable[..., tuple[str, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve photographs, and one file that is none."""
    root = shutil.copytree(photographs, tmp_path_factory.mktemp("photos") / "root")
    (root / "a" / "note.jpg").write_text("no photograph")
    return root


@pytest.fixture(scope="module")
def built(small_run: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "index"
    command.build(open_model(str(small_run), CPU), folders, out, quiet=True)
    return out


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(built, tmp_path / "index")


def test_build_search_and_check(say: Say, small_run: Path, folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    said, _ = say("index", "build", small_run, folders, "--out", out)
    assert f"{out}: 12 photographs (12 added)" in said
    assert f"left out  {folders / 'a' / 'note.jpg'} (no known image format)" in said
    photo = folders / "a" / "0.jpg"
    found = json.loads(say("index", "search", out, photo, "--json", "--k", 3)[0])
    assert found.keys() == {"schema_version", "query", "neighbours", "unknown"}
    assert found["query"] == str(photo) and len(found["neighbours"]) == 3
    for n in found["neighbours"]:
        assert n.keys() == {"image", "label", "similarity", "probability", "id"}
        assert n["label"] == Path(n["image"]).parent.name and n["image"] != str(photo)
    similar = json.loads(
        say("similar", small_run, photo, found["neighbours"][0]["image"], "--json")[0]
    )
    assert similar["similarity"] == pytest.approx(found["neighbours"][0]["similarity"], abs=1e-6)
    model = open_model(str(small_run), CPU)
    assert model.calibration is not None
    assert found["unknown"] == (found["neighbours"][0]["similarity"] < model.threshold)
    for prior in (0.5, 0.1):
        found = json.loads(say("index", "search", out, photo, "--json", "--prior", prior)[0])
        for n in found["neighbours"]:
            expected = model.calibration.probability(n["similarity"], prior)
            assert n["probability"] == pytest.approx(float(expected))
    text, _ = say("index", "search", out, photo)
    assert text.splitlines()[1].endswith(found["neighbours"][0]["image"])
    assert "12 photographs in 2 classes, as they were written" in say("index", "check", out)[0]


def test_what_is_known_stays_and_what_changed_is_embedded_again(
    say: Say, index: Path, folders: Path, tmp_path: Path
) -> None:
    assert "12 photographs (12 there already)" in say("index", "add", index, folders)[0]
    own = shutil.copy(folders / "a" / "0.jpg", tmp_path / "own.jpg")
    added = json.loads(say("index", "add", index, own, folders / "b", "--json")[0])
    assert (added["added"], added["known"], added["photographs"]) == (1, 6, 13)
    Path(own).write_text("no photograph")
    said, _ = say("index", "add", index, own)
    assert f"{own} (no known image format; what it was when it was added stays)" in said
    shutil.copy(folders / "b" / "1.jpg", own)
    assert "13 photographs (1 replaced" in say("index", "add", index, own)[0]
    found = json.loads(say("index", "search", index, own, "--json")[0])["neighbours"]
    # All but the photograph itself, which lies in b as well.
    assert len(found) == 10 and not {str(own), str(folders / "b" / "1.jpg")} & {
        n["image"] for n in found
    }
    gone = json.loads(say("index", "remove", index, own, folders / "a", "--json")[0])
    assert (gone["removed"], gone["photographs"]) == (7, 6)
    left = open_index(index)
    assert {left.label(row) for row in range(6)} == {"b"}
    assert json.loads(say("index", "check", index, "--json")[0])["classes"] == 1


def test_a_corrected_table_corrects_the_classes(
    say: Say, small_run: Path, photographs: Path, tmp_path: Path
) -> None:
    folders, index = shutil.copytree(photographs, tmp_path / "root"), tmp_path / "index"
    say("index", "build", small_run, folders, "--out", index)
    before = open_index(index)
    paths = [before.path(row) for row in range(len(before))]
    rows = [f"{path.relative_to(folders)},{n % 3}\n" for n, path in enumerate(paths)]
    (table := folders / "table.csv").write_text("path,label\n" + "".join(rows))
    added = json.loads(say("index", "add", index, folders, table, "--json")[0])
    assert (added["relabelled"], added["known"], added["photographs"]) == (12, 0, 12)
    after = open_index(index)
    found = {after.path(row): (after.label(row), after.vectors_ND[row]) for row in range(12)}
    for row, path in enumerate(paths):
        label, emb_D = found[path]
        assert label == str(row % 3) and (emb_D == before.vectors_ND[row]).all()
    # A folder has no say, and a second time nothing is left to correct.
    for place in (folders, table):
        assert "12 photographs (12 there already)" in say("index", "add", index, place)[0]
    assert json.loads(say("index", "check", index, "--json")[0])["classes"] == 3


def test_a_rebuild_is_the_index_of_another_model(
    say: Say, index: Path, small_run: Path, small_set: Path, folders: Path, tmp_path: Path
) -> None:
    other, fresh, photo = tmp_path / "other", tmp_path / "fresh", folders / "a" / "0.jpg"
    train_run(small(small_set, "center", epochs=1), other, quiet=True)
    say("index", "build", other, folders, "--out", fresh)
    expected, old = (
        json.loads(say("index", "search", i, photo, "--json")[0]) for i in (fresh, index)
    )
    assert "12 photographs" in say("index", "rebuild", index, "--run", small_run)[0]
    assert json.loads(say("index", "search", index, photo, "--json")[0]) == old
    said, _ = say("index", "rebuild", index, "--run", other)
    assert f"12 photographs (12 embedded by {other})" in said
    assert json.loads(say("index", "search", index, photo, "--json")[0]) == expected != old
    (gone := index.parent / "own.jpg").write_bytes(photo.read_bytes())
    say("index", "add", index, gone)
    gone.unlink()
    said, _ = say("index", "rebuild", index, "--run", small_run)
    assert f"left out  {gone} (" in said and "12 photographs (12 embedded" in said
    assert json.loads(say("index", "search", index, photo, "--json")[0]) == old


def test_exact_search_finds_what_evaluate_finds(say: Say, run: Path, tmp_path: Path) -> None:
    model = open_model(str(run), CPU)
    dataset = model.own_dataset(quiet=True)
    train, test = ([dataset.paths[i] for i in dataset.splits[s]] for s in ("train", "test"))
    say("evaluate", run)
    expected = json.loads((run / "evaluation" / "test.json").read_text())["per_query"]["nearest"]
    contents.create(tmp_path / "index", next(run.glob("*.pth")), "mine", model.embedder.dim)
    command.add(tmp_path / "index", train, model.embedder, quiet=True)
    found = open_index(tmp_path / "index")
    crops = [eval_image(path, model.embedder.image_size).transpose(1, 2, 0) for path in test]
    rows = [found.nearest(emb_D, 1)[0] for emb_D in command.embed_crops(model.embedder, crops)]
    names = [found.path(int(row)).relative_to(dataset.root).as_posix() for (row,) in rows]
    assert names == expected


def test_check_notes_the_recall_and_finds_a_flipped_bit(
    say: Say, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contents, "EXACT", 5)
    monkeypatch.setattr(neighbours, "_ROWS_PER_CELL", 4)
    contents.change(index, gone=lambda path: path.endswith(b"/0.jpg"))
    found = json.loads(say("index", "check", index, "--json")[0])
    assert not found["exact"] and found["recall_at_10"]["mean"] > 0.9
    assert contents.read_manifest(index)["recall"] == found["recall_at_10"]
    file = index / contents.read_manifest(index)["parts"] / "vectors.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert dispatch(["index", "check", str(index)]) == 2
    assert "vectors.npy is not as it was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to do: flowerray index {build,add,remove,rebuild,search,check}."),
        (["prune"], "say what to do"),
        (["search", "INDEX", "nowhere.jpg"], "nowhere.jpg is not there: give the path of a photo"),
        (["search", "PHOTOS", "PHOTOS/a/0.jpg"], "is no INDEX: `flowerray index build RUN DIR"),
        (["search", "INDEX", "PHOTOS/a/note.jpg"], "cannot be read as an image"),
        (["add", "INDEX", "nowhere"], "nowhere is not there"),
        (["add", "INDEX"], "say what to add: photographs, or folders of them"),
        (["remove", "INDEX"], "say what to remove: photographs, or folders of them"),
        (["remove", "INDEX", "nowhere"], "holds no photograph nowhere"),
        (["check", "PHOTOS"], "is no INDEX"),
        (["rebuild", "PHOTOS"], "is no INDEX"),
        (["rebuild", "INDEX", "--run", "nowhere"], "nowhere is not there"),
        (["build", "RUN", "PHOTOS", "--out", "INDEX"], "index exists: `flowerray index add"),
        (["build", "RUN", "nowhere", "--out", "new"], "nowhere is not a folder of photographs"),
        (["build", "RUN", "PHOTOS", "--out", "PHOTOS"], "exists already: choose another --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    words: list[str], said: str, index: Path, small_run: Path, folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = {file: file.read_bytes() for file in index.rglob("*") if file.is_file()}
    places: dict[str, Any] = {"INDEX": index, "RUN": small_run, "PHOTOS": folders}
    given = ["/".join(str(places.get(part, part)) for part in word.split("/", 1)) for word in words]
    assert dispatch(["index", *given]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert {f: f.read_bytes() for f in index.rglob("*") if f.is_file()} == before


def test_a_folder_without_photographs_leaves_no_index(
    small_run: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which would refuse the right folder next."""
    (tmp_path / "empty").mkdir()
    words = ["--out", str(tmp_path / "new.index")]
    assert dispatch(["index", "build", str(small_run), str(tmp_path / "empty"), *words]) == 2
    assert "holds no images" in capsys.readouterr().err and not Path(words[1]).exists()
    assert dispatch(["index", "build", str(small_run), str(folders), *words]) == 0


def test_it_runs_without_a_model_where_none_is_needed(
    say: Say, index: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / "model.pth").write_bytes(b"another")
    say("index", "remove", index, folders / "a")
    assert dispatch(["index", "search", str(index), str(folders / "a" / "0.jpg")]) == 2
    assert "the model that" in capsys.readouterr().err
    assert dispatch(["index", "check", str(index)]) == 2
