"""The synthetic set: deterministic, shaped like Oxford's, never half written, not just colour."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from flowerray.errors import UserError
from flowerray.rendered import synthetic
from flowerray.rendered.painter import paint
from flowerray.rendered.species import names, species_table
from flowerray.rendered.synthetic import MASK_BACKGROUND, SyntheticConfig, class_sizes, synthesize
from tests.data.pictures import save_picture

TINY = SyntheticConfig(classes=3, scale=0.01, size=64)  # 24 images a class


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("tiny") / "set", TINY, progress=False, processes=1)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every picture; .mat headers carry the time, so tables are compared by value."""
    files = sorted(folder.rglob("*.jpg"))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    for name, key in (
        ("imagelabels", "labels"),
        ("setid", "trnid"),
        ("setid", "valid"),
        ("setid", "tstid"),
    ):
        found[f"{name}/{key}"] = loadmat(folder / f"{name}.mat")[key].tobytes()
    found["record"] = (folder / "synthetic.json").read_bytes()
    return found


def foreground(mask_path: Path) -> NDArray[np.bool_]:
    """Pixels that are not within JPEG's tolerance of Oxford's background blue."""
    mask_HW3 = np.asarray(Image.open(mask_path)).astype(int)
    return np.abs(mask_HW3 - MASK_BACKGROUND).sum(2) > 60


def test_the_config_alone_decides_the_files(tiny: Path, tmp_path: Path) -> None:
    two = synthesize(tmp_path / "two", TINY, progress=False, processes=2)
    assert contents(two) == contents(tiny)
    reseeded = SyntheticConfig(classes=2, scale=0.01, size=64, seed=1)
    other = contents(synthesize(tmp_path / "other", reseeded, progress=False, processes=1))
    assert not any(other[k] == v for k, v in contents(tiny).items() if k in other)


def test_scale_and_classes_keep_the_species_and_their_pictures() -> None:
    assert species_table(40, 0) == species_table(102, 0)[:40]
    assert species_table(40, 0) != species_table(40, 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_class_sizes_are_shaped_like_oxford(seed: int) -> None:
    sizes = class_sizes(SyntheticConfig(seed=seed))
    assert (len(sizes), sizes.sum(), sizes.min(), sizes.max()) == (102, 8189, 40, 258)
    assert (sizes - 20).sum() == 6149
    assert not np.array_equal(sizes, np.sort(sizes))
    small = class_sizes(SyntheticConfig(seed=seed, scale=0.25))
    np.testing.assert_array_equal(small, 20 + np.maximum(np.round((sizes - 20) * 0.25), 4))
    assert class_sizes(SyntheticConfig(seed=seed, scale=0.001)).max() == 24


def test_tables_follow_oxford(tiny: Path) -> None:
    labels = loadmat(tiny / "imagelabels.mat")["labels"]
    setid = loadmat(tiny / "setid.mat")
    count = int(class_sizes(TINY).sum())
    assert labels.dtype == np.uint8 and labels.shape == (1, count)
    assert set(labels[0]) == {1, 2, 3}
    parts = [setid[key] for key in ("trnid", "valid", "tstid")]
    assert [part.shape for part in parts] == [(1, 30), (1, 30), (1, count - 60)]
    ids = np.concatenate(parts, axis=1)[0]
    np.testing.assert_array_equal(np.sort(ids), np.arange(1, count + 1))
    for part in parts[:2]:
        np.testing.assert_array_equal(np.bincount(labels[0][part[0] - 1])[1:], [10, 10, 10])
    numbers = [f"{n:05d}.jpg" for n in range(1, count + 1)]
    assert sorted(p.name for p in (tiny / "jpg").iterdir()) == [f"image_{n}" for n in numbers]
    assert sorted(p.name for p in (tiny / "segmim").iterdir()) == [f"segmim_{n}" for n in numbers]
    record = json.loads((tiny / "synthetic.json").read_text())
    assert record["config"] == TINY.model_dump(mode="json")
    assert record["generator"] == synthetic.VERSION
    assert len(set(record["classes"])) == 3


def test_masks_show_the_flower_and_nothing_else(tiny: Path) -> None:
    shares = []
    for image_path, mask_path in zip(
        sorted((tiny / "jpg").iterdir()), sorted((tiny / "segmim").iterdir()), strict=True
    ):
        image_HW3 = np.asarray(Image.open(image_path)).astype(int)
        flower_HW = foreground(mask_path)
        mask_HW3 = np.asarray(Image.open(mask_path)).astype(int)
        assert image_HW3.shape == mask_HW3.shape and min(image_HW3.shape[:2]) == TINY.size
        shares.append(flower_HW.mean())
        difference = np.abs(mask_HW3 - image_HW3).mean(2)
        # Inside, the photograph (both went through JPEG); outside, the blue of no photograph.
        assert np.median(difference[flower_HW]) < 25
        assert np.median(np.abs(mask_HW3[~flower_HW] - MASK_BACKGROUND).sum(1)) <= 6
    assert min(shares) > 0.005 and max(shares) < 0.95
    assert 0.05 < np.median(shares) < 0.45


def test_mask_is_where_the_main_bloom_is() -> None:
    table = species_table(12, 0)
    hits, centres = [], []
    for c in range(12):
        for k in range(6):
            picture = paint(table[c], 64, np.random.default_rng((7, c, k)))
            height, width = picture.flower.shape
            x, y = picture.centre
            hits.append(picture.flower[int(y * height), int(x * width)])
            centres.append(picture.centre)
    assert np.mean(hits) > 0.75  # the rest lies behind a leaf, or between the blooms of a spike
    assert (np.std(centres, axis=0) > 0.15).all()


def test_species_form_genera_and_fine_pairs() -> None:
    for seed in (0, 1, 2):
        table = species_table(102, seed)
        genera = [species.genus for species in table]
        assert genera == sorted(genera) and 20 < len(set(genera)) < 52
        assert len(set(names(table, seed))) == 102
        assert len({species.form for species in table}) >= 6
        assert all(species.petals >= 3 for species in table)
        pairs = [(i, s.fine_of) for i, s in enumerate(table) if s.fine_of is not None]
        assert len(pairs) >= 15
        for child, parent in pairs:
            assert table[child].genus == table[parent].genus
            changed = {
                key
                for key, value in vars(table[child]).items()
                if value != vars(table[parent])[key] and key != "fine_of"
            }
            assert 1 <= len(changed) <= 4


def simple_features(
    images_NHW3: NDArray[np.uint8],
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Unit vectors of each image: roots of a 512-bin colour histogram, and 16 x 16 pixels."""
    histograms, pixels = [], []
    for image in images_NHW3:
        cells = (image // 32).reshape(-1, 3).astype(int) @ [64, 8, 1]
        histograms.append(np.sqrt(np.bincount(cells, minlength=512) / len(cells)))
        small = np.asarray(Image.fromarray(image).resize((16, 16)), float).ravel()
        pixels.append((small - small.mean()) / np.linalg.norm(small - small.mean()))
    return np.array(histograms), np.array(pixels)


def test_simple_features_do_not_solve_it() -> None:
    """A quick stand-in for the measured bar: colours and coarse pixels find few of 10 species."""
    labels = np.tile(np.arange(10), 11)
    images = []
    for i, c in enumerate(labels):
        image = paint(species_table(10, 0)[c], 64, np.random.default_rng((3, i))).image
        images.append(image[:64, :64])
    for features in simple_features(np.array(images)):
        nearest = (features[80:] @ features[:80].T).argmax(1)
        assert (labels[nearest] == labels[80:]).mean() < 0.45


def test_a_complete_set_is_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_render", lambda work: pytest.fail("painted again"))
    assert synthesize(tiny, TINY, progress=False, processes=1) == tiny


def test_other_content_is_refused(tiny: Path, tmp_path: Path) -> None:
    before = contents(tiny)
    with pytest.raises(UserError, match="already holds"):
        synthesize(tiny, TINY.model_copy(update={"seed": 9}), progress=False, processes=1)
    assert contents(tiny) == before
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="already holds"):
        synthesize(tmp_path, TINY, progress=False, processes=1)
    with pytest.raises(UserError, match="already holds"):
        synthesize(tmp_path / "mine.txt", TINY, progress=False, processes=1)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_broken_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = synthetic._render
    calls = []

    def breaks(work: tuple) -> int:
        calls.append(work)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(work)

    out = tmp_path / "set"
    monkeypatch.setattr(synthetic, "_render", breaks)
    with pytest.raises(KeyboardInterrupt):
        synthesize(out, TINY, progress=False, processes=1)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        synthesize(tmp_path / "file" / "set", TINY, progress=False, processes=1)


CALLS = {
    "paints": "synthetic.synthesize(folder / 'set', config, progress=False, processes=2)",
    "paints the default set": "source.open_dataset(source.DataConfig(synthetic=config))",
    "decodes": "store.build_store(sorted((folder / 'images').iterdir()), 32, processes=2)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_script_without_a_main_guard_is_told(call: str, tmp_path: Path) -> None:
    """Its child processes would run it again, and wait for the parent's locks for ever."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        save_picture(tmp_path / "images" / f"{i}.jpg", i, 40, 40)
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from flowerray.data import source, store\nfrom flowerray.rendered import synthetic\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "os.cpu_count = lambda: 2\n"
        "config = synthetic.SyntheticConfig(classes=3, scale=0.01, size=64)\n"
        f"{call}\n"
    )
    home = {**os.environ, "FLOWERRAY_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, env=home
    )
    assert done.returncode != 0
    assert "__main__" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "set").exists()


def test_a_mount_point_is_refused_before_the_painting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished folder could not take its place."""
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="is a mount point: name a folder in it"):
        synthesize(tmp_path, SyntheticConfig(classes=3, scale=0.01, size=48), progress=False)


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"scale": 0}, {"size": 8}, {"seed": -1}])
def test_settings_are_bounded(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SyntheticConfig(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frozen_features_find_some_but_not_most(seed: int, tmp_path: Path) -> None:
    """The demo's set at 96 pixels: ImageNet features between 0.20 and 0.60, simpler ones below."""
    from flowerray.data.oxford import read_oxford
    from flowerray.data.store import build_store, resize_side
    from flowerray.model.embedder import Embedder, EmbedderConfig
    from flowerray.retrieval.embed import embed

    config = SyntheticConfig(classes=40, seed=seed, scale=0.1, size=112)
    dataset = read_oxford(synthesize(tmp_path / "set", config, progress=False))
    embedder = Embedder(EmbedderConfig(image_size=96))
    features = []
    for split in ("train", "test"):
        paths = [dataset.paths[i] for i in dataset.splits[split]]
        store = build_store(paths, resize_side(96), progress=False)
        images_NHW3 = store.centre(range(len(paths)), 96).permute(0, 2, 3, 1).numpy()
        features.append((embed(embedder, store, frozen=True), *simple_features(images_NHW3)))
    scores = []
    for gallery, queries in zip(*features, strict=True):
        nearest = dataset.split_labels("train")[(queries @ gallery.T).argmax(1)]
        scores.append((nearest == dataset.split_labels("test")).mean())
    frozen, histograms, pixels = scores
    assert 0.2 < frozen < 0.6
    assert max(histograms, pixels) < frozen - 0.05
