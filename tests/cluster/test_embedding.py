"""`flowerray embed`: what is read, what is left out, what goes on after a kill."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from flowerray.cli import dispatch
from flowerray.cluster import embedding
from flowerray.cluster.embedding import Batch, Worker, begin, decoded, keep, listed, pieces
from flowerray.opening import embed, load

Say = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def source(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 9 photographs, and a shard of 5; in each is a file that is none."""
    root = tmp_path_factory.mktemp("source") / "photos"
    pictures = sorted((small_set / "jpg").iterdir())[:14]
    for n, picture in enumerate(pictures[:9]):
        (root / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, root / "ab"[n % 2] / f"{n}-é.jpg")
    (root / "a" / "note.jpg").write_text("no photograph")
    (root / "a" / ".hidden.jpg").write_text("no photograph")
    (root / "a" / "empty.png").touch()
    os.mkfifo(root / "a" / "pipe.jpg")
    with tarfile.open(root / "shard-0.tar", "w") as shard:
        for n, picture in enumerate(pictures[9:]):
            shard.add(picture, f"{n}.jpg")
            label = tarfile.TarInfo(f"{n}.cls")
            shard.addfile(label, io.BytesIO(b""))
        odd = tarfile.TarInfo("\udcff.jpg")
        shard.addfile(odd)
        broken = tarfile.TarInfo("5.jpg")
        broken.size = 4
        shard.addfile(broken, io.BytesIO(b"none"))
    return root


def rows(out: Path) -> dict[str, NDArray[np.float32]]:
    """What the parquet files of a folder hold."""
    found: dict[str, NDArray[np.float32]] = {}
    for part in sorted(out.glob("part-*.parquet")):
        table = parquet.read_table(part)
        emb_ND = np.stack(table["embedding"].to_numpy())
        names = table["path"].to_pylist()
        assert not found.keys() & set(names)
        found |= dict(zip(names, emb_ND, strict=True))
    return found


def expected(run: Path, source: Path) -> dict[str, NDArray[np.float32]]:
    """Every photograph by `flowerray.embed`."""
    files = [path for path in sorted(source.glob("[ab]/[0-9]*.jpg"))]
    model, found = load(run), {}
    with tarfile.open(source / "shard-0.tar") as shard:
        for n in range(5):
            file = source.with_name(f"{n}.jpg")
            file.write_bytes(shard.extractfile(f"{n}.jpg").read())  # type: ignore[union-attr]
            found[f"{source}/shard-0.tar/{n}.jpg"] = embed(model, [file])[0].numpy()
    return found | {str(path): embed(model, [path])[0].numpy() for path in files}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, emb_D in wanted.items():
        np.testing.assert_allclose(found[name], emb_D, atol=1e-5)


def test_everything_is_embedded_once(small_run: Path, source: Path, tmp_path: Path) -> None:
    """All of it but Ray Data."""
    filesystem, names, faults = listed(str(source))
    assert faults == {} and len(names) == 12
    out, wanted = tmp_path / "out", expected(small_run, source)
    made = embedding.Manifest(model="m", fingerprint="f", source=str(source))

    def call() -> int:
        todo = pieces(names, begin(out, made))
        batch = {"piece": np.array([json.dumps(piece) for piece in todo])}
        model = load(small_run)

        def decode(batch: Batch) -> Any:
            return decoded(batch, filesystem, model.image_size)

        return keep(out, Worker(model, decode, "cpu", 1)(batch), faults, lambda _: None)

    assert call() == 14 and call() == 0
    same(rows(out), wanted)
    assert {Path(name).name: why for name, why in faults.items()} == {
        "note.jpg": "no known image format",
        "empty.png": "the file is empty",
        "5.jpg": "no known image format",
        "\\udcff.jpg": "it is empty, or too large",
    }
    (part,) = out.glob("part-*.parquet")
    part.unlink()
    assert call() == 14
    (source / "a" / "0-é.jpg").rename(source / "a" / "0-new.jpg")
    names[names.index(f"{source}/a/0-é.jpg")] = f"{source}/a/0-new.jpg"
    assert call() == 1 and len(rows(out)) == 15
    (source / "a" / "0-new.jpg").rename(source / "a" / "0-é.jpg")


def test_what_was_embedded_before_a_fault_is_kept(tmp_path: Path) -> None:
    def stream() -> Any:
        for n in range(3):
            name, emb = np.array([f"{n}.jpg"]), np.full((1, 4), n, np.float32)
            yield {"name": name, "fault": np.array([""]), "emb": emb}
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        keep(tmp_path, stream(), {}, lambda _: None)
    assert sorted(rows(tmp_path)) == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_cut_shard_gives_what_it_has(source: Path, tmp_path: Path) -> None:
    whole = (source / "shard-0.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.tar").write_bytes(bytes(range(256)) * 4)
    filesystem, names, _ = listed(f"file://{tmp_path}")
    batch = {"piece": np.array([json.dumps(piece) for piece in pieces(names, set())])}
    cut, damaged = decoded(batch, filesystem, 32)
    assert len(cut["name"]) > 2 and cut["crop"].shape[1:] == (32, 32, 3)
    assert cut["name"][-1] == f"{tmp_path}/a.tar" and not cut["fault"][0]
    assert damaged["name"].tolist() == [f"{tmp_path}/b.tar"]
    for found in (cut, damaged):
        assert found["fault"][-1].startswith("the shard is damaged")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "nowhere is not there: give a folder or a .tar file of photographs"),
        ("OUT", "holds no photographs"),
        ("hello://there", "cannot be listed"),
        ("ODD", "holds a file whose name is not UTF-8: rename it"),
    ],
)
def test_a_bad_source_is_one_sentence(
    source: str, said: str, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "ODD":
        (tmp_path / os.fsdecode(b"\xff.jpg")).touch()
    place = tmp_path if source in ("OUT", "ODD") else source
    assert dispatch(["embed", str(small_run), str(place), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_another_model_s_embeddings_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = embedding.Manifest(model="a", fingerprint="1", source="/photos")
    assert begin(out, made) == begin(out, made) == set()
    with pytest.raises(Exception, match="out holds embeddings of /photos by a: choose"):
        begin(out, embedding.Manifest(model="b", fingerprint="2", source="/photos"))
    (out / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(Exception, match="part-00000.parquet is damaged .*: remove it"):
        begin(out, made)
    with pytest.raises(Exception, match="exists already: choose another"):
        begin(tmp_path, made)


@pytest.mark.ray
def test_a_killed_call_goes_on(
    say: Say, small_run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of its own, of which the first is killed when something is written."""
    out, many = tmp_path / "out", tmp_path / "many"
    picture = (source / "b" / "1-é.jpg").read_bytes()
    many.mkdir()
    for n in range(3000):
        (many / f"{n:04}.jpg").write_bytes(picture)
    program = (
        "from flowerray.cluster import embedding; embedding.PART = 100\n"
        "from flowerray.cli import main\n"
        f"if __name__ == '__main__': main(['embed', {str(small_run)!r}, {str(many)!r}, "
        f"'--out', {str(out)!r}, '--json'])"
    )
    first = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    while not list(out.glob("part-*.parquet")):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = len(rows(out))
    assert 0 < before < 3000
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["known"], result["added"]) == (before, 3000 - before)
    found = rows(out)
    assert len(found) == 3000
    wanted = embed(load(small_run), [source / "b" / "1-é.jpg"])[0].numpy()
    assert np.abs(np.stack(list(found.values())) - wanted).max() < 1e-5


@pytest.mark.ray
def test_embed_as_a_user_types_it(say: Say, small_run: Path, source: Path, tmp_path: Path) -> None:
    said, _ = say("embed", small_run, f"file://{source}", "--out", tmp_path / "out")
    assert said.splitlines()[0] == f"{tmp_path / 'out'}: 14 photographs embedded"
    assert f"left out  {source}/a/note.jpg (no known image format)" in said
    same(rows(tmp_path / "out"), expected(small_run, source))
    again, _ = say("embed", small_run, f"file://{source}", "--out", tmp_path / "out")
    assert again.splitlines()[0].endswith("0 photographs embedded, 14 were there")
