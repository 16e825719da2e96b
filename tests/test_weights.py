"""What is put on a teacher or a student after it is read: whole weights, LoRA, deltas, another
run's student.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import tiny
from distill import students
from distill.config.models import student_of
from distill.data import source
from distill.sampling import Consistency
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3

FAMILIES = {"mmdit": SD3, "unet": SD}


def made(teacher, folder, seed=8):
    """A student's folder, its weights off the teacher's."""
    student = tiny.shake(students.full(teacher), seed)
    return students.save_pipeline(
        student, teacher, folder / "student", Consistency().scheduler(student, teacher)
    )


def weights(pipeline_teacher):
    return pipeline_teacher.network.model.state_dict()


@pytest.mark.parametrize("name", ["whole.safetensors", "whole.bin"])
def test_whole_weights_take_the_place_of_the_teachers(name, teacher, family, pipelines, tmp_path):
    changed = {k: v + 0.5 for k, v in weights(teacher).items()}
    save = save_file if name.endswith("safetensors") else torch.save
    save(changed, tmp_path / name)
    found = weights(FAMILIES[family](str(pipelines(family)), weights=str(tmp_path / name)))
    assert all(torch.equal(found[k], v) for k, v in changed.items())


def test_a_lora_is_fused(teachers, pipelines, tmp_path):
    """W + (alpha / r) B A on the attention's queries, and nothing else."""
    teacher = SD(str(pipelines("unet")))
    before = {k: v.clone() for k, v in weights(teacher).items()}
    teacher.network.model.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    )
    low = {k: v.clone() for k, v in weights(teacher).items() if "lora" in k}
    from peft.utils import get_peft_model_state_dict

    teacher.pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(teacher.network.model)
    )
    (file,) = tmp_path.glob("*.safetensors")
    found = weights(SD(str(pipelines("unet")), weights=str(file)))
    assert found.keys() == before.keys()
    moved = [k for k in before if not torch.allclose(found[k], before[k], atol=1e-6)]
    assert moved
    assert all(".to_q." in k for k in moved)
    for key in moved:
        stem = key.removesuffix(".weight")
        change = low[f"{stem}.lora_B.default.weight"] @ low[f"{stem}.lora_A.default.weight"]
        scale = (found[key] - before[key]).norm() / change.norm()
        torch.testing.assert_close(found[key] - before[key], scale * change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_of_a_lora_the_text_encoder_s_layers_are_left_out(
    naming, teachers, pipelines, tmp_path, caplog
):
    """The student's folder has the text encoder of the teacher's files; and one that is read later
    would lack them.
    """
    base, random = teachers("unet"), torch.Generator().manual_seed(3)

    def low(model, prefix):
        """Factors of rank 2 of every query's matrix."""
        of = {
            n.removesuffix(".weight"): w
            for n, w in model.state_dict().items()
            if n.endswith((".to_q.weight", "q_proj.weight"))
        }
        sides = {
            f"{n}.lora_{s}.weight": (2, w.shape[1]) if s == "A" else (w.shape[0], 2)
            for n, w in of.items()
            for s in "AB"
        }
        return {f"{prefix}.{n}": torch.randn(shape, generator=random) for n, shape in sides.items()}

    unet, text = low(base.network.model, "unet"), low(base.pipeline.text_encoder, "text_encoder")
    assert unet
    assert text
    convert = convert_state_dict_to_kohya if naming == "kohya" else dict
    save_file(convert(unet), tmp_path / "unet.safetensors")
    save_file(convert(unet | text), tmp_path / "both.safetensors")
    alone = SD(str(pipelines("unet")), weights=str(tmp_path / "unet.safetensors"))
    assert "left out" not in caplog.text
    for deferred in ((), ("text_encoder", "vae")):
        found = SD(
            str(pipelines("unet")), weights=str(tmp_path / "both.safetensors"), deferred=deferred
        )
        assert tiny.same(weights(found), weights(alone))
        assert not tiny.same(weights(found), weights(base))
        torch.testing.assert_close(
            found.embed(tiny.CAPTIONS[:2]).tokens, base.embed(tiny.CAPTIONS[:2]).tokens
        )
    assert "both.safetensors: its layers for text encoders are left out" in caplog.text


def test_a_delta_carries_a_student_over(teacher, family, pipelines, tmp_path):
    """Base + delta is the student; another base + delta is as far from it as the bases are from one
    another.
    """
    folder = made(teacher, tmp_path)
    student = FAMILIES[family](str(folder))
    file = students.save_delta(student, teacher, tmp_path / "delta.safetensors")
    again = weights(FAMILIES[family](str(pipelines(family)), weights=str(file)))
    for name, value in weights(student).items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=2e-3)
    other = FAMILIES[family](str(made(teacher, tmp_path / "other", seed=9)))
    expected = {k: v + weights(student)[k] - weights(teacher)[k] for k, v in weights(other).items()}
    kind = type(other.pipeline.scheduler)
    result = FAMILIES[family](str(students.apply_delta(other, file, tmp_path / "both")))
    for name, value in expected.items():
        torch.testing.assert_close(weights(result)[name], value, rtol=1e-2, atol=5e-3)
    assert type(result.pipeline.scheduler) is kind


def test_the_export_command_writes_and_applies_a_delta(
    command, teacher, family, pipelines, tmp_path
):
    folder, base = made(teacher, tmp_path), pipelines(family)
    file = tmp_path / "d.safetensors"
    code, out, _ = command("export", f"run={folder}", "to=delta", f"base={base}", f"out={file}")
    assert code == 0
    assert "d.safetensors" in out
    command(
        "export", f"base={base}", f"delta={tmp_path / 'd.safetensors'}", f"out={tmp_path / 'again'}"
    )
    one, two = (weights(FAMILIES[family](str(path))) for path in (folder, tmp_path / "again"))
    assert all(torch.allclose(two[k], v, rtol=1e-2, atol=5e-3) for k, v in one.items())


def test_a_delta_of_another_network_is_named_by_the_keys_of_the_export(
    command, teachers, pipelines, tmp_path
):
    file = students.save_delta(teachers("unet"), teachers("unet"), tmp_path / "d.safetensors")
    words = [f"delta={file}", f"out={tmp_path / 'again'}"]
    code, _, err = command("export", f"base={pipelines('mmdit')}", *words)
    assert code == 1
    said = err.splitlines()[-1]
    start = f"distill: delta={file}: not of a SD3Transformer2DModel like that of base= ("
    assert said.startswith(start)
    assert said.endswith("; give base=<the teacher of the run that wrote it>")
    assert "teacher" not in said.removesuffix("<the teacher of the run that wrote it>")
    code, _, err = command("export", f"base={pipelines('unet')}", *words)
    assert code == 0, err


def test_a_base_that_is_no_pipeline_of_ours_is_named_by_its_key(command, tmp_path):
    (tmp_path / "other").mkdir()
    index = json.dumps({"_class_name": "WuerstchenPipeline"})
    (tmp_path / "other" / "model_index.json").write_text(index, encoding="utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "d.safetensors")
    code, _, err = command("export", "base=other", "delta=d.safetensors", "out=again")
    assert code == 1
    assert "distill: base=other holds a WuerstchenPipeline; known are " in err


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (5, {}, "names a scheduler 5, which"),
        ("torch", {}, "names a scheduler torch, which"),
        ("SchedulerMixin", {}, "names a scheduler SchedulerMixin, which"),
        ("EulerDiscreteScheduler", None, "its scheduler's settings are None, and must"),
        ("EulerDiscreteScheduler", "evil/repository", "settings are evil/repository, and must be"),
        ("EulerDiscreteScheduler", {"num_train_timesteps": 10**10}, "must be 1 to 100,000"),
        ("EulerDiscreteScheduler", {"beta_start": "x"}, "its scheduler cannot be made ("),
    ],
)
def test_a_scheduler_of_a_strangers_delta_is_named(name, settings, expected, teacher, tmp_path):
    """As a text its settings would be fetched from the hub."""
    file, about = tmp_path / "d.safetensors", {"delta": name, "scheduler": settings}
    save_file({"x": torch.zeros(1)}, file, {"distill": json.dumps(about)})
    with pytest.raises(ValueError, match="delta=.*d.safetensors: ") as caught:
        students.apply_delta(teacher, file, tmp_path / "out")
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_replaced_by_a_delta_s(command, pipelines, tmp_path):
    precious = tmp_path / "mine" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years", encoding="utf-8")
    words = [f"base={pipelines('unet')}", "delta=d.safetensors"]
    code, _, err = command("export", *words, f"out={precious.parent}")
    assert (code, err) == (
        1,
        f"distill: out={precious.parent}: is there already; remove it or name another\n",
    )
    assert precious.read_text(encoding="utf-8") == "years"
    (tmp_path / "d.safetensors.student").mkdir()  # where it would go
    assert "d.safetensors.student: is there already" in command("export", *words)[2]


def test_what_does_not_fit_is_said(pipelines, teachers, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"teacher\.weights=.*not of a UNet2DCond") as caught:
        SD(str(pipelines("unet")), weights=str(tmp_path / "x.safetensors"))
    advice = "; choose the teacher that they are for, or weights of this one"
    assert str(caught.value).endswith(advice)
    with pytest.raises(FileNotFoundError, match=r"teacher\.weights=nowhere: no such file"):
        SD(str(pipelines("unet")), weights="nowhere")
    sides = {"A": (2, 16), "B": (16, 2)}
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    refusals = {  # PEFT's own file without its settings; of another part; of another network
        f"base_model.model.{layer}": "is a file of PEFT's, which keeps the alphas",
        f"text_encoder.{layer}": "none of its layers is one of this UNet2DCondition",
        "unet.single_blocks.0.to_q": "none of its layers is one of this UNet2DCondition",
    }
    for stem, refusal in refusals.items():
        save_file(
            {f"{stem}.lora_{s}.weight": torch.ones(shape) for s, shape in sides.items()},
            tmp_path / "lora.safetensors",
        )
        with pytest.raises(ValueError, match=rf"lora\.safetensors: {refusal}"):
            SD(str(pipelines("unet")), weights=str(tmp_path / "lora.safetensors"))
    for without in ("text_encoder", ["text_encoder3"]):
        with pytest.raises(
            ValueError,
            match=r"teacher\.without=.*must be a list of feature_extractor, .*text_encoder, ",
        ):
            SD(str(pipelines("unet")), without=without)
    with pytest.raises(ValueError, match=r"delta=.*not a file that distill\.export.*; give one$"):
        students.apply_delta(SD(str(pipelines("unet"))), tmp_path / "x.safetensors", tmp_path / "y")
    with pytest.raises(ValueError, match="base: .*has another shape than the student's"):
        students.save_delta(teachers("mmdit"), teachers("unet"), tmp_path / "z")


def test_a_student_may_begin_from_another_run(teacher, family, tmp_path):
    folder = made(teacher, tmp_path)
    for init in (folder, folder.parent):  # the pipeline, and the run that it lies in
        found = students.full(teacher, init=str(init)).model.state_dict()
        assert all(
            torch.equal(found[k], v) for k, v in weights(FAMILIES[family](str(folder))).items()
        )
    with pytest.raises(
        ValueError,
        match=r"student\.init=nothing: must be teacher, random, or a run or pipeline folder",
    ):
        students.full(teacher, init="nothing")


def test_a_student_that_begins_from_one_under_a_timestep_shift_has_it_too(teachers, tmp_path):
    """What was made for t' = 249 must not be told 999."""
    teacher = teachers("unet")
    first = tiny.shake(students.full(teacher, shift=250), 8).eval()
    folder = students.save_pipeline(
        first, teacher, tmp_path / "it", Consistency().scheduler(first, teacher)
    )
    second = students.full(teacher, init=str(folder)).eval()
    x_t, t, cond = torch.randn(1, *teacher.latent_shape), torch.ones(1), teacher.embed(["x"])
    with torch.no_grad():
        assert torch.equal(second.x0(x_t, t, cond), first.x0(x_t, t, cond))
        assert not torch.allclose(
            first.x0(x_t, t, cond), SD(str(folder)).network.with_model(first.model).x0(x_t, t, cond)
        )
    assert (second.shift, students.full(teacher, init=str(folder), shift=500).shift) == (250, 500)
    assert students.full(teacher, init=str(made(teacher, tmp_path / "other"))).shift is None
    with pytest.raises(ValueError, match=r"student\.shift=0: must lie in"):
        students.full(teacher, init=str(folder), shift=0)


def of_another_size(family, teacher, folder):
    """A pipeline folder like the teacher's, with a smaller network."""
    model = teacher.network.model
    smaller = {
        "mmdit": {"num_layers": 1},
        "unet": {"block_out_channels": (16, 32), "norm_num_groups": 8},
    }[family]
    config = {**model.config, **smaller}
    if family == "unet":  # two stages of what are three
        config |= {k: config[k][:2] for k in ("down_block_types", "up_block_types")}
    small = teacher.network.with_model(tiny.shake(type(model).from_config(config), 6))
    return small, students.save_pipeline(
        small, teacher, folder, Consistency().scheduler(small, teacher)
    )


def test_a_student_may_have_another_size(teacher, family, pipelines, tmp_path, shards):
    """It is read, trained, left behind and read again as it is; the teacher stays of its own
    size.
    """
    small, folder = of_another_size(family, teacher, tmp_path / "small")
    method = tiny.ladd(teacher)
    method.student = student = students.full(teacher, init=str(folder))
    method.loop.start_ema(student)
    count, whole = (sum(p.numel() for p in m.parameters()) for m in (student, teacher.network))
    assert count < 0.8 * whole
    assert tiny.same(tiny.weights(student), tiny.weights(small))
    tiny.trainer(tmp_path, 2).fit(method, source.latents(str(shards), batch_size=2).loader(seed=0))
    assert not tiny.same(tiny.weights(student), tiny.weights(small))
    scheduler = Consistency().scheduler(student, teacher)
    loaded = FAMILIES[family](
        str(students.save_pipeline(student, teacher, tmp_path / "student", scheduler))
    )
    assert tiny.same(
        weights(loaded), {k: v.detach() for k, v in student.model.state_dict().items()}
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 8),
        ("joint_attention_dim", 96),
        ("cross_attention_dim", 96),
        ("prediction_type", "v_prediction"),
    ],
)
def test_a_student_that_cannot_read_what_its_teacher_reads_is_refused(
    key, value, teacher, family, pipelines, tmp_path
):
    part = "transformer" if family == "mmdit" else "unet"
    file = f"{part}/config.json" if key != "prediction_type" else "scheduler/scheduler_config.json"
    shutil.copytree(pipelines(family), tmp_path / "other")
    config = json.loads((tmp_path / "other" / file).read_text(encoding="utf-8"))
    if key not in config:
        pytest.skip("a setting of the other family")
    (tmp_path / "other" / file).write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"student\.init=.*: its {key} is {value} and the teacher's is"
    ):
        students.full(teacher, init=str(tmp_path / "other"))


def test_a_student_of_which_something_is_missing_is_refused(teacher, tmp_path):
    folder = made(teacher, tmp_path)
    (file,) = (folder / students.denoiser_part(folder)).glob("*.safetensors")
    state = load_file(file)
    gone = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"student\.init=.*: \w+/ lacks {gone} of its "):
        students.full(teacher, init=str(folder))
    save_file(state | {"one.more": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"student\.init=.*: \w+/ holds one\.more, for which its "):
        students.full(teacher, init=str(folder))


def test_a_student_of_a_variant_opens_without_being_told(family, pipelines, tmp_path):
    shutil.copytree(pipelines(family), tmp_path / "half")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    teacher = FAMILIES[family](str(tmp_path / "half"), variant="fp16")
    pipeline = AutoPipelineForText2Image.from_pretrained(made(teacher, tmp_path))
    opened = (getattr(pipeline, "transformer", None) or pipeline.unet).state_dict()
    assert tiny.same(opened, tiny.weights(tiny.shake(students.full(teacher), 8).model))
    for name in ("vae", "text_encoder"):
        assert tiny.same(
            getattr(pipeline, name).state_dict(), getattr(teacher.pipeline, name).state_dict()
        )


def test_a_folder_of_one_variant_alone_is_read(family, pipelines, tmp_path):
    """As people fetch it: `*.fp16.safetensors`, and nothing else; a student may begin from it,
    too.
    """
    folder = shutil.copytree(pipelines(family), tmp_path / "half")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    found, expected = (FAMILIES[family](str(path)) for path in (folder, pipelines(family)))
    assert tiny.same(found.state_dict(), expected.state_dict())
    init = students.full(expected, init=str(folder)).model.state_dict()
    assert all(torch.equal(init[k], v) for k, v in weights(expected).items())
    for file in (folder / "vae").glob("*.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("fp16", "bf16")))
    what = r"vae/ has weights of variants alone; choose one by teacher\.variant=bf16 or "
    with pytest.raises(ValueError, match=rf"{what}teacher\.variant=fp16$"):
        FAMILIES[family](str(folder))


def test_plain_weights_are_read_where_the_variant_of_a_family_is_not(pipelines):
    """`teacher=sana` asks for bf16, as the hub has it; a fine-tune's folder may have plain weights
    alone.
    """
    found = SD(str(pipelines("unet")), variant="bf16")
    assert tiny.same(found.state_dict(), SD(str(pipelines("unet"))).state_dict())


def test_another_variant_than_the_one_that_was_asked_for_is_not_read(pipelines, tmp_path):
    folder = shutil.copytree(pipelines("unet"), tmp_path / "half")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match=r"text_encoder/ does not load .*bf16"):
        SD(str(folder), variant="bf16")


@pytest.mark.parametrize("init", ["teacher", "folder"])
def test_a_student_says_the_size_that_it_was_trained_at(init, teachers, pipelines, tmp_path):
    """Its folder, to plain diffusers and to us; whatever the network that it begins from said of
    itself.
    """
    teacher = SD(str(pipelines("unet")), size=96)
    assert (teachers("unet").latent_shape, teacher.latent_shape) == ((4, 16, 16), (4, 24, 24))
    student = students.full(teacher, init=init if init == "teacher" else str(pipelines("unet")))
    scheduler = Consistency().scheduler(student, teacher)
    folder = students.save_pipeline(student, teacher, tmp_path / "student", scheduler)
    assert student_of(str(folder)).latent_shape == (4, 24, 24)
    pipeline = AutoPipelineForText2Image.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("x", num_inference_steps=1, guidance_scale=0.0).images[0].size == (96, 96)
    with pytest.raises(
        ValueError,
        match=r"teacher\.size=98: must be a side, or \[width,height\], in multiples of 4",
    ):
        SD(str(pipelines("unet")), size=98)


def test_a_transformer_keeps_the_size_that_its_positions_hang_on(teachers, tmp_path):
    folder, teacher = made(teachers("mmdit"), tmp_path), teachers("mmdit")
    said = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))[
        "sample_size"
    ]
    assert said == teacher.network.model.config.sample_size


def test_parts_that_were_not_fetched_are_not_named(pipelines, tmp_path):
    """Of the hub's SD 1.5 neither safety checker nor feature extractor is here, and its index names
    both.
    """
    snapshot = shutil.copytree(pipelines("unet"), tmp_path / "snapshot")
    index = json.loads((snapshot / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (snapshot / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    folder = made(SD(str(snapshot)), tmp_path)
    found = AutoPipelineForText2Image.from_pretrained(folder).components
    assert found["safety_checker"] is found["feature_extractor"] is None
    assert all(
        found[name] is not None
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    )
    said = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert said.keys() == {*index, "_distill"}


def test_a_student_of_another_family_is_refused(teachers, pipelines):
    with pytest.raises(
        ValueError,
        match=r"student\.init=.*: its \w+ is .* start from a pipeline of the teacher's family",
    ):
        students.full(teachers("sdxl"), init=str(pipelines("unet")))


def test_prompts_are_lines_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(
        "\ufeffa\r\n\r\n b \u2028 d\r\nc\r\n".encode()
    )  # Notepad's
    loader = source.prompts(str(tmp_path / "prompts.txt"), batch_size=3).loader(seed=0)
    batch = next(iter(loader))
    assert sorted(batch["caption"]) == ["a", "b \u2028 d", "c"]
    for path, what in (
        (tmp_path / "none.txt", "no such file; check the path"),
        (tmp_path / "blank.txt", "no line that is not blank"),
    ):
        (tmp_path / "blank.txt").write_text("\n", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"data\.path=.*{what}"):
            source.prompts(str(path), batch_size=1)


def broken(name, folder, state):
    """A file of weights of this name: cut short, a page of a server's, with an object in it, or no
    weights.
    """
    file = folder / name
    if name == "cut.safetensors":
        save_file(state, file)
        file.write_bytes(file.read_bytes()[:1000])
    elif name == "page.safetensors":
        file.write_bytes(b"<html>404</html>")
    else:
        torch.save({"object.ckpt": {"state_dict": Path("x")}, "list.pt": [1, 2]}[name], file)
    return file


@pytest.mark.parametrize("name", ["cut.safetensors", "page.safetensors", "object.ckpt", "list.pt"])
def test_a_damaged_file_is_one_line(name, teachers, pipelines, command, tmp_path):
    file = broken(name, tmp_path, weights(teachers("unet")))
    words = ["teacher=sd15", f"teacher.path={pipelines('unet')}", f"teacher.weights={file}"]
    code, _, err = command("run", *words, "debug=smoke", f"run_dir={tmp_path / 'run'}")
    assert code == 1
    assert f"teacher.weights={file}: cannot be read as weights (" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_a_trainer_s_is_read(teacher, family, pipelines, tmp_path):
    """Its weights stand under `state_dict`, beside numbers."""
    changed = {k: v + 0.5 for k, v in weights(teacher).items()}
    torch.save({"state_dict": changed, "epoch": 3}, tmp_path / "a.ckpt")
    found = weights(FAMILIES[family](str(pipelines(family)), weights=str(tmp_path / "a.ckpt")))
    assert all(torch.equal(found[k], v) for k, v in changed.items())


def test_a_damaged_delta_is_one_line(pipelines, command, tmp_path):
    file = broken("page.safetensors", tmp_path, {})
    code, _, err = command("export", f"base={pipelines('unet')}", f"delta={file}", "out=out")
    assert code == 1
    assert f"delta={file}: cannot be read as weights (" in err
    assert "Traceback" not in err
