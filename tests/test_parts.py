"""What goes from a teacher's folder into a student's: what the index names, in one precision."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from safetensors.torch import load_file, save_file

import tiny
from distill import students
from distill.config.models import student_of
from distill.sampling import Consistency
from distill.students.parts import copy_part, copy_pipeline, weights_of
from distill.teachers.sd import SD

CLUTTER = (
    "sd_xl_base_1.0.safetensors", ".env", "notes.py", "vae_1_0/diffusion_pytorch_model.safetensors",
    "unet/model.onnx", "unet/model.onnx_data", "unet/openvino_model.bin", "unet/openvino_model.xml",
    "text_encoder/flax_model.msgpack", "text_encoder/tf_model.h5", "text_encoder/model.onnx",
    "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", "tokenizer/.env",
    "tokenizer/run.py", "vae/more/secret.json", "lora/x.safetensors", "samples/a.png",
)  # fmt: skip


def made(teacher, folder):
    student = students.full(teacher)
    scheduler = Consistency().scheduler(student, teacher)
    return students.save_pipeline(student, teacher, folder, scheduler)


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def cluttered(pipelines, tmp_path):
    """A teacher as folders of real models are."""
    folder = Path(shutil.copytree(pipelines("unet"), tmp_path / "teacher"))
    for name in CLUTTER:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"not for you")
    (folder / "LICENSE.md").write_text("terms", encoding="utf-8")
    secret = tmp_path / "secret.json"
    secret.write_text("{}", encoding="utf-8")
    os.symlink(secret, folder / "tokenizer" / "linked.json")
    os.symlink(secret, folder / "NOTICE")
    return folder


def test_a_student_s_folder_holds_what_its_index_names(cluttered, pipelines, tmp_path):
    folder = made(SD(str(cluttered)), tmp_path / "student")
    assert files(folder) == files(pipelines("unet")) | {"LICENSE.md"}
    assert AutoPipelineForText2Image.from_pretrained(folder).vae is not None


@pytest.mark.parametrize("to", ["diffusers", "here"])
def test_so_does_an_exported_one(to, cluttered, pipelines, command, tmp_path):
    out = [f"out={tmp_path / 'out'}"] if to == "diffusers" else ["dtype=float16"]
    assert command("export", f"run={cluttered}", "to=diffusers", *out)[0] == 0
    folder = tmp_path / ("out" if to == "diffusers" else "teacher_float16")
    assert files(folder) == files(pipelines("unet")) | {"LICENSE.md", "README.md"}


def test_what_a_link_leads_to_is_copied_if_it_is_of_a_model(cluttered, pipelines, tmp_path):
    """A folder of a stranger may have links to other files of this machine, or to folders."""
    private, copy = tmp_path / "private", tmp_path / "copy"
    private.mkdir()
    for name in ("config.json", "kaggle.json", "notes.txt", "key.safetensors"):
        (private / name).write_text('{"token": 1}', encoding="utf-8")
    others = Path(shutil.copytree(pipelines("unet"), tmp_path / "others"))
    for part in ("tokenizer", "vae"):  # of another model of one's own
        shutil.rmtree(cluttered / part)
        (cluttered / part).symlink_to(others / part)
    (others / "tokenizer" / "kaggle.json").write_text("{}", encoding="utf-8")
    copy_pipeline(cluttered, copy)
    assert files(copy) == files(pipelines("unet")) | {"LICENSE.md"}
    (cluttered / "scheduler" / "scheduler_config.json").unlink()
    shutil.rmtree(cluttered / "scheduler")
    (private / "config.json").rename(private / "other.json")
    (cluttered / "scheduler").symlink_to(private)
    assert files(copy_pipeline(cluttered, copy)) == {
        name for name in files(pipelines("unet")) | {"LICENSE.md"} if "scheduler/" not in name
    }
    unet = cluttered / "unet"
    links = {"config.json": "other.json", "diffusion_pytorch_model.safetensors": "key.safetensors"}
    for name, target in links.items():
        (unet / name).rename(unet / "kept")
        (unet / name).symlink_to(private / target)
        with pytest.raises(ValueError, match=f"{name}: is a link to a file of no model"):
            copy_pipeline(cluttered, copy)
        (unet / "kept").rename(unet / name)


def test_a_dtype_is_that_of_every_part(pipelines, command, tmp_path):
    """Half the size, and the pictures are those of the teacher in half precision."""
    source = made(SD(str(pipelines("unet"))), tmp_path / "student")
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        asked = ["to=diffusers", f"dtype={dtype}", f"out={out}"]
        assert command("export", f"run={source}", *asked)[0] == 0
        for file in out.rglob("*.safetensors"):
            found = {v.dtype for v in load_file(file).values() if v.is_floating_point()}
            assert found == {getattr(torch, dtype)}, file
    before, after = (student_of(str(p)).network.model for p in (source, tmp_path / "bfloat16"))
    assert tiny.same(tiny.weights(before.bfloat16()), tiny.weights(after.bfloat16()))


@pytest.mark.parametrize("variant", ["fp16", None])
def test_the_variant_that_the_teacher_was_read_in_is_copied(variant, pipelines, tmp_path):
    """Under plain names, so that a folder opens without being told of it; where both are there, the
    other is not.
    """
    folder = Path(shutil.copytree(pipelines("unet"), tmp_path / "teacher"))
    for part in ("vae", "unet", "text_encoder"):
        (plain,) = (folder / part).glob("*.safetensors")
        other = plain.with_name(plain.name.replace(".safetensors", ".fp16.safetensors"))
        save_file({k: v.half() * 0.5 for k, v in load_file(plain).items()}, other, {"format": "pt"})
    saved = made(SD(str(folder), variant=variant), tmp_path / "student")
    for part in ("vae", "text_encoder"):
        mark = ".fp16" if variant else ""
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        wanted = (folder / part / f"{stem}{mark}.safetensors").read_bytes()
        assert [p.name for p in (saved / part).glob("*.safetensors")] == [f"{stem}.safetensors"]
        assert (saved / part / f"{stem}.safetensors").read_bytes() == wanted


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, {"model.safetensors"}),
        (["pytorch_model.bin", "model.onnx"], None, {"pytorch_model.bin"}),
        (["model.fp16.safetensors"], None, {"model.safetensors"}),
        (["model.ema.safetensors"], "fp16", {"model.safetensors"}),
        (["openvino_model.bin", "flax_model.msgpack"], None, set()),
    ],
)
def test_one_set_of_weights(names, variant, expected, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert {name for name, _ in weights_of(tmp_path, variant)} == expected


def test_shards_of_a_variant_keep_the_names_that_their_index_has(tmp_path):
    """And an index cannot name a file elsewhere."""
    source = tmp_path / "source"
    source.mkdir()
    shards = {"a": "model.fp16-00001-of-00002.safetensors", "b": "model.fp16-00002.safetensors"}
    index = source / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    (source / "config.json").write_text("{}", encoding="utf-8")
    for name in shards.values():
        (source / name).write_bytes(b"x")
    (source / "model.fp16-00003.safetensors").write_bytes(b"x")  # of another save
    copy_part(source, tmp_path / "copy", "fp16")
    wanted = {*shards.values(), "config.json", "model.safetensors.index.json"}
    assert files(tmp_path / "copy") == wanted
    hostile = {"weight_map": shards | {"b": "../model.fp16-00002.safetensors"}}
    index.write_text(json.dumps(hostile), encoding="utf-8")
    with pytest.raises(ValueError, match="must name files of weights beside it"):
        copy_part(source, tmp_path / "other", "fp16")


def test_links_into_the_hub_s_own_store_are_followed(pipelines, tmp_path):
    """As its cache has it: snapshots are links to blobs."""
    store = tmp_path / "models--a--b"
    snapshot = store / "snapshots" / "1"
    (store / "blobs").mkdir(parents=True)
    for i, file in enumerate(sorted(p for p in pipelines("unet").rglob("*") if p.is_file())):
        blob, link = store / "blobs" / str(i), snapshot / file.relative_to(pipelines("unet"))
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        os.symlink(os.path.relpath(blob, link.parent), link)
    folder = made(SD(str(snapshot)), tmp_path / "student")
    assert files(folder) == files(pipelines("unet"))
    assert not any(p.is_symlink() for p in folder.rglob("*"))
