"""The methods' losses in somebody's own loop."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flowerray as fr
from flowerray.methods import center, siamese, triplet
from tests.methods.cases import build, labels_of, units

MAKERS: dict[str, Any] = {
    "center": lambda **more: fr.losses.Center(5, 8, **more),
    "siamese": lambda **more: fr.losses.Contrastive(**more),
    "triplet": lambda **more: fr.losses.Triplet(**more),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_loss_is_the_methods_own(name: str) -> None:
    emb_BD, labels_B = F.normalize(units(24, 0)), labels_of(24, 0)
    loss, method = MAKERS[name]().double(), build(name)
    if name == "center":
        loss.method.load_state_dict(
            {k: v for k, v in method.state_dict().items() if not k.startswith("embedder.")}
        )
    for call in range(2):
        method.seed = (0, call)
        expected = method.loss(emb_BD, labels_B)
        total = loss(emb_BD, labels_B)
        assert total.shape == () and total.requires_grad and torch.equal(total, expected.total)
        assert loss.curves.keys() == expected.curves.keys()
        if name == "center":
            method.centers_CD.copy_(loss.method.centers_CD)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (fr.losses.Center, center.Config),
        (fr.losses.Contrastive, siamese.Config),
        (fr.losses.Triplet, triplet.Config),
    ],
)
def test_defaults_are_the_methods(kind: Any, config: Any) -> None:
    known = {n: p.default for n, p in inspect.signature(kind).parameters.items()}
    fields = config.model_fields.keys() & known.keys()
    assert fields == config.model_fields.keys() - {"head"}
    assert all(known[name] == config.model_fields[name].default for name in fields)


def test_successive_calls_draw_anew_and_a_loaded_state_goes_on() -> None:
    emb_BD, labels_B = F.normalize(units(24, 0)), labels_of(24, 0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loss = fr.losses.Triplet(margin=1.0)
    first = [loss(emb_BD, labels_B).item() for _ in range(4)]
    assert len(set(first)) == 4 and torch.equal(torch.get_rng_state(), state)
    again = fr.losses.Triplet(margin=1.0)
    assert [again(emb_BD, labels_B).item() for _ in range(2)] == first[:2]
    other = fr.losses.Triplet(margin=1.0)
    other.load_state_dict(again.state_dict())
    assert other(emb_BD, labels_B).item() == first[2]
    assert fr.losses.Triplet(margin=1.0, seed=1)(emb_BD, labels_B).item() != first[0]


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_loop_of_ones_own_learns(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.arange(60) % 5
    middle_CF = torch.randn(5, 12, generator=generator)
    points_BF = middle_CF[labels_B] + 1.5 * torch.randn(60, 12, generator=generator)
    torch.manual_seed(0)
    net, loss = torch.nn.Linear(12, 8), MAKERS[name]()
    optimizer = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=0.02)

    def recall() -> float:
        emb_BD = F.normalize(net(points_BF)).detach()
        return float(fr.evaluate(emb_BD, labels_B).metrics["map_at_r"])

    before = recall()
    for _ in range(40):
        total = loss(F.normalize(net(points_BF)), labels_B)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert recall() > before + 0.1


def test_centers_move_in_training_only() -> None:
    loss = fr.losses.Center(5, 8).double()
    emb_BD, labels_B = F.normalize(units(24, 0)), labels_of(24, 0)
    loss.eval()(emb_BD, labels_B)
    centers_CD = loss.method.centers_CD
    assert isinstance(centers_CD, torch.Tensor) and not centers_CD.any()
    loss.train()(emb_BD, labels_B)
    assert loss.method.centers_CD.any()  # type: ignore[operator]


def test_what_does_not_fit_is_said() -> None:
    loss = fr.losses.Contrastive()
    with pytest.raises(fr.UserError, match="normalise them first"):
        loss(torch.randn(4, 8), torch.arange(4))
    with pytest.raises(fr.UserError, match=r"given .*\(4, 8\) and torch.int64 \(3,\)"):
        loss(F.normalize(torch.randn(4, 8)), torch.arange(3))
    good_BD = F.normalize(torch.randn(4, 8), dim=1)
    for labels in ([0, 0, 1, 1], np.array([0, 0, 1, 1])):
        with pytest.raises(fr.UserError, match="as torch tensors"):
            loss(good_BD, labels)
    with pytest.raises(fr.UserError, match=r"and torch.float32 \(4,\)"):
        loss(good_BD, torch.rand(4))
    with pytest.raises(fr.UserError, match="`margin` = -1"):
        fr.losses.Triplet(margin=-1)


def test_the_center_loss_says_which_classes_it_has() -> None:
    loss, emb_BD = fr.losses.Center(4, 8), F.normalize(torch.randn(4, 8), dim=1)
    assert loss(emb_BD, torch.arange(4, dtype=torch.int32)).isfinite()
    for labels_B in (torch.arange(1, 5), torch.arange(-1, 3)):
        with pytest.raises(fr.UserError, match="`num_classes` = 4 they are 0 to 3"):
            loss(emb_BD, labels_B)
    with pytest.raises(fr.UserError, match="`emb_BD` has D = 6, and this loss `dim` = 8"):
        loss(F.normalize(torch.randn(4, 6), dim=1), torch.arange(4))
    for words in ((0, 8), (4, 0), (2.5, 8)):
        with pytest.raises(fr.UserError, match="give integers of at least 1"):
            fr.losses.Center(*words)
