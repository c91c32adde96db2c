"""Load metrics: names, ranges, cost, and a stand-in for a GPU's driver."""

import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from flowerray import system


def test_values_are_finite_and_in_range() -> None:
    metrics = system.sample()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(
        metrics
    )
    for name, value in metrics.items():
        assert name.startswith("system/") and math.isfinite(value) and value >= 0
        assert value <= 100 or not name.endswith("percentage")
    assert metrics["system/system_memory_usage_megabytes"] > 50


def test_cpu_load_is_seen() -> None:
    system.sample()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert system.sample()["system/cpu_utilization_percentage"] > 5


def test_it_is_cheap() -> None:
    system.sample()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        system.sample()
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[10] < 0.005


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def memory(handle: str) -> SimpleNamespace:
        if handle == "gpu2":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(used=3e9, total=12e9)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: f"gpu{i}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu=70, memory=5)
    )
    system._gpus.cache_clear()
    try:
        metrics = system.sample()
    finally:
        system._gpus.cache_clear()
    assert metrics["system/gpu_1_utilization_percentage"] == 70
    assert metrics["system/gpu_1_memory_usage_megabytes"] == 3000
    assert metrics["system/gpu_0_memory_usage_percentage"] == 25
    assert not any("gpu_2" in name for name in metrics)  # a GPU that does not tell is left out


def test_it_loads_no_mlflow() -> None:
    code = "import flowerray.system, sys; assert not {'mlflow', 'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
