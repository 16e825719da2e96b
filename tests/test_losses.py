"""Adversarial losses by hand, R1 against finite differences, and who receives which gradient."""

import math

import pytest
import torch
from torch import nn

from distill.core.losses import adversarial, critic_stats, pseudo_huber, r1, weighted_mse
from distill.core.types import Logits

REAL = torch.tensor([[0.5, 2.0], [-1.0, 0.0]])
FAKE = torch.tensor([[-2.0, 0.0], [0.5, -1.0]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def mean_softplus(*values: float) -> float:
    return sum(map(softplus, values)) / len(values)


class Critic(nn.Module):
    """Two maps [B, 3, 2, 2] and [B, 5] -> logits [B, 2], smooth and not linear."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Parameter(torch.randn(12, 4, generator=generator, dtype=torch.float64))
        self.line = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64))

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        hidden = torch.tanh(maps[0].flatten(1) @ self.conv * 0.3 + maps[1] @ self.line * 0.3)
        return hidden @ self.out


def draw_maps(batch: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, 3, 2, 2, generator=generator, dtype=torch.float64),
        torch.randn(batch, 5, generator=generator, dtype=torch.float64),
    ]


EXPECTED = {
    "hinge": ((0.5 + 0 + 2 + 1) / 4 + (0 + 1 + 1.5 + 0) / 4, 2.5 / 4),
    "non_saturating": (
        mean_softplus(-0.5, -2.0, 1.0, 0.0) + mean_softplus(-2.0, 0.0, 0.5, -1.0),
        mean_softplus(2.0, 0.0, -0.5, 1.0),
    ),
    "relativistic": (mean_softplus(-2.5, -2.0, 1.5, -1.0), mean_softplus(2.5, 2.0, -1.5, 1.0)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_by_hand(name):
    game = adversarial(name)
    assert game.name == name
    assert game.paired == (name == "relativistic")
    discriminator, student = EXPECTED[name]
    assert game.discriminator(REAL, FAKE).item() == pytest.approx(discriminator, abs=1e-6)
    assert game.student(FAKE, REAL).item() == pytest.approx(student, abs=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_head_counts_no_more_for_its_many_logits(name):
    """One logit of one head beside sixteen of another: as two losses of one head each, halved."""
    game, generator = adversarial(name), torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 3, 17, generator=generator)

    def split(x):
        return x.split([1, 16], dim=1)

    def parted(x):
        return Logits(x, (1, 16))

    alone = [game.discriminator(a, b).item() for a, b in zip(split(real), split(fake), strict=True)]
    assert game.discriminator(parted(real), parted(fake)).item() == pytest.approx(
        sum(alone) / 2, rel=1e-6
    )
    alone = [game.student(b, a).item() for a, b in zip(split(real), split(fake), strict=True)]
    assert game.student(parted(fake), parted(real)).item() == pytest.approx(
        sum(alone) / 2, rel=1e-6
    )
    assert game.student(fake, real).item() != pytest.approx(sum(alone) / 2, rel=1e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sum_over_heads_is_the_mean_times_their_number(name):
    real, fake = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(0))
    mean, total = adversarial(name), adversarial(name, "sum")
    for player, pair in (("discriminator", (real, fake)), ("student", (fake, real))):
        of = [getattr(g, player)(*(Logits(x, (1, 4, 12)) for x in pair)) for g in (mean, total)]
        torch.testing.assert_close(of[1], 3 * of[0])
    with pytest.raises(ValueError, match=r"method\.over_heads=total: must be mean or sum"):
        adversarial(name, "total")


@pytest.mark.parametrize("name", EXPECTED)
def test_players_pull_the_fake_in_opposite_directions(name):
    game = adversarial(name)
    fake = FAKE.clone().mul(0.4).requires_grad_()  # within the margin of the hinge
    (up,) = torch.autograd.grad(game.discriminator(REAL, fake), fake)
    (down,) = torch.autograd.grad(game.student(fake, REAL), fake)
    assert (up > 0).all()
    assert (down < 0).all()


@pytest.mark.parametrize("name", EXPECTED)
def test_half_precision_logits_are_reduced_in_float32(name):
    game = adversarial(name)
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 512, 8, generator=generator).bfloat16()
    for ours, precise in (
        (game.discriminator(real, fake), game.discriminator(real.double(), fake.double())),
        (game.student(fake, real), game.student(fake.double(), real.double())),
    ):
        assert ours.dtype == torch.float32
        assert precise.dtype == torch.float64
        assert ours.item() == pytest.approx(precise.item(), rel=1e-5)


def test_only_the_paired_game_needs_real_logits():
    for name in ("hinge", "non_saturating"):
        game = adversarial(name)
        assert torch.equal(game.student(FAKE), game.student(FAKE, REAL))
    with pytest.raises(ValueError, match="pass real="):
        adversarial("relativistic").student(FAKE)
    with pytest.raises(ValueError, match="compares pairs"):
        adversarial("relativistic").discriminator(REAL, FAKE[:1])


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match="'hinges'; choose one of hinge, non_saturating, relativistic"
    ):
        adversarial("hinges")


def test_r1_of_a_linear_critic_is_its_squared_norm():
    weight = torch.randn(12, dtype=torch.float64)
    x = torch.randn(7, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    logits = (x.flatten(1) @ weight)[:, None]
    assert r1(logits, [x]).item() == pytest.approx(weight.square().sum().item(), rel=1e-12)
    # Logits are summed over K first, so two equal logits count as one twice as steep.
    assert r1(logits.expand(7, 2), [x]).item() == pytest.approx(
        4 * weight.square().sum().item(), rel=1e-12
    )


def test_r1_agrees_with_central_differences():
    critic, maps = Critic(), draw_maps()
    inputs = [m.clone().requires_grad_() for m in maps]
    penalty = r1(critic(inputs), inputs).item()
    step, total = 1e-5, 0.0
    with torch.no_grad():
        for m in maps:
            for entry in range(m[0].numel()):
                shift = torch.zeros_like(m).flatten(1)
                shift[:, entry] = step  # samples do not interact, so all are moved at once
                shift = shift.view_as(m)
                plus = critic([x + shift if x is m else x for x in maps]).sum(1)
                minus = critic([x - shift if x is m else x for x in maps]).sum(1)
                total += ((plus - minus) / (2 * step)).square().mean().item()
    assert penalty == pytest.approx(total, rel=1e-7)
    assert penalty > 1e-3


def test_r1_trains_the_heads_with_the_right_gradient():
    critic, maps = Critic(), draw_maps()

    def penalty() -> torch.Tensor:
        inputs = [m.clone().requires_grad_() for m in maps]
        return r1(critic(inputs), inputs)

    gradients = torch.autograd.grad(penalty(), list(critic.parameters()))
    step = 1e-5
    for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            values.append(penalty().item())
            with torch.no_grad():
                parameter.sub_(direction, alpha=sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_r1_reaches_the_heads_and_not_the_extractor():
    extractor, critic = nn.Linear(6, 17).double(), Critic()
    features = extractor(torch.randn(4, 6, dtype=torch.float64))
    inputs = [
        m.detach().requires_grad_() for m in (features[:, :12].view(4, 3, 2, 2), features[:, 12:])
    ]
    r1(critic(inputs), inputs).backward()
    assert all(p.grad is None for p in extractor.parameters())
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters())


def test_r1_skips_maps_that_the_drawn_heads_do_not_read():
    critic = Critic()
    used, idle = (m.requires_grad_() for m in draw_maps())
    logits = critic([used, torch.zeros_like(idle)])
    assert torch.equal(r1(logits, [used, idle]), r1(logits, [used]))
    with pytest.raises(ValueError, match="needs the maps with"):
        r1(logits, [idle])


def test_r1_needs_inputs_with_gradient():
    maps = draw_maps()
    with pytest.raises(ValueError, match="requires_grad_"):
        r1(Critic()(maps), maps)
    with pytest.raises(ValueError, match="requires_grad_"):
        r1(torch.zeros(1, 1), [])


def test_r1_is_float32_for_half_precision_maps():
    weight = torch.linspace(-1, 1, 8).bfloat16()
    x = torch.zeros(4, 8).bfloat16().requires_grad_()
    penalty = r1((x @ weight)[:, None], [x])
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(weight.float().square().sum().item(), rel=1e-6)


def test_weighted_mse_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    target = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([2.0, 0.5])
    assert weighted_mse(x, target, weight).item() == pytest.approx(
        (2 * (1 + 4) / 2 + 0.5 * 9 / 2) / 2
    )
    assert weighted_mse(x, target).item() == pytest.approx((4 + 1 + 9) / 4)
    assert weighted_mse(x.bfloat16(), target.bfloat16(), weight).dtype == torch.float32
    with pytest.raises(ValueError, match="shapes do not fit"):
        weighted_mse(x, target, weight[:1])
    with pytest.raises(ValueError, match="shapes do not fit"):
        weighted_mse(x, target[:1], weight)


def test_critic_stats_count_pairs_wherever_zero_lies():
    """Of four pairs three are told apart and one is a tie; a constant added to all logits changes
    the means alone.
    """
    real, fake = torch.tensor([[0.5, 2.0], [1.0, -1.0]]), torch.tensor([[-2.0, 0.0], [0.5, -1.0]])
    found = critic_stats(Logits(real, (1, 1)), Logits(fake, (1, 1)))
    assert found["d/accuracy"].item() == pytest.approx(3.5 / 4)
    assert found["d/real"].item() == pytest.approx(2.5 / 4)
    assert found["d/fake"].item() == pytest.approx(-2.5 / 4)
    assert [found[f"d/real_head{k}"].item() for k in (0, 1)] == pytest.approx([0.75, 0.5])
    assert [found[f"d/fake_head{k}"].item() for k in (0, 1)] == pytest.approx([-0.75, -0.5])
    assert critic_stats(real - 9, fake - 9)["d/accuracy"].item() == pytest.approx(3.5 / 4)
    assert critic_stats(fake, real)["d/accuracy"].item() == pytest.approx(0.5 / 4)
    # A mean of many logits would stand still in the halves that they come in.
    many = torch.full((4096, 1), 3.01).bfloat16()
    assert critic_stats(many, -many)["d/real"].item() == pytest.approx(
        many[0].float().item(), rel=1e-6
    )


def test_pseudo_huber_is_a_norm_from_afar_and_squares_from_near():
    x, target = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]]), torch.zeros(2, 1, 2)
    h = 0.5 * math.sqrt(2)
    by_hand = (math.sqrt(9 + h**2) - h + math.sqrt(16 + h**2) - h) / 2
    assert pseudo_huber(x, target, 0.5).item() == pytest.approx(by_hand)
    assert pseudo_huber(1e3 * x, target, 0.5).item() == pytest.approx(3500 - h, rel=1e-4)
    near = (1e-2 * x).square().sum((1, 2)).mean() / (2 * h)
    assert pseudo_huber(1e-2 * x, target, 0.5).item() == pytest.approx(near.item(), rel=1e-3)
