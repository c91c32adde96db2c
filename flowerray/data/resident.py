"""Decoded photographs in a GPU's memory, where they fit: batches are cut from them there, so that
no step waits for the host.

Letters: B images of a batch, C H W an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.data.store import Store

SHARE = 0.25
"""Of a GPU's free memory, what photographs may take."""
_PART = 64 * 2**20
"""Bytes that are copied at a time."""


class Resident(Store):
    """A store that gives its images on a device, where all of them lie."""

    def __init__(self, store: Store, device: torch.device) -> None:
        """Copies the pixels.

        Raises:
            UserError: see `Store.image`.
        """
        super().__init__(store.folder)
        self.device = device
        pixels = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self._images: list[Tensor] = []
        part: list[NDArray[np.uint8]] = []
        start = end = 0
        for i in range(len(store)):
            image = store.image(i)
            part.append(image.reshape(-1))
            self._images.append(pixels[end : end + image.size].view(image.shape))
            end += image.size
            if end - start >= _PART or i + 1 == len(store):
                pixels[start:end] = torch.from_numpy(np.concatenate(part)).to(device)
                start, part = end, []

    def centre(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Tensor:
        """See `Store.centre`."""
        crops = []
        for i in np.asarray(indices).tolist():
            top, left = ((side - size) // 2 for side in self._images[i].shape[:2])
            crops.append(self._images[i][top : top + size, left : left + size])
        if not crops:
            return torch.empty(0, 3, size, size, dtype=torch.uint8, device=self.device)
        return torch.stack(crops).permute(0, 3, 1, 2)

    def padded(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """See `Store.padded`; the sizes are on the CPU."""
        images = [self._images[i] for i in np.asarray(indices).tolist()]
        sizes_B2 = torch.tensor([image.shape[:2] for image in images])
        height, width = sizes_B2.amax(0).tolist()
        images_BHWC = self._images[0].new_zeros(len(images), height, width, 3)
        for row_HWC, image in zip(images_BHWC, images, strict=True):
            row_HWC[: image.shape[0], : image.shape[1]] = image
        return images_BHWC.permute(0, 3, 1, 2), sizes_B2


def resident(store: Store, device: torch.device) -> Store:
    """The store in a GPU's memory where it takes little of what is free, else as it is."""
    if device.type != "cuda" or store.nbytes > SHARE * torch.cuda.mem_get_info(device)[0]:
        return store
    return Resident(store, device)
