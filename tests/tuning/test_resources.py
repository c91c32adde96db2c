"""What a trial gets and what a cluster is asked for, without Ray."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowerray.cli import dispatch
from flowerray.errors import UserError
from flowerray.files import only_driver
from flowerray.tuning.command import (
    TrialResources,
    ask_for_nodes,
    check_resources,
    refuse_unequal_shares,
    room,
)
from flowerray.tuning.study import Study
from tests.tuning.studies import make_study, tune_words


def test_how_many_trials_a_cluster_holds(tmp_path: Path) -> None:
    gpus = TrialResources(cpus_per_trial=2, gpus_per_trial=0.5)
    assert room([{"CPU": 16, "GPU": 1}], gpus) == 2
    assert room([{"CPU": 3}], TrialResources()) == 3
    assert room([{"CPU": 2}], TrialResources(cpus_per_trial=0.5)) == 4
    assert room([{"CPU": 3}, {"CPU": 3}], TrialResources(cpus_per_trial=2)) == 2, "none spans two"
    two = TrialResources(cpus_per_trial=4, gpus_per_trial=2, workers_per_trial=2)
    assert room([{"CPU": 4, "GPU": 1}] * 5, two) == 2, "its workers may"
    with pytest.raises(UserError, match=r"does not fit this cluster of 1 node.* 2 CPUs and 0 GPUs"):
        room([{"CPU": 2}], gpus)
    with pytest.raises(UserError, match=r"cluster of 2 node\(s\) with up to 4 CPUs"):
        room([{"CPU": 4}, {"CPU": 4}], TrialResources(cpus_per_trial=8))
    run = make_study(tmp_path / "study", tmp_path).base
    with pytest.raises(UserError, match="give `workers_per_trial` 2 too"):
        check_resources(run, TrialResources(gpus_per_trial=2))
    with pytest.raises(UserError, match="cannot be shared by 2 workers"):
        check_resources(run, TrialResources(workers_per_trial=2, gpus_per_trial=1))


def test_workers_that_cannot_share_every_batch_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", tmp_path)  # 3 x 4
    refuse_unequal_shares(study, 3)
    study.knobs = {**study.knobs, "train.classes_per_batch": {"choices": [3, 5]}}
    refuse_unequal_shares(study, 4)
    with pytest.raises(UserError, match=r"`workers_per_trial` 3: .* P x K = 5 x 4 images"):
        refuse_unequal_shares(study, 3)


def test_a_refused_search_leaves_no_folder(
    tmp_path: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, said in (
        (["--embedder.backbone", "no_such_net"], "no_such_net"),
        (["--gpus-per-trial", "1.5"], "give --workers-per-trial 2 too"),
        (["--train.classes-per-batch", "100"], "100"),
    ):
        words = tune_words(small_set, out=tmp_path / "study")
        assert dispatch(["tune", "triplet", *words, *wrong]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("said", "gpus"),
    [
        ([], 1.0),
        (["--workers-per-trial", "2"], 2.0),
        (["--workers-per-trial", "3"], 0.0),
        (["--gpus-per-trial", "0.5"], 0.5),
        (["--gpus-per-trial", "0"], 0.0),
    ],
)
def test_a_machine_with_gpus_trains_on_them(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], gpus: float
) -> None:
    taken: list[TrialResources] = []

    def stop(run: object, out: Path, config: object, resources: TrialResources, *_: Any) -> None:
        taken.append(resources)
        raise UserError("enough")

    monkeypatch.setattr("flowerray.tuning.command.new_study", stop)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    words = tune_words(small_set, out=tmp_path / "study")
    assert dispatch(["tune", "triplet", *words, *said]) == 2
    assert [resources.gpus_per_trial for resources in taken] == [gpus]


def test_a_resumed_study_keeps_its_resources_and_one_driver(
    tmp_path: Path,
    small_set: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[TrialResources] = []

    def stop(study: Study, resources: TrialResources, quiet: bool) -> None:
        taken.append(resources)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("flowerray.tuning.command.tune", stop)
    said = ["--cpus-per-trial", "4", "--max-concurrent", "8", "--time-limit", "90"]
    words = tune_words(small_set, out=tmp_path / "study")
    assert dispatch(["tune", "triplet", *words, *said]) == 130
    resume = ["tune", "triplet", "--resume", str(tmp_path / "study")]
    assert dispatch(resume) == 130
    assert dispatch([*resume, "--cpus-per-trial", "2"]) == 130
    assert dispatch(resume) == 130
    whole = TrialResources(cpus_per_trial=4, max_concurrent=8, time_limit=90)
    less = whole.model_copy(update={"cpus_per_trial": 2})
    assert taken == [whole, whole, less, less]
    capsys.readouterr()
    before = (tmp_path / "study" / "study.json").read_bytes()
    with only_driver(tmp_path / "study"):
        assert dispatch([*resume, "--trials", "99"]) == 2
    assert (tmp_path / "study" / "study.json").read_bytes() == before
    assert "another process is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "trials", "bundles"),
    [
        ({"gpus_per_trial": 0.5}, 3, [{"CPU": 1, "GPU": 0.5}] * 3),
        (
            {"cpus_per_trial": 8, "gpus_per_trial": 4, "workers_per_trial": 4},
            2,
            [{"CPU": 2, "GPU": 1}] * 8,
        ),
        ({"cpus_per_trial": 2}, 0, []),
    ],
)
def test_a_growing_cluster_is_asked_for_all_trials_at_once(
    resources: dict[str, Any],
    trials: int,
    bundles: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[dict[str, float]]] = []
    sdk = SimpleNamespace(request_resources=lambda bundles: asked.append(bundles))
    monkeypatch.setitem(sys.modules, "ray.autoscaler.sdk", sdk)
    ask_for_nodes(TrialResources(**resources), trials)
    assert asked == [bundles]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--out", "{here}"], "exists already"),
        (["--gpus-per-trial", "1.5"], "give --workers-per-trial 2 too"),
        (["--objective", "pareto"], "add --harden"),
    ],
)
def test_options_are_looked_at_before_photographs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("flowerray.tuning.command.open_dataset", lambda *_, **__: pytest.fail("no"))
    words = tune_words(tmp_path / "set", out=tmp_path / "study")
    given = [word.format(here=tmp_path) for word in wrong]
    assert dispatch(["tune", "triplet", *words, *given]) == 2
    assert said in capsys.readouterr().err
