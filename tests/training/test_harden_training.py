"""Hardened trainings, whole: workers, resuming, cost, starts, options."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowerray import methods
from flowerray.cli.options import parse_run
from flowerray.cluster.driver import train_run
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.training.harden import HardenConfig, Hardening
from flowerray.training.progress import Progress, note_epoch
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from tests.small import small, words
from tests.train_process import (
    exit_code,
    largest_difference,
    make_run,
    start,
    train_as_one_and_as_two,
    train_small,
)


def test_two_workers_end_with_the_weights_of_one(job: dict[str, Any], tmp_path: Path) -> None:
    """Hardened runs of all methods in float64, augmentation on: 9 steps, 6 of them attacked."""
    by_method: dict[str, dict[str, Any]] = {
        "center": {"harden": {"kind": "free", "replays": 2}, "train": {"epochs": 6}},
        "siamese": {"harden": {"kind": "pgd", "mix": 0.5, "awp": 0.01}},
        "triplet": {"harden": {"kind": "pgd", "epsilon": 8.0}},
    }
    train = {"epochs": 3, "classes_per_batch": 8, "images_per_class": 4, "lr": 1e-3}
    for options in by_method.values():
        options["train"] = {**train, **options.get("train", {})}
    options = {**job, "methods": methods.names(), "double": True, "by_method": by_method}
    train_as_one_and_as_two(options, tmp_path)
    for method in methods.names():
        one, two = (torch.load(tmp_path / f"w{w}-{method}.pt", weights_only=True) for w in (1, 2))
        assert largest_difference(one, two) <= 1e-5, method
        assert RunDir(tmp_path / f"w2-{method}").series("train/epsilon")[-1] == (
            9,
            8.0 if method == "triplet" else 4.0,
        )


def test_a_killed_hardened_run_resumes_bit_equal(job: dict[str, Any], tmp_path: Path) -> None:
    """In mid-ramp; with LGA, whose destination comes from the step before."""
    options = {
        **job,
        "harden": {"kind": "pgd", "epsilon": 8.0, "ramp": 0.8, "destination": "lga"},
        "train": {
            "epochs": 3, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3,
            "checkpoint_every_steps": 2,
        },
    }  # fmt: skip
    make_run(tmp_path / "whole")
    make_run(tmp_path / "killed-triplet")
    expected = train_small({**options, "method": "triplet", "out": str(tmp_path / "whole")})
    process = start(
        {**options, "methods": ["triplet"], "out": str(tmp_path / "killed"), "die_at": 10}
    )
    assert exit_code(process) == -signal.SIGKILL
    killed = RunDir(tmp_path / "killed-triplet")
    state = torch.load(killed.last / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 8 and 0 < state["last_loss"] < 0.2
    resumed = train_small({**options, "method": "triplet", "out": str(killed.path)})
    ours, theirs = resumed.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(("harden", "epochs"), [({"kind": "pgd", "ramp": 0.6}, 4), ({}, 2)])
def test_patience_begins_where_the_ramp_ends(
    job: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harden: dict[str, Any],
    epochs: int,
) -> None:
    """Each epoch is worse than the one before, as it is while epsilon rises (here over three)."""
    falling = iter(range(100, 0, -1))

    def worse(
        progress: Progress, metrics: dict[str, float], selection: str, validated: bool
    ) -> bool:
        return note_epoch(progress, {selection: float(next(falling))}, selection)

    monkeypatch.setattr("flowerray.training.loop.note_epoch", worse)
    make_run(tmp_path / "run")
    train = {"epochs": 5, "classes_per_batch": 4, "images_per_class": 2, "patience": 1}
    out = str(tmp_path / "run")
    train_small({**job, "method": "center", "out": out, "harden": harden, "train": train})
    assert RunDir(tmp_path / "run").records()[-1]["epoch"] == epochs


def test_lga_goes_by_the_loss_of_the_weights_themselves(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWP trains on a second pass, with moved weights."""
    real, losses = Hardening.forward, list[float]()

    def spy(self: Hardening, *batch: Any) -> Any:
        output = real(self, *batch)
        losses.append(float(self.last_loss))
        return output

    monkeypatch.setattr(Hardening, "forward", spy)
    make_run(tmp_path / "run")
    options = {
        **job, "out": str(tmp_path / "run"), "method": "triplet",
        "harden": {"kind": "pgd", "destination": "lga", "awp": 0.05, "ramp": 0.0},
        "train": {"epochs": 1, "classes_per_batch": 4, "images_per_class": 2},
    }  # fmt: skip
    train_small(options)
    state_file = RunDir(tmp_path / "run").last / "state.pt"
    kept = torch.load(state_file, weights_only=True)["last_loss"]
    assert losses[-2] != losses[-1] and float(kept) == losses[-2]


def test_free_costs_as_much_as_a_clean_run(
    job: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    forward = Embedder.forward

    def counted(self: Embedder, images: Tensor) -> Tensor:
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Embedder, "forward", counted)
    counts = {}
    for name, fields in (("clean", {}), ("free", {"kind": "free", "replays": 2, "ramp": 0.0})):
        make_run(tmp_path / name)
        train = {"epochs": 2, "classes_per_batch": 4, "images_per_class": 2}
        more = {"out": str(tmp_path / name), "train": train, "harden": fields}
        calls.clear()
        train_small({**job, "method": "siamese", **more})
        counts[name] = len(calls)
    assert counts["free"] == counts["clean"] > 0
    assert HardenConfig(kind="free", replays=4).passes(15) == 4
    assert HardenConfig(kind="pgd").passes(15) == 15


def test_init_takes_weights_and_the_losss_own_parameters(small_set: Path, tmp_path: Path) -> None:
    """With a learning rate of almost 0 the end is the start."""
    first = tmp_path / "first"
    train_run(small(small_set, "center", epochs=1), first, quiet=True)
    old = torch.load(first / "best_model_center_loss.pth", weights_only=True)
    for method, export, same in (
        ("center", "center_loss", True),
        ("siamese", "siamese_network", False),
    ):
        out = tmp_path / method
        run = small(small_set, method, epochs=1, lr=1e-30, weight_decay=0.0)
        train_run(run.model_copy(update={"init": first}), out, quiet=True)
        new = torch.load(out / f"best_model_{export}.pth", weights_only=True)
        for name, value in old["embedder"].items():
            torch.testing.assert_close(new["embedder"][name], value)
        if same:
            torch.testing.assert_close(new["method"]["weight_CD"], old["method"]["weight_CD"])


def test_init_that_does_not_fit_is_refused(
    small_set: Path, small_run: Path, tmp_path: Path
) -> None:
    run = small(small_set).model_copy(update={"init": small_run})
    wide = run.model_copy(update={"embedder": run.embedder.model_copy(update={"dim": 32})})
    with pytest.raises(UserError, match=r"has embedder\.dim 16, and this run 32: give"):
        train_run(wide, tmp_path / "a", quiet=True)
    missing = run.model_copy(update={"init": tmp_path / "nothing"})
    with pytest.raises(UserError, match="no such RUN folder"):
        train_run(missing, tmp_path / "b", quiet=True)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epsilon": 8.0}, r"^harden\.epsilon has no use with harden\.kind none: .*choose"),
        (
            {"kind": "pgd", "beta": 3.0},
            r"^harden\.beta has no use .* choose harden\.kind trades\.$",
        ),
        ({"kind": "trades", "mix": 0.5}, r"^harden\.mix has no use with harden\.kind trades"),
        ({"kind": "free", "awp": 0.01}, r"^harden\.awp has no use with harden\.kind free"),
        ({"kind": "fgsm"}, "^`kind` = 'fgsm': "),
        ({"kind": "pgd", "epsilon": 0.0}, r"^`epsilon` = 0\.0: input should be greater than 0\.$"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        HardenConfig(**fields)


def test_the_command_line_and_old_runs(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later option wins, so that a job's default can be changed; --init becomes absolute."""
    monkeypatch.chdir(tmp_path)
    more = ["--harden.kind", "pgd", "--harden.kind", "trades", "--init", "a/run"]
    _, run = parse_run("train center", "center", [*words(small_set), *more])
    assert run.harden.kind == "trades" and run.init == tmp_path / "a" / "run"
    assert Run.from_dict(run.to_dict()) == run
    old = small(small_set).to_dict()
    del old["harden"], old["init"]
    assert Run.from_dict(old) == small(small_set) and not Run.from_dict(old).harden.on
