"""Convolutional heads: shapes, conditioning by projection, independence of heads and samples."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import tiny
from distill.config import build
from distill.core import losses
from distill.core.times import Discrete, LogitNormal
from distill.core.types import Cond
from distill.discriminators.heads import ConvHeads
from distill.discriminators.pool import DrawnHeads, Pool
from distill.discriminators.strided import strided
from distill.discriminators.stylegan_t import StyleGANTHeads
from distill.methods.ladd import LADD

CHANNELS = {"block0": 12, "block1": 12, "mid": 20}


def make(**kwargs) -> ConvHeads:
    torch.manual_seed(0)
    return ConvHeads(
        CHANNELS, pooled=6, **kwargs
    ).eval()  # training moves the power iteration on every call


def inputs(n: int = 3) -> tuple[list[torch.Tensor], torch.Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(n, c, 4, 4 if c == 12 else 2, generator=generator) for c in CHANNELS.values()
    ]
    cond = Cond(torch.zeros(n, 2, 5), pooled=torch.randn(n, 6, generator=generator))
    return maps, torch.rand(n, generator=generator), cond


@pytest.mark.parametrize("spectral", [False, True])
def test_every_place_of_every_map_gets_a_logit(spectral: bool) -> None:
    heads = make(spectral=spectral)
    logits = heads(*inputs())
    assert logits.values.shape == (3, 16 + 16 + 8)
    assert [part.shape[1] for part in logits.by_head()] == [16, 16, 8]
    assert heads.draw(torch.Generator()) is heads
    assert heads.refresh(torch.Generator()) == ()


def test_a_head_sees_its_own_map_only() -> None:
    heads = make()
    maps, t, cond = inputs()
    before = heads(maps, t, cond).by_head()
    after = heads([maps[0] + 1e1 * torch.randn_like(maps[0]), *maps[1:]], t, cond).by_head()
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])
    torch.testing.assert_close(before[2], after[2])


def test_samples_do_not_mix() -> None:
    heads = make()
    maps, t, cond = inputs()
    alone = heads([m[1:2] for m in maps], t[1:2], cond.index(slice(1, 2)))
    torch.testing.assert_close(heads(maps, t, cond).values[1:2], alone.values)


@pytest.mark.parametrize("changed", ["time", "text"])
def test_noise_level_and_text_matter(changed: str) -> None:
    heads = make()
    maps, t, cond = inputs()
    other_t = t.flip(0) if changed == "time" else t
    other_cond = cond.index(torch.tensor([1, 2, 0])) if changed == "text" else cond
    assert not torch.allclose(heads(maps, t, cond).values, heads(maps, other_t, other_cond).values)


def test_the_projection_is_an_inner_product_over_root_width() -> None:
    """Independent computation of one head's logit from its hidden map."""
    heads = make(projection=16)
    maps, t, cond = inputs()
    head, hidden = heads.heads["mid"], {}
    handle = head.out.register_forward_hook(lambda _m, _i, out: hidden.update(out=out.detach()))
    logits = heads(maps, t, cond).by_head()[2]
    handle.remove()
    # The time embedding by its definition: sines and cosines at half-octave-spaced rates.
    rates = torch.tensor([2.0 ** (6 * k / 31) * math.pi for k in range(32)])
    waves = torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], 1)
    c = head.condition(torch.cat([heads.embed_time(waves), cond.pooled], 1))
    expected = torch.einsum("bphw,bp->bhw", hidden["out"], c).flatten(1) / 4
    torch.testing.assert_close(logits, expected)


def test_spectral_norm_bounds_every_convolution() -> None:
    heads = make(spectral=True)
    heads.train()
    for _ in range(30):  # power iterations
        heads(*inputs())
    for name, module in heads.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            assert largest < 1.05, name


PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "add_heads.md"


def heads_of_the_page(channels, pooled=0):
    """Those that docs/how_to/add_heads.md shows."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, type] = {}
    exec(code, names)
    return names["MeanHeads"](channels, pooled)


def test_the_heads_of_the_page_learn(tmp_path):
    teacher = tiny.Toy()
    given = tiny.parts(teacher, seed=3)
    given["heads"] = heads = heads_of_the_page(given["features"].channels)
    before = [layer.weight.detach().clone() for layer in heads.layers]
    levels = Discrete([1.0, 0.5], [0.5, 0.5])
    method = tiny.assembled(LADD, given, levels=levels, renoise=LogitNormal())
    tiny.trainer(tmp_path, 2).fit(method, tiny.Stream(teacher, 4).loader())
    assert all((layer.weight != old).any() for layer, old in zip(heads.layers, before, strict=True))
    logged = {name for name in method.loop.last_logged if name.startswith("d/real_head")}
    assert logged == {f"d/real_head{k}" for k in range(len(heads.layers))}


class SplitHeads(ConvHeads):
    """As heads once said which logits are whose."""

    def split(self, logits):
        return logits.split(1, dim=1)


def test_heads_that_still_split_are_refused(monkeypatch):
    monkeypatch.setenv("DISTILL_TRUST", __name__)
    node = OmegaConf.create({"_target_": f"{__name__}.SplitHeads", "_partial_": True})
    said = r"discriminator\.heads\._target_=test_heads\.SplitHeads: its `split` .*types\.Logits"
    with pytest.raises(ValueError, match=said):
        build._heads(node, channels=CHANNELS, pooled=6)


class Counted:
    """Heads, and the batch sizes with which they are called."""

    def __init__(self, heads, per_sample: bool) -> None:
        self.heads, self.per_sample, self.sizes = heads, per_sample, []

    def __call__(self, maps, t, cond):
        self.sizes.append(len(t))
        return self.heads(maps, t, cond)


@pytest.mark.parametrize("case", ["conv", "pool"])
def test_real_and_fake_features_are_read_in_one_call(case: str) -> None:
    real, t, cond = inputs(8)
    fake = [x + torch.randn_like(x) for x in real]
    fake_t = t.flip(0)
    heads = make(spectral=False)
    if case == "pool":
        heads = Pool(CHANNELS, pooled=6, size=48).draw(torch.Generator().manual_seed(0))
    assert heads.per_sample
    found = {}
    for joint in (True, False):
        critic = Counted(heads, joint)
        logits = losses.both_logits(critic, real, fake, cond, t, fake_t=fake_t)
        assert critic.sizes == ([16] if joint else [8, 8])
        assert [part.shape for part in logits.real.by_head()] == [
            part.shape for part in heads(real, t, cond).by_head()
        ]
        found[joint] = logits
    torch.testing.assert_close(found[True].real.values, found[False].real.values)
    torch.testing.assert_close(found[True].fake.values, found[False].fake.values)


def test_two_calls_where_one_would_change_a_result_or_take_memory(monkeypatch) -> None:
    real, t, cond = inputs(4)
    assert not make(spectral=True).per_sample  # each call moves the estimate of the norm
    assert not getattr(StyleGANTHeads({"a": 8}), "per_sample", False)  # norms over a batch
    critic = Counted(make(spectral=False), True)
    read = losses.both_logits(critic, real, real, cond, t, for_r1=True)
    assert critic.sizes == [4, 4]
    assert all(x.requires_grad for x in read.inputs)
    monkeypatch.setattr(losses, "JOINT", sum(x.nbytes for x in real) - 1)
    losses.both_logits(critic, real, real, cond, t)
    assert critic.sizes == [4, 4, 4, 4]


class NormedOverTheBatch(ConvHeads):
    """A user's heads, whose logits depend on the other samples of a batch."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(c) for c in channels.values())

    def forward(self, maps, t, cond):
        return super().forward([norm(x) for norm, x in zip(self.norms, maps, strict=True)], t, cond)


class Stated(ConvHeads):
    per_sample = True


class Below(Stated):
    pass


@pytest.mark.parametrize("kind", [NormedOverTheBatch, Stated, Below])
def test_heads_below_others_are_read_in_one_call_only_if_they_state_it(kind) -> None:
    real, t, cond = inputs(8)
    fake = [3 * x + 1 for x in real]
    heads = kind(CHANNELS, pooled=6, spectral=False).train()
    sizes: list[int] = []
    heads.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[1])))
    logits = losses.both_logits(heads, real, fake, cond, t)
    assert sizes == ([16] if kind is Stated else [8, 8])
    torch.testing.assert_close(logits.real.values, heads(real, t, cond).values)
    torch.testing.assert_close(logits.fake.values, heads(fake, t, cond).values)


def test_drawn_heads_below_others_are_read_in_two_calls() -> None:
    real, t, cond = inputs(8)
    sizes: list[int] = []

    class Mine(DrawnHeads):
        def __call__(self, maps, t, cond):
            sizes.append(len(t))
            return super().__call__(maps, t, cond)

    drawn = Pool(CHANNELS, pooled=6, size=48).draw(torch.Generator().manual_seed(0))
    losses.both_logits(Mine(drawn.pool, drawn.head_of), real, real, cond, t)
    assert sizes == [8, 8]


def test_a_bounded_width_is_that_of_the_narrower() -> None:
    widths = [head.mix[0].in_channels for head in make(width=16).heads.values()]
    assert widths == [12, 12, 16]
    assert [head.mix[0].in_channels for head in make(width=None).heads.values()] == [12, 12, 20]


@pytest.mark.parametrize("size", [(2, 2), (4, 2), (8, 2), (16, 3), (2, 16), (8, 8)])
@pytest.mark.parametrize("kernel", [3, 4])
def test_a_convolution_with_a_stride_is_right_in_bfloat16(kernel, size):
    """F.conv2d is not, on CPUs with AMX, where one column is left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 144, *size, generator=generator).bfloat16()
    weight = torch.randn(64, 144, kernel, kernel, generator=generator).bfloat16() / 40

    def found(x, weight, context):
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with context:
            y = strided(x, weight, stride=2, padding=1)
        slope = torch.linspace(-1, 1, y.numel()).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), slope.to(y.dtype))]

    expected = found(x.double(), weight.double(), contextlib.nullcontext())
    for filled in range(10):
        torch.full((10_000 * filled,), 1e2)  # so that free memory is not zero
        for a, b in zip(found(x, weight, torch.autocast("cpu")), expected, strict=True):
            assert float((a.double() - b).abs().max()) < 0.02 * float(b.abs().max())
