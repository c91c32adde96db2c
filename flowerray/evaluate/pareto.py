"""The best compromises between several values."""

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """The points that no other beats in one value without losing in another."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        pairs = list(zip(a, b, strict=True))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [i for i, p in enumerate(points) if not any(beats(other, p) for other in points)]
