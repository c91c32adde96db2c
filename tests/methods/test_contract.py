"""What every method must hold to: each file in flowerray/methods, and one that a test drops in."""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowerray import methods
from flowerray.errors import UserError
from flowerray.methods._base import Method, MethodConfig
from tests.methods.cases import (
    CLASSES,
    DIM,
    VARIANTS,
    StandIn,
    build,
    global_batch,
    gradients,
    images_of,
    labels_of,
    run_rank,
    two_steps,
    units,
)
from tests.train_process import exit_code, fork

COMMON = {"d_ap", "d_an", "active", "spread"}
DEGENERATE = {
    "no positive": [0, 1, 2, 3],
    "no negative": [2, 2, 2, 2],
    "one image": [1],
    "one positive pair": [0, 0, 1, 2],
}


def check_file(name: str, fields: dict[str, Any]) -> None:
    """The docstring names its source, the export a file, the space fields and allowed values."""
    record = methods.get(name)
    assert record.name == name
    assert record.summary and len(record.summary) <= 100
    module = sys.modules[record.method.__module__]
    assert re.search(r"arXiv:\d{4}\.\d{5}|[A-Z]{4} (\w+ )*\d{4}", module.__doc__ or "")
    assert re.fullmatch(r"[a-z_]+", record.export_name)
    assert getattr(record.method, "__final__", False), "methods are not subclassed"
    assert issubclass(record.config, MethodConfig) and record.config.model_config["frozen"]
    for field in record.config.model_fields.values():
        assert field.description, "each field has a docstring"
    for key, choice in record.space.items():
        part, _, field_name = key.partition(".")
        assert part == "method" and field_name in record.config.model_fields
        values = choice["choices"] if "choices" in choice else [choice["low"], choice["high"]]
        assert set(choice) in ({"choices"}, {"low", "high", "log"})
        assert len(values) >= 2
        for value in values:
            record.config(**{field_name: value})
        if choice.get("log"):
            assert choice["low"] > 0
        if "low" in choice:
            assert choice["low"] < choice["high"]


def check_output(name: str, fields: dict[str, Any]) -> None:
    """forward gives a scalar in the graph, detached curves with the common names, the batch."""
    method = build(name, **fields)
    labels_B = labels_of(16, 0)
    output = method(images_of(labels_B), labels_B)
    total, curves, over_all = output.loss
    if over_all is not None:
        assert over_all.shape == () and not over_all.requires_grad
        assert 0 <= over_all <= total + 1e-12  # tuples that cause no loss dilute it
    assert total.shape == () and total.requires_grad and total.isfinite()
    assert set(curves) >= COMMON
    for value in curves.values():
        assert value.shape == () and not value.requires_grad and value.isfinite()
    assert 0 <= curves["active"] <= 1 and 0 < curves["spread"] <= 1
    assert output.emb_BD.shape == (16, DIM) and not output.emb_BD.requires_grad
    assert torch.equal(output.labels_B, labels_B)
    total.backward()
    assert any(g.abs().max() > 0 for g in gradients(method).values())


def check_common_curves(name: str, fields: dict[str, Any]) -> None:
    """d_ap, d_an and spread equal a loop over pairs."""
    emb_BD, labels_B = F.normalize(units(9, 1)).detach(), labels_of(9, 1, 3)
    curves = build(name, **fields).loss(emb_BD, labels_B).curves
    ap: list[float] = []
    an: list[float] = []
    for i in range(9):
        for j in range(9):
            if i != j:
                (ap if labels_B[i] == labels_B[j] else an).append(math.dist(emb_BD[i], emb_BD[j]))
    assert curves["d_ap"] == pytest.approx(sum(ap) / len(ap))
    assert curves["d_an"] == pytest.approx(sum(an) / len(an))
    middle = emb_BD.mean(0)
    spread = math.sqrt(sum(math.dist(row, middle) ** 2 for row in emb_BD) / 9)
    assert curves["spread"] == pytest.approx(spread)


def check_pure(name: str, fields: dict[str, Any]) -> None:
    """A function of embeddings, labels and seed; it touches no state and no global RNG."""
    method = build(name, **fields)
    emb_BD, labels_B = F.normalize(units(16, 2)), labels_of(16, 2)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.seed = (1, 2, 3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = method.loss(emb_BD, labels_B)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = method.loss(emb_BD, labels_B)
    assert torch.equal(first.total, again.total)
    assert all(torch.equal(first.curves[k], again.curves[k]) for k in first.curves)
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())
    assert emb_BD.grad_fn is not None


def check_order_does_not_matter(name: str, fields: dict[str, Any]) -> None:
    """A batch reordered with its labels has the same loss, unlike in the notebooks.

    Where tuples are drawn, by place in the batch, it is the mean over draws that is the same.
    """
    method = build(name, **fields)
    emb_BD, labels_B = F.normalize(units(16, 3)).detach(), labels_of(16, 3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    drawn = {"random", "distance-weighted", "balanced"}
    draws = 150 if drawn & set(map(str, method.config.model_dump().values())) else 1

    def losses(emb_BD: Tensor, labels_B: Tensor, first: int) -> Tensor:
        totals = []
        for seed in range(first, first + draws):
            method.seed = (seed,)
            totals.append(method.loss(emb_BD, labels_B).total.detach())
        return torch.stack(totals)

    whole, turned = losses(emb_BD, labels_B, 0), losses(emb_BD[order], labels_B[order], 1000)
    wrong = losses(emb_BD[order], labels_B, 1000)
    error = 0.0
    if draws > 1:
        assert len(whole.unique()) > draws / 2
        error = float((whole.var() / draws + turned.var() / draws).sqrt())
    assert whole.mean().item() == pytest.approx(turned.mean().item(), abs=4 * error + 1e-9)
    assert abs(whole.mean() - wrong.mean()) > 5 * error + 1e-3


def check_degenerate(name: str, fields: dict[str, Any]) -> None:
    """No positives, no negatives, one point: finite, in the graph, no NaN in the gradient."""
    for labels in DEGENERATE.values():
        for same_point in (False, True):
            method = build(name, **fields)
            raw_BD = units(len(labels), 4)
            if same_point:
                raw_BD = raw_BD.detach()[:1].repeat(len(labels), 1).requires_grad_()
            loss = method.loss(F.normalize(raw_BD), torch.tensor(labels))
            assert loss.total.isfinite() and loss.total.requires_grad
            assert all(value.isfinite() for value in loss.curves.values())
            loss.total.backward()
            assert raw_BD.grad is not None and raw_BD.grad.isfinite().all()
            if same_point:
                assert loss.curves["spread"] < 1e-7


def check_nan_is_seen(name: str, fields: dict[str, Any]) -> None:
    """A broken embedding gives a loss that is not finite, never the 0 of a solved batch."""
    labels_B = torch.arange(8) % 2
    for broken in (slice(3, 4), slice(None)):
        emb_BD = F.normalize(units(8, 5)).detach()
        emb_BD[broken] = math.nan
        assert not build(name, **fields).loss(emb_BD, labels_B).total.isfinite()


def check_autocast(name: str, fields: dict[str, Any]) -> None:
    """Under bfloat16 autocast the loss is the float32 loss of the same embeddings."""
    method = build(name, **fields).float()
    emb_BD, labels_B = F.normalize(units(16, 6, dtype=torch.float32)).detach(), labels_of(16, 6)
    plain = method.loss(emb_BD, labels_B).total
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.loss(emb_BD, labels_B).total
        whole = method(images_of(labels_B).float(), labels_B)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)
    assert whole.loss.total.dtype == torch.float32 and whole.emb_BD.dtype == torch.float32
    half = method.loss(emb_BD.bfloat16(), labels_B).total
    assert half.dtype == torch.float32
    method.after_step(whole)


def check_gradient(name: str, fields: dict[str, Any]) -> None:
    """The gradient by the images equals finite differences."""
    method = build(name, **fields)
    method.seed = (4,)
    labels_B = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    images = images_of(labels_B, seed=7).requires_grad_()
    torch.autograd.gradcheck(
        lambda x: method(x, labels_B).loss.total, images, eps=1e-7, atol=1e-5, fast_mode=True
    )


def check_learns(name: str, fields: dict[str, Any]) -> None:
    """Sixty steps bring classes together, on images that were not trained on: 1-NN improves."""
    method = build(name, **fields)
    labels_B = torch.arange(80) % CLASSES
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)

    def recall() -> float:
        with torch.no_grad():
            emb_BD = method.embedder(images_of(labels_B, seed=0)[40:])
        near = (emb_BD @ emb_BD.T).fill_diagonal_(-2).argmax(1)
        return float((labels_B[40:][near] == labels_B[40:]).double().mean())

    before = recall()
    for step in range(60):
        method.seed = (0, 0, step)
        output = method(images_of(labels_B, seed=0)[:40], labels_B[:40])
        optimizer.zero_grad()
        output.loss.total.backward()
        optimizer.step()
        method.after_step(output)
    assert recall() >= min(1.0, before + 0.15), (before, recall())


def check_state(name: str, fields: dict[str, Any]) -> None:
    """A state_dict carries all that a further step needs."""
    images, labels_B = global_batch()
    method = build(name, **fields)
    two_steps(method, method, images, labels_B)
    other = build(name, **fields)
    other.load_state_dict(method.state_dict())
    ends = [two_steps(m, m, images, labels_B) for m in (method, other)]
    assert all(torch.equal(v, ends[1]["state"][k]) for k, v in ends[0]["state"].items())


CHECKS: list[Callable[[str, dict[str, Any]], None]] = [
    value for key, value in list(globals().items()) if key.startswith("check_")
]


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str, dict[str, Any]], None], case: str) -> None:
    check(*VARIANTS[case])


def test_every_method_is_tested() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(methods.names())


def test_export_names_are_the_promised_ones() -> None:
    exports = {name: methods.get(name).export_name for name in methods.names()}
    assert exports == {
        "center": "center_loss",
        "siamese": "siamese_network",
        "triplet": "triplet_loss",
    }


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(UserError, match="no method 'quadruplet'.*center, siamese, triplet"):
        methods.get("quadruplet")
    with pytest.raises(UserError):
        methods.get("_base")


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from flowerray import methods; methods.names(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


FOURTH = '''
"""N-pair loss: softmax over the batch's similarities. Sohn, NIPS 2016.   B images, D dims"""

from typing import final
import torch.nn.functional as F
from torch import Tensor
from pydantic import Field
from flowerray.methods._base import (
    Loss, Method, MethodConfig, common_curves, distances, mean_where, pair_masks)

EXPORT_NAME = "n_pair_loss"

class Config(MethodConfig):
    """The N-pair loss."""
    scale: float = Field(8.0, gt=0)
    """Factor from cosine (-1..1) to logit."""

space = {"method.scale": {"low": 4.0, "high": 32.0, "log": True}}

@final
class NPair(Method):
    def loss(self, emb_BD, labels_B):
        emb_BD = emb_BD if emb_BD.dtype.itemsize > 4 else emb_BD.float()
        dist_BB = distances(emb_BD)
        positive_BB, negative_BB = pair_masks(labels_B)
        logits_BB = self.config.scale * (1 - dist_BB**2 / 2)
        others_B1 = logits_BB.where(negative_BB, -1e9).logsumexp(1, keepdim=True)
        total = mean_where(F.softplus(others_B1 - logits_BB), positive_BB)
        wrong = (others_B1 > logits_BB).to(emb_BD.dtype).detach()
        return Loss(total, common_curves(emb_BD, labels_B, dist_BB, mean_where(wrong, positive_BB)))
'''


def test_a_fourth_method_is_one_dropped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "npair.py").write_text(FOURTH)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        assert methods.names() == ["center", "npair", "siamese", "triplet"]
        assert methods.get("npair").summary.startswith("N-pair loss")
        for check in CHECKS:
            check("npair", {})
    finally:
        sys.modules.pop("flowerray.methods.npair", None)
    monkeypatch.undo()
    assert "npair" not in methods.names()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Loss, gradients, centers and weights after two steps under DDP are those of one process."""
    processes = [fork(run_rank, rank, 2, str(tmp_path)) for rank in range(2)]
    assert [exit_code(process) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    images, labels_B = global_batch()
    for case, (name, fields) in VARIANTS.items():
        method = build(name, **fields)
        alone = two_steps(method, method, images, labels_B)
        assert any(g.abs().max() > 1e-4 for g in alone["gradients"].values()), case
        for results in ranks:
            there = results[case]
            assert torch.equal(there["labels"], labels_B)
            assert there["loss"] == pytest.approx(alone["loss"].item(), abs=1e-10), case
            for group in ("gradients", "state", "curves"):
                assert there[group].keys() == alone[group].keys()
                for key, value in alone[group].items():
                    torch.testing.assert_close(
                        there[group][key], value, rtol=0, atol=1e-10, msg=f"{case} {group} {key}"
                    )


GOLDEN = {
    "center": 1.7376054070426319,
    "siamese": 0.837373077386468,
    "siamese-balanced": 1.012803088885761,
    "siamese-bce": 1.5539698778123714,
    "triplet": 0.23697224050865823,
    "triplet-soft": 0.6872537232046231,
    "triplet-random": 0.1902055223113905,
    "triplet-all": 0.19600643542994461,
    "triplet-semi-hard": 0.0999329531837609,
}
"""The loss of the fifth step in float64, as version 0.1.0 computed it."""


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_losses(case: str) -> None:
    """What a refactoring must not move: formula, draws by seed, center updates."""
    name, fields = VARIANTS[case]
    method, labels_B = build(name, **fields), torch.arange(24) // 3 % CLASSES
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    for step in range(5):
        method.seed = (3, 0, step)
        output = method(images_of(labels_B, seed=5), labels_B)
        optimizer.zero_grad()
        output.loss.total.backward()
        optimizer.step()
        method.after_step(output)
    assert output.loss.total.item() == pytest.approx(GOLDEN[case], rel=1e-9)


def test_seeds_give_different_draws() -> None:
    record = methods.get("triplet")
    embedder: Any = StandIn()
    method: Method = record.method(record.config(), embedder, CLASSES)
    draws = set()
    for seed in range(3):
        for epoch in range(3):
            for step in range(30):
                method.seed = (seed, epoch, step)
                draws.add(torch.rand(1, generator=method.generator()).item())
    assert len(draws) == 270


def test_methods_are_documented_in_public() -> None:
    for name in methods.names():
        method = methods.get(name).method
        assert inspect.getdoc(method) and inspect.getdoc(method.loss)
