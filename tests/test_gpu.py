"""What a GPU asks for, as far as a machine without one can show it; tests/gpu needs one."""

from pathlib import Path

import pytest
import torch

from flowerray import gpu
from flowerray.cli import COMMANDS, Command, dispatch
from flowerray.cluster.driver import train_run
from flowerray.cluster.worker import pick_device
from flowerray.errors import UserError
from flowerray.tuning.trial import OUT_OF_MEMORY, reason_of
from tests.small import small

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
)
FOREIGN = RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")


def test_faults_of_a_gpu_are_sentences() -> None:
    said = gpu.fault(FULL, "lower `batch_size`")
    assert said == (
        "the GPU is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): lower "
        "`batch_size`."
    )
    said = gpu.fault(FOREIGN)
    assert said and "has no kernels for this GPU" in said and "CUDA_VISIBLE_DEVICES= " in said
    assert gpu.fault(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize("error", [FULL, FOREIGN])
def test_a_command_ends_with_the_sentence(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(Command, "run", fail)
    assert "evaluate" in COMMANDS and dispatch(["evaluate", "RUN"]) == 2
    assert capsys.readouterr().err.strip() == f"flowerray evaluate: {gpu.fault(error)}"


def test_a_gpu_without_kernels_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FOREIGN

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.ones", fail)
    with pytest.raises(UserError, match="has no kernels for this GPU"):
        pick_device("auto")


def test_why_there_is_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found 11040).\nUpdate it")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)
    with pytest.raises(UserError, match=r"can use \(The NVIDIA .* \(found 11040\)\); choose"):
        pick_device("cuda")


def test_a_snapshot_keeps_what_later_steps_change() -> None:
    weight = torch.arange(4.0)
    get = gpu.snapshot({"a": [weight, 3], "b": None}, torch.device("cpu"))
    weight.zero_()
    assert get()["a"][0].tolist() == [0, 1, 2, 3] and get()["a"][1] == 3 and get()["b"] is None


def test_a_training_that_does_not_fit_names_its_batch(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FULL

    monkeypatch.setattr("flowerray.cluster.worker.train", fail)
    with pytest.raises(UserError, match="out of memory") as stop:
        train_run(small(small_set), tmp_path / "run", quiet=True)
    said = str(stop.value)
    assert "P x K = 3 x 4 = 12 images of 32 px with test_efficientnet does not fit" in said
    assert "`train.classes_per_batch`" in said and reason_of(stop.value) == OUT_OF_MEMORY
