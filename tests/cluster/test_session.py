"""Joining and starting Ray, where it fails: one sentence (Ray itself: test_driver, test_tasks)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowerray.cluster import session
from flowerray.errors import UserError


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "Ray did not start on this machine: no room."),
        (
            {"RAY_ADDRESS": "10.0.0.1:6379"},
            "the Ray at 10.0.0.1:6379 cannot be joined: no room. Its remedy (where it asks for a "
            "token: export RAY_AUTH_MODE=token).",
        ),
        (
            {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token"},
            "the Ray at 10.0.0.1:6379 cannot be joined: no room. Its remedy.",
        ),
    ],
)
def test_a_ray_that_cannot_be_had_is_one_sentence(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("no room.\n Its remedy.\n")

    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init)
    )
    for name in (
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        *session.ENVIRONMENT,
        *session.OWN,
    ):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(session, "refuse_dead", lambda _: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, session.ray_session(min_cpus=1):
        pytest.fail("nothing was joined")
    assert str(caught.value) == says


def test_a_dead_address_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for said in (address, f"ray://{address}"):
        with pytest.raises(UserError, match=r"no Ray answers .* refused.*`ray start --head`"):
            session.refuse_dead(said)
    with pytest.raises(UserError, match=r"is a dashboard.* give HOST:PORT"):
        session.refuse_dead("http://127.0.0.1:8265")
    session.refuse_dead("auto")
    with socket.create_server(("127.0.0.1", 0)) as alive:
        session.refuse_dead(f"127.0.0.1:{alive.getsockname()[1]}")


def test_the_private_names_are_of_the_installed_ray() -> None:
    """Another version trains too, more slowly: look whether what `knows_ray` guards is still there,
    then name the version in `session.KNOWN_RAY`.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy

    assert session.knows_ray()
    for name in ("_create_default_callbacks", "_initialize_and_run_controller"):
        assert hasattr(TorchTrainer, name)
    for name in ("_send", "_maybe_send", "_cancel"):
        assert hasattr(ScalingPolicy, f"{name}_resource_request")


def test_an_unknown_ray_goes_the_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer

    from flowerray.cluster import trainer

    monkeypatch.setattr("ray.__version__", "3.0.0")
    assert trainer._trainer_kind(alone=True) is TorchTrainer


LOOK = """
import json, os, sys, psutil
from flowerray.cluster.session import ray_session
def look():
    import statistics
    return statistics.__file__
me = psutil.Process()
with ray_session(min_cpus=1) as ray:
    found = ray.get(ray.remote(look).remote())
    started = [me, *me.children(recursive=True)]
    heard = [c.laddr.ip for p in started for c in p.net_connections("inet") if c.status == "LISTEN"]
    words = [word for process in started for word in process.cmdline()]
    (place,) = {w.split("=")[1] for w in words if w.startswith("--temp-dir=")}
    mode = oct(os.stat(os.path.dirname(place)).st_mode)[-3:]
print(json.dumps([found, heard, mode, os.path.exists(place)]))
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_ray_of_our_own_is_reached_by_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    """A `statistics.py` in the current folder is no module of a driver that is not run from it."""
    (tmp_path / "statistics.py").write_text("raise AssertionError")
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK],
        cwd=tmp_path, env={**env, "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, heard, mode, left = json.loads(done.stdout.splitlines()[-1])
    assert not found.startswith(str(tmp_path))
    assert len(heard) > 3 and {ip.removeprefix("::ffff:") for ip in heard} == {"127.0.0.1"}
    assert mode == "700" and not left
    assert not (tmp_path / ".ray").exists(), "a token"
