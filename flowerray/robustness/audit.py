"""Can a measured robustness be believed? Checks that fail where gradients are masked, an attack is
too weak or broken, or the embedding has collapsed.

The checks are those of Carlini et al., "On Evaluating Adversarial Robustness", arXiv:1902.06705,
section 4 and 5, and of AutoAttack's own warnings (Croce & Hein, ICML 2020), for retrieval.

Letters: Q audited queries, M of one batch, B images, C H W an image, D embedding dimensions.
"""

import json
from collections.abc import Callable
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.attacks import bank
from flowerray.attacks.logits import MaxSimLogits
from flowerray.attacks.objectives import cross_entropy, margin
from flowerray.attacks.pgd import Attacked, Objective, PGDConfig, pgd
from flowerray.model.modes import full_precision
from flowerray.robustness import checks as limits
from flowerray.robustness.attack import Robustness, perturb
from flowerray.robustness.checks import Check, beyond_chance, telling_eps
from flowerray.robustness.victim import Victim

CHECKS = (
    "zero_radius", "inside", "monotone", "huge", "more_steps", "order", "survivors", "black_box",
    "transfer", "restarts", "gradients", "noise", "undefended", "batches", "collapse", "decision",
)  # fmt: skip
"""The methods of `Auditor` that are checks, in the order in which they run."""


class Auditor:
    """Runs the checks on a few queries of one measurement; each method is one check."""

    def __init__(
        self,
        victim: Victim,
        result: Robustness,
        *,
        queries: int = 128,
        standard: Victim | None = None,
        standard_result: Robustness | None = None,
    ) -> None:
        """Prepares the queries.

        Args:
            victim: of the measurement.
            result: of `robustness.attack` there.
            queries: how many are looked at.
            standard: the same queries for the model that was not hardened; None = no transfer.
            standard_result: its measurement.
        """
        self.config = victim.config
        self.result = result
        self.standard_result = standard_result
        self.eps = telling_eps(result)
        self.victim, self.rows = victim.narrow(queries)
        self.standard = None if standard is None else standard.narrow(queries)[0]
        self.clean_Q = result.clean.hit_Q[self.rows]
        self._all = np.arange(len(self.clean_Q))

    @full_precision()
    def run(self, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
        """All checks; `progress` is called with 1 after each.

        Returns:
            `passed` (False where one check failed), `failed` (their names), `eps` (the radius at
            which most of them look, in 1/255), `queries`, `checks`: plain data.
        """
        checks: list[Check] = []
        for name in CHECKS:
            kept = self.victim.journal.once(f"audit {name}", partial(self._kept, name))
            checks += [Check(*check) for check in json.loads(str(kept["checks"]))]
            if progress is not None:
                progress(1)
        failed = [check.name for check in checks if check.passed is False]
        return {
            "passed": not failed, "failed": failed, "eps": self.eps, "queries": len(self.clean_Q),
            "checks": [check._asdict() for check in checks],
        }  # fmt: skip

    def _kept(self, name: str) -> dict[str, NDArray]:
        return {"checks": np.array(json.dumps(getattr(self, name)()))}

    # ---- what the attacks of the bank say

    def zero_radius(self) -> list[Check]:
        """eps 0 returns the photograph, bit by bit."""
        changed = 0.0
        for batch in self.victim.batches(self._all):
            clean, other = self._perturb("pgd", batch, 0.0)
            changed = max(changed, float((clean - other).abs().max()))
        text = f"at eps 0 pixels change by {changed:g}"
        return [Check("eps 0 is exact", changed == 0, changed, text)]

    def inside(self) -> list[Check]:
        """No attack leaves the budget, where `perturb` would put the photograph in its place; a few
        steps of each show it. `standard` looks after its own parts.
        """
        left_out = (*bank.MINIMUM_NORM, "standard")
        names = [name for name in self.config.attacks if name not in left_out]
        if not names:
            text = "these attacks count only where they end inside"
            return [Check("attacks stay inside", None, None, text)]
        batch = np.arange(min(limits.ALONE, len(self.clean_Q)))
        images = self.victim.images(self.victim.chosen_Q[batch])
        few = {"restarts": 1, "steps": limits.STEPS[1], "black_box_queries": limits.FEW_PASSES}
        budget = self.config.model_copy(update=few)
        outside = 0
        for name in names:
            attacked = bank.run(
                name, self.victim.embedder, images, self._labels(batch), *self.victim.gallery(),
                norm=self.config.norm, epsilon=self.eps, budget=budget, seed=self.config.seed,
                raw=True, own_images_refused=False,
            )  # fmt: skip
            allowed = bank.admissible(images, attacked, self.config.norm, self.eps / 255)
            outside += int((~allowed).sum())
        share = outside / (len(names) * len(batch))
        text = f"{outside} of {len(names) * len(batch)} attacked images lie beyond eps or [0,1]"
        return [Check("attacks stay inside", outside == 0, share, text)]

    def monotone(self) -> list[Check]:
        """A larger radius is not weaker, each one measured by itself."""
        worst, bad = 0.0, False
        for small, large in pairwise(self.result.alone.values()):
            gap, too_much = beyond_chance(small.hit_Q, large.hit_Q)
            worst, bad = max(worst, gap), bad or too_much
        text = f"R@1 rises by at most {worst:.3f} from one eps to the next"
        return [Check("monotone in eps", not bad, worst, text)]

    def huge(self) -> list[Check]:
        """A radius of half the range leaves chance."""
        size = self.victim.embedder.image_size
        eps = limits.HUGE if self.config.norm == "linf" else limits.HUGE * np.sqrt(3 * size * size)
        right_Q = self._margin(eps, limits.STEPS[-1], self.clean_Q)
        value, chance = float(right_Q.mean()), self.victim.chance()
        text = f"at {eps:.0f}/255 R@1 is {value:.3f}; chance is {chance:.3f}"
        return [Check("huge eps kills", value <= chance + 0.05, value, text)]

    def more_steps(self) -> list[Check]:
        """More steps are not weaker, and reach higher values."""
        right, values = [], []
        for steps in limits.STEPS:
            reached = 0.0

            def attacked(batch: NDArray, steps: int = steps) -> Tensor:
                nonlocal reached
                found = self._pgd(self.victim, self.eps, steps, 0, None, batch)
                reached += float(found.value_B.sum())
                return found.images_BCHW

            right.append(self._survive(self.clean_Q, attacked))
            values.append(reached / max(1, int(self.clean_Q.sum())))
        gaps = [beyond_chance(few, many) for few, many in pairwise(right)]
        rising = all(many >= few - 1e-4 for few, many in pairwise(values))
        rates = ", ".join(f"{right_Q.mean():.3f}" for right_Q in right)
        text = f"R@1 after {', '.join(map(str, limits.STEPS))} steps: {rates}"
        passed = rising and not any(too_much for _, too_much in gaps)
        return [Check("more steps not weaker", passed, max(gap for gap, _ in gaps), text)]

    def order(self) -> list[Check]:
        """FGSM is not stronger than PGD, and PGD is not stronger than APGD."""
        right = {name: self._bank(name, self.clean_Q) for name in ("fgsm", "pgd", "apgd-ce")}
        checks = []
        for weak, strong in (("fgsm", "pgd"), ("pgd", "apgd-ce")):
            gap, too_much = beyond_chance(right[weak], right[strong])
            text = f"R@1 {weak} {right[weak].mean():.3f}, {strong} {right[strong].mean():.3f}"
            checks.append(Check(f"{weak} not stronger than {strong}", not too_much, gap, text))
        return checks

    def survivors(self) -> list[Check]:
        """What each radius left right withstands APGD with five times the steps: else the budget
        was too small. From the largest radius down; what withstood there does so within less.
        """
        said, worst, bad = [], 0.0, False
        withstood_Q = np.zeros_like(self.clean_Q)
        for eps in sorted(self.result.alone, reverse=True):
            if eps > 0:
                left_Q = self.result.alone[eps].hit_Q[self.rows]
                again_Q = self._withstand(self.victim, left_Q & ~withstood_Q, eps)
                right_Q = left_Q & (withstood_Q | again_Q)
                share, too_much = beyond_chance(right_Q, left_Q)
                said.append(f"{left_Q.sum() - right_Q.sum()} of {left_Q.sum()} at {eps:g}/255")
                worst, bad = max(worst, share), bad or too_much
                withstood_Q |= right_Q
        text = f"{limits.MANY_STEPS * self.config.steps} steps of APGD break {', '.join(said)}"
        return [Check("survivors withstand five times the steps", not bad, worst, text)]

    def black_box(self) -> list[Check]:
        """An attack without gradients does not break what attacks with gradients leave."""
        left_Q = self._left_white
        broken = left_Q & ~self._bank("square", left_Q)
        extra = float(broken.mean())
        text = f"square alone breaks {extra:.3f} of the queries, {left_Q.mean():.3f} were left"
        return [Check("black box not stronger", extra <= self._at_most(limits.EXTRA), extra, text)]

    def transfer(self) -> list[Check]:
        """Images made on the standard model do not break what an attack on this one leaves."""
        if self.standard is None:
            return [Check("transfer not stronger", None, None, "no standard model was given")]
        if self.standard.embedder.image_size != self.victim.embedder.image_size:
            text = "the standard model takes images of another size"
            return [Check("transfer not stronger", None, None, text)]
        attacked = partial(self._pgd, self.standard, self.eps, limits.STEPS[-1], 0, None)
        left_Q = self._left_white
        right_Q = self._survive(left_Q, lambda batch: attacked(batch).images_BCHW)
        broken = float((left_Q & ~right_Q).mean())
        text = f"images made on the standard model break {broken:.3f} more queries"
        return [Check("transfer not stronger", broken <= self._at_most(limits.EXTRA), broken, text)]

    def restarts(self) -> list[Check]:
        """More random starts change little: else the budget is too small."""
        union_Q = self._left_once
        for restart in range(1, limits.MANY_RESTARTS):
            union_Q = self._margin(self.eps, self.config.steps, union_Q, restart)
        drop = float(self._left_once.mean() - union_Q.mean())
        text = f"R@1 drops by {drop:.3f} from 1 to {limits.MANY_RESTARTS} restarts"
        return [Check("restarts add little", drop <= self._at_most(limits.EXTRA), drop, text)]

    # ---- what the model itself says

    def gradients(self) -> list[Check]:
        """Gradients that are exactly 0 hide the way that an attack would take."""
        zero = 0
        logits_of = MaxSimLogits(self.victim.embedder, *self.victim.gallery())
        for batch in self.victim.batches(self._all):
            start = self._perturb("noise", batch, self.eps)[1]
            zero_B = torch.zeros(len(batch), dtype=torch.bool, device=start.device)
            places_B = logits_of.places(self._labels(batch))
            for objective in (
                self._objective(self.victim, batch),
                cross_entropy(logits_of, places_B),
            ):
                gradient_BN = _gradient(objective, start).flatten(1)
                zero_B |= ~(gradient_BN.any(1) & gradient_BN.isfinite().all(1))
            zero += int(zero_B.sum())
        share = zero / len(self.clean_Q)
        text = f"{share:.3f} of the images have a gradient of exactly 0, or none that is finite"
        return [Check("gradients exist", share < limits.ZERO_GRADIENTS, share, text)]

    def noise(self) -> list[Check]:
        """Noise as large as the perturbation hardly matters."""
        drop = float(self.clean_Q.mean() - self._bank("noise", self.clean_Q).mean())
        text = f"R@1 changes by {-drop:+.3f} under random noise of the same eps"
        return [Check("noise is harmless", drop <= self._at_most(0.05), drop, text)]

    def undefended(self) -> list[Check]:
        """The model that was not hardened falls, or what is left of it withstands five times the
        steps: some small networks are hard to turn.
        """
        name = "standard model falls"
        result = self.standard_result
        radii = [eps for eps in result.worst if eps >= 4] if result is not None else []
        if result is None or not radii or self.config.norm != "linf":
            return [Check(name, None, None, "no standard model at 4/255 or more")]
        left = result.worst[radii[0]]
        value, falls = left.recall_at_1, left.recall_at_1 <= 0.05
        text = f"its R@1 at {radii[0]:g}/255 is {value:.3f}"
        if not falls:
            victim = self.standard or self.victim
            left_Q = left.hit_Q[self.rows]
            right_Q = self._withstand(victim, left_Q, radii[0])
            falls = not beyond_chance(right_Q, left_Q)[1]
            text += f", {limits.MANY_STEPS * self.config.steps} steps of APGD break "
            text += f"{left_Q.sum() - right_Q.sum()} of {left_Q.sum()}"
        return [Check(name, falls, value, text)]

    def batches(self) -> list[Check]:
        """An image's gradient does not depend on the images beside it."""
        batch = np.arange(min(32, len(self.clean_Q)))
        images = self.victim.images(self.victim.chosen_Q[batch])
        together = _gradient(self._objective(self.victim, batch), images)
        differences = []
        for row in batch[: limits.ALONE]:
            alone = _gradient(
                self._objective(self.victim, batch[row : row + 1]), images[row : row + 1]
            )
            size = float(together[row].norm())
            differences.append(float((alone[0] - together[row]).norm()) / max(size, 1e-30))
        value = float(np.median(differences))
        text = f"gradients alone and in a batch of {len(batch)} differ by {value:.1e}"
        return [Check("batch does not matter", value < 1e-3, value, text)]

    def collapse(self) -> list[Check]:
        """A constant embedding resists any attack on it and is of no use."""
        found = self.result.collapse
        text = "collapsed: " if found["collapsed"] else ""
        text += f"mean cosine {found['mean_cosine']:.3f}, "
        text += f"effective rank {found['effective_rank']:.1f}"
        return [Check("not collapsed", not found["collapsed"], found["mean_cosine"], text)]

    def decision(self) -> list[Check]:
        """The logits that are attacked decide as the search does, on clean and attacked images."""
        agree = []
        logits_of = MaxSimLogits(self.victim.embedder, *self.victim.gallery())
        for batch in self.victim.batches(self._all):
            for images in self._perturb("pgd", batch, self.eps):
                with torch.inference_mode():
                    column_B = logits_of(images).argmax(1)
                said_B = logits_of.classes_C[column_B].cpu().numpy()
                ranked = self.victim.rank(self.victim.embed(images), said_B)
                agree.append(ranked["hit"])
        share = float(np.concatenate(agree).mean())
        text = f"arg max of the attacked logits = nearest neighbour for {share:.3f}"
        return [Check("logits are the search", share == 1, share, text)]

    # ---- tools

    def _at_most(self, share: float) -> float:
        """That share of the queries, or one of them where it is less than one."""
        return max(share, 1 / len(self.clean_Q))

    def _withstand(
        self, victim: Victim, left_Q: NDArray[np.bool_], eps: float
    ) -> NDArray[np.bool_]:
        """(Q,): which of these are right under five times the steps of APGD, then targeted APGD."""
        many = {"restarts": 1, "steps": limits.MANY_STEPS * self.config.steps}
        config = self.config.model_copy(update=many)
        classes = len(np.unique(victim.gallery_labels_G))

        def attacked(batch: NDArray) -> Tensor:
            return perturb(victim, name, batch, eps, config)[1]

        for name in ("apgd-ce", "apgd-dlr"):
            if classes >= bank.least_classes(name):
                left_Q = self._survive(left_Q, attacked, victim)
        return left_Q

    def _survive(
        self,
        left_Q: NDArray[np.bool_],
        attacked: Callable[[NDArray], Tensor],
        victim: Victim | None = None,
    ) -> NDArray[np.bool_]:
        """(Q,): which of these queries are right on the images that `attacked` makes of a batch of
        them, in the victim of the measurement where no other is given.
        """
        victim, right_Q = victim or self.victim, left_Q.copy()
        for batch in victim.batches(np.flatnonzero(left_Q)):
            emb_MD = victim.embed(attacked(batch))
            right_Q[batch] = victim.rank(emb_MD, victim.labels_Q[batch])["hit"]
        return right_Q

    def _perturb(self, name: str, batch: NDArray, eps: float) -> tuple[Tensor, Tensor]:
        once = self.config.model_copy(update={"restarts": 1})
        return perturb(self.victim, name, batch, eps, once)

    def _bank(self, name: str, left_Q: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(Q,): which of these are right under one start of an attack at the telling radius."""
        return self._survive(left_Q, lambda batch: self._perturb(name, batch, self.eps)[1])

    @cached_property
    def _left_once(self) -> NDArray[np.bool_]:
        """(Q,): right under one start of PGD on the margin."""
        return self._margin(self.eps, self.config.steps, self.clean_Q)

    @cached_property
    def _left_white(self) -> NDArray[np.bool_]:
        """(Q,): right under the two strongest attacks with gradients."""
        return self._bank("apgd-ce", self._left_once)

    def _margin(
        self, eps: float, steps: int, left_Q: NDArray[np.bool_], restart: int = 0
    ) -> NDArray[np.bool_]:
        """(Q,): which of these are right under one start of PGD on the margin."""
        attacked = partial(self._pgd, self.victim, eps, steps, restart, 0.0)
        return self._survive(left_Q, lambda batch: attacked(batch).images_BCHW)

    def _pgd(
        self, victim: Victim, eps: float, steps: int, restart: int, stop: float | None,
        batch: NDArray,
    ) -> Attacked:  # fmt: skip
        """One start of PGD on the margin; above the value `stop` an image is left alone."""
        return pgd(
            self._objective(victim, batch),
            victim.images(victim.chosen_Q[batch]),
            PGDConfig(norm=self.config.norm, epsilon=eps, steps=steps),
            seed=(self.config.seed, restart),
            positions=batch.tolist(),
            stop_above=stop,
        )

    def _labels(self, batch: NDArray) -> Tensor:
        return torch.from_numpy(self.victim.labels_Q[batch]).to(self.victim.device)

    def _objective(self, victim: Victim, batch: NDArray) -> Objective:
        return margin(victim.embedder, *victim.gallery(), self._labels(batch))


def _gradient(objective: Objective, images_BCHW: Tensor) -> Tensor:
    images_BCHW = images_BCHW.detach().clone().requires_grad_()
    return torch.autograd.grad(objective(images_BCHW).sum(), images_BCHW)[0]
