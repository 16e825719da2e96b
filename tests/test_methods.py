"""Who is trained by what: gradients of both phases, the frozen teacher, and a method file that
holds only that.
"""

from __future__ import annotations

import csv
import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

import tiny
from distill.core import randomness
from distill.core.score_distillation import ScoreDistillation, TeacherSamples
from distill.core.times import Discrete
from distill.core.types import Losses, Players
from distill.data import source
from distill.discriminators.pool import Pool
from distill.methods.base import Distillation
from distill.teachers.decoder import TinyDecoder
from distill.training.csv_logger import CsvLog

LEVELS = torch.tensor(
    [0.01, 0.25, 0.5, 0.75]
).tolist()  # of tiny.nitrofusion's pool, as float32 has them
BOTH, ALL = {"adv"}, {"adv", "distill"}
METHODS = {  # name -> (how to make it, its discriminator's terms, its student's)
    "ladd": (tiny.ladd, {}, BOTH, BOTH),
    "ladd_all_terms": (
        tiny.ladd,
        {"r1_weight": 1e-2, "distill_weight": 1.0, "misaligned": 0.5},
        {"adv", "r1", "misaligned"},
        ALL,
    ),
    "ladd_relativistic": (tiny.ladd, {"loss": "relativistic"}, BOTH, BOTH),
    "add": (tiny.add, {}, {"adv", "r1"}, ALL),
    "add_latents": (tiny.add, {"distill_space": "latents", "r1_weight": 0.0}, BOTH, ALL),
    "add_crop": (tiny.add, {"crop": 8, "loss": "relativistic"}, {"adv", "r1"}, ALL),
    "add_adversarial": (tiny.add, {"distill_weight": 0.0}, {"adv", "r1"}, BOTH),
    "add_nfsd": (
        tiny.add,
        {"distill": ScoreDistillation(kind="nfsd", guidance=2.0), "negative": "a blur"},
        None,
        ALL,
    ),
    "nitrofusion": (tiny.nitrofusion, {}, BOTH, BOTH),
    "nitrofusion_relativistic": (
        tiny.nitrofusion,
        {"loss": "relativistic", "shared": False},
        BOTH,
        BOTH,
    ),
    "nitrofusion_refined": (tiny.nitrofusion, {"refine": [0, 0], "one_step_prob": 0.0}, BOTH, BOTH),
    "dmd2": (tiny.dmd2, {}, {"denoising", "adv"}, {"matching", "adv"}),
    "regression": (tiny.regression, {}, set(), {"regression"}),
    "consistency": (tiny.consistency, {}, set(), {"consistency"}),
    "consistency_huber": (tiny.consistency, {"huber": 0.00054}, set(), {"consistency"}),
    "dpo": (tiny.dpo, {}, set(), {"dpo"}),
}
FILES = [Path(importlib.import_module(f"distill.methods.{name}").__file__) for name in tiny.METHODS]


@pytest.fixture(params=METHODS)
def named(request, teacher):
    """A fresh method on one of the teachers, with the names of its discriminator's and its
    student's terms.
    """
    make, options, of_discriminator, of_student = METHODS[request.param]
    method = make(teacher, options=options)
    return method, {"adv", "r1"} if of_discriminator is None else of_discriminator, of_student


def with_gradient(module) -> int:
    """Parameters with a gradient that is finite and not all zero."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    return sum(bool(g.any()) for g in gradients)


def at_work(method) -> dict[str, torch.nn.Parameter]:
    """Parameters of the heads that learn in this iteration: of a pool those of the drawn ones, at
    this t*.
    """
    named = dict(method.heads.named_parameters())
    if not isinstance(method.heads, Pool):
        return named
    level = float(tiny.drawn(method, tiny.simple_batch(method))[0].t[0])
    chosen = tiny.critic(method).head_of
    return {
        f"heads.{i}": named[f"heads.{i}"]
        for i in sorted(i for (k, _), i in chosen.items() if LEVELS[k] == level)
    }


def untouched(module) -> bool:
    return all(p.grad is None for p in module.parameters())


def test_discriminator_phase_reaches_the_heads_alone(named):
    method, names, _ = named
    batch = tiny.simple_batch(method)
    draws, fake = tiny.drawn(method, batch)
    assert fake.x0_hat.requires_grad
    terms = method.discriminator_loss(batch, draws, fake).terms
    assert set(terms) == names
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    if not method.has_discriminator:
        return
    sum(terms.values()).backward()
    learning = at_work(method)
    still = [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
    assert [p for p in method.heads.parameters() if p.grad is not None] == list(learning.values())
    # While no margin of the hinge is reached, real and fake pull alike at a bias.
    assert all(name.endswith(".bias") for name in still)
    assert untouched(method.student)
    assert untouched(method.teacher)


def test_student_phase_reaches_the_student_alone(named):
    method, _, names = named
    batch = tiny.simple_batch(method)
    draws, fake = tiny.drawn(method, batch)
    method.heads.requires_grad_(False)
    terms = method.student_loss(batch, draws, fake).terms
    assert set(terms) == names
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    sum(terms.values()).backward()
    assert with_gradient(method.student) > 0.9 * len(list(method.student.parameters()))
    assert untouched(method.heads)
    assert untouched(method.teacher)


def test_a_misaligned_sample_is_held_against_its_pair(teachers):
    """Of a relativistic loss only differences count: all logits lower by one number are no
    better.
    """
    method = tiny.ladd(
        teachers("mmdit"), options={"misaligned": 0.5, "shared": True, "loss": "relativistic"}
    )
    batch, of, seen = tiny.simple_batch(method, 3), method.heads.forward, []
    method.heads.forward = lambda maps, t, cond: seen.append(of(maps, t, cond)) or seen[-1]
    term = method.discriminator_loss(batch, *tiny.drawn(method, batch)).terms["misaligned"]
    both, wrong = (logits.values for logits in seen)
    real = both[:3]  # one call reads real and fake
    torch.testing.assert_close(term, 0.5 * torch.nn.functional.softplus(wrong - real).mean())


def of_r1(method, batch, draws, fake, cast: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The term, and its gradients by the heads, as the loop makes them; under bfloat16 if
    `cast`.
    """
    method.heads.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        term = method.discriminator_loss(batch, draws, fake).terms["r1"]
        method.loop.backward(method, "d", Losses({"r1": term}))
    return term.detach(), [p.grad.clone() for p in method.heads.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["ladd", "add"])
def test_r1_is_float32_where_the_rest_is_bfloat16(name, teachers):
    """On the features that autocast leaves, its value and its gradient are those in float32."""
    options = {"r1_weight": 1.0} | ({"shared": True} if name == "ladd" else {})
    method = tiny.METHODS[name](teachers("mmdit"), options=options)
    method.manual_backward = torch.Tensor.backward
    for module in method.heads.modules():  # spectral norm moves on with every pass
        module.training = False
    batch = tiny.simple_batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        draws, fake = tiny.drawn(method, batch)
    assert torch.bfloat16 in {m.dtype for m in fake.real_features} or name == "add"
    term, gradients = of_r1(method, batch, draws, fake, cast=True)
    exact = replace(
        fake,
        **{k: [m.float() for m in getattr(fake, k)] for k in ("real_features", "fake_features")},
    )
    expected, gradients_of_it = of_r1(method, batch, draws, exact, cast=False)
    assert len(gradients) > 10
    torch.testing.assert_close(term, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, gradients_of_it, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_is_outside_autocast(teachers, tmp_path, shards):
    """Lightning calls a step with two optimisers within it: what ran in float32 would go back in
    bfloat16.
    """
    method, seen = tiny.ladd(teachers("mmdit")), []
    loss = method.student_loss

    def watched(*given):
        terms = loss(*given)
        assert torch.is_autocast_enabled("cpu")
        terms.terms["adv"].register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        return terms

    method.student_loss = watched
    running = tiny.trainer(tmp_path, 1, precision="bf16-mixed")
    running.fit(method, source.latents(str(shards), batch_size=2).loader(seed=0))
    assert seen == [False]


def test_misaligned_needs_another_caption(teachers):
    method = tiny.ladd(teachers("mmdit"), options={"misaligned": 0.5})
    batch = tiny.simple_batch(method, 1)
    with pytest.raises(ValueError, match="there is no other caption"):
        method.discriminator_loss(batch, *tiny.drawn(method, batch))


def test_a_student_begins_from_noise_alone(teachers):
    """Of a Stable Diffusion schedule too, whose end keeps .068 of the data."""
    method, seen = tiny.ladd(teachers("unet")), []
    method.levels = Discrete([1.0, 0.5], [0.5, 0.5])
    of = method.student.x0
    method.student.x0 = lambda x_t, t, cond: seen.append((x_t, t)) or of(x_t, t, cond)
    batch = tiny.simple_batch(method, 8)
    for x0 in (batch.x0, batch.x0 + 1):
        tiny.drawn(method, replace(batch, x0=x0))
    (one, t), (other, _) = seen
    assert {1.0, 0.5} == set(t.tolist())
    for k in range(8):
        assert torch.equal(one[k], other[k]) == (t[k] == 1)


def test_misaligned_samples_are_real_ones_under_another_caption(teachers):
    """With equal captions they are the real samples themselves, and score what these do."""
    method = tiny.ladd(teachers("mmdit"), options={"misaligned": 0.5, "shared": True})
    batch = tiny.simple_batch(method, 3)
    alike = type(batch)(
        x0=batch.x0, captions=batch.captions[:1] * 3, cond=batch.cond.index(torch.tensor([0, 0, 0]))
    )
    seen, of = [], method.heads.forward
    method.heads.forward = lambda maps, t, cond: (
        seen.append((of(maps, t, cond), cond)) or seen[-1][0]
    )
    for one in (alike, batch):
        seen.clear()
        terms = method.discriminator_loss(one, *tiny.drawn(method, one)).terms
        (both, _), (wrong, cond) = seen
        real, wrong = both.values[:3], wrong.values  # one call reads real and fake
        torch.testing.assert_close(terms["misaligned"], 0.5 * (1 + wrong).relu().mean())
        assert torch.equal(cond.pooled, one.cond.pooled[[2, 0, 1]])
        assert torch.allclose(real, wrong, atol=1e-5) == (one is alike)


def test_adversarial_gradient_of_the_student_passes_through_the_teacher(teacher):
    """Cut the maps from the sample, and nothing of the adversarial term is left for the student."""
    method = tiny.ladd(teacher)
    batch = tiny.simple_batch(method)
    draws, fake = tiny.drawn(method, batch)
    cut = replace(fake, fake_features=[m.detach() for m in fake.fake_features])
    method.heads.requires_grad_(False)
    assert not method.student_loss(batch, draws, cut).terms["adv"].requires_grad
    assert all(m.requires_grad for m in fake.fake_features)


def test_phases_of_the_loop_do_not_leak(teacher, tmp_path, shards):
    """After the student's update the heads have the weights that their own update left, and no
    gradients: those are released, and the student's phase makes none.
    """
    method = tiny.ladd(teacher)
    seen = []
    update = method.loop.clip_and_step

    def spy(owner, player, module, optimizer, limit):
        if player == "d":
            assert untouched(method.student)
        applied = update(owner, player, module, optimizer, limit)
        gradients = [p.grad for p in method.heads.parameters()]
        seen.append((player, tiny.weights(method.heads), gradients))
        return applied

    method.loop.clip_and_step = spy
    loader = source.latents(str(shards), batch_size=2).loader(seed=0)
    tiny.trainer(tmp_path, 1).fit(method, loader)
    assert [player for player, _, _ in seen] == ["d", "g"]
    assert tiny.same(seen[0][1], seen[1][1])
    assert all(gradient is not None for gradient in seen[0][2])
    assert all(gradient is None for gradient in seen[1][2])


@pytest.mark.parametrize(("name", "family"), tiny.on_either(METHODS))
def test_three_steps_change_the_players_and_leave_the_teacher(name, teacher, tmp_path, shards):
    make, options, *_ = METHODS[name]
    method = make(teacher, options=options)
    frozen, student, heads = (
        tiny.weights(teacher),
        tiny.weights(method.student),
        tiny.weights(method.heads),
    )
    running = tiny.trainer(tmp_path, 3)
    running.fit(method, source.latents(str(shards), batch_size=2).loader(seed=0))
    assert method.step == running.global_step == 3
    assert untouched(teacher)
    assert tiny.same(frozen, tiny.weights(teacher))
    for before, module in ((student, method.student), (heads, method.heads)):
        after = tiny.weights(module)
        changed = [
            name
            for name, _ in module.named_parameters()
            if not torch.equal(before[name], after[name])
        ]
        share = (
            0.9 if not isinstance(module, Pool) else 0.05
        )  # of a pool only what was drawn, in three draws
        assert len(changed) >= share * len(
            list(module.parameters())
        )  # a paired game moves no bias at the end
        assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    "luck", [[0.1, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.1], [0.9, 0.9, 0.9]]
)
def test_refinement_begins_where_a_sampler_of_two_steps_is(luck, teachers, monkeypatch):
    """Of two steps, the second is trained on the student's own first, noised anew; all else is the
    one-step student.
    """
    method = tiny.nitrofusion(teachers("mmdit"), options={"refine": [0, 0], "one_step_prob": 0.5})
    batch, seen = tiny.simple_batch(method), []
    of = method.student.x0
    method.student.x0 = lambda x_t, t, cond: (
        seen.append((x_t, t, torch.is_grad_enabled())) or of(x_t, t, cond)
    )
    monkeypatch.setattr(method.refinement, "draw", lambda *_: place(method, luck))
    tiny.drawn(method, batch)
    assert all(float(seen[0][1][0]) == 1 for _ in seen)
    if luck != [0.9, 0.9, 0.9]:
        assert [grad for *_, grad in seen] == [True]
        return
    assert [(float(t[0]), grad) for _, t, grad in seen] == [(1.0, False), (0.5, True)]
    first = of(*seen[0][:2], batch.cond)
    noise = method.loop.streams(method).sample
    torch.randn(batch.x0.shape, generator=noise)  # where it began
    again = method.student.process.diffuse(
        first, torch.randn(batch.x0.shape, generator=noise), seen[1][1]
    )
    torch.testing.assert_close(seen[1][0], again)


def place(method, luck):
    """What the method makes of these three numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(luck))
        of = type(method.refinement).draw
        return of(method.refinement, method.step, method.loop.streams(method).common("steps"))


def test_refinement_joins_steps_one_after_another(teachers):
    levels = [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5]]
    method = tiny.nitrofusion(
        teachers("mmdit"), options={"levels": levels, "refine": [0, 3, 6], "one_step_prob": 0.5}
    )
    found = {}
    for method.loop.iteration in range(3000):
        done, now = method.refinement.draw(method.step, method.loop.streams(method).common("steps"))
        step = min(method.loop.iteration, 6) // 3 * 3
        found.setdefault(step, []).append((*done, now))
    assert set(found[0]) == {(1.0,)}
    assert set(found[6]) == {(1.0,), (1.0, 0.5), (1.0, 0.75), (1.0, 0.75, 0.5)}
    share = sum(x == (1.0,) for x in found[6]) / len(found[6])
    assert share == pytest.approx(0.5 + 0.5 * (1 + 1 / 2 + 1 / 3) / 3, abs=0.05)


def test_noise_that_made_the_sample_is_where_the_student_begins(teachers):
    method = tiny.nitrofusion(teachers("mmdit"))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    batch = method.loop.prepare_batch(
        method, {"x0": torch.zeros(2, 4, 16, 16), "noise": noise, "caption": tiny.CAPTIONS[:2]}
    )
    with torch.no_grad():
        expected = method.student.x0(noise, torch.ones(2), batch.cond)
        torch.testing.assert_close(tiny.drawn(method, batch)[1].x0_hat, expected)


def test_of_captions_alone_the_teacher_makes_the_samples(teacher):
    """Four steps with noise anew, written out; the first noise is the student's too."""
    method = tiny.nitrofusion(teacher)
    with pytest.raises(ValueError, match=r"^method\.real=null: these data are captions alone"):
        method.loop.prepare_batch(method, {"caption": tiny.CAPTIONS[:2]})
    method.teacher_samples = TeacherSamples(levels=[1, 0.75, 0.5, 0.25])  # 1, as one types it
    batch = method.loop.prepare_batch(method, {"caption": tiny.CAPTIONS[:2]})
    generator = randomness.generator(0, 0, 0, randomness.TEACHER_SAMPLES)
    shape = (2, *teacher.latent_shape)
    x = noise = torch.randn(shape, generator=generator)
    assert torch.equal(batch.noise, noise)
    with torch.no_grad():
        for i, level in enumerate((1.0, 0.75, 0.5, 0.25)):
            x0 = teacher.x0(x, torch.full((2,), level), batch.cond)
            if i < 3:
                later = torch.full((2,), level - 0.25)
                x = teacher.process.diffuse(x0, torch.randn(shape, generator=generator), later)
    torch.testing.assert_close(batch.x0, x0)


def test_student_starts_as_the_teacher_and_shares_nothing_with_it(teacher):
    method = tiny.ladd(teacher)
    batch = tiny.simple_batch(method)
    t = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        before = teacher.x0(batch.x0, t, batch.cond)
        torch.testing.assert_close(
            method.student.x0(batch.x0, t, batch.cond), before, rtol=0, atol=1e-6
        )
        tiny.shake(method.student, 9)
        assert torch.equal(teacher.x0(batch.x0, t, batch.cond), before)
        assert not torch.allclose(method.student.x0(batch.x0, t, batch.cond), before, atol=1e-2)


def test_a_small_decoder_may_stand_in_for_the_autoencoder(teachers, tmp_path):
    """It decodes both, the gradient passes through it, and sampling keeps the teacher's own."""
    torch.manual_seed(0)
    shape = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    blocks = {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    AutoencoderTiny(**shape, **blocks).save_pretrained(tmp_path)
    teacher = teachers("unet")
    decoder = TinyDecoder(str(tmp_path)).train()
    method = tiny.add(teacher, options={"decoder": decoder})
    batch = tiny.simple_batch(method)
    draws, fake = tiny.drawn(method, batch)
    expected = AutoencoderTiny.from_pretrained(tmp_path).decode(fake.x0_hat).sample
    torch.testing.assert_close(fake.pixels, expected)
    sum(method.student_loss(batch, draws, fake).terms.values()).backward()
    assert with_gradient(method.student) > 0
    assert untouched(decoder)
    assert not torch.allclose(teacher.decode(batch.x0), decoder(batch.x0), atol=1e-2)


class Pictures(torch.nn.Module):
    """Features that keep what they are shown."""

    space, width, channels = "pixels", 4, {"a": 4}

    def __init__(self):
        super().__init__()
        self.shown, self.described = [], []

    def forward(self, x, t, cond, generator=None):
        self.shown.append(x)
        return [x.flatten(2)]

    def describe(self, x):
        self.described.append(x)
        return x.mean((2, 3))


def shown(method, batch):
    """The real picture and the student's as the heads look at them, and what c_img is of."""
    pictures, condition = Pictures(), method.condition
    method.register_frozen(feature_network=pictures)
    condition.image = pictures
    draws, _ = tiny.drawn(method, batch)
    real, fake = pictures.shown
    return real, fake, pictures.described[0], draws


@pytest.mark.parametrize("crop", [None, 8])
def test_the_real_picture_is_the_datas_own(crop, teachers):
    """Not what the autoencoder makes of it; a crop lies where the student's does, and c_img is of
    the whole.
    """
    teacher = teachers("mmdit")
    method = tiny.add(teacher, options={"crop": crop})
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = method.loop.prepare_batch(method, {"pixels": pixels, "caption": tiny.CAPTIONS[:2]})
    assert torch.equal(batch.x0, teacher.encode(pixels))
    real, fake, described, draws = shown(method, batch)
    assert torch.equal(described, pixels)
    assert real.shape == fake.shape
    top, left = (int(share * 9) * 4 for share in draws.corner) if crop else (0, 0)
    side = 32 if crop else 64
    assert torch.equal(real, pixels[..., top : top + side, left : left + side])


@pytest.mark.parametrize("crop", [None, 8])
def test_of_latents_alone_the_real_picture_is_decoded(crop, teachers):
    """A crop by itself, so that its borders are those of the student's; for c_img the whole."""
    teacher = teachers("mmdit")
    method = tiny.add(teacher, options={"crop": crop})
    batch = tiny.simple_batch(method)
    real, _, described, draws = shown(method, batch)
    with torch.no_grad():
        torch.testing.assert_close(described, teacher.decode(batch.x0))
        top, left = (int(share * 9) for share in draws.corner) if crop else (0, 0)
        side = crop or 16
        part = batch.x0[..., top : top + side, left : left + side]
        torch.testing.assert_close(real, teacher.decode(part))


def test_samples_that_the_teacher_makes_have_no_picture(teachers):
    method = tiny.add(teachers("mmdit"), options={"real": TeacherSamples(levels=[1.0])})
    given = {"pixels": torch.zeros(2, 3, 64, 64), "caption": tiny.CAPTIONS[:2]}
    assert method.loop.prepare_batch(method, given).pixels is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_file_is_short_and_holds_only_the_method(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 190
    code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    code = re.sub(r"device=[\w.]+\.device", "", code)  # where noise is drawn
    found = re.findall(
        r"\w*(?:optimi[sz]er|device|logger|hydra|cfg|config|checkpoint|backward|wandb)\w*", code
    )
    assert found == []


def paired(batch):
    """With the noise that its samples, or so it says, were made from."""
    return replace(
        batch, noise=torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(5))
    )


def test_the_warm_start_comes_first_and_the_heads_join_at_its_end(teachers, tmp_path, shards):
    """One-step-capable weights from pairs: |x0_hat - x0|^2 alone, then both players, then
    adversarial alone.
    """
    options = {"warm_start": 4, "heads_lead": 2, "refine": [0]}
    method = tiny.nitrofusion(teachers("mmdit"), options=options, rate=1e-4)
    seen = []
    update = method.loop.update_student

    def watched(owner, *given):
        moments = len(method.optimizers()[1].optimizer.state)
        result = update(owner, *given)
        seen.append(
            (
                moments > 0,
                sorted(
                    k
                    for k in method.loop.current
                    if k.startswith("g/") and "_" not in k and k != "g/lr"
                ),
            )
        )
        return result

    method.loop.update_student = watched
    batch = paired(tiny.simple_batch(method))
    draws, fake = tiny.drawn(method, batch)
    terms = method.student_loss(batch, draws, fake).terms
    torch.testing.assert_close(terms["regression"], (fake.x0_hat - batch.x0).square().mean())
    tiny.trainer(tmp_path, 6).fit(
        method, source.latents(str(shards), batch_size=2, seeded=True).loader(seed=0)
    )
    assert [learnt for learnt, _ in seen] == [False, False, True, True, True, True]
    assert [terms for _, terms in seen] == [["g/regression"]] * 4 + [["g/adv"]] * 2


def test_what_only_some_iterations_have_is_logged_of_them_alone(teachers, tmp_path, shards):
    method = tiny.nitrofusion(
        teachers("mmdit"), options={"warm_start": 2, "refine": [0]}, rate=1e-4
    )
    trainer = tiny.trainer(tmp_path, 4)
    trainer.loggers, trainer.log_every_n_steps = [table := CsvLog(str(tmp_path))], 1
    trainer.fit(method, source.latents(str(shards), batch_size=2, seeded=True).loader(seed=0))
    table.save()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8")))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["g/regression"]) for row in rows] == [True, True, False, False]
    assert [bool(row["g/adv"]) for row in rows] == [False, False, True, True]


def test_the_warm_start_can_hear_the_teacher_too(teachers):
    """2 alpha(t) |x0_hat - x_psi|^2 besides the pairs, with the guided estimate written out."""
    teacher, low = teachers("mmdit"), ScoreDistillation(guidance=3.0, low=0.4, high=0.6)
    method = tiny.nitrofusion(
        teacher, options={"warm_start": 200, "distill": low, "distill_weight": 2.0}
    )
    batch = paired(tiny.simple_batch(method))
    draws, fake = tiny.drawn(method, batch)
    terms = method.student_loss(batch, draws, fake).terms
    generator = method.loop.streams(method).student
    t = 0.4 + 0.2 * torch.rand(2, len(batch), generator=generator)[0]
    x0_hat, eps = fake.x0_hat.detach(), torch.randn(fake.x0_hat.shape, generator=generator)
    x_t = (1 - t).view(-1, 1, 1, 1) * x0_hat + t.view(-1, 1, 1, 1) * eps
    told, empty = teacher.x0(x_t, t, batch.cond), teacher.x0(x_t, t, batch.cond.unconditional())
    away = (x0_hat - empty - 3 * (told - empty)).square().mean((1, 2, 3))
    torch.testing.assert_close(terms["distill"], 2 * ((1 - t) * away).mean())
    assert sorted(terms) == ["distill", "regression"]


@pytest.mark.parametrize("name", METHODS)
def test_objectives_need_no_trainer_and_no_loop(name, teachers):
    """A batch and `randomness.streams()` are enough, and equal ones give equal losses."""
    make, options, *_ = METHODS[name]
    method = make(teachers("mmdit"), options=options)
    batch = paired(tiny.simple_batch(method))
    method.loop = None
    for module in method.heads.modules():  # spectral norm moves on with every pass
        module.training = False
    found = []
    for _ in range(2):
        draws = method.draw(batch, randomness.streams(seed=3, updates=1))
        sample = method.student_sample(batch, draws)
        both = (
            method.discriminator_loss(batch, draws, sample),
            method.student_loss(batch, draws, sample),
        )
        found.append({f"{i}{k}": v.item() for i, x in enumerate(both) for k, v in x.terms.items()})
    assert found[0]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"has no loop to train it; give it loop="):
        method.training_step({}, 0)


def test_a_method_that_lacks_a_loss_is_refused_when_it_is_built(teacher):
    class Half(Distillation):
        def draw(self, batch, streams):
            return None

    players = Players(teacher=teacher, student=tiny.Toy())
    with pytest.raises(TypeError, match="Half.*student_loss.*student_sample"):
        Half(players)
