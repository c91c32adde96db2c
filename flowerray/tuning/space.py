"""What a study searches: knobs as plain data, turned into Optuna's distributions and into Runs.

A knob is a dotted field of a Run with `{"low", "high", "log"}` or `{"choices"}`, as the method
files declare them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flowerray import methods
from flowerray.errors import UserError
from flowerray.training.run import Run

Knobs = dict[str, dict[str, Any]]
"""Dotted field -> range or choices."""

COMMON: Knobs = {
    "train.lr": {"low": 1e-5, "high": 1e-3, "log": True},
    "train.head_lr_factor": {"low": 1.0, "high": 30.0, "log": True},
    "train.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "train.classes_per_batch": {"choices": [8, 12, 16, 24, 32]},
    "train.images_per_class": {"choices": [2, 4, 8]},
    "augment.strength": {"low": 0.0, "high": 2.0, "log": False},
}
"""Searched with every method. With other P and K an epoch draws other numbers of images; trials end
after equally many (`train.images`)."""

HEAD: Knobs = {
    "train.lr": {"low": 3e-5, "high": 3e-2, "log": True},
    "train.weight_decay": COMMON["train.weight_decay"],
    "train.classes_per_batch": COMMON["train.classes_per_batch"],
    "train.images_per_class": COMMON["train.images_per_class"],
    "embedder.start": {"choices": ["orthogonal", "pca"]},
}
"""In the place of `COMMON` where a head is trained: its one learning rate is `lr` times a fixed
`head_lr_factor`, and its views are augmented once for all trials."""

DIM: Knobs = {"embedder.dim": {"choices": [64, 128, 256, 512]}}
"""Searched only if asked for, since methods are compared at one embedding size."""


def search_space(
    base: Run,
    fixed: Iterable[str],
    num_classes: int,
    num_images: int,
    *,
    workers: int = 1,
    more: Mapping[str, dict[str, Any]] | None = None,
) -> Knobs:
    """The knobs of a study: the method's own, the common ones, and further ones.

    The base's own value is always inside, so that the search can begin with it.

    Args:
        base: the run that the knobs change.
        fixed: dotted fields that the user chose; they are not searched.
        num_classes, num_images: of the training split; batches that cannot be formed are left out.
        workers: of a trial; a batch is shared equally.
        more: further knobs that are asked for (hardening's, `DIM`).

    Raises:
        UserError: nothing is left to search.
    """
    common = HEAD if base.embedder.train == "head" else COMMON
    declared: Knobs = {**methods.get(base.method_name).space, **common, **(more or {})}
    left_out = {*fixed, *(["embedder.start"] if base.init else [])}  # which has a projection
    knobs = {
        name: dict(knob)
        for name, knob in declared.items()
        if name not in left_out and _has_use(base, name, knob)
    }
    if not knobs:
        raise UserError("every knob was given on the command line, so nothing is left to search.")
    knobs = {name: _including(knob, value_of(base, name)) for name, knob in knobs.items()}

    def formable(p: int, k: int) -> bool:
        return p <= num_classes and p * k <= num_images and p * k % workers == 0

    # Any P may meet any K: first the K that the base's P allows, then the P that all these allow.
    ks = [base.train.images_per_class]
    if knob := knobs.get("train.images_per_class"):
        ks = [k for k in knob["choices"] if formable(base.train.classes_per_batch, k)]
        knob["choices"] = ks
    if knob := knobs.get("train.classes_per_batch"):
        knob["choices"] = [p for p in knob["choices"] if all(formable(p, k) for k in ks)]
    return knobs


def _has_use(base: Run, name: str, knob: dict[str, Any]) -> bool:
    """Whether the base takes another value there: hardening refuses the options that its kind has
    no use for.
    """
    values = knob["choices"] if "choices" in knob else [knob["low"], knob["high"]]
    try:
        for value in values:
            with_params(base, {name: value})
    except UserError:
        return False
    return True


def _including(knob: dict[str, Any], value: Any) -> dict[str, Any]:
    if "choices" in knob:
        choices = list(knob["choices"])
        return {"choices": choices if value in choices else [value, *choices]}
    low, high, log = knob["low"], knob["high"], bool(knob.get("log"))
    if value > 0 or not log:
        low, high = min(low, value), max(high, value)
    return {"low": low, "high": high, "log": log}


def distributions(knobs: Knobs) -> dict[str, Any]:
    """Optuna's distributions; integers where both bounds are."""
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for name, knob in knobs.items():
        if "choices" in knob:
            found[name] = CategoricalDistribution(knob["choices"])
        else:
            low, high, log = knob["low"], knob["high"], knob["log"]
            whole = isinstance(low, int) and isinstance(high, int)
            found[name] = (IntDistribution if whole else FloatDistribution)(low, high, log=log)
    return found


def value_of(run: Run, name: str) -> Any:
    """A dotted field of a run."""
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


def defaults(base: Run, knobs: Knobs) -> dict[str, Any]:
    """The base's own values; a zero outside a logarithmic range cannot be asked for, and is left
    to the sampler.
    """
    values = {name: value_of(base, name) for name in knobs}
    return {n: v for n, v in values.items() if "choices" in knobs[n] or v >= knobs[n]["low"]}


def with_params(base: Run, params: Mapping[str, Any]) -> Run:
    """The run with some dotted fields changed.

    Raises:
        UserError: a value that does not fit.
    """
    content = base.to_dict()
    for name, value in params.items():
        part, _, field = name.rpartition(".")
        place = content
        for key in part.split("."):
            place = place[key]
        assert field in place, f"a Run has no {name}"
        place[field] = value
    return Run.from_dict(content)
