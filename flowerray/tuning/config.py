"""How a study searches."""

from typing import Literal

from pydantic import Field

from flowerray.config import Config
from flowerray.tuning.trial import ADVERSARIAL, MAP_AT_R


class StudyConfig(Config):
    """How a study searches."""

    trials: int = Field(32, ge=1)
    """Trials of the search, the failed ones too; may differ when a study is resumed."""
    sampler: Literal["tpe", "random", "nsga2", "cmaes"] = "tpe"
    """Who proposes: tpe = multivariate tree-structured Parzen estimator, nsga2 = evolution, cmaes =
    covariance matrix adaptation (numbers only; choices are drawn)."""
    pruner: Literal["asha", "none"] = "asha"
    """asha = a trial goes on past an epoch of 2, 6, 18 ... only among the best third there (by the
    sum of the objectives); none = every trial is trained to its end. nsga2 learns from trials that
    came to their end alone, so none is its default."""
    objective: Literal["map", "pareto"] = "map"
    """map = val MAP@R; pareto = val MAP@R and adversarial R@1, for hardened trainings."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the sampler; each trial trains with --train.seed."""
    confirm_seeds: int = Field(3, ge=0, le=100)
    """Seeds that the search never used, with which the best configuration and the default are
    trained again; 0 = the best trial is taken as it is."""

    then_all: int = Field(0, ge=0, le=100)
    """Of a search with --embedder.train head: so many of its best heads are then trained in full,
    each from its own, and the best of these is confirmed; 0 = the best head is. May differ when a
    study is resumed."""

    @property
    def objectives(self) -> list[str]:
        """Names of the metrics that are maximised."""
        return [MAP_AT_R] if self.objective == "map" else [MAP_AT_R, ADVERSARIAL]


def label(objective: str) -> str:
    """An objective's name in lines and tables."""
    return {MAP_AT_R: "val MAP@R", ADVERSARIAL: "adversarial R@1"}.get(objective, objective)
