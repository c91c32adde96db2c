"""Planted near-duplicates are found, and little else."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.fft import dctn

from flowerray.data.images import resize_side
from flowerray.data.oxford import read_oxford
from flowerray.data.store import build_store
from flowerray.explore.duplicates import candidates, find_duplicates, hashes, mirror
from flowerray.explore.scan import Survey, take_survey
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.rendered.synthetic import SyntheticConfig, synthesize
from flowerray.retrieval.embed import frozen_features
from tests.explore.planted import KINDS, plant

PLANTED = 20


@pytest.fixture(scope="module")
def planted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Survey, np.ndarray, dict[tuple[int, int], str]]]:
    """144 rendered images, 20 of them near-duplicates of 20 others: the survey, features, pairs."""
    root = tmp_path_factory.mktemp("planted") / "set"
    synthesize(root, SyntheticConfig(classes=6, scale=0.01, size=96, seed=11), False, 1)
    names = plant(root, PLANTED, seed=2)
    survey = take_survey(read_oxford(root), progress=False)
    store = build_store(survey.dataset.paths, resize_side(64), progress=False)
    features = frozen_features(Embedder(EmbedderConfig(image_size=64)), store)
    place = {survey.name(i): i for i in range(len(survey.digests))}
    pairs = {tuple(sorted(place[name] for name in both)): k for both, k in names.items()}
    yield survey, features, pairs  # type: ignore[misc]


def test_all_planted_are_found_and_nothing_else(
    planted: tuple[Survey, np.ndarray, dict[tuple[int, int], str]],
) -> None:
    survey, features, pairs = planted
    assert sorted(set(pairs.values())) == sorted(KINDS)
    seen: list[tuple[int, int]] = []
    found = find_duplicates(
        survey.grey_NPP,
        features,
        survey.split_names(),
        progress=lambda done, total: seen.append((done, total)),
    )
    got = {(p.first, p.second): p for p in found}
    assert pairs.keys() <= got.keys(), [k for p, k in pairs.items() if p not in got]
    assert all(got[pair].mirrored == (kind == "flipped") for pair, kind in pairs.items())
    split = survey.split_names()
    assert all({split[i], split[j]} == {"train", "test"} for i, j in pairs)
    inside = {i for pair in pairs for i in pair}
    flagged = {i for pair in got.keys() - pairs.keys() for i in pair} - inside
    assert len(flagged) <= 0.01 * (len(split) - len(inside))
    assert seen[0] == (len(split), len(split)), "a set as small as this is one block"
    assert [done for done, _ in seen[1:]] == list(range(1, seen[-1][1] + 1))
    scores = [p.score for p in found]
    assert scores == sorted(scores, reverse=True)


def test_hashes_are_the_signs_of_the_low_frequencies(
    planted: tuple[Survey, np.ndarray, dict[tuple[int, int], str]],
) -> None:
    grey = planted[0].grey_NPP[:3]
    plain, mirrored = hashes(grey)
    assert plain.shape == (3, 64)
    assert np.array_equal(mirrored, hashes(np.stack([mirror(image) for image in grey]))[0])
    half = grey[0].reshape(32, 2, 32, 2).mean(axis=(1, 3))  # close to the hash's own resizing
    low = dctn(half)[:8, :8]
    assert ((low > np.median(low)).ravel() == plain[0]).mean() > 0.95


def test_candidates_are_nearest_by_either_signal() -> None:
    rng = np.random.default_rng(0)
    bits, mirrored = rng.random((2, 60, 64)) < 0.5
    features = rng.normal(size=(60, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    mirrored[33] = bits[7]
    mirrored[7] = bits[33]
    features[50] = features[21]
    split = np.array(["train", "test"])[np.arange(60) % 2]
    found = candidates(bits, mirrored, features, split)
    pairs = set(map(tuple, found.tolist()))
    assert len(pairs) == len(found) and (found[:, 0] < found[:, 1]).all()
    assert {(7, 33), (21, 50)} <= pairs
    across = [split[i] != split[j] for i, j in pairs]
    assert 0.4 < np.mean(across) < 0.6
    counts = np.bincount(found.ravel(), minlength=60)
    assert counts.min() >= 12  # 6 in the own split and 6 outside, by at least one signal


def test_few_images() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 64, 64), np.uint8)
    feats = np.eye(2)
    assert find_duplicates(grey[:1], feats[:1], np.array(["test"])) == []
    assert find_duplicates(grey, feats, np.array(["test", "test"])) == []
    (pair,) = find_duplicates(grey[[0, 0]], feats, np.array(["train", "test"]))
    assert (pair.first, pair.second, pair.score, pair.hash_distance) == (0, 1, 1.0, 0)
