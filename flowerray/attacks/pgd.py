"""Projected gradient descent on any objective of the pixels, without a trace on what is attacked.

Letters: B images, C channels, H W pixels, N images that are still attacked.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.gpu import to_device
from flowerray.model.modes import evaluating

_STREAM = 2
"""Keeps these numbers apart from others that are keyed by the same (seed, epoch, ...)."""

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Objective:
    """What an attack maximises, an image at a time, with the modules that it runs."""

    value: Callable[..., Tensor]
    """value(images_BCHW, *rows) -> value_B."""
    rows: tuple[Tensor, ...]
    """What each image has of its own (labels, targets), each of length B."""
    modules: tuple[nn.Module, ...]
    """Modules that `value` runs; `pgd` keeps them `quiet`."""
    needs_random_start: bool = False
    """Its gradient at the clean image is exactly 0."""

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """The value of each image, B."""
        return self.value(images_BCHW, *self.rows)

    def take(self, index_N: Tensor) -> "Objective":
        """The same for some of the images."""
        return replace(self, rows=tuple(row[index_N] for row in self.rows))


class PGDConfig(Config):
    """How an attack searches."""

    norm: Norm = "linf"
    """What is bounded by epsilon: "linf", each pixel's change; "l2", their root sum of squares."""
    epsilon: float = Field(4.0, ge=0)
    """Largest change, in 1/255: 4 is 4/255 of the pixels' range [0,1]. For l2 it is the radius,
    also in 1/255."""
    steps: int = Field(20, ge=1)
    """Gradient steps of each start."""
    alpha_ratio: float | None = Field(None, gt=0)
    """Steps times step size over epsilon, for a step size that is fixed: at 1 the steps reach
    epsilon just so, above 1 they can turn back. None = it adapts to each image; needs keep_best."""
    random_start: bool = True
    """Start at a random point within epsilon instead of at the image."""
    restarts: int = Field(1, ge=1)
    """Starts from different random points; needs random_start and keep_best where above 1."""
    keep_best: bool = True
    """Return the point with the highest value seen of each image (one forward pass more), and not
    the last one."""

    @property
    def radius(self) -> float:
        """Epsilon in the pixels' unit."""
        return self.epsilon / 255

    @property
    def alpha(self) -> float:
        """Step size in the pixels' unit, the first one where it adapts."""
        ratio = 2 * self.steps if self.alpha_ratio is None else self.alpha_ratio
        return ratio * self.radius / self.steps


class Attacked(NamedTuple):
    """What `pgd` returns."""

    images_BCHW: Tensor
    """Pixels in [0,1] within epsilon of the images, without a graph."""
    value_B: Tensor
    """The objective there. Without `keep_best` it is the value where the last gradient was taken,
    one step earlier, since the result itself is not sent through the model; a scalar where the
    objective is one."""


def pgd(
    objective: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    config: PGDConfig,
    *,
    seed: tuple[int, ...] = (0,),
    positions: Sequence[int] | None = None,
    stop_above: float | None = None,
) -> Attacked:
    """Maximises an objective within epsilon of each image and within [0,1].

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, eq. 3:
    x <- project(x + alpha * sign(gradient)); for l2 the gradient has length 1 instead of its sign.
    We differ: the best point of all steps and restarts is kept for each image. Where the step size
    adapts this is APGD (Croce & Hein, ICML 2020, algorithm 1), on any objective.

    It works within `no_grad` and `inference_mode`. An Objective's modules are `quiet` (eval mode,
    nothing changed); a plain callable's modules are the caller's to keep so. Cost with K
    steps: 2K forward-equivalents, and one more with `keep_best`, each times `restarts`.

    Args:
        objective: per image, so that each image's gradient is its own; or a scalar of the whole
            batch, only without `keep_best`.
        images_BCHW: float32 or float64 pixels in [0,1].
        config: norm, epsilon, steps.
        seed: of the random starts, non-negative; with `positions` it alone decides them.
        positions: the number by which each image draws its start (its place in the global batch or
            in the set of queries), so that they do not depend on how images are batched; 0..B-1 by
            default.
        stop_above: an image whose value is above it is done: no further step or restart. The
            objective must be an Objective.

    Raises:
        UserError: pixels outside [0,1] (on a GPU only with `keep_best`); an objective that needs a
            random start without one; with `keep_best`, a value or a gradient that is not finite,
            since the attack would pass by what it cannot see.
    """
    if config.keep_best or images_BCHW.device.type == "cpu":
        check_pixels(images_BCHW)  # in a training's step a GPU would wait for it
    own = objective if isinstance(objective, Objective) else None
    if own and own.needs_random_start and not config.random_start and config.epsilon:
        raise UserError(
            "This attack's gradient at the clean image is exactly 0, so that it would do nothing: "
            "set random_start."
        )
    assert config.restarts == 1 or (config.random_start and config.keep_best)
    assert config.keep_best or config.alpha_ratio is not None
    assert stop_above is None or (own is not None and config.keep_best)
    positions = range(len(images_BCHW)) if positions is None else positions
    assert len(positions) == len(images_BCHW)
    with torch.inference_mode(False), torch.enable_grad(), quiet(*(own.modules if own else ())):
        # An inference tensor cannot take part in a graph; its copy outside that mode can.
        images_BCHW = images_BCHW.detach().clone()
        if not config.epsilon:
            with torch.no_grad():
                return Attacked(images_BCHW, objective(images_BCHW))
        if not config.keep_best:
            start_BCHW = _start(images_BCHW, config, (*seed, 0), positions)
            return _climb(objective, images_BCHW, start_BCHW, config)
        best_BCHW = images_BCHW.clone()
        best_B = images_BCHW.new_full((len(images_BCHW),), -torch.inf)
        index_N = torch.arange(len(images_BCHW), device=images_BCHW.device)
        lost = torch.zeros((), dtype=torch.bool, device=images_BCHW.device)
        for restart in range(config.restarts):
            if stop_above is not None and own is not None:
                index_N = (best_B <= stop_above).nonzero()[:, 0]
                objective = own.take(index_N)
            if not len(index_N):
                break
            clean_NCHW, places = images_BCHW[index_N], [positions[i] for i in index_N.tolist()]
            start_NCHW = _start(clean_NCHW, config, (*seed, restart), places)
            found, broken = _ascend(objective, clean_NCHW, start_NCHW, config, stop_above)
            lost |= broken
            better_N = found.value_B > best_B[index_N]
            best_BCHW[index_N[better_N]] = found.images_BCHW[better_N]
            best_B[index_N[better_N]] = found.value_B[better_N]
    for what, wrong in (("output", ~best_B.isfinite().all()), ("gradient", lost)):
        if bool(wrong):
            raise UserError(
                f"The attacked model's {what} is not finite for some images: check its weights."
            )
    return Attacked(best_BCHW, best_B)


def check_pixels(images_BCHW: Tensor) -> None:
    """Refuses what is not pixels in [0,1].

    Raises:
        UserError: values outside [0,1] or NaN, with the range that was found.
    """
    assert images_BCHW.ndim == 4 and images_BCHW.dtype in (torch.float32, torch.float64)
    if not len(images_BCHW):
        return
    low, high = (float(v) for v in images_BCHW.aminmax())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"An attack takes pixels in [0,1] and was given values from {low:.4g} to {high:.4g}: "
            "leave the normalisation to the Embedder, which does it inside."
        )


def noise(
    seed: tuple[int, ...], positions: Sequence[int], shape: tuple[int, int, int], norm: Norm
) -> Tensor:
    """A random point of the unit ball of `norm` for each image, a function of seed and position.

    linf: uniform in (-1, 1) in 256 levels. l2: a Gaussian direction, with a length uniform in
    (0, 1).

    Returns:
        float32 noise_BCHW on the CPU, with (C, H, W) = `shape`.
    """
    count = int(np.prod(shape))
    rows = []
    for position in positions:
        key = np.random.SeedSequence((_STREAM, *seed, position))
        generator = np.random.Generator(np.random.Philox(key))
        if norm == "linf":
            levels = np.frombuffer(generator.bytes(count), np.uint8)
            rows.append((levels.astype(np.float32) - 127.5) / 128)
        else:
            direction = generator.standard_normal(count, dtype=np.float32)
            rows.append(direction * (generator.random() / np.linalg.norm(direction)))
    stacked = np.stack(rows) if rows else np.empty((0, count), np.float32)
    return torch.from_numpy(stacked.astype(np.float32, copy=False)).view(-1, *shape)


def step_linf(points_BCHW: Tensor, grad_BCHW: Tensor, alpha: float | Tensor) -> Tensor:
    """Each pixel moves by alpha in its gradient's direction."""
    return points_BCHW + alpha * grad_BCHW.sign()


def step_l2(points_BCHW: Tensor, grad_BCHW: Tensor, alpha: float | Tensor) -> Tensor:
    """Each image moves by the length alpha along its gradient."""
    length_B = torch.linalg.vector_norm(grad_BCHW.flatten(1), dim=1) + 1e-10
    return points_BCHW + alpha * (grad_BCHW / length_B.view(-1, 1, 1, 1))


def project(points_BCHW: Tensor, images_BCHW: Tensor, radius: float, norm: Norm) -> Tensor:
    """The nearest points within `radius` (in the pixels' unit) of the images, cut to [0,1]."""
    delta_BCHW = points_BCHW - images_BCHW
    if norm == "linf":
        delta_BCHW = delta_BCHW.clamp(-radius, radius)
    else:
        length_B = torch.linalg.vector_norm(delta_BCHW.flatten(1), dim=1)
        factor_B = (radius / length_B.clamp(min=1e-12)).clamp(max=1)
        delta_BCHW = delta_BCHW * factor_B.view(-1, 1, 1, 1)
    return (images_BCHW + delta_BCHW).clamp(0, 1)


@contextmanager
def quiet(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode with frozen parameters; afterwards everything is as it was.

    Restored also after an exception: the mode of each submodule, each parameter's requires_grad and
    grad, torch's RNG on the CPU and on the modules' GPUs (NumPy's and Python's are not touched by
    attacks). Frozen parameters save the activations that only their gradients need, and keep an
    attack that calls `backward` away from `grad`.
    """
    assert not any(isinstance(m, nn.parallel.DistributedDataParallel) for m in modules), (
        "attack the unwrapped module: the wrapper would talk to the other workers in each step"
    )
    parameters = [p for root in modules for p in root.parameters()]
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    gpus = {p.device.index for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(gpus)), evaluating(*modules):
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, required, grad in before:
                parameter.requires_grad_(required)
                parameter.grad = grad


def _start(
    images_BCHW: Tensor, config: PGDConfig, seed: tuple[int, ...], positions: Sequence[int]
) -> Tensor:
    if not config.random_start:
        return images_BCHW
    _, *shape = images_BCHW.shape
    noise_BCHW = noise(seed, positions, (shape[0], shape[1], shape[2]), config.norm)
    noise_BCHW = to_device(noise_BCHW, images_BCHW.device).to(images_BCHW.dtype)
    return (images_BCHW + config.radius * noise_BCHW).clamp(0, 1)


def _step(
    points_BCHW: Tensor,
    images_BCHW: Tensor,
    grad_BCHW: Tensor,
    alpha: float | Tensor,
    config: PGDConfig,
) -> Tensor:
    step = step_linf if config.norm == "linf" else step_l2
    moved_BCHW = step(points_BCHW.detach(), grad_BCHW, alpha)
    return project(moved_BCHW, images_BCHW, config.radius, config.norm)


def _gradient(objective: Callable[[Tensor], Tensor], points_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The value (B, or a scalar), and the gradient of its sum."""
    points_BCHW = points_BCHW.detach().requires_grad_()
    value_B = objective(points_BCHW)
    return value_B.detach(), torch.autograd.grad(value_B.sum(), points_BCHW)[0]


def _climb(
    objective: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    points_BCHW: Tensor,
    config: PGDConfig,
) -> Attacked:
    for _ in range(config.steps):
        value_B, grad_BCHW = _gradient(objective, points_BCHW)
        points_BCHW = _step(points_BCHW, images_BCHW, grad_BCHW, config.alpha, config)
    return Attacked(points_BCHW, value_B)


def _ascend(
    objective: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    start_BCHW: Tensor,
    config: PGDConfig,
    stop_above: float | None,
) -> tuple[Attacked, Tensor]:
    """One start: its best points, and whether a gradient was not finite.

    With an adaptive step: 2 epsilon at first, with momentum; at each checkpoint an image whose
    value rose in fewer than 3/4 of the steps since the last one, or whose best value has not risen
    since then at the same step size, goes on from its best point with half the step.
    """
    adaptive = config.alpha_ratio is None
    marks = checkpoints(config.steps) if adaptive else ()
    count = len(images_BCHW)
    points_BCHW = before_BCHW = best_BCHW = start_BCHW
    grad_BCHW = best_grad_BCHW = torch.zeros_like(images_BCHW)
    best_B = checked_B = images_BCHW.new_full((count,), -torch.inf)
    value_B = -best_B  # the first value is no rise
    rises_B = images_BCHW.new_zeros(count)
    halved_B = images_BCHW.new_zeros(count, dtype=torch.bool)
    alpha_B = images_BCHW.new_full((count,), config.alpha)
    lost = images_BCHW.new_zeros((), dtype=torch.bool)
    index_N, last_mark = torch.arange(count, device=images_BCHW.device), 0
    for step in range(config.steps + 1):
        if stop_above is not None:
            index_N = (best_B <= stop_above).nonzero()[:, 0]
        if not len(index_N):
            break
        points_NCHW = points_BCHW[index_N]
        narrowed = objective.take(index_N) if isinstance(objective, Objective) else objective
        if step < config.steps:
            value_N, grad_NCHW = _gradient(narrowed, points_NCHW)
            lost |= ~grad_NCHW.isfinite().all()
            grad_BCHW = _put(grad_BCHW, index_N, grad_NCHW)
        else:
            with torch.no_grad():
                value_N = narrowed(points_NCHW)
        assert value_N.shape == (len(index_N),), "keep_best needs a value for each image"
        earlier_B, value_B = value_B, _put(value_B, index_N, value_N.to(value_B.dtype))
        better_B = value_B > best_B
        best_B = value_B.where(better_B, best_B)
        best_BCHW = _where(better_B, points_BCHW, best_BCHW)
        if step == config.steps:
            break
        if adaptive:
            best_grad_BCHW = _where(better_B, grad_BCHW, best_grad_BCHW)
            rises_B = rises_B + (value_B > earlier_B)
        if step in marks:
            stuck_B = (best_B <= checked_B) & ~halved_B
            halved_B = (rises_B < 0.75 * (step - last_mark)) | stuck_B
            alpha_B = (alpha_B / 2).where(halved_B, alpha_B)
            points_BCHW = _where(halved_B, best_BCHW, points_BCHW)
            grad_BCHW = _where(halved_B, best_grad_BCHW, grad_BCHW)
            rises_B, checked_B, last_mark = torch.zeros_like(rises_B), best_B, step
        alpha_B111 = alpha_B.view(-1, 1, 1, 1)
        moved_BCHW = _step(points_BCHW, images_BCHW, grad_BCHW, alpha_B111, config)
        if adaptive and step:
            moved_BCHW = points_BCHW + 0.75 * (moved_BCHW - points_BCHW)
            moved_BCHW = moved_BCHW + 0.25 * (points_BCHW - before_BCHW)
            moved_BCHW = project(moved_BCHW, images_BCHW, config.radius, config.norm)
        before_BCHW, points_BCHW = points_BCHW, moved_BCHW
    return Attacked(best_BCHW, best_B), lost


def _put(rows_B: Tensor, index_N: Tensor, rows_N: Tensor) -> Tensor:
    """The rows with some of them replaced; `index_copy` would forget channels last."""
    rows_B = rows_B.clone()
    rows_B[index_N] = rows_N
    return rows_B


def _where(chosen_B: Tensor, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
    return images_BCHW.where(chosen_B.view(-1, 1, 1, 1), others_BCHW)


def checkpoints(steps: int) -> tuple[int, ...]:
    """Steps after which an adaptive step size is judged (Croce & Hein 2020, section 3.1)."""
    marks, share, length = [], 22, 22  # in hundredths of the steps
    while share < 100:
        marks.append(math.ceil(share * steps / 100))
        length = max(length - 3, 6)
        share += length
    return tuple(marks)
