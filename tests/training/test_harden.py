"""Adversarial training: what is attacked, what a step is trained on, and that it holds.

Letters: B images, C channels, H W pixels, D embedding dimensions.
"""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowerray import methods
from flowerray.errors import UserError
from flowerray.methods._base import Method, distances
from flowerray.training.harden import HardenConfig, Hardening, nfgsm, perturbed_weights
from tests.methods.cases import build, images_of

KINDS = ("pgd", "trades", "nfgsm", "free")
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def harden(method: Method, rank: int = 0, **fields: Any) -> Hardening:
    """A Hardening of 100 steps without a ramp."""
    config = HardenConfig(**{"kind": "pgd", "ramp": 0.0, "epsilon": 8.0, **fields})
    return Hardening(config, method, nullcontext, 0, 100, rank)


def moved(hardening: Hardening, images: Tensor, labels: Tensor, step: int = 5) -> Tensor:
    """The images of the (first) round of a step."""
    found = next(hardening.rounds(images, labels, step))
    assert found is not None
    return found.detach()


# --- what a step is trained on --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", methods.names())
def test_each_image_stays_near_its_own_and_leaves_no_trace(name: str, kind: str) -> None:
    method = build(name).train()
    images = images_of(LABELS)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    found = moved(harden(method, kind=kind), images, LABELS)
    change = (found - images).abs().amax((1, 2, 3))
    assert torch.all(change <= (3 if kind == "nfgsm" else 1) * 8 / 255 + 1e-9)
    assert torch.all(change > 1 / 255) and 0 <= found.min() and found.max() <= 1
    assert all(module.training for module in method.modules())
    for parameter in method.parameters():
        assert parameter.requires_grad and parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", methods.names())
def test_the_attack_raises_the_loss_more_than_noise_does(name: str) -> None:
    # Against the nearest negatives an untrained siamese is as hard as it may get already.
    method = build(name, **({"negatives": "all"} if name == "siamese" else {}))
    images = images_of(LABELS)
    hardening = harden(method, epsilon=16.0, steps=5)

    @torch.no_grad()
    def loss(points: Tensor) -> float:
        return float(method.attack_loss(method.embed(points), LABELS, torch.tensor(0.0)))

    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = (images + 16 / 255 * noise.sign()).clamp(0, 1)
    assert loss(moved(hardening, images, LABELS)) > max(loss(images), loss(noisy))


@pytest.mark.parametrize("mix", [0.4, 1.0])
@pytest.mark.parametrize("name", methods.names())
def test_clean_and_moved_images_keep_their_labels(name: str, mix: float) -> None:
    """Where a batch holds clean and moved images, a pair's label has to stay with its images; put
    in another order than the labels, siamese pairs train at chance.
    """
    method = build(name)
    images, points = images_of(LABELS), images_of(LABELS, seed=9)
    output = harden(method, mix=mix)(images, points, LABELS)
    clean, hard = (method.loss(method.embed(x), LABELS).total for x in (images, points))
    torch.testing.assert_close(output.loss.total, (1 - mix) * clean + mix * hard)
    torch.testing.assert_close(output.loss.curves["adversarial_loss"], hard.detach())
    assert torch.equal(output.labels_B, LABELS)
    shown = images if mix < 1 else points
    torch.testing.assert_close(output.emb_BD, method.embed(shown).detach())
    order = torch.arange(len(LABELS)).roll(1)
    mistaken = method.loss(method.embed(points[order]), LABELS).total
    assert abs(float(mistaken - hard)) > 1e-3, "this test would not see a wrong order"


@pytest.mark.parametrize("name", methods.names())
def test_trades_is_the_clean_loss_plus_beta_times_the_divergence(name: str) -> None:
    method = build(name)
    images, points = images_of(LABELS), images_of(LABELS, seed=9)
    results = {}
    for beta in (0.0, 2.0):
        method.zero_grad()
        output = harden(method, kind="trades", beta=beta)(images, points, LABELS)
        output.loss.total.backward()
        grads = [p.grad.clone() for p in method.parameters() if p.grad is not None]
        results[beta] = output.loss.total.item(), grads
    method.zero_grad()
    clean = method(images, LABELS).loss.total
    clean.backward()
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    assert results[0.0][0] == clean.item()
    assert all(torch.equal(a, b) for a, b in zip(results[0.0][1], grads, strict=True))
    divergence = method.divergence(method.embed(images), method.embed(points)).mean().item()
    assert divergence > 0
    assert results[2.0][0] == pytest.approx(clean.item() + 2 * divergence)
    assert any(not torch.equal(a, b) for a, b in zip(results[2.0][1], grads, strict=True))


def test_divergences_by_hand() -> None:
    """Center: sum p log(p/q) of the softmax; the others: 1 - cosine, over the batch's variance."""
    images, points = images_of(LABELS), images_of(LABELS, seed=9)
    for name in methods.names():
        method = build(name)
        clean, hard = method.embed(images), method.embed(points)
        found = method.divergence(clean, hard)
        if name == "center":
            p, q = (method.logits(e).softmax(1) for e in (clean, hard))  # type: ignore[operator]
            torch.testing.assert_close(found, (p * (p / q).log()).sum(1))
        else:
            spread = method.loss(clean, LABELS).curves["spread"]
            torch.testing.assert_close(found, (1 - (clean * hard).sum(1)) / spread**2)


def test_a_triplets_images_move_only_up_to_the_destination() -> None:
    """HM: at its destination the objective is flat, and with LGA the destination is minus the last
    loss, within the margin.
    """
    method = build("triplet", miner="all")
    emb = method.embed(images_of(LABELS)).detach()
    dist = distances(emb)
    hardness = (dist[:, :, None] - dist[:, None, :]).detach()
    same = (LABELS[:, None] == LABELS) & ~torch.eye(8, dtype=torch.bool)
    valid = same[:, :, None] & (LABELS[:, None] != LABELS)[:, None, :]
    for last, destination in ((math.inf, -0.2), (0.07, -0.07), (0.0, 0.0)):
        expected = (destination - hardness).clamp(min=0)[valid].square().mean()
        found = method.attack_loss(emb, LABELS, torch.tensor(last))
        assert float(found) == pytest.approx(-float(expected)) and float(expected) > 0
    collapsed = emb[:1].repeat(8, 1).requires_grad_()  # hardness 0: as hard as it may get
    method.attack_loss(collapsed, LABELS, torch.tensor(0.0)).backward()
    assert collapsed.grad is not None and torch.all(collapsed.grad == 0)


@pytest.mark.parametrize("head", ["contrastive", "bce"])
def test_a_siamese_anchors_pairs_move_only_until_they_meet(head: str) -> None:
    """As triplets do, with each anchor's mean distances; the end is the loss of one point."""
    method = build("siamese", head=head, negatives="all")
    emb = method.embed(images_of(LABELS)).detach()
    dist = distances(emb) if head == "contrastive" else -method.logits(emb).detach()  # type: ignore[operator]
    band = 0.8 if head == "contrastive" else 2 * math.log(2)
    rows = range(len(LABELS))
    for last, destination in ((math.inf, -band), (0.07, -0.07), (0.0, 0.0)):
        lacks = []
        for i in rows:
            same = [float(dist[i, j]) for j in rows if LABELS[i] == LABELS[j] and i != j]
            other = [float(dist[i, j]) for j in rows if LABELS[i] != LABELS[j]]
            hardness = sum(same) / len(same) - sum(other) / len(other)
            lacks.append(max(0.0, destination - hardness) ** 2)
        found = float(method.attack_loss(emb, LABELS, torch.tensor(last)))
        assert found == pytest.approx(-sum(lacks) / len(lacks), abs=1e-9)
    assert sum(lacks) > 0
    collapsed = emb[:1].repeat(8, 1).requires_grad_()
    method.attack_loss(collapsed, LABELS, torch.tensor(0.0)).backward()
    assert collapsed.grad is not None and torch.all(collapsed.grad == 0)


def test_the_attack_knows_the_last_loss_only_under_lga() -> None:
    method, images = build("triplet", miner="all"), images_of(LABELS)
    emb = method.embed(images)
    for destination, last in (("zero", 0.0), ("lga", 0.05)):
        hardening = harden(method, destination=destination)
        hardening.last_loss = torch.tensor(0.05)
        value = hardening._objective(images, LABELS)(images)
        torch.testing.assert_close(value, method.attack_loss(emb, LABELS, torch.tensor(last)))
    assert float(value) != float(method.attack_loss(emb, LABELS, torch.tensor(0.0)))


def test_a_destination_is_refused_where_the_attack_has_none() -> None:
    with pytest.raises(UserError, match=r"^harden\.destination lga has no use with method center"):
        harden(build("center"), destination="lga")


def test_the_last_loss_is_a_mean_over_all_tuples_of_moved_images() -> None:
    method = build("triplet", miner="all")
    hardening = harden(method)
    assert hardening.last_loss == math.inf
    points = images_of(LABELS, seed=9)
    hardening(images_of(LABELS), points, LABELS)
    dist = distances(method.embed(points))
    same = (LABELS[:, None] == LABELS) & ~torch.eye(8, dtype=torch.bool)
    valid = same[:, :, None] & (LABELS[:, None] != LABELS)[:, None, :]
    losses = (dist[:, :, None] - dist[:, None, :] + 0.2).relu()[valid]
    assert hardening.last_loss.item() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("triplet", {"miner": "all", "soft": True}),
        ("siamese", {"negatives": "all"}),
        ("siamese", {"negatives": "all", "head": "bce"}),
    ],
)
def test_the_last_loss_of_each_loss_counts_all_its_tuples(
    method: str, options: dict[str, Any]
) -> None:
    made = build(method, **options)
    hardening = harden(made)
    points = images_of(LABELS, seed=9)
    hardening(images_of(LABELS), points, LABELS)
    emb = made.embed(points)
    dist = distances(emb)
    same = (LABELS[:, None] == LABELS) & ~torch.eye(8, dtype=torch.bool)
    other = LABELS[:, None] != LABELS
    if method == "triplet":
        terms = torch.nn.functional.softplus(dist[:, :, None] - dist[:, None, :])
        expected = terms[same[:, :, None] & other[:, None, :]].mean()
    else:
        config: Any = made.config
        if config.head == "bce":
            logit = made.logits(emb)  # type: ignore[operator]
            near, far = (torch.nn.functional.softplus(sign * logit) for sign in (-1, 1))
        else:
            near = (dist - config.positive_margin).relu() ** config.power
            far = (config.negative_margin - dist).relu() ** config.power
        assert config.head == "bce" or (far[other] == 0).any()  # some pairs cause no loss
        expected = near[same].mean() + far[other].mean()
    assert hardening.last_loss.item() == pytest.approx(expected.item())


def test_nfgsm_by_hand() -> None:
    """Noise of 2 epsilon, one step of epsilon, cut to [0,1] only; a start is drawn by position."""
    images = images_of(LABELS)
    weight = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).double()

    def objective(points: Tensor) -> Tensor:
        return (points * weight).flatten(1).sum(1)

    found = nfgsm(objective, images, 8.0, seed=(1, 2), positions=range(8))
    start = (found - 8 / 255 * weight.sign())[(found > 0) & (found < 1)]
    offset = (start - images[(found > 0) & (found < 1)]) * 255
    assert 15.5 < offset.abs().max() <= 16 + 1e-9 and abs(float(offset.mean())) < 2
    half = nfgsm(objective, images[4:], 8.0, seed=(1, 2), positions=range(4, 8))
    assert torch.equal(half, found[4:])
    assert not torch.equal(nfgsm(objective, images, 8.0, seed=(1, 3), positions=range(8)), found)


def test_free_moves_the_pixels_by_the_trainings_own_gradient() -> None:
    method = build("siamese")
    images, radius = images_of(LABELS), 8 / 255
    seen: list[Tensor] = []
    last = torch.zeros_like(images)
    hardening = harden(method, kind="free", replays=3)
    for points in hardening.rounds(images, LABELS, 0):
        assert points is not None
        hardening(images, points, LABELS).loss.total.backward()
        assert points.grad is not None
        if seen:
            delta = (seen[-1] - images).clamp(-radius, radius)
            assert torch.all((points - images).abs() <= radius + 1e-12)
            inside = (seen[-1] > 0) & (seen[-1] < 1) & (points > 0) & (points < 1)
            expected = (images + (delta + radius * last.sign()).clamp(-radius, radius))[inside]
            torch.testing.assert_close(points[inside], expected)
        seen.append(points.detach())
        last = points.grad.clone()
    assert len(seen) == 3


def test_ranks_move_their_slices_as_one_worker_would() -> None:
    """TRADES' objective is each image's own, so the slices can be compared without a group."""
    method = build("center")
    images = images_of(LABELS)
    whole = moved(harden(method, kind="trades"), images, LABELS)
    halves = [
        moved(harden(method, rank=r, kind="trades"), images[4 * r : 4 * r + 4], LABELS[4 * r :][:4])
        for r in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(halves), whole)


def test_epsilon_rises_and_nothing_is_attacked_at_zero() -> None:
    hardening = harden(build("center"), ramp=0.5, epsilon=4.0)
    assert [hardening.epsilon(s) for s in (0, 25, 50, 99)] == [0.0, 2.0, 4.0, 4.0]
    calls = count_calls(hardening.method.embedder)
    assert list(hardening.rounds(images_of(LABELS), LABELS, 0)) == [None]
    assert calls == []
    small_change = moved(hardening, images_of(LABELS), LABELS, step=25) - images_of(LABELS)
    assert float(small_change.abs().max()) == pytest.approx(2 / 255)
    assert harden(build("center"), epsilon=4.0).epsilon(0) == 4.0


def count_calls(module: nn.Module) -> list[int]:
    """Batch sizes of the module's forward passes from now on."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"kind": "pgd", "steps": 2}, 3),  # (2 K + 3) / 3 clean steps
        ({"kind": "pgd", "steps": 2, "mix": 0.5}, 4),
        ({"kind": "trades", "steps": 2}, 5),
        ({"kind": "nfgsm"}, 2),
    ],
)
def test_no_forward_pass_is_made_that_is_not_needed(fields: dict[str, Any], passes: int) -> None:
    method = build("triplet")
    calls = count_calls(method.embedder)
    hardening = harden(method, **fields)
    for points in hardening.rounds(images_of(LABELS), LABELS, 0):
        hardening(images_of(LABELS), points, LABELS)
    assert calls == [8] * passes


def test_awp_steps_by_the_gradient_at_the_perturbed_weights_alone() -> None:
    """And restores the weights to the bit; a sum of both gradients is not AWP."""
    method = build("center")
    images = images_of(LABELS)

    def gradients() -> list[Tensor]:
        method.zero_grad()
        method(images, LABELS).loss.total.backward()
        return [p.grad.clone() for p in method.parameters() if p.grad is not None]

    before = [p.detach().clone() for p in method.parameters()]
    plain = gradients()
    with perturbed_weights(method, 0.05):
        inside = [p.detach().clone() for p in method.parameters()]
        stepped = gradients()
    after = [p.detach() for p in method.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for old, new, grad in zip(before, inside, plain, strict=True):
        if old.ndim == 1:
            assert torch.equal(old, new)
        else:
            torch.testing.assert_close(new - old, 0.05 * old.norm() * grad / grad.norm())
    with torch.no_grad():
        for p, value in zip(method.parameters(), inside, strict=True):
            p.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(stepped, gradients(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(stepped, plain, strict=True))

    with pytest.raises(RuntimeError), perturbed_weights(method, 0.05):
        raise RuntimeError
    assert all(torch.equal(p, value) for p, value in zip(method.parameters(), inside, strict=True))
