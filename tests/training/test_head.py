"""A head on kept features: the same RUN, the same guarantees, none of the backbone's cost."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerray import load, methods
from flowerray.cli import dispatch
from flowerray.cli.options import parse_run
from flowerray.cluster import driver
from flowerray.cluster.driver import train_run
from flowerray.cluster.worker import train_worker
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder, EmbedderConfig, Head, start_from_pca
from flowerray.training.checkpoint import load_export
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir
from tests.small import small, with_hardening, words
from tests.train_process import largest_difference, train_as_one_and_as_two


def head_run(root: Path, method: str = "triplet", **more: Any) -> Run:
    """tests/small.py's run, of the head alone."""
    run = small(root, method, epochs=3, lr=1e-2)
    embedder = run.embedder.model_copy(update={"train": "head", **more})
    return run.model_copy(
        update={"embedder": embedder, "data": run.data.model_copy(update={"views": 2})}
    )


def test_a_head_embeds_as_its_embedder_does() -> None:
    embedder = Embedder(EmbedderConfig(backbone="test_efficientnet", weights="none", image_size=32))
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = embedder.eval().features(images)
        for scaled in (features, 7 * features):
            torch.testing.assert_close(Head(embedder)(scaled), embedder(images))


@pytest.mark.parametrize("method", methods.names())
def test_a_run_of_a_head(method: str, small_set: Path, tmp_path: Path) -> None:
    run = head_run(small_set, method)
    summary = train_run(run, tmp_path / "run", quiet=True)
    trained = load(tmp_path / "run")
    start = Embedder(run.embedder, seed=0)
    for name, value in start.backbone.state_dict().items():
        assert torch.equal(value, trained.backbone.state_dict()[name]), name
    assert not torch.equal(trained.projection.weight, start.projection.weight)
    series = RunDir(tmp_path / "run").series("epoch/loss")
    assert series[-1][1] < series[0][1]
    assert summary["epochs"] == 3 and 0 < summary["val_map_at_r"] < 1
    state = torch.load(tmp_path / "run/checkpoints/last/state.pt", weights_only=True)
    assert not [name for name in state["method"] if "backbone" in name]

    # All of it goes on from there: at a rate of nothing its first epoch ends where the head did.
    rest = small(small_set, method, epochs=1, lr=1e-12).model_copy(
        update={"init": tmp_path / "run"}
    )
    RunDir(tmp_path / "all").create(rest.to_dict())
    begun = train_worker(rest, FolderReporter(tmp_path / "all"), torch.device("cpu"))
    assert begun["val_map_at_r"] == pytest.approx(summary["val_map_at_r"], abs=1e-6)
    head, all_of_it = (load_export(tmp_path / name)["method"] for name in ("run", "all"))
    for name in head.keys() - {"centers_CD"}:  # which move without the optimizer
        torch.testing.assert_close(all_of_it[name], head[name])


def test_a_stopped_training_of_a_head_goes_on_to_the_same_bits(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = head_run(small_set, "center")
    train_run(run, tmp_path / "whole", quiet=True)
    report = FolderReporter.report

    def stop(self: FolderReporter, step: int, *words: Any, **more: Any) -> None:
        report(self, step, *words, **more)
        if step == 8:  # in the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderReporter, "report", stop)
    with pytest.raises(KeyboardInterrupt):
        train_run(run, tmp_path / "parts", quiet=True)
    monkeypatch.setattr(FolderReporter, "report", report)
    train_run(run, tmp_path / "parts", resume=True, quiet=True)
    files = [next((tmp_path / name).glob("*.pth")) for name in ("whole", "parts")]
    whole, parts = (torch.load(file, weights_only=True) for file in files)
    for part in ("embedder", "method"):
        assert largest_difference(whole[part], parts[part]) == 0
    assert whole["threshold"] == parts["threshold"]


def test_one_worker_and_two_train_the_same_head(job: dict[str, Any], tmp_path: Path) -> None:
    options = {
        **job, "methods": ["center", "triplet"], "head": True, "double": True,
        "train": {"epochs": 2, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3},
    }  # fmt: skip
    train_as_one_and_as_two(options, tmp_path)
    for method in options["methods"]:
        one, two = (
            torch.load(tmp_path / f"w{world}-{method}.pt", weights_only=True) for world in (1, 2)
        )
        assert largest_difference(one, two) < 1e-5


def test_pca_starts_with_whitened_components() -> None:
    rng = np.random.default_rng(0)
    features_NF = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    projection = torch.nn.Linear(12, 5, bias=False)
    start_from_pca(projection, torch.from_numpy(features_NF).float())
    weight_DF = projection.weight.detach().double().numpy()
    values, vectors = np.linalg.eigh(np.cov(features_NF.T))
    overlap = np.abs(weight_DF @ vectors[:, ::-1][:, :5]) / np.linalg.norm(weight_DF, axis=1)
    np.testing.assert_allclose(overlap, np.eye(5), atol=1e-3)
    covariance = np.cov(weight_DF @ features_NF.T)
    np.testing.assert_allclose(covariance / covariance[0, 0], np.eye(5), atol=1e-3)
    assert np.linalg.norm(weight_DF, axis=1).mean() == pytest.approx(1)


def test_few_features_leave_the_rest_of_the_start_as_it_is() -> None:
    rng = np.random.default_rng(0)
    projection = torch.nn.Linear(12, 6, bias=False)
    before = projection.weight.detach().clone()
    start_from_pca(projection, torch.from_numpy(rng.normal(size=(4, 12))).float())
    assert torch.equal(projection.weight[3:], before[3:])  # four points span three directions
    assert not torch.equal(projection.weight[:3], before[:3])


def test_a_head_goes_on_from_another_run(small_set: Path, small_run: Path, tmp_path: Path) -> None:
    run = head_run(small_set).model_copy(update={"init": small_run})
    train_run(run, tmp_path / "run", quiet=True)
    trained, source = load(tmp_path / "run"), load(small_run)
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(value, trained.backbone.state_dict()[name]), name


def test_head_first_is_one_command(
    say: Callable[..., tuple[str, str]], small_set: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is the head, and the training that begins there, and what is there is not made again."""
    command = ["train", "center", *words(small_set, data__views=2, train__epochs=1)]
    first, second = tmp_path / "first", tmp_path / "second"
    say(*command, "--init", "head", "--out", first)
    head = tmp_path / "first-head"
    assert Run.from_dict(RunDir(head).read()).embedder.train == "head"
    assert Run.from_dict(RunDir(first).read()).init == head
    say(*command, "--init", head, "--out", second)
    found = [load_export(run / "best_model_center_loss.pth")["embedder"] for run in (first, second)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    shutil.rmtree(first)
    before = (head / "metrics.jsonl").read_bytes()
    say(*command, "--init", "head", "--out", first)
    assert (head / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"cannot be resumed with other options: train\.lr"):
        again = [*command[2:], "--init", "head", "--resume", str(first), "--train.lr", "1"]
        parse_run("train center", "center", again)
    shutil.rmtree(first)
    assert dispatch([*command, "--init", "head", "--out", str(first), "--train.seed", "7"]) == 2
    assert "first-head is a head of other options (train.seed): " in capsys.readouterr().err
    assert dispatch([*command, "--init", "head", "--embedder.train", "head"]) == 2
    assert "leave it out for a head" in capsys.readouterr().err


def test_what_a_head_cannot_do_is_refused(small_set: Path, tmp_path: Path) -> None:
    hardened = with_hardening(head_run(small_set), kind="pgd")
    with pytest.raises(UserError, match="changes pixels"):
        train_run(hardened, tmp_path / "run", quiet=True)
    all_of_it = head_run(small_set, train="all", start="pca")
    with pytest.raises(UserError, match="pca needs"):
        train_run(all_of_it, tmp_path / "run", quiet=True)
    twice = head_run(small_set, start="pca").model_copy(update={"init": tmp_path})
    with pytest.raises(UserError, match="`init` brings a projection"):
        train_run(twice, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_one_worker_starts_no_ray(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "train_on_ray", lambda *_: pytest.fail("Ray"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = head_run(small_set)
    resources = run.resources.model_copy(update={"workers": 1})
    train_run(run.model_copy(update={"resources": resources}), tmp_path / "run", quiet=True)
