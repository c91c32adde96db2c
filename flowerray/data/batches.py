"""PK batches, a function of (seed, epoch, step): P classes with K images each; read ahead.

Letters: N images of the split, S steps of an epoch, B images of the global batch, b of this
worker's slice, U uniforms that augment one image, C H W an image.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.errors import UserError
from flowerray.gpu import to_device

READ_AHEAD = 2
"""Batches that wait ready: one hides a slow read, more would only hold memory."""


class PKSampler:
    """The images of every batch: each batch holds P distinct classes with K images each.

    An epoch shows every image at least once: each class is shuffled and cut into chunks of K, and
    each batch takes P chunks of distinct classes. A short chunk is filled from its class; a batch
    that finds fewer than P classes with chunks left is completed by classes drawn again. The number
    of steps is the smallest that this allows; it draws `steps` x P x K images, repeats included.
    The global random state is neither read nor written.
    """

    def __init__(
        self, targets_N: NDArray[np.int64], p: int, k: int, seed: int, max_repeats: int = 0
    ) -> None:
        """Checks that the batches can be formed.

        Args:
            targets_N: class of each image; any integers.
            max_repeats: times that an epoch shows an image on average at most, beyond one chunk of
                each class: it ends earlier then, and shows a part of large classes; 0 = no bound.

        Raises:
            UserError: fewer than P classes, or fewer than P x K images.
        """
        assert p >= 1 and k >= 1
        targets_N = np.asarray(targets_N)
        self.p, self.k, self.seed = p, k, seed
        _, class_N, counts = np.unique(targets_N, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)[:-1]
        self.members = np.split(np.argsort(class_N, kind="stable"), ends)
        if len(self.members) < p:
            raise UserError(
                f"A batch of P = {p} classes cannot be formed from {len(self.members)} training "
                "classes: lower `train.classes_per_batch` or add classes."
            )
        if len(targets_N) < p * k:
            raise UserError(
                f"A batch of P x K = {p} x {k} = {p * k} images is larger than the training set of "
                f"{len(targets_N)}: lower `train.classes_per_batch` or `train.images_per_class`, "
                "or add images."
            )
        self._chunks = np.array([-(-len(members) // k) for members in self.members])
        # A batch takes at most one chunk of a class, so the largest class can set the length.
        self.steps = max(-(-int(self._chunks.sum()) // p), int(self._chunks.max()))
        most = np.maximum(self._chunks, max_repeats * counts // k)
        if max_repeats:
            while np.minimum(most, self.steps).sum() < p * self.steps:
                self.steps -= 1
        else:
            most[:] = self.steps
        shares = self._shared(np.minimum(most, self.steps))
        if max_repeats:
            self._chunks = shares
        self.repeats = float((shares * k / counts).max())
        """Times that an epoch shows an image of the class that is repeated most, on average."""

    def _shared(self, most: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chunks of each class in an epoch, evenly beyond its own ones, at most so many."""
        shares = np.minimum(self._chunks, self.steps)
        missing = self.p * self.steps - int(shares.sum())
        while missing > 0 and (open_ := np.flatnonzero(shares < most)).size:
            each = max(1, missing // open_.size)
            open_ = open_[:missing]
            added = np.minimum(each, most[open_] - shares[open_])
            shares[open_] += added
            missing -= int(added.sum())
        return shares

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's batches, (S, P*K) positions in `targets_N`; a class's rows stand together."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        chunks = [self._cut(members, rng) for members in self.members]
        left = self._chunks.copy()
        if (spare := int(left.sum()) - self.p * self.steps) > 0:  # of a shorter epoch
            left[rng.choice(np.flatnonzero(left), spare, replace=False)] -= 1
        batches = np.empty((self.steps, self.p, self.k), dtype=np.int64)
        for step in range(self.steps):
            for row, c in enumerate(self._classes(left, self.steps - step, rng)):
                left[c] -= 1
                if 0 <= left[c] < len(chunks[c]):
                    batches[step, row] = chunks[c][left[c]]
                else:
                    left[c] = max(left[c], 0)
                    batches[step, row] = self._fill(self.members[c][:0], self.members[c], rng)
        assert not left.any()
        return batches.reshape(self.steps, -1)

    def _classes(
        self, left: NDArray[np.int64], steps_left: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """P distinct classes: those that need every step left, then by chance, by chunks left."""
        # The P largest of log(u) / weight are a weighted draw without replacement (Efraimidis and
        # Spirakis 2006).
        keys = np.log(1 - rng.random(len(left))) / np.maximum(left, 1)
        tier = np.where(left == 0, 0, np.where(left == steps_left, 2, 1))
        taken: list[NDArray[np.int64]] = []  # lowest first, as a sort of all classes would end
        room = self.p
        for level in (2, 1, 0):
            of_level = np.flatnonzero(tier == level)
            if len(of_level) > room:
                of_level = of_level[np.argpartition(keys[of_level], -room)[-room:]]
            taken.insert(0, of_level[np.argsort(keys[of_level], kind="stable")])
            room -= len(of_level)
            if not room:
                break
        return rng.permutation(np.concatenate(taken))

    def _cut(self, members: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """The class, shuffled, in chunks of K; the last is filled."""
        order = rng.permutation(members)
        chunks = [order[i : i + self.k] for i in range(0, len(order), self.k)]
        if len(chunks[-1]) < self.k:
            chunks[-1] = self._fill(chunks[-1], members, rng)
        else:
            rng.permutation(len(order) - self.k)  # as much chance as a filling takes: plans stay
        return chunks

    def _fill(
        self, chunk: NDArray[np.int64], members: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """`chunk` and more images of its class up to K; none comes twice before all came once."""
        rest = rng.permutation(np.setdiff1d(members, chunk, assume_unique=True))
        chunk = np.concatenate([chunk, rest])[: self.k]
        while len(chunk) < self.k:
            chunk = np.concatenate([chunk, rng.permutation(members)])[: self.k]
        return chunk


class ImageStore(Protocol):
    """What `Batches` asks of a store."""

    def padded(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """uint8 BCHW padded to the largest image, and int64 (height, width) of each."""


class Batch(NamedTuple):
    """One worker's slice of one step."""

    step: int
    images: Tensor
    """bCHW uint8, padded at the right and the bottom."""
    sizes: Tensor
    """b2 int64, height and width of each image inside the padding."""
    labels: Tensor
    """b int64."""
    uniforms: Tensor
    """bU, what augments each image; a function of its place in the global batch."""


class Batches:
    """One worker's slices, on its device, read ahead by one thread."""

    def __init__(
        self,
        store: ImageStore,
        targets_N: NDArray[np.int64],
        sampler: PKSampler,
        *,
        draw: Callable[[int, int, int], Tensor],
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Checks that the workers' slices are equal.

        Args:
            store: the split's images, in the order of `targets_N`.
            targets_N: labels that the loss sees.
            draw: (epoch, step, B) -> uniforms_BU of the global batch.
            rank: takes rows rank*b .. (rank+1)*b.

        Raises:
            UserError: P x K is not a multiple of `world`.
        """
        self.size = sampler.p * sampler.k
        if self.size % world:
            raise UserError(
                f"A batch of P x K = {sampler.p} x {sampler.k} = {self.size} images cannot be "
                f"shared equally by {world} workers; choose P x K as a multiple of {world}."
            )
        self.store, self.sampler, self.draw = store, sampler, draw
        self.labels_N = torch.as_tensor(np.asarray(targets_N, dtype=np.int64))
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # a thread's default is GPU 0
            self.device = torch.device("cuda", torch.cuda.current_device())
        share = self.size // world
        self.rows = slice(rank * share, (rank + 1) * share)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start_step` on; closing the iterator ends its thread.

        An error of the store or of `draw` is raised where the batch would have come.
        """
        ready: queue.Queue[tuple[Batch | BaseException | None, torch.Event | None]]
        ready = queue.Queue(READ_AHEAD)
        stop = threading.Event()

        def read() -> None:
            try:
                # A stream of its own, so that copies to the GPU run beside the training's kernels.
                stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
                plan = self.sampler.epoch(epoch)
                for step in range(start_step, len(plan)):
                    with torch.cuda.stream(stream):
                        batch = self._read(epoch, step, plan[step][self.rows])
                        if stop.is_set():
                            return
                        ready.put((batch, None) if stream is None else self._send(batch, stream))
                    if stop.is_set():
                        return
                ready.put((None, None))
            except BaseException as error:  # noqa: B036 (the consumer raises it)
                ready.put((error, None))

        thread = threading.Thread(target=read, name="flowerray-batches", daemon=True)
        thread.start()
        try:
            while True:
                batch, copied = ready.get()
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                if copied is not None:
                    self._receive(batch, copied)
                yield batch
        finally:
            stop.set()
            # After `stop` the thread puts one batch at most, for which this makes room.
            while not ready.empty():
                ready.get_nowait()
            thread.join()

    def _read(self, epoch: int, step: int, indices_b: NDArray[np.int64]) -> Batch:
        images_bCHW, sizes_b2 = self.store.padded(indices_b)
        uniforms_BU = torch.as_tensor(self.draw(epoch, step, self.size))
        labels_b = self.labels_N[torch.from_numpy(indices_b)]
        return Batch(step, images_bCHW, sizes_b2, labels_b, uniforms_BU[self.rows])

    def _send(self, batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.Event]:
        moved = [to_device(tensor, self.device) for tensor in batch[1:]]
        return Batch(batch.step, *moved), stream.record_event()

    def _receive(self, batch: Batch, copied: torch.Event) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in batch[1:]:
            # Its memory may be reused only when the training's kernels are done with it.
            tensor.record_stream(current)
