"""The bank of attacks on retrieval: a name, an embedder, a gallery -> adversarial queries.

FGSM, PGD, shift and margin are our own gradient descent. APGD, FAB, Square, CW and DeepFool are
torchattacks' on `MaxSimLogits` (library.py); `run` keeps that library's side effects (modes, global
RNG, grad mode, silent acceptance of normalised pixels) away from the caller.

Letters: B images, C channels, H W pixels, D embedding dimensions, G gallery items, N survivors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from flowerray.attacks.library import (
    LEAST_CLASSES,
    REFERENCE,
    attack_within,
    carlini_wagner,
    deepfool,
    settings,
)
from flowerray.attacks.logits import MaxSimLogits, refuse_own_images
from flowerray.attacks.objectives import WRONG, cross_entropy, margin, shift
from flowerray.attacks.pgd import Norm, Objective, PGDConfig, check_pixels, noise, pgd, quiet
from flowerray.config import Config
from flowerray.errors import UserError


class StandardConfig(Config):
    """The budget of the attack `standard`; the defaults are the reference's."""

    steps: int = Field(100, ge=1)
    """Steps of APGD-CE, and of each target of APGD-T and FAB-T."""
    targets: int = Field(9, ge=1)
    """Wrong classes that APGD-T and FAB-T aim at, the nearest ones first."""
    queries: int = Field(5000, ge=1)
    """Forward passes of Square."""


class BankConfig(Config):
    """How much each attack may spend on an image."""

    steps: int = Field(20, ge=1)
    """Gradient steps of one start of pgd, shift, margin and apgd-ce, and of each target of apgd-dlr
    and fab."""
    restarts: int = Field(3, ge=1)
    """Starts of an iterated attack, each on what withstood those before it; a query is right only
    if all of them fail."""
    alpha_ratio: float = Field(2.5, gt=0)
    """Steps times step size over eps of pgd; the step size of shift and margin adapts."""
    targets: int = Field(3, ge=1)
    """Wrong classes that apgd-dlr, fab and deepfool aim at one by one, the nearest ones first; each
    one costs steps x restarts. AutoAttack takes 9."""
    black_box_queries: int = Field(1000, ge=1)
    """Forward passes that square, which sees only similarities, may spend on an image."""
    minimum_steps: int = Field(50, ge=1)
    """Steps of cw and deepfool."""
    cw_weight: float = Field(1.0, gt=0)
    """c of cw, the weight of a wrong decision against the squared distance."""
    independent: bool = False
    """Run every attack on every query, so that each row stands for that attack alone, and make a
    wrong image worse still. Otherwise an attack gets the queries that those before it left right,
    and rows are cumulative; the worst case is the same, up to the random numbers of torchattacks'
    attacks (drawn by place in a batch)."""
    standard: StandardConfig = StandardConfig()
    """The budget of the attack `standard`, which ignores the other fields."""

    def pgd(self, norm: Norm, epsilon: float, alpha_ratio: float | None = None) -> PGDConfig:
        """The budget as our own gradient descent takes it; epsilon in 1/255."""
        return PGDConfig(
            norm=norm,
            epsilon=epsilon,
            steps=self.steps,
            alpha_ratio=alpha_ratio,
            restarts=self.restarts,
        )


def run(
    name: str,
    embedder: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    gallery_GD: Tensor,
    gallery_labels_G: Tensor,
    *,
    norm: Norm,
    epsilon: float,
    budget: BankConfig,
    seed: int,
    positions: Sequence[int] | None = None,
    own_images_refused: bool = True,
    raw: bool = False,
) -> Tensor:
    """Attacks queries; the gallery stays clean and is known to the attacker (white box).

    Nothing of the caller's changes: module modes, requires_grad, grad and torch's RNG are as before
    also after an exception. It works within `no_grad` and `inference_mode`, and in full precision
    within `autocast`. All given images are attacked; leave out those that are lost already.

    The result lies within epsilon and [0,1]. Where apgd-ce, apgd-dlr, fab, square and standard do
    not succeed, and where cw and deepfool, which seek the least change, succeed only beyond epsilon
    (or by the other norm), the clean image comes back.

    Args:
        name: one of `NAMES`.
        embedder: pixels in [0,1] -> unit emb_BD.
        images_BCHW: float32 pixels in [0,1], the queries.
        labels_B: int64 classes.
        gallery_GD: unit embeddings without the attacked images.
        gallery_labels_G: int64 classes of the gallery.
        norm: of epsilon.
        epsilon: in 1/255 (for l2 too).
        budget: steps, restarts, targets.
        seed: of all random choices.
        positions: numbers by which our own attacks draw an image's random starts, so that they do
            not depend on batches; 0..B-1 by default. The library's attacks draw by place in the
            batch.
        own_images_refused: whether to refuse a gallery that holds most of these images; leave it to
            a look at all queries where batches get small.
        raw: give what the attack gave, beyond epsilon too; for a look at the attack itself.

    Returns:
        Adversarial images_BCHW.

    Raises:
        UserError: an unknown name; pixels outside [0,1]; a gallery with the queries in it, of too
            few classes, or without a query's class.
    """
    if name not in _ATTACKS:
        raise UserError(f"There is no attack named {name!r}: choose from {', '.join(NAMES)}.")
    check_pixels(images_BCHW)
    if not len(images_BCHW) or not epsilon:
        return images_BCHW.clone()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images_BCHW.device.type, enabled=False),
        quiet(embedder),
    ):
        # Inference tensors cannot take part in a graph, their copies outside that mode can; and
        # torchattacks takes views of pixels, so that they must be contiguous.
        images_BCHW = images_BCHW.detach().clone(memory_format=torch.contiguous_format)
        gallery_GD = gallery_GD.detach().clone()
        if own_images_refused:
            with torch.no_grad():
                refuse_own_images(embedder(images_BCHW), gallery_GD)
        logits = MaxSimLogits(embedder, gallery_GD, gallery_labels_G)
        batch = _Batch(
            embedder=embedder,
            logits=logits,
            gallery_GD=gallery_GD,
            gallery_labels_G=gallery_labels_G.detach().clone(),
            images_BCHW=images_BCHW,
            labels_B=labels_B.detach().clone(),
            place_B=logits.places(labels_B.detach().clone()),
            positions=tuple(range(len(images_BCHW)) if positions is None else positions),
            norm=norm,
            epsilon=epsilon,
            budget=budget,
            seed=seed,
        )
        attacked_BCHW = _ATTACKS[name](batch)
        return attacked_BCHW if raw else _within(attacked_BCHW, batch)


@dataclass(frozen=True)
class _Batch:
    """What an attack sees."""

    embedder: nn.Module
    logits: MaxSimLogits
    gallery_GD: Tensor
    gallery_labels_G: Tensor
    images_BCHW: Tensor
    labels_B: Tensor
    place_B: Tensor
    """The logits' column of each label."""
    positions: tuple[int, ...]
    norm: Norm
    epsilon: float
    budget: BankConfig
    seed: int

    @property
    def radius(self) -> float:
        """Epsilon in the pixels' unit."""
        return self.epsilon / 255

    def take(self, index_N: Tensor) -> "_Batch":
        """The same with some of the images."""
        return replace(
            self,
            images_BCHW=self.images_BCHW[index_N],
            labels_B=self.labels_B[index_N],
            place_B=self.place_B[index_N],
            positions=tuple(self.positions[i] for i in index_N.tolist()),
        )

    def right(self, images_BCHW: Tensor) -> Tensor:
        """Whether each nearest neighbour is of the right class, B."""
        with torch.no_grad():
            return self.logits(images_BCHW).argmax(1) == self.place_B

    def climb(self, objective: Objective, config: PGDConfig, stop: float) -> Tensor:
        """Our own gradient descent; an image whose value is above `stop` is done, unless it is to
        be made worse still.
        """
        stop_above = None if self.budget.independent else stop
        seed, images_BCHW = (self.seed,), self.images_BCHW
        return pgd(
            objective, images_BCHW, config, seed=seed, positions=self.positions,
            stop_above=stop_above,
        ).images_BCHW  # fmt: skip

    @property
    def classified(self) -> tuple[MaxSimLogits, Tensor, Tensor]:
        """As torchattacks takes it: the model, images, and the right columns."""
        return self.logits, self.images_BCHW, self.place_B

    def library(self, part: str, options: dict[str, Any]) -> Tensor:
        """Runs one of torchattacks' parts of AutoAttack."""
        # Each part has its own seed, so that none starts where another one did.
        key = np.random.SeedSequence((self.seed, list(REFERENCE).index(part)))
        return attack_within(
            part,
            *self.classified,
            norm=self.norm,
            radius=self.radius,
            seed=int(key.generate_state(1)[0]),
            options=options,
        )


def admissible(clean_BCHW: Tensor, attacked_BCHW: Tensor, norm: Norm, radius: float) -> Tensor:
    """Which attacked images lie within [0,1] and the radius (in the pixels' unit), bool B.

    float32 rounds an l2 projection by more the longer it is: 2e-6 of (1 + radius) are allowed, 1e-6
    for linf. What is not finite lies nowhere.
    """
    delta_BN = (attacked_BCHW - clean_BCHW).flatten(1).double()
    order = torch.inf if norm == "linf" else 2
    distance_B = torch.linalg.vector_norm(delta_BN, ord=order, dim=1)
    pixels_BN = attacked_BCHW.flatten(1)
    inside_B = (pixels_BN >= 0).all(1) & (pixels_BN <= 1).all(1)
    return inside_B & (distance_B <= radius + (1e-6 if norm == "linf" else 2e-6 * (1 + radius)))


def _within(attacked_BCHW: Tensor, batch: _Batch) -> Tensor:
    """The attacked images where they are admissible, else the clean ones."""
    inside_B = admissible(batch.images_BCHW, attacked_BCHW, batch.norm, batch.radius)
    return attacked_BCHW.where(inside_B.view(-1, 1, 1, 1), batch.images_BCHW)


def _noise(batch: _Batch) -> Tensor:
    """Uniform noise of the same epsilon, a control that should cost nothing."""
    _, *shape = batch.images_BCHW.shape
    rows = noise((batch.seed,), batch.positions, (shape[0], shape[1], shape[2]), batch.norm)
    return (batch.images_BCHW + batch.radius * rows.to(batch.images_BCHW)).clamp(0, 1)


def _fgsm(batch: _Batch) -> Tensor:
    """Goodfellow, Shlens, Szegedy, ICLR 2015: one full step along the sign of the gradient."""
    config = PGDConfig(
        norm=batch.norm, epsilon=batch.epsilon, steps=1, alpha_ratio=1,
        random_start=False, keep_best=False,
    )  # fmt: skip
    return pgd(cross_entropy(batch.logits, batch.place_B), batch.images_BCHW, config).images_BCHW


def _pgd(batch: _Batch) -> Tensor:
    """Madry et al., ICLR 2018, on the cross-entropy of `MaxSimLogits`, with a fixed step."""
    objective = cross_entropy(batch.logits, batch.place_B, wrong_first=True)
    config = batch.budget.pgd(batch.norm, batch.epsilon, batch.budget.alpha_ratio)
    return batch.climb(objective, config, WRONG / 2)


def _shift(batch: _Batch) -> Tensor:
    """The largest shift need not be the wrong decision: a start that led to one is kept."""
    with torch.no_grad():
        clean_BD = batch.embedder(batch.images_BCHW)
    result_BCHW = batch.images_BCHW.clone()
    index_N = torch.arange(len(result_BCHW), device=result_BCHW.device)
    config = batch.budget.pgd(batch.norm, batch.epsilon).model_copy(update={"restarts": 1})
    for restart in range(batch.budget.restarts):
        left = batch.take(index_N)
        objective = shift(batch.embedder, clean_BD[index_N])
        seed = (batch.seed, restart)
        found = pgd(objective, left.images_BCHW, config, seed=seed, positions=left.positions)
        result_BCHW[index_N] = found.images_BCHW
        index_N = index_N[left.right(found.images_BCHW)]
        if not len(index_N):
            break
    return result_BCHW


def _margin(batch: _Batch) -> Tensor:
    objective = margin(batch.embedder, batch.gallery_GD, batch.gallery_labels_G, batch.labels_B)
    return batch.climb(objective, batch.budget.pgd(batch.norm, batch.epsilon), 0.0)


def _part(part: str) -> Callable[[_Batch], Tensor]:
    def attack(batch: _Batch) -> Tensor:
        budget = batch.budget
        options = settings(
            steps=budget.steps,
            restarts=budget.restarts,
            targets=budget.targets,
            queries=budget.black_box_queries,
            rescale=True,
        )
        return batch.library(part, options[part])

    return attack


def _standard(batch: _Batch) -> Tensor:
    """AutoAttack's standard protocol: each part gets the images that withstood those before it."""
    result_BCHW = batch.images_BCHW.clone()
    index_N = batch.right(batch.images_BCHW).nonzero()[:, 0]
    for part, options in standard_settings(batch.budget.standard).items():
        if not len(index_N):
            break
        left = batch.take(index_N)
        attacked_NCHW = _within(left.library(part, options), left)
        right_N = left.right(attacked_NCHW)
        result_BCHW[index_N[~right_N]] = attacked_NCHW[~right_N]
        index_N = index_N[right_N]
    return result_BCHW


def standard_settings(config: StandardConfig) -> dict[str, dict[str, Any]]:
    """Every setting of each part of `standard`, in its order; compare with `library.REFERENCE`."""
    return settings(
        steps=config.steps,
        restarts=1,
        targets=config.targets,
        queries=config.queries,
        rescale=False,
    )


def _cw(batch: _Batch) -> Tensor:
    budget = batch.budget
    return carlini_wagner(*batch.classified, steps=budget.minimum_steps, weight=budget.cw_weight)


def _deepfool(batch: _Batch) -> Tensor:
    budget = batch.budget
    return deepfool(*batch.classified, steps=budget.minimum_steps, targets=budget.targets)


_ATTACKS: dict[str, Callable[[_Batch], Tensor]] = {
    "noise": _noise,
    "fgsm": _fgsm,
    "pgd": _pgd,
    "apgd-ce": _part("APGD"),
    "apgd-dlr": _part("APGDT"),
    "fab": _part("FAB"),
    "square": _part("Square"),
    "cw": _cw,
    "deepfool": _deepfool,
    "shift": _shift,
    "margin": _margin,
    "standard": _standard,
}

MINIMUM_NORM = ("fab", "cw", "deepfool")
"""Attacks that seek the least change, and may end beyond epsilon."""


def least_classes(name: str) -> int:
    """Classes that a gallery must have for an attack."""
    return LEAST_CLASSES["APGDT"] if name in ("apgd-dlr", "standard") else 2


NAMES: tuple[str, ...] = tuple(_ATTACKS)
"""The attacks: `noise` is a control, `fab` and `apgd-dlr` are targeted, `shift` needs no labels,
`standard` is AutoAttack's protocol."""
