"""The bank: every attack within its bounds, without a trace, and as strong as it claims."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowerray.attacks import bank
from flowerray.attacks.bank import NAMES, BankConfig, StandardConfig
from flowerray.attacks.library import REFERENCE
from flowerray.attacks.logits import MaxSimLogits
from flowerray.errors import UserError
from tests.attacks.batch import Batch, Linear, batch, marked, tiny, traces

SMALL = BankConfig(
    steps=4,
    restarts=2,
    targets=2,
    black_box_queries=10,
    minimum_steps=4,
    standard=StandardConfig(steps=4, targets=2, queries=10),
)
LIBRARY = ("apgd-ce", "apgd-dlr", "fab", "square", "cw", "deepfool", "standard")


@pytest.fixture(scope="module")
def linear() -> Batch:
    return batch(Linear(), side=8, queries=24)


def attack(name: str, made: Batch, **changes: Any) -> Tensor:
    options: dict[str, Any] = {"norm": "linf", "epsilon": 4.0, "budget": SMALL, "seed": 0}
    return bank.run(
        name,
        made.embedder,
        made.images_QCHW,
        made.labels_Q,
        made.gallery_GD,
        made.gallery_labels_G,
        **{**options, **changes},
    )


def test_names() -> None:
    assert set(NAMES) >= {
        "noise", "fgsm", "pgd", "apgd-ce", "apgd-dlr", "fab", "square", "cw", "deepfool", "shift",
        "margin", "standard",
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_bounds_traces_and_repetition(name: str, norm: Any) -> None:
    made = batch(tiny(), side=32, queries=3)
    made = made._replace(
        embedder=marked(made.embedder),
        images_QCHW=made.images_QCHW.contiguous(memory_format=torch.channels_last),
    )
    # l2 of a 32 px image: a tenth of a grey level a pixel is 6/255 long.
    epsilon = 2.0 if norm == "linf" else 40.0
    before = traces(made.embedder)
    first = attack(name, made, norm=norm, epsilon=epsilon)
    assert traces(made.embedder) == before
    order = torch.inf if norm == "linf" else 2
    delta_B = (first - made.images_QCHW).flatten(1).double().norm(p=order, dim=1)
    assert delta_B.max() <= epsilon / 255 + 1e-6
    assert 0 <= first.min() and first.max() <= 1 and first.dtype == torch.float32
    assert not first.requires_grad and first is not made.images_QCHW
    assert torch.equal(attack(name, made, norm=norm, epsilon=epsilon), first)
    assert torch.equal(attack(name, made, norm=norm, epsilon=0.0), made.images_QCHW)


def test_undefended_models_fall(linear: Batch) -> None:
    assert linear.recall(linear.images_QCHW) == 1
    for name in ("pgd", "apgd-ce", "apgd-dlr", "fab", "margin", "standard"):
        assert linear.recall(attack(name, linear, epsilon=16.0)) == 0, name
        assert linear.recall(attack(name, linear, norm="l2", epsilon=400.0)) == 0, name
    for name in ("fgsm", "square"):
        assert linear.recall(attack(name, linear, epsilon=128.0)) <= 1 / 6 + 0.1, name
    assert linear.recall(attack("shift", linear, epsilon=128.0)) < 0.5  # it knows no labels
    # Noise of the same size is harmless, so it is the direction that kills.
    assert linear.recall(attack("noise", linear, epsilon=16.0)) > 0.9
    assert (attack("noise", linear, epsilon=16.0) - linear.images_QCHW).abs().mean() > 6 / 255


def test_a_restart_of_shift_does_not_undo_a_success(linear: Batch) -> None:
    """The largest shift of all starts need not be one that led to a wrong decision."""
    for seed in range(8):
        few, many = (
            linear.right(
                attack(
                    "shift", linear, seed=seed, epsilon=12.0,
                    budget=SMALL.model_copy(update={"restarts": restarts}),
                )
            )
            for restarts in (1, 4)
        )  # fmt: skip
        assert 0 < few.sum() < len(few)
        assert not (many & ~few).any()


def test_stronger_attacks_are_not_weaker(linear: Batch) -> None:
    recall = {
        name: linear.recall(attack(name, linear, epsilon=7.0))
        for name in ("noise", "square", "fgsm", "pgd", "apgd-ce", "margin", "standard")
    }
    slack = 1 / len(linear.labels_Q) + 1e-6
    assert recall["pgd"] <= recall["fgsm"] + slack
    assert recall["apgd-ce"] <= recall["pgd"] + slack
    assert max(recall["pgd"], recall["margin"]) <= recall["square"] + slack
    assert recall["standard"] <= recall["apgd-ce"]
    assert recall["noise"] > recall["pgd"] + 0.2
    curve = [linear.recall(attack("margin", linear, epsilon=e)) for e in (0, 2, 4, 8, 16)]
    assert curve == sorted(curve, reverse=True) and curve[0] == 1 and curve[-1] == 0


def test_least_change_attacks_count_within_norm_and_epsilon_only(linear: Batch) -> None:
    budget = BankConfig(minimum_steps=40, steps=10, restarts=1)
    for name in ("cw", "deepfool", "fab"):
        far = attack(name, linear, norm="l2", epsilon=3000.0, budget=budget)
        assert linear.recall(far) < 0.2, name
        delta_B = (far - linear.images_QCHW).flatten(1).norm(dim=1)
        middle = 255 * float(delta_B[~linear.right(far)].median())
        near = attack(name, linear, norm="l2", epsilon=middle, budget=budget)
        beyond_B = 255 * delta_B > middle
        assert 0.3 < linear.recall(near) < 0.7, name
        assert torch.equal(near[beyond_B], linear.images_QCHW[beyond_B]), name
        tiny_ball = attack(name, linear, norm="linf", epsilon=0.01, budget=budget)
        assert torch.equal(tiny_ball, linear.images_QCHW), name


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_an_l2_step_to_the_edge_counts_however_long_it_is(name: str) -> None:
    """float32 rounds a projection at radius 8 of 224 px to 1e-5 beyond it."""
    made = batch(Linear(side=224), side=224, queries=8)
    # Far from 0 and 1, where cutting to the range would pull images back from the edge.
    made = made._replace(images_QCHW=0.4 + 0.2 * made.images_QCHW)
    budget = BankConfig(steps=4, restarts=1, independent=True)
    for epsilon in (128.0, 765.0, 2000.0):
        found = attack(name, made, norm="l2", epsilon=epsilon, budget=budget)
        moved_B = (found - made.images_QCHW).flatten(1).norm(dim=1)
        assert torch.all(moved_B > 0.9 * epsilon / 255), epsilon
        assert torch.all(moved_B < epsilon / 255 + 2e-5 * (1 + epsilon / 255))


def test_each_image_of_apgd_dlr_has_its_own_l2_steps(linear: Batch) -> None:
    made = linear._replace(images_QCHW=linear.images_QCHW[:8], labels_Q=linear.labels_Q[:8])
    budget = BankConfig(steps=12, restarts=1, targets=2)
    half = {"norm": "l2", "epsilon": 80.0, "budget": budget}
    together = attack("apgd-dlr", made, **half)
    assert 0 < made.recall(together) < 1
    turned = made._replace(images_QCHW=made.images_QCHW.flip(0), labels_Q=made.labels_Q.flip(0))
    assert torch.equal(attack("apgd-dlr", turned, **half).flip(0), together)


def test_cw_where_all_cosines_are_negative() -> None:
    import torchattacks

    made = batch(Linear(), side=8, queries=24)
    # The queries lie about one pole and the gallery about the other: all cosines are negative.
    pole_D = torch.tensor([1.0] + 7 * [0.0])
    gallery_GD = nn.functional.normalize(0.3 * made.gallery_GD - pole_D, dim=1)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made.embedder

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.normalize(0.3 * self.inner(images) + pole_D, dim=1)

    embedder = Shifted().eval()
    logits = MaxSimLogits(embedder, gallery_GD, made.gallery_labels_G)
    with torch.no_grad():
        logits_QC = logits(made.images_QCHW)
    assert logits_QC.max() < 0
    labels_Q = logits.classes_C[logits_QC.argmax(1)]
    made = made._replace(embedder=embedder, gallery_GD=gallery_GD, labels_Q=labels_Q)
    budget = BankConfig(minimum_steps=50, cw_weight=10.0)
    ours = made.recall(attack("cw", made, norm="l2", epsilon=3000.0, budget=budget))
    plain = torchattacks.CW(logits, c=10, steps=50)(made.images_QCHW, logits.places(labels_Q))
    assert ours < made.recall(plain) - 0.3


@pytest.mark.parametrize("name", LIBRARY)
def test_an_exception_leaves_no_trace(name: str) -> None:
    made = batch(tiny(), side=32, queries=4)
    embedder = marked(made.embedder)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("planted")

    hook = embedder.register_forward_pre_hook(fail)
    before = traces(embedder)
    with pytest.raises(RuntimeError, match="planted"):
        attack(name, made, epsilon=0.01)
    assert traces(embedder) == before
    hook.remove()


@pytest.mark.parametrize("name", ["pgd", "apgd-dlr", "fab", "cw", "deepfool", "standard"])
def test_works_in_an_evaluation_loop(linear: Batch, name: str) -> None:
    expected = attack(name, linear)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = linear._replace(
            images_QCHW=linear.images_QCHW + 0,
            labels_Q=linear.labels_Q + 0,
            gallery_GD=linear.gallery_GD + 0,
            gallery_labels_G=linear.gallery_labels_G + 0,
        )
        attacked = attack(name, inside)
    assert torch.equal(attacked, expected)


def test_what_is_refused(linear: Batch) -> None:
    with pytest.raises(UserError, match="no attack named 'pdg': choose from noise, fgsm"):
        attack("pdg", linear)
    normalised = linear._replace(images_QCHW=(linear.images_QCHW - 0.5) / 0.25)
    for name in NAMES:
        with pytest.raises(UserError, match="normalisation"):
            attack(name, normalised)
    with torch.no_grad():
        own_QD = linear.embedder.eval()(linear.images_QCHW)
    own = linear._replace(gallery_GD=own_QD, gallery_labels_G=linear.labels_Q)
    with pytest.raises(UserError, match="in the gallery themselves"):
        attack("margin", own)
    kept_G = linear.gallery_labels_G < 3
    few = linear._replace(
        gallery_GD=linear.gallery_GD[kept_G], gallery_labels_G=linear.gallery_labels_G[kept_G]
    )
    few = few._replace(
        images_QCHW=few.images_QCHW[few.labels_Q < 3], labels_Q=few.labels_Q[few.labels_Q < 3]
    )
    with pytest.raises(UserError, match="4 nearest classes, but the gallery holds 3"):
        attack("apgd-dlr", few)
    assert few.recall(attack("fab", few, epsilon=16.0)) == 0  # with fewer targets


class Counting(nn.Module):
    """Counts the images that are sent through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.images = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.images += len(images_BCHW)
        return self.inner(images_BCHW)


@pytest.mark.parametrize("config", [(5, 3, 20), (8, 2, 31)])
def test_standard_spends_what_its_settings_say(linear: Batch, config: Any) -> None:
    steps, targets, queries = config
    standard = StandardConfig(steps=steps, targets=targets, queries=queries)
    counting = Counting(linear.embedder)
    made = linear._replace(embedder=counting)
    # Nothing succeeds within a millionth of a grey level, so every image goes through all parts.
    images = attack("standard", made, epsilon=1e-6, budget=BankConfig(standard=standard))
    assert torch.equal(images, linear.images_QCHW)
    checks = 1 + 1  # of own images in the gallery; of what is right before the attack
    apgd = 1 + (1 + steps)  # is it right; random start and each step
    apgd_t = 1 + targets * (1 + 1 + steps)  # the same, and which class is the target
    fab_t = 1 + targets * (1 + 1 + 2 * steps + 1)  # each step looks where it arrived
    square = 1 + 1 + queries + 1
    after_each_part = 4
    expected = checks + apgd + apgd_t + fab_t + square + after_each_part
    assert counting.images == expected * len(made.images_QCHW)


def test_standard_goes_on_with_survivors_only(linear: Batch) -> None:
    counting = Counting(linear.embedder)
    made = linear._replace(embedder=counting)
    count = len(made.images_QCHW)
    assert made.recall(attack("standard", made, epsilon=64.0)) == 0
    assert counting.images == count * (2 + 1 + (1 + 4) + 1)  # all fell to APGD-CE


def test_standard_has_the_settings_of_the_reference() -> None:
    import torchattacks

    assert bank.standard_settings(StandardConfig()) == REFERENCE
    assert list(REFERENCE) == ["APGD", "APGDT", "FAB", "Square"]
    made = batch(Linear(), side=8)
    logits = MaxSimLogits(made.embedder, made.gallery_GD, made.gallery_labels_G)
    names = {"rho": "thr_decr", "resc_schedule": "rescale_schedule"}
    defaults = []
    for part, options in REFERENCE.items():
        made_so = getattr(torchattacks, part)(logits, **options)
        for option, value in options.items():
            if option == "n_classes":
                assert made_so.n_target_classes == 9 == value - 1
            else:
                assert getattr(made_so, names.get(option, option)) == value, (part, option)
        defaults.append(getattr(getattr(torchattacks, part)(logits), "steps", None))
    # What torchattacks.AutoAttack would run instead.
    assert defaults == [10, 10, 10, None]
