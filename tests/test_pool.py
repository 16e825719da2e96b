"""The pool of heads: what is drawn, what learns, what begins anew, and that stacking changes
nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import tiny
from distill.core.types import Cond
from distill.data import source
from distill.discriminators.pool import Pool
from distill.discriminators.teacher_features import TASKS, TeacherFeatures

CHANNELS = {"global.a": 12, "global.b": 12, "local.a": 12, "local.c": 20}
LEVELS = (0.01, 0.25, 0.5, 0.75)
told = Cond(torch.zeros(6, 1, 1))


def make(**options) -> Pool:
    torch.manual_seed(0)
    return Pool(CHANNELS, **{"size": 100, "width": 16, "levels": LEVELS} | options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(n: int = 6) -> list[torch.Tensor]:
    sides = {"global.a": 8, "global.b": 8, "local.a": 4, "local.c": 1}
    return [
        torch.randn(n, c, sides[name], sides[name], generator=generator(c))
        for name, c in CHANNELS.items()
    ]


def at(level: float, n: int = 6) -> torch.Tensor:
    return torch.full((n,), level)


def test_heads_are_dealt_out_evenly_to_maps_and_levels():
    pool = make()
    assert len(pool.heads) == 100
    assert sorted(Counter(len(members) for members in pool.heads_of.values()).items()) == [
        (6, 12),
        (7, 4),
    ]
    every = [i for members in pool.heads_of.values() for i in members]
    assert sorted(every) == list(range(100))  # each head belongs to one place
    assert len(make(size=1).heads) == 16  # no fewer than there are places


def test_draws_are_even_and_a_function_of_the_generator():
    pool, seen = make(), Counter()
    for seed in range(2000):
        seen.update(pool.draw(generator(seed)).head_of.values())
    for place, members in pool.heads_of.items():
        shares = torch.tensor([seen[i] for i in members]) / 2000
        assert sum(seen[i] for i in members) == 2000, place  # one head a draw
        assert (
            shares - 1 / len(members)
        ).abs().max() < 0.045  # five standard errors of a share of 1/6
    assert pool.draw(generator(7)).head_of == pool.draw(generator(7)).head_of
    assert pool.draw(generator(7)).head_of != pool.draw(generator(8)).head_of


def one_by_one(pool: Pool, head: int, x: torch.Tensor) -> torch.Tensor:
    """The same head built of torch's own layers, its flat parameters copied in by hand."""
    flat, channels = pool.heads[head].detach(), x.shape[1]
    layers, position = [nn.GroupNorm(1, channels, affine=False)], 0

    def take(parameter: nn.Parameter) -> None:
        nonlocal position
        parameter.data.copy_(flat[position : position + parameter.numel()].view_as(parameter))
        position += parameter.numel()

    for wide in (channels, 16):
        convolution, norm = (
            nn.Conv2d(wide, 16, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, 16),
        )
        for parameter in (convolution.weight, norm.weight, norm.bias):
            take(parameter)
        layers += [
            nn.ZeroPad2d((0, 1, 0, 1))
            if x.shape[-1] < 2 or wide == 16 and x.shape[-1] < 4
            else nn.Identity()
        ]
        layers += [convolution, norm, nn.SiLU()]
    last = nn.Conv2d(16, 1, 1)
    take(last.weight)
    take(last.bias)
    assert position == len(flat)
    return nn.Sequential(*layers, last)(x).flatten(1)


@pytest.mark.parametrize("level", LEVELS)
def test_stacked_heads_say_what_each_says_alone(level):
    pool, inputs = make(), maps()
    tiny.shake(pool, 3)
    critic = pool.draw(generator())
    found = critic(inputs, at(level), told).by_head()
    place = LEVELS.index(level)
    for name, x, logits in zip(CHANNELS, inputs, found, strict=True):
        expected = one_by_one(pool, critic.head_of[place, name], x)
        expected = expected.mean(1, keepdim=True) if name.startswith("global") else expected
        torch.testing.assert_close(logits, expected)
    assert [part.shape[1] for part in found] == [
        1,
        1,
        1,
        1,
    ]  # of a map of 4 x 4 two layers leave one place
    assert [
        part.shape[1]
        for part in critic([m[..., :4, :4] for m in inputs], at(level), told).by_head()
    ][:2] == [
        1,
        1,
    ]


def test_local_heads_give_a_map_of_logits():
    pool = Pool({"global.a": 12, "local.a": 12}, width=16)
    critic = pool.draw(generator())
    inputs = [torch.randn(2, 12, 16, 16)] * 2
    assert [part.shape[1] for part in critic(inputs, at(0.5, 2), told).by_head()] == [1, 16]


def test_a_sample_goes_to_the_heads_of_the_level_that_is_nearest():
    pool, inputs = make(), maps()
    critic = pool.draw(generator())
    t = torch.tensor([0.74, 0.0, 0.3, 0.9, 0.26, 0.55])
    together = critic(inputs, t, told).values
    for i, level in enumerate((0.75, 0.01, 0.25, 0.75, 0.25, 0.5)):
        alone = critic([m[i : i + 1] for m in inputs], at(level, 1), told).values
        torch.testing.assert_close(together[i : i + 1], alone)


def test_only_what_is_drawn_has_a_gradient():
    pool = make()
    critic = pool.draw(generator())
    critic(maps(), at(0.5), told).values.sum().backward()
    used = {i for i, p in enumerate(pool.heads) if p.grad is not None}
    assert used == {critic.head_of[LEVELS.index(0.5), name] for name in CHANNELS}
    assert all(pool.heads[i].grad.any() for i in used)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 1.0])
def test_refresh_replaces_its_share_by_heads_like_the_first(rate):
    pool = make(refresh=rate)
    tiny.shake(pool, 1, std=5.0)
    before, times, count = [p.detach().clone() for p in pool.heads], 100, 0
    for seed in range(times):
        gone = pool.refresh(generator(seed))
        count += len(gone)
        changed = [p for p, old in zip(pool.heads, before, strict=True) if not torch.equal(p, old)]
        assert {id(p) for p in changed} == {id(p) for p in gone}
        assert all(
            p.abs().max() <= 1 for p in gone
        )  # torch's layers begin so, and shaken ones are far beyond
        for p, old in zip(pool.heads, before, strict=True):
            p.data.copy_(old)
    expected = rate * 100 * times
    assert abs(count - expected) <= 5 * (expected * (1 - rate)) ** 0.5


@pytest.mark.parametrize(
    "bad", [{"levels": []}, {"levels": [0.0]}, {"refresh": 1.1}, {"width": 12}, {"layers": 0}]
)
def test_what_cannot_be_a_pool_is_refused(bad):
    with pytest.raises(ValueError, match=r"discriminator\.heads: .*" + next(iter(bad))):
        make(**bad)


# -- in training -----------------------------------------------------------------------------------


class Watched:
    """After each update of the heads: which have changed, and whose moments."""

    def __init__(self, method):
        self.method, self.log = method, []
        update = method.loop.update_discriminator

        def watched(owner, micros, samples, optimizers, turn):
            (optimizer,) = optimizers
            before, moments = self.state(optimizer)
            result = update(owner, micros, samples, optimizers, turn)
            after, later = self.state(optimizer)
            drawn = set(tiny.critic(method).head_of.values())
            changed = {i for i in before if not torch.equal(before[i], after[i])}
            moved = {i for i in later if i not in moments or not torch.equal(moments[i], later[i])}
            self.log.append((drawn, changed, moved, set(moments)))
            return result

        method.loop.update_discriminator = watched

    def state(self, optimizer):
        known = optimizer.optimizer.state
        heads = list(enumerate(self.method.heads.heads))
        weights = {i: p.detach().clone() for i, p in heads}
        return weights, {i: known[p]["exp_avg_sq"].clone() for i, p in heads if p in known}


@pytest.mark.parametrize("make", [tiny.nitrofusion, tiny.ladd], ids=["nitrofusion", "ladd"])
def test_what_is_not_drawn_stays_bit_by_bit(make, teacher, tmp_path, shards):
    """Weights and moments; LADD's samples are of many levels, so more of its heads learn at
    once.
    """
    method = make(teacher)
    if make is tiny.ladd:
        method.heads = Pool(method.feature_network.channels, size=150, width=16, refresh=0.05)
    watched = Watched(method)
    refreshed = []
    refresh = method.heads.refresh
    method.heads.refresh = lambda g: refreshed.append(refresh(g)) or refreshed[-1]
    running = tiny.trainer(tmp_path, 8)
    running.fit(method, source.latents(str(shards), batch_size=4).loader(seed=0))
    sizes = [len(changed) for _, changed, _, _ in watched.log]
    taps = len(method.feature_network.channels)
    for drawn, changed, moved, _ in watched.log:
        assert changed
        assert changed <= drawn
        assert moved == changed
    assert sizes == [taps] * 8 if make is tiny.nitrofusion else max(sizes) > taps
    assert sum(map(len, refreshed)) > 0
    gone = {id(p) for p in refreshed[-1]}
    state = running.strategy.optimizers[1].state
    assert not [
        p for p in method.heads.heads if id(p) in gone and p in state
    ]  # cleared, and not drawn since


def test_draws_differ_between_iterations_and_not_between_players(teachers):
    method = tiny.nitrofusion(teachers("mmdit"))
    first = tiny.critic(method).head_of
    assert tiny.critic(method).head_of == first
    draws, _ = tiny.drawn(method, tiny.simple_batch(method, 3))
    assert float(draws.t[0]) in [pytest.approx(level) for level in LEVELS]
    method.loop.iteration = 1
    assert tiny.critic(method).head_of != first


# -- what they look at -----------------------------------------------------------------------------


def test_tasks_see_the_whole_the_patch_and_the_patch_untold(teacher):
    features = TeacherFeatures(teacher, taps="encoder", tasks=TASKS)
    batch = tiny.simple_batch(tiny.ladd(teacher), 3)
    t = torch.tensor([0.3, 0.5, 0.7])
    found = dict(
        zip(features.channels, features(batch.x0, t, batch.cond, generator(5)), strict=True)
    )
    tap = teacher.encoder[-1]
    whole = teacher.features(batch.x0, t, batch.cond, [tap])[0]
    torch.testing.assert_close(found[f"global.{tap}"], whole)
    luck = torch.rand(2, generator=generator(5)).tolist()
    cells = batch.x0.shape[-1] // teacher.patch
    top, left = (teacher.patch * int(u * (cells - cells // 2 + 1)) for u in luck)
    side = teacher.patch * (cells // 2)
    patch = batch.x0[..., top : top + side, left : left + side].contiguous()
    for task, cond in (("local", batch.cond), ("local_null", batch.cond.unconditional())):
        expected = teacher.features(patch, t, cond, [tap])[0]
        torch.testing.assert_close(found[f"{task}.{tap}"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[f"local.{tap}"], found[f"local_null.{tap}"])


def test_patches_move_and_real_and_fake_share_them(teachers):
    features = TeacherFeatures(teachers("mmdit"), taps="encoder", tasks=TASKS)
    x = torch.arange(256.0).view(1, 1, 16, 16)
    corners = {float(features._patch(x, generator(seed))[0][0, 0, 0, 0]) for seed in range(200)}
    assert len(corners) == 25  # 5 x 5 places of 4 x 4 cells in 8 x 8
    (one, place), (again, same) = (features._patch(x, generator(3)) for _ in range(2))
    assert place == same
    assert torch.equal(one, again)
    assert float(one[0, 0, 0, 0]) == 16 * place[0] + place[1]


def test_sdxl_is_told_where_in_the_whole_a_patch_lies(teachers):
    """Its time ids are (height and width of the picture, row and column of the crop, height and
    width of the crop).
    """
    teacher, seen = teachers("sdxl"), []
    features = TeacherFeatures(teacher, taps="encoder", tasks=TASKS)
    batch = tiny.simple_batch(tiny.ladd(teacher))
    of = teacher.network.model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    features(batch.x0, torch.ones(2), batch.cond, generator(5))
    of.remove()
    _, corner = features._patch(batch.x0, generator(5))
    whole, patches = seen
    assert any(corner)
    assert whole.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert patches.tolist() == [[64, 64, *(4 * place for place in corner), 32, 32]] * 4


def test_the_encoder_of_a_unet_is_what_it_hands_across(teachers):
    """Our taps are the very residuals of diffusers' own forward, and its middle."""
    teacher = teachers("sdxl")
    model, batch = teacher.network.model, tiny.simple_batch(tiny.ladd(teacher))
    t, seen = torch.tensor([0.4, 0.6]), {}
    up = model.up_blocks[0].register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.update(middle=kwargs["hidden_states"]), with_kwargs=True
    )
    calls = []
    hooks = [
        b.register_forward_hook(lambda _m, _i, out: calls.extend(out[1])) for b in model.down_blocks
    ]
    teacher.x0(batch.x0, t, batch.cond)
    for hook in (up, *hooks):
        hook.remove()
    found = dict(
        zip(
            teacher.encoder, teacher.features(batch.x0, t, batch.cond, teacher.encoder), strict=True
        )
    )
    assert teacher.encoder == ["in", "down0.0", "down0.1", "down1.0", "mid"]
    for name, expected in zip(("down0.0", "down0.1", "down1.0"), calls, strict=True):
        torch.testing.assert_close(found[name], expected)
    torch.testing.assert_close(found["mid"], seen["middle"])
    assert {name: m.shape[1] for name, m in found.items()} == {
        k: teacher.channels[k] for k in teacher.encoder
    }


def test_the_pool_takes_the_levels_of_its_configuration():
    """Those of training steps 10, 250, 500 and 750: t = (step + 1) / 1000."""
    conf = Path(__file__).parents[1] / "conf"
    heads = OmegaConf.load(conf / "discriminator" / "pool.yaml").heads
    renoise = OmegaConf.load(conf / "method" / "nitrofusion.yaml").renoise
    steps = torch.tensor([10, 250, 500, 750])
    expected = pytest.approx(((steps + 1) / 1000).tolist())
    assert Pool(CHANNELS, size=1).levels == expected
    assert list(heads.levels) == list(renoise.levels) == expected
