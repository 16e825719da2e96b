"""The pages on extending `distill`: their code runs from a user's package and folder of options."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import cards
import families
import tiny
from distill.config.models import student_of
from distill.core.score_distillation import guided_x0
from distill.sampling import Consistency, seeded
from distill.storage import source_code, trusted

DOCS = Path(__file__).parents[1] / "docs" / "how_to"
SMOKE = ("debug=smoke", "~metrics", "data.num_workers=0", "callbacks.samples.every=100")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write the code of a page into a module of the user's, and trust it."""

    def write(name: str, page: str) -> None:
        (code,) = blocks(page, "python")
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("DISTILL_TRUST", name)

    return write


def test_the_method_of_the_page_trains_and_is_checked(
    user_module, command, pipelines, shards, tmp_path
):
    user_module("mymethods", "add_a_method.md")
    folder = tmp_path / "mine" / "method"
    folder.mkdir(parents=True)
    (option,) = blocks("add_a_method.md", "yaml")
    (folder / "least_squares.yaml").write_text(option, encoding="utf-8")
    words = ["--config-dir", tmp_path / "mine", "method=least_squares", *SMOKE]
    words += [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}"]
    code, _, err = command("run", *words, "run_dir=run")
    assert code == 0, err
    rows = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert {"g/adv", "d/adv", "d/real", "d/fake"} <= set(rows[0].split(","))
    err = command("run", *words, "+method.real_tarket=2", "run_dir=other")[2]
    assert "real_tarket: mymethods.LeastSquares takes no such key" in err
    assert "did you mean real_target?" in err
    err = command("run", *words, "discriminator=dino", "run_dir=other")[2]
    assert "method needs a discriminator of latents" in err
    assert not (tmp_path / "other").exists()


def test_a_run_uses_the_heads_of_the_page(user_module, command, pipelines, shards, tmp_path):
    user_module("myheads", "add_heads.md")
    target = "+discriminator.heads._target_=myheads.MeanHeads"
    words = ["~discriminator.heads", target, "+discriminator.heads._partial_=true", *SMOKE]
    words += [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "run_dir=run"]
    code, _, err = command("run", *words)
    assert code == 0, err
    assert (tmp_path / "run" / "student").is_dir()


# -- a family of teachers --------------------------------------------------------------------------

LENGTH = 64  # tokens of its captions, letter by letter


@pytest.fixture
def auraflow(user_module, tmp_path):
    """The family of the page, in the user's files: the folder of a pipeline, and words of the
    command for its teacher.
    """
    user_module("myteachers", "add_a_teacher.md")
    options = tmp_path / "mine" / "teacher"
    options.mkdir(parents=True)
    (option,) = blocks("add_a_teacher.md", "yaml")
    (options / "auraflow.yaml").write_text(option, encoding="utf-8")
    folder = families.write("auraflow", tmp_path / "auraflow")
    words = ["--config-dir", tmp_path / "mine", "teacher=auraflow", f"teacher.path={folder}"]
    return folder, [*words, f"teacher.length={LENGTH}", "teacher.dtype=float32"]


def load(folder):
    return importlib.import_module("myteachers").AuraFlow(str(folder), length=LENGTH)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([0.9, 0.4])


def test_the_teacher_of_the_page_is_distilled_sampled_and_exported(
    auraflow, command, shards, tmp_path, monkeypatch
):
    folder, words = auraflow
    run = ["method=ladd", *SMOKE, f"data.path={shards}", "run_dir=run"]
    code, _, err = command("run", *words, *run)
    assert code == 0, err
    code, _, err = command("sample", "run=run", "prompt=a star", "steps=2", "out=drawn")
    assert code == 0, err
    assert len(list((tmp_path / "drawn").iterdir())) == 1
    code, _, err = command("export", "run=run", "to=diffusers", "dtype=float32", "out=fast")
    assert code == 0, err
    shutil.rmtree(tmp_path / "run")  # the exported folder is enough
    image = cards.drawn(tmp_path / "fast", tiny.CAPTIONS[0], steps=3, seed=5)
    student = student_of(str(tmp_path / "fast"))
    assert type(student).__name__ == "AuraFlow"
    assert student.length == LENGTH
    cond = student.embed(tiny.CAPTIONS[:1])
    with torch.no_grad():
        x0 = Consistency()(student, cond, seeded([5]), shape=student.latent_shape, steps=3)
        expected = (student.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (255 * (image - expected)).abs().max() <= 1.01
    monkeypatch.setenv("DISTILL_TRUST", "")
    err = command("sample", "run=fast", "prompt=a star", "out=more")[2]
    assert "run=fast holds a AuraFlowPipeline; known are " in err
    assert "to use a family of yours set DISTILL_TRUST=<its package>" in err


def test_a_guided_step_of_the_page_s_teacher_equals_its_pipeline(auraflow):
    folder, _ = auraflow
    pipeline, teacher = DiffusionPipeline.from_pretrained(folder), load(folder)
    pipeline.scheduler = (
        FlowMatchEulerDiscreteScheduler()
    )  # its last step returns the x0 prediction
    options = {"num_inference_steps": 1, "sigmas": [0.6], "guidance_scale": 5.0}
    options |= {"height": tiny.SIDE, "width": tiny.SIDE, "max_sequence_length": LENGTH}
    x_t, prompts = inputs()[0], tiny.CAPTIONS[:2]
    expected = pipeline(prompts, latents=x_t.clone(), output_type="latent", **options).images
    with torch.no_grad():
        t = torch.full((2,), 0.6)
        found = guided_x0(teacher, x_t, t, teacher.embed(prompts), torch.tensor(5.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_maps_of_the_page_s_teacher_are_outputs_of_its_blocks(auraflow):
    teacher = load(auraflow[0])
    assert list(teacher.channels) == ["block0", "block1", "single0", "single1"]
    outputs = {}
    for name, (module, _) in teacher.network.tappable().items():
        module.register_forward_hook(lambda *a, name=name: outputs.__setitem__(name, a[-1]))
    cond = teacher.embed(tiny.CAPTIONS[:2])
    with torch.no_grad():
        teacher.network.predict(*inputs(), cond)
        maps = teacher.features(*inputs(), cond, list(teacher.channels))
    for name, found in zip(teacher.channels, maps, strict=True):
        tokens = outputs[name][1] if isinstance(outputs[name], tuple) else outputs[name]
        assert found.shape == (2, 16, 8, 8)
        assert torch.equal(found[:, :, 3, 5], tokens[:, tokens.shape[1] - 64 + 3 * 8 + 5])


def test_mistakes_with_the_page_s_teacher_are_reported(auraflow, command, shards, tmp_path):
    folder, words = auraflow
    run = ["method=ladd", *SMOKE, f"data.path={shards}", "run_dir=run"]
    err = command("run", *words, "+teacher.lenght=3", *run)[2]
    assert "teacher.lenght: myteachers.AuraFlow takes no such key" in err
    assert "did you mean length?" in err
    tiny.write_pictures(tmp_path / "photos", 2)
    pictures = ["data=images", "data.path=photos", "data.size=60"]
    err = command("check", *words, *pictures)[2]
    assert "data.size=60: must be a multiple of 8 for this teacher" in err
    err = command("run", *words[:-3], f"teacher.path={tmp_path / 'photos'}", *run)[2]
    assert "not a diffusers pipeline folder" in err
    file = folder / "scheduler" / "scheduler_config.json"
    text = file.read_text(encoding="utf-8").replace("FlowMatchEulerDiscrete", "DDIM")
    file.write_text(text, encoding="utf-8")
    err = command("run", *words, *run)[2]
    assert "its scheduler (DDIMScheduler) says prediction_type=epsilon" in err
    assert not (tmp_path / "run").exists()


# -- data, a loss, a callback ----------------------------------------------------------------------

LOSS = ("~method.loss", "+method.loss._target_=myparts.wasserstein", "method.r1_weight=1e-5")
WRONG = "+callbacks.norms._target_=myparts.Arrays"
NORMS = ("+callbacks.norms._target_=myparts.Norms", "+callbacks.norms.every=1")
SIGN = "{_target_: myparts.Signs, _partial_: true, lr: 1e-5}"
SIGNS = ("~optimizer.student", f"+optimizer.student={SIGN}")
DIARY = ("+logger.diary={_target_: myparts.Diary, _partial_: true}",)


@pytest.fixture
def parts(user_module, tmp_path, pipelines):
    """The data, loss and callback of the page, and words of the command for the data."""
    user_module("myparts", "add_your_own.md")
    folder = tmp_path / "mine" / "data"
    folder.mkdir(parents=True)
    (option,) = blocks("add_your_own.md", "yaml")
    (folder / "arrays.yaml").write_text(option, encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pixels)
    captions = "\n".join(tiny.CAPTIONS[:12])
    (tmp_path / "pictures.txt").write_text(captions, encoding="utf-8")
    data = ["--config-dir", tmp_path / "mine", "data=arrays", "data.reader.path=pictures.npy"]
    return [*data, *SMOKE, f"teacher.path={pipelines('mmdit')}", "run_dir=run"]


@pytest.mark.slow
def test_a_run_uses_all_parts_of_the_page(parts, command, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_TRUST", "myparts")
    code, _, err = command("run", *parts, *LOSS, *NORMS, *SIGNS, *DIARY)
    assert code == 0, err
    diary = (tmp_path / "run" / "diary.txt").read_text(encoding="utf-8")
    assert diary.startswith("seed 0\n")
    assert "'g/adv': " in diary
    assert "0: samples, (" in diary
    assert diary.endswith("finished: report.html\n")
    text = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "g/norm" in text[0].split(",")
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "myparts.wasserstein" in config
    assert "myparts.Signs" in config
    shown = (tmp_path / "run" / "samples" / "captions.txt").read_text(encoding="utf-8")
    assert set(shown.splitlines()) <= set(tiny.CAPTIONS[:12])
    more = ["resume=run", "trainer.max_steps=3"]
    err = command("run", *more)[2]
    assert "set DISTILL_TRUST_RUN=run" in err
    monkeypatch.setenv("DISTILL_TRUST_RUN", "run")
    code, _, err = command("run", *more)
    assert code == 0, err


@pytest.mark.slow
def test_a_package_with_an_entry_point_needs_no_variable(parts, command, tmp_path):
    """All four kinds of parts from the command line."""
    about = tmp_path / "myparts-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: myparts\nVersion: 1.0\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text("[distill]\nall = myparts\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DISTILL_TRUST")
        trusted.plugins.cache_clear()
        code, _, err = command("run", *parts, *NORMS, *SIGNS, *DIARY)
        trusted.plugins.cache_clear()
    assert code == 0, err
    assert (tmp_path / "run" / "diary.txt").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [
                *SIGNS[:1],
                SIGNS[1].replace("Signs, _partial_: true, lr: 1e-5", "Norms, _partial_: true"),
            ],
            "must be a torch.optim.optimizer.Optimizer",
        ),
        ([*DIARY[:1], "+logger.diary.fil=x"], "logger.diary.fil: myparts.Diary takes no such key"),
        (["+data.reader.pth=x"], "data.reader.pth: myparts.Arrays takes no such key"),
        ([*NORMS[:1], "+callbacks.norms.evry=1"], "callbacks.norms.evry: myparts.Norms takes no"),
        ([*NORMS[:1], "+callbacks.norms.every=x"], "callbacks.norms.every=x: must be a whole num"),
        ([WRONG, "+callbacks.norms.path=x"], "is refused: it must be a lightning.pytor"),
        ([*LOSS, "+method.loss.scale=2"], "method.loss.scale: myparts.wasserstein takes no such k"),
        (["method.loss=wasserstein"], "method.loss=wasserstein: must be hinge or non_saturating"),
        (["data.reader._target_=myparts.Aray"], "myparts.Aray: there is nothing of this name"),
        (["data.reader._target_=yourparts.A"], "to allow a class of yours set DISTILL_TRUST="),
    ],
)
def test_mistakes_with_the_parts_of_the_page_are_reported(
    words, expected, parts, command, tmp_path
):
    code, _, err = command("run", *parts, *words)
    assert code == 1
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = (", "cannot be imported (SyntaxError: '(' was never closed (broken.py, line 1)"),
        ("import nowhere_at_all", "cannot be imported (ModuleNotFoundError: No module named 'now"),
        ("Mine = 1 / 0", "cannot be imported (ZeroDivisionError: division by zero); mend it"),
    ],
)
def test_errors_in_a_module_of_the_user_are_reported(
    text, expected, command, pipelines, shards, tmp_path, monkeypatch
):
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DISTILL_TRUST", "broken")
    source_code.source.cache_clear()
    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "run_dir=run", *SMOKE]
    code, _, err = command("run", *words, "+callbacks.mine._target_=broken.Mine")
    source_code.source.cache_clear()
    assert code == 1
    assert f"callbacks.mine._target_: broken.Mine: {expected}" in err
    assert err.count("\n") == 1


def test_a_data_source_of_the_user_reads_any_file(
    command, pipelines, shards, tmp_path, monkeypatch
):
    """Its path need not hold pictures, and it need not take the option's other keys."""
    code = (
        "from distill.data.source import prompts\n\n"
        "def lines(path: str, *, batch_size: int, num_workers=0):\n"
        "    return prompts(f'{path}/list.odd', batch_size=batch_size)\n\n"
        "def nothing(path: str, *, batch_size: int, num_workers=0):\n"
        "    return [path]\n"
    )
    (tmp_path / "mydata.py").write_text(code, encoding="utf-8")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "list.odd").write_text("a star\na box\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DISTILL_TRUST", "mydata")
    real = "+method.real._target_=distill.core.score_distillation.TeacherSamples"
    words = [f"teacher.path={pipelines('mmdit')}", "data=prompts", "data.path=odd", *SMOKE]
    words += [real]
    code, _, err = command("run", *words, "data._target_=mydata.lines", "run_dir=run")
    assert code == 0, err
    err = command("run", *words, "data._target_=mydata.lines", "data.limit=3", "run_dir=typed")[2]
    assert "data.limit" in err
    assert "takes" in err
    err = command("run", *words, "data._target_=mydata.nothing", "run_dir=other")[2]
    assert "data._target_=mydata.nothing: makes a list, and must make a distill.data.source" in err
