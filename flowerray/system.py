"""Load of this machine as metrics, under the names that MLflow's System metrics tab shows."""

from functools import cache
from typing import Any

import psutil

psutil.cpu_percent()  # the first call has nothing to compare with and would give 0


def sample() -> dict[str, float]:
    """CPU, memory and GPU load now; the CPU's is the mean since the last call. Takes under 1 ms.

    Returns:
        `system/cpu_utilization_percentage`, `system/system_memory_usage_{megabytes,percentage}`,
        and for each NVIDIA GPU i `system/gpu_{i}_utilization_percentage` and
        `system/gpu_{i}_memory_usage_{megabytes,percentage}`.
    """
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.used / memory.total * 100,
    }
    for i, gpu in enumerate(_gpus()):
        metrics |= {f"system/gpu_{i}_{name}": value for name, value in _gpu_load(gpu).items()}
    return metrics


@cache
def _gpus() -> tuple[Any, ...]:
    """NVML handles; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return tuple(map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())))
    except pynvml.NVMLError:
        return ()


def _gpu_load(gpu: Any) -> dict[str, float]:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return {
            "utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            "memory_usage_megabytes": memory.used / 1e6,
            "memory_usage_percentage": memory.used / memory.total * 100,
        }
    except (
        pynvml.NVMLError
    ):  # a driver that does not tell (MIG slices, some laptops) never stops a training
        return {}
