"""Knobs as plain data, as Optuna's distributions and as Runs."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from flowerray import methods
from flowerray.errors import UserError
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.run import Run
from flowerray.tuning.space import (
    COMMON,
    DIM,
    defaults,
    distributions,
    search_space,
    value_of,
    with_params,
)

FLOWERS = (102, 1020)
"""Classes and images of the official training split."""


def base(method: str = "triplet", **train: float) -> Run:
    return Run(method=methods.get(method).config(), train=TrainConfig(**train))


@pytest.mark.parametrize("method", methods.names())
def test_every_method_can_be_searched(method: str) -> None:
    run = base(method)
    knobs = search_space(run, (), *FLOWERS)
    assert set(knobs) == set(methods.get(method).space) | set(COMMON)
    found = distributions(knobs)
    start = defaults(run, knobs)
    assert start.keys() == knobs.keys()
    for name, value in start.items():
        assert found[name]._contains(found[name].to_internal_repr(value)), name
    assert with_params(run, start) == run


def test_ranges_and_choices_become_distributions() -> None:
    found = distributions(
        {
            "a": {"low": 0.1, "high": 1.0, "log": True},
            "b": {"low": 1, "high": 7, "log": False},
            "c": {"choices": ["x", "y"]},
        }
    )
    assert found == {
        "a": FloatDistribution(0.1, 1.0, log=True),
        "b": IntDistribution(1, 7),
        "c": CategoricalDistribution(["x", "y"]),
    }


def test_a_knob_that_was_given_is_not_searched() -> None:
    knobs = search_space(base(), ["train.lr", "method.margin"], *FLOWERS)
    assert not {"train.lr", "method.margin"} & set(knobs) and "method.miner" in knobs
    with pytest.raises(UserError, match="nothing is left to search"):
        search_space(base(), [*COMMON, *methods.get("triplet").space], *FLOWERS)


def test_the_size_is_searched_only_if_asked_for() -> None:
    assert "embedder.dim" not in search_space(base(), (), *FLOWERS)
    assert "embedder.dim" in search_space(base(), (), *FLOWERS, more=DIM)


def test_the_default_is_always_inside() -> None:
    run = base(lr=0.5, classes_per_batch=10)
    knobs = search_space(run, (), *FLOWERS)
    assert knobs["train.lr"] == {"low": 1e-5, "high": 0.5, "log": True}
    assert knobs["train.classes_per_batch"]["choices"] == [10, 8, 12, 16, 24, 32]


def test_a_zero_beside_a_logarithmic_range_is_not_asked_for() -> None:
    run = base(weight_decay=0.0)
    knobs = search_space(run, (), *FLOWERS)
    assert knobs["train.weight_decay"]["low"] == 1e-6
    assert "train.weight_decay" not in defaults(run, knobs)


def test_batches_that_cannot_be_formed_are_left_out() -> None:
    assert search_space(base(), (), 12, 120)["train.classes_per_batch"]["choices"] == [8, 12]
    assert search_space(base(), (), 102, 70)["train.classes_per_batch"]["choices"] == [8, 12, 16]
    of_three = search_space(base(), (), *FLOWERS, workers=3)
    assert of_three["train.classes_per_batch"]["choices"] == [12, 24]
    p, k = "train.classes_per_batch", "train.images_per_class"
    for classes, images, workers, run, fixed in (
        (12, 60, 1, base(), ()), (17, 85, 1, base(), ()), (102, 50, 1, base(), (p,)),
        (102, 1020, 4, base(classes_per_batch=9), ()), (102, 60, 1, base(), (k,)),
    ):  # fmt: skip
        knobs = search_space(run, fixed, classes, images, workers=workers)
        ps = knobs.get(p, {"choices": [run.train.classes_per_batch]})["choices"]
        ks = knobs.get(k, {"choices": [run.train.images_per_class]})["choices"]
        assert run.train.classes_per_batch in ps and run.train.images_per_class in ks
        assert all(a <= classes and a * b <= images for a in ps for b in ks), (ps, ks)
        assert all(a * b % workers == 0 for a in ps for b in ks), (ps, ks)


def test_hardening_knobs_that_the_kind_does_not_use_are_left_out() -> None:
    more = {
        "harden.epsilon": {"low": 1.0, "high": 8.0, "log": False},
        "harden.beta": {"low": 1.0, "high": 10.0, "log": True},
    }
    pgd = base().model_copy(update={"harden": HardenConfig(kind="pgd")})
    trades = base().model_copy(update={"harden": HardenConfig(kind="trades")})
    assert {"harden.epsilon", "harden.beta"} & set(search_space(pgd, (), *FLOWERS, more=more)) == {
        "harden.epsilon"
    }
    assert set(more) < set(search_space(trades, (), *FLOWERS, more=more))


def test_parameters_change_a_run_and_are_checked(tmp_path: Path) -> None:
    run = with_params(base(), {"method.margin": 0.4, "train.images_per_class": 8})
    assert value_of(run, "method.margin") == 0.4 and run.train.images_per_class == 8
    assert run.train.model_copy(update={"images_per_class": 4}) == base().train
    with pytest.raises(UserError, match="margin"):
        with_params(base(), {"method.margin": -1.0})
