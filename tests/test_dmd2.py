"""DMD2: its equations by independent computations, its two time scales, and its fake score."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import tiny
from distill.core.process import RectifiedFlow, VariancePreserving
from distill.core.score_distillation import distribution_matching
from distill.core.times import Uniform
from distill.core.types import Players
from distill.data import source
from distill.discriminators.fake_score import Classifiers, FakeScore
from distill.methods.dmd2 import DMD2
from distill.methods.ladd import LADD
from distill.students.lora import layers, lora

toy = tiny.Toy()
PROCESSES = {
    "flow": RectifiedFlow(),
    "vp": VariancePreserving(torch.linspace(0.9999, 0.9, 1000, dtype=torch.float64).cumprod(0)),
}


class Gaussian(nn.Module):
    """Each value of x0 is N(mean, spread^2), whose posterior mean is known."""

    prediction, space, channels = "flow", "a fake score", {"x": 2}

    def __init__(self, mean: float, spread: float = 0.5, process=None):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.spread, self.process = spread, process or RectifiedFlow()

    def x0(self, x_t, t, cond):
        a, s = (level(t).view(-1, 1, 1, 1) for level in (self.process.alpha, self.process.sigma))
        gain = a * self.spread**2 / ((a * self.spread) ** 2 + s**2)
        return self.mean + gain.to(x_t) * (x_t - a.to(x_t) * self.mean)

    def forward(self, x, t, cond, generator=None):
        return [x + 0 * self.mean]


class Generator(Gaussian):
    """One step from noise: G(z) is N(mean, spread^2)."""

    def x0(self, x_t, t, cond):
        return self.mean + self.spread * x_t


class World(tiny.Toy):
    """The toy's interface around a Gaussian teacher."""

    def __init__(self, mean: float):
        super().__init__()
        self.of = Gaussian(mean).requires_grad_(False)

    def x0(self, x_t, t, cond):
        return self.of.x0(x_t, t, cond)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_matching_gradient_is_the_difference_of_two_scores(name):
    """Tweedie: x0 = (x_t + sigma^2 score) / alpha. The scores are gradients of log densities."""
    process = PROCESSES[name]
    g = torch.Generator().manual_seed(0)
    x = 0.3 + 0.5 * torch.randn((4, 2, 3, 3), generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    x_t = process.diffuse(x, torch.randn(x.shape, generator=g, dtype=torch.float64), t)
    a, s = (level(t).view(-1, 1, 1, 1) for level in (process.alpha, process.sigma))

    def score(mean, spread):
        at = x_t.clone().requires_grad_()
        density = Normal(a * mean, ((a * spread) ** 2 + s**2).sqrt())
        return torch.autograd.grad(density.log_prob(at).sum(), at)[0]

    real, fake = Gaussian(1.0, 0.8, process), Gaussian(0.3, 0.5, process)
    x_real, x_fake = (each.x0(x_t, t, None).detach() for each in (real, fake))
    at = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(distribution_matching(at, x_real, x_fake), at)
    scale = (x - x_real).abs().mean((1, 2, 3), keepdim=True)
    expected = s**2 / a * (score(0.3, 0.5) - score(1.0, 0.8)) / scale / x.numel()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_the_matching_loss_is_finite_where_the_teacher_returns_its_input():
    x = torch.zeros(2, 1, 2, 2, requires_grad=True)
    loss = distribution_matching(x, torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not x.grad.any()


def gaussian_method(folder, steps, *, student=0.0, data=1.0, updates=5, **options):
    """A one-step student of the mean 0, trained towards a Gaussian of the mean 1 without heads."""
    fake_score = Gaussian(data)  # it starts as the teacher
    loop = tiny.loop(rate=0.02, critic_rate=0.05, discriminator_updates=updates, ema_decay=0.0)
    players = Players(
        teacher=World(data),
        student=Generator(student),
        features=fake_score,
        heads=Classifiers({"x": 2}, width=8, layers=0),
    )
    own = {"adversarial_weight": 0.0, "discriminator_weight": 0.0, "guidance": 1.0} | options
    times = Uniform(0.02, 0.98)
    times = {"matching": times, "denoising": times, "renoise": times}
    method = DMD2(players, levels=[1.0], loop=loop, **times, **own)
    tiny.trainer(folder, steps).fit(method, tiny.Stream(toy, 64).loader())
    return method


def test_the_student_goes_to_the_data_and_the_fake_score_to_the_student(tmp_path):
    method = gaussian_method(tmp_path, 150)
    student, fake_score = (
        float(each.mean.detach()) for each in (method.student, method.fake_score)
    )
    assert student == pytest.approx(1.0, abs=0.1)
    assert fake_score == pytest.approx(student, abs=0.1)


def test_with_the_sign_flipped_it_goes_away(tmp_path):
    method = gaussian_method(tmp_path, 30, matching_weight=-1.0)
    assert float(method.student.mean.detach()) < -0.3


def test_two_time_scales_update_fake_score_and_heads_together(tmp_path, teachers, shards):
    method = tiny.dmd2(teachers("unet"), discriminator_updates=5)
    update, seen, samples = method.loop.clip_and_step, [], []
    make = method._sample

    def spy(owner, player, module, optimizer, limit):
        seen.append((player, module))
        return update(owner, player, module, optimizer, limit)

    def sample(draws, cond):
        samples.append(make(draws, cond))
        return samples[-1]

    method.loop.clip_and_step, method._sample = spy, sample
    loader = source.latents(str(shards), batch_size=2).loader(seed=0)
    tiny.trainer(tmp_path, 1).fit(method, loader)
    assert [player for player, _ in seen] == ["d", "f"] * 5 + ["g"]
    assert [module for _, module in seen[:2]] == [method.heads, method.fake_score]
    first = [x.detach().flatten()[0].item() for x in samples]
    assert len(set(first)) == 6  # the student's own, and another one for each update


def test_every_player_has_a_rate_and_a_norm_of_its_own(tmp_path, teachers, shards):
    method = tiny.dmd2(teachers("mmdit"), rate=1e-3, critic_rate=2e-3)
    factories = method.loop.factories
    object.__setattr__(factories, "fake_score", tiny.adam(3e-3))
    loader = source.latents(str(shards), batch_size=2).loader(seed=0)
    tiny.trainer(tmp_path, 2).fit(method, loader)
    logged = method.loop.last_logged
    assert [logged[f"{player}/lr"] for player in "gdf"] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert len({logged[f"{player}/grad_norm"] for player in "gdf"}) == 3
    assert {"d/denoising", "d/adv", "d/accuracy", "g/matching", "g/adv"} <= set(logged)


def test_the_heads_loss_trains_the_fake_score_and_the_students_loss_does_not(teachers):
    method = tiny.dmd2(teachers("unet"))
    batch = tiny.simple_batch(method)
    draws, sample = tiny.drawn(method, batch)
    method.discriminator_loss(batch, draws, sample).terms["adv"].backward()
    encoder = method.fake_score.network.model.conv_in.weight
    assert encoder.grad.any()
    assert all(p.grad is None for p in method.student.parameters())
    method.zero_grad(set_to_none=True)
    for opponent in method.opponents.values():
        opponent.requires_grad_(False)
    sum(method.student_loss(batch, draws, sample).terms.values()).backward()
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())
    assert encoder.grad is None


@pytest.mark.parametrize("family", ["mmdit", "unet"])
def test_the_denoising_loss_is_that_of_the_teachers_training(family, teachers):
    """eps or flow: from the network's own prediction, and not from the estimate of x0."""
    teacher = teachers(family)
    method = tiny.dmd2(teacher, options={"levels": [1.0]})
    batch = tiny.simple_batch(method)
    draws, sample = tiny.drawn(method, batch)
    drawn, network = draws.opponents[0], method.fake_score.network
    t, noise = drawn.score.t, drawn.score.noise
    with torch.no_grad():
        x = method.student.x0(drawn.z, torch.ones_like(t), batch.cond)
        x_t = teacher.process.diffuse(x, noise, t)
        own = network.predict(x_t, t, batch.cond)
    target = noise if family == "unet" else noise - x
    expected = (own - target).square().mean()
    found = method.discriminator_loss(batch, draws, sample).terms["denoising"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_four_steps_are_trained_on_what_the_student_makes_itself(teachers):
    """Backward simulation: the input of step 3 comes from its own steps at 1 and at .75."""
    levels = [1.0, 0.75, 0.5, 0.25]
    method = tiny.dmd2(teachers("mmdit"), options={"levels": levels})
    batch = tiny.simple_batch(method)
    lengths = set()
    for iteration in range(40):
        method.loop.iteration = iteration
        draws, sample = tiny.drawn(method, batch)
        lengths.add(len(draws.levels))
        if len(draws.levels) == 3:
            x_t = draws.z
            for level, following, noise in zip(
                levels[:2], levels[1:3], draws.step_noises, strict=True
            ):
                with torch.no_grad():
                    x0 = method.student.x0(x_t, torch.full((len(batch),), level), batch.cond)
                x_t = (1 - following) * x0 + following * noise
            expected = method.student.x0(x_t, torch.full((len(batch),), 0.5), batch.cond)
            torch.testing.assert_close(sample.x0_hat, expected, rtol=1e-5, atol=1e-5)
            assert sample.x0_hat.requires_grad
    assert lengths == {1, 2, 3, 4}


def test_the_regression_is_on_pairs(teachers):
    method = tiny.dmd2(teachers("mmdit"), options={"regression_weight": 2.0})
    batch = tiny.simple_batch(method)
    draws, sample = tiny.drawn(method, batch)
    with pytest.raises(ValueError, match="method.regression_weight needs the noise"):
        method.student_loss(batch, draws, sample)
    paired = copy.copy(batch)
    object.__setattr__(paired, "noise", torch.randn(batch.x0.shape))
    found = method.student_loss(paired, draws, sample).terms["regression"]
    with torch.no_grad():
        x = method.student.x0(paired.noise, torch.ones(len(batch)), batch.cond)
    torch.testing.assert_close(found, 2 * (x - batch.x0).square().mean(), rtol=1e-4, atol=1e-5)


# -- the fake score --------------------------------------------------------------------------------


def test_the_fake_score_starts_as_the_teacher_without_a_students_adapters(teachers):
    teacher = copy.deepcopy(teachers("unet"))
    student = lora(teacher, rank=2)
    tiny.shake(student.adapters, 3, std=0.5)
    fake_score = FakeScore(teacher)
    assert layers(teacher.network.model)
    assert not layers(fake_score.network.model)
    assert all(p.requires_grad for p in fake_score.parameters())
    plain = teachers("unet").network.model.state_dict()
    assert tiny.same(fake_score.network.model.state_dict(), plain)
    x, t, cond = (
        torch.randn(2, *teacher.latent_shape),
        torch.tensor([0.3, 0.9]),
        teacher.embed(["a"] * 2),
    )
    torch.testing.assert_close(fake_score.x0(x, t, cond), teacher.x0(x, t, cond))


@pytest.mark.parametrize(("family", "middle"), [("unet", "mid"), ("mmdit", "block2")])
def test_the_middle_is_tapped(family, middle, teachers):
    teacher = teachers(family)
    fake_score = FakeScore(teacher)
    assert list(fake_score.channels) == [middle]
    with pytest.raises(ValueError, match="discriminator.features.taps=top: must be middle, or"):
        FakeScore(teacher, taps="top")


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 32])
def test_a_head_gives_one_logit_for_maps_of_any_size(side):
    heads = Classifiers({"mid": 32}, layers=3)
    x = torch.randn(3, 32, side, side)
    logits = heads([x], torch.ones(3), None)
    assert logits.values.shape == (3, 1)
    alone = torch.cat([heads([x[i : i + 1]], torch.ones(1), None).values for i in range(3)])
    torch.testing.assert_close(logits.values, alone, rtol=1e-4, atol=1e-5)


def test_a_discriminator_of_another_kind_is_refused(teachers):
    given = tiny.parts(teachers("mmdit"))
    times = dict.fromkeys(("matching", "denoising", "renoise"), Uniform())
    with pytest.raises(
        ValueError, match="needs a discriminator of a fake score, and this one works"
    ):
        tiny.assembled(DMD2, given, levels=[1.0], **times)
    given = tiny.parts(teachers("mmdit")) | {"features": FakeScore(teachers("mmdit"))}
    with pytest.raises(ValueError, match="of latents, and this one works on a fake score"):
        tiny.assembled(LADD, given, levels=Uniform(), renoise=Uniform())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=dmd2", "discriminator=pool"], "method needs a discriminator of a fake score"),
        (["method=ladd", "discriminator=fake_score"], "this one works on a fake score"),
        (["method=dmd2", "~optimizer.fake_score"], "optimizer.fake_score: a run cannot be without"),
        (["+optimizer.fake_score.lr=1"], "optimizer.fake_score: nothing reads this key"),
        (["method=dmd2", "optimizer.fake_score.lr=-1"], "optimizer.fake_score.lr=-1: must be 0 or"),
        (["method=dmd2", "method.levels=[1.0,2.0]"], "method.levels=[1.0, 2.0]: must fall from 1"),
        (["method=dmd2", "method.levels=[0.5]"], "method.levels=[0.5]: must fall from 1"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(words, said, command):
    code, _, err = command("run", *words)
    assert code == 1
    assert said in err
