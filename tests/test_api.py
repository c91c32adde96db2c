"""The public Python API, as a program uses it that knows only `import flowerray`."""

import ast
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import flowerray as fr
from flowerray.data.images import eval_image
from flowerray.model.embedder import Embedder
from tests.small import OPTIONS

PACKAGE = Path(fr.__file__).parent


@pytest.fixture(scope="module")
def embedder(small_run: Path) -> Embedder:
    return fr.load(small_run)


@pytest.fixture(scope="module")
def photographs(small_set: Path) -> list[Path]:
    return sorted((small_set / "jpg").iterdir())


def test_names_are_no_files_and_all_are_there() -> None:
    files = {p.stem for p in PACKAGE.iterdir()}
    modules = {"losses", "methods"}
    assert not (set(fr.__all__) - modules) & files, "an imported submodule would replace it"
    assert all(getattr(fr, name) is not None for name in fr.__all__) and dir(fr) == fr.__all__
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowerray")
        for alias in node.names
    }
    assert typed - {"description"} == set(fr.__all__) - {"__version__"}
    assert (PACKAGE / "py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        fr.fit  # noqa: B018


def test_embed_takes_what_holds_a_photograph(embedder: Embedder, photographs: list[Path]) -> None:
    path = photographs[0]
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    array = np.array(image)
    byte_CHW = torch.from_numpy(array).permute(2, 0, 1)
    emb_ND = fr.embed(embedder, [str(path), path, image, array, byte_CHW, byte_CHW.float() / 255])
    pixels = torch.from_numpy(eval_image(path, embedder.image_size)).float() / 255
    with torch.no_grad():
        expected_1D = embedder(pixels[None])
    assert emb_ND.dtype == torch.float32 and not emb_ND.is_inference()
    torch.testing.assert_close(emb_ND[:5], expected_1D.expand(5, -1), atol=1e-6, rtol=0)
    assert float(emb_ND[5] @ expected_1D[0]) > 0.999  # bytes are not rounded in between
    assert float(emb_ND[5] @ expected_1D[0]) > max(
        float(fr.embed(embedder, [other])[0] @ expected_1D[0]) for other in photographs[1:6]
    )


def test_embed_applies_exif_and_does_not_care_for_batches(
    embedder: Embedder, photographs: list[Path], tmp_path: Path
) -> None:
    with Image.open(photographs[0]) as opened:
        exif = opened.getexif()
        exif[0x0112] = 6
        opened.save(turned := tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(turned) as image:
        a_D, b_D = fr.embed(embedder, [turned, image])
    assert torch.equal(a_D, b_D)
    three = fr.embed(embedder, photographs[:5], batch_size=3)
    torch.testing.assert_close(three, fr.embed(embedder, photographs[:5]), atol=1e-6, rtol=0)
    assert fr.embed(embedder, []).shape == (0, embedder.dim)


def test_embed_leaves_no_trace(embedder: Embedder, photographs: list[Path]) -> None:
    embedder.train()
    modes = [module.training for module in embedder.modules()]
    fr.embed(embedder, photographs[:1])
    assert [module.training for module in embedder.modules()] == modes
    embedder.eval()


@pytest.mark.parametrize(
    ("photo", "said"),
    [
        ("nowhere.jpg", "is not there"),
        (torch.full((3, 40, 40), 200.0), r"in \[0,1\], and one was given .* from 200 to 200"),
        (torch.rand(40, 40), r"given of shape \(40, 40\)"),
        (np.zeros((40, 40, 3)), r"ndarray float64 \(40, 40, 3\)"),
        (3, "given as int"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (torch.zeros(3, 0, 0), "no pixels"),
        (Image.new("F", (9, 9)), "32-bit numbers"),
    ],
)
def test_what_is_no_photograph(photo: object, said: str, embedder: Embedder) -> None:
    with pytest.raises(fr.UserError, match=said):
        fr.embed(embedder, [photo])  # type: ignore[list-item]


def test_one_photograph_is_no_list(embedder: Embedder, photographs: list[Path]) -> None:
    image = Image.open(photographs[0])
    for photo in (photographs[0], str(photographs[0]), image, np.asarray(image)):
        with pytest.raises(fr.UserError, match="give a list of them"):
            fr.embed(embedder, photo)  # type: ignore[arg-type]
    assert len(fr.embed(embedder, np.array([str(p) for p in photographs[:2]]))) == 2
    for size in (0, -1, 2.5):
        with pytest.raises(fr.UserError, match="`batch_size` = "):
            fr.embed(embedder, photographs[:2], batch_size=size)  # type: ignore[arg-type]


def test_evaluate_refuses_what_is_no_label() -> None:
    """NaN would be a class like another: R@1 of unlabelled rows would be 1."""
    emb_ND = np.eye(4)
    lost: Any = [np.nan] * 4, [0.0, 0.0, 1.0, np.nan], ["a", "a", None, "b"]
    for labels in lost:
        with pytest.raises(fr.UserError, match=r"label of row \d is (nan|None): give each row"):
            fr.evaluate(emb_ND, labels)
    for gallery in (emb_ND, torch.eye(4), (emb_ND, [0] * 4, 1)):
        with pytest.raises(fr.UserError, match=r"`gallery` is a pair: \(embeddings, labels\)"):
            fr.evaluate(emb_ND, [0, 0, 1, 1], gallery=gallery)  # type: ignore[arg-type]
    found = fr.evaluate(emb_ND, [0, 0, 1, 1], ks=np.array([1, 3]))  # type: ignore[arg-type]
    assert found.metrics["recall_at_3"] == 1
    with pytest.raises(fr.UserError, match="integers K of at least 1"):
        fr.evaluate(emb_ND, [0, 0, 1, 1], ks=(1.5,))  # type: ignore[arg-type]


def test_evaluate_needs_no_run() -> None:
    rng = np.random.default_rng(0)
    labels_Q = np.array(list("abcd") * 15)
    middles = {c: rng.normal(size=8) for c in "abcd"}
    emb_QD = np.stack([middles[c] + rng.normal(size=8) for c in labels_Q])
    own = fr.evaluate(emb_QD, labels_Q, ks=(1, 3))
    by_hand = 0.0
    for q, row in enumerate(emb_QD):
        away = ((emb_QD - row) ** 2).sum(1)
        away[q] = np.inf
        by_hand += labels_Q[away.argmin()] == labels_Q[q]
    assert own.metrics["recall_at_1"] == pytest.approx(by_hand / 60)
    assert own.intervals["map_at_r"].low < own.metrics["map_at_r"] < own.intervals["map_at_r"].high
    shown = str(own)
    assert shown.startswith("60 queries, gallery of 60 images") and "R@3" in shown
    assert f"MAP@R                 {own.metrics['map_at_r']:.3f} [" in shown
    assert json.loads(json.dumps(own.to_dict()))["intervals"]["recall_at_1"]["n"] == 60

    half = slice(0, 30), slice(30, 60)
    parted = fr.evaluate(
        torch.from_numpy(emb_QD[half[0]]), labels_Q[half[0]], gallery=(emb_QD[half[1]],
                                                                      labels_Q[half[1]])
    )  # fmt: skip
    assert parted.metrics["num_gallery"] == 30 and parted.metrics["num_queries"] == 30
    with pytest.raises(fr.UserError, match="no query has an image of its class"):
        fr.evaluate(emb_QD[:2], ["x", "y"], gallery=(emb_QD, labels_Q))


class Net(nn.Module):
    """A module of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return F.normalize(self.drop(self.layer(images_BCHW.flatten(1))))


def test_attack_any_module() -> None:
    torch.manual_seed(0)
    net, labels_G = Net(), [c for c in "abc" for _ in range(4)]
    images_BCHW = torch.rand(12, 3, 8, 8)
    with torch.no_grad():
        emb_GD = net.eval()(images_BCHW)
    state = torch.get_rng_state()
    net.train()
    moved_BCHW = fr.attack(net, images_BCHW, labels_G, gallery=(emb_GD, labels_G), eps=8, steps=5)
    assert net.training and all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert moved_BCHW.shape == images_BCHW.shape and not moved_BCHW.requires_grad
    assert 0 < (moved_BCHW - images_BCHW).abs().max() <= 8 / 255 + 1e-6
    net.eval()
    recall = fr.evaluate(net(moved_BCHW).detach(), labels_G, gallery=(emb_GD, labels_G))
    assert recall.metrics["recall_at_1"] < 1  # clean images find themselves
    with pytest.raises(fr.UserError, match="no unit vectors"):
        fr.attack(net, images_BCHW, labels_G, gallery=(2 * emb_GD, labels_G), eps=8)
    with pytest.raises(fr.UserError, match="12 images have 3 labels"):
        fr.attack(net, images_BCHW, labels_G[:3], gallery=(emb_GD, labels_G), eps=8)
    with pytest.raises(fr.UserError, match="no image of class rose"):
        fr.attack(net, images_BCHW, ["rose"] * 12, gallery=(emb_GD, labels_G), eps=8)
    wrong: Any = images_BCHW.numpy(), images_BCHW[0], (255 * images_BCHW).byte()
    for pixels in wrong:
        with pytest.raises(fr.UserError, match=r"`images_BCHW` is a float32 or float64 tensor"):
            fr.attack(net, pixels, labels_G, gallery=(emb_GD, labels_G), eps=8)
    with pytest.raises(fr.UserError, match="`gallery` is a pair"):
        fr.attack(net, images_BCHW, labels_G, gallery=emb_GD, eps=8)
    with pytest.raises(fr.UserError, match="`seed` = -1"):
        fr.attack(net, images_BCHW, labels_G, gallery=(emb_GD, labels_G), eps=8, seed=-1)


def test_explain_pair(embedder: Embedder, photographs: list[Path], tmp_path: Path) -> None:
    found = fr.explain_pair(embedder, photographs[0], np.asarray(Image.open(photographs[1])))
    a_D, b_D = fr.embed(embedder, photographs[:2])
    pair = found.pair
    assert pair.similarity == pytest.approx(float(a_D @ b_D), abs=1e-5)
    if pair.method == "decomposition":
        assert pair.maps_2HW.sum((1, 2)) == pytest.approx([pair.similarity] * 2, abs=1e-4)
    with Image.open(found.save(tmp_path / "pair.png")) as picture:
        assert picture.width > 500
    with pytest.raises(fr.UserError, match="choose another `path`"):
        found.save(tmp_path)
    with pytest.raises(fr.UserError, match="`method` = 'magic': choose one of"):
        fr.explain_pair(embedder, *photographs[:2], method="magic")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"epochs": 0}, "^`train.epochs` = 0"),
        ({"train": {"foo": 3}}, "^there is no option `train.foo`"),
        ({"train": 3}, "^`train` = 3"),
        ({"method": 5}, "^`method` = 5: give its options"),
        ({"method": {"margin": -1}}, "^`margin` = -1"),
        ({"embedder": "resnet"}, "^`embedder` = 'resnet': give its options"),
    ],
)
def test_train_says_which_option(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In the caller's words: no file was written by another version."""
    with pytest.raises(fr.UserError, match=said):
        fr.train("triplet", out=tmp_path / "run", quiet=True, **words)


def test_train_in_ones_own_program(small_set: Path, tmp_path: Path) -> None:
    """The small RUN again: equal weights, and the caller's own random numbers are his."""
    parts: dict[str, Any] = {"embedder": {}, "train": {}, "resources": {}}
    for name, value in OPTIONS.items():
        part, _, field = name.partition(".")
        parts[part][field.replace("-", "_")] = value
    del parts["resources"]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    run = fr.train(
        "triplet", data=small_set, out=tmp_path / "run", epochs=1, method={"margin": 0.3},
        quiet=True, **parts,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert random.getstate() == states[2]
    content = json.loads((run.folder / "run.json").read_text())
    assert content["method"]["margin"] == 0.3 and content["train"]["epochs"] == 1
    assert content["resources"]["workers"] == 0
    assert run.figures["steps"] == 6 and not run.model.training
    with pytest.raises(fr.UserError, match="exists already"):
        fr.train("triplet", out=run.folder)
    with pytest.raises(fr.UserError, match="there is no option `tempo`"):
        fr.train("triplet", tempo=3)
    with pytest.raises(fr.UserError, match=r"`train\.epochs` = 0: input should be greater"):
        fr.train("triplet", epochs=0)
