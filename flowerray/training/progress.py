"""Where a training stands: counters, best epoch, time, and the losses since the last report."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowerray.errors import UserError
from flowerray.methods._base import Output


class DivergedError(UserError):
    """The loss became NaN or infinite."""


@dataclass
class Progress:
    """Where a run stands; stored in each checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    images: int = 0
    """Drawn so far, repeats included; of a batch that is trained on several times, each time."""
    best: float = -math.inf
    best_map_at_r: float = -math.inf
    """Val MAP@R of the best epoch, where it is not `best` itself: decides between equal ones."""
    best_epoch: int = 0
    bad_epochs: int = 0
    seconds: float = 0.0
    epoch_curves: dict[str, float] = field(default_factory=dict)
    """Sums over the epoch's steps so far."""

    def stopped_early(self, patience: int) -> bool:
        """True where `patience` epochs in a row brought nothing better; 0 never stops."""
        return patience > 0 and self.bad_epochs >= patience


def merit(metrics: dict[str, float], selection: str) -> tuple[float, float]:
    """What epochs are compared by: the metric that selects, then MAP@R; -inf where not there."""
    return metrics.get(selection, -math.inf), metrics.get("val/map_at_r", -math.inf)


def note_epoch(
    progress: Progress, metrics: dict[str, float], selection: str, validated: bool = True
) -> bool:
    """Moves `progress` past an epoch; True where the metric `selection` is the best so far (or is
    not there, since there is no val split). Between equal values, such as an attacked R@1 of 0, the
    higher MAP@R is better. An epoch that is not `validated` is neither better nor worse.
    """
    value, map_at_r = merit(metrics, selection)
    best = selection not in metrics or (value, map_at_r) > (progress.best, progress.best_map_at_r)
    best = best and validated
    progress.epoch += 1
    progress.step_in_epoch = 0
    progress.epoch_curves = {}
    if validated:
        progress.bad_epochs = 0 if best else progress.bad_epochs + 1
    if selection in metrics and best:
        progress.best, progress.best_map_at_r, progress.best_epoch = value, map_at_r, progress.epoch
    return best


class Window:
    """Collects a log interval's losses on the device; only `read` waits for them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started = self.epoch_started = time.perf_counter()
        self.images = 0
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, output: Output, images: int) -> None:
        """Takes one step's loss and curves, without a sync."""
        self.names = ["loss", *output.loss.curves]
        values = [output.loss.total.detach(), *output.loss.curves.values()]
        self.rows.append(torch.stack([value.double() for value in values]))
        self.images += images

    def read(self) -> dict[str, float]:
        """Means over the interval under names `train/...`; starts the next interval.

        Raises:
            DivergedError: a loss of the interval is not finite.
        """
        rows = torch.stack(self.rows).cpu()
        first = self.progress.step - len(rows) + 1
        for step, loss in enumerate(rows[:, 0].tolist(), start=first):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss became {loss} at step {step} (epoch {self.progress.epoch + 1}): "
                    "lower `train.lr` or `train.head_lr_factor`, or use `train.precision` fp32."
                )
        for name, total in zip(self.names, rows.sum(0).tolist(), strict=True):
            self.progress.epoch_curves[name] = self.progress.epoch_curves.get(name, 0.0) + total
        now = time.perf_counter()
        metrics = {f"train/{n}": v for n, v in zip(self.names, rows.mean(0).tolist(), strict=True)}
        metrics["train/images_per_second"] = self.images / (now - self.started)
        self.progress.seconds += now - self.started
        self.started, self.images, self.rows = now, 0, []
        return metrics

    def elapsed(self) -> float:
        """Seconds since the epoch began in this sitting; closes the time account of the epoch."""
        now = time.perf_counter()
        self.progress.seconds += now - self.started
        return now - self.epoch_started
