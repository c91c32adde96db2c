"""Decoding and the store: geometry, colours, keys, damage, concurrency, kills."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flowerray.data import store
from flowerray.data.store import Store, build_store, eval_image, load_image, resize_side
from flowerray.errors import UserError
from flowerray.files import home
from tests.data.pictures import jpeg, picture, save_picture, six_pictures


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return six_pictures(tmp_path)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No store of another test is found."""
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path / "home"))


def build(paths: list[Path], side: int = 18, processes: int | None = None) -> Store:
    return build_store(paths, side, progress=False, processes=processes)


def watch_reading(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes are hashed from now on."""
    read: list[Path] = []
    digest = store._digest

    def watched(path: Path) -> bytes | str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(store, "_digest", watched)
    return read


def test_files_that_did_not_change_are_not_read_again(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SETTLED", 0)
    read = watch_reading(monkeypatch)
    time.sleep(0.05)  # a tick of the file system's clock
    first = build(paths)
    assert sorted(read) == paths
    read.clear()
    assert build(paths).folder == first.folder and not read
    assert build(paths, 20).folder != first.folder  # another side is another store
    read.clear()

    old = paths[0].stat()
    data = bytearray(paths[0].read_bytes())
    data[data.index(b"\xff\xdb") + 5] ^= 1  # another picture of as many bytes and the same time
    paths[0].write_bytes(data)
    os.utime(paths[0], ns=(old.st_atime_ns, old.st_mtime_ns))
    assert build(paths).fingerprint != first.fingerprint and read


def test_a_file_that_changed_just_now_is_read_again(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within a tick of the file system's clock would not be seen."""
    build(paths)
    read = watch_reading(monkeypatch)
    build(paths)
    assert sorted(read) == paths


def test_store_equals_eval_image_bit_for_bit(paths: list[Path]) -> None:
    store = build(paths, resize_side(16))
    crops_BCHW = store.centre(np.arange(len(paths)), 16)
    assert crops_BCHW.dtype == torch.uint8
    for path, crop_CHW in zip(paths, crops_BCHW, strict=True):
        assert np.array_equal(crop_CHW.numpy(), eval_image(path, 16))
        assert np.array_equal(crop_CHW.numpy(), eval_image(path.read_bytes(), 16))


def test_padded_and_image(paths: list[Path]) -> None:
    store = build(paths)
    order = np.array([4, 0, 5, 0])
    images_BCHW, sizes_B2 = store.padded(order)
    assert images_BCHW.shape == (4, 3, 36, 36) and images_BCHW.dtype == torch.uint8
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert sizes_B2.dtype == torch.int64
    assert sizes_B2.tolist() == [[18, 36], [18, 27], [36, 18], [18, 27]]
    for row, i in enumerate(order):
        height, width = sizes_B2[row].tolist()
        whole_HWC = images_BCHW[row].permute(1, 2, 0).numpy()
        assert np.array_equal(whole_HWC[:height, :width], load_image(paths[i], 18))
        assert np.array_equal(store.image(i), load_image(paths[i], 18))
        assert not whole_HWC[height:].any() and not whole_HWC[:, width:].any()
    assert len(store) == len(paths)
    with pytest.raises(ValueError, match="read-only"):
        store.image(0)[0, 0, 0] = 1


@pytest.mark.parametrize("processes", [1, 2])
def test_every_bad_file_is_named_up_to_ten(tmp_path: Path, processes: int) -> None:
    paths = [save_picture(tmp_path / f"{i:02d}.jpg", i) for i in range(16)]
    for path in paths[:12]:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        build(paths, processes=processes)
    message = str(caught.value)
    assert message.startswith("12 of 16 images")
    assert all((path.name in message) == (i < 10) for i, path in enumerate(paths))
    assert "and 2 more" in message
    assert not [p for p in (home() / "stores").iterdir() if p.is_dir()]


def test_missing_files_are_named(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 7 .*gone.jpg"):
        build([*paths, tmp_path / "gone.jpg"])


def test_processes_change_nothing(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = build(paths, processes=1)
    monkeypatch.setenv("FLOWERRAY_HOME", str(home()) + "2")
    pooled = build(paths, processes=2)
    assert pooled.folder != alone.folder
    assert pooled.fingerprint == alone.fingerprint
    for name in ("pixels.bin", "index.npy", "meta.json"):
        assert (pooled.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_the_key_follows_content_side_and_order(paths: list[Path]) -> None:
    store = build(paths)
    before = (store.folder / "pixels.bin").stat().st_mtime_ns
    again = build(paths)
    assert again.folder == store.folder
    assert (again.folder / "pixels.bin").stat().st_mtime_ns == before  # not built again
    renamed = [path.rename(path.with_name(f"new-{path.name}")) for path in paths]
    assert build(renamed).fingerprint == store.fingerprint
    others = [build(renamed, 19).fingerprint, build(renamed[::-1]).fingerprint]
    renamed[0].write_bytes(jpeg(picture(99, 20, 30)))
    others.append(build(renamed).fingerprint)
    assert len({store.fingerprint, *others}) == 4


@pytest.mark.parametrize(
    "damage",
    ["cut pixels", "longer pixels", "no meta", "meta", "meta of another kind", "no index", "index",
     "a bit of the index", "a bit of the checks"],
)  # fmt: skip
def test_a_damaged_store_is_found_and_built_again(paths: list[Path], damage: str) -> None:
    store = build(paths)
    expected = (store.folder / "pixels.bin").read_bytes()
    if damage == "cut pixels":
        os.truncate(store.folder / "pixels.bin", len(expected) - 1)
    elif damage == "longer pixels":
        os.truncate(store.folder / "pixels.bin", len(expected) + 1)
    elif damage == "no meta":
        (store.folder / "meta.json").unlink()
    elif damage == "no index":
        (store.folder / "index.npy").unlink()
    elif damage == "index":
        (store.folder / "index.npy").write_bytes(b"")
    elif damage.startswith("meta"):
        (store.folder / "meta.json").write_text("[]" if "kind" in damage else '{"version": 1, "si')
    else:
        flip(store.folder / ("index.npy" if "index" in damage else "checks.npy"), -1)
    with pytest.raises(UserError, match="no complete store"):
        Store(store.folder)
    assert (build(paths).folder / "pixels.bin").read_bytes() == expected


def flip(file: Path, position: int, bit: int = 0) -> None:
    """One bit of a file, as a disk or a memory flips it."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_a_flipped_bit_of_a_photograph_is_noticed_and_mended_by_the_next_call(
    paths: list[Path],
) -> None:
    store = build(paths)
    expected = (store.folder / "pixels.bin").read_bytes()
    flip(store.folder / "pixels.bin", 100, bit=7)
    damaged = build(paths)
    damaged.image(len(paths) - 1)  # whose pixels are whole
    with pytest.raises(UserError, match="is damaged .* call the command again"):
        damaged.centre(np.arange(len(paths)), 16)
    assert (build(paths).folder / "pixels.bin").read_bytes() == expected
    build(paths).padded(np.arange(len(paths)))


def test_a_store_of_0_1_0_has_no_checks_and_gets_them(paths: list[Path]) -> None:
    store = build(paths)
    (store.folder / "checks.npy").unlink()
    meta = json.loads((store.folder / "meta.json").read_text())
    del meta["crc"], meta["schema_version"]
    (store.folder / "meta.json").write_text(json.dumps(meta))
    before = (store.folder / "pixels.bin").stat().st_mtime_ns
    older = build(paths)
    assert older.fingerprint == store.fingerprint
    assert (older.folder / "pixels.bin").stat().st_mtime_ns == before, "not decoded again"
    flip(store.folder / "pixels.bin", 0)
    with pytest.raises(UserError, match="is damaged"):
        Store(store.folder).image(0)


@pytest.mark.parametrize("note", ["", "[]", "0" * 32, f"{'0' * 32} 00000000"])
def test_a_damaged_note_of_known_files_is_no_key(paths: list[Path], note: str) -> None:
    for path in paths:
        os.utime(path, (1e9, 1e9))
    key = store._key(paths, 18, False)
    for file in (home() / "stores" / "known").glob("*"):
        file.write_text(note)
    assert store._key(paths, 18, False) == key


def test_importing_leaves_the_host_programs_warnings(tmp_path: Path) -> None:
    program = "import warnings\nbefore = list(warnings.filters)\nimport flowerray.data.images\n"
    program += "assert not [f for f in warnings.filters if f not in before and 'PIL' in str(f)]"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_store_of_another_version_is_not_opened(paths: list[Path]) -> None:
    meta = build(paths).folder / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "version": 0}))
    with pytest.raises(UserError, match="no complete store"):
        Store(meta.parent)


def test_pickling_sends_the_path_not_the_pixels(paths: list[Path]) -> None:
    store = build(paths)
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).image(2), store.image(2))


def test_builders_of_one_key_decode_once_and_all_succeed(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def load(path: Path, shorter_side: int) -> NDArray[np.uint8]:
        time.sleep(0.01)
        decoded.append(path)
        return load_image(path, shorter_side)

    monkeypatch.setattr("flowerray.data.store.load_or_fault", load)
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: build(paths), range(6)))
    assert decoded == paths
    assert len({found.folder for found in stores}) == 1
    for found in stores:
        assert np.array_equal(found.image(5), load_image(paths[5], 18))


def test_a_killed_builder_leaves_nothing_half_valid(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    writing = context.Event()

    def hang(*_: object) -> None:
        writing.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr("flowerray.data.store.np.save", hang)  # the pixels are written, no more
        process = context.Process(target=build, args=(paths,))
        process.start()
        assert writing.wait(30)
        process.kill()
        process.join()
    stores = home() / "stores"
    assert [p for p in stores.iterdir() if p.is_dir()]  # what it had begun
    start = time.monotonic()
    store = build(paths)
    assert time.monotonic() - start < 30  # its lock does not outlive it
    assert [p for p in stores.iterdir() if p.is_dir()] == [store.folder]


def test_an_unwritable_home_is_one_sentence(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="FLOWERRAY_HOME"):
        build(paths)
