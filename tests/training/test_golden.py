"""The loss after some steps of each method, as 0.1.0 computed it: changes of structure change none.

A change that is meant to change a loss replaces its number here, with a reason in the commit.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility import readings
from tests.train_process import make_run, train_small

GOLDEN = {
    ("center", "none"): 0.9217390809826111,
    ("siamese", "none"): 0.5107754132465092,
    ("triplet", "none"): 0.08333276506882425,
    ("center", "pgd"): 2.114392574043241,
    ("siamese", "pgd"): 0.8162932686355776,
    ("triplet", "pgd"): 0.25529470329801884,
}
"""Method and kind of hardening -> the training loss of step 10."""


@pytest.mark.parametrize(("method", "kind"), GOLDEN)
def test_the_loss_of_step_10_is_that_of_0_1_0(
    job: dict[str, Any], tmp_path: Path, method: str, kind: str
) -> None:
    """Float64, seed 0, augmentation on; a hardened run's attack is at its full size by then. The
    weights start and the images are augmented in float32, which another machine rounds otherwise.
    """
    out = tmp_path / "run"
    make_run(out)
    train_small(
        {
            **job,
            "method": method,
            "double": True,
            "out": str(out),
            "train": {"epochs": 2, "classes_per_batch": 4, "images_per_class": 2, "lr": 1e-3},
            "harden": {"kind": kind},
        }
    )
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["metrics"]["train/loss"] for r in records if "train/loss" in r["metrics"]]
    tolerance = 1e-9 if readings.equal_bits() else 1e-4
    assert losses[9] == pytest.approx(GOLDEN[method, kind], rel=tolerance), repr(losses[9])
