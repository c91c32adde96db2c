"""Embedding a store: modes, layout, batches."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flowerray import cache
from flowerray.errors import UserError
from flowerray.retrieval.embed import embed, kept_embeddings
from tests.robustness.fakes import SIZE, store_of, tiny_embedder


@pytest.fixture
def images() -> NDArray[np.uint8]:
    shape = (37, 3, SIZE, SIZE)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_equals_the_model_in_eval_mode(images: NDArray[np.uint8]) -> None:
    embedder = tiny_embedder()
    with torch.no_grad():
        pixels = torch.from_numpy(images).float() / 255
        expected = embedder.eval()(pixels).numpy()
        features = embedder.features(pixels)
    emb = embed(embedder, store_of(images), batch_size=8)
    assert emb.dtype == np.float32 and emb.shape == (37, 4)
    assert np.allclose(emb, expected, atol=1e-6)
    frozen = embed(embedder, store_of(images), batch_size=8, frozen=True)
    assert np.allclose(frozen, features / features.norm(dim=1, keepdim=True), atol=1e-6)
    assert np.allclose(np.linalg.norm(frozen, axis=1), 1)


def test_what_is_reported_is_computed_in_full_precision(images: NDArray[np.uint8]) -> None:
    def flags(*_: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    seen: list[tuple[bool, bool]] = []
    flags()
    embedder = tiny_embedder()
    embedder.register_forward_pre_hook(flags)
    embed(embedder, store_of(images))
    flags()
    before, *inside, after = seen
    assert before[0] and before == after and set(inside) == {(False, False)}


@pytest.mark.parametrize("batch_size", [1, 5, 36, 37, 100])
def test_batch_size_changes_nothing(images: NDArray[np.uint8], batch_size: int) -> None:
    embedder, store = tiny_embedder(), store_of(images)
    done: list[int] = []
    emb = embed(embedder, store, batch_size=batch_size, progress=done.append)
    assert np.abs(emb - embed(embedder, store, batch_size=64)).max() <= 1e-5
    assert sum(done) == 37


def test_modes_buffers_and_gradients_are_as_before(images: NDArray[np.uint8]) -> None:
    embedder = tiny_embedder()
    embedder.train()
    norm = cast(Any, embedder.backbone)[1]
    norm.eval()  # a frozen BatchNorm inside a training model
    state = {name: value.clone() for name, value in embedder.state_dict().items()}
    modes = [module.training for module in embedder.modules()]
    embed(embedder, store_of(images))
    assert [module.training for module in embedder.modules()] == modes
    assert embedder.training and not norm.training
    for name, value in embedder.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in embedder.parameters())
    assert all(cast(Any, embedder).layouts), "not channels_last"


def test_modes_come_back_after_an_error(images: NDArray[np.uint8]) -> None:
    embedder = tiny_embedder().train()

    def fail(_: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        embed(embedder, store_of(images), progress=fail)
    assert all(module.training for module in embedder.modules())


def test_frozen_features_are_kept_for_these_weights_only(images: NDArray[np.uint8]) -> None:
    store = store_of(images)
    embedder = tiny_embedder()
    first = kept_embeddings(embedder, store, frozen=True)
    assert np.array_equal(first, embed(embedder, store, frozen=True))
    cast(Any, store).centre = None  # the kept file is read, not the images
    assert np.array_equal(kept_embeddings(embedder, store, frozen=True), first)
    with torch.no_grad():
        cast(Any, embedder).backbone[0].weight.add_(0.1)
    with pytest.raises(TypeError):
        kept_embeddings(embedder, store, frozen=True)


def test_kept_arrays_that_are_damaged_are_made_again(
    images: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    store, embedder = store_of(images), tiny_embedder()
    first = kept_embeddings(embedder, store)
    (file,) = store.folder.glob("embeddings-*.npz")
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    content = whole.index(first.tobytes()[:64])
    flipped = [bytearray(whole) for _ in range(20)]
    for data, position in zip(flipped, rng.integers(0, first.nbytes, 20), strict=True):
        data[content + position] ^= 1 << int(rng.integers(8))
    for damaged in [b"", b"\x93NUMPY", whole[: len(whole) // 2], *map(bytes, flipped)]:
        file.write_bytes(damaged)
        assert np.array_equal(kept_embeddings(embedder, store), first)
        assert f"{file} is damaged, and is made again" in capsys.readouterr().err
    assert file.read_bytes() == whole


@pytest.mark.parametrize("changed", ["torch", "timm", "flowerray", "device"])
def test_kept_arrays_know_what_made_them(
    changed: str, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, embedder = store_of(images), tiny_embedder()
    kept_embeddings(embedder, store)
    if changed == "flowerray":
        monkeypatch.setattr(cache, "VERSION", "99")
    elif changed == "device":
        monkeypatch.setattr("flowerray.retrieval.embed.device_name", lambda _: "another")
    else:
        known = cache.installed
        monkeypatch.setattr(cache, "installed", lambda p: "99" if p == changed else known(p))
    kept_embeddings(embedder, store)
    assert len(list(store.folder.glob("embeddings-*.npz"))) == 2


def test_embeddings_that_are_no_numbers_are_no_answer(images: NDArray[np.uint8]) -> None:
    store, embedder = store_of(images), tiny_embedder()
    with torch.no_grad():
        embedder.projection.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite numbers"):
        kept_embeddings(embedder, store)
    assert not list(store.folder.glob("embeddings-*"))


@pytest.mark.parametrize("what", ["mean", "backbone"])
def test_features_of_another_model_with_equal_weights(what: str, images: NDArray[np.uint8]) -> None:
    """As of two variants of an architecture that differ in padding or normalisation only."""
    store = store_of(images)
    embedder = tiny_embedder()
    kept_embeddings(embedder, store, frozen=True)
    cast(Any, store).centre = None
    if what == "mean":
        embedder.mean = embedder.mean + 0.1
    else:
        embedder.config = embedder.config.model_copy(update={"backbone": "another"})
    with pytest.raises(TypeError):  # it looks at the images again
        kept_embeddings(embedder, store, frozen=True)
