"""PK batches and their read-ahead."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.data.batches import READ_AHEAD, Batches, PKSampler
from flowerray.errors import UserError


def imbalanced(rng: np.random.Generator) -> tuple[NDArray[np.int64], int, int]:
    """Random class sizes 1..40, shuffled, with labels that have gaps; and a P and a K that fit."""
    sizes = rng.integers(1, 41, size=rng.integers(2, 15))
    names = rng.choice(100, size=len(sizes), replace=False)
    targets_N = rng.permutation(np.repeat(names, sizes)).astype(np.int64)
    p = int(rng.integers(1, len(sizes) + 1))
    k = int(rng.integers(1, 1 + min(9, len(targets_N) // p)))
    return targets_N, p, k


@pytest.mark.parametrize("case", range(60))
def test_every_batch_is_p_classes_of_k_and_every_image_comes(case: int) -> None:
    rng = np.random.default_rng(case)
    targets_N, p, k = imbalanced(rng)
    sampler = PKSampler(targets_N, p, k, seed=case)
    plan = sampler.epoch(3)

    assert plan.dtype == np.int64
    assert plan.shape == (sampler.steps, p * k)
    assert set(plan.flat) == set(range(len(targets_N)))
    for batch in plan:
        classes_PK = targets_N[batch].reshape(p, k)
        assert (classes_PK == classes_PK[:, :1]).all()
        assert len(set(classes_PK[:, 0])) == p
        for rows in batch.reshape(p, k):
            available = int((targets_N == targets_N[rows[0]]).sum())
            assert len(set(rows)) == min(k, available)


@pytest.mark.parametrize("case", range(30))
def test_nothing_is_shown_beyond_what_the_rules_add(case: int) -> None:
    rng = np.random.default_rng(100 + case)
    targets_N, p, k = imbalanced(rng)
    sampler = PKSampler(targets_N, p, k, seed=0)
    chunks = {c: -(-int((targets_N == c).sum()) // k) for c in set(targets_N.tolist())}
    # No schedule is shorter: P chunks a step, and a class once a step.
    assert sampler.steps == max(-(-sum(chunks.values()) // p), max(chunks.values()))
    rows = sampler.epoch(0).reshape(-1, k)
    shown = {c: int((targets_N[rows[:, 0]] == c).sum()) for c in chunks}
    assert all(shown[c] >= chunks[c] for c in chunks)
    redrawn = sum(shown.values()) - sum(chunks.values())
    assert redrawn == sampler.steps * p - sum(chunks.values())
    if p == 1:
        assert redrawn == 0


def test_chunks_of_whole_classes_show_each_image_exactly_once() -> None:
    targets_N = np.repeat(np.arange(12), 8)
    counts = np.bincount(PKSampler(targets_N, 6, 4, seed=0).epoch(0).ravel())
    assert (counts == 1).all()


def test_the_official_shape() -> None:
    sampler = PKSampler(np.repeat(np.arange(102), 10), 12, 4, seed=0)
    assert sampler.steps == 26  # 102 classes x 3 chunks / 12, rounded up


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_that_of_a_sort_of_all_classes(seed: int) -> None:
    """What is drawn does not change with how fast it is found: runs stay comparable."""

    class Sorting(PKSampler):
        def _classes(
            self, left: NDArray[np.int64], steps_left: int, rng: np.random.Generator
        ) -> NDArray[np.int64]:
            keys = np.log(1 - rng.random(len(left))) / np.maximum(left, 1)
            tier = np.where(left == 0, 0, np.where(left == steps_left, 2, 1))
            return rng.permutation(np.lexsort((keys, tier))[-self.p :])

        def _cut(
            self, members: NDArray[np.int64], rng: np.random.Generator
        ) -> list[NDArray[np.int64]]:
            order = rng.permutation(members)
            chunks = [order[i : i + self.k] for i in range(0, len(order), self.k)]
            chunks[-1] = self._fill(chunks[-1], members, rng)
            return chunks

    rng = np.random.default_rng(seed)
    targets_N = rng.permutation(np.repeat(np.arange(30), rng.integers(1, 20, 30)))
    for p, k in ((12, 4), (30, 2), (5, 3)):
        found, expected = PKSampler(targets_N, p, k, seed), Sorting(targets_N, p, k, seed)
        for c, members in enumerate(found.members):
            assert np.array_equal(members, np.flatnonzero(targets_N == c))
        for epoch in (0, 1):
            assert np.array_equal(found.epoch(epoch), expected.epoch(epoch))


def test_large_classes_do_not_all_come_first() -> None:
    targets_N = np.repeat(np.arange(20), [80] * 4 + [8] * 16)
    plan = PKSampler(targets_N, 4, 4, seed=0).epoch(0)
    first = targets_N[plan[: len(plan) // 2]]
    assert (first >= 4).any(), "the first half holds small classes too"


def test_pure_function_of_seed_and_epoch() -> None:
    targets_N = np.repeat(np.arange(9), np.arange(3, 12))
    one = PKSampler(targets_N, 4, 3, seed=5)
    later = one.epoch(7)
    np.random.seed(1)
    torch.manual_seed(1)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    other = PKSampler(targets_N, 4, 3, seed=5)
    assert (other.epoch(7) == later).all() and (one.epoch(7) == later).all()
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
    assert (one.epoch(8) != later).any()
    assert (PKSampler(targets_N, 4, 3, seed=6).epoch(7) != later).any()


def test_mistakes_are_one_sentence() -> None:
    targets_N = np.repeat(np.arange(3), 10)
    with pytest.raises(UserError, match="P = 4 classes cannot be formed from 3 training classes"):
        PKSampler(targets_N, 4, 2, seed=0)
    with pytest.raises(UserError, match=r"3 x 11 = 33 images is larger than the training set of 3"):
        PKSampler(targets_N, 3, 11, seed=0)
    sampler = PKSampler(targets_N, 3, 3, seed=0)
    with pytest.raises(UserError, match="9 images cannot be shared equally by 2 workers"):
        Batches(Store(targets_N), targets_N, sampler, draw=uniforms, world=2)


class Store:
    """Images whose pixels are their index, heights and widths that vary."""

    def __init__(self, targets_N: NDArray[np.int64], fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.reads = 0
        self.threads: set[str] = set()

    def padded(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if self.reads == self.fail_at:
            raise OSError("the disk is gone")
        self.reads += 1
        self.threads.add(threading.current_thread().name)
        index_b = torch.from_numpy(indices)
        sizes_b2 = torch.stack([4 + index_b % 3, 4 + index_b % 2], 1)
        images = index_b.to(torch.uint8)[:, None, None, None].expand(-1, 3, 6, 5).clone()
        return images, sizes_b2


def uniforms(epoch: int, step: int, size: int) -> Tensor:
    rng = np.random.default_rng((epoch, step))
    return torch.from_numpy(rng.random((size, 7)))


def make(world: int = 1, rank: int = 0, fail_at: int | None = None) -> tuple[Store, Batches]:
    targets_N = np.repeat(np.arange(10), 8)
    store = Store(targets_N, fail_at)
    sampler = PKSampler(targets_N, 4, 4, seed=2)
    return store, Batches(store, targets_N, sampler, draw=uniforms, rank=rank, world=world)


def running() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "flowerray-batches"]


def test_batches_follow_the_plan() -> None:
    store, batches = make()
    plan = batches.sampler.epoch(1)
    seen = list(batches.epoch(1))
    assert [b.step for b in seen] == list(range(len(plan)))
    for batch, indices in zip(seen, plan, strict=True):
        assert batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
        assert batch.images[:, 0, 0, 0].tolist() == indices.tolist()
        assert batch.labels.tolist() == (indices // 8).tolist()
        assert batch.sizes.tolist() == [[4 + i % 3, 4 + i % 2] for i in indices]
        assert torch.equal(batch.uniforms, uniforms(1, batch.step, 16))
    assert store.threads == {"flowerray-batches"}
    assert not running()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(world: int) -> None:
    whole = list(make()[1].epoch(0))
    parts = [list(make(world, rank)[1].epoch(0)) for rank in range(world)]
    for step, batch in enumerate(whole):
        for field in ("images", "sizes", "labels", "uniforms"):
            joined = torch.cat([getattr(parts[rank][step], field) for rank in range(world)])
            assert torch.equal(joined, getattr(batch, field))


def test_starts_in_mid_epoch() -> None:
    whole = list(make()[1].epoch(4))
    rest = list(make()[1].epoch(4, start_step=3))
    assert [b.step for b in rest] == [b.step for b in whole[3:]]
    for a, b in zip(rest, whole[3:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
    assert list(make()[1].epoch(4, start_step=len(whole))) == []


def test_reads_ahead_by_a_bounded_number() -> None:
    store, batches = make()
    iterator = batches.epoch(0)
    next(iterator)
    deadline = time.monotonic() + 5
    while store.reads < 2 + READ_AHEAD and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    # One with the consumer, READ_AHEAD in the queue, one that waits for a place.
    assert store.reads == 2 + READ_AHEAD
    iterator.close()  # type: ignore[attr-defined]


def test_the_thread_ends_with_its_iterator() -> None:
    for consumed in (1, 2, 4):
        iterator = make()[1].epoch(0)
        for _ in range(consumed):
            next(iterator)
        assert len(running()) == 1 or consumed > 1  # by then it may have read all there is
        iterator.close()  # type: ignore[attr-defined]
        assert not running()
    for _ in make()[1].epoch(0):
        break
    gc.collect()
    assert not running()


def test_an_error_reaches_the_consumer() -> None:
    iterator = make(fail_at=2)[1].epoch(0)
    next(iterator)
    next(iterator)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    assert not running()


def test_an_error_that_nobody_waits_for_does_not_hang() -> None:
    iterator = make(fail_at=3)[1].epoch(0)
    next(iterator)
    time.sleep(0.02)
    iterator.close()  # type: ignore[attr-defined]
    assert not running()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    store, batches = make()
    targets_N = np.repeat(np.arange(10), 8)
    there = Batches(store, targets_N, batches.sampler, draw=uniforms, device="cuda")
    for a, b in zip(batches.epoch(0), there.epoch(0), strict=True):
        for x, y in zip(a[1:], b[1:], strict=True):
            assert y.device.type == "cuda" and torch.equal(x, y.cpu())


@pytest.mark.parametrize("bound", [8, 20])
def test_repeats_of_small_classes_can_be_bounded(bound: int) -> None:
    """A class of 500 and 12 of one image: without a bound each of these is shown some 460 times."""
    targets_N = np.concatenate([np.zeros(500, int), np.arange(1, 13)])
    free = PKSampler(targets_N, 12, 4, seed=0)
    shown = np.bincount(free.epoch(0).ravel())
    assert free.steps == 125 and shown[500:].mean() == pytest.approx(458, abs=1)
    assert free.repeats == pytest.approx(458, abs=5)

    sampler = PKSampler(targets_N, 12, 4, seed=0, max_repeats=bound)
    seen = set()
    for epoch in range(3):
        plan = sampler.epoch(epoch)
        assert plan.shape == (sampler.steps, 48)
        for row in plan:
            classes = targets_N[row].reshape(12, 4)
            assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 12
        shown = np.bincount(plan.ravel(), minlength=512)
        assert shown[500:].max() <= bound and (shown[500:] >= 4).sum() >= 11
        assert sampler.repeats <= bound
        seen |= set(np.flatnonzero(shown[:500]))
    assert len(seen) > 4 * sampler.steps, "another part of the large class an epoch"


def test_a_bound_that_nothing_reaches_changes_no_batch() -> None:
    targets_N = np.repeat(np.arange(20), 10)
    plain, bounded = PKSampler(targets_N, 8, 4, 3), PKSampler(targets_N, 8, 4, 3, max_repeats=9)
    assert plain.steps == bounded.steps
    assert np.bincount(bounded.epoch(1).ravel()).min() >= 1
