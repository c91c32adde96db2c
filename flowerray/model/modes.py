"""What the work inside may change for a while, and what is then as it was: the modes of modules,
full precision, the order of sums, the random state.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards, also after an error, each submodule has its own mode again."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products in true fp32 on a GPU too, where cuDNN rounds inputs of
    convolutions to TF32's 10 bits unless told otherwise. What is reported is computed inside.
    """
    kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept[0]
        torch.set_float32_matmul_precision(kept[1])


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Kernels that add in the same order each time, where torch has them; of what has none it warns
    by name. The rooms that cuBLAS works in are set for the whole process, since it looks once.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    kept = cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    memory.fill_uninitialized_memory = False  # finds faults; costs a pass over memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory = kept


@contextmanager
def own_draws() -> Iterator[None]:
    """Leaves the global generators of torch (CPU and GPUs), NumPy and Python as it found them,
    whatever is seeded or drawn inside.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(gpus)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
