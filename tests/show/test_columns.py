"""Tables for a terminal."""

from flowerray.show.columns import columns


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["", "R@1", "s"], ["triplet", "0.5", "12"], ["a", "0.75", ""]]
    assert columns(rows, "<>>", indent=1) == [
        "           R@1   s", " triplet   0.5  12", " a        0.75",
    ]  # fmt: skip
    assert columns([["a", "b"]], "<<", gap=1) == ["a b"]
