"""What is done with a model on a GPU: measured, attacked, explained, timed, opened elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import flowerray
from flowerray.attacks.bank import NAMES, BankConfig, StandardConfig, run
from flowerray.attacks.pgd import Norm
from flowerray.cluster.driver import train_run
from flowerray.data.source import DataConfig
from flowerray.opening import Model, open_model
from flowerray.rendered.synthetic import SyntheticConfig
from flowerray.retrieval.command import evaluate_model
from flowerray.retrieval.measure import EvaluateConfig
from flowerray.retrieval.search import retrieval_per_query
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from tests.attacks.batch import Batch, batch, tiny
from tests.small import small, words

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
Say = Callable[..., tuple[str, str]]


def put(run: Run, device: torch.device) -> Run:
    """The run on that device."""
    kind = {"device": device.type}
    return run.model_copy(update={"resources": run.resources.model_copy(update=kind)})


@pytest.fixture(scope="module")
def trained(
    device: torch.device, small_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished RUN."""
    out = tmp_path_factory.mktemp("there") / "run"
    train_run(put(small(small_set), device), out, quiet=True)
    return out


@pytest.fixture
def model(trained: Path, device: torch.device) -> Model:
    return open_model(str(trained), device)


def test_evaluation_is_the_cpus(model: Model, trained: Path) -> None:
    found = [
        evaluate_model(one, one.run.data, False, EvaluateConfig(), quiet=True).metrics
        for one in (model, open_model(str(trained), CPU))
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        assert found[0][name] == pytest.approx(value, abs=0.02), name  # a neighbour of 60 or so


def test_an_export_opens_on_both(model: Model, trained: Path) -> None:
    images_BCHW = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    here = flowerray.load(trained)
    with torch.no_grad():
        parameter = next(model.embedder.parameters())
        there = model.embedder(images_BCHW.to(parameter.device)).cpu()
        assert next(here.parameters()).device == CPU
        assert torch.allclose(here(images_BCHW), there, atol=1e-3)
    file = RunDir(trained).last / "state.pt"
    content = torch.load(file, weights_only=True, map_location="cpu")
    assert all(value.isfinite().all() for value in content["method"].values())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_attacks_break_what_they_break_on_the_cpu(
    device: torch.device, name: str, norm: Norm
) -> None:
    """Within the budget; random choices of the library's own attacks differ between devices."""
    made = batch(tiny(), side=32, queries=24)
    budget = BankConfig(
        steps=4, restarts=1, targets=2, black_box_queries=20, minimum_steps=4,
        standard=StandardConfig(steps=4, targets=2, queries=20),
    )  # fmt: skip
    epsilon, right = 4.0 if norm == "linf" else 100.0, []
    for place in (device, CPU):
        tensors = [tensor.to(place) for tensor in made[1:]]
        there = Batch(made.embedder.to(place), *tensors)
        moved_QCHW = run(
            name, there.embedder, there.images_QCHW, there.labels_Q, there.gallery_GD,
            there.gallery_labels_G, norm=norm, epsilon=epsilon, budget=budget, seed=0,
        ).cpu()  # fmt: skip
        made.embedder.to(CPU)
        delta_QP = (moved_QCHW - made.images_QCHW).flatten(1)
        length_Q = delta_QP.abs().amax(1) if norm == "linf" else delta_QP.norm(dim=1)
        assert float(length_Q.max()) <= epsilon / 255 + 1e-5
        right.append(int(made.right(moved_QCHW).sum()))
    assert abs(right[0] - right[1]) <= max(3, len(made.labels_Q) // 5)


def test_every_command_runs(trained: Path, say: Say, tmp_path: Path, small_set: Path) -> None:
    first, second = sorted((small_set / "jpg").glob("*.jpg"))[:2]
    assert 0 <= json.loads(say("evaluate", trained, "--json")[0])["recall_at_1"] <= 1
    quick = ["--eps", "0,8", "--max-queries", 6, "--steps", 4, "--restarts", 1]
    attacked = json.loads(say("attack", trained, "--attacks", "pgd,apgd-ce", *quick, "--json")[0])
    assert attacked["device"] in ("cpu", "cuda:0", "cuda")
    assert "same class" in say("similar", trained, first, first)[0]
    assert say(
        "search",
        trained,
        first,
        "--gallery",
        small_set,
        "--top",
        3,
        "--sheet",
        tmp_path / "sheet.png",
    )[0]
    say("explain", trained, first, second, "--concepts", 0, "--out", tmp_path / "why")
    say("explain", trained, "--max-images", 6, "--out", tmp_path / "judged")
    say("explore", small_set, "--run", trained, "--out", tmp_path / "explored")


def test_neighbours_are_the_cpus(device: torch.device) -> None:
    """Exact on both, ties by gallery index: the same rows in the same order."""
    rng = np.random.default_rng(0)
    emb_ND = rng.integers(-3, 4, (3000, 8)).astype(np.float32)  # many equal distances
    labels_N = rng.integers(0, 30, 3000)
    here = retrieval_per_query(emb_ND, labels_N)
    there = retrieval_per_query(torch.from_numpy(emb_ND).to(device), labels_N)
    assert all(np.array_equal(there[name], value) for name, value in here.items())


def test_bf16_trains_as_well(device: torch.device, tmp_path: Path) -> None:
    """Val R@1 within 2 points of fp32, 400 queries of 40 rendered classes; a CPU, where bf16 can be
    very slow, has 8 classes.
    """
    classes, epochs, lost = (8, 3, 0.1) if device.type == "cpu" else (40, 12, 0.02)
    synthetic = SyntheticConfig(classes=classes, scale=0.01, size=72)
    found = []
    for precision in ("fp32", "bf16"):
        run = small(
            tmp_path, epochs=epochs, classes_per_batch=classes // 2, precision=precision, lr=3e-4
        )
        embedder = {"backbone": "tf_efficientnet_lite0", "weights": "bundled", "image_size": 64}
        update = {
            "data": DataConfig(synthetic=synthetic),
            "embedder": run.embedder.model_copy(update=embedder),
        }
        out = tmp_path / precision
        train_run(put(run.model_copy(update=update), device), out, quiet=True)
        found.append(max(value for _, value in RunDir(out).series("val/recall_at_1")))
    assert found[0] > 2 / classes and found[1] >= found[0] - lost


@pytest.mark.ray
def test_a_ray_worker_trains_on_it(
    device: torch.device, small_set: Path, tmp_path: Path, say: Say
) -> None:
    """From the command line to the export, with one Ray Train worker."""
    pytest.importorskip("ray")
    more = {"resources__workers": 1, "resources__device": device.type}
    say("train", "triplet", *words(small_set, **more), "--out", tmp_path / "run")
    assert flowerray.load(tmp_path / "run").dim == 16
    say("backbones", "--models", "test_efficientnet", "--random-weights", "--rounds", 1,
        "--data.root", small_set, "--image-size", 32, "--out", tmp_path / "backbones")  # fmt: skip
