"""What `flowerray attack` is asked to do."""

from typing import Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from flowerray.attacks import bank
from flowerray.errors import UserError

GRID = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Budgets that are reported, in 1/255."""
L2_GRID = (0.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
"""The same for l2: spread over all pixels, a change has to be longer to be felt."""


class AttackConfig(bank.BankConfig):
    """Which attacks, how strong, on how many queries."""

    attacks: tuple[str, ...] = ("fgsm", "margin", "pgd", "shift", "apgd-ce", "apgd-dlr", "square")
    """Attacks in the order in which they run: fgsm, pgd, apgd-ce, apgd-dlr, fab, square, cw,
    deepfool, shift, margin, standard, and noise as a control. Cheap ones first save the most."""
    eps: tuple[float, ...] = GRID
    """Radii of the perturbation, in 1/255; 0 is the clean photograph. The command takes 0, 32, 64,
    128, 256, 512, 1024 for l2 where none are given."""
    norm: Literal["linf", "l2"] = "linf"
    """How a perturbation is measured: the largest change of a pixel's channel, or the root of the
    sum of all squared changes."""
    split: Literal["train", "val", "test"] = "test"
    """The queries come from here."""
    gallery: str | None = None
    """As for `evaluate`; of `self` the attacked queries are taken out."""
    perturb: Literal["query", "gallery", "both"] = "query"
    """Whose pixels the attacker changes. gallery: each gallery image is pushed away from its class,
    towards the nearest mean of another class, and the queries are clean; both: the queries are
    attacked on top of that, and the attacker sees the changed gallery."""
    max_queries: int = Field(512, ge=1)
    """Queries attacked, spread evenly over the classes."""
    max_pairs: int = Field(384, ge=0)
    """Verification pairs whose attacked side is changed; 0 = none."""
    batch_size: int = Field(32, ge=1)
    """Images attacked at a time; on a CPU 16 to 32 stay in its caches, a GPU wants more."""
    seed: int = Field(0, ge=0)
    """Of the choice of queries and pairs, and of the attacks' random starts."""

    @field_validator("eps")
    @classmethod
    def _ascending(cls, eps: tuple[float, ...]) -> tuple[float, ...]:
        if not eps or not np.isfinite(eps).all() or min(eps) < 0:
            raise UserError("`eps`: give radii of 0 or more, in 1/255.")
        return tuple(sorted(set(eps)))

    @field_validator("attacks")
    @classmethod
    def _known(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in attacks if name not in bank.NAMES]
        if unknown or not attacks:
            raise UserError(
                f"there is no attack {', '.join(unknown) or '(none given)'}: choose from "
                f"{', '.join(bank.NAMES)}."
            )
        return tuple(dict.fromkeys(attacks))

    @model_validator(mode="after")
    def _within_the_range(self) -> Self:
        if self.norm == "linf" and self.eps[-1] > 255:
            raise UserError("`eps`: a pixel cannot change by more than 255/255.")
        return self


PRESETS = {
    "default": AttackConfig(),
    "notebooks": AttackConfig(
        attacks=("fgsm", "pgd", "cw", "deepfool"),
        eps=(0.0, 4.0, 8.0),
        steps=10,
        restarts=1,
        alpha_ratio=2.5,  # ten steps of eps / 4
        independent=True,
    ),
}
"""What `flowerray attack --preset` starts from."""
