"""The map over decoding processes; what an image becomes is tested with the store."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from flowerray.data.images import _map_ahead, decoding_map
from flowerray.errors import UserError


class Pool:
    """Does at once what it is asked for, as fast processes would."""

    def __init__(self) -> None:
        self.done = 0

    def map(self, function: Callable, items: Iterable[int], chunksize: int) -> Iterator[int]:
        found = [function(item) for item in items]
        self.done += len(found)
        return iter(found)


def test_decoding_does_not_run_far_ahead_of_its_reader() -> None:
    pool: Any = Pool()
    read = []
    for number in _map_ahead(pool, 8, lambda n: n * n, iter(range(100))):
        read.append(number)
        assert pool.done <= len(read) + 2 * 8
    assert read == [n * n for n in range(100)]
    assert list(_map_ahead(pool, 8, str, [])) == []


def test_processes_keep_the_order() -> None:
    with decoding_map(300, processes=2) as run:
        assert list(run(abs, range(-300, 0))) == list(range(300, 0, -1))


def test_a_process_that_dies_is_a_sentence() -> None:
    """What the system does to it where memory is short."""
    with (
        pytest.raises(UserError, match="process that decodes images died: free some memory"),
        decoding_map(2, processes=2) as run,
    ):
        list(run(os._exit, [1, 1]))
