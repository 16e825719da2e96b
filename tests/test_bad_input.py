"""What is wrong is said in one sentence, with exit code 1 and no traceback, and nothing that was
there is lost.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from PIL import Image
from safetensors.torch import load_file, save_file

import eyes
import tiny
from distill.commandline import quoting as texts
from distill.core.types import Losses
from distill.data.write import write_latents
from distill.discriminators.images import ImageFeatures
from distill.evaluation.networks import Dinov2
from distill.storage import checkpoint_files
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from hostile import tar


@pytest.fixture
def refused(command, pipelines, shards, tmp_path):
    """Run a command that must fail -> its one sentence.

    `run` is given a smoke run of a good teacher and good data.
    """

    def call(name, *arguments):
        if name == "run":
            good = [
                f"teacher.path={pipelines('mmdit')}",
                f"data.path={shards}",
                f"run_dir={tmp_path / 'run'}",
            ]
            arguments = ("debug=smoke", "~metrics", *good, *arguments)
        code, _, err = command(name, *arguments)
        said = [line for line in err.splitlines() if line.startswith("distill: ")]
        assert code == 1, err
        assert len(said) == 1, err
        assert "Traceback" not in err
        return said[0].removeprefix("distill: ")

    return call


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads a teacher's weights fails the test."""
    for family in (SD3, SD):

        @functools.wraps(family.__init__)
        def read(*args, **keys):
            pytest.fail("weights were read")

        monkeypatch.setattr(family, "__init__", read)


@pytest.fixture
def copied(pipelines, tmp_path):
    """A copy of a pipeline folder, to be damaged."""

    def copy(family="mmdit"):
        return shutil.copytree(pipelines(family), tmp_path / "copy")

    return copy


def png(width, height) -> bytes:
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    ).save(file, "PNG")
    return file.getvalue()


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "teacher=shape",
            "teacher=shape: no such option (did you mean shapes?); there is ",
        ),
        ("metod=ladd", "metod: no such key (did you mean method?)"),
        ("trainer.max_step=3", "trainer.max_step: no such key (did you mean trainer.max_steps?)"),
        ("max_steps=3", "max_steps: no such key (did you mean trainer.max_steps?)"),
        ("method.beta=9", "method.beta: no such key here; method=dpo has it"),
        ("metrics.blend=true", "metrics.blend: no such key here; metrics=shapes_fill has it"),
        ("student.rank=4", "student.rank: no such key here; student=lora has it"),
        ("debugg=smoke", "debugg: no such key (did you mean debug?)"),
        ("~metric", "~metric: there is no such key (did you mean metrics?); leave it out"),
        ("~data.limit", "~data.limit: there is no such key, or it is null already; leave this out"),
        ("~seed=7", "~seed=7: it has another value; write ~seed"),
        ("data.buckets=[[64,64]", "data.buckets=[[64,64]: cannot be read as key=value"),
        ("na me=a", "na me=a: cannot be read as key=value"),
        (
            "+loop.shedule=cosine",
            "shedule: distill.training.loop_settings.LoopSettings takes no such key (did you mean"
            " schedule?)",
        ),
        ("+student.rank=4", "rank: distill.students.full takes no such key"),
        ("data=latents", "data.path: not given; add data.path=... to the command"),
        ("data.batch_size=0", "data.batch_size=0: must be a whole number, 1 or more"),
        ("data.batch_size=2.5", "data.batch_size=2.5: must be a whole number"),
        ("data.batch_size=many", "data.batch_size=many: must be a whole number"),
        ("loop.accumulate=-1", "loop.accumulate=-1: must be a whole number, 1 or more"),
        ("trainer.max_steps=0", "trainer.max_steps=0: must be a whole number, 1 or more"),
        ("trainer.devices=none", "trainer.devices=none: must be a number of devices"),
        ("trainer.devices=0", "trainer.devices=0: must be a number of devices"),
        ("+trainer.strategy=fsdp", "use trainer=fsdp2"),
        ("method.levels.odds=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_wrong_argument_is_named_before_weights_are_read(
    argument, said, command, no_weights, tmp_path
):
    code, _, err = command("run", argument)
    assert code == 1
    assert err.startswith("distill: ")
    assert err.count("\n") == 1, err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_a_file_s_keys_do_not_fit(command):
    """The file has a list where the method has a node. What OmegaConf says names neither."""
    code, _, err = command("run", "experiment=nitrofusion_shift_shapes", "method=ladd")
    assert code == 1
    file, why = (
        "experiment/nitrofusion_shift_shapes.yaml",
        "Cannot merge DictConfig with ListConfig",
    )
    assert err == f"distill: {file}: does not fit method=ladd ({why}); leave out method=ladd\n"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("prompt=ein schöner Hund", "ein schöner Hund"),
        ("data.path=/tmp/фото", "/tmp/фото"),
        ("prompt=a dog (big)", "a dog (big)"),
        ('prompt=a dog\'s house, "red" \\', 'a dog\'s house, "red" \\'),
        ("+name=a=b c", "a=b c"),
        ("data.path=~/photos", "/home/me/photos"),
        ("prompt=1984", "1984"),
        ("out=1e3", "1e3"),
        ("name=true", "true"),
        ("data.path=2024", "2024"),
        ("prompt=a dog, a cat", "a dog, a cat"),
        # and as before:
        ("prompt='a, b'", "a, b"),
        ("name=null", None),
        ("metrics.prompts=16", 16),
        ("steps=[1,2]", [1, 2]),
        ("data.path=${oc.env:X}/a", "${oc.env:X}/a"),
    ],
)
def test_values_that_hydra_does_not_read_are_texts(word, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = OverridesParser.create().parse_override(texts.for_hydra(word, "config"))
    assert found.value() == value
    assert type(found.value()) in (type(value), QuotedString)


def test_a_sweep_stays_one():
    for word in ("name=a,b", "name=ü,b"):  # of the second Hydra says that it cannot be read
        assert texts.for_hydra(word, "config", sweep=True) == word
    assert texts.for_hydra("name=ü", "config", sweep=True) == "name='ü'"
    assert texts.for_hydra("seed=1,2", "config") == "seed=1,2"  # Hydra says what to do


def test_a_text_reaches_the_command_as_it_was_typed(command, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "distill.run.start", lambda cfg: seen.append((cfg.name, cfg.data.path, cfg.run_dir))
    )
    assert (
        command("run", "name=ü (it's)", "data=latents", "data.path=~/фото", "run_dir=007")[0] == 0
    )
    assert seen == [("ü (it's)", os.path.expanduser("~/фото"), "007")]


def test_other_commands_name_a_wrong_argument_too(refused, tmp_path):
    assert (
        refused("sample", f"run={tmp_path}")
        == "prompt: not given; add prompt=... to the command, or prompts=<file with one a line>"
    )
    assert "(did you mean steps?)" in refused("sample", "step=1")
    assert "count=x: must be a whole number" in refused(
        "sample", f"run={tmp_path}", "prompt=x", "count=x"
    )
    assert "(did you mean metrics.prompts?)" in refused("evaluate", "metrics.prompt=3")
    assert "(did you mean out?)" in refused("pretrain", "ou=x")


def test_a_gpu_that_is_not_there(refused, no_weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused("run", "trainer.accelerator=gpu")
    assert (
        said
        == "trainer.accelerator=gpu: there is no such GPU here; use trainer.accelerator=cpu or auto"
    )


@pytest.mark.parametrize(
    ("method", "wanted", "discriminator", "given"),
    [
        ("ladd", "latents", "dino", "pixels"),
        ("add", "pixels", "teacher_features", "latents"),
        ("ladd", "latents", "none", "nothing"),
        ("consistency", "nothing", "dino", "pixels"),
    ],
)
def test_a_discriminator_that_does_not_fit_the_method(
    method, wanted, discriminator, given, refused, no_weights
):
    said = refused("run", f"method={method}", f"discriminator={discriminator}")
    what = f"method needs a discriminator of {wanted}, and this one works on {given}"
    assert said == f"{what}; choose another discriminator="


def test_a_head_start_of_no_discriminator(refused, no_weights):
    said = refused("run", "method=regression", "loop.head_start=5")
    assert said == "loop.head_start=5: there is no discriminator to train first; make it 0"


def test_scaled_gradients_are_refused(refused, no_weights):
    said = refused("run", "trainer.precision=16-mixed")
    assert (
        said == "trainer.precision=16-mixed: does not work with two optimisers;"
        " use auto, bf16-mixed or 32-true"
    )


def test_a_sampler_that_the_teacher_cannot_follow(refused):
    said = refused("run", "sampler=ancestral")
    assert said.startswith(
        "sampler=EulerAncestral needs a process that keeps a little of the data at t = 1"
    )


def test_words_with_few_meanings(refused):
    assert refused("run", "student.init=zero").startswith(
        "student.init=zero: must be teacher, random, or a"
    )
    assert refused("run", "sampler.levels=[0.2,0.5]").startswith(
        "sampler.levels=[0.2, 0.5]: must fall from at most 1"
    )


# -- the teacher -----------------------------------------------------------------------------------


def rewrite(file, change):
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_tensors_that_are_missing_are_named(part, refused, copied):
    folder = copied()
    file = next((folder / part).glob("*.safetensors"))
    name = next(n for n in sorted(load_file(file)) if n.endswith("weight"))
    rewrite(file, lambda tensors: tensors.pop(name))
    said = refused("run", f"teacher.path={folder}")
    assert said.startswith(f"teacher.path={folder}: {part}/ lacks ")
    assert name.split(".")[-2] in said
    assert said.endswith("fetch it anew, or correct its config.json")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_tensors_of_another_shape_are_named(part, refused, copied):
    folder = copied()
    file = next((folder / part).glob("*.safetensors"))
    name = next(n for n in sorted(load_file(file)) if n.endswith("weight"))
    rewrite(file, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    said = refused("run", f"teacher.path={folder}")
    assert f"teacher.path={folder}: {part}/ " in said
    assert name.split(".")[-2] in said


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_tensors_without_a_place_are_named(part, refused, copied):
    """The libraries only warn of them: the scales of fp8 weights, without which they are others."""
    folder = copied()
    file = next((folder / part).glob("*.safetensors"))
    name = next(n for n in sorted(load_file(file)) if n.endswith("weight"))
    scale = name.removesuffix("weight") + "scale_weight"
    rewrite(file, lambda tensors: tensors.update({scale: torch.ones(1)}))
    said = refused("run", f"teacher.path={folder}")
    assert said.startswith(f"teacher.path={folder}: {part}/ holds ")
    assert ".scale_weight, for which its " in said
    assert said.endswith("; scaled fp8 is not read: give weights in bfloat16 or float16")


def test_what_text_encoders_have_besides_is_no_fault(copied):
    folder = copied()
    file = next((folder / "text_encoder").glob("*.safetensors"))
    expected = SD3(str(folder)).state_dict()
    more = ("logit_scale", "text_model.embeddings.position_ids", "visual_projection.weight")
    rewrite(file, lambda tensors: tensors.update({name: torch.ones(1) for name in more}))
    found = SD3(str(folder)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_network_of_pictures_is_read_whole(tmp_path):
    """transformers goes on with random weights for what its files lack."""
    folder = shutil.copytree(tiny.vit(), tmp_path / "vit")
    file = next(folder.glob("*.safetensors"))
    name = next(n for n in sorted(load_file(file)) if "attention" in n)
    rewrite(file, lambda tensors: tensors.pop(name))
    for read, key in (
        (lambda: ImageFeatures(str(folder), size=tiny.SIDE), "discriminator.features.path="),
        (Dinov2(str(folder)).load, "metrics.networks: "),
    ):
        with pytest.raises(ValueError, match=rf"^{key}.*lacks .*attention") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["a pipeline", "of the hub"])
def test_eyes_that_cannot_be_read_are_named(what, pipelines):
    path = str(pipelines("mmdit")) if what == "a pipeline" else "nobody/nothing"
    with pytest.raises(ValueError, match=f"^discriminator.features.path={path}: cannot be read"):
        ImageFeatures(path, size=tiny.SIDE)


def test_other_damage_to_a_teacher(refused, copied):
    folder = copied()
    assert refused("run", "++teacher.dtype=float99").startswith(
        "teacher.dtype=float99: must be a dtype of torch"
    )
    whole = next((folder / "transformer").glob("*.safetensors"))
    whole.write_bytes(whole.read_bytes()[:1000])
    assert f"{folder}: transformer/ does not load" in refused("run", f"teacher.path={folder}")
    shutil.rmtree(folder / "transformer")
    assert f"{folder}: its transformer/ is missing" in refused("run", f"teacher.path={folder}")


def test_a_hub_that_cannot_be_reached(refused, tmp_path):
    said = refused("run", "teacher.path=someone/model")  # tests are offline
    assert said.startswith("teacher.path=someone/model: cannot be fetched (")
    said = refused("run", "teacher.path=someone/model/file.safetensors")
    assert said.startswith("teacher.path=someone/model/file.safetensors: cannot be fetched (")
    assert said.endswith("check the name, the network and its licence")
    said = refused("run", "++teacher.weights=someone/model/file.safetensors")
    assert said.startswith("teacher.weights=someone/model/file.safetensors: cannot be fetched (")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            GatedRepoError,
            "it is gated: accept its licence on its page, then log in with `hf auth login`",
        ),
        (RepositoryNotFoundError, "there is no such repository, or it is private"),
        (RevisionNotFoundError, "it has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(kind, said, refused, monkeypatch, tmp_path):
    """Its own message is a number of several lines; diffusers puts it behind one of its own."""

    def behind(*_, **__):
        try:
            asked = kind(
                "401 Client Error. (Request ID: 1)\n\nCannot access.", response=MagicMock()
            )
            raise asked
        except kind as error:
            raise OSError("Cannot load model: please check the root cause above.") from error

    for place in ("single.snapshot_download", "weights.hf_hub_download", "reading.hf_hub_download"):
        monkeypatch.setattr(f"distill.teachers.loading.{place}", behind)
    monkeypatch.setattr(SD.kind, "download", behind)
    (tmp_path / "x.safetensors").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (512, 512)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a star", encoding="utf-8")
    for key, value, more in (
        ("teacher.path", "someone/model", []),
        ("teacher.path", "someone/model/file.safetensors", []),
        ("teacher.config", "someone/model", [f"teacher.path={tmp_path / 'x.safetensors'}"]),
    ):
        given = ["data=images", f"data.path={tmp_path / 'photos'}"]
        found = refused("run", "teacher=sd15", *given, *more, f"{key}={value}")
        assert (
            found
            == f"{key}={value}: cannot be fetched ({said}); check the name, the network and its"
            " licence"
        )
    assert f"cannot be fetched from the hub ({said})" in refused(
        "sample", "run=someone/model", "prompt=x"
    )
    assert not (tmp_path / "run").exists()


FAULTS = {
    "hub": "cannot be fetched (",
    "class": "holds a StableDiffusionPipeline, but this teacher reads a StableDiffusion3Pipeline",
    "file": "its transformer/ is missing or has no config.json; fetch it anew",
    "tensors": "transformer/ lacks ",
    "tokenizer": "they are not of one model: fetch both anew",
}


def damaged(fault, copied) -> str:
    """What `teacher.path` is to be, for a pipeline with this fault."""
    if fault == "hub":
        return "someone/model"
    folder = copied("unet" if fault == "class" else "mmdit")
    if fault == "file":
        (folder / "transformer" / "config.json").unlink()
    elif fault == "tensors":
        rewrite(
            next((folder / "transformer").glob("*.safetensors")), lambda tensors: tensors.popitem()
        )
    elif fault == "tokenizer":
        grow(folder / "tokenizer_2" / "tokenizer.json")
    return str(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_other_commands_refuse_a_teacher_likewise_and_write_nothing(
    fault, refused, copied, tmp_path
):
    path = damaged(fault, copied)
    (tmp_path / "prompts.txt").write_text("a\n", encoding="utf-8")
    data = [f"data.path={put_images(tmp_path / 'x.tar', 2)}", "data.size=64", "data.num_workers=0"]
    before = sorted(tmp_path.iterdir())
    for name, arguments in {
        "cache": data,
        "synthesize": [f"prompts={tmp_path / 'prompts.txt'}"],
    }.items():
        said = refused(name, f"teacher.path={path}", *arguments, f"out={tmp_path / 'made'}")
        assert said.startswith(f"teacher.path={path}")
        assert FAULTS[fault] in said
    if fault != "class":  # which sample takes as it comes
        said = refused(
            "sample", f"run={path}", "prompt=x", "guidance=4", f"out={tmp_path / 'made'}"
        )
        assert said.startswith(f"run={path}")
        assert FAULTS[fault].replace("fetched (", "fetched from the hub (") in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_prompt_that_is_too_long_is_said_by_every_command(command, pipelines, tmp_path):
    long = "small red star " * 20 + "and the end"
    (tmp_path / "prompts.txt").write_text(f"{long}\n", encoding="utf-8")
    teacher = f"teacher.path={pipelines('mmdit')}"
    asked = {
        "synthesize": [teacher, "prompts=prompts.txt", "steps=1", "out=made"],
        "sample": [f"run={pipelines('mmdit')}", "prompts=prompts.txt", "guidance=4", "steps=1"],
    }
    for name, arguments in asked.items():
        code, out, err = command(name, *arguments)
        assert code == 0
        assert out.count("a caption is longer than this teacher reads, and ends before '") == 1, (
            out,
            err,
        )
        assert "and the end'" in out


def test_captions_in_the_wrong_form(refused, tmp_path):
    """A list where a record should be, in a folder and in shards: a run names picture and reason,
    the cache `check`.
    """
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(png(64, 64))
        (tmp_path / "photos" / f"{i}.json").write_text('["a caption"]', encoding="utf-8")
    both = {
        f"{i}.{end}": data
        for i in range(3)
        for end, data in (("png", png(64, 64)), ("json", b'["a caption"]'))
    }
    for path in (tmp_path / "photos", tar(tmp_path / "x.tar", both)):
        data = ["data=images", f"data.path={path}", "data.size=64", "data.num_workers=0"]
        for name, arguments in {
            "run": data,
            "cache": [*data[1:], f"out={tmp_path / 'made'}"],
        }.items():
            said = refused(name, *arguments)
            assert said.startswith(f"data.path={path}: "), said
            assert "its .json has no text under 'caption' or 'text'" in said
        assert not (tmp_path / "made").exists()
        assert not list(tmp_path.glob("run/checkpoints/*"))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_single_file_that_is_none(refused, copied, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    (tmp_path / "prompts.txt").write_text("a red star", encoding="utf-8")
    file = tmp_path / "x.safetensors"
    data = ["data=prompts", f"data.path={tmp_path / 'prompts.txt'}"]
    data += ["+method.real._target_=distill.core.score_distillation.TeacherSamples"]
    single = ["teacher=sd15", f"teacher.path={file}", *data]
    said = refused("run", *single, f"teacher.config={copied('unet')}")
    assert said.startswith(
        f"teacher.path={file} does not load as the StableDiffusionPipeline of teacher.config="
    )
    said = refused("run", *single)
    assert said.startswith(
        "teacher.config=stable-diffusion-v1-5/stable-diffusion-v1-5: cannot be fetched ("
    )
    assert not (tmp_path / "run").exists()


def grow(file):
    """Give a tokenizer words that its text encoder does not know."""
    words = json.loads(file.read_text(encoding="utf-8"))
    words["model"]["vocab"] |= {f"word{i}": len(words["model"]["vocab"]) + i for i in range(9)}
    file.write_text(json.dumps(words), encoding="utf-8")


def test_a_tokenizer_of_another_model(refused, copied):
    folder = copied()
    grow(folder / "tokenizer_2" / "tokenizer.json")
    said = refused("run", f"teacher.path={folder}")
    assert re.fullmatch(
        rf"teacher.path={folder}: tokenizer_2/ has \d+ tokens and text_encoder_2/ has"
        r" embeddings for \d+; .*:"
        r" fetch both anew",
        said,
    )


def test_a_caption_that_is_too_long_is_said_once(pipelines, caplog):
    teacher, words = SD(str(pipelines("unet"))), "small red star " * 20
    for captions in (
        ["a short one"],
        ["short", f"{words}and the end"],
        [f"{words}and another end"],
    ):
        teacher.embed(captions)
    (said,) = [r.message for r in caplog.records if r.name.startswith("distill.")]
    assert said.startswith("a caption is longer than this teacher reads, and ends before '")
    assert "red star small" in said
    assert "and the end'" in said
    assert len(caplog.records) == 1  # the libraries' own words are many, and at every call


# -- the data --------------------------------------------------------------------------------------


def test_shards_that_cannot_be_used(refused, no_weights, shards, tmp_path):
    shard = next(shards.glob("*.tar")).read_bytes()
    for name, content in {
        "cut": shard[:3000],
        "text": b"no tar at all\n" * 100,
        "nothing": b"",
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        said = refused("run", f"data.path={tmp_path / name}.tar")
        assert f"{name}.tar' is cut short or" in said
        assert "write or fetch it anew" in said
    tar(tmp_path / "empty.tar", {})
    assert "hold no samples" in refused("run", f"data.path={tmp_path}/empty.tar")
    assert "none-*.tar: no file matches" in refused("run", f"data.path='{tmp_path}/none-*.tar'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            (16, 16, 16),
            "its latents have 16 channels and this teacher's have 4; make them with this teacher's",
        ),
        (
            (4, 16, 15),
            (
                "latents of 16 x 15 do not divide into this teacher's patches of 2; make them of"
                " pictures whose"
            ),
        ),
    ],
)
def test_latents_of_another_teacher(shape, said, refused, tmp_path):
    write_latents(
        f"{tmp_path}/x-%d.tar", ((f"{i}", np.zeros(shape), "c") for i in range(4)), per_shard=4
    )
    assert refused("run", f"data.path={tmp_path}").startswith(f"data.path={tmp_path}: {said}")
    assert not (tmp_path / "run").exists()


def test_pictures_of_a_size_that_the_teacher_cannot_read(refused, tmp_path):
    path = put_images(tmp_path / "x.tar", 1)
    said = refused("run", "data=images", "data.size=60", f"data.path={path}")
    assert said == "data.size=60: must be a multiple of 8 for this teacher; use 56 or 64"


BAD = {
    "half": ({"png": png(64, 64)[:500], "txt": b"c"}, "does not decode"),
    "mute": ({"png": png(64, 64)}, "it has no caption"),
    "latin": ({"png": png(64, 64), "txt": "Bär".encode("latin-1")}, "is not UTF-8"),
    "small": (
        {"png": png(40, 31), "txt": b"c"},
        "its image is 40 x 31, under half of data.size=64",
    ),
}


def put_images(path, good, *bad):
    samples = {
        f"{i:03d}": {"png": png(64, 64), "txt": f"caption {i}".encode()} for i in range(good)
    }
    samples |= {name: BAD[name][0] for name in bad}
    return tar(
        path,
        {f"{key}.{end}": data for key, files in samples.items() for end, data in files.items()},
    )


def test_bad_samples_are_skipped_counted_and_named(tmp_path, caplog):
    from distill.data.datasets import ImageShards

    data = ImageShards(str(put_images(tmp_path / "x.tar", 40, *BAD)), size=64, max_bad_share=0.2)
    keys = {data[i]["key"] for i in range(len(data))}
    assert keys == {f"{i:03d}" for i in range(40)}
    assert {name.rpartition(":")[2] for name in data.bad} == set(BAD)
    for name, (_, reason) in BAD.items():
        assert reason in data.bad[f"{tmp_path}/x.tar:{name}"]
        assert f"x.tar:{name}" in caplog.text
    assert (
        len(ImageShards(str(put_images(tmp_path / "y.tar", 1, "small")), size=62)[1]["pixels"]) == 3
    )  # half is enough


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run_and_checkpoints_stay(workers, refused, tmp_path):
    path = put_images(tmp_path / "x.tar", 12, *BAD)
    run = [
        "data=images",
        "data.size=64",
        f"data.path={path}",
        "trainer.max_steps=40",
        "callbacks.checkpoint.every=1",
    ]
    said = refused("run", *run, f"data.num_workers={workers}", "callbacks.samples.every=1000")
    assert (
        "samples tried are bad, more than data.max_bad_share=0.1; repair the data, or raise the"
        " share." in said
    )
    assert said.startswith(f"data.path={path}: ")
    assert f"{path}:" in said
    if (
        workers == 0
    ):  # the stream goes bad after MIN_TRIED samples: checkpoints of the steps before are whole
        assert checkpoint_files.newest_checkpoint(tmp_path / "run").is_file()


# -- judging ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(refused, pipelines, tmp_path):
    """Evaluate a pipeline by prompts or COCO, which must fail -> its one sentence; nothing is left
    behind.
    """
    coco = eyes.write_coco(tmp_path / "coco")
    (tmp_path / "prompts.txt").write_text("a red star", encoding="utf-8")

    def call(*arguments, metrics="coco5k", run=None, path=coco):
        words = [
            f"run={run or pipelines('mmdit')}",
            f"metrics={metrics}",
            f"metrics.path={path}",
            "metrics.prompts=8",
        ]
        said = refused("evaluate", *words, *arguments)
        assert not (tmp_path / "evaluations").exists()
        return said

    return call


def test_what_cannot_be_judged(asked, tmp_path):
    assert asked("steps=many") == "steps=many: must be numbers of steps, 1,2,4 or the like"
    assert asked("steps=[0]").startswith("steps=[0]: must be numbers of steps")
    assert asked("metrics.measures=[clp]").startswith(
        "metrics.measures=['clp']: must be some of fid, kid, "
    )
    assert asked("metrics.measures=[]").startswith(
        "metrics.measures=[]: must be some of fid, kid, "
    )
    assert asked("metrics.prompts=9").endswith(
        "coco: has captions of 8 pictures, metrics.prompts=9"
    )
    assert "cannot read annotations/captions_val2017.json (FileNotFoundError" in asked(
        path=tmp_path
    )
    assert "nowhere: no such file; check the path" in asked(
        path=tmp_path / "nowhere", metrics="prompts"
    )
    lines = {"metrics": "prompts", "path": tmp_path / "prompts.txt"}
    said = "metrics.reference=None: fid needs a folder of real pictures"
    assert asked("metrics.measures=[fid]", "steps=1", **lines) == said
    said = asked("metrics.measures=[fid]", "steps=1", f"metrics.reference={tmp_path}", **lines)
    assert said == f"metrics.reference={tmp_path}: holds no pictures"
    for wrong in ("batch_size=0", "size=large", "seed=-1", "prompts=some", "prompts=3"):
        assert asked(f"metrics.{wrong}").startswith(f"metrics.{wrong}: must be a whole number")
    assert asked("metrics.size=[48,large]").startswith(
        "metrics.size[1]=large: must be a whole number"
    )
    for wrong in ("5", "[50, 1]", "[0, 4]", "[50]"):
        said = asked(f"metrics.variety={wrong}", "metrics.measures=[variety]")
        assert said == f"metrics.variety={wrong}: must be [captions, pictures of each, 2 or more]"
    assert "neither a finished run (with a student/) nor a diffusers pipeline folder" in asked(
        run=tmp_path / "no"
    )


def test_judging_under_torchrun(asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert asked("steps=1").endswith("use devices=8 or the like, without torchrun")


def test_a_judging_network_out_of_reach_is_named_before_anything_is_drawn(
    asked, monkeypatch, tmp_path
):
    monkeypatch.setattr("distill.evaluation.prompted.seeded", lambda _: pytest.fail("drawn"))
    said = asked("metrics.measures=[fd_dinov2]", "steps=1", f"out={tmp_path / 'out'}")
    assert said.startswith(
        "metrics.networks: the weights of facebook/dinov2-large cannot be read ("
    )
    assert said.endswith("or give a local path, or leave out of metrics.measures what needs them")


def test_a_folder_of_pictures_that_cannot_be_judged(asked, refused, tmp_path):
    pictures = tmp_path / "pictures"
    for path in eyes.write_pictures(pictures, 3):
        path.rename(path.with_stem(f"a{path.stem}"))
    said = refused("evaluate", f"run={pictures}")
    assert said == f"run={pictures} is a folder of pictures; add metrics=coco5k or metrics=prompts"
    said = asked("devices=2", run=pictures)
    assert (
        said
        == "devices=2: several processes need metrics=coco5k or prompts, and a model; leave it out"
    )
    clip = f"local-dir:{eyes.write_open_clip(tmp_path / 'open_clip')}"
    words = [
        "metrics.measures=[clip_score]",
        f"metrics.networks.clip_g.path={clip}",
        f"out={tmp_path / 'out'}",
    ]
    assert (
        "clip_score needs a .txt beside every picture, or pictures named by the numbers"
        in asked(*words, run=pictures)
    )
    for i, path in enumerate(sorted(pictures.iterdir())):
        path.rename(pictures / f"{i:06d}.jpg")
    (pictures / "000001.jpg").write_bytes(b"no picture")
    assert "000001.jpg: cannot be read as a picture (" in asked(
        *words, "metrics.workers=0", run=pictures
    )
    assert "000001.jpg: cannot be read as a picture (" in asked(
        *words, "metrics.workers=1", run=pictures
    )


def test_distances_on_the_discriminators_own_features_are_refused(
    refused, command, no_weights, pipelines, tmp_path
):
    coco, dino = (
        eyes.write_coco(tmp_path / "coco"),
        "metrics.measures=[fd_dinov2,manifolds,clip_score]",
    )
    metrics = ["metrics=coco5k", f"metrics.path={coco}", "metrics.prompts=8"]
    said = (
        "metrics.measures: fd_dinov2, manifolds use features of DINO, as this run's discriminator"
        " does, which favours the run"
    )
    shutil.copytree(pipelines("mmdit"), tmp_path / "old" / "student")
    config = {
        "discriminator": {"features": {"_target_": "distill.discriminators.images.ImageFeatures"}}
    }
    (tmp_path / "old" / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert refused("evaluate", f"run={tmp_path / 'old'}", *metrics, dino).startswith(said)
    config["discriminator"]["features"]["path"] = "openai/CLIP-vit-large-patch14"
    (tmp_path / "old" / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    said_of_clip = refused(
        "evaluate", f"run={tmp_path / 'old'}", *metrics, "metrics.measures=[cmmd,clip_score]"
    )
    assert said_of_clip.startswith(
        "metrics.measures: cmmd use features of CLIP, as this run's discriminator does"
    )
    shutil.rmtree(tmp_path / "old" / "student")  # so that it is refused for that
    assert "favours" not in refused("evaluate", f"run={tmp_path / 'old'}", *metrics, dino)
    whole = ["debug=smoke", "method=add", f"run_dir={tmp_path / 'run'}", *metrics, dino]
    assert command("run", *whole)[2].startswith(f"distill: {said}")
    assert not (tmp_path / "run").exists()


# -- the run folder --------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in ("file", "file/run"):
        said = refused("run", f"run_dir={tmp_path / path}")
        assert said.startswith(f"run_dir={tmp_path / path}: {tmp_path / 'file'} is no folder")
        assert said.endswith("name another place")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on(
    refused, command, pipelines, monkeypatch, tmp_path
):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(state)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr("distill.storage.checkpoint_files.torch.save", full)
    said = refused("run", "callbacks.checkpoint.every=1", "callbacks.samples.every=1000")
    folder = tmp_path / "run"
    assert said.startswith("cannot write the checkpoint ")
    assert (
        "step_000002.ckpt (No space left on device); earlier ones are unchanged: make room, then"
        " resume" in said
    )
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000001.ckpt"]
    assert command("run", f"resume={folder}", "~metrics")[0] == 0
    assert (
        checkpoint_files.read_checkpoint(folder / "checkpoints" / "step_000002.ckpt")["distill"][
            "iteration"
        ]
        == 2
    )
    # and once more full, now where the configuration is written: the finished run's own stays
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    opened = Path.open

    def no_room(path, mode="r", *given, **options):
        if "w" in mode and path.name.startswith("config.yaml"):
            full_disk(path)
        return opened(path, mode, *given, **options)

    monkeypatch.setattr(Path, "open", no_room)
    said = refused("run", f"resume={folder}", "trainer.max_steps=3")
    way = f"make room, then go on with: python -m distill.run resume={folder}"
    assert said == f"{folder}/config.yaml: No space left on device; {way}"
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before


def full_disk(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_damaged_configuration_of_a_run(refused, tmp_path):
    (tmp_path / "config.yaml").write_text("method: [unclosed", encoding="utf-8")
    (tmp_path / "checkpoints").mkdir()
    state = {"distill": {"iteration": 1}, "about": {"config": {}}}
    checkpoint_files.write_checkpoint(state, tmp_path / "checkpoints" / "step_000001.ckpt")
    assert "config.yaml" in refused("run", f"resume={tmp_path}")


def test_numbers_that_are_not_finite(refused, monkeypatch):
    monkeypatch.setattr(
        "distill.methods.ladd.LADD.discriminator_loss",
        lambda self, batch, *_: Losses({"adv": self.bad()}),
    )
    bad = lambda self: sum(p.sum() for p in self.heads.parameters()) * float("nan")  # noqa: E731
    monkeypatch.setattr("distill.methods.ladd.LADD.bad", bad, raising=False)
    said = refused("run", "loop.stop_after_bad=1", "callbacks.samples.every=1000")
    assert "had a gradient that is not finite" in said


def test_a_bug_keeps_its_traceback(command, monkeypatch, pipelines):
    def broken(*_):
        raise TypeError("ours")

    monkeypatch.setattr("distill.config.models.student_of", broken)
    with pytest.raises(TypeError, match="ours"):
        command("sample", f"run={pipelines('mmdit')}", "prompt=x", "guidance=4")


# -- parts and names that only a run knows ---------------------------------------------------------


@pytest.mark.slow
def test_a_name_that_was_never_logged_is_said_at_the_first_checkpoint(
    command, pipelines, shards, tmp_path
):
    good = [
        f"teacher.path={pipelines('mmdit')}",
        f"data.path={shards}",
        f"run_dir={tmp_path / 'r'}",
    ]
    words = ["debug=smoke", "~metrics", *good, "callbacks.checkpoint.every=1"]
    code, out, err = command("run", *words, "callbacks.checkpoint.best=g/adw")
    assert code == 0
    assert (out + err).count(
        "callbacks.checkpoint.best=g/adw: no value of this name was logged"
    ) == 1
    assert "there is no best.ckpt (did you mean g/adv?)" in out + err
    assert not (tmp_path / "r" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"taps": []}, "at least one block"), ({"taps": [0, 0]}, "each only once")]
    + [({"size": 3}, "the network's patches have ")],
)
def test_eyes_that_would_see_nothing_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ImageFeatures(str(tiny.vit()), **options)
