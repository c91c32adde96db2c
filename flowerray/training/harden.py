"""Adversarial training around any method: which images and weights a step is trained on.

pgd     Madry et al., ICLR 2018: the loss on images that PGD has moved.
trades  Zhang et al., ICML 2019: clean loss plus beta times the divergence of moved from clean.
nfgsm   de Jorge et al., "Make Some Noise", NeurIPS 2022: noise of 2 epsilon, one full step.
free    Shafahi et al., NeurIPS 2019: each batch is replayed m times, one backward pass gives the
        gradients of weights and pixels alike, and epochs are divided by m: the cost of a clean run.

Each image of the global batch is moved once, by the gradient of the method's own mined batch loss
(`Method.attack_loss`), and keeps its place and label; only free moves it by the training loss
itself, from replay to replay. Attacks see the unwrapped method in eval mode
and only take the gradient of the pixels; each worker moves its own slice, and as the loss is the
global batch's, the number of workers does not change what comes out.

Letters: B images of the global batch, b of this worker's slice, C channels, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from flowerray.attacks.pgd import PGDConfig, noise, pgd, quiet, step_linf
from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.gpu import to_device
from flowerray.methods._base import Method, Output, gather

Kind = Literal["none", "pgd", "trades", "nfgsm", "free"]


class HardenConfig(Config):
    """Adversarial training (Linf)."""

    kind: Kind = "none"
    """Off; or the loss on PGD images; TRADES; N-FGSM (one step); free (replays each batch)."""
    epsilon: float = Field(4.0, gt=0, le=64)
    """Largest change of a pixel in training, in 1/255."""
    steps: int = Field(2, ge=1, le=100)
    """K, gradient steps of the attack; pgd and trades only."""
    alpha_ratio: float = Field(1.5, gt=0, le=10)
    """r = K * step size / epsilon: above 1 the steps can turn back; pgd and trades only."""
    mix: float = Field(1.0, gt=0, le=1)
    """Weight of the loss on moved images against the loss on clean ones; 1 leaves the clean ones
    out and saves their pass. Not for trades, where `beta` weighs."""
    beta: float = Field(6.0, ge=0)
    """Weight of TRADES' divergence beside the clean loss; trades only."""
    ramp: float = Field(0.3, ge=0, le=1)
    """Share of the training over which epsilon rises linearly from 0 to its full size (a step whose
    epsilon is 0 is trained on clean images); 0 = full size from the first step."""
    destination: Literal["zero", "lga"] = "zero"
    """How far an attack moves triplets and pairs: until positives are as far as negatives, or, with
    the LGA schedule, short of that by the last loss; pgd and nfgsm only, no meaning for center."""
    awp: float = Field(0.0, ge=0, le=0.1)
    """gamma of adversarial weight perturbation, as a share of each layer's weight norm; 0 = off. It
    costs one more training step a step; not for free."""
    replays: int = Field(4, ge=2, le=16)
    """m, times that each batch is trained on; free only."""
    val_epsilon: float = Field(2.0, gt=0, le=64)
    """Budget of the val attack that picks the best checkpoint, in 1/255. Keep it fixed when runs
    are compared; never tune it."""
    val_steps: int = Field(10, ge=1)
    """Gradient steps of that attack."""
    val_queries: int = Field(256, ge=1)
    """Val images that it attacks, spread over the classes and the same after each epoch."""
    probe_queries: int = Field(64, ge=0)
    """Of those, how many also show whether one-step training has overfitted to its one step; nfgsm,
    free and one step of pgd or trades only; 0 = no probe."""

    @model_validator(mode="after")
    def _refuse_what_is_not_used(self) -> "HardenConfig":
        """An option that the kind has no use for must not be dropped in silence."""
        users: dict[str, tuple[Kind, ...]] = {
            "steps": ("pgd", "trades"),
            "alpha_ratio": ("pgd", "trades"),
            "mix": ("pgd", "nfgsm", "free"),
            "beta": ("trades",),
            "destination": ("pgd", "nfgsm"),
            "awp": ("pgd", "trades", "nfgsm"),
            "replays": ("free",),
            "probe_queries": ("nfgsm", "free", *(("pgd", "trades") if self.steps == 1 else ())),
        }
        for name, field in type(self).model_fields.items():
            kinds = users.get(name, ("pgd", "trades", "nfgsm", "free"))
            if name != "kind" and self.kind not in kinds and getattr(self, name) != field.default:
                raise UserError(
                    f"harden.{name} has no use with harden.kind {self.kind}: leave it out, or "
                    f"choose harden.kind {' or '.join(kinds)}."
                )
        return self

    @property
    def on(self) -> bool:
        """Whether anything is hardened."""
        return self.kind != "none"

    @property
    def one_step(self) -> bool:
        """Whether images are attacked by a single step, which a model may learn to mislead."""
        return self.kind in ("nfgsm", "free") or (self.on and self.steps == 1)

    @property
    def selection(self) -> str:
        """The metric that picks the best checkpoint and stops early; higher is better."""
        return "val/adversarial_recall_at_1" if self.on else "val/map_at_r"

    def passes(self, epochs: int) -> int:
        """Epochs to run for the work of `epochs` clean ones: free shows each batch m times."""
        return max(1, round(epochs / self.replays)) if self.kind == "free" else epochs


space: dict[str, dict[str, Any]] = {
    "harden.epsilon": {"choices": [2.0, 3.0, 4.0, 6.0, 8.0]},
    "harden.steps": {"choices": [1, 2, 3, 5, 7]},
    "harden.alpha_ratio": {"low": 1.0, "high": 2.5},
    "harden.mix": {"low": 0.3, "high": 1.0},
    "harden.beta": {"low": 1.0, "high": 10.0, "log": True},
    "harden.ramp": {"low": 0.2, "high": 0.7},
    "harden.awp": {"choices": [0.0, 0.005]},
}
"""What a search of hardened trainings varies; a kind's unused knobs are left out. The evaluation's
epsilon is never among them."""


class Hardening(nn.Module):
    """What the loop trains: the method on clean images, on moved ones, or on both in one pass."""

    def __init__(
        self,
        config: HardenConfig,
        method: Method,
        autocast: Callable[[], AbstractContextManager[Any]],
        seed: int,
        num_steps: int,
        rank: int = 0,
    ) -> None:
        """Wraps a method.

        Args:
            config: what to do; with kind "none" this module is the method.
            method: not wrapped in DDP; a wrapper goes around this module.
            autocast: the training's precision, for the attack's forward passes as well.
            seed: of the random starts.
            num_steps: steps of the whole training, over which epsilon rises.
            rank: which slice of the global batch the images are.

        Raises:
            UserError: a destination for a method whose attack has none.
        """
        super().__init__()
        if config.destination == "lga" and type(method).attack_loss is Method.attack_loss:
            raise UserError(
                f"harden.destination lga has no use with method "
                f"{type(method).__module__.rpartition('.')[2]}: leave it out."
            )
        self.config, self.method, self.autocast = config, method, autocast
        self.seed, self.num_steps, self.rank = seed, num_steps, rank
        parameter = next(method.parameters())
        self.last_loss = torch.tensor(torch.inf, dtype=parameter.dtype, device=parameter.device)
        """See `Method.attack_loss`; part of a checkpoint."""

    def forward(self, clean_bCHW: Tensor, moved_bCHW: Tensor | None, labels_b: Tensor) -> Output:
        """The loss of a step; one call, so that DDP sees one forward pass.

        Curves are those of the clean batch where it is embedded, else of the moved one, and
        `adversarial_loss`: the loss of the moved batch (trades: the mean divergence).
        """
        config, method = self.config, self.method
        if not config.on:
            output: Output = method(clean_bCHW, labels_b)
            return output
        labels_B = gather(labels_b)
        trades = config.kind == "trades"
        sees_clean = trades or config.mix < 1 or moved_bCHW is None
        clean_BD = method.embed(clean_bCHW) if sees_clean else None
        moved_BD = method.embed(moved_bCHW) if moved_bCHW is not None else None
        with torch.autocast(labels_B.device.type, enabled=False):
            losses = [method.loss(emb, labels_B) for emb in (clean_BD, moved_BD) if emb is not None]
            total, hard = losses[0].total, losses[-1].total
            if trades and clean_BD is not None:
                hard = method.divergence(
                    clean_BD, clean_BD if moved_BD is None else moved_BD
                ).mean()
                total = total + config.beta * hard
            elif len(losses) == 2:
                total = (1 - config.mix) * total + config.mix * hard
        last = losses[-1]
        self.last_loss = last.total.detach() if last.over_all is None else last.over_all
        curves = {**losses[0].curves, "adversarial_loss": hard.detach()}
        emb_BD = moved_BD if clean_BD is None else clean_BD
        assert emb_BD is not None
        return Output(losses[0]._replace(total=total, curves=curves), emb_BD.detach(), labels_B)

    def epsilon(self, step: int) -> float:
        """The budget of a step counted from 0 over the whole training, in 1/255."""
        rise = self.config.ramp * self.num_steps
        return self.config.epsilon * (min(1.0, step / rise) if rise else 1.0)

    def rounds(self, images_bCHW: Tensor, labels_b: Tensor, step: int) -> Iterator[Tensor | None]:
        """The moved images of each optimizer step on a batch; None where it is trained clean.

        One round; for free `replays` of them, each of which moves the images on by the gradient
        that the loop's backward pass left in those of the round before.

        Args:
            images_bCHW: this worker's slice, pixels in [0,1], in the model's dtype.
            labels_b: its classes.
            step: counted from 0 over the whole training; decides epsilon and the random starts.
        """
        epsilon = self.epsilon(step) if self.config.on else 0.0
        if self.config.kind == "free":
            yield from self._replays(images_bCHW, epsilon / 255, step)
        elif not epsilon:
            yield None
        else:
            with self.autocast(), quiet(self.method):
                moved_bCHW = self._attack(images_bCHW, labels_b, epsilon, step)
            yield moved_bCHW

    def _attack(self, images_bCHW: Tensor, labels_b: Tensor, epsilon: float, step: int) -> Tensor:
        start = len(images_bCHW) * self.rank
        places = range(start, start + len(images_bCHW))  # in the global batch
        objective = self._objective(images_bCHW, labels_b)
        seed = (self.seed, step)
        if self.config.kind == "nfgsm":
            return nfgsm(objective, images_bCHW, epsilon, seed=seed, positions=places)
        config = PGDConfig(
            epsilon=epsilon,
            steps=self.config.steps,
            alpha_ratio=self.config.alpha_ratio,
            keep_best=False,
        )
        return pgd(objective, images_bCHW, config, seed=seed, positions=places).images_BCHW

    def _objective(self, images_bCHW: Tensor, labels_b: Tensor) -> Callable[[Tensor], Tensor]:
        """What the attack raises. A gather's gradient is too long by the number of workers, all
        pixels alike, which the sign does not feel.
        """
        method = self.method
        if self.config.kind == "trades":
            with torch.no_grad():
                clean_bD = method.embedder(images_bCHW)

            def divergence(points_bCHW: Tensor) -> Tensor:
                moved_bD = method.embedder(points_bCHW)
                with torch.autocast(moved_bD.device.type, enabled=False):
                    return method.divergence(clean_bD, moved_bD)

            return divergence

        labels_B = gather(labels_b)
        lga = self.config.destination == "lga"
        last_loss = self.last_loss if lga else torch.zeros_like(self.last_loss)

        def batch_loss(points_bCHW: Tensor) -> Tensor:
            moved_BD = method.embed(points_bCHW)
            with torch.autocast(moved_BD.device.type, enabled=False):
                return method.attack_loss(moved_BD, labels_B, last_loss)

        return batch_loss

    def _replays(self, images_bCHW: Tensor, radius: float, step: int) -> Iterator[Tensor | None]:
        """We differ from the paper: a batch starts from fresh noise, not from the last batch's
        perturbation, so that a step depends on nothing but its own number.
        """
        start = len(images_bCHW) * self.rank
        places = range(start, start + len(images_bCHW))
        delta_bCHW = radius * _noise_like(images_bCHW, (self.seed, step), places)
        for _ in range(self.config.replays):
            if not radius:
                yield None
                continue
            moved_bCHW = (images_bCHW + delta_bCHW).clamp(0, 1).requires_grad_()
            yield moved_bCHW
            assert moved_bCHW.grad is not None, "the loop's backward pass reaches the pixels"
            delta_bCHW = step_linf(delta_bCHW, moved_bCHW.grad, radius).clamp(-radius, radius)


def nfgsm(
    objective: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    epsilon: float,
    *,
    seed: tuple[int, ...],
    positions: Sequence[int],
) -> Tensor:
    """N-FGSM: noise in +-2 epsilon, one step of epsilon from there, and no projection.

    de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
    NeurIPS 2022, arXiv:2202.01181, with their k = 2 and alpha = epsilon. The result can be 3
    epsilon from the image, which is what keeps the one step from being learned by heart.

    Args:
        objective: see `attacks.pgd`; its modules are the caller's to keep quiet.
        images_BCHW: pixels in [0,1].
        epsilon: in 1/255.
        seed, positions: see `attacks.pgd.pgd`.

    Returns:
        Pixels in [0,1], without a graph.
    """
    radius = epsilon / 255
    start_BCHW = (images_BCHW + 2 * radius * _noise_like(images_BCHW, seed, positions)).clamp(0, 1)
    with torch.enable_grad():
        start_BCHW.requires_grad_()
        (grad_BCHW,) = torch.autograd.grad(objective(start_BCHW).sum(), start_BCHW)
    return step_linf(start_BCHW.detach(), grad_BCHW, radius).clamp(0, 1)


def _noise_like(images_BCHW: Tensor, seed: tuple[int, ...], positions: Sequence[int]) -> Tensor:
    _, channels, height, width = images_BCHW.shape
    noise_BCHW = noise((*seed, 0), positions, (channels, height, width), "linf")
    return to_device(noise_BCHW, images_BCHW.device).to(images_BCHW.dtype)


@contextmanager
def perturbed_weights(method: nn.Module, gamma: float) -> Iterator[None]:
    """Within its block the weights stand where the loss is higher; afterwards where they stood.

    AWP: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020,
    arXiv:2004.05884: w + gamma ||w|| g / ||g|| layer by layer, where g is the gradient of the
    training loss. Matrices and kernels only, as in their code. The gradient of the step is the one
    computed inside, alone.

    Args:
        method: whose `grad` holds g.
        gamma: length of the perturbation, as a share of each layer's norm.
    """
    moved = [p for p in method.parameters() if p.ndim > 1 and p.grad is not None]
    before = [p.detach().clone() for p in moved]
    try:
        with torch.no_grad():
            for p in moved:
                assert p.grad is not None
                p.add_(p.grad * (gamma * p.norm() / p.grad.norm().clamp(min=1e-12)))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(moved, before, strict=True):
                p.copy_(value)
