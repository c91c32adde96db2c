"""Which precision trains faster: measured once, then remembered."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flowerray.files import read_json
from flowerray.model import precision
from flowerray.model.embedder import Embedder, EmbedderConfig

CPU = torch.device("cpu")


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Embedder:
    """A tiny one, with a memory of its own."""
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path))
    return Embedder(EmbedderConfig(backbone="test_vit", weights="none", image_size=32, dim=8))


def test_the_answer_is_measured_once(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in embedder.state_dict().items()}
    first = precision.faster_precision(embedder, CPU)
    assert all(torch.equal(embedder.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in embedder.parameters())
    memory = read_json(tmp_path / "precision.json")
    ((key, seconds),) = memory.items()
    assert "test_vit 32 cpu" in key and f"{torch.get_num_threads()}t" in key
    assert seconds["fp32"] > 0 and seconds["bf16"] > 0
    monkeypatch.setattr(precision, "_measure", lambda *_: pytest.fail("measured again"))
    assert precision.faster_precision(embedder, CPU) == first


def test_a_home_that_cannot_be_written_costs_the_memory_alone(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path / "file"))
    assert precision.faster_precision(embedder, CPU) in ("fp32", "bf16")


def test_a_rank_that_measures_alone_waits_for_no_other(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A synchronised BatchNorm talks to the other ranks in train mode."""
    modes: list[bool] = []

    def measure(copy: Embedder, _: torch.device) -> dict[str, float]:
        modes.extend(module.training for module in copy.modules())
        return {"fp32": 1.0, "bf16": 1.0}

    monkeypatch.setattr(precision, "_measure", measure)
    embedder.train()
    precision.faster_precision(embedder, CPU)
    assert modes and not any(modes) and embedder.training


@pytest.mark.parametrize(
    ("fp32", "bf16", "choice"),
    [(1.0, 0.5, "bf16"), (1.0, 2.0, "fp32"), (1.0, 1 / 1.1, "fp32"), (1.0, 1 / 1.2, "bf16")],
)
def test_bf16_has_to_win_clearly(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, choice: str
) -> None:
    monkeypatch.setattr(precision, "_measure", lambda *_: {"fp32": fp32, "bf16": bf16})
    assert precision.faster_precision(embedder, CPU) == choice


def test_thread_counts_are_told_apart(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_measure", lambda *_: {"fp32": 1.0, "bf16": 1.0})
    for threads in (1, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        precision.faster_precision(embedder, CPU)
    assert len(read_json(tmp_path / "precision.json")) == 2


def test_concurrent_measurements_keep_each_others_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings of other image sizes that begin at once."""
    monkeypatch.setenv("FLOWERRAY_HOME", str(tmp_path))
    together: list[int] = []

    def measure(copy: Embedder, _: torch.device) -> dict[str, float]:
        together.append(1)
        time.sleep(0.02)
        assert together.pop() and not together, "they disturb each other"
        return {"fp32": 1.0, "bf16": 1.0}

    monkeypatch.setattr(precision, "_measure", measure)
    configs = [EmbedderConfig(backbone="test_vit", weights="none", image_size=32, dim=8)] * 4
    sized = [config.model_copy(update={"image_size": 32 + i}) for i, config in enumerate(configs)]
    embedders = [Embedder(configs[0]) for _ in sized]
    for own, config in zip(embedders, sized, strict=True):
        own.config = config
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda own: precision.faster_precision(own, CPU), embedders))
    assert len(read_json(tmp_path / "precision.json")) == 4
