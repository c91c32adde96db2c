"""Trainings on a GPU: the CPU's numbers, equal bits after a kill, no waiting, no growing memory."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerray import methods
from flowerray.cluster import worker
from flowerray.cluster.driver import train_run
from flowerray.data.augment import AugmentConfig, augment, draw
from flowerray.data.batches import Batch, Batches, PKSampler
from flowerray.data.resident import Resident
from flowerray.data.store import Store
from flowerray.errors import UserError
from flowerray.model.modes import full_precision
from flowerray.training.rundir import FolderReporter, RunDir
from tests.gpu.training import STEPS, embedded, on
from tests.small import small
from tests.train_process import exit_code, make_run, start, train_small

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-3), (True, 1e-9)])
@pytest.mark.parametrize("method", methods.names())
def test_it_trains_as_the_cpu_does(
    device: torch.device,
    job: dict[str, Any],
    tmp_path: Path,
    method: str,
    double: bool,
    tolerance: float,
) -> None:
    """Losses and embeddings after 21 steps, in full fp32 and in float64."""
    found = []
    for name, where in (("there", device), ("here", CPU)):
        with full_precision():
            trained, run = on(where, job, tmp_path / name, method, double=double)
            losses = torch.tensor(
                [loss for _, loss in run.series("train/loss")], dtype=torch.double
            )
            found.append((losses, embedded(trained, job)))
    (losses, emb_ND), (expected, expected_ND) = found
    assert len(losses) == STEPS and expected[-1] < expected[0]
    assert float((losses - expected).abs().max()) <= tolerance
    assert float((emb_ND - expected_ND).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["pgd", "trades", "nfgsm", "free"])
def test_it_hardens_as_the_cpu_does(
    device: torch.device, job: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    """In float64, where a gradient's sign is the same on both."""
    harden = {"kind": kind, "ramp": 0.1, **({} if kind == "free" else {"awp": 0.005})}
    series = []
    for name, where in (("there", device), ("here", CPU)):
        _, run = on(where, job, tmp_path / name, "triplet", double=True, harden=harden)
        series.append([loss for _, loss in run.series("train/adversarial_loss")])
    assert len(series[0]) >= 3 and series[0] == pytest.approx(series[1], abs=1e-6)


def test_augmentation_is_the_cpus(device: torch.device, job: dict[str, Any]) -> None:
    """To the rounding of float32, but for pixels that lie on an edge."""
    store = Store(Path(job["store"]))
    images_BCHW, sizes_B2 = store.padded(np.arange(40))
    uniforms_BU = draw(0, 0, 0, 40)
    for config in (AugmentConfig(), AugmentConfig(strength=0)):
        here = augment(images_BCHW, sizes_B2, uniforms_BU, 32, config)
        there = augment(images_BCHW.to(device), sizes_B2, uniforms_BU, 32, config).cpu()
        assert float(((here - there).abs() > 1e-4).double().mean()) < 1e-3


@pytest.mark.parametrize("kept_there", [True, False])
def test_batches_are_the_cpus(device: torch.device, job: dict[str, Any], kept_there: bool) -> None:
    """From photographs in the GPU's memory, and through pinned memory ahead of the step."""
    store, targets_N = Store(Path(job["store"])), np.array(job["targets"])
    sampler, ours = PKSampler(targets_N, 4, 4, 0), Resident(store, device) if kept_there else store
    draws = lambda epoch, step, batch: draw(0, epoch, step, batch)  # noqa: E731
    here = Batches(store, targets_N, sampler, draw=draws)
    there = Batches(ours, targets_N, sampler, draw=draws, device=device)
    for a, b in zip(here.epoch(1), there.epoch(1), strict=True):
        for x, y in zip(a[1:], b[1:], strict=True):
            assert y.device == device and torch.equal(x, y.cpu())


@pytest.mark.parametrize("method", methods.names())
def test_a_killed_run_resumes_bit_equal(
    device: torch.device, job: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """With --train.deterministic; killed in mid-epoch, checkpoints are written beside the steps."""
    train = {
        "epochs": 6, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3, "ema": 0.9,
        "checkpoint_every_steps": 2, "deterministic": True,
    }  # fmt: skip
    options = {**job, "device": str(device), "beside": True, "validate": True, "train": train}
    whole, killed = tmp_path / "whole", tmp_path / f"killed-{method}"
    make_run(whole)
    make_run(killed)
    expected = train_small({**options, "method": method, "out": str(whole)}).state_dict()
    die_at = RunDir(whole).records()[-1]["step"] // 2 + 1
    more = {"methods": [method], "out": str(tmp_path / "killed"), "die_at": die_at}
    assert exit_code(start({**options, **more})) == -signal.SIGKILL
    resumed = train_small({**options, "method": method, "out": str(killed)}).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert RunDir(killed).series("train/loss") == RunDir(whole).series("train/loss")


@pytest.mark.parametrize("kind", ["none", "pgd", "free"])
@pytest.mark.parametrize("method", methods.names())
def test_no_step_waits_for_the_gpu(
    device: torch.device, job: dict[str, Any], tmp_path: Path, method: str, kind: str
) -> None:
    """From the 3rd to the last step but one of an epoch, between two records of the loss."""
    seen: list[int] = []
    mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda _: None

    def watched(batch: Batch) -> torch.Tensor:
        mode("error" if 2 <= batch.step < 8 else "default")
        seen.append(batch.step)
        uniforms = batch.uniforms
        return augment(batch.images, batch.sizes, uniforms, 32, AugmentConfig())

    options: dict[str, Any] = {"classes_per_batch": 2, "images_per_class": 4, "epochs": 4}
    harden = {"kind": kind, **({} if kind == "none" else {"ramp": 0.0})}
    try:
        on(device, job, tmp_path / "run", method, view=watched, harden=harden, **options,
           log_every_steps=100, checkpoint_every_steps=100)  # fmt: skip
    finally:
        mode("default")
    assert max(seen) == 9


def test_memory_does_not_grow(cuda: torch.device, job: dict[str, Any], tmp_path: Path) -> None:
    """Neither what is held at an epoch's end nor the most that an epoch takes."""
    held: list[tuple[int, int]] = []

    class Watching(FolderReporter):
        def report(self, *args: Any, **more: Any) -> None:
            super().report(*args, **more)
            if "epoch/seconds" in args[2]:
                now = torch.cuda.memory_allocated(cuda), torch.cuda.max_memory_allocated(cuda)
                held.append(now)
                torch.cuda.reset_peak_memory_stats(cuda)

    on(cuda, job, tmp_path / "run", "center", view=None, reporter=Watching, ema=0.9)
    assert len(held) == 7 and max(held[3:]) <= (held[2][0] * 1.01, held[2][1] * 1.01)


@pytest.fixture
def little_memory(cuda: torch.device) -> Iterator[None]:
    """A GPU of which this process may have a hundredth."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01, cuda)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    torch.cuda.empty_cache()


def test_too_little_memory_is_said(little_memory: None, small_set: Path, tmp_path: Path) -> None:
    run = small(small_set, classes_per_batch=6, images_per_class=10)
    embedder = run.embedder.model_copy(update={"image_size": 768})
    with pytest.raises(UserError, match=r"out of memory .* P x K = 6 x 10 = 60 images of 768 px"):
        train_run(run.model_copy(update={"embedder": embedder}), tmp_path / "run", quiet=True)


def test_the_callers_generators_are_as_before(
    device: torch.device, small_set: Path, tmp_path: Path
) -> None:
    def states() -> list[torch.Tensor]:
        gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *gpu]

    torch.manual_seed(7)
    torch.rand(3, device=device)
    before = states()
    run = small(small_set, epochs=1)
    (tmp_path / "run").mkdir()
    RunDir(tmp_path / "run").run_json.write_text("{}")
    worker.train_worker(run, FolderReporter(tmp_path / "run"), device)
    assert all(torch.equal(a, b) for a, b in zip(states(), before, strict=True))
