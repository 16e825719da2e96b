"""`export to=onnx`: the networks in onnxruntime, with the sampler of docs/how_to/onnx.md in numpy,
paint what torch paints.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import families
import tiny
from distill import students
from distill.config.models import sampler_of, student_of
from distill.sampling import Consistency, Euler, EulerAncestral, seeded, to_bytes

ort = pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")
PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "onnx.md"
CAPTIONS = ("a large red star on black", "")
# Family -> the sampler of its student, so that each is used.
SAMPLERS = {"shapes": Consistency, "sdxl": EulerAncestral, "sd35": Euler}


def student_folder(family: str, folder: Path) -> str:
    """A student of a tiny random pipeline of this family, or the shipped one."""
    if family == "shapes":
        return "shapes:student"
    teacher = families.teacher_at(families.write(family, folder / "teacher"))
    sampler = SAMPLERS[family]()
    scheduler = sampler.scheduler(teacher.network, teacher)
    students.save_pipeline(teacher.network, teacher, folder / "student", scheduler, sampler)
    return str(folder / "student")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, forks):
    """Family -> (its student, folder of the export, what the command has said)."""
    made: dict[str, tuple[str, Path, str]] = {}

    def of(family: str) -> tuple[str, Path, str]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            run, said = student_folder(family, folder), folder / "said"
            words = [f"run={run}", "to=onnx", f"out={folder / 'onnx'}"]
            fork = forks.command("export", words, out=said, err=folder / "err")
            assert fork.wait(900) == 0, (folder / "err").read_text(encoding="utf-8")
            made[family] = run, folder / "onnx", said.read_text(encoding="utf-8")
        return made[family]

    return of


def program() -> str:
    """The program of the page."""
    found = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert found
    return found[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", list(SAMPLERS))
def test_the_program_of_the_page_paints_what_torch_paints(family, exported, tmp_path, monkeypatch):
    run, folder, said = exported(family)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx").symlink_to(folder)
    names: dict[str, Any] = {}
    exec(compile(program(), "onnx.md", "exec"), names)
    assert (tmp_path / "star.png").is_file()
    student = student_of(run)
    sampler = sampler_of(run, student)
    assert type(sampler) is SAMPLERS[family]
    for caption in CAPTIONS:
        cond = student.embed([caption])
        for steps in (1, 2, 4):
            shape = student.latent_shape
            latents = sampler(student, cond, seeded([3]), shape=shape, steps=steps)
            expected = to_bytes(student.pictures(latents))[0].permute(1, 2, 0).numpy()
            [generator] = seeded([3])
            noise = lambda: torch.randn((1, *shape), generator=generator).numpy()  # noqa: B023, E731
            got = names["sample"](caption, steps, noise)
            difference = np.abs(got.astype(int) - expected.astype(int))
            assert difference.max() <= 1, (caption, steps)
            assert (difference > 0).mean() < 0.01
            assert expected.std() > 5
    worst = re.findall(r"largest difference from torch: (.*)", said)
    assert re.fullmatch(r"denoiser \S+, text encoder \S+, decoder \S+", worst[0]), said
    about = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    assert max(about["largest_difference_from_torch"].values()) < 1e-3
    assert about["latents"] == list(student.latent_shape)
    assert about["scale"] == student.vae.config.scaling_factor
    assert about["process"] == type(student.process).__name__
    tokenizers = set(about["networks"]["text_encoder"]["inputs"])
    files = {"student.json", "denoiser.onnx", "text_encoder.onnx", "decoder.onnx"}
    assert {path.name for path in folder.iterdir()} == files | tokenizers


@pytest.mark.slow
def test_batches_of_any_size_are_one_by_one(exported):
    _, folder, _ = exported("shapes")
    about = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    session = ort.InferenceSession(folder / "denoiser.onnx")
    draw = np.random.default_rng(0)
    shapes = about["networks"]["denoiser"]["inputs"]
    given = {n: np.float32(draw.uniform(0.1, 1, [5, *rest])) for n, (_, *rest) in shapes.items()}
    [whole] = session.run(["x0"], given)
    ones = [session.run(["x0"], {n: x[i : i + 1] for n, x in given.items()})[0] for i in range(5)]
    assert np.abs(whole - np.concatenate(ones)).max() < 1e-4


@pytest.mark.slow
def test_networks_that_differ_from_torch_are_refused(tmp_path):
    from distill.exporting.onnx_files import compare, write
    from distill.exporting.traced import networks_of

    student = families.teacher_at(families.write("sd15", tmp_path / "teacher"))
    denoiser, _, decoder = networks_of(student, ("a", "b"), torch.tensor([1.0, 0.5]))
    assert list(denoiser.inputs) == ["x_t", "t", "tokens"]  # the pooled caption is for heads
    write(decoder, tmp_path / "decoder.onnx", "pipeline")
    assert compare(student, [decoder], tmp_path)["decoder"] < 1e-4
    with torch.no_grad():
        student.vae.decoder.conv_out.weight *= 1.01
    with pytest.raises(
        ValueError, match=r"pixels of the decoder differs from torch's by \S+, 1\.\d"
    ):
        compare(student, [decoder], tmp_path)


def test_what_cannot_be_exported_is_said_before_anything_is_written(command, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    folder = tiny.write_pipeline("unet", tmp_path / "unet")
    before = sorted(tmp_path.rglob("*"))
    words = {
        ("to=onnx",): "out=null: run=",
        ("to=onnx", f"out={there}"): "is there already",
        ("to=onnx", "out=new", "dtype=float16"): "dtype=float16: has no effect on to=onnx",
        ("to=onnx", "out=new", "runtime=x.tgz"): "runtime=x.tgz: has no effect on to=onnx",
        ("to=web", "out=new"): "`npm pack onnxruntime-web`",
        ("to=web", "out=new", "runtime=x.tgz"): "runtime=x.tgz: no such file",
        ("to=web", "out=new", f"runtime={there}"): "has no dist/ort.wasm.min.js",
        ("to=web", "out=new", f"runtime={folder}/model_index.json"): "is no archive of npm",
        ("to=onnx", "out=new"): "was not distilled",
    }
    for given, expected in words.items():
        code, _, err = command("export", f"run={folder}", *given)
        assert code == 1, given
        assert expected in err
        assert err.strip().count("\n") == 0 or "was not distilled" in err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else real(n, *a)
    )
    code, _, err = command("export", f"run={folder}", "to=onnx", "out=new")
    assert code == 1
    assert "needs onnxruntime, not installed here; pip install 'distill[onnx]'" in err
    assert sorted(tmp_path.rglob("*")) == before
