"""What the files of an ordinary-looking folder say that makes it another model: heeded, or refused
before weights.
"""

from __future__ import annotations

import functools
import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import tiny
from distill.config.models import student_of
from distill.core.score_distillation import guided_x0
from distill.core.types import Cond
from distill.sampling import Consistency, draw_noise, seeded
from distill.students import full, save_pipeline
from distill.teachers.pixart import PixArtSigma
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from distill.teachers.sdxl import SDXL

EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
FLOW = {  # as flow fine-tunes of SDXL have it in diffusers
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 2.5,
}


def changed(folder, part, **terms):
    """Write these into the configuration of a part."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = folder / part / name
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(said | terms), encoding="utf-8")
    return folder


def scheduled(folder, terms):
    """A folder whose scheduler is another one, in its index too."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", terms["_class_name"]]
    file.write_text(json.dumps(index), encoding="utf-8")
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(terms), encoding="utf-8")
    return folder


@pytest.fixture
def copied(pipelines, tmp_path):
    return lambda family: shutil.copytree(pipelines(family), tmp_path / family)


@pytest.fixture
def said(command, shards, monkeypatch, tmp_path):
    """The one sentence of a run that must end before weights are read, and leave nothing."""
    for family in (SD3, SD, SDXL):

        @functools.wraps(family.__init__)
        def read(*args, **keys):
            pytest.fail("weights were read")

        monkeypatch.setattr(family, "__init__", read)

    def call(folder, teacher):
        words = [f"teacher={teacher}", f"teacher.path={folder}", f"data.path={shards}"]
        run = tmp_path / "run"
        code, _, err = command("run", "debug=smoke", "~metrics", *words, f"run_dir={run}")
        (line,) = [line for line in err.splitlines() if line.startswith("distill: ")]
        assert (code, run.exists()) == (1, False)
        assert "Traceback" not in err
        return line.removeprefix("distill: ")

    return call


@pytest.mark.parametrize(
    ("family", "part", "terms", "what"),
    [
        ("unet", "unet", {"in_channels": 9}, "its unet/ reads 9 channels and a text-to-image"),
        ("sdxl", "unet", {"in_channels": 8}, "its unet/ reads 8 channels and a text-to-image"),
        ("mmdit", "transformer", {"in_channels": 33}, "its transformer/ reads 33 channels and a"),
        ("unet", "unet", {"time_cond_proj_dim": 256}, "its unet/ has time_cond_proj_dim=256: it"),
        (
            "unet",
            "unet",
            {"num_class_embeds": 7},
            "its unet/ has num_class_embeds=7: it is conditioned on classes",
        ),
        ("sdxl", "unet", {"encoder_hid_dim_type": "ip_image_proj"}, "its unet/ has encoder_hid_d"),
        ("sdxl", "unet", {"addition_embed_type": "text"}, "its unet/ has addition_embed_type=tex"),
        ("unet", "vae", {"latents_mean": [0.0], "latents_std": [1.0]}, "its vae/ has latents_mean"),
        ("unet", "scheduler", EDM, "its scheduler is an EDMEulerScheduler, and networks trained"),
        ("unet", "scheduler", {"prediction_type": "noise"}, "its scheduler (DDIMScheduler) says "),
        ("unet", "scheduler", {"use_flow_sigmas": True}, "its scheduler (DDIMScheduler) says pre"),
        (
            "mmdit",
            "scheduler",
            {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
            "its scheduler (DDIMScheduler) says prediction_type=epsilon, and its network predicts",
        ),
    ],
)
def test_another_model_in_a_plain_folder_is_refused(family, part, terms, what, said, copied):
    teacher = {"unet": "sd15", "sdxl": "sdxl", "mmdit": "sd3"}[family]
    folder = changed(copied(family), part, **terms)
    assert said(folder, teacher).startswith(f"teacher.path={folder}: {what}")


def test_a_scheduler_that_cannot_be_made_is_one_line(copied):
    folder = changed(copied("unet"), "scheduler", beta_schedule="nothing")
    with pytest.raises(ValueError, match=r"^teacher\.path=.* does not load as a Stable") as caught:
        SD(str(folder))
    assert "\n" not in str(caught.value)
    bare = scheduled(folder, {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000})
    with pytest.raises(ValueError, match=r"its scheduler is a IPNDMScheduler, which has no table"):
        SD(str(bare))


# -- UNets that predict a flow ---------------------------------------------------------------------


@pytest.mark.parametrize("terms", [FLOW, {"_class_name": "FlowMatchEulerDiscreteScheduler"}])
@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_a_unet_that_predicts_a_flow(family, terms, copied):
    """x0 = x_t - t v(x_t, 1000 t), and its network is told of nothing else."""
    teacher = families.teacher_at(scheduled(copied(family), terms))
    assert (teacher.prediction, type(teacher.process).__name__) == ("flow", "RectifiedFlow")
    cond, t = teacher.embed(tiny.CAPTIONS[:2]), torch.tensor([0.9, 0.3])
    x_t = torch.randn(2, *teacher.latent_shape)
    told = {}
    if family == "sdxl":
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        told = {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": sizes}}
    with torch.no_grad():
        v = teacher.pipeline.unet(x_t, 1000 * t, encoder_hidden_states=cond.tokens, **told).sample
        expected = x_t - t.view(-1, 1, 1, 1) * v
        torch.testing.assert_close(teacher.x0(x_t, t, cond), expected)


def test_a_step_of_a_flow_on_sdxl_is_the_pipeline_s(copied):
    """To 1e-3: UniPC's first sigma is .9996, and it tells the network 999."""
    folder = scheduled(copied("sdxl"), FLOW | {"final_sigmas_type": "zero"})
    teacher = SDXL(str(folder))
    noise = draw_noise(teacher.latent_shape, seeded([5]))
    with torch.no_grad():
        cond, scale = teacher.embed(tiny.CAPTIONS[:1]), torch.tensor(3.0)
        ours = guided_x0(teacher, noise, torch.tensor([0.999]), cond, scale)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    theirs = pipe(tiny.CAPTIONS[0], generator=generator, **options).images
    assert (ours - theirs).norm() / theirs.norm() < 2e-3
    assert (noise - theirs).norm() / theirs.norm() > 0.1


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_a_flow_s_student_is_drawn_by_plain_diffusers(family, steps, copied, tmp_path):
    teacher = families.teacher_at(scheduled(copied(family), FLOW))
    student = tiny.shake(full(teacher), 21, std=0.03).eval()
    scheduler = Consistency().scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(5)
    picture = pipe(tiny.CAPTIONS[0], generator=generator, **options).images[0]
    again = student_of(str(folder))
    assert again.prediction == "flow"
    with torch.no_grad():
        cond, how = again.embed(tiny.CAPTIONS[:1]), {"shape": again.latent_shape, "steps": steps}
        expected = (again.decode(Consistency()(again, cond, seeded([5]), **how)) / 2 + 0.5)[0]
    expected = expected.clamp(0, 1).permute(1, 2, 0)
    assert (torch.from_numpy(picture) - expected).abs().max() < 2e-3


def test_a_student_does_not_begin_from_one_that_predicts_something_else(copied, teachers, tmp_path):
    flow = SD(str(scheduled(copied("unet"), FLOW)))
    student = full(flow).eval()
    scheduler = Consistency().scheduler(student, flow)
    folder = save_pipeline(student, flow, tmp_path / "student", scheduler)
    what = "its prediction_type is flow_prediction and the teacher's is epsilon"
    with pytest.raises(ValueError, match=rf"student\.init=.*: {what}"):
        full(teachers("unet"), init=str(folder))
    assert full(flow, init=str(folder)).prediction == "flow"


def test_pixart_on_a_flow(tmp_path):
    folder = scheduled(families.write("pixart", tmp_path / "pixart"), FLOW)
    teacher = PixArtSigma(str(folder))
    assert teacher.prediction == "flow"
    cond, t = teacher.embed(["x"]), torch.tensor([0.5])
    x_t = torch.randn(1, *teacher.latent_shape)
    with torch.no_grad():
        v = teacher.network.predict(x_t, t, cond)
        torch.testing.assert_close(teacher.x0(x_t, t, cond), x_t - 0.5 * v)


def test_a_unet_that_projects_its_captions_says_how_wide_they_are(teachers):
    """Not `cross_attention_dim`, which is their width behind the projection."""
    net = teachers("unet").network
    width = net.caption_width
    assert width == teachers("unet").embed(["x"]).tokens.shape[-1]
    config = dict(net.model.config) | {"encoder_hid_dim": 7, "encoder_hid_dim_type": "text_proj"}
    projecting = net.with_model(type(net.model).from_config(config))
    assert projecting.caption_width == 7
    tokens = torch.zeros(1, 3, 7)
    x_t, t = torch.zeros(1, *teachers("unet").latent_shape), torch.ones(1)
    assert projecting.x0(x_t, t, Cond(tokens)).shape == x_t.shape


# -- UNets without a middle ------------------------------------------------------------------------


def without_middle(folder):
    """As BK-SDM and Segmind-Vega are: the middle block's weights are not there either."""
    changed(folder, "unet", mid_block_type=None)
    (file,) = (folder / "unet").glob("*.safetensors")
    state = {k: v for k, v in load_file(file).items() if not k.startswith("mid_block.")}
    save_file(state, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "method"),
    [("unet", "ladd"), pytest.param("sdxl", "nitrofusion", marks=pytest.mark.slow)],
)
def test_a_unet_without_a_middle_is_distilled(family, method, copied, command, shards, tmp_path):
    folder = without_middle(copied(family))
    teacher = families.teacher_at(folder)
    assert "mid" not in teacher.channels
    assert teacher.blocks == ["down0", "down1", "up0", "up1"]
    assert "mid" not in teacher.encoder
    words = [f"teacher={'sd15' if family == 'unet' else 'sdxl'}", f"teacher.path={folder}"]
    words += [f"method={method}", "~metrics", f"data.path={shards}", "teacher.dtype=float32"]
    code, _, err = command("run", "debug=smoke", *words, f"run_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert student_of(str(tmp_path / "run")).pipeline.unet.mid_block is None


# -- autoencoders ----------------------------------------------------------------------------------


def test_latents_of_an_autoencoder_with_mean_and_spread_are_the_pipeline_s(copied):
    """Playground's formula, decode x std / scale + mean, for SDXL's pipeline reads it."""
    mean, std = [-1.6, 1.1, 0.4, 0.2], [8.4, 6.3, 5.2, 4.4]
    folder = changed(copied("sdxl"), "vae", latents_mean=mean, latents_std=std)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    drawn = {
        kind: pipe("x", generator=torch.Generator().manual_seed(3), output_type=kind, **options)
        for kind in ("latent", "np")
    }
    teacher, plain = SDXL(str(folder)), SDXL(str(changed(folder, "vae", latents_mean=None)))
    with torch.no_grad():
        found = (teacher.decode(drawn["latent"].images) / 2 + 0.5).clamp(0, 1)
        expected = torch.from_numpy(drawn["np"].images).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        own = plain.vae.encode(pixels := torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist.mode()
        column = [torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std)]
        encoded = (own - column[0]) * plain.vae.config.scaling_factor / column[1]
        torch.testing.assert_close(teacher.encode(pixels), encoded)
        torch.testing.assert_close(  # and back
            teacher.decode(teacher.encode(pixels)), plain.vae.decode(own).sample
        )


@pytest.mark.parametrize("deferred", [(), ("vae",)])
def test_an_autoencoder_that_overflows_in_halves_is_kept_in_float32(deferred, copied):
    folder = copied("sdxl")
    (file,) = (folder / "vae").glob("*.safetensors")
    state = load_file(file)
    large = {"decoder.conv_in.weight", "decoder.conv_in.bias"}  # beyond 65504 behind a norm's entry
    state |= {k: v.float() * (3e4 if k in large else 1) for k, v in state.items()}
    save_file(state, file, {"format": "pt"})
    teacher = SDXL(str(folder), dtype="float16", deferred=deferred)
    assert teacher.vae.dtype == torch.float32
    latents = torch.randn(1, *teacher.latent_shape) * 10
    assert teacher.decode(latents).isfinite().all()
    assert not teacher.vae.half().decode(latents.half()).sample.isfinite().all()
    said = changed(folder, "vae", force_upcast=False)
    assert SDXL(str(said), dtype="float16").vae.dtype == torch.float16


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pictures_of_damaged_weights_are_not_drawn(part, copied, command, tmp_path):
    """They would be black, with exit code 0."""
    folder = copied("unet")
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = next(n for n in state if n.endswith("conv_out.weight") and "encoder" not in n)
    save_file(state | {name: state[name] * float("nan")}, file, {"format": "pt"})
    words = [f"run={folder}", "prompt=x", "guidance=3", "steps=2", f"out={tmp_path / 'out'}"]
    code, _, err = command("sample", *words)
    assert code == 1
    assert f"{part}/ holds numbers that are not finite in " in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_run_on_damaged_weights_ends_before_its_first_step(copied, command, shards, tmp_path):
    """Its pictures on the way were black files, and its exit code 0."""
    folder = copied("unet")
    (file,) = (folder / "vae").glob("*.safetensors")
    state = load_file(file)
    name = next(n for n in state if n.endswith("conv_out.weight") and "encoder" not in n)
    save_file(state | {name: state[name] * float("nan")}, file, {"format": "pt"})
    words = ["teacher=sd15", f"teacher.path={folder}", "data=latents", f"data.path={shards}"]
    code, _, err = command("run", *words, "debug=smoke", f"run_dir={tmp_path / 'run'}")
    assert code == 1
    assert "vae/ holds numbers that are not finite in decoder.conv_out.weight" in err
    assert not list((tmp_path / "run" / "samples").glob("*.png"))


# -- parts that are quantised, or not there --------------------------------------------------------

QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
    "quanto": {"quant_method": "quanto", "weights_dtype": "int8"},
}


@pytest.fixture
def newer(tmp_path):
    return lambda family: families.write(family, tmp_path / family)


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3"])
def test_a_quantised_part_is_refused_by_name(part, method, newer):
    folder = changed(newer("sd35"), part, quantization_config=QUANTISED[method])
    said = rf"^teacher\.path={folder}: its {part}/ is quantised by {method} \(.*; give the folder"
    with pytest.raises(ValueError, match=said):
        SD3(path=str(folder))


def test_a_quantised_denoiser_is_refused_before_weights_are_read(newer, said):
    folder = changed(newer("sd35"), "transformer", quantization_config={"load_in_8bit": True})
    what = f"teacher.path={folder}: its transformer/ is quantised (quantization_config in its"
    assert said(folder, "sd3").startswith(what)


def test_a_quantised_encoder_that_is_left_out_is_no_fault(newer):
    folder = changed(newer("sd35"), "text_encoder_3", quantization_config=QUANTISED["bitsandbytes"])
    teacher = SD3(path=str(folder), without=["text_encoder_3", "tokenizer_3"])
    assert teacher.embed(["a star"]).tokens.isfinite().all()


def test_a_student_does_not_begin_from_quantised_weights(copied, teachers):
    folder = changed(copied("mmdit"), "transformer", quantization_config=QUANTISED["quanto"])
    with pytest.raises(
        ValueError, match=r"^student\.init=.*its transformer/ is quantised by quanto"
    ):
        full(teachers("mmdit"), init=str(folder))


@pytest.mark.parametrize("gone", [["text_encoder_3", "tokenizer_3"], ["tokenizer_3"]])
def test_without_its_t5_sd3_says_how_to_go_on(gone, newer):
    """transformers makes up a tokenizer of 104 words where there is none."""
    folder = newer("sd35")
    for part in gone:
        shutil.rmtree(folder / part)
    said = (
        rf"its {gone[0]}/ is missing.*; add teacher\.without=\[text_encoder_3,tokenizer_3\] to go"
    )
    with pytest.raises(FileNotFoundError, match=said):
        SD3(path=str(folder))
    teacher = SD3(path=str(folder), without=["text_encoder_3", "tokenizer_3"])
    assert teacher.embed(["a star"]).tokens.isfinite().all()
    with pytest.raises(
        ValueError, match=r"^run=.*is missing.*; write \[null, null\] for it in model_"
    ):
        student_of(str(folder))


@pytest.mark.parametrize(
    ("family", "kind", "gone"),
    [("sdxl", SDXL, "tokenizer_2"), ("sd35", SD3, "tokenizer"), ("sd35", SD3, "scheduler")],
)
def test_a_part_that_is_not_there_is_not_made_up(family, kind, gone, newer):
    folder = newer(family)
    shutil.rmtree(folder / gone)
    with pytest.raises(FileNotFoundError, match=rf"its {gone}/ is missing; fetch it anew"):
        kind(path=str(folder))


def test_encoders_that_a_cache_replaces_may_be_gone(newer):
    folder = newer("sd35")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(folder / part)
    assert SD3(path=str(folder), deferred=["text_encoder"]).pipeline.text_encoder_3 is None
