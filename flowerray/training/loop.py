"""The training loop: pure torch, read top to bottom. It knows neither Ray nor MLflow; its reporter
is its only way out.

Letters: N training images, B images of the global batch, b of this worker's slice.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowerray import system
from flowerray.data.augment import AugmentConfig, augment, draw
from flowerray.data.batches import Batch, Batches, ImageStore, PKSampler
from flowerray.errors import UserError
from flowerray.gpu import snapshot
from flowerray.methods._base import Method, Output
from flowerray.model.averages import MovingAverage
from flowerray.model.embedder import Head
from flowerray.model.modes import own_draws
from flowerray.model.precision import faster_precision
from flowerray.training import checkpoint
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig, Hardening, perturbed_weights
from flowerray.training.optimizer import make_optimizer
from flowerray.training.progress import Progress, Window, note_epoch


class Reporter(Protocol):
    """Where metrics and checkpoints go; `rundir.FolderReporter` is the one that everything uses."""

    rank: int
    world: int

    def restore(self) -> Path | None:
        """A checkpoint folder to continue from."""

    def rewind(self, step: int) -> None:
        """Forgets what was reported after `step`."""

    def report(
        self,
        step: int,
        epoch: int,
        metrics: dict[str, float],
        save: Callable[[Path], None] | None = None,
        best: bool = False,
        beside: bool = False,
    ) -> None:
        """Takes metrics and, where `save` is given, a checkpoint; `beside`: it may be written while
        the training goes on.
        """

    def wait(self) -> None:
        """Returns when what was reported is on the disk."""


class Data(NamedTuple):
    """What the loop trains on and how it validates."""

    store: ImageStore
    """Decoded training images; where a head is trained, features of their views."""
    targets_N: NDArray[np.int64]
    """Their classes, 0..num_classes-1."""
    validate: Callable[..., dict[str, float]] | None
    """Metrics of the method's embedder under names `val/...`; every rank calls it. None where a
    protocol has no val split.
    """
    view: Callable[[Batch], Tensor] | None = None
    """What the method is given of a batch; None = its augmented pixels."""


class Result(NamedTuple):
    """How a training ended."""

    epochs: int
    steps: int
    images: int
    """Images drawn, repeats included."""
    best: float
    """Best value of `harden.selection`'s metric, -inf without a val split."""
    best_epoch: int
    """Epoch of the best checkpoint, counted from 1; 0 without a val split."""
    seconds: float
    """Training and validation time over all sittings."""
    precision: str
    """Of the forward passes: fp32 or bf16."""


@own_draws()
def train(
    config: TrainConfig,
    augment_config: AugmentConfig,
    harden: HardenConfig,
    method: Method,
    data: Data,
    reporter: Reporter,
    run: dict[str, Any],
) -> Result:
    """Trains `method` in place and reports as it goes; the global generators are left as they were.

    Args:
        harden: adversarial training; kind "none" for a clean one.
        method: on the device that it trains on; not wrapped in DDP. With several workers a process
            group is up.
        run: stored with each checkpoint.

    Raises:
        DivergedError: the loss is not finite; names the step.
        UserError: the batch does not fit the data or the workers; the checkpoint is of another
            method.
    """
    device = next(method.parameters()).device
    view = data.view or pixels(method, augment_config)
    sampler = make_sampler(config, data.targets_N)
    steps = total_steps(config, harden, sampler)
    batches = Batches(
        data.store,
        data.targets_N,
        sampler,
        rank=reporter.rank,
        world=reporter.world,
        device=device,
        draw=lambda epoch, step, batch: draw(config.seed, epoch, step, batch),
    )
    schedule = Schedule(steps, round(config.warmup_epochs * sampler.steps))
    optimizer = make_optimizer(config, method)
    average = MovingAverage(method.embedder, config.ema) if config.ema else None
    restored = reporter.restore()
    state = None if restored is None else checkpoint.load_state(restored, device)
    # A resumed run goes on in the precision that it began with, whatever would be faster here.
    begun_in = state.get("precision") if state else None
    precision = begun_in or pick_precision(config, method, device, reporter)
    autocast = make_autocast(precision, device)
    # An attack's figures are in fp32, and so is what a CPU validated before.
    measured = autocast if device.type == "cuda" and not harden.on else nullcontext
    hardening = Hardening(harden, method, autocast, config.seed, steps, reporter.rank)

    progress = Progress()
    if restored is not None and state is not None:
        progress = load(restored, state, config, hardening, optimizer, average)
    del state  # as large as the model and its optimizer
    reporter.rewind(progress.step)  # also to 0: one that died before its first checkpoint

    beside = writes_beside(device)

    def saving() -> Callable[[Path], None]:
        """What writes the state of this moment."""
        state = {
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state if average else None,
            "last_loss": hardening.last_loss,
            "precision": precision,
            "progress": asdict(progress),
        }
        held = snapshot(state, device) if beside and reporter.rank == 0 else lambda: state
        return lambda folder: checkpoint.save_state(folder, held(), run)

    model: nn.Module = hardening
    if config.compile:
        method.embedder.compile()
    if reporter.world > 1:
        # Buffers never differ between ranks: norms are frozen, centers follow the global batch.
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(hardening, device_ids=ids, broadcast_buffers=False)

    def backward(*batch: Tensor | None) -> Output:
        """One forward pass (clean images, adversarial ones, labels) and its gradients."""
        with autocast():
            output: Output = model(*batch)
        optimizer.zero_grad(set_to_none=True)
        output.loss.total.backward()
        return output

    while progress.step < steps and not progress.stopped_early(config.patience):
        epoch = progress.epoch
        window = Window(progress)
        method.train()
        for batch in batches.epoch(epoch, start_step=progress.step_in_epoch):
            method.seed = (config.seed, epoch, batch.step)
            # Dropout's; reseeded each step, so that a resumed run draws what it would have drawn.
            seed = hash((*method.seed, reporter.rank)) % 2**63
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes a millisecond
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            schedule.apply(optimizer, progress.step)

            images = view(batch).to(method_dtype(method))
            # A clean run has one round, without adversarial images; see `harden.Hardening.rounds`.
            for adversarial in hardening.rounds(images, batch.labels, progress.step):
                output = backward(images, adversarial, batch.labels)
                progress.images += sampler.p * sampler.k
                if harden.awp and adversarial is not None:
                    last_loss = hardening.last_loss  # of the weights themselves
                    with perturbed_weights(method, harden.awp):
                        backward(images, adversarial, batch.labels)
                    hardening.last_loss = last_loss
                if config.grad_clip:
                    nn.utils.clip_grad_norm_(method.parameters(), config.grad_clip)
                optimizer.step()
                method.after_step(output)
                if average:
                    average.update(method.embedder, progress.step + 1)

            progress.step += 1
            progress.step_in_epoch = batch.step + 1
            window.add(output, len(output.labels_B))
            ends_epoch = progress.step == steps or progress.step_in_epoch == sampler.steps
            saves = progress.step % config.checkpoint_every_steps == 0 and not ends_epoch
            if saves or ends_epoch or progress.step % config.log_every_steps == 0:
                metrics = window.read()
                metrics["train/images"] = progress.images
                metrics["train/lr"] = config.lr * schedule.factor(progress.step - 1)
                metrics["train/bf16"] = float(precision == "bf16")
                if harden.on:
                    metrics["train/epsilon"] = hardening.epsilon(progress.step - 1)
                reporter.report(
                    progress.step,
                    epoch + 1,
                    {**metrics, **system.sample()},
                    saving() if saves else None,
                    beside=beside,
                )
            if progress.step == steps:
                break

        metrics = {
            f"epoch/{name}": total / progress.step_in_epoch
            for name, total in progress.epoch_curves.items()
        }
        due = (epoch + 1) % config.validate_every == 0 or progress.step == steps
        if data.validate and due:
            started = time.perf_counter()
            with average.swapped_into(method.embedder) if average else nullcontext(), measured():
                metrics |= data.validate(method.embedder)
            metrics["epoch/validation_seconds"] = time.perf_counter() - started
        best = note_epoch(progress, metrics, harden.selection, due or not data.validate)
        if harden.on and hardening.epsilon(progress.step - 1) < harden.epsilon:
            progress.bad_epochs = 0  # while the attack still grows, falling back is no sign
        metrics["epoch/images"] = progress.images
        metrics["epoch/seconds"] = window.elapsed()
        reporter.report(progress.step, progress.epoch, metrics, saving(), best, beside)
    reporter.wait()

    return Result(
        progress.epoch,
        progress.step,
        progress.images,
        progress.best,
        progress.best_epoch,
        progress.seconds,
        precision,
    )


def make_sampler(config: TrainConfig, targets_N: NDArray[np.int64]) -> PKSampler:
    """The batches of a training set with these classes; see `PKSampler`."""
    p, k = config.classes_per_batch, config.images_per_class
    return PKSampler(targets_N, p, k, config.seed, config.max_repeats)


def images_a_step(config: TrainConfig, harden: HardenConfig) -> int:
    """Images that a step draws: free trains on each batch several times."""
    rounds = harden.replays if harden.kind == "free" else 1
    return config.classes_per_batch * config.images_per_class * rounds


def total_steps(config: TrainConfig, harden: HardenConfig, sampler: PKSampler) -> int:
    """Steps of a whole training."""
    if config.images:
        return math.ceil(config.images / images_a_step(config, harden))
    return harden.passes(config.epochs) * sampler.steps


class Schedule:
    """Linear warm-up, then a cosine to zero; a function of the step alone, so there is no state to
    save.
    """

    def __init__(self, total: int, warmup: int) -> None:
        self.total = total
        self.warmup = min(warmup, total - 1)

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (
            1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup))
        )

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets each group's learning rate."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.factor(step)


def pixels(method: Method, config: AugmentConfig) -> Callable[[Batch], Tensor]:
    """Augments a batch's images for a method's embedder."""
    size = method.embedder.image_size
    return lambda batch: augment(batch.images, batch.sizes, batch.uniforms, size, config)


def method_dtype(method: Method) -> torch.dtype:
    """float64 where the method was made double (tests of equality), else float32."""
    return next(method.parameters()).dtype


def pick_precision(
    config: TrainConfig, method: Method, device: torch.device, reporter: Reporter
) -> str:
    """What `config` says; for auto rank 0's measurement, which decides for all workers."""
    if config.precision != "auto":
        return config.precision
    if isinstance(method.embedder, Head):
        return "fp32"  # one small matrix product
    choice = [faster_precision(method.embedder, device) if reporter.rank == 0 else "fp32"]
    if reporter.world > 1:
        dist.broadcast_object_list(choice, src=0, device=device)
    return choice[0]


def writes_beside(device: torch.device) -> bool:
    """Whether checkpoints are written while the training goes on: on a GPU, where it needs no
    core.
    """
    return device.type == "cuda"


def make_autocast(
    precision: str, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """A context for the forward pass."""
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def load(
    folder: Path,
    state: dict[str, Any],
    config: TrainConfig,
    hardening: Hardening,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
) -> Progress:
    """Restores everything from the state that a checkpoint folder holds.

    Raises:
        UserError: it belongs to another method, backbone or embedding size.
    """
    try:
        hardening.method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} does not fit this run (another method, backbone or embedding size): resume "
            "with the options of its run.json."
        ) from error
    if average:
        if state["average"] is None:
            raise UserError(f"{folder} has no moving average: it was trained with `train.ema` 0.")
        average.state = state["average"]
    hardening.last_loss = state.get("last_loss", hardening.last_loss)
    progress = Progress(**state["progress"])
    if not progress.images:  # saved before they were counted
        progress.images = progress.step * images_a_step(config, hardening.config)
    return progress
