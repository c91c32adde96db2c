"""Which precision trains faster with a backbone on this device: measured once, then remembered."""

import copy
import time
from contextlib import suppress
from typing import Literal

import torch
from torch import nn

from flowerray.files import home, locked, read_kept, write_json
from flowerray.model.embedder import Embedder

MARGIN = 1.15
"""bf16 has to be faster by this factor, so that a noisy machine does not flip the choice."""


def device_name(device: torch.device) -> str:
    """`cpu`, or the model of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def faster_precision(embedder: Embedder, device: torch.device) -> Literal["fp32", "bf16"]:
    """Times training steps in fp32 and in bf16 autocast, interleaved, and keeps the answer in
    FLOWERRAY_HOME.

    The key is backbone, image size, device, torch version and thread count. On CPUs bf16 slows
    depthwise models down and nearly doubles ResNets' speed, so no rule of thumb replaces the
    measurement."""
    config = embedder.config
    where = f"{device_name(device)} torch{torch.__version__} {torch.get_num_threads()}t"
    key = f"{config.backbone} {config.image_size} {where}"
    memory = home() / "precision.json"
    with locked(memory):  # others wait: they would disturb the measurement, and may use it
        known = read_kept(memory, dict[str, dict[str, float]]) or {}
        if key not in known:
            # One rank measures alone: in train mode synchronised BatchNorm would wait for others.
            known[key] = _measure(copy.deepcopy(embedder).eval(), device)
            with suppress(OSError):  # it only saves the next measurement
                write_json(memory, known)
    fp32, bf16 = known[key]["fp32"], known[key]["bf16"]
    return "bf16" if fp32 / bf16 >= MARGIN else "fp32"


def _measure(embedder: Embedder, device: torch.device) -> dict[str, float]:
    """Seconds of a step in each precision: the fastest, since noise only ever slows."""
    size = embedder.image_size
    batch = 16 if device.type == "cpu" else 64  # a GPU waits for the host on less, in either
    images = torch.rand(batch, 3, size, size, device=device)
    optimizer = torch.optim.SGD(embedder.parameters(), lr=0.0)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for repeat in range(4):
        for precision, taken in seconds.items():
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = embedder(images).square().sum()
            loss.backward()
            optimizer.step()
            nn.Module.zero_grad(embedder)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first one warms up
                taken.append(time.perf_counter() - start)
    return {precision: min(taken) for precision, taken in seconds.items()}
