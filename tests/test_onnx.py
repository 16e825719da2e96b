"""`export to=onnx`: the networks in onnxruntime, with the sampler of docs/how_to/onnx.md in numpy,
paint what torch paints.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import families
import tiny
from distill import students
from distill.config.compose import shipped
from distill.config.models import sampler_of, student_of
from distill.exporting import openvino_files
from distill.sampling import Consistency, Euler, EulerAncestral, distilled, seeded, to_bytes
from distill.teachers.families import BUILT_IN
from distill.teachers.loading.locate import is_distilled, pipeline_folder

ort = pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")
NO_OPENVINO = importlib.util.find_spec("openvino") is None
needs_openvino = pytest.mark.skipif(NO_OPENVINO, reason="pip install -e '.[openvino]'")
PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "onnx.md"
CAPTIONS = ("a large red star on black", "")
# Family -> the sampler of its student, so that each is used.
SAMPLERS = {"shapes": Consistency, "sdxl": EulerAncestral, "sd35": Euler, "lumina2": Consistency}
REFUSED = {  # class of a pipeline -> why
    "KolorsPipeline": "whose tokenizer is code of diffusers",
    "WanPipeline": "which makes videos",
    **dict.fromkeys(
        ("FluxFillPipeline", "FluxKontextPipeline", "StableDiffusion3InpaintPipeline")
        + ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
        + ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
        "which also reads a picture",
    ),
}
EXPORTED = [*(f for f in families.FAMILIES if f != "kolors"), "pixart_alpha_1024"]


def student_folder(family: str, folder: Path) -> str:
    """A student of a tiny random pipeline of this family, or the shipped one."""
    if family == "shapes":
        return "shapes:student"
    teacher = families.teacher_of(family, families.write(family, folder / "teacher"))
    sampler = SAMPLERS.get(family, Consistency)()
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


@pytest.mark.parametrize("family", tiny.tiered(SAMPLERS, slow=["shapes", "sdxl"]))
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


@pytest.mark.parametrize(
    "family", tiny.tiered(EXPORTED, slow=("sdxl", "sd35", "pixart", "flux", "qwenimage"))
)
def test_every_family_is_exported_and_equals_torch(family, exported):
    _, folder, _ = exported(family)
    about = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    assert about["largest_difference_from_torch"].keys() == about["networks"].keys()
    reads = about["networks"]["text_encoder"]["reads"]
    assert reads.keys() == about["networks"]["text_encoder"]["inputs"].keys()


def test_the_table_of_families_is_whole():
    written = {name: (families.FAMILIES | families.OTHERS)[name].write() for name in EXPORTED}
    exported = {type(pipeline).__name__ for pipeline in written.values()}
    assert exported.isdisjoint(REFUSED)
    assert exported | set(REFUSED) == set(BUILT_IN)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_is_refused_before_weights_are_read(kind, command, tmp_path):
    part = "unet" if "StableDiffusion" in kind and "3" not in kind else "transformer"
    student = tmp_path / "student"
    (student / part).mkdir(parents=True)
    index = {"_class_name": kind, "_diffusers_version": "0.35.0", part: ["diffusers", "X"]}
    (student / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    code, _, err = command("export", f"run={student}", "to=onnx", "out=new")
    assert code == 1
    assert f"to=onnx: run={student} holds a {kind}, {REFUSED[kind]}" in err
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize("family", [f for f in SAMPLERS if f != "shapes"])
def test_the_files_say_as_the_pipeline_whether_it_was_distilled(family, tmp_path):
    student = Path(student_folder(family, tmp_path))
    for folder in (student, tmp_path / "teacher"):
        pipeline = families.teacher_at(folder).pipeline
        assert is_distilled(folder) == distilled(pipeline)
        del pipeline.sampler  # as of a folder that others have made
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index.pop("_distill", None)
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        assert is_distilled(folder) == distilled(pipeline)
    assert is_distilled(pipeline_folder(Path(shipped("shapes:student"))))


@pytest.mark.parametrize("form", ["onnx", "openvino", "web"])
def test_what_cannot_be_traced_is_said_of_the_form_that_was_asked_for(form, tmp_path):
    from distill.exporting.onnx_files import save_onnx

    student = families.teacher_at(families.write("sd_inpaint", tmp_path / "student"))
    student.pipeline.scheduler = Consistency().scheduler(student.network, student)
    with pytest.raises(ValueError, match=f"^to={form}: a StableDiffusionInpaint.* to=diffusers$"):
        save_onnx(student, Consistency(), tmp_path / "student", tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["zimage", "lumina2", "qwenimage", "chroma"])
def test_a_traceable_network_is_the_network(family, family_teachers):
    from distill.exporting.traceable import traceable

    teacher = family_teachers(family)
    cond = teacher.embed(["a", "two blue rings on a table, at dawn", ""])
    x_t, t = torch.randn(3, *teacher.latent_shape), torch.tensor([1.0, 0.6, 0.3])
    with torch.no_grad():
        expected = teacher.x0(x_t, t, cond)
        with traceable(teacher.network):
            found = teacher.x0(x_t, t, cond)
        assert torch.equal(teacher.x0(x_t, t, cond), expected)
    same = family == "chroma"  # whose form differs only in how it is traced
    assert torch.equal(found, expected) == same
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_operations_that_onnx_reads_differently_are_replaced():
    from distill.exporting.graphs import corrected

    class Network(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.squeeze(1) / (x.squeeze(0).sum() + 1e-15)

    traced = corrected(torch.export.export(Network(), (torch.zeros(1, 2, 3),), strict=False))
    names = [str(node.target) for node in traced.graph.nodes]
    assert names.count("aten.squeeze.dim") == 1  # that of a dimension which is 1
    assert not any(1e-15 in node.args for node in traced.graph.nodes if "add" in str(node.target))
    x = torch.ones(1, 2, 3)
    assert torch.equal(traced.module()(x), Network()(x))


@pytest.mark.slow
def test_int8_makes_the_denoiser_smaller_and_moves_it_little(exported, forks, tmp_path):
    _, whole, _ = exported("shapes")
    words = ["run=shapes:student", "to=onnx", "weights=int8", f"out={tmp_path / 'small'}"]
    fork = forks.command("export", words, out=tmp_path / "said", err=tmp_path / "err")
    assert fork.wait(900) == 0, fork.said()
    sizes = [(x / "denoiser.onnx").stat().st_size for x in (tmp_path / "small", whole)]
    assert sizes[0] < 0.4 * sizes[1]
    about = json.loads((tmp_path / "small" / "student.json").read_text(encoding="utf-8"))
    assert about["weights"] == "int8"
    assert 0 < about["int8_difference_of_x0"] < 0.15
    assert "x0 differs by" in fork.said("out")


LISTEN = """
import os, sys, threading, time
from distill.exporting import openvino_files

calls = []
os.register_at_fork(before=lambda: calls.append("fork"))
sys.addaudithook(lambda name, _: calls.append(name) if name == "socket.connect" else None)
library = openvino_files.openvino()
time.sleep(2)
print(library.__name__, calls, threading.active_count())
"""


@needs_openvino
def test_openvino_reports_to_nobody_and_forks_nothing():
    """Its telemetry would send from a forked process as soon as the library is imported."""
    words = [sys.executable, "-c", LISTEN]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.split() == ["openvino", "[]", "1"], done.stderr


AFTERWARDS = """
import logging, sys
from distill.exporting import openvino_files

if sys.argv[2:]:
    __import__(sys.argv[2])
sys.stderr = kept = open(sys.argv[1], "w")
openvino_files.openvino()
print("absl.logging" in sys.modules)
sys.stderr = sys.__stderr__
logging.shutdown()  # as Hydra does before it sets up the logs of a command
print(kept.closed)
import absl
print(absl.__name__)
"""


@needs_openvino
@pytest.mark.parametrize("before", [[], ["torch.utils.tensorboard"]])
def test_openvino_leaves_no_handler_that_closes_stderr(before, tmp_path):
    """It imports absl's logging, whose handler closes the stderr of that moment. TensorBoard
    imports absl alone.
    """
    words = [sys.executable, "-c", AFTERWARDS, str(tmp_path / "other"), *before]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.split() == ["False", "False", "absl"], done.stderr


@pytest.mark.slow
@needs_openvino
def test_openvino_is_checked_in_its_runtime(forks, tmp_path):
    library = openvino_files.openvino()
    run = student_folder("sd35", tmp_path)
    words = [f"run={run}", "to=openvino", f"out={tmp_path / 'ov'}"]
    fork = forks.command("export", words, out=tmp_path / "said", err=tmp_path / "err")
    assert fork.wait(900) == 0, fork.said()
    assert "largest difference from torch: denoiser" in fork.said("out")
    about = json.loads((tmp_path / "ov" / "student.json").read_text(encoding="utf-8"))
    for part in about["networks"].values():
        file = tmp_path / "ov" / part["file"]
        assert file.suffix == ".xml"
        assert {port.get_any_name() for port in library.Core().read_model(file).inputs} == set(
            part["inputs"]
        )
    assert not list((tmp_path / "ov").glob("*.onnx*"))


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
    with pytest.raises(Exception, match="Got invalid dimensions for input: x_t"):
        session.run(["x0"], {**given, "x_t": given["x_t"][:, :, :8, :8]})


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
    assert "was not distilled" in command("export", f"run={folder}", "to=onnx", "out=new")[2]
    words = {
        ("to=onnx",): "out=null: run=",
        ("to=onnx", f"out={there}"): "is there already",
        ("to=onnx", "out=new", "dtype=float16"): "dtype=float16: has no effect on to=onnx",
        ("to=onnx", "out=new", "runtime=x.tgz"): "runtime=x.tgz: has no effect on to=onnx",
        ("to=web", "out=new"): "`npm pack onnxruntime-web`",
        ("to=web", "out=new", "runtime=x.tgz"): "runtime=x.tgz: no such file",
        ("to=web", "out=new", f"runtime={there}"): "has no dist/ort.wasm.min.js",
        ("to=web", "out=new", f"runtime={folder}/model_index.json"): "is no archive of npm",
    }
    for given, expected in words.items():
        code, _, err = command("export", "run=shapes:student", *given)
        assert code == 1, given
        assert expected in err
        assert err.strip().count("\n") == 0
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: n == "openvino" or real(n, *a))
    code, _, err = command("export", f"run={folder}", "to=openvino", "out=new")
    what = f"run={folder} was not distilled to few steps, and has no sampler to export"
    assert err.strip() == f"distill: to=openvino: {what}; give a student"
    absent = ("onnxruntime", "openvino")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in absent else real(n, *a)
    )
    for form, package, extra in (("onnx", absent[0], "onnx"), ("openvino", absent[1], absent[1])):
        code, _, err = command("export", "run=shapes:student", f"to={form}", "out=new")
        assert code == 1
        assert f"needs {package}, not installed here; pip install 'distill[{extra}]'" in err
    assert sorted(tmp_path.rglob("*")) == before
