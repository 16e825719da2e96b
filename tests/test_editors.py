"""Editing teachers and their students, each against its own pipeline in diffusers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from omegaconf import OmegaConf
from PIL import Image

import cards
import families
import tiny
from distill.config.models import student_of
from distill.core.score_distillation import guided_x0
from distill.core.types import Cond
from distill.data.datasets import LatentShards
from distill.data.source import pairs as source_pairs
from distill.data.write import write_pairs
from distill.exporting.card import write_card
from distill.sampling import Consistency, seeded
from distill.sampling.guided import guided
from distill.students import full, save_pipeline
from distill.teachers.sd import SD
from distill.worlds.shapes.edit_judge import rendered
from distill.worlds.shapes.edits import sample_edit
from distill.worlds.shapes.pretraining.editing import with_source
from distill.worlds.shapes.render import render
from families import EDITORS, opened

EDITS = [sample_edit(4, i) for i in range(2)]
ORDERS = [edit.instruction for edit in EDITS]
SOURCE = rendered([edit.source for edit in EDITS])
SEED = 3
BOTH = {"guidance_scale": 5.0, "image_guidance_scale": 1.7}
each = pytest.mark.parametrize("family", EDITORS)


@pytest.fixture
def folders(family_folders):
    return family_folders


@pytest.fixture
def teachers(family_teachers):
    return family_teachers


def sized(family):
    return {"height": tiny.SIDE, "width": tiny.SIDE} if family.endswith("xl") else {}


def conditioned(teacher) -> Cond:
    return replace(teacher.embed(ORDERS), image=teacher.image_of({"source": SOURCE}))


def noise(seed=0):
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@each
def test_what_is_read_beside_the_sample_is_the_source_unscaled(family, teachers):
    teacher = teachers(family)
    assert (teacher.image_channels, teacher.latent_shape) == (4, (4, 16, 16))
    image = teacher.image_of({"source": SOURCE})
    torch.testing.assert_close(image * teacher.vae.config.scaling_factor, teacher.encode(SOURCE))
    assert torch.equal(teacher.image_of({"image": image.half()}), image.half().float())
    with pytest.raises(ValueError, match="^this teacher edits pictures, and these data have no"):
        teacher.image_of({"pixels": SOURCE})


@each
def test_three_passes_are_one_guided_step_of_the_pipeline(family, teachers, folders):
    pipeline, teacher, x_t = opened(folders(family)), teachers(family), noise()
    seen, step = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda output, index, x, **o: (
        seen.append((int(index), output)) or step(output, index, x, **o)
    )
    options = {"num_inference_steps": 1, "output_type": "latent", **BOTH, **sized(family)}
    pipeline(ORDERS, image=SOURCE, latents=x_t.clone(), **options)
    ((index, eps),) = seen
    t = teacher.process.time(torch.tensor([index] * 2))
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, conditioned(teacher), 5.0, 1.7)
        by_caption = guided_x0(teacher, x_t, t, conditioned(teacher), 5.0)
    expected = teacher.process.to_x0(eps, x_t, t, "eps")
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    assert (by_caption - expected).abs().max() > 1e-3 * scale


@each
def test_guidance_by_the_source_at_one_is_guidance_by_the_caption(family, teachers):
    teacher, x_t, t = teachers(family), noise(), torch.tensor([0.9, 0.4])
    cond = conditioned(teacher)
    with torch.no_grad():
        two = guided_x0(teacher, x_t, t, cond, 5.0)
        three = guided_x0(teacher, x_t, t, cond, 5.0, 1.0 + 1e-12)
    torch.testing.assert_close(three, two, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"^image_guidance=2: is for a teacher that edits; leave"):
        guided_x0(teacher, x_t, t, teacher.embed(ORDERS), 5.0, 2.0)


@each
def test_many_guided_steps_are_those_of_the_pipeline(family, teachers, folders):
    pipeline, teacher = opened(folders(family)), teachers(family)
    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(
        config, timestep_spacing="trailing", clip_sample=False
    )
    options = {"num_inference_steps": 3, "output_type": "latent", **BOTH, **sized(family)}
    expected = pipeline(ORDERS, image=SOURCE, generator=seeded([3, 4]), **options).images
    scales = {"guidance": 5.0, "image_guidance": 1.7}
    settings = {"shape": teacher.latent_shape, "steps": 3, **scales}
    found = guided(teacher, conditioned(teacher), seeded([3, 4]), **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@each
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_gives_our_pixels_in_the_same_pipeline(family, steps, teachers, tmp_path):
    teacher = teachers(family)
    student = tiny.shake(full(teacher), 9, std=0.03).eval()
    scheduler = Consistency().scheduler(student, teacher)
    save_pipeline(student, teacher, tmp_path / "student", scheduler)
    pipeline, read = opened(tmp_path / "student"), student_of(str(tmp_path / "student"))
    assert type(pipeline).__name__ == teacher.kind.__name__
    with torch.no_grad():
        options = {"shape": read.latent_shape, "steps": steps}
        latents = Consistency()(read, conditioned(read), seeded([3, 4]), **options)
        found = read.decode(latents)
    call = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "pt"}
    made = pipeline(ORDERS, image=SOURCE, generator=seeded([3, 4]), **call, **sized(family)).images
    torch.testing.assert_close(made, (found / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@each
def test_gradient_reaches_the_sample_and_the_source_is_seen(family, teachers):
    teacher, x_t = teachers(family), noise().requires_grad_()
    cond, t = conditioned(teacher), torch.tensor([0.9, 0.4])
    for found in teacher.features(x_t, t, cond, teacher.blocks):
        assert torch.autograd.grad(found.sum(), x_t, retain_graph=True)[0].abs().max() > 0
    other = Cond.cat([cond.index(torch.tensor([1])), cond.index(torch.tensor([0]))])
    with torch.no_grad():
        swapped = Cond(**{**cond.tensors(), "image": other.image}, null=cond.null)
        assert (teacher.x0(x_t, t, cond) - teacher.x0(x_t, t, swapped)).abs().max() > 1e-3


# -- runs ------------------------------------------------------------------------------------------

LADD = ["method=ladd", "debug=smoke", "~metrics", "teacher=instruct_pix2pix"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")

    def samples():
        for i in range(8):
            edit = sample_edit(0, i)
            source, target = render([edit.source, edit.target])
            yield f"{i:06d}", source, target, edit.instruction, {"task": edit.task}

    write_pairs(f"{folder}/edits-%06d.tar", samples(), 8)
    return folder


def test_a_run_on_pairs_leaves_an_editor_that_samples(command, folders, pairs, tmp_path):
    words = [*LADD, f"teacher.path={folders('instruct_pix2pix')}", "data=pairs"]
    words += [f"data.path={pairs}", "data.size=64", "data.num_workers=0", "method.distill_weight=1"]
    words += ["method.distill.guidance=4", "method.distill.image_guidance=1.5"]
    code, _, err = command("run", *words, f"run_dir={tmp_path / 'run'}")
    assert code == 0, err
    index = json.loads(
        (tmp_path / "run" / "student" / "model_index.json").read_text(encoding="utf-8")
    )
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    Image.fromarray(render([EDITS[0].source])[0]).save(tmp_path / "source.png")
    ask = [f"run={tmp_path / 'run'}", "prompt=make it red", "out=drawn", "seed=3"]
    ask.append("precision=32-true")  # as the pipeline, on every machine
    code, out, err = command("sample", *ask, f"image={tmp_path / 'source.png'}")
    assert code == 0, err
    made = np.asarray(Image.open(out.strip()))
    pipeline = opened(tmp_path / "run" / "student")
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": seeded([3])}
    expected = pipeline(["make it red"], image=SOURCE[:1], output_type="np", **options).images[0]
    assert np.abs(made / 255.0 - expected).max() < 0.003
    code, _, err = command("sample", *ask)
    assert code == 1
    assert f"image: not given, and run={tmp_path / 'run'} edits a picture; add image=" in err


def test_guidance_by_the_source_may_be_zero(command, folders, tmp_path):
    """0 leaves the source out, 1 guides by the caption alone: they are different pictures."""
    Image.fromarray(render([EDITS[0].source])[0]).save(tmp_path / "source.png")
    ask = [f"run={folders('instruct_pix2pix')}", "prompt=a", f"image={tmp_path / 'source.png'}"]
    made = []
    for scale in (0, 1):
        more = ["guidance=5", f"image_guidance={scale}", "steps=1", f"out=by_{scale}"]
        code, out, err = command("sample", *ask, *more)
        assert code == 0, err
        made.append(np.asarray(Image.open(out.strip())))
    assert (made[0] != made[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ("edit_shapes", ["data=pairs"]),
        ("inpaint_shapes", ["data=images", "data.max_empty_share=1"]),
    ],
)
def test_an_experiment_of_renders_takes_data_of_files(experiment, words, command, pairs, tmp_path):
    path = pairs if experiment == "edit_shapes" else tiny.write_pictures(tmp_path / "own", 4)
    words = [f"experiment={experiment}", *words, f"data.path={path}", "data.num_workers=0"]
    words += ["debug=smoke", f"run_dir={tmp_path / 'run'}"]
    code, _, err = command("run", *words)
    assert code == 0, err
    data = OmegaConf.load(tmp_path / "run" / "config.yaml").data
    assert "reader" not in data
    assert data.size == 64


OF_SIZES = [
    (["experiment=edit_shapes", "data.size=96"], 14, (96, 96)),
    (["experiment=inpaint_shapes", "data.size=96"], 16, (96, 96)),
    (["experiment=edit_shapes", "data=pairs", "data.buckets=[[64,48]]"], 8, (64, 48)),
    (
        [
            *("experiment=inpaint_shapes", "data=images", "data.max_empty_share=1"),
            "data.buckets=[[64,48],[48,64]]",
        ],
        3,  # of six those in the first one's bucket
        (48, 64),
    ),
]


@pytest.mark.parametrize(("words", "count", "sides"), tiny.tiered(OF_SIZES, slow=OF_SIZES[1:3]))
def test_sample_pictures_have_the_size_of_the_data(words, count, sides, command, pairs, tmp_path):
    """The pictures beside them are read in that size, which need not be the teacher's."""
    if "data=pairs" in words:
        words = [*words, f"data.path={pairs}"]
    if "data=images" in words:
        (folder := tmp_path / "own").mkdir()
        for i in range(6):  # of both buckets
            size = (80, 60) if i % 2 else (60, 80)
            Image.new("RGB", size, (40 * i, 99, 20)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
        words = [*words, f"data.path={folder}"]
    run = tmp_path / "run"
    words = [*words, "debug=smoke", "data.num_workers=0", f"run_dir={run}"]
    code, _, err = command("run", *words)
    assert code == 0, err
    captions = (run / "samples" / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert len(captions) == count
    with Image.open(max((run / "samples").glob("step_*.png"))) as drawn:
        wide, high = min(count, 8), -(-count // 8)
        assert drawn.size == (wide * (sides[0] + 2) + 2, high * (sides[1] + 2) + 2)


@pytest.mark.slow
def test_preferences_beside_an_experiment_may_be_renders(command, tmp_path):
    """Its own data have a path that must be given, and renders have none."""
    words = ["experiment=dpo_lora_shapes", "data=renders", "data.pairs=true", "debug=smoke"]
    code, _, err = command("run", *words, f"run_dir={tmp_path / 'run'}")
    assert code == 0, err


def test_a_key_of_no_option_of_data_is_still_refused(command, pairs, tmp_path):
    words = ["experiment=edit_shapes", "data=pairs", f"data.path={pairs}", "+data.reader.seed=2"]
    code, _, err = command("run", *words)
    assert code == 1
    assert "data.reader" in err


def test_pretraining_names_the_folder_with_the_pairs_that_it_made(command, tmp_path):
    out = tmp_path / "made"
    code, said, err = command("pretrain", "stages=edits", "edit_pairs.count=2", f"out={out}")
    assert code == 0, err
    assert said.splitlines()[-1] == f"edit pairs: {out / 'edits'}"
    assert "models:" not in said


@pytest.mark.slow
def test_latents_of_pairs_are_those_of_the_pictures_and_train(command, folders, pairs, tmp_path):
    teacher = ["teacher=instruct_pix2pix", f"teacher.path={folders('instruct_pix2pix')}"]
    words = [*teacher, "data=pairs", f"data.path={pairs}", "data.size=64", "data.num_workers=0"]
    code, _, err = command("cache", *words, f"out={tmp_path / 'cached'}")
    assert code == 0, err
    item = LatentShards(str(tmp_path / "cached"))[0]
    model = families.teacher_at(folders("instruct_pix2pix"))
    edit = sample_edit(0, 0)
    source, target = (rendered([scene]) for scene in (edit.source, edit.target))
    with torch.no_grad():
        torch.testing.assert_close(
            item["image"], model.image_of({"source": source})[0], rtol=1e-2, atol=1e-3
        )
        torch.testing.assert_close(item["x0"], model.encode(target)[0], rtol=1e-2, atol=1e-3)
    assert item["caption"] == edit.instruction
    run = [*LADD, *teacher[1:], "data=latents", "data.num_workers=0"]
    words = [*run, f"data.path={tmp_path / 'cached'}", f"run_dir={tmp_path / 'run'}"]
    code, _, err = command("run", *words)
    assert code == 0, err


@pytest.mark.slow
def test_a_smoke_run_of_an_editor_needs_no_data(command, folders, tmp_path):
    words = [*LADD, f"teacher.path={folders('instruct_pix2pix')}", f"run_dir={tmp_path / 'run'}"]
    code, _, err = command("run", *words)
    assert code == 0, err
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert config.data.reader._target_ == "distill.worlds.shapes.scenes.Edits"


def test_pairs_for_no_editor_and_an_editor_without_pairs_are_refused(
    command, folders, pairs, pipelines, shards, tmp_path
):
    code, _, err = command("run", "method=ladd", "data=pairs", f"data.path={pairs}")
    assert code == 1
    said = "data: edit pairs are for a model that edits, and a StableDiffusion3Pipeline is a text-"
    assert said in err
    pictures = tiny.write_pictures(tmp_path / "pictures", 4)
    words = [*LADD, f"teacher.path={folders('instruct_pix2pix')}"]
    code, _, err = command("run", *words, "data=images", f"data.path={pictures}")
    assert code == 1
    assert "these data have no source pictures; give edit pairs by data=pairs" in err
    code, _, err = command("run", *words, "data=latents", f"data.path={shards}")
    assert code == 1
    assert "this teacher edits, and these latents have no source pictures; make them by" in err
    words = [*LADD, f"teacher.path={pipelines('unet')}"]
    code, _, err = command("run", *words, "data=pairs", f"data.path={pairs}", "data.size=64")
    assert code == 1
    assert "StableDiffusionPipeline" in err
    assert err.count("\n") <= 2


def test_added_channels_start_as_the_model_of_text_to_image(pipelines):
    base = SD(str(pipelines("unet")))
    net, x, t = with_source(base.pipeline.unet), noise(), torch.tensor([700, 300])
    tokens = base.embed(ORDERS).tokens
    with torch.no_grad():
        expected = base.pipeline.unet(x, t, encoder_hidden_states=tokens).sample
        for image in (torch.zeros_like(x), noise(1)):
            found = net(torch.cat([x, image], 1), t, encoder_hidden_states=tokens).sample
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_an_editing_teacher_of_shapes_is_made(command, pipelines, tmp_path):
    out = tmp_path / "made"
    words = [f"out={out}", "stages=[edits,unet_edit]", "edit_pairs.count=40", "scoring.prompts=8"]
    words += ["unet_edit.steps=3", "unet_edit.batch_size=4", "scoring.steps=2"]
    words += ["scoring.guidance=[3.0]", f"networks.unet_edit.start={pipelines('unet')}"]
    code, _, err = command("pretrain", *words)
    assert code == 0, err
    stage = json.loads((out / "pretraining.json").read_text(encoding="utf-8"))["stages"][
        "unet_edit"
    ]
    assert set(stage["edits"]) == {f"2 steps, guidance 3 and {s}" for s in ("1", "1.5")}
    model = families.teacher_at(out / "models" / "unet_edit")
    assert model.image_channels == 4
    weight = model.network.model.conv_in.weight
    assert weight[:, 4:].abs().max() > 0
    assert len(source_pairs(str(out / "edits"), size=64, batch_size=1).dataset) == 40


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", ["instruct_pix2pix", "flux_kontext"])
def test_the_card_s_code_edits_as_we_do(family, steps, teachers, tmp_path):
    teacher = teachers(family)
    student = tiny.shake(full(teacher), 21, std=0.03).eval()
    scheduler = Consistency().scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler)
    text = write_card(folder, tmp_path).read_text(encoding="utf-8")
    assert "pipeline_tag: image-to-image" in text
    source = tmp_path / "source.png"
    Image.fromarray(render([EDITS[0].source])[0]).save(source)
    found = cards.drawn(folder, ORDERS[0], steps=steps, seed=SEED, source=source)
    cond = conditioned(teacher).index(slice(1))
    with torch.no_grad():
        x0 = Consistency()(student, cond, seeded([SEED]), shape=teacher.latent_shape, steps=steps)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (255 * (found - expected)).abs().max() <= 1.01
