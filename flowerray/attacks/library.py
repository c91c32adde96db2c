"""torchattacks' attacks on `MaxSimLogits`, with every setting stated.

The caller keeps the module `quiet`: torchattacks flips the mode of frozen layers, leaves eval mode
behind after an exception and reseeds torch's global RNG. It is imported in the functions, since
that takes seconds.

Letters: B images, C channels of an image and classes of logits, H W pixels, K chosen classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowerray.attacks.logits import MaxSimLogits
from flowerray.attacks.pgd import Norm, project
from flowerray.errors import UserError

REFERENCE: Mapping[str, Mapping[str, Any]] = {
    "APGD": {"steps": 100, "n_restarts": 1, "loss": "ce", "eot_iter": 1, "rho": 0.75},
    "APGDT": {"steps": 100, "n_restarts": 1, "eot_iter": 1, "rho": 0.75, "n_classes": 10},
    "FAB": {
        "steps": 100,
        "n_restarts": 1,
        "alpha_max": 0.1,
        "eta": 1.05,
        "beta": 0.9,
        "multi_targeted": True,
        "n_classes": 10,
    },
    "Square": {
        "n_queries": 5000,
        "n_restarts": 1,
        "p_init": 0.8,
        "loss": "margin",
        "resc_schedule": False,
    },
}
"""AutoAttack's `standard` (Croce & Hein, ICML 2020; github.com/fra31/auto-attack) in torchattacks'
words and in its order: each part's every setting but model, norm, epsilon and seed. `n_classes` is
the number of targets plus one there, whatever the number of classes."""

LEAST_CLASSES = {"APGD": 2, "APGDT": 4, "FAB": 2, "Square": 2}
"""How many logits each part's formula takes."""


def settings(
    *, steps: int, restarts: int, targets: int, queries: int, rescale: bool
) -> dict[str, dict[str, Any]]:
    """Every setting of each part for a budget; the keys are those of `REFERENCE`.

    Args:
        steps: of APGD, and of each target of APGDT and FAB.
        restarts: of the same.
        targets: wrong classes that APGDT and FAB aim at, the nearest ones first.
        queries: forward passes of Square.
        rescale: whether Square shrinks its squares over `queries`, or as over 10,000.
    """
    steps_of = {"steps": steps, "n_restarts": restarts}
    targets_of = {"n_classes": targets + 1}
    ours = {
        "APGD": steps_of,
        "APGDT": steps_of | targets_of,
        "FAB": steps_of | targets_of,
        "Square": {"n_queries": queries, "resc_schedule": rescale},
    }
    return {part: {**REFERENCE[part], **ours[part]} for part in REFERENCE}


def attack_within(
    part: str,
    logits: MaxSimLogits,
    images_BCHW: Tensor,
    place_B: Tensor,
    *,
    norm: Norm,
    radius: float,
    seed: int,
    options: Mapping[str, Any],
) -> Tensor:
    """Runs a part of AutoAttack; images that withstand come back clean.

    Args:
        part: a key of `REFERENCE`.
        logits: what is attacked.
        images_BCHW: pixels in [0,1].
        place_B: the true columns of the logits.
        norm: of the radius.
        radius: in the pixels' unit.
        seed: of the part's random choices.
        options: one of the dicts of `settings`.

    Raises:
        UserError: fewer classes than the part's formula takes.
    """
    import torchattacks

    num_classes = len(logits.classes_C)
    if num_classes < LEAST_CLASSES[part]:
        raise UserError(
            f"{part} compares the {LEAST_CLASSES[part]} nearest classes, but the gallery holds "
            f"{num_classes}: choose another attack."
        )
    options = dict(options)
    if "n_classes" in options:
        options["n_classes"] = min(options["n_classes"], num_classes)
    length = {"linf": "Linf", "l2": "L2"}[norm]
    attack = getattr(torchattacks, part)(logits, norm=length, eps=radius, seed=seed, **options)
    # In l2 its APGDT steps all images of a batch by the first one's step size: one at a time.
    size = 1 if part == "APGDT" and norm == "l2" else len(images_BCHW)
    batches = zip(images_BCHW.split(size), place_B.split(size), strict=True)
    attacked_BCHW = torch.cat([_run(attack, *batch) for batch in batches])
    # The library's own projection may round past the radius by a little.
    return project(attacked_BCHW, images_BCHW, radius, norm)


_INSIDE = 1e-3
"""How far from 0 and 1 CW starts: there its tanh has no gradient, and a pixel could not move."""


def carlini_wagner(
    logits: MaxSimLogits, images_BCHW: Tensor, place_B: Tensor, *, steps: int, weight: float
) -> Tensor:
    """CW (Carlini & Wagner, S&P 2017, eq. 8 with l2): the least change that it finds, unbounded.

    We differ: c (`weight`) is fixed and not searched, as in torchattacks.
    """
    import torchattacks

    def excess(logits_BC: Tensor, place_B: Tensor) -> Tensor:
        """f of eq. 8. torchattacks' own takes 0 for the logits that it masks, which cosines reach
        below, and 3.3's indexes on the CPU."""
        own_B1 = place_B[:, None]
        other_B = logits_BC.scatter(1, own_B1, -torch.inf).amax(1)
        return (logits_BC.gather(1, own_B1)[:, 0] - other_B).clamp(min=0)

    attack = torchattacks.CW(logits, c=weight, kappa=0, steps=steps, lr=0.01)
    attack.f = excess
    return _run(attack, images_BCHW.clamp(_INSIDE, 1 - _INSIDE), place_B)


class _Columns(nn.Module):
    """Some of the logits, for an attack that takes one gradient a class."""

    def __init__(self, logits: MaxSimLogits, column_K: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.column_K = column_K

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits BK."""
        return self.logits(images_BCHW)[:, self.column_K]


def deepfool(
    logits: MaxSimLogits, images_BCHW: Tensor, place_B: Tensor, *, steps: int, targets: int
) -> Tensor:
    """DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016, algorithm 2), l2, unbounded.

    As in its authors' code only the nearest wrong classes are considered, `targets` of them: each
    step takes a gradient a class.
    """
    import torchattacks

    with torch.no_grad():
        logits_BC = logits(images_BCHW)
    own_B1 = place_B[:, None]
    kept = min(targets, logits_BC.shape[1] - 1)
    others_BK = logits_BC.scatter(1, own_B1, -torch.inf).topk(kept).indices
    rows = []
    for image_CHW, column_K in zip(images_BCHW, torch.cat([own_B1, others_BK], 1), strict=True):
        attack = torchattacks.DeepFool(_Columns(logits, column_K), steps=steps, overshoot=0.02)
        rows.append(_run(attack, image_CHW[None], torch.zeros_like(column_K[:1])))
    return torch.cat(rows)


def _run(attack: Any, images_BCHW: Tensor, place_B: Tensor) -> Tensor:
    attack.set_device(images_BCHW.device)  # it would take the device of the first parameter
    attack.model.eval()  # else it would put all below in train mode at its end
    attacked_BCHW: Tensor = attack(images_BCHW, place_B)
    return attacked_BCHW.detach()
