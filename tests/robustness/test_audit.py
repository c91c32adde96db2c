"""Each check of the audit passes on a healthy measurement and fails on its own planted fault."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowerray.attacks import bank
from flowerray.attacks.bank import BankConfig
from flowerray.attacks.logits import MaxSimLogits
from flowerray.attacks.pgd import Attacked, PGDConfig
from flowerray.robustness import audit as module
from flowerray.robustness.attack import Robustness, Score, attack
from flowerray.robustness.audit import Auditor
from flowerray.robustness.checks import Check, beyond_chance, telling_eps
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.victim import Victim
from tests.robustness.victim import Colours, Constant, Leaking, Masked, Rippled, victim_of

CONFIG = AttackConfig(
    attacks=("margin", "apgd-ce"), eps=(0, 8, 16, 32), steps=10, restarts=1, black_box_queries=100
)


@pytest.fixture(scope="module")
def measured() -> Robustness:
    return attack(victim_of(config=CONFIG))


@pytest.fixture(scope="module")
def fell(measured: Robustness) -> Robustness:
    """A standard model's measurement: nothing is left at 4/255."""
    nothing = Score(np.zeros(24, bool), np.zeros(24))
    return replace(measured, worst={0.0: measured.clean, 4.0: nothing})


@pytest.fixture
def auditor(measured: Robustness, fell: Robustness) -> Auditor:
    victim = victim_of(config=CONFIG)
    return Auditor(victim, measured, standard=victim, standard_result=fell)


def faulty(model: Any) -> Auditor:
    """The auditor of a model with a fault in it."""
    changes = {"attacks": ("margin",), "black_box_queries": 1000}
    victim = victim_of(model, CONFIG.model_copy(update=changes))
    return Auditor(victim, attack(victim))


def failed(checks: list[Check]) -> bool:
    """Whether a check says so, with its figure and its reason."""
    assert all(check.text for check in checks)
    assert all(check.value is not None for check in checks if check.passed is not None)
    return any(check.passed is False for check in checks)


def test_a_healthy_measurement_passes(auditor: Auditor, measured: Robustness) -> None:
    done: list[int] = []
    found = auditor.run(done.append)
    assert found["failed"] == [] and found["passed"] and len(done) == len(module.CHECKS)
    assert not any(check["passed"] is None for check in found["checks"])
    alone = Auditor(victim_of(config=CONFIG), measured)
    assert alone.transfer()[0].passed is None and alone.undefended()[0].passed is None


def test_the_rule_of_chance() -> None:
    weak, strong = np.ones(100, bool), np.ones(100, bool)
    weak[:10] = False
    assert beyond_chance(weak, strong) == (0.10, True)
    assert beyond_chance(strong, weak) == (-0.10, False)
    strong[10:18] = False
    gap, too_much = beyond_chance(weak, strong)  # 10 against 8 of them is chance
    assert gap == pytest.approx(0.02) and not too_much


def test_where_it_looks(measured: Robustness) -> None:
    half = measured.clean.recall_at_1 / 2
    gaps = {e: abs(s.recall_at_1 - half) for e, s in measured.alone.items() if e > 0}
    assert gaps[telling_eps(measured)] == min(gaps.values())
    victim, rows = victim_of().narrow(7)
    assert len(rows) == 7 and np.array_equal(victim.chosen_Q, victim_of().chosen_Q[rows])


# --- faults of the model --------------------------------------------------------------------------


def test_an_attack_that_leaves_the_budget(
    auditor: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`perturb` would put the photograph in its place, and the model would look robust."""
    assert not failed(auditor.inside())
    attack_named = bank._ATTACKS["margin"]

    def too_far(batch: Any) -> Tensor:
        return batch.images_BCHW + 3 * (attack_named(batch) - batch.images_BCHW)

    monkeypatch.setitem(bank._ATTACKS, "margin", too_far)
    assert failed(auditor.inside())


def test_a_single_query_decides_nothing(auditor: Auditor) -> None:
    """Of 24 one is 4 %, and `--audit-queries` may be as few as 8."""
    assert auditor._at_most(module.limits.EXTRA) == 1 / 24 and auditor._at_most(0.05) == 0.05


def test_masked_gradients() -> None:
    auditor = faulty(Masked())
    assert failed(auditor.gradients()) and failed(auditor.black_box())


def test_a_temperature_that_masks(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.gradients())
    monkeypatch.setattr(module, "MaxSimLogits", partial(MaxSimLogits, temperature=1e5))
    assert failed(auditor.gradients())


def test_a_collapsed_encoder() -> None:
    (check,) = faulty(Constant()).collapse()
    assert check.passed is False and check.text.startswith("collapsed")


def test_a_batch_that_leaks() -> None:
    assert failed(faulty(Leaking()).batches())
    assert not failed(faulty(Colours()).batches())


def turned(victim: Victim, batch: Any) -> tuple[Tensor, Tensor]:
    """Each photograph, and another one in its place."""
    images = victim.images(victim.chosen_Q[batch])
    return images, images.flip(0)


def test_noise_that_kills(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.noise())
    monkeypatch.setattr(module, "perturb", lambda victim, name, batch, *_: turned(victim, batch))
    assert failed(auditor.noise())


def test_a_standard_model_that_stands(auditor: Auditor, measured: Robustness) -> None:
    """It does so because the attack was weak; or, a small one at a small radius, by itself."""
    assert not failed(auditor.undefended())
    strong = Score(np.ones(24, bool), np.ones(24))
    auditor.standard_result = replace(measured, worst={0.0: strong, 16.0: strong})
    assert failed(auditor.undefended())
    auditor.standard_result = replace(measured, worst={0.0: strong, 4.0: strong})
    (check,) = auditor.undefended()
    assert check.passed and "is 1.000, 50 steps of APGD break 1 of 24" in check.text
    auditor.standard_result = replace(measured, worst={0.0: strong, 2.0: strong})
    assert auditor.undefended()[0].passed is None


# --- faults of the attack -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_huge_radius_is_huge_in_each_norm(norm: str, measured: Robustness) -> None:
    config = CONFIG.model_copy(update={"norm": norm})
    (check,) = Auditor(victim_of(config=config), measured).huge()
    assert check.passed
    (check,) = Auditor(victim_of(Masked(), config), measured).huge()
    assert not check.passed


def test_pixels_change_at_radius_zero(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.zero_radius())
    monkeypatch.setattr(bank, "run", lambda n, e, images, *_, **__: (images + 1e-7).clamp(0, 1))
    assert failed(auditor.zero_radius())


def test_a_curve_that_rises(auditor: Auditor) -> None:
    assert not failed(auditor.monotone())
    curve = auditor.result.alone
    turned = dict(zip(curve, reversed(list(curve.values())), strict=True))
    auditor.result = replace(auditor.result, alone=turned)
    assert failed(auditor.monotone())


def still(objective: Callable[[Tensor], Tensor], images: Tensor, *_: Any, **__: Any) -> Attacked:
    """A PGD that does nothing."""
    with torch.no_grad():
        return Attacked(images, objective(images))


def test_an_attack_that_does_nothing(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.huge())
    monkeypatch.setattr(module, "pgd", still)
    assert failed(auditor.huge())


def test_steps_that_weaken(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.more_steps())
    real = auditor._pgd
    monkeypatch.setattr(
        auditor, "_pgd", lambda a, eps, steps, *rest: real(a, eps / steps, 5, *rest)
    )
    assert failed(auditor.more_steps())


def test_an_attack_whose_budget_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the fixed step of 0.1.0, with which more steps were only smaller steps."""
    config = AttackConfig(attacks=("margin",), eps=(0, 16), restarts=1)
    victim = victim_of(Rippled(), config, queries=64, per_class=12)
    assert not failed(Auditor(victim, attack(victim)).survivors())

    def fixed(self: BankConfig, norm: Any, epsilon: float, _: float | None = None) -> PGDConfig:
        return PGDConfig(norm=norm, epsilon=epsilon, steps=self.steps, alpha_ratio=2.5)

    monkeypatch.setattr(BankConfig, "pgd", fixed)
    (check,) = Auditor(victim, attack(victim)).survivors()
    assert check.passed is False and check.text.startswith("100 steps of APGD break ")


@pytest.mark.parametrize("name", ["pgd", "apgd-ce"])
def test_a_strong_attack_that_is_weak(
    auditor: Auditor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert not failed(auditor.order())
    real = bank.run

    def run(asked: str, embedder: Any, images: Tensor, *given: Any, **options: Any) -> Tensor:
        return images if asked == name else real(asked, embedder, images, *given, **options)

    monkeypatch.setattr(bank, "run", run)
    checks = {check.name: check.passed for check in auditor.order()}
    assert [n for n, passed in checks.items() if not passed][0].endswith(f"than {name}")


def test_a_white_box_that_is_blind(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    auditor.eps = 32.0
    assert not failed(auditor.black_box()) and not failed(auditor.transfer())
    monkeypatch.setitem(vars(auditor), "_left_white", auditor.clean_Q.copy())
    assert failed(auditor.black_box()) and failed(auditor.transfer())


def test_transfer_starts_depend_on_the_image_alone(
    auditor: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, ...], list[int]] = {}
    attack_with = module.pgd

    def spy(*args: Any, **options: Any) -> Attacked:
        seen.setdefault(options["seed"], []).extend(options["positions"])
        return attack_with(*args, **options)

    monkeypatch.setattr(module, "pgd", spy)
    monkeypatch.setitem(vars(auditor), "_left_white", auditor.clean_Q.copy())
    auditor.config = auditor.config.model_copy(update={"seed": 7, "batch_size": 5})
    auditor.transfer()
    assert seen == {(7, 0): np.flatnonzero(auditor.clean_Q).tolist()}


def test_gradients_that_are_not_finite(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.gradients())
    gradient = module._gradient
    monkeypatch.setattr(module, "_gradient", lambda *args: gradient(*args) * torch.nan)
    assert failed(auditor.gradients())


def test_restarts_that_matter(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.restarts())
    rng = np.random.default_rng(0)

    def luck(eps: float, steps: int, left_Q: Any, *_: Any) -> Any:
        return left_Q & (rng.random(len(left_Q)) < 0.7)

    monkeypatch.setattr(auditor, "_margin", luck)
    assert failed(auditor.restarts())


def test_logits_that_drifted(auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failed(auditor.decision())

    def drifted(embedder: Any, gallery_GD: Tensor, labels_G: Tensor) -> MaxSimLogits:
        return MaxSimLogits(embedder, gallery_GD, labels_G.roll(1))

    monkeypatch.setattr(module, "MaxSimLogits", drifted)
    assert failed(auditor.decision())
