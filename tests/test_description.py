"""How a run is described."""

from flowerray.description import flatten


def test_flatten() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1]}, "e": None}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [1], "e": None}
