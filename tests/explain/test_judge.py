"""Methods compared: the choice on some images, the scores on others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flowerray.errors import UserError
from flowerray.explain import baselines
from flowerray.explain.baselines import Saliency
from flowerray.explain.cam import CAMS, Explainer, upsample
from flowerray.explain.faithfulness import METRICS, FaithfulnessConfig
from flowerray.explain.judge import (
    SIGMAS,
    Subjects,
    choose,
    choose_gaussian,
    gains,
    intervals,
    judge,
    options,
)
from flowerray.explain.layers import Layer, find_layers
from flowerray.explain.localise import energy, iou, pointing
from tests.explain.cases import embed, embedder, images

CONFIG = FaithfulnessConfig(steps=2, images=3)
MODEL = embedder("test_resnet")


def subjects(masks: bool = True) -> Subjects:
    batch = images(18)
    mask = np.zeros((18, 64, 64), bool)
    mask[:, 10:40, 20:50] = True
    reference = embed(MODEL, batch).roll(1, 0).numpy()
    paths = tuple(Path(f"{n}.jpg") for n in range(18))
    labels = np.repeat(np.arange(6), 3)
    pixels = (batch * 255).to(torch.uint8)
    return Subjects(pixels, reference, mask if masks else None, paths, labels)


def test_options() -> None:
    layers = [Layer("a", 8, (4, 4)), Layer("b", 8, (40, 40))]  # the second one is too fine
    found = options(layers, True, None)
    assert len(found) == len(set(found)) == 2 + 2 * (len(CAMS) - 1)
    assert {e.layer for e in found} == {"", "a"}
    assert "eigencam" not in {e.method for e in found}
    assert {e.norm for e in options(layers, False, "hirescam")} == {"free", "held"}
    assert [e.layer for e in options(layers, True, "eigencam")] == ["a", "b"]
    assert options(layers, True, "decomposition") == [Explainer("decomposition")]


def test_the_choice_is_the_best_mean_score() -> None:
    given = subjects()
    choices = options(find_layers(MODEL), True, None)
    found = choose(MODEL, given, choices, CONFIG)
    assert {explainer for explainer, _ in found} == set(choices)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert given.masks_NHW is not None
    batch = given.images_NCHW.float() / 255
    for explainer, score in (found[0], found[len(found) // 2]):
        maps = explainer(MODEL, batch, torch.from_numpy(given.reference_ND))
        large = upsample(maps, 64)
        pairs = list(zip(large, given.masks_NHW, strict=True))
        expected = np.mean([(energy(m, k) + pointing(m, k)) / 2 for m, k in pairs])
        assert score == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="no layer that this method can be used at"):
        choose(MODEL, given, [], CONFIG)


def test_without_masks_faithfulness_chooses() -> None:
    given = subjects(masks=False)
    choices = [Explainer("decomposition"), Explainer("gradcam", "layer4")]
    found = choose(MODEL, given, choices, CONFIG)
    scores = judge(MODEL, given, {str(c): c for c in choices}, FaithfulnessConfig(steps=2))
    for explainer, score in found:
        rows = scores[str(explainer)]
        assert set(rows) == set(METRICS)
        assert score == pytest.approx((rows["insertion"] - rows["deletion"]).mean())


def test_judging_scores_each_image_as_it_is() -> None:
    given = subjects()
    methods: dict[str, Saliency] = {
        "ours": Explainer("gradcam", "layer3"),
        "edges": baselines.edges,
    }
    found = judge(MODEL, given, methods, CONFIG)
    assert given.masks_NHW is not None
    batch = given.images_NCHW.float() / 255
    for name, method in methods.items():
        maps = upsample(method(MODEL, batch, torch.from_numpy(given.reference_ND)), 64)
        for metric, score in (("energy", energy), ("pointing", pointing), ("iou", iou)):
            expected = [score(m, k) for m, k in zip(maps, given.masks_NHW, strict=True)]
            np.testing.assert_allclose(found[name][metric], expected, atol=0.02)
        assert len(found[name]["deletion"]) == 3
    assert intervals(found)["ours"]["energy"].n == 18


def test_gains_are_above_zero_where_the_first_is_better() -> None:
    better = {"energy": np.array([0.8, 0.9, 0.7] * 5), "deletion": np.array([0.1, 0.2, 0.15] * 5)}
    worse = {"energy": np.array([0.5, 0.5, 0.6] * 5), "deletion": np.array([0.4, 0.5, 0.3] * 5)}
    found = gains(better, {"other": worse})["other"]
    assert found["energy"].mean == pytest.approx(0.8 / 3) and found["energy"].low > 0
    assert found["deletion"].mean == pytest.approx(0.75 / 3) and found["deletion"].low > 0


def test_the_gaussian_is_tuned_too() -> None:
    given = subjects()
    assert given.masks_NHW is not None
    given.masks_NHW[:] = False
    given.masks_NHW[:, 28:36, 28:36] = True
    assert choose_gaussian(MODEL, given) == min(SIGMAS)


def test_images_of_each_class_in_turn() -> None:
    """The first 16 images of a sorted split are of one or two classes."""
    found = subjects()
    rows = found.spread(16)
    assert len(set(rows.tolist())) == 16
    assert found.labels_N[rows].tolist() == [*range(6), *range(6), *range(4)]
    pixels, reference = found.take(rows, torch.device("cpu"))
    assert torch.equal(pixels[5], found.images_NCHW[15].float() / 255)
    assert torch.equal(reference[5], torch.from_numpy(found.reference_ND[15]))
    assert len(found.batch(16, torch.device("cpu"))[0]) == 2
