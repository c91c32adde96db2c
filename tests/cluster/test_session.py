"""Joining and starting Ray, where it fails: one sentence (with Ray itself: test_fit, test_many)."""

import sys
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
            "the Ray at 10.0.0.1:6379 cannot be joined: no room (where it asks for a token: "
            "export RAY_AUTH_MODE=token).",
        ),
        (
            {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token"},
            "the Ray at 10.0.0.1:6379 cannot be joined: no room.",
        ),
    ],
)
def test_a_ray_that_cannot_be_had_is_one_sentence(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("no room.\nand a long story")

    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init)
    )
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", *session.ENVIRONMENT):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, session.ray_session(min_cpus=1):
        pytest.fail("nothing was joined")
    assert str(caught.value) == says
