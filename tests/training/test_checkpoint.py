"""Checkpoints and exports."""

import json
import math
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowerray
from flowerray import methods
from flowerray.calibration import Calibration
from flowerray.errors import UserError
from flowerray.files import read_json
from flowerray.methods._base import Method, MethodConfig
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.training import checkpoint
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir

CLASSES = ("iris", "rose", "tulip")


@pytest.fixture(scope="module")
def method() -> Method:
    """Center loss: it has parameters and buffers beside the embedder."""
    file = methods.get("center")
    config = EmbedderConfig(backbone="test_efficientnet", weights="none", image_size=32, dim=8)
    return file.method(file.config(), Embedder(config), len(CLASSES))


def build(config: MethodConfig, embedder: EmbedderConfig, seed: int = 0) -> Method:
    return methods.get("center").method(config, Embedder(embedder, seed=seed), len(CLASSES))


@pytest.fixture(scope="module")
def run(method: Method) -> Run:
    return Run(method=method.config, embedder=method.embedder.config)


def write(path: Path, method: Method, run: Run) -> Path:
    """An export of `method`."""
    embedder, _ = checkpoint.split_state(method)
    checkpoint.export(path, method, embedder, run.to_dict(), 0.4, CLASSES)
    return path


def test_split_and_join_are_inverse(method: Method) -> None:
    embedder, rest = checkpoint.split_state(method)
    assert set(embedder) == set(method.embedder.state_dict())
    assert rest and not any(name.startswith("embedder.") for name in rest)
    joined = checkpoint.join_state(embedder, rest)
    assert joined.keys() == method.state_dict().keys()
    assert all(torch.equal(joined[name], value) for name, value in method.state_dict().items())


def test_an_export_is_the_contracts(method: Method, run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "best_model_center_loss.pth", method, run)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"embedder", "method", "run", "threshold", "classes"}
    assert Run.from_dict(json.loads(content["run"])) == run
    assert content["threshold"] == 0.4 and content["classes"] == list(CLASSES)
    assert set(content["method"]) == set(checkpoint.split_state(method)[1])
    assert list(tmp_path.iterdir()) == [path]


def test_a_calibration_is_kept_in_the_run_and_none_is_needed(
    method: Method, run: Run, tmp_path: Path
) -> None:
    path = write(tmp_path / "best_model_center_loss.pth", method, run)
    assert checkpoint.load_export(path)["calibration"] is None
    known = Calibration(a=2, b=1, c=0.5)
    content = torch.load(path, weights_only=True)
    facts = {**run.to_dict(), "calibration": known.model_dump(mode="json")}
    torch.save({**content, "run": json.dumps(facts)}, path)
    found = checkpoint.load_export(path)
    assert found["calibration"] == known and Run.from_dict(found["run"]) == run
    torch.save({**content, "run": json.dumps({**facts, "calibration": {"a": "x"}})}, path)
    with pytest.raises(UserError, match="its run cannot be read"):
        checkpoint.load_export(path)


def test_a_loaded_embedder_embeds_alike(method: Method, run: Run, tmp_path: Path) -> None:
    RunDir(tmp_path / "run").create(run.to_dict())
    file = write(tmp_path / "run" / "best_model_center_loss.pth", method, run)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method.embedder.eval()
    with torch.no_grad():
        expected = method.embedder(images)
        for name in (file, file.parent, str(file.parent)):
            embedder = flowerray.load(name)
            assert not embedder.training
            assert torch.equal(embedder(images), expected)


def test_which_file_a_folder_means(method: Method, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such RUN folder or exported"):
        checkpoint.export_file(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no exported model best_model_\*\.pth\.$"):
        checkpoint.export_file(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="its training has not finished"):
        checkpoint.export_file(tmp_path)
    best = write(tmp_path / "best_model_center_loss.pth", method, run)
    assert checkpoint.export_file(tmp_path) == checkpoint.export_file(best) == best
    write(tmp_path / "robust_model_center_loss.pth", method, run)
    with pytest.raises(UserError, match="several exported models .* name the file itself"):
        checkpoint.export_file(tmp_path)
    assert checkpoint.export_file(best) == best


def test_a_start_carries_the_loss_along_where_the_classes_are_equal(
    method: Method, run: Run, tmp_path: Path
) -> None:
    """The classifier and the centers of a center run; of a head's run too."""
    source = build(method.config, method.embedder.config, seed=1)
    source.get_buffer("centers_CD").add_(1)
    file = write(tmp_path / "best_model_center_loss.pth", source, run)
    for classes in (CLASSES, CLASSES[::-1]):
        own = build(method.config, method.embedder.config, seed=2)
        before = {name: value.clone() for name, value in own.state_dict().items()}
        checkpoint.initialise(own, own.embedder, file, classes)  # type: ignore[arg-type]
        for name, value in own.state_dict().items():
            carried = name.startswith("embedder.") or classes == CLASSES
            assert torch.equal(value, (source.state_dict() if carried else before)[name]), name


def test_a_start_that_does_not_fit_is_one_sentence(
    method: Method, run: Run, tmp_path: Path
) -> None:
    file = write(tmp_path / "best_model_center_loss.pth", method, run)
    for change in ({"dim": 4}, {"backbone": "test_resnet"}):
        own = build(method.config, method.embedder.config.model_copy(update=change))
        (name,) = change
        with pytest.raises(UserError, match=rf"has embedder.{name} .* give `embedder.{name}`"):
            checkpoint.initialise(own, own.embedder, file, CLASSES)  # type: ignore[arg-type]


@pytest.mark.parametrize("room", [100, 5000, 200_000])
def test_a_disk_that_gets_full_is_said(room: int, method: Method, run: Run, tmp_path: Path) -> None:
    """torch ends its file all the same, and fails with an error of its own."""
    state = {"weights": torch.randn(300, 300), "more": [torch.randn(50) for _ in range(20)]}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save_state(tmp_path, state, {})
        with pytest.raises(UserError, match=r"no longer be written \(File too large\): make room"):
            write(tmp_path / "best.pth", method, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_state_survives_exactly(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "weights": torch.randn(4),
        "progress": {"step": 3, "best": float("-inf")},
    }
    checkpoint.save_state(tmp_path, state, {"run": 1})
    read = checkpoint.load_state(tmp_path)
    assert torch.equal(read["weights"], state["weights"]) and read["progress"] == state["progress"]
    assert read_json(tmp_path / "run.json") == {"run": 1}
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.load_state(tmp_path / "none")


def test_a_flipped_bit_or_a_cut_is_noticed(method: Method, run: Run, tmp_path: Path) -> None:
    """torch.load reads both without a word."""
    export = write(tmp_path / "best_model_center_loss.pth", method, run)
    checkpoint.save_state(tmp_path, {"weights": torch.randn(500)}, {"run": 1})
    rng = np.random.default_rng(0)
    for file, load, advice in (
        (export, lambda: checkpoint.load_export(export), "--resume writes them again"),
        (tmp_path / "state.pt", lambda: checkpoint.load_state(tmp_path), "checkpoints/best"),
    ):
        whole = file.read_bytes()
        with zipfile.ZipFile(file) as parts:
            tensors = [p for p in parts.infolist() if "/data/" in p.filename and p.file_size]
        damaged = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)]
        for part in rng.choice(np.array(tensors, object), 12):
            data = bytearray(whole)
            names = part.header_offset + 26  # lengths of the name and of what pads the header
            padded = np.frombuffer(whole[names : names + 4], "<u2").sum(dtype=int)
            start = part.header_offset + 30 + int(padded)
            data[start + int(rng.integers(part.file_size))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(data))
        for content in damaged:
            file.write_bytes(content)
            with pytest.raises(UserError, match=f"cannot be read as a checkpoint .*{advice}"):
                load()
        file.write_bytes(whole)
        load()


def test_a_model_of_no_numbers_is_refused(method: Method, run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "best_model_center_loss.pth", method, run)
    content = torch.load(file, weights_only=True)
    content["threshold"] = math.nan
    torch.save(content, file)
    with pytest.raises(UserError, match="weights or a threshold that are no numbers"):
        checkpoint.load_export(file)
    next(iter(content["embedder"].values())).view(-1)[0] = math.inf
    torch.save({**content, "threshold": 0.5}, file)
    with pytest.raises(UserError, match="weights or a threshold that are no numbers"):
        checkpoint.load_export(file)


class Harmful:
    """Runs code where a file is loaded carelessly."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harmed"),))


def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"checkpoint \(it holds other things than tensors\)"):
        checkpoint.load_embedder(tmp_path / "model.pth")
    assert not (tmp_path / "harmed").exists()
