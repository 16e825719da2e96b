"""Teachers from one file, as ComfyUI and Civitai have them: the same numbers as from the folder it
was written from.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import FromSingleFileMixin
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import families
import ldm
import makers
import tiny
from distill.exporting.single_file import save_single_file
from distill.sampling import Consistency, seeded
from distill.students import full, save_pipeline
from distill.teachers.kolors import Kolors
from distill.teachers.loading.held import check_held, places_in
from distill.teachers.loading.single import transformer_of
from distill.teachers.pixart import PixArtSigma
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from distill.teachers.sdxl import SDXL

CONF = Path(__file__).parents[1] / "conf" / "teacher"
MAKE = {"sd15": SD, "sd21": SD, "sdxl": SDXL, "sd3": SD3}
OPTIONS = {name: row.options for name, row in (families.FAMILIES | families.OTHERS).items()}
SOURCE = {"sdxl": "sdxl", "sd3": "sd35"}  # others are tiny's own


@pytest.fixture(scope="module")
def written(pipelines, tmp_path_factory):
    """Layout -> (the pipeline folder, the file, a copy of the folder without weights)."""
    made = {}

    def of(layout):
        if layout not in made:
            place = tmp_path_factory.mktemp(layout)
            source = SOURCE.get(layout)
            folder = families.write(source, place / "folder") if source else pipelines("unet")
            config = shutil.copytree(
                folder, place / "config", ignore=shutil.ignore_patterns("*.safetensors")
            )
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
            made[layout] = folder, ldm.write(pipeline, layout, place / "model.safetensors"), config
        return made[layout]

    return of


@pytest.mark.parametrize("layout", MAKE)
def test_a_single_file_is_the_folder(layout, written):
    folder, file, config = written(layout)
    single, whole = MAKE[layout](str(file), config=str(config)), MAKE[layout](str(folder))
    for part in ("network", "_encoders"):
        found, expected = (getattr(teacher, part).state_dict() for teacher in (single, whole))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    assert single.prediction == whole.prediction
    assert single.folder is None
    cond, x_t = single.embed(tiny.CAPTIONS[:2]), torch.randn(2, *single.latent_shape)
    with torch.no_grad():
        t = torch.tensor([0.9, 0.3])
        torch.testing.assert_close(
            single.x0(x_t, t, cond), whole.x0(x_t, t, whole.embed(tiny.CAPTIONS[:2]))
        )


@pytest.mark.parametrize("layout", ["sd15", "sd3"])
def test_its_student_is_a_folder_that_diffusers_opens(layout, written, tmp_path):
    _, file, config = written(layout)
    teacher = MAKE[layout](str(file), config=str(config))
    student = tiny.shake(full(teacher), 21, std=0.03).eval()
    folder = save_pipeline(
        student, teacher, tmp_path / "student", Consistency().scheduler(student, teacher)
    )
    assert list(tmp_path.iterdir()) == [folder]
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np"}
    picture = pipeline(
        tiny.CAPTIONS[0], generator=torch.Generator().manual_seed(5), **options
    ).images[0]
    with torch.no_grad():
        cond, shape = teacher.embed(tiny.CAPTIONS[:1]), teacher.latent_shape
        x0 = Consistency()(student, cond, seeded([5]), shape=shape, steps=1)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (torch.from_numpy(picture) - expected).abs().max() < 2e-3


def test_the_command_distils_a_single_file(written, shards, command, tmp_path):
    _, file, config = written("sdxl")
    run = [
        "teacher=sdxl",
        f"teacher.path={file}",
        f"teacher.config={config}",
        f"data.path={shards}",
        "~metrics",
    ]
    code, _, err = command("run", "debug=smoke", *run, f"run_dir={tmp_path / 'run'}")
    assert code == 0, err
    sample = [f"run={tmp_path / 'run'}", "prompt=a red square", f"out={tmp_path / 'out'}"]
    assert command("sample", *sample)[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("layout", "kept"), [("sd15", "model."), ("sd3", "model."), ("sd3", "text_encoders.t5")]
)
def test_what_the_file_leaves_out_comes_from_the_folder(layout, kept, written, tmp_path):
    """Stability's own files of SD3.5 have no text encoders; fine-tunes of the denoiser alone have
    no autoencoder.
    """
    folder, file, _ = written(layout)
    tied = "encoder.embed_tokens"  # T5's, which many files have only once
    state = {
        k: x for k, x in load_file(file).items() if k.startswith(("model.", kept)) and tied not in k
    }
    save_file(state, bare := tmp_path / "bare.safetensors")
    teacher = MAKE[layout](str(bare), config=str(folder))
    expected = MAKE[layout](str(folder)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in teacher.state_dict().items())


# -- a transformer alone, of families whose parts never come in one file ---------------------------


COMFYUI = "model.diffusion_model."  # before the names in ComfyUI's files, not in the makers' own


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Family and prefix of names -> (its folder, the transformer in its makers' layout, the folder
    without it).
    """
    made = {}

    def of(family, prefix=COMFYUI):
        if (family, prefix) not in made:
            place = tmp_path_factory.mktemp(family)
            folder = families.write(family, place / "folder")
            if family in makers.WIDE:
                makers.widen(folder, family)
            (weights,) = (folder / "transformer").glob("*.safetensors")
            state = makers.LAYOUTS[family](load_file(weights))
            state = ldm.under(prefix, state)
            state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
            save_file(state, place / "model.safetensors")
            config = shutil.copytree(folder, place / "config")
            (config / "transformer" / weights.name).unlink()
            made[family, prefix] = folder, place / "model.safetensors", config
        return made[family, prefix]

    return of


@pytest.mark.parametrize("prefix", ["", COMFYUI])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in makers.WIDE else [])
        for name in makers.LAYOUTS
    ],
)
def test_a_transformer_in_its_makers_layout_is_the_folder(family, prefix, alone):
    folder, file, config = alone(family, prefix)
    options = OPTIONS[family] | {"dtype": "bfloat16" if family in makers.WIDE else "float32"}
    whole = families.teacher_at(folder, **options)
    single = type(whole)(str(file), config=str(config), **options)
    assert tiny.same(single.state_dict(), whole.state_dict())
    assert single.folder is None
    assert single.pipeline.name_or_path is None


@pytest.mark.slow
def test_the_doctor_counts_a_single_file(alone, command):
    """As the folder with the same weights: networks by teacher.config, their number by the file."""
    folder, file, config = alone("zimage")
    words = ["teacher=z_image", "student=lora", "trainer.precision=32-true"]
    found = []
    for more in ([f"teacher.path={folder}"], [f"teacher.path={file}", f"teacher.config={config}"]):
        code, out, err = command("doctor", *words, "teacher.dtype=float32", *more)
        assert (code, err) == (0, "")
        lines = [x for x in out.splitlines() if " of them within a step" in x or "held betw" in x]
        assert len(lines) == 3
        found.append((lines, re.search(r"denoiser ([\d.]+) M", out)[1]))
    assert found[0] == found[1]


def test_a_transformer_that_does_not_fit_is_one_sentence(alone, tmp_path):
    folder, file, config = alone("wan")
    kind, state = type(families.teacher_at(folder, **OPTIONS["wan"])), load_file(file)
    first = next(iter(state))
    for more, said in (
        (
            {"vae.decoder.conv_in.weight": torch.ones(1)},
            "give a file of the denoiser alone: the rest",
        ),
        ({"model.diffusion_model.more": torch.ones(9)}, "has 9 numbers more than the Wan"),
        ({first: None}, "(it lacks tensors of it); choose another teacher= or teacher.config="),
    ):
        kept = {name: x for name, x in (state | more).items() if x is not None}
        save_file(kept, path := tmp_path / "x.safetensors")
        assert said in said_of(kind, path, config=str(config))


# -- files that do not fit -------------------------------------------------------------------------


def said_of(make, path, error=ValueError, **options):
    with pytest.raises(error) as caught:
        make(str(path), **options)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("sd15", "model.diffusion_model.out.2.weight"),
        ("sd15", "cond_stage_model.transformer.text_model.final_layer_norm.weight"),
        ("sd3", "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"),
    ],
)
def test_tensors_that_are_missing_are_not_made_up(layout, name, written, tmp_path):
    _, file, config = written(layout)
    state = load_file(file)
    state.pop(name)
    save_file(state, cut := tmp_path / "cut.safetensors")
    said = said_of(MAKE[layout], cut, config=str(config))
    assert said.startswith(f"teacher.path={cut} does not load as the ")
    assert said.endswith("(it lacks tensors of it); choose another teacher= or teacher.config=")


def test_a_file_that_says_v_is_not_read_as_eps(written, tmp_path):
    """As NoobAI-XL's: two tensors that diffusers passes over.

    Ours has them too, where it predicts v.
    """
    _, file, config = written("sdxl")
    save_file(
        load_file(file) | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)},
        tmp_path / "v.safetensors",
    )
    with pytest.raises(
        ValueError,
        match=r"v\.safetensors says that it predicts v, and teacher\.config=.* says epsilon; ",
    ):
        SDXL(str(tmp_path / "v.safetensors"), config=str(config))
    own = shutil.copytree(config, tmp_path / "config")
    place = own / "scheduler" / "scheduler_config.json"
    terms = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    place.write_text(
        json.dumps(json.loads(place.read_text(encoding="utf-8")) | terms), encoding="utf-8"
    )
    teacher = SDXL(str(tmp_path / "v.safetensors"), config=str(own))
    assert teacher.prediction == "v"
    again = save_single_file(teacher.pipeline, tmp_path / "again.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(again).keys()
    assert SDXL(str(again), config=str(own)).prediction == "v"
    assert "v_pred" not in load_file(
        save_single_file(SDXL(str(file), config=str(config)).pipeline, again)
    )


@pytest.mark.parametrize(
    ("layout", "more", "what"),
    [
        (
            "sdxl",
            "edm_vpred.sigma_max",
            "is a model with EDM preconditioning (edm_vpred.sigma_max)",
        ),
        ("sdxl", "edm_mean", "is a model with EDM preconditioning (edm_mean)"),
        ("sdxl", "model.diffusion_model.out.2.scale_weight", "holds model.diffusion_model.out.2.s"),
        (
            "sd3",
            "model.diffusion_model.scaled_fp8",
            "holds model.diffusion_model.scaled_fp8, which would not be used",
        ),
        ("sd15", "first_stage_model.decoder.conv_in.weight_scale", "holds first_stage_model.deco"),
        ("sd3", "text_encoders.t5xxl.transformer.shared.scale_weight", "holds text_encoders.t5x"),
        (
            "sd15",
            "lora_unet_mid_block.alpha",
            "holds lora_unet_mid_block.alpha, which would not be used",
        ),
        ("sd15", "conditioner.embedders.1.model.ln_final.bias", "holds conditioner.embedders.1.m"),
    ],
)
def test_a_tensor_that_would_be_passed_over_is_named(layout, more, what, written, tmp_path):
    """diffusers takes what it knows of a file: scales are dropped, and CosXL is read as eps."""
    _, file, config = written(layout)
    save_file(load_file(file) | {more: torch.ones(1)}, path := tmp_path / "more.safetensors")
    said = said_of(MAKE[layout], path, config=str(config))
    assert said.startswith(f"teacher.path={path} {what}")
    assert "no teacher supports" in said or "would not be used" in said
    if "scale" in more:
        assert said.endswith("; scaled fp8 is not read: give weights in bfloat16 or float16")


def test_what_training_leaves_in_a_file_is_no_fault(written, tmp_path):
    _, file, config = written("sd15")
    expected = SD(str(file), config=str(config))
    table = expected.pipeline.scheduler.alphas_cumprod
    more = {
        "model_ema.decay": torch.ones(1),
        "alphas_cumprod": table.half(),
        "sqrt_alphas_cumprod": table.sqrt(),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(9)[None],
    }
    save_file(load_file(file) | more, path := tmp_path / "more.safetensors")
    found = SD(str(path), config=str(config)).state_dict()
    assert tiny.same(found, expected.state_dict())
    save_file(load_file(file) | {"alphas_cumprod": table * 0.9}, path)
    assert "has another schedule of noise (alphas_cumprod) than teacher.config=" in said_of(
        SD, path, config=str(config)
    )


def test_blocks_that_the_config_does_not_have_are_counted(written, tmp_path):
    """A full model read by the configuration of a pruned one loses blocks without a word."""
    _, file, config = written("sdxl")
    state = load_file(file)
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    extra = {name.replace("blocks.1.0", "blocks.9.0"): state[name].clone()}
    save_file(state | extra, path := tmp_path / "more.safetensors")
    said = said_of(SDXL, path, config=str(config))
    assert said.startswith(f"teacher.path={path}")
    assert f"its denoiser has {state[name].numel()} numbers more than the UNet2DCond" in said


def test_zero_terminal_snr_is_heeded(written, tmp_path):
    _, file, config = written("sdxl")
    own = shutil.copytree(config, tmp_path / "config")
    place = own / "scheduler" / "scheduler_config.json"
    terms = json.loads(place.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
    place.write_text(json.dumps(terms), encoding="utf-8")
    marks = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    save_file(load_file(file) | marks, path := tmp_path / "v.safetensors")
    said = said_of(SDXL, path, config=str(own))
    assert "has zero terminal SNR, and teacher.config=" in said
    assert said.endswith("rescale_betas_zero_snr=true")


def test_a_file_of_a_million_tensors_is_refused_before_they_are_read(written, tmp_path):
    """Libraries read so many in a minute."""
    whole, _, config = written("sd15")
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": one for i in range(30_001)}).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    said = f"{path}: has 30,001 tensors, and a file of weights may have 30,000; give the "
    assert said in said_of(SD, path, config=str(config))
    folder = shutil.copytree(whole, tmp_path / "folder")
    shutil.copy(path, folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "may have 30,000; give the weights of one model" in said_of(SD, folder)
    path.write_bytes(struct.pack("<Q", 2**25) + bytes(2**25))
    assert "its header: has 32 MiB, and such a file may have 16 MiB" in said_of(
        SD, path, config=str(config)
    )


def test_a_part_that_is_nowhere_is_named(written, tmp_path):
    _, file, config = written("sd15")
    save_file(
        {k: x for k, x in load_file(file).items() if k.startswith("model.")},
        bare := tmp_path / "a.safetensors",
    )
    said = said_of(SD, bare, config=str(config))
    assert said.startswith(
        f"teacher.path={bare} has no vae, and teacher.config={config}: vae/ does not load ("
    )


def test_a_config_that_names_foreign_code_is_refused(written, tmp_path):
    _, file, config = written("sd15")
    folder = shutil.copytree(config, tmp_path / "config")
    index = folder / "model_index.json"
    index.write_text(
        index.read_text(encoding="utf-8").replace('"transformers"', '"os"'), encoding="utf-8"
    )
    assert "is code of 'os', which this teacher does not read" in said_of(
        SD, file, config=str(folder)
    )


def test_a_file_of_another_model_is_refused(written):
    for layout, other in (("sd15", "sdxl"), ("sdxl", "sd15"), ("sd3", "sd15")):
        _, file, _ = written(other)
        config = written(layout)[2]
        assert said_of(MAKE[layout], file, config=str(config)).startswith(f"teacher.path={file} ")


def test_a_config_of_another_class_is_named(written):
    _, file, config = written("sdxl")
    said = said_of(SD, file, config=str(config))
    what = "holds a StableDiffusionXLPipeline, but this teacher reads a StableDiffusionPipeline; "
    what += "choose another teacher="
    assert said == f"teacher.config={config} {what}"


def test_a_config_is_needed_and_named(written, tmp_path):
    _, file, _ = written("sd15")
    assert said_of(SD, file).startswith(
        f"teacher.config=null: {file} is a single file; give the pipeline folder or"
    )
    assert said_of(SD, file, FileNotFoundError, config=f"{tmp_path}/no").startswith(
        f"teacher.config={tmp_path}/no: no"
    )
    said = said_of(SD, file, config="someone/model")  # tests are offline
    assert said.startswith("teacher.config=someone/model: cannot be fetched (")


def test_a_t5_has_one_place_whichever_encoder_it_is():
    """FLUX's is its second, where SDXL and SD3 have a CLIP: a whole file's own would be passed
    over.
    """
    clip, t5 = transformers.CLIPTextModel, transformers.T5EncoderModel
    found = places_in({"text_encoder": clip, "text_encoder_2": t5, "tokenizer": type(None)})
    assert found["text_encoder_2"] == ("text_encoders.t5xxl.",)
    assert "text_encoders.clip_l." in found["text_encoder"]
    name = "text_encoders.t5xxl.transformer.shared.weight"
    check_held({name: [2, 2]}, {"text_encoder": clip, "text_encoder_2": t5}, (), "x")
    with pytest.raises(ValueError, match=rf"^x holds {name}, which would not be used"):
        check_held({name: [2, 2]}, {"text_encoder": clip, "text_encoder_2": clip}, (), "x")
    check_held({name: [2, 2]}, {"text_encoder": clip}, ("text_encoder_3",), "x")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_teacher_that_diffusers_reads_from_one_file_is_told_its_kind(name):
    """By default by the pipeline that it is named after: `teacher=flux teacher.path=x.safetensors`
    is enough.
    """
    node = OmegaConf.load(CONF / f"{name}.yaml")
    kind = get_object(node._target_).kind
    of_shapes = OmegaConf.is_missing(node, "path") or node.path.startswith("shapes:")
    if of_shapes or not (issubclass(kind, FromSingleFileMixin) or transformer_of(kind)):
        pytest.skip("is no such teacher")
    assert node.config == node.path


def test_what_is_no_such_file_is_said(written, tmp_path):
    config = str(written("sd15")[2])
    missing = tmp_path / "no.safetensors"
    said = said_of(SD, missing, FileNotFoundError, config=config)
    assert (
        said
        == f"teacher.path={missing}: no such file; give one, or owner/repository/file of the hub"
    )
    (tmp_path / "text.safetensors").write_text("no tensors here", encoding="utf-8")
    assert "does not load as the StableDiffusionPipeline" in said_of(
        SD, tmp_path / "text.safetensors", config=config
    )
    torch.save({}, tmp_path / "old.ckpt")
    assert "old.ckpt is pickled, which can run code when read" in said_of(
        SD, tmp_path / "old.ckpt", config=config
    )
    for kind in (PixArtSigma, Kolors):
        said = said_of(kind, written("sd15")[1])
        assert said.endswith(
            f"diffusers reads no {kind.kind.__name__} from one file; give a folder, and weights of"
            " its denoiser, under diffusers' names, as teacher.weights="
        )
