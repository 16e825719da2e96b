"""A LoRA that is added to a student: in sample, evaluate and export, as plain diffusers adds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from distill.config.models import student_of
from distill.sampling import Consistency
from distill.students import save_pipeline
from families import teacher_at

PART = {"mmdit": "transformer", "unet": "unet"}
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def student(pipelines, tmp_path_factory):
    """Family -> the folder of a few-step student, as a run leaves it."""
    made = {}

    def of(family):
        if family not in made:
            teacher, folder = teacher_at(pipelines(family)), tmp_path_factory.mktemp(family)
            own, sampler = teacher.network.trainable_copy(), Consistency()
            tiny.shake(own.model, 5, std=0.02)
            scheduler = sampler.scheduler(own, teacher)
            made[family] = save_pipeline(own, teacher, folder / "student", scheduler, sampler)
        return made[family]

    return of


@pytest.fixture(scope="module")
def low(pipelines, tmp_path_factory):
    """Family -> a folder with a LoRA of alpha 4 and rank 2, as diffusers writes it."""
    made = {}

    def of(family):
        if family not in made:
            teacher, folder = teacher_at(pipelines(family)), tmp_path_factory.mktemp("low")
            model = teacher.network.model
            names = ["to_q", "to_out.0"]
            config = LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)
            torch.manual_seed(1)
            model.add_adapter(config)
            found = {f"{PART[family]}_lora_layers": get_peft_model_state_dict(model)}
            metadata = {f"{PART[family]}_lora_adapter_metadata": config.to_dict()}
            teacher.pipeline.save_lora_weights(folder, **found, **metadata)
            made[family] = folder
        return made[family]

    return of


def by_diffusers(folder: Path, lora: Path, scale: float):
    """The denoiser of a pipeline with this LoRA, unmerged."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.load_lora_weights(lora, weight_name=NAME, adapter_name="x")
    pipeline.set_adapters(["x"], [scale])
    return getattr(pipeline, "transformer", None) or pipeline.unet


def answers(model, network, teacher):
    """What a model predicts, called as ours of its family is."""
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return network.with_model(model).x0(x, torch.tensor([1.0, 0.4]), teacher.embed(["a", "b"]))


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
@pytest.mark.parametrize("family", PART)
def test_it_equals_set_adapters_of_diffusers(family, scale, student, low):
    folder, lora = student(family), low(family)
    found, plain = (
        student_of(str(folder), lora=str(lora), lora_scale=scale),
        student_of(str(folder)),
    )
    ours = answers(found.network.model, found.network, found)
    theirs = answers(by_diffusers(folder, lora, scale), found.network, found)
    before = answers(plain.network.model, plain.network, plain)
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_kohyas_names_and_peft_s_folder_are_read_too(student, low, tmp_path):
    folder, lora = student("unet"), low("unet")
    expected = student_of(str(folder), lora=str(lora)).network.model.state_dict()
    state = load_file(lora / NAME)
    scaled = {k: v * 2 if ".lora_B." in k else v for k, v in state.items()}  # alpha / rank
    save_file(convert_state_dict_to_kohya(scaled), tmp_path / "kohya.safetensors")
    bare = {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in state.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q", "to_out.0"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for path in (tmp_path / "kohya.safetensors", tmp_path):
        found = student_of(str(folder), lora=str(path)).network.model.state_dict()
        assert all(torch.allclose(found[k], v, atol=1e-5) for k, v in expected.items())


@pytest.mark.slow
def test_sample_and_export_use_it(student, low, command, tmp_path):
    folder, lora = student("unet"), low("unet")
    words = [f"run={folder}", "prompt=a red square", "steps=2"]
    pictures = {}
    for name, more in {
        "plain": [],
        "zero": [f"lora={lora}", "lora_scale=0.0"],
        "half": [f"lora={lora}", "lora_scale=0.5"],
        "one": [f"lora={lora}"],
    }.items():
        code, out, err = command("sample", *words, *more, "out=pictures")
        assert code == 0, err
        pictures[name] = Image.open(out.split()[0])
    assert pictures["half"].text["lora"] == str(lora)
    assert pictures["half"].text["lora_scale"] == "0.5"
    plain, zero, half, one = (np.asarray(picture).astype(int) for picture in pictures.values())
    assert np.abs(plain - zero).max() <= 1
    assert np.abs(plain - half).max() > 3
    assert np.abs(one - half).max() > 3
    written = ["to=diffusers", f"lora={lora}", "lora_scale=0.5", "out=merged"]
    code, _, err = command("export", f"run={folder}", *written)
    assert code == 0, err
    code, out, err = command("sample", "run=merged", *words[1:])
    assert code == 0, err
    assert np.abs(np.asarray(Image.open(out.split()[0])).astype(int) - half).max() <= 1
    for name in ("scheduler", "text_encoder", "vae"):
        assert (Path("merged") / name).is_dir()
    # Plain diffusers opens it, and its network is that of `set_adapters`.
    unet = DiffusionPipeline.from_pretrained("merged", dtype=torch.float32).unet
    model = student_of(str(folder))
    ours, theirs = (
        answers(each, model.network, model) for each in (unet, by_diffusers(folder, lora, 0.5))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_other_forms_of_an_export_hold_it(student, low, command, pipelines):
    folder, lora = student("mmdit"), low("mmdit")
    expected = student_of(str(folder), lora=str(lora)).network.model.state_dict()
    added = [f"run={folder}", f"lora={lora}"]
    code, _, err = command("export", *added, "to=single_file", "out=one.safetensors")
    assert code == 0, err
    assert all(torch.equal(v, expected[k]) for k, v in load_file("one.safetensors").items())
    words = [f"base={pipelines('mmdit')}", "out=d.safetensors"]
    code, _, err = command("export", *added, "to=delta", *words)
    assert code == 0, err
    base = teacher_at(pipelines("mmdit")).network.model.state_dict()
    for name, change in load_file("d.safetensors").items():
        torch.testing.assert_close(
            change.float(), expected[name] - base[name], rtol=1e-3, atol=1e-3
        )


def broken(low: Path, folder: Path, what: str) -> Path:
    """The LoRA with other layers."""
    state = load_file(low / NAME)
    if what == "half":  # of the layers are of a larger network
        layers = sorted({name.partition(".lora_")[0] for name in state})
        other = set(layers[: len(layers) // 2])
        state = {
            (k.replace("unet.", "unet.other_", 1) if k.partition(".lora_")[0] in other else k): v
            for k, v in state.items()
        }
    elif what == "none":
        state = {k.replace("unet.", "unet.other_", 1): v for k, v in state.items()}
    elif what == "wide":
        state = {k: torch.ones(2, 7) if ".lora_A." in k else v for k, v in state.items()}
    elif what == "no lora":
        state = {k.replace("lora", "low"): v for k, v in state.items()}
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("half", r"^lora=.*: \d+ of its \d+ layers are none of this UNet2DConditionModel"),
        ("none", r"^lora=.*: none of its layers is one of this UNet2DConditionModel"),
        ("wide", r"^lora=.*: is a LoRA of another UNet2DConditionModel"),
        ("no lora", r"^lora=.*: holds no LoRA"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(what, said, student, low, tmp_path):
    file = broken(low("unet"), tmp_path, what)
    with pytest.raises(ValueError, match=said) as error:
        student_of(str(student("unet")), lora=str(file))
    assert "\n" not in str(error.value)
    assert "teacher" not in str(error.value).replace("teacher.weights=", "")


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("sample", ["prompt=a", "lora=none.safetensors"], "lora=none.safetensors: no such file"),
        ("sample", ["prompt=a", "lora={empty}"], "holds no lora.safetensors, "),
        ("sample", ["prompt=a", "lora_scale=2.0"], "lora_scale=2.0: has no effect without lora="),
        ("sample", ["prompt=a", "lora={lora}", "lora_scale=nan"], "lora_scale=nan: must be a num"),
        ("export", ["to=lora", "rank=2", "lora={lora}"], "has no effect on to=lora"),
        ("evaluate", ["lora={lora}", "out={run}"], "is the run's own folder"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    name, words, said, command, student, low, tmp_path
):
    (tmp_path / "empty").mkdir()
    run = student("unet").parent
    words = [w.format(lora=low("unet"), empty=tmp_path / "empty", run=run) for w in words]
    code, _, err = command(name, f"run={run}", *words)
    assert code != 0
    assert said in err
    assert not Path("samples").exists()


@pytest.mark.slow
def test_evaluate_scores_the_student_with_it_beside_the_run(student, low, command):
    run, words = student("mmdit").parent, ["metrics.prompts=4", "steps=1", "teacher=null"]
    scores = []
    for more in ([], [f"lora={low('mmdit')}"]):
        code, _, err = command("evaluate", f"run={run / 'student'}", *words, *more)
        assert code == 0, err
        (folder,) = set(Path("evaluations").iterdir()) - set(scores)
        scores.append(folder)
    assert scores[1].name.endswith("_1")
    plain, added = (json.loads((f / "evaluation.json").read_text(encoding="utf-8")) for f in scores)
    assert plain["rows"][0]["frechet"] != added["rows"][0]["frechet"]
