"""A Run as data: run.json, its differences, the presets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flowerray import methods
from flowerray.cli.options import parse_run
from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.model.embedder import EmbedderConfig
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.run import PRESETS, ResourcesConfig, Run, differences, own_defaults
from tests.small import small


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json(preset: str, name: str) -> None:
    run = PRESETS[preset](methods.get(name).config())
    content = json.loads(json.dumps(run.to_dict()))
    assert content["method"]["name"] == run.method_name == name
    assert Run.from_dict(content) == run
    assert differences(run, Run.from_dict(content)) == []


def test_fields_of_the_methods_own_config_are_kept() -> None:
    run = Run(method=methods.get("triplet").config(margin=0.37))  # type: ignore[call-arg]
    assert run.to_dict()["method"]["margin"] == 0.37
    assert Run.from_dict(run.to_dict()).method == run.method


def test_differences_name_options_and_leave_out_resources(tmp_path: Path) -> None:
    old = small(tmp_path)
    new = small(tmp_path, lr=0.5, epochs=7).model_copy(
        update={"resources": ResourcesConfig(workers=3)}
    )
    assert differences(old, new) == ["train.epochs", "train.lr"]
    other = small(tmp_path, "center")
    assert {"method.name", "method.margin", "method.center_weight"} <= set(differences(old, other))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"epochs": 0}}, "does not fit .*`train.epochs` = 0: input should be .* 1\\.$"),
        ({"train": {"pace": 1}}, "does not fit .*there is no option `train.pace`\\.$"),
        ({"method": {"name": "quadruplet"}}, "does not fit .*no method 'quadruplet'"),
        ({"method": {}}, "does not fit .*'method.name' is missing"),
        ({"colour": 1}, "does not fit .*no option `colour`"),
    ],
)
def test_what_another_version_wrote_is_refused(change: dict, said: str) -> None:
    content = {**PRESETS["laptop"](methods.get("triplet").config()).to_dict(), **change}
    with pytest.raises(UserError, match=said):
        Run.from_dict(content | {"flowerray": "9.9"})


def test_an_edited_run_is_told_by_its_field() -> None:
    content = Run(method=methods.get("triplet").config()).to_dict()
    content["train"]["epochs"] = "many"
    with pytest.raises(UserError, match="the run is not as flowerray .* wrote it: .*train.epochs"):
        Run.from_dict(content)


def test_the_demo_keeps_its_promises() -> None:
    """At least 40 classes at 96 px."""
    run = PRESETS["demo"](methods.get("triplet").config())
    assert run.data.root is None and run.data.synthetic.classes >= 40
    assert run.embedder.image_size == 96 and run.resources.workers == 1


def test_the_defaults_are_the_contracts() -> None:
    run = PRESETS["laptop"](methods.get("triplet").config())
    assert (run.embedder.backbone, run.embedder.weights) == ("tf_efficientnet_lite0", "bundled")
    assert (run.embedder.image_size, run.embedder.dim) == (128, 128)
    assert (run.train.classes_per_batch, run.train.images_per_class) == (12, 4)
    assert (run.train.epochs, run.train.seed, run.train.checkpoint_every_steps) == (15, 0, 50)


def test_a_method_has_defaults_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the command line, in Python and in a comparison; never in place of what is said, and
    never for another backbone.
    """
    file = methods.get("center")
    own = {"all": {"lr": 7e-4, "epochs": 21}, "head": {"lr": 2e-3}}
    monkeypatch.setattr(methods, "get", lambda name: replace(file, name="center", defaults=own))

    def parsed(*words: str) -> tuple[float, int]:
        train = parse_run("train", "center", list(words))[1].train
        return train.lr, train.epochs

    assert parsed() == (7e-4, 21)
    assert parsed("--train.lr", "1e-4") == (1e-4, 21)
    assert parsed("--preset", "demo") == (7e-4, 8)
    assert parsed("--embedder.train", "head") == (2e-3, 15)
    assert parsed("--embedder.backbone", "resnet18") == parsed("--preset", "gpu")[:1] + (15,)
    shared = own_defaults(TrainConfig(epochs=4), "center", EmbedderConfig())
    assert (shared.lr, shared.epochs) == (7e-4, 4)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (TrainConfig, "warmup_epochs", float("inf")),
        (TrainConfig, "head_lr_factor", float("inf")),
        (TrainConfig, "weight_decay", float("nan")),
        (TrainConfig, "epochs", 10**6),
        (TrainConfig, "images", 10**19),
        (EmbedderConfig, "image_size", 100_000),
        (ResourcesConfig, "cpus_per_worker", 10_000),
        (HardenConfig, "beta", float("inf")),
    ],
)
def test_numbers_that_cannot_be_meant(part: type[Config], field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^`{field}` = .*: input should be"):
        part(**{field: value})
