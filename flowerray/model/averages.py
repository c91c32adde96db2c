"""The moving average of an embedder's weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowerray.model.embedder import Embedder, Head


class MovingAverage:
    """Exponential moving average of an embedder's weights. Polyak & Juditsky 1992; with the warm-up
    of TensorFlow's ExponentialMovingAverage: until `decay` is reached the decay of step n is
    (1 + n) / (10 + n), or short trainings would export their first weights.
    """

    def __init__(self, embedder: Embedder | Head, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = copy.deepcopy(embedder.state_dict())

    @torch.no_grad()
    def update(self, embedder: Embedder | Head, step: int) -> None:
        """average += (1 - decay) (weights - average), after optimizer step `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in embedder.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    @contextmanager
    def swapped_into(self, embedder: Embedder | Head) -> Iterator[None]:
        """Within its block the embedder has the averaged weights."""
        own = copy.deepcopy(embedder.state_dict())
        embedder.load_state_dict(self.state)
        try:
            yield
        finally:
            embedder.load_state_dict(own)
