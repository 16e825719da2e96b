"""Every aspect ratio: samples of a teacher in sizes that are drawn by share, before and during
training, and few-step students at other sizes than they were trained for.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import families
import tiny
from distill.core import randomness
from distill.core.limits import drawn_bucket
from distill.core.score_distillation import TeacherSamples
from distill.core.times import Discrete
from distill.data.by_share import batches_of, size_of
from distill.data.datasets import LatentShards
from distill.data.source import Source
from distill.sampling import Consistency, Euler, guided, sampler_of, seeded
from distill.students import save_pipeline
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import SD

BUCKETS = [(64, 64), (96, 48), (48, 96)]
IN_LATENTS = [[16, 16], [24, 12], [12, 24]]
COUNT = 5


# -- sizes by share --------------------------------------------------------------------------------


def test_sizes_are_drawn_by_share_and_by_the_seed_alone():
    shares = [1, 2, 0]
    drawn = [size_of(seed, BUCKETS, shares) for seed in range(3000)]
    counts = Counter(drawn)
    assert counts[48, 96] == 0
    assert counts[64, 64] / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert [size_of(seed, BUCKETS, shares) for seed in (2999, 17)] == [drawn[2999], drawn[17]]
    assert max(Counter(size_of(seed, BUCKETS) for seed in range(3000)).values()) < 1100
    # Written down: another function would change the samples of jobs that are continued.
    assert drawn[:4] == [(64, 64), (64, 64), (96, 48), (96, 48)]
    assert [drawn_bucket(BUCKETS, [0, 1, 1], u) for u in (0, 0.49, 0.5, 1 - 1e-9)] == [
        *BUCKETS[1:2] * 2,
        *BUCKETS[2:] * 2,
    ]


def test_batches_have_one_size_and_every_number_once():
    batches = list(batches_of(range(3, 20), 4, lambda i: i % 3))
    assert sorted(itertools.chain(*(part for _, part in batches))) == list(range(3, 20))
    assert all({i % 3 for i in part} == {kind} and len(part) <= 4 for kind, part in batches)


# -- synthesize ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(tiny.CAPTIONS[:5]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def asked(pipelines, prompts):
    sizes = str([list(bucket) for bucket in BUCKETS]).replace(" ", "")
    return [
        f"teacher.path={pipelines('unet')}",
        "teacher._target_=distill.teachers.sd.SD",
        f"prompts={prompts}",
        *(
            f"count={COUNT}",
            "seed=5",
            "steps=2",
            "batch_size=2",
            "per_shard=3",
            "precision=32-true",
        ),
        *(f"buckets={sizes}", "shares=[1,1,2]"),
    ]


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "making.yaml"}


def test_samples_in_buckets_continue_after_an_error_and_train_as_data(
    command, asked, teachers, monkeypatch, tmp_path
):
    assert command("synthesize", *asked, "out=whole")[0] == 0
    calls, embed = itertools.count(), PipelineTeacher.embed

    def failing(self, captions):
        if next(calls) == 4:
            raise OSError("the power is gone")
        return embed(self, captions)

    with monkeypatch.context() as patched:
        patched.setattr(PipelineTeacher, "embed", failing)
        assert command("synthesize", *asked, "out=parts")[0] == 1
    assert list((tmp_path / "parts").glob("*.tar"))
    assert command("synthesize", *asked, "out=parts")[0] == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        for rank in ("1", "0"):
            patched.setenv("RANK", rank)
            assert command("synthesize", *asked, "out=ranks")[0] == 0
    assert content(tmp_path / "ranks") == content(tmp_path / "whole")

    about = json.loads((tmp_path / "whole" / "manifest.json").read_text(encoding="utf-8"))
    assert (about["size"], about["buckets"], about["shares"]) == (None, IN_LATENTS, [1, 1, 2])
    data = LatentShards(str(tmp_path / "whole"), seeded=True)
    teacher = teachers("unet")
    for i in range(COUNT):
        item = data[i]
        seed = int(item["key"])
        width, height = size_of(seed, BUCKETS, [1, 1, 2])
        assert tuple(item["x0"].shape) == (4, height // 4, width // 4)
        assert torch.equal(
            item["noise"], torch.randn(item["x0"].shape, generator=seeded([seed])[0])
        )
        cond = teacher.embed([item["caption"]])
        options = {"shape": item["x0"].shape, "steps": 2, "guidance": 4.0}
        expected = guided.guided(teacher, cond, seeded([seed]), **options)[0]
        torch.testing.assert_close(item["x0"], expected, atol=2e-2, rtol=2e-2)
    method = tiny.ladd(teacher)
    for batch in itertools.islice(Source(data, 2).loader(seed=0), 4):
        found = method.loop.prepare_batch(method, batch)
        assert found.x0.shape == batch["x0"].shape


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["buckets=[[64,64],[62,64],[64,32]]"],
            "buckets: [62, 64] must be multiples of 4 for this teacher; use [60, 64]",
        ),
        (["buckets=[64,64]"], "buckets=[64, 64]: must be null or like [[640, 384], [512, 512]]"),
        (["shares=[1]"], "shares=[1]: must be 3 numbers, 0 or more, one for each of buckets"),
        (["shares=[0,0,0]"], "shares=[0, 0, 0]: must be 3 numbers"),
        (["size=64"], "size=64: the sizes are those of buckets; leave it out"),
        (["buckets=null"], "shares=[1, 1, 2]: has no buckets to share; give buckets="),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence_and_leave_nothing(
    words, said, command, asked, tmp_path
):
    code, _, err = command("synthesize", *asked, *words, "out=gone")
    assert (code, said in err) == (1, True), err
    assert not (tmp_path / "gone").exists()


# -- during training -------------------------------------------------------------------------------


def with_buckets(teacher, **more):
    real = TeacherSamples(levels=[1.0, 0.5], fresh=False, buckets=BUCKETS, **more)
    return tiny.regression(teacher, options={"real": real})


def test_the_teacher_samples_in_sizes_by_share_the_same_for_every_rank(teachers):
    method = with_buckets(teachers("unet"), shares=[2, 1, 1])
    batch, shapes = {"caption": tiny.CAPTIONS[:2]}, []
    for iteration in range(8):
        method.loop.iteration = iteration
        shapes.append(tuple(method.loop.prepare_batch(method, batch).x0.shape[2:]))
        common = randomness.common(0, iteration, "cpu", "bucket")
        width, height = method.teacher_samples.size(common)
        assert shapes[-1] == (height // 4, width // 4)
    assert set(shapes) == {(16, 16), (12, 24), (24, 12)}
    method.loop.iteration = 3
    found = method.loop.prepare_batch(method, batch)
    assert tuple(found.x0.shape[2:]) == shapes[3]  # whatever was drawn before
    expected = method.teacher_samples(method.teacher, found.noise, found.cond, torch.Generator())
    torch.testing.assert_close(found.x0, expected)


def test_sizes_of_the_teachers_samples_are_checked_before_training(teachers):
    with pytest.raises(ValueError, match=r"method\.real\.buckets=\[96, 48\]: must be .* up to 64"):
        with_buckets(teachers("mmdit"))
    with pytest.raises(ValueError, match=r"method\.real\.shares=\[1\]: must be 3 numbers"):
        with_buckets(teachers("unet"), shares=[1])


# -- levels that move with the size ----------------------------------------------------------------

SIZES = [(64, 64), (96, 48), (48, 96), (128, 128)]  # height, width
SHIFT = {"base_image_seq_len": 16, "max_image_seq_len": 256, "base_shift": 0.4, "max_shift": 1.3}


def sigmas_of(pipeline, height, width, steps, **call):
    """The sigmas that a pipeline itself sets for this size."""
    with torch.no_grad():
        pipeline("a star", height=height, width=width, num_inference_steps=steps,
                 output_type="latent", **call)  # fmt: skip
    return pipeline.scheduler.sigmas.tolist()


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A tiny FLUX, whose scheduler shifts by the size."""
    folder = families.write("flux", tmp_path_factory.mktemp("flux") / "flux")
    return families.teacher_at(folder, size=64, length=32)


@pytest.fixture(scope="module")
def sd35(tmp_path_factory):
    return families.teacher_at(families.write("sd35", tmp_path_factory.mktemp("sd35") / "sd35"))


def test_a_teacher_samples_at_its_pipelines_own_sigmas_at_every_size(flux):
    pipeline = diffusers.FluxPipeline.from_pretrained(flux.folder)
    pipeline.set_progress_bar_config(disable=True)
    for height, width in SIZES:
        scheduler = guided._scheduler(flux, 3, flux.shape_of([width, height]))
        found = sigmas_of(pipeline, height, width, 3, max_sequence_length=32)
        assert scheduler.sigmas.tolist() == pytest.approx(found, abs=1e-6)
    assert scheduler.sigmas[1] > guided._scheduler(flux, 3, flux.shape_of(64)).sigmas[1] + 1e-3


@pytest.mark.parametrize("family", ["flux", "sd35"])
def test_a_shifted_student_samples_alike_in_plain_diffusers(family, request, tmp_path):
    teacher = request.getfixturevalue(family)
    sampler = Euler(shift=SHIFT)
    sampler.check(teacher.network)
    folder = save_pipeline(
        teacher.network,
        teacher,
        tmp_path / "x",
        sampler.scheduler(teacher.network, teacher),
        sampler,
    )
    kind = {"flux": diffusers.FluxPipeline, "sd35": diffusers.StableDiffusion3Pipeline}[family]
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    from_4 = {"output_type": "pt", "num_inference_steps": 3}
    call = {"guidance_scale": 3.5, "max_sequence_length": 32} if family == "flux" else {}
    call |= {} if family == "flux" else {"guidance_scale": 0.0, "sigmas": [1.0, 2 / 3, 1 / 3]}
    back = sampler_of(families.teacher_at(folder).pipeline)
    assert back == sampler
    for height, width in SIZES[:3]:
        shape = teacher.shape_of([width, height])
        expected = sampler.grid(3, student=teacher.network, shape=shape)
        found = sigmas_of(pipeline, height, width, 3, **call)
        assert [*expected, 0.0] == pytest.approx(found, abs=1e-6)
        noise = torch.Generator().manual_seed(4)
        sides = {"height": height, "width": width, "generator": noise}
        picture = pipeline("a star", **sides, **from_4, **call)
        x0 = sampler(teacher, teacher.embed(["a star"]), seeded([4]), shape=shape, steps=3)
        ours = (teacher.pictures(x0) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(ours, picture.images, atol=2e-4, rtol=0)
    plain = Euler().grid(3, student=teacher.network, shape=shape)
    assert plain != pytest.approx(expected, abs=1e-2)


def test_training_levels_move_as_the_samplers_do():
    sampler = Consistency(shift=SHIFT)
    times = Discrete([1.0, 0.75, 0.5, 0.25], [0.25] * 4, shift=SHIFT)
    for shape in ((4, 16, 16), (4, 24, 12), (4, 64, 64)):
        x0 = torch.zeros(400, *shape)
        found = randomness.levels_like(x0, times, 0, torch.Generator().manual_seed(0))
        grid = sampler.grid(4, shape=shape)
        assert sorted(set(found.tolist()), reverse=True) == pytest.approx(grid, abs=1e-6)
        s = math.exp(diffusers_mu(shape[1] * shape[2] // 4))
        assert grid[2] == pytest.approx(s * 0.5 / (1 + (s - 1) * 0.5))
    assert grid[0] == 1
    real = TeacherSamples(levels=[1.0, 0.5], shift=SHIFT, fresh=False)
    toy = tiny.Toy()
    noise = torch.randn(2, *toy.shape, generator=torch.Generator().manual_seed(1))
    later = sampler.shift.of_levels([0.5], noise.shape)[0]
    x0 = toy.x0(noise, torch.ones(2), toy.embed(["", ""]))
    x_t = later * noise + (1 - later) * x0
    expected = toy.x0(x_t, torch.full((2,), later), toy.embed(["", ""]))
    torch.testing.assert_close(real(toy, noise, toy.embed(["", ""]), torch.Generator()), expected)


def diffusers_mu(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return calculate_shift(tokens, *SHIFT.values())


def test_a_shift_that_cannot_be_is_one_sentence(teachers, flux):
    with pytest.raises(ValueError, match=r"sampler\.shift: only the pipelines of FLUX.1, SD3"):
        Consistency(shift={}).check(teachers("unet").network)
    with pytest.raises(ValueError, match=r"sampler\.shift\.patch=1: a token .* is 2 latents"):
        Euler(shift={"patch": 1}).check(flux.network)
    with pytest.raises(ValueError, match=r"sampler\.shift\.base: is no setting of a shift"):
        Consistency(shift={"base": 1})
    with pytest.raises(
        ValueError, match=r"base_image_seq_len=9: must be below max_image_seq_len=8"
    ):
        Discrete([1.0], [1.0], shift={"base_image_seq_len": 9, "max_image_seq_len": 8})


# -- tiles -----------------------------------------------------------------------------------------


def test_a_teacher_encodes_and_decodes_in_the_tiles_of_diffusers(pipelines):
    """The same bits at its own size; for larger pictures those of diffusers' tiling."""
    plain, tiled = (SD(str(pipelines("unet")), tiling=on) for on in (False, True))
    deferred = SD(str(pipelines("unet")), tiling=True, deferred=["vae"])
    pixels = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small, latents = pixels[..., :64, :64], torch.randn(1, 4, 32, 24)
    assert torch.equal(tiled.encode(small), plain.encode(small))
    assert torch.equal(tiled.decode(latents[..., :16, :16]), plain.decode(latents[..., :16, :16]))
    vae = plain.pipeline.vae
    expected = vae.tiled_decode(latents / 0.8).sample
    for teacher in (tiled, deferred):
        assert torch.equal(teacher.decode(latents), expected)
    assert not torch.equal(plain.decode(latents), expected)
    torch.testing.assert_close(tiled.encode(pixels), vae._tiled_encode(pixels)[:, :4] * 0.8)
    latents.requires_grad_(True)
    (gradient,) = torch.autograd.grad(tiled.decode(latents).square().sum(), latents)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((0, 1)) > 0).all()


# -- from prompts to pictures ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_of_several_sizes_is_the_same_in_plain_diffusers(
    command, asked, pipelines, prompts, tmp_path
):
    """Trained on buckets of both kinds, sampled by the command at each size, and by diffusers."""
    teacher = asked[:2]
    made = [*teacher, f"prompts={prompts}", "count=8", "steps=1", "batch_size=8", asked[-2]]
    assert command("synthesize", *made, "out=made")[0] == 0
    usual = [*teacher, "method=regression", "debug=smoke", "data.batch_size=2"]
    usual += ["trainer.precision=32-true", "trainer.accelerator=cpu", "~metrics"]
    sizes = asked[-2].removeprefix("buckets=")
    real = (
        "method.real={_target_: distill.core.score_distillation.TeacherSamples, levels: [1, 0.5],"
        f" fresh: false, buckets: {sizes}, shares: [0, 1, 1]}}"
    )
    for name, words in {
        "before": ["data=synthetic", "data.path=made"],
        "during": ["data=prompts", f"data.path={prompts}", real],
    }.items():
        code, _, err = command("run", *usual, *words, f"run_dir={name}")
        assert code == 0, err
    student = tmp_path / "before" / "student"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        student, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    for width, height in BUCKETS[1:]:
        words = ["prompt=a star", f"size=[{width},{height}]", "steps=2", "seed=3", "dtype=float32"]
        out = f"out={width}"
        code, said, err = command("sample", "run=before", *words, "precision=32-true", out)
        assert code == 0, err
        ours = np.asarray(Image.open(said.split()[-1]), np.int16)
        options = {"width": width, "height": height, "num_inference_steps": 2}
        noise = torch.Generator().manual_seed(3)
        theirs = pipeline("a star", **options, guidance_scale=0.0, generator=noise).images[0]
        assert theirs.size == (width, height)
        assert np.abs(ours - np.asarray(theirs, np.int16)).max() <= 1
