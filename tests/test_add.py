"""ADD: score distillation against closed forms, StyleGAN-T's heads against an independent
computation.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.core.losses import r1, weighted_mse
from distill.core.process import RectifiedFlow, VariancePreserving
from distill.core.score_distillation import ScoreDistillation
from distill.core.types import Cond
from distill.discriminators.stylegan_t import (
    EqualisedLinear,
    LocalBatchNorm,
    StyleGANTHeads,
    TokenHead,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


class Linear(nn.Module):
    """A teacher whose prediction of eps is W x_t + b(caption), in float64."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 3
        self.shift = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        self.seen = []

    def eps(self, x_t, t, cond):
        flat = x_t.flatten(1) @ self.weight.T + self.shift[cond.tokens[:, 0, 0].long()]
        return flat.view_as(x_t)

    def x0(self, x_t, t, cond):
        self.seen.append(x_t)
        return self.process.to_x0(self.eps(x_t, t, cond), x_t, t, "eps")


def told(kind: int, n: int) -> Cond:
    null = Cond(torch.zeros(1, 1, 1, dtype=torch.float64))
    return Cond(torch.full((n, 1, 1), float(kind), dtype=torch.float64), null=null)


def processes():
    return [VariancePreserving(torch.cumprod(1 - BETAS, 0)), RectifiedFlow()]


def drawn(distill, x, seed):
    """The t, scale and eps of a call, drawn again in the documented order."""
    generator = torch.Generator().manual_seed(seed)
    t, u = torch.rand(2, len(x), generator=generator)
    t = distill.low + (distill.high - distill.low) * t
    return t, u, torch.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("process", processes(), ids=["vp", "flow"])
def test_sds_is_the_gradient_of_score_distillation(process):
    """d L / d x_hat = w(t) (eps_psi - eps), w = sigma^2, per number of the sample: the mean's
    1 / numel aside.
    """
    teacher, distill = Linear(process), ScoreDistillation(kind="sds", guidance=3.0)
    x = torch.randn(5, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    cond = told(1, 5)
    target, weight = distill(teacher, x, cond, distill.draw(x, torch.Generator().manual_seed(4)))
    (gradient,) = torch.autograd.grad(weighted_mse(x, target, weight), x)
    t, _, eps = drawn(distill, x, 4)
    x_t = process.diffuse(x.detach(), eps, t)
    empty = teacher.eps(x_t, t, told(0, 5))
    guess = empty + 3.0 * (teacher.eps(x_t, t, cond) - empty)
    expected = (process.sigma(t.double()) ** 2).view(-1, 1, 1, 1) * (guess - eps) / (5 * 6)
    torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("process", processes(), ids=["vp", "flow"])
def test_exponential_and_nfsd_by_their_formulas(process):
    teacher, x = Linear(process), torch.randn(6, 1, 2, 3, dtype=torch.float64)
    distill = ScoreDistillation(kind="exponential", guidance=[2.0, 5.0])
    draws = distill.draw(x, torch.Generator().manual_seed(8))
    target, weight = distill(teacher, x, told(1, 6), draws)
    t, u, eps = drawn(distill, x, 8)
    alpha, sigma = (f(t.double()).view(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
    x_t = alpha * x + sigma * eps
    empty, text, negative = (teacher.eps(x_t, t, told(k, 6)) for k in range(3))
    scale = (2 + 3 * u.double()).view(-1, 1, 1, 1)
    guess = empty + scale * (text - empty)
    torch.testing.assert_close(target, (x_t - sigma * guess) / alpha, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.double(), alpha.flatten(), rtol=1e-6, atol=0)

    distill = ScoreDistillation(kind="nfsd", guidance=7.5)
    draws = distill.draw(x, torch.Generator().manual_seed(8))
    target, weight = distill(teacher, x, told(1, 6), draws, told(2, 6))
    domain = empty - torch.where(t.view(-1, 1, 1, 1) < 0.2, torch.zeros(()), 1.0) * negative
    expected = x - sigma / alpha * (domain + 7.5 * (text - empty))
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.double(), alpha.flatten(), rtol=1e-6, atol=0)

    target, _ = distill(teacher, x, told(1, 6), draws)  # no caption of bad pictures
    domain = torch.where(t.view(-1, 1, 1, 1) < 0.2, empty, 0.0)
    torch.testing.assert_close(
        target, x - sigma / alpha * (domain + 7.5 * (text - empty)), rtol=1e-4, atol=1e-5
    )


def test_more_teacher_steps_are_ddim():
    process = RectifiedFlow()
    teacher, x = Linear(process), torch.randn(3, 1, 2, 3, dtype=torch.float64)
    distill = ScoreDistillation(steps=4, low=0.4, high=0.9)
    draws = distill.draw(x, torch.Generator().manual_seed(2))
    target, _ = distill(teacher, x, told(1, 3), draws)
    t, _, eps = drawn(distill, x, 2)
    t = t.double().view(-1, 1, 1, 1)
    x_t = (1 - t) * x + t * eps
    for left in (3, 2, 1):  # Euler on dx/dt = (x - x0) / t, which is DDIM on this path
        x0 = (x_t - t * teacher.eps(x_t, None, told(1, 3))) / (1 - t)
        earlier = t * left / (left + 1)
        x_t, t = x_t + (earlier - t) * (x_t - x0) / t, earlier
    torch.testing.assert_close(
        target, (x_t - t * teacher.eps(x_t, None, told(1, 3))) / (1 - t), rtol=1e-4, atol=1e-6
    )


def test_the_teacher_s_input_has_no_gradient():
    teacher = Linear(RectifiedFlow())
    x = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    distill = ScoreDistillation(steps=2)
    target, weight = distill(teacher, x, told(1, 2), distill.draw(x, torch.Generator()))
    assert len(teacher.seen) == 2
    assert not any(seen.requires_grad for seen in teacher.seen)
    assert not target.requires_grad
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "sd"}, "exponential, sds, nfsd"),
        ({"steps": 0}, "at least 1"),
        ({"low": 0.0}, "both above 0 and below 1"),
    ],
)
def test_distillation_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        ScoreDistillation(**wrong)


# -- heads -----------------------------------------------------------------------------------------


def test_local_batch_norm_by_hand():
    x = torch.randn(16, 3, 5, dtype=torch.float64)
    norm = LocalBatchNorm(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = torch.empty_like(x)
    for group in (range(8), range(8, 16)):
        for c in range(3):
            values = torch.cat([x[i, c] for i in group])
            spread = ((values - values.mean()) ** 2).mean()
            for i in group:
                expected[i, c] = (x[i, c] - values.mean()) / (spread + 1e-5).sqrt() * norm.weight[
                    c
                ] + norm.bias[c]
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.eval()(x), expected)
    assert not list(norm.buffers())
    with pytest.raises(ValueError, match="needs a multiple of 2"):
        norm(x[:9])


def test_projection_by_hand():
    head = TokenHead(4, 6).eval()  # in training every call moves the spectral norm on
    x, c = torch.randn(8, 4, 7), torch.randn(8, 6)
    logits = head(x, c)
    h = head.enter(x)
    out = head.out((head.mix(h) + h) / math.sqrt(2))
    told = c @ head.condition.weight.T / math.sqrt(6) + head.condition.bias
    expected = torch.stack([(out[:, :, n] * told).sum(1) / 8 for n in range(7)], dim=1)
    torch.testing.assert_close(logits, expected)


def test_every_convolution_has_spectral_norm_one_and_wraps_around():
    torch.manual_seed(0)
    head = TokenHead(8, 0)
    for _ in range(200):
        head(torch.randn(8, 8, 12), torch.zeros(8, 0))  # power iterations
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv1d)]
    assert [m.kernel_size for m in convolutions] == [(1,), (9,), (1,)]
    for m in convolutions:
        assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)
    head.eval()
    x = torch.randn(8, 8, 12)
    torch.testing.assert_close(
        head(x, x[:, :0, 0]).roll(3, 1), head(x.roll(3, 2), x[:, :0, 0]), rtol=1e-4, atol=1e-5
    )


def test_equalised_rate():
    torch.manual_seed(0)
    layer = EqualisedLinear(400, 64)
    assert layer.weight.std().item() == pytest.approx(1, abs=0.02)
    assert layer(torch.randn(100, 400)).std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("pooled", "image"), [(0, 0), (5, 0), (0, 4), (5, 4)])
def test_r1_reaches_the_heads_alone_and_is_the_finite_difference(pooled, image):
    """Per sample |d sum(logits) / d map|^2, the local batch's cross terms included."""
    torch.manual_seed(1)
    heads = StyleGANTHeads({"a": 3, "b": 4}, pooled=pooled, image=image).double().eval()
    maps = [torch.randn(4, c, 6, dtype=torch.float64).requires_grad_() for c in (3, 4)]
    cond = Cond(
        torch.zeros(4, 1, 1), pooled=torch.randn(4, 5).double(), extra=torch.randn(4, 4).double()
    )
    t = torch.ones(4)
    penalty = r1(heads(maps, t, cond), maps)
    penalty.backward()
    with_gradient = {
        name
        for name, p in heads.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert any("mix" in name for name in with_gradient)
    step, expected = 1e-5, 0.0
    for k, m in enumerate(maps):
        for place in range(m.numel()):
            both = []
            for sign in (1, -1):
                moved = [x.detach().clone() for x in maps]
                moved[k].view(-1)[place] += sign * step
                both.append(heads(moved, t, cond).values.sum().detach())
            expected += ((both[0] - both[1]) / (2 * step)) ** 2 / 4
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-3)
