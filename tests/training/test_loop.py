"""The loop: world-size invariance, exact resume after SIGKILL, early stop, divergence."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerray import methods
from flowerray.errors import UserError
from flowerray.model.averages import MovingAverage
from flowerray.training import loop as module
from flowerray.training.loop import Schedule
from flowerray.training.progress import DivergedError, Progress, note_epoch
from flowerray.training.rundir import RunDir
from tests.train_process import (
    exit_code,
    largest_difference,
    make_run,
    start,
    train_as_one_and_as_two,
    train_small,
)


def test_two_workers_end_with_the_weights_of_one(job: dict[str, Any], tmp_path: Path) -> None:
    """Same global batches, augmentation on, whole embedder trained, P = 8, K = 4, 20 steps,
    float64.
    """
    # 20 chunks of 4 make 3 batches of P = 8 an epoch: 7 epochs are 21 steps.
    options = {
        "train": {"epochs": 7, "classes_per_batch": 8, "images_per_class": 4, "lr": 1e-3},
        "methods": methods.names(),
        "double": True,
        **job,
    }
    train_as_one_and_as_two(options, tmp_path)
    for method in methods.names():
        one, two = (torch.load(tmp_path / f"w{w}-{method}.pt", weights_only=True) for w in (1, 2))
        before = train_small(
            {
                **job,
                "method": method,
                "double": True,
                "out": str(tmp_path / f"w1-{method}"),
                "train": options["train"],
            }
        ).state_dict()
        assert largest_difference(one, two) <= 1e-5, method
        assert largest_difference(one, before) == 0.0, f"{method}: the finished run trained on"
        assert RunDir(tmp_path / f"w2-{method}").series("train/loss")[-1][0] == 21


@pytest.mark.parametrize("method", methods.names())
def test_a_killed_run_resumes_bit_equal(job: dict[str, Any], tmp_path: Path, method: str) -> None:
    """SIGKILL at a random seeded step in mid-epoch; augmentation, EMA, warm-up and early stop are
    on; of one method checkpoints are written as on a GPU, beside the training.
    """
    options = {
        **job,
        "validate": True,
        "beside": method == "center",
        "train": {
            "epochs": 6, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3, "ema": 0.9,
            "warmup_epochs": 1.0, "patience": 5, "checkpoint_every_steps": 2,
        },
    }  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / f"killed-{method}"
    make_run(whole)
    make_run(killed)
    expected = train_small({**options, "method": method, "out": str(whole)}).state_dict()

    steps = RunDir(whole).records()[-1]["step"]
    die_at = int(np.random.default_rng(len(method)).integers(steps // 3, steps - 3))
    process = start(
        {**options, "methods": [method], "out": str(tmp_path / "killed"), "die_at": die_at}
    )
    assert exit_code(process) == -signal.SIGKILL
    assert max(r["step"] for r in RunDir(killed).records()) < die_at

    resumed = train_small({**options, "method": method, "out": str(killed)}).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    state, reference = (
        torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)
        for folder in (killed, whole)
    )
    for name, value in reference["average"].items():
        assert torch.equal(state["average"][name], value)
    for mine, other in zip(RunDir(killed).records(), RunDir(whole).records(), strict=True):
        assert mine["step"] == other["step"]
        same = {k: v for k, v in other["metrics"].items() if is_exact(k)}
        assert {k: v for k, v in mine["metrics"].items() if is_exact(k)} == same


def test_not_each_epoch_has_to_be_validated(job: dict[str, Any], tmp_path: Path) -> None:
    """Losses stay; the last epoch is validated, and no other than a validated one is the best."""
    found = []
    for name, every in (("each", 1), ("second", 2)):
        make_run(tmp_path / name)
        train = {"epochs": 5, "classes_per_batch": 4, "images_per_class": 2, "patience": 3}
        train["validate_every"] = every
        more = {"method": "triplet", "validate": True, "out": str(tmp_path / name)}
        train_small({**job, **more, "train": train})
        run = RunDir(tmp_path / name)
        found.append(run.series("epoch/loss"))
        validated = [r["epoch"] for r in run.records() if "val/map_at_r" in r["metrics"]]
        assert validated == [e for e in range(1, 6) if e % every == 0 or e == 5]
        timed = [r["epoch"] for r in run.records() if "epoch/validation_seconds" in r["metrics"]]
        assert timed == validated
    assert found[0] == found[1] and len(found[0]) == 5
    state = torch.load(tmp_path / "second/checkpoints/last/state.pt", weights_only=True)
    assert state["progress"]["best_epoch"] in (2, 4, 5)


def test_an_epoch_without_validation_is_neither_better_nor_worse() -> None:
    progress = Progress(bad_epochs=1, best=0.5, best_epoch=1, epoch=2)
    assert not note_epoch(progress, {"epoch/loss": 0.1}, "val/map_at_r", validated=False)
    assert (progress.bad_epochs, progress.best_epoch, progress.epoch) == (1, 1, 3)


def test_a_run_that_died_before_its_first_checkpoint_begins_its_log_anew(
    job: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make_run(out)
    old = {"step": 1, "epoch": 1, "time": 0.0, "metrics": {"train/loss": 9.0}}
    RunDir(out).metrics.write_text(json.dumps(old) + "\n")
    options = {"epochs": 1, "classes_per_batch": 4, "images_per_class": 2}
    train_small({**job, "train": options, "method": "triplet", "out": str(out)})
    steps = [step for step, _ in RunDir(out).series("train/loss")]
    assert steps == sorted(set(steps)) and old not in RunDir(out).records()


def is_exact(name: str) -> bool:
    """Metrics that do not tell of time or of the machine."""
    return not name.startswith("system/") and name not in (
        "train/images_per_second",
        "epoch/seconds",
        "epoch/validation_seconds",
    )


def test_a_diverged_loss_stops_the_run_and_names_the_step(
    job: dict[str, Any], tmp_path: Path
) -> None:
    make_run(tmp_path / "run")
    options = {
        "epochs": 4,
        "classes_per_batch": 4,
        "images_per_class": 2,
        "lr": 1.0,
        "grad_clip": 0,
        "head_lr_factor": 1e4,
        "weight_decay": 100.0,
    }
    with pytest.raises(DivergedError, match=r"became nan at step \d+ \(epoch \d\)"):
        train_small({**job, "method": "center", "out": str(tmp_path / "run"), "train": options})
    records = RunDir(tmp_path / "run").records()
    assert all(np.isfinite(r["metrics"]["train/loss"]) for r in records)


def test_a_compiled_embedder_trains_as_it_does_by_itself(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as any backend has it, which compiling to machine code would take minutes to show."""
    compiled: list[object] = []
    compile_module = torch.nn.Module.compile

    def traced(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    states = []
    for name in ("plain", "compiled"):
        make_run(tmp_path / name)
        options = {"epochs": 1, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3}
        train = {**options, "compile": name == "compiled"}
        more = {"method": "triplet", "double": True, "out": str(tmp_path / name)}
        states.append(train_small({**job, **more, "train": train, "validate": True}).state_dict())
    assert len(compiled) == 1 and largest_difference(*states) <= 1e-6


def test_a_checkpoint_of_another_method_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    options = {"epochs": 1, "classes_per_batch": 4, "images_per_class": 2}
    train_small({**job, "method": "triplet", "out": str(tmp_path / "run"), "train": options})
    with pytest.raises(UserError, match="does not fit this run"):
        train_small({**job, "method": "center", "out": str(tmp_path / "run"), "train": options})


def test_a_resumed_run_goes_on_in_its_precision(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is faster is measured anew on another machine, and may come out the other way."""
    found = iter(["bf16", "fp32"])
    monkeypatch.setattr("flowerray.training.loop.faster_precision", lambda *_: next(found))
    begun: list[str] = []

    def spy(precision: str, device: torch.device) -> Any:
        begun.append(precision)
        return real(precision, device)

    real = module.make_autocast
    monkeypatch.setattr(module, "make_autocast", spy)
    make_run(tmp_path / "run")
    options = {"epochs": 1, "classes_per_batch": 4, "images_per_class": 2, "precision": "auto"}
    for _ in range(2):
        train_small({**job, "method": "triplet", "out": str(tmp_path / "run"), "train": options})
    assert begun == ["bf16", "bf16"] and next(found) == "fp32"


def test_early_stop_counts_epochs_without_a_better_validation() -> None:
    progress = Progress()
    values = (0.2, 0.5, 0.4, 0.5)
    best = [note_epoch(progress, {"val/map_at_r": v}, "val/map_at_r") for v in values]
    assert best == [True, True, False, False]
    assert progress.stopped_early(2) and not progress.stopped_early(3)
    assert (progress.best, progress.best_epoch, progress.epoch) == (0.5, 2, 4)
    assert not progress.stopped_early(0)


def test_equal_attacked_figures_are_told_apart_by_the_clean_one() -> None:
    progress, selection = Progress(), "val/adversarial_recall_at_1"
    epochs = ((0.0, 0.3), (0.0, 0.5), (0.0, 0.4), (0.1, 0.2), (0.1, 0.2))
    best = [note_epoch(progress, {selection: a, "val/map_at_r": m}, selection) for a, m in epochs]
    assert best == [True, True, False, True, False] and progress.best_epoch == 4


def test_without_validation_each_epoch_is_the_best() -> None:
    progress = Progress()
    assert note_epoch(progress, {}, "val/map_at_r") and note_epoch(progress, {}, "val/map_at_r")
    assert progress.bad_epochs == 0


def test_schedule_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(total=100, warmup=20)
    factors = [schedule.factor(step) for step in range(100)]
    assert np.all(np.diff(factors[:20]) > 0) and factors[20] == 1.0
    assert np.all(np.diff(factors[20:]) < 0) and factors[-1] < 1e-3


def test_moving_average_follows_its_formula() -> None:
    from flowerray.model.embedder import Embedder, EmbedderConfig

    embedder = Embedder(
        EmbedderConfig(backbone="test_efficientnet", dim=8, image_size=32, weights="none")
    )
    average = MovingAverage(embedder, 0.9)
    weight = embedder.projection.weight
    expected, generator = weight.detach().clone(), torch.Generator().manual_seed(0)
    for step in (1, 2, 3, 100, 101):
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        average.update(embedder, step)
        decay = 0.9 if step > 80 else (1 + step) / (10 + step)  # a short training counts as well
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(average.state["projection.weight"], expected)
    last = weight.detach().clone()
    with average.swapped_into(embedder):
        torch.testing.assert_close(embedder.projection.weight.detach(), expected)
    assert torch.equal(embedder.projection.weight.detach(), last)
