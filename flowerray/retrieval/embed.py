"""Embeddings of a whole store, without augmentation and without leaving a trace on the model.

Letters: N images, B of a batch, C H W an image, D embedding dimensions, F backbone features.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flowerray import cache
from flowerray.data.store import Store, floats
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating, full_precision
from flowerray.model.precision import device_name


class Images(Protocol):
    """What is embedded: a `Store`, or a worker's part of one."""

    def __len__(self) -> int:
        """Number of images."""

    def centre(self, indices: NDArray[np.int64], size: int) -> Tensor:
        """uint8 BCHW of some of them."""


class Rows:
    """Some images of a store."""

    def __init__(self, store: Images, rows: NDArray[np.int64]) -> None:
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def centre(self, indices: NDArray[np.int64], size: int) -> Tensor:
        """See `Store.centre`."""
        return self.store.centre(self.rows[indices], size)


class Crops:
    """Images in memory, as `embed` takes them."""

    def __init__(self, crops_BHWC: NDArray[np.uint8]) -> None:
        self.crops_BHWC = crops_BHWC

    def __len__(self) -> int:
        return len(self.crops_BHWC)

    def centre(self, indices: NDArray[np.int64], size: int) -> Tensor:
        """See `Store.centre`."""
        assert self.crops_BHWC.shape[1] == size
        return torch.from_numpy(self.crops_BHWC[indices]).permute(0, 3, 1, 2)


def in_group() -> bool:
    """Whether this process is a worker of several."""
    return dist.is_available() and dist.is_initialized()


def own_part(count: int) -> NDArray[np.int64]:
    """Of so many images those that this worker of a process group takes."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if in_group() else (1, 0)
    bounds = np.linspace(0, count, world + 1).astype(int)
    return np.arange(bounds[rank], bounds[rank + 1])


def gathered(own: object) -> list:
    """What every worker has, by rank."""
    if not in_group():
        return [own]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def embed_together(embedder: Embedder, store: Images) -> NDArray[np.float32]:
    """`embed` with the images shared out over the workers of a process group.

    Every worker gets all N rows, the same ones to the bit, so that what each decides from them
    (best so far, early stop) cannot differ.
    """
    return np.concatenate(gathered(embed(embedder, Rows(store, own_part(len(store))))))


def embed(
    embedder: Embedder,
    store: Images,
    *,
    batch_size: int = 64,
    frozen: bool = False,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """Embeds every image of a store with the evaluation transform.

    Args:
        embedder: in eval mode meanwhile; each of its submodules is as before afterwards.
        batch_size: images at a time; changes nothing beyond rounding.
        frozen: pooled backbone features, L2-normalised, instead: the floor that training must beat.
        progress: called with the number of images done after each batch (a tqdm bar's `update`).

    Returns:
        float32 (N, D) unit vectors, or (N, F) with `frozen`.
    """
    device = next(embedder.parameters()).device
    rows: list[NDArray[np.float32]] = []
    with evaluating(embedder), torch.inference_mode(), full_precision():
        for pixels_BCHW in _batches(store, embedder.image_size, batch_size, device):
            images_BCHW = floats(pixels_BCHW, device)
            if frozen:
                emb_BD = F.normalize(embedder.features(images_BCHW).float(), dim=1)
            else:
                emb_BD = embedder(images_BCHW)
            rows.append(emb_BD.float().cpu().numpy())
            if progress is not None:
                progress(len(pixels_BCHW))
    return np.concatenate(rows) if rows else np.empty((0, embedder.dim), np.float32)


def embed_crops(
    embedder: Embedder, crops: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], frozen: bool = False
) -> NDArray[np.float32]:
    """`embed` of evaluation crops, each HWC.

    Raises:
        UserError: the model gives numbers that are not finite.
    """
    emb_BD = embed(embedder, Crops(np.asarray(crops, np.uint8)), frozen=frozen)
    refuse_damaged(emb_BD)
    return emb_BD


def _batches(store: Images, size: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """The store's images in order; while a GPU works on some, the next ones are read."""
    starts = range(0, len(store), batch_size)

    def read(start: int) -> Tensor:
        return store.centre(np.arange(start, min(start + batch_size, len(store))), size)

    if device.type == "cpu":  # whose cores are at work
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for start in starts:
            ahead.append(pool.submit(read, start))
            if len(ahead) > 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def kept_embeddings(
    embedder: Embedder,
    store: Store,
    *,
    frozen: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """`embed`, kept beside the store: the next search asks for it again, as floor and pairs do for
    the frozen features. The file's name holds a hash of what decides its content; see `cache.key`.
    """
    device = next(embedder.parameters()).device
    normalised = (embedder.mean.flatten().tolist(), embedder.std.flatten().tolist())
    facts = embedder.config.backbone, *normalised, embedder.image_size
    weights = (embedder.backbone if frozen else embedder).state_dict()
    kind = "features" if frozen else "embeddings"
    file = store.folder / f"{kind}-{cache.key(weights, device_name(device), *facts)}.npz"
    kept = cache.read_arrays(file)
    if kept is not None and "emb" in kept and len(kept["emb"]) == len(store):
        if progress is not None:
            progress(len(store))
        return kept["emb"]
    emb_ND = embed(embedder, store, batch_size=batch_size, frozen=frozen, progress=progress)
    refuse_damaged(emb_ND)
    with suppress(OSError):  # it only saves time
        cache.write_arrays(file, emb=emb_ND)
    return emb_ND


def refuse_damaged(emb_ND: NDArray[np.floating]) -> None:
    """Raises UserError where embeddings are not finite: no similarity to them is an answer."""
    if not np.isfinite(emb_ND).all():
        raise UserError(
            "the model gives embeddings that are not finite numbers: its training diverged, or its "
            "file is damaged; use another checkpoint."
        )
