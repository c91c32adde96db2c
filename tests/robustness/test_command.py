"""`flowerray attack`: what it keeps in a RUN, what it prints, and the model beside it."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowerray.cli import dispatch
from flowerray.data.source import open_dataset
from flowerray.errors import UserError
from flowerray.opening import Model, open_model
from flowerray.robustness import command as command
from flowerray.robustness.command import attack_model, standard_of
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.record import metrics
from flowerray.robustness.table import attack_table
from flowerray.robustness.victim import _possible, open_victim
from flowerray.training.rundir import RunDir

CPU = torch.device("cpu")
QUICK = AttackConfig(
    attacks=("fgsm", "margin"), eps=(0, 4, 32), steps=3, restarts=1, max_queries=12, max_pairs=9
)


def test_what_is_kept(model: Model, run: RunDir, small_run: Path) -> None:
    before = {name: value.clone() for name, value in model.embedder.state_dict().items()}
    modes = [module.training for module in model.embedder.modules()]
    content = attack_model(model, QUICK, beside=str(small_run), quiet=True)
    (kept,) = json.loads((run.path / "robustness.json").read_text())["results"]
    assert kept == json.loads(json.dumps(content))
    assert kept["num_queries"] == 12 and kept["num_gallery"] == 60 and kept["gallery"] == "train"
    assert len(kept["queries"]) == 12 == len(kept["worst_case"]["4"]["right"])
    assert set(kept["worst_case"]) == {"0", "4", "32"} and kept["rows"] == "cumulative"
    assert kept["worst_case"]["32"]["pair_accuracy"] <= kept["clean"]["pair_accuracy"]
    assert kept["worst_case"]["0"]["recall_at_1"] == kept["clean"]["recall_at_1"]
    # The same weights beside it, on the same queries, fall the same way.
    assert kept["beside"]["worst_case"] == kept["worst_case"]
    assert kept["beside"]["gallery_hash"] == kept["gallery_hash"]
    for word in ("queries", "gallery", "white box", "linf", "fp32", "[0,1]"):
        assert word in kept["threat_model"]
    for picture in ("robustness.png", "worst_queries.png"):
        assert Image.open(run.plots / picture).width > 400
    (record,) = [
        r for r in run.records() if "test/attacked_linf/recall_at_1/eps_32" in r["metrics"]
    ]
    worst = kept["worst_case"]["32"]
    assert record["metrics"]["test/attacked_linf/recall_at_1/eps_32"] == worst["recall_at_1"]
    assert record["metrics"] == metrics(content)
    for name, value in model.embedder.state_dict().items():
        assert torch.equal(value, before[name])
    assert modes == [module.training for module in model.embedder.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.embedder.parameters())


def test_another_attack_is_added_and_the_same_replaced(model: Model, run: RunDir) -> None:
    small = QUICK.model_copy(update={"attacks": ("fgsm",), "max_pairs": 0})
    for norm, eps in (("linf", 4.0), ("linf", 8.0), ("linf", 4.0), ("l2", 255.0)):
        config = small.model_copy(update={"norm": norm, "eps": (0.0, eps)})
        attack_model(model, config, quiet=True)
    results = json.loads((run.path / "robustness.json").read_text())["results"]
    assert [(r["norm"], list(r["worst_case"])) for r in results] == [
        ("linf", ["0", "8"]),
        ("linf", ["0", "4"]),
        ("l2", ["0", "255"]),
    ]
    assert "pair_accuracy" not in results[0]["clean"]
    for option in ("minimum_steps", "cw_weight", "standard"):
        del results[2]["config"][option]  # as version 0.1.0 wrote it
    (run.path / "robustness.json").write_text(json.dumps({"results": results}))
    attack_model(model, config, quiet=True)
    assert len(json.loads((run.path / "robustness.json").read_text())["results"]) == 3


def test_a_quick_attack_leaves_an_audited_one_as_it_is(
    model: Model, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    config = QUICK.model_copy(update={"eps": (0.0, 8.0), "max_pairs": 0, "black_box_queries": 20})
    attack_model(model, config, audit=True, audit_queries=8, quiet=True)
    picture, records = (run.plots / "robustness.png").read_bytes(), run.records()
    weak = config.model_copy(update={"attacks": ("fgsm",)})
    attack_model(model, weak, quiet=True)
    assert "goes on to show its audited attack" in capsys.readouterr().err
    results = json.loads((run.path / "robustness.json").read_text())["results"]
    assert [bool(r["audit"]) for r in results] == [True, False]
    assert (run.plots / "robustness.png").read_bytes() == picture and run.records() == records
    attack_model(model, config, quiet=True)  # the same again, which says nothing new
    results = json.loads((run.path / "robustness.json").read_text())["results"]
    assert [bool(r["audit"]) for r in results] == [True, False]
    fewer = weak.model_copy(update={"max_queries": 6})  # of others it is the first
    attack_model(model, fewer, quiet=True)
    assert len(run.records()) == len(records) + 1


def test_an_attack_that_cannot_be_kept_is_told_all_the_same(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full)
    words = ["attack", str(run.path), "--attacks", "fgsm", "--eps", "0,8", "--max-queries", "6"]
    assert dispatch([*words, "--max-pairs", "0", "--json"]) == 0
    shown = capsys.readouterr()
    assert list(json.loads(shown.out)["worst_case"]) == ["0", "8"]
    assert "measured, but not kept" in shown.err and "No space left" in shown.err


def test_few_classes_and_a_long_distance(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before the first attack, not after hours of them."""
    default = AttackConfig()
    assert _possible(default, 4) == default
    left = _possible(default, 3)
    assert left.attacks == tuple(name for name in default.attacks if name != "apgd-dlr")
    assert "apgd-dlr is left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="leave standard out"):
        _possible(QUICK.model_copy(update={"attacks": ("fgsm", "standard")}), 3)

    asked: list[AttackConfig] = []

    def stop(model: Model, config: AttackConfig, **_: Any) -> None:
        asked.append(config)
        raise UserError("enough")

    monkeypatch.setattr(command, "attack_model", stop)
    for words in (["--norm", "l2"], ["--norm", "l2", "--eps", "0,9"], []):
        assert dispatch(["attack", str(run.path), *words]) == 2
    assert [config.eps[1] for config in asked] == [32.0, 9.0, 0.5]


def test_only_a_model_that_was_not_hardened_is_the_standard_one(
    model: Model, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    class Auditor:
        def __init__(self, *_: Any, **more: Any) -> None:
            given.append(more)
            raise UserError("enough")

    monkeypatch.setattr(command, "Auditor", Auditor)
    harden = type(model.run.harden)(kind="pgd")
    robust = replace(model, folder=None, run=model.run.model_copy(update={"harden": harden}))
    config = QUICK.model_copy(update={"max_pairs": 0, "eps": (0.0,)})
    for beside in (small_run, _hardened_copy(small_run, tmp_path, small_run)):
        with pytest.raises(UserError, match="enough"):
            attack_model(robust, config, beside=str(beside), audit=True, quiet=True)
    assert [more["standard"] is None for more in given] == [False, True]
    assert [more["standard_result"] is None for more in given] == [False, True]


def test_a_model_beside_that_was_trained_on_the_queries_is_refused(
    model: Model, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowerray.cluster.driver import train_run
    from tests.small import small

    run = small(small_set, epochs=1)
    data = run.data.model_copy(update={"protocol": "notebooks"})  # it trains on the test images
    train_run(run.model_copy(update={"data": data}), tmp_path / "other", quiet=True)
    with pytest.raises(UserError, match=r"24 of the 24 test queries .*: name another `beside`"):
        attack_model(model, QUICK, beside=str(tmp_path / "other"), quiet=True)
    config = QUICK.model_copy(update={"max_pairs": 0, "eps": (0.0,)})
    other = str(tmp_path / "other")
    content = attack_model(model, config, beside=other, beside_may_lack=True, quiet=True)
    assert content["beside"] is None
    assert "nothing is attacked beside it: 24 of the 24" in capsys.readouterr().err
    twin = replace(model, name="twin", dataset="that of another day")
    dataset = open_dataset(model.run.data)
    with pytest.raises(UserError, match="twin was trained before"):
        command.refuse_strangers(twin, model, dataset, "test")


def test_self_gallery_leaves_the_attacked_queries_out(model: Model) -> None:
    config = QUICK.model_copy(update={"gallery": "self", "max_queries": 1000, "max_pairs": 0})
    dataset = open_dataset(model.run.data)
    victim = open_victim(model, dataset, config, quiet=True)
    assert len(victim.chosen_Q) == 12  # half of 6 classes of 4
    assert not set(victim.query_paths) & set(victim.gallery_paths)
    assert len(victim.gallery_labels_G) == 12
    content = attack_model(model, config, quiet=True)
    assert content["gallery"] == "self" and content["num_gallery"] == 12


@pytest.mark.parametrize("gallery", [None, "train", "self"])
def test_train_queries_never_meet_themselves(model: Model, gallery: str | None) -> None:
    config = QUICK.model_copy(update={"split": "train", "gallery": gallery, "max_pairs": 0})
    dataset = open_dataset(model.run.data)
    victim = open_victim(model, dataset, config, quiet=True)
    queries, rest = victim.query_paths, victim.gallery_paths
    assert len(queries) == 12 and not set(queries) & set(rest)
    assert set(queries) | set(rest) == {dataset.paths[i] for i in dataset.splits["train"]}
    content = attack_model(model, config.model_copy(update={"eps": (0.0,)}), quiet=True)
    assert (content["split"], content["gallery"]) == ("train", "self")


def test_disjoint_classes_are_searched_among_themselves(model: Model) -> None:
    data = model.run.data.model_copy(update={"protocol": "disjoint"})
    run = model.run.model_copy(update={"data": data})
    disjoint = replace(model, folder=None, run=run, dataset=None)
    config = QUICK.model_copy(update={"eps": (0.0,), "max_pairs": 0})
    assert attack_model(disjoint, config, quiet=True)["gallery"] == "self"


def test_a_model_beside_of_the_same_name_hides_nothing(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """robust/seed0 beside clean/seed0."""
    paths = [shutil.copytree(small_run, tmp_path / kind / "seed0") for kind in ("robust", "clean")]
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "plot_robustness", lambda shown, *_: drawn.append(shown))
    config = QUICK.model_copy(update={"max_pairs": 0, "eps": (0.0,)})
    model = open_model(str(paths[0]), torch.device("cpu"))
    content = attack_model(model, config, beside=str(paths[1]), quiet=True)
    assert drawn == [{"seed0": content, "seed0, beside it": content["beside"]}]


def test_notebooks_preset(model: Model) -> None:
    from flowerray.robustness.config import PRESETS

    config = PRESETS["notebooks"]
    assert config.attacks == ("fgsm", "pgd", "cw", "deepfool") and config.eps == (0, 4, 8)
    assert config.alpha_ratio / config.steps == 1 / 4  # PGD steps of eps / 4
    assert config.cw_weight == 1 and config.minimum_steps == 50
    config = config.model_copy(update={"max_queries": 3, "attacks": ("fgsm", "pgd")})
    content = attack_model(model, config, quiet=True)
    assert content["rows"] == "independent"
    for scores in content["attacks"].values():
        assert all(0 <= score["pair_accuracy"] <= 1 for score in scores.values())
    assert "pair accuracy under each attack alone" in attack_table(content)


def test_an_attacked_gallery_and_the_score(model: Model, run: RunDir) -> None:
    config = QUICK.model_copy(update={"perturb": "gallery", "eps": (0.0, 32.0), "max_queries": 6})
    content = attack_model(model, config, ers=True, audit_queries=4, quiet=True)
    assert content["perturb"] == "gallery" and "queries are clean" in content["threat_model"]
    assert content["ers"]["num_queries"] == 4 and len(content["ers"]["terms"]) == 10
    assert content["ers"]["clean_recall_at_1"] == content["clean"]["recall_at_1"]
    text = attack_table(content)
    assert "ERS" in text and f"{100 * content['clean']['recall_at_1']:.1f} %" in text


def table_lines(content: dict[str, Any]) -> list[str]:
    lines = attack_table(content).splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def test_a_failed_audit_and_a_collapse_are_shouted(model: Model) -> None:
    config = QUICK.model_copy(update={"max_pairs": 0, "eps": tuple(map(float, range(7)))})
    content = attack_model(model, config, quiet=True)
    lines = table_lines(content)
    assert any("Not audited" in line for line in lines)
    assert not any("No standard model" in line for line in lines)
    hardened = table_lines({**content, "hardening": "pgd"})
    assert any("No standard model" in line for line in hardened)
    check = {"name": "monotone in eps", "passed": False, "value": 0.3, "text": "rises " * 20}
    content["audit"] = {
        "passed": False, "failed": [check["name"]], "eps": 4.0, "queries": 8, "checks": [check],
    }  # fmt: skip
    content["collapse"] = {**content["collapse"], "collapsed": True}
    content["beside"] = {**content, "beside": None, "audit": None}
    text = "\n".join(table_lines(content))
    assert "AUDIT FAILED, do not believe" in text and "COLLAPSED" in text and "FAIL" in text
    assert metrics(content)["test/attacked_linf/audit_failed"] == 1


def test_a_table_of_many_radii_is_folded(model: Model) -> None:
    config = QUICK.model_copy(update={"max_pairs": 0, "eps": (0.0, 4.0)})
    content = attack_model(model, config, quiet=True)
    many = {f"{eps}": content["worst_case"]["4"] for eps in range(16)}
    text = "\n".join(table_lines({**content, "worst_case": many}))
    head = [line for line in text.splitlines() if line.startswith("eps (/255)")]
    assert " ".join(head).split() == [
        *["eps", "(/255)", *map(str, range(11))], *["eps", "(/255)", *map(str, range(11, 16))],
    ]  # fmt: skip
    assert text.count("clean R@1") == 1 and text.count("worst case of all attacks") == 2


def _hardened_copy(small_run: Path, folder: Path, init: Path | None) -> Path:
    """The small model as an export that says it was hardened, from `init`."""
    content = torch.load(small_run / "best_model_triplet_loss.pth", weights_only=True)
    run = json.loads(content["run"])
    run["harden"]["kind"], run["init"] = "pgd", None if init is None else str(init)
    content["run"] = json.dumps(run)
    torch.save(content, folder / f"from-{init and init.name}.pth")
    return folder / f"from-{init and init.name}.pth"


class Terminal(StringIO):
    """A standard error that somebody looks at, so that bars are drawn."""

    def isatty(self) -> bool:
        return True


def test_an_audit_on_a_terminal_and_one_that_is_interrupted(
    model: Model, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QUICK.model_copy(update={"eps": (0.0, 8.0), "max_pairs": 0, "black_box_queries": 20})
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    content = attack_model(model, config, audit=True, audit_queries=8)
    assert content["audit"] is not None and "16/16" in terminal.getvalue()
    (run.path / "robustness.json").unlink()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowerray.robustness.audit.Auditor.run", stop)
    with pytest.raises(KeyboardInterrupt):
        attack_model(model, config, audit=True, quiet=True)
    (kept,) = json.loads((run.path / "robustness.json").read_text())["results"]
    assert kept["worst_case"] == content["worst_case"] and kept["audit"] is None


def test_the_standard_model_of_a_hardened_one(
    model: Model, small_run: Path, tmp_path: Path
) -> None:
    assert standard_of(model) is None
    harden = type(model.run.harden)(kind="pgd")
    hardened = model.run.model_copy(update={"harden": harden, "init": small_run})
    assert standard_of(replace(model, run=hardened)) == str(small_run)
    again = hardened.model_copy(update={"init": _hardened_copy(small_run, tmp_path, small_run)})
    assert standard_of(replace(model, run=again)) == str(small_run)
    scratch = hardened.model_copy(update={"init": _hardened_copy(small_run, tmp_path, None)})
    assert standard_of(replace(model, run=scratch)) is None
    gone = hardened.model_copy(update={"init": small_run / "gone"})
    assert standard_of(replace(model, run=gone)) is None


def test_the_command(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "attack", str(run.path), "--attacks", "fgsm,margin", "--eps", "0,8", "--steps", "2",
        "--restarts", "1", "--max-queries", "6", "--max-pairs", "0", "--json",
    ]  # fmt: skip
    assert dispatch(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["worst_case"]) == ["0", "8"]
    assert shown["config"]["attacks"] == ["fgsm", "margin"]
    assert dispatch(words[:-1]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "R@1" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a RUN"),
        (["RUN", "--attacks", "fgsm,nonsense"], "no attack nonsense"),
        (["RUN", "--split", "val", "--gallery", "nowhere"], "nor a folder of images"),
        (["RUN", "--beside", "nowhere"], "nowhere"),
        (["RUN", "--audit", "--perturb", "both"], "not about --perturb both"),
        (["RUN", "--preset", "nonsense"], "preset"),
    ],
)
def test_mistakes_are_one_sentence(
    run: RunDir, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--max-queries", "3", "--max-pairs", "0", "--eps", "0"] if words else []
    words = [str(run.path) if word == "RUN" else word for word in words]
    try:
        status = dispatch(["attack", *words, *quick])
    except SystemExit as stop:  # tyro's own box
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_a_split_that_is_not_there(model: Model) -> None:
    dataset = open_dataset(model.run.data)
    splits = {"test": dataset.splits["test"]}
    config = QUICK.model_copy(update={"split": "val"})
    with pytest.raises(UserError, match="no val split"):
        open_victim(model, replace(dataset, splits=splits), config, quiet=True)
    lonely = replace(dataset, splits={"test": dataset.splits["test"][:1]})
    with pytest.raises(UserError, match="two test images"):
        own = QUICK.model_copy(update={"gallery": "self"})
        open_victim(model, lonely, own, quiet=True)
