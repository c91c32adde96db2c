"""Altered copies of rendered flowers are found, and little else."""

from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from flowerray.explore import duplicates
from flowerray.explore.align import Keypoints, find_keypoints
from flowerray.explore.duplicates import DuplicatePair, candidates, find_duplicates
from flowerray.rendered.synthetic import SyntheticConfig, synthesize
from tests.explore.planted import KINDS, altered

Images = tuple[list[Keypoints], np.ndarray]


def described(pictures: list[Image.Image]) -> Images:
    grey = [p.convert("L").resize((64, 64), Image.Resampling.BOX) for p in pictures]
    return [find_keypoints(p) for p in pictures], np.stack([np.asarray(g) for g in grey])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """144 rendered flowers."""
    root = tmp_path_factory.mktemp("originals") / "set"
    synthesize(root, SyntheticConfig(classes=6, scale=0.01, size=96, seed=11), False, 1)
    return [Image.open(path).convert("RGB") for path in sorted((root / "jpg").iterdir())]


def test_copies_of_every_kind_are_found_and_nothing_else(originals: list[Image.Image]) -> None:
    """Each kind twice, and pairs of kinds, in a third of the images (the full grid:
    tests/benchmarks/duplicates.py).
    """
    rng = np.random.default_rng(0)
    pairs = list(combinations(KINDS, 2))
    kinds = [(kind,) for kind in KINDS for _ in range(2)]
    kinds += [pairs[k] for k in rng.choice(len(pairs), 12, replace=False)]
    sources = rng.permutation(len(originals))[: len(kinds)].tolist()
    copies = [altered(originals[s], k, rng) for s, k in zip(sources, kinds, strict=True)]
    images = [*originals, *(Image.open(BytesIO(copy)).convert("RGB") for copy in copies)]
    keypoints, grey = described(images)
    planted = {
        (s, len(originals) + n): k for n, (s, k) in enumerate(zip(sources, kinds, strict=True))
    }
    split = np.array(["train"] * len(originals) + ["test"] * len(copies))
    seen: list[tuple[int, int]] = []
    found = find_duplicates(keypoints, grey, split, lambda *at: seen.append(at))
    got = {(p.first, p.second): p for p in found}
    missed = [k for pair, k in planted.items() if pair not in got]
    assert len(missed) <= len(planted) // 20, missed
    flagged = {i for pair in got.keys() - planted.keys() for i in pair} - {*sum(planted, ())}
    assert len(flagged) <= 0.01 * (len(originals) - len(sources))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    scores = [p.score for p in found]
    assert scores == sorted(scores, reverse=True)
    for pair, kind in planted.items():
        if kind == ("mirrored",):
            assert got[pair].change() == "mirrored"
        if kind == ("turned by 90",):
            assert got[pair].change() == "turned by 90°"
        if kind == ("cropped to 64",):
            assert got[pair].area == pytest.approx(0.64, abs=0.03)


def test_change_in_words() -> None:
    assert DuplicatePair(0, 1, 1.0, False, 0.2, 0.99).change() == "same framing"
    change = DuplicatePair(0, 1, 1.0, True, -89.8, 0.641).change()
    assert change == "mirrored, turned by 90°, cropped to 64 %"


def test_partners_are_looked_for_in_each_split(
    originals: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many copies in its own split do not hide the one in another."""
    monkeypatch.setattr(duplicates, "CANDIDATES", 2)
    keypoints, grey = described([originals[0]] * 6 + originals[1:20])
    split = np.array(["train"] * 5 + ["test"] + ["train"] * 19)
    pairs = {(i, j) for i, j, _ in candidates(keypoints, grey, split).tolist()}
    assert any((i, 5) in pairs for i in range(5))
    assert len(pairs) <= 4 * 25


def test_many_images_are_taken_in_blocks(
    originals: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    keypoints, grey = described([*originals[:20], *originals[:3]])
    split = np.array(["a", "b"])[np.arange(23) % 2]
    whole = candidates(keypoints, grey, split)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    assert np.array_equal(candidates(keypoints, grey, split), whole)
    assert {(0, 20), (1, 21), (2, 22)} <= {(i, j) for i, j, _ in whole.tolist()}


def test_few_images_and_images_without_structure() -> None:
    plain = [Image.new("RGB", (40, 30), colour) for colour in ("white", "white", "red")]
    keypoints, grey = described(plain)
    assert [len(k.plain_KB) for k in keypoints] == [0, 0, 0]
    split = np.array(["train", "test", "test"])
    (pair,) = find_duplicates(keypoints, grey, split)
    assert (pair.first, pair.second, pair.score) == (0, 1, 1.0)
    assert find_duplicates(keypoints[:1], grey[:1], split[:1]) == []
