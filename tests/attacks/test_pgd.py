"""Our gradient descent: bounds, parity with torchattacks, the best point, no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowerray.attacks.logits import MaxSimLogits
from flowerray.attacks.objectives import cross_entropy, margin, match, shift
from flowerray.attacks.pgd import Objective, PGDConfig, checkpoints, noise, pgd, project, quiet
from flowerray.errors import UserError
from tests.attacks.batch import Batch, Linear, batch, marked, tiny, traces


@pytest.fixture
def linear() -> Batch:
    return batch(Linear(), side=8, queries=32)


def objective_of(made: Batch) -> Objective:
    return margin(made.embedder, made.gallery_GD, made.gallery_labels_G, made.labels_Q)


def length(delta_BCHW: Tensor, norm: str) -> Tensor:
    return delta_BCHW.flatten(1).double().norm(p=torch.inf if norm == "linf" else 2, dim=1)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0, 300.0])
def test_stays_within_epsilon_and_the_box(
    linear: Batch, norm: Any, epsilon: float, keep_best: bool
) -> None:
    images = linear.images_QCHW.clone()
    images[0], images[1] = 0.0, 1.0  # corners of the box
    ratio = None if keep_best else 2.5
    config = PGDConfig(norm=norm, epsilon=epsilon, steps=7, keep_best=keep_best, alpha_ratio=ratio)
    attacked = pgd(objective_of(linear), images, config).images_BCHW
    delta_Q = length(attacked - images, norm)
    assert delta_Q.max() <= epsilon / 255 + 1e-6
    assert delta_Q[2:].min() > 0.5 * min(epsilon / 255, 0.3)  # it does move
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert attacked.dtype == torch.float32 and not attacked.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_epsilon_0_is_the_input_bit_for_bit(linear: Batch, norm: Any) -> None:
    attacked = pgd(
        objective_of(linear), linear.images_QCHW, PGDConfig(norm=norm, epsilon=0, restarts=2)
    )
    assert torch.equal(attacked.images_BCHW, linear.images_QCHW)
    assert attacked.images_BCHW is not linear.images_QCHW
    assert attacked.value_B.max() < 0  # every query is right


@pytest.mark.parametrize(("norm", "theirs"), [("linf", "PGD"), ("l2", "PGDL2"), ("linf", "FGSM")])
def test_equals_torchattacks(norm: Any, theirs: str) -> None:
    import torchattacks

    made = batch(tiny().eval(), side=32)
    logits = MaxSimLogits(made.embedder, made.gallery_GD, made.gallery_labels_G)
    steps, ratio = (1, 1.0) if theirs == "FGSM" else (5, 2.5)
    config = PGDConfig(
        norm=norm,
        epsilon=8,
        steps=steps,
        alpha_ratio=ratio,
        random_start=False,
        keep_best=False,
    )
    options = {} if theirs == "FGSM" else {"alpha": config.alpha, "steps": 5, "random_start": False}
    attack = getattr(torchattacks, theirs)(logits, eps=config.radius, **options)
    expected = attack(made.images_QCHW, made.labels_Q)

    def mean(images: Tensor) -> Tensor:  # the reduction of torchattacks
        return F.cross_entropy(logits(images), made.labels_Q)

    assert torch.equal(pgd(mean, made.images_QCHW, config).images_BCHW, expected)
    other = PGDConfig(**{**config.model_dump(), "alpha_ratio": 0.9 * ratio})
    assert not torch.equal(pgd(mean, made.images_QCHW, other).images_BCHW, expected)
    # The sum over images instead of their mean: the same but for signs of vanishing gradients.
    ours = pgd(cross_entropy(logits, made.labels_Q), made.images_QCHW, config).images_BCHW
    assert ((ours - expected).abs() < 1e-6).float().mean() > 0.999


def test_keeps_the_best_point_of_all_steps_and_restarts(linear: Batch) -> None:
    objective, seen = objective_of(linear), []

    def recording(images: Tensor) -> Tensor:
        value_B = objective(images)
        seen.append(value_B.detach())
        return value_B

    # Steps of twice epsilon jump to and fro, so that the last point is seldom the best.
    config = PGDConfig(epsilon=8, steps=6, alpha_ratio=12, restarts=3)
    with quiet(linear.embedder):
        images, value_B = pgd(recording, linear.images_QCHW, config)
        assert len(seen) == 3 * (6 + 1)
        best_B = torch.stack(seen).amax(0)
        assert torch.equal(value_B, best_B)
        torch.testing.assert_close(objective(images).detach(), best_B)
        assert (torch.stack(seen)[6::7].amax(0) < best_B).any()  # not just the last points


def test_more_steps_and_restarts_are_not_weaker(linear: Batch) -> None:
    def value(**changes: Any) -> Tensor:
        return pgd(
            objective_of(linear), linear.images_QCHW, PGDConfig(epsilon=4, **changes)
        ).value_B

    means = [float(value(steps=steps).mean()) for steps in (1, 5, 20)]
    assert means[0] < means[1] <= means[2] + 1e-6
    assert (value(steps=5, restarts=3) >= value(steps=5)).all()  # the first start is the same
    assert (value(steps=5, restarts=3) > value(steps=5)).any()


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(20) == (5, 9, 12, 14, 16, 18, 19, 20)


def hill(images: Tensor) -> Callable[[Tensor], Tensor]:
    """Minus the squared distance to a point nearby, steep in some pixels and flat in others."""
    generator = torch.Generator().manual_seed(0)
    goal = images + 0.004 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    steep = torch.logspace(-1, 1, images[0].numel(), dtype=torch.float64).view(images[0].shape)
    return lambda points: -(steep * (points - goal)).square().flatten(1).sum(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_adaptive_step_goes_on_where_a_fixed_one_has_ended(norm: Any) -> None:
    images = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    value = hill(images)
    epsilon = 8.0 if norm == "linf" else 60.0
    fixed, few, many = (
        pgd(value, images, PGDConfig(norm=norm, epsilon=epsilon, steps=steps, alpha_ratio=ratio))
        for steps, ratio in ((20, 2.5), (20, None), (100, None))
    )
    assert (few.value_B > fixed.value_B).all()
    assert (many.value_B > 0.5 * few.value_B).all()  # values are negative


def test_apgd_image_by_image() -> None:
    """Algorithm 1 of Croce & Hein 2020, written image by image."""
    images = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    value = hill(images)
    config = PGDConfig(epsilon=8, steps=30)
    found = pgd(value, images, config, seed=(5,), positions=[3, 1, 4, 1])
    starts = noise((5, 0), [3, 1, 4, 1], (3, 8, 8), "linf").double()
    start = images + config.radius * starts
    for row in range(len(images)):

        def own(point: Tensor, row: int = row) -> Tensor:
            return value(point.expand(4, -1, -1, -1))[row]

        best, best_value = climbed(own, images[row], start[row], config)
        assert float(found.value_B[row]) == pytest.approx(best_value, rel=1e-9)
        torch.testing.assert_close(found.images_BCHW[row], best)


def climbed(
    value: Callable[[Tensor], Tensor], image: Tensor, start: Tensor, config: PGDConfig
) -> tuple[Tensor, float]:
    def slope(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        return torch.autograd.grad(value(point), point)[0]

    def inside(point: Tensor) -> Tensor:
        return point.clamp(image - config.radius, image + config.radius).clamp(0, 1)

    eta, points = 2 * config.radius, [start]
    points.append(inside(start + eta * slope(start).sign()))
    values = [float(value(point)) for point in points]
    marks, checked, halved = [0, *checkpoints(config.steps)], -float("inf"), False
    tops = list(points)
    for k in range(1, config.steps + 1):
        top = max(range(len(values)), key=values.__getitem__)
        now, before = points[-1], points[-2]
        if k in marks:
            last = marks[marks.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(last, k))
            halved = rises < 0.75 * (k - last) or (not halved and checked == values[top])
            checked = values[top]
            if halved:
                eta, now = eta / 2, tops[top]
                points[-1] = now
        if k == config.steps:
            return tops[top], values[top]
        step = inside(now + eta * slope(now).sign())
        points.append(inside(now + 0.75 * (step - now) + 0.25 * (now - before)))
        tops.append(points[-1])
        values.append(float(value(points[-1])))
    raise AssertionError


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_does_not_depend_on_batches(norm: Any) -> None:
    # In float32 rounding, which depends on the batch, could decide whether a step is halved.
    made = batch(tiny().double(), side=32, dtype=torch.float64)
    count = len(made.images_QCHW)
    config = PGDConfig(norm=norm, epsilon=4 if norm == "linf" else 40, steps=6, restarts=2)

    def one(row: int, position: int) -> Tensor:
        objective = objective_of(made).take(torch.tensor([row]))
        return pgd(
            objective, made.images_QCHW[row : row + 1], config, seed=(3, 1), positions=[position]
        )[1]

    together_B = pgd(objective_of(made), made.images_QCHW, config, seed=(3, 1)).value_B
    apart_B = torch.cat([one(row, row) for row in range(count)])
    wrong_B = torch.cat([one(row, 0) for row in range(count)])  # planted: all draw the same start
    assert (apart_B - together_B).abs().max() < 1e-9 < 1e-4 < (wrong_B - together_B).abs().max()


def test_noise_is_a_function_of_seed_and_position() -> None:
    for norm in ("linf", "l2"):
        rows = noise((1, 2), range(5), (3, 16, 16), norm)
        again = noise((1, 2), [4, 1], (3, 16, 16), norm)
        assert torch.equal(again, rows[[4, 1]])
        other = noise((1, 3), range(5), (3, 16, 16), norm)
        assert rows.dtype == torch.float32 and not (rows == other).all((1, 2, 3)).any()
        assert length(rows, norm).max() < 1
    uniform = noise((0,), range(8), (3, 32, 32), "linf")
    assert abs(float(uniform.mean())) < 0.02
    assert float(uniform.var()) == pytest.approx(1 / 3, rel=0.02)


def test_a_batch_objective_gives_its_own_gradient(linear: Batch) -> None:
    labels = linear.labels_Q

    def spread(images: Tensor) -> Tensor:  # a scalar that couples the images
        emb = linear.embedder(images)
        return torch.cdist(emb, emb)[labels[:, None] == labels].mean()

    config = PGDConfig(epsilon=8, steps=4, keep_best=False, alpha_ratio=2.5)
    with quiet(linear.embedder):
        images, value = pgd(spread, linear.images_QCHW, config)
        assert value.shape == () and spread(images) > spread(linear.images_QCHW) + 0.1
        with pytest.raises(AssertionError, match="a value for each image"):
            pgd(spread, linear.images_QCHW, PGDConfig(epsilon=8, steps=4))


def test_stops_at_success_and_leaves_the_others_alone(linear: Batch) -> None:
    config = PGDConfig(epsilon=3, steps=10, restarts=2)
    objective, forwards = objective_of(linear), []

    def counting(*args: Tensor) -> Tensor:
        forwards.append(len(args[0]))
        return objective.value(*args)

    counted = Objective(counting, objective.rows, objective.modules)
    stopped = pgd(counted, linear.images_QCHW, config, stop_above=0.0)
    spent = sum(forwards)
    forwards.clear()
    full = pgd(counted, linear.images_QCHW, config)
    assert sum(forwards) == 2 * 11 * len(linear.images_QCHW) and spent < sum(forwards)
    fell_B = full.value_B > 0
    assert 0 < fell_B.sum() < len(fell_B)
    assert torch.equal(stopped.value_B > 0, fell_B)
    assert torch.equal(stopped.images_BCHW[~fell_B], full.images_BCHW[~fell_B])
    assert (stopped.value_B[fell_B] < full.value_B[fell_B]).any()


@pytest.mark.parametrize("shifted", [lambda x: (x - 0.45) / 0.225, lambda x: x * 255, torch.log])
def test_refuses_pixels_outside_the_box(linear: Batch, shifted: Callable[[Tensor], Tensor]) -> None:
    images = shifted(linear.images_QCHW)
    with pytest.raises(UserError, match=r"pixels in \[0,1\].* from .* to .* normalisation"):
        pgd(objective_of(linear), images, PGDConfig())


def test_refuses_shift_without_a_random_start(linear: Batch) -> None:
    with quiet(linear.embedder):
        images = linear.images_QCHW.clone().requires_grad_()
        clean_BD = linear.embedder(images)
        objective = shift(linear.embedder, clean_BD)
        grad = torch.autograd.grad(objective(images).sum(), images)[0]
    assert (grad == 0).all()  # why
    with pytest.raises(UserError, match="random_start"):
        pgd(objective, linear.images_QCHW, PGDConfig(random_start=False))
    assert pgd(objective, linear.images_QCHW, PGDConfig(epsilon=8)).value_B.min() > 0.01


def test_a_model_that_gives_nan_is_not_robust(linear: Batch) -> None:
    with torch.no_grad():
        next(linear.embedder.parameters())[0] = torch.nan
    objective = match(linear.embedder, linear.gallery_GD[: len(linear.images_QCHW)])
    images = linear.images_QCHW[: len(objective.rows[0])]
    with pytest.raises(UserError, match="not finite"):
        pgd(objective, images, PGDConfig(steps=2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_model_whose_gradient_is_nan_is_not_robust(norm: Any) -> None:
    """Its values are finite: each step would leave the images where they were."""
    made = batch(Linear(), side=8)

    def value(images_BCHW: Tensor, target_BD: Tensor) -> Tensor:
        emb_BD = made.embedder(images_BCHW)
        root_B = (images_BCHW - images_BCHW.detach()).flatten(1).sum(1).sqrt()  # 0, slope inf - inf
        return (emb_BD * target_BD).sum(1) + 0 * root_B

    emb_BD = made.embedder(made.images_QCHW).detach()
    objective = Objective(value, (emb_BD,), (made.embedder,))
    assert objective(made.images_QCHW).isfinite().all()
    with pytest.raises(UserError, match="gradient is not finite"):
        pgd(objective, made.images_QCHW, PGDConfig(norm=norm, steps=2))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(fails: bool) -> None:
    made = batch(tiny(), side=32)
    embedder = marked(made.embedder)
    objective, calls = objective_of(made), []

    def value(*args: Tensor) -> Tensor:
        assert not any(part.training for part in embedder.modules())
        calls.append(torch.rand(1))  # an objective may use the global RNG
        if fails and len(calls) == 2:
            raise RuntimeError("planted")
        return objective.value(*args)

    before = traces(embedder)
    planted = Objective(value, objective.rows, (embedder,))
    if fails:
        with pytest.raises(RuntimeError, match="planted"):
            pgd(planted, made.images_QCHW, PGDConfig(steps=3))
    else:
        pgd(planted, made.images_QCHW, PGDConfig(steps=3))
    assert len(calls) > 1 and traces(embedder) == before


def test_the_check_for_traces_sees_what_torchattacks_leaves() -> None:
    import torchattacks

    made = batch(Linear(), side=8)
    embedder = marked(made.embedder)
    logits = MaxSimLogits(embedder, made.gallery_GD, made.gallery_labels_G)
    next(part for part in embedder.modules() if isinstance(part, nn.Dropout)).eval()
    before = traces(embedder)
    torchattacks.APGD(logits, steps=2)(made.images_QCHW, made.labels_Q)
    after = traces(embedder)
    assert after["modes"]["dropout"] and not before["modes"]["dropout"]
    assert after["rng"] != before["rng"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(linear: Batch, mode: Any) -> None:
    expected = pgd(objective_of(linear), linear.images_QCHW, PGDConfig(steps=3))
    with mode():
        made = linear._replace(
            images_QCHW=linear.images_QCHW + 0,
            labels_Q=linear.labels_Q + 0,
            gallery_GD=linear.gallery_GD + 0,
            gallery_labels_G=linear.gallery_labels_G + 0,
        )
        attacked = pgd(objective_of(made), made.images_QCHW, PGDConfig(steps=3))
        assert not torch.is_grad_enabled()
    assert torch.equal(attacked.images_BCHW, expected.images_BCHW)
    assert not attacked.images_BCHW.is_inference()


def test_projection_by_hand() -> None:
    images = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    points = images + torch.tensor([0.3, -0.4])
    inside = project(points, images, 0.25, "l2") - images
    torch.testing.assert_close(inside.flatten(), torch.tensor([0.15, -0.2]).double())
    cut = project(points, images, 0.35, "linf") - images
    torch.testing.assert_close(cut.flatten(), torch.tensor([0.3, -0.35]).double())
    assert torch.equal(project(images, images, 0.25, "l2"), images)  # no length, no NaN
    assert project(images + 3, images, 9.0, "linf").max() == 1
