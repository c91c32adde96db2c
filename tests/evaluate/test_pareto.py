"""The front of compromises."""

from flowerray.evaluate.pareto import front


def test_a_beaten_point_is_not_on_the_front() -> None:
    """(0.79, 0.46) is beaten by (0.8, 0.46), (0.5, 0.2) by all."""
    points = [(0.9, 0.44), (0.79, 0.46), (0.8, 0.46), (0.6, 0.50), (0.5, 0.2)]
    assert front(points) == [0, 2, 3]


def test_equal_points_do_not_beat_each_other() -> None:
    assert front([(0.5, 0.5), (0.5, 0.5)]) == [0, 1]
