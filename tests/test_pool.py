"""How many processes share the work; that they are told from their parent is in test_synthetic."""

import os
from pathlib import Path

import pytest

from flowerray import pool


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"),
    [
        ("max 100000", 6, 6),
        ("250000 100000", 6, 3),
        ("50000 100000", 6, 1),
        ("800000 100000", 2, 2),
        (None, 5, 5),
        ("odd", 5, 5),
    ],
)
def test_cores_are_those_that_the_process_may_use(
    quota: str | None,
    allowed: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container's share, and the affinity that a batch system sets."""
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(f"{quota}\n")
    monkeypatch.setattr(pool, "_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    assert pool.cores() == expected
