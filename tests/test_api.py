"""`import distill` in a program: its names, and results equal to the commands' to the last bit."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import distill
import families
import golden
import tiny
from distill.data.write import write_latents

PACKAGE = Path(distill.__file__).parent
# Words of every run here: three steps with a visible effect, on tiny networks.
FEW = [*golden.FEW, "loop.head_start=1", "loop.warmup_steps=0", "loop.ema_decay=0.5"]
DINO = [*golden.EYES, f"discriminator.features.path={tiny.vit()}"]
SHAPES = {"mmdit": "shapes", "unet": "shapes_unet"}
# Method -> family of the teacher, and further words of the command.
RUNS: dict[str, tuple[str, list[str]]] = {
    "LADD": ("mmdit", ["method=ladd"]),
    "LADD lora": ("unet", ["method=ladd", "student=lora", "student.rank=2"]),
    "LADD euler random": ("mmdit", ["method=ladd", "sampler=euler", "student.init=random"]),
    "ADD": ("unet", ["method=add", *DINO]),
    "NitroFusion": ("unet", ["method=nitrofusion", "method.warm_start=1"]),
    "DMD2": ("mmdit", ["method=dmd2"]),
    "Regression": ("mmdit", ["method=regression", "loop.head_start=0"]),
    # loading this teacher uses random numbers
    "LADD pixart": ("pixart", ["method=ladd", "data=renders", "data.limit=8"]),
    "ConsistencyDistillation": ("unet", ["method=consistency", "loop.head_start=0"]),
}


# -- the names -------------------------------------------------------------------------------------

IMPORT = """
import sys, time
began = time.perf_counter()
import distill
seconds = time.perf_counter() - began
print(seconds, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_the_package_is_quick_and_imports_no_library():
    seconds = []
    for _ in range(3):  # the machine may be busy
        printed = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, check=True, encoding="utf-8"
        ).stdout.split()
        seconds.append(float(printed[0]))
        libraries = {"torch", "lightning", "diffusers", "hydra", "omegaconf", "numpy"}
        assert not libraries & set(printed)
    assert min(seconds) < 0.05


@pytest.mark.parametrize("name", distill.PUBLIC)
def test_every_public_name_exists_and_has_a_docstring(name):
    found = getattr(distill, name)
    assert found is getattr(distill, name)
    assert callable(found)
    assert found.__doc__
    assert name in dir(distill)


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'distill' has no attribute 'LAD'"):
        _ = distill.LAD


def test_no_public_name_is_that_of_a_module():
    """An import of the module would replace the public name."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(distill.PUBLIC)


def test_the_stub_lists_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: f"{node.module.removeprefix('distill.')}:{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == distill.PUBLIC
    (listed,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed) == list(distill.PUBLIC) == distill.__all__


# -- the same as the commands ----------------------------------------------------------------------


def trained(words: list[str], *, plain: bool, heads: Any = None) -> tuple[Any, Any]:
    """Train in Python, with a plain trainer or the command's: the settings and the method."""
    settings = distill.compose(*words)
    teacher = distill.load_teacher(settings)
    torch.rand(3)  # as a notebook may use random numbers between its cells
    student = distill.make_student(settings, teacher)
    players = distill.make_players(settings, teacher, student, heads=heads)
    kind = getattr(distill, settings.method._target_.rpartition(".")[2])
    method = kind(players, **distill.arguments(settings))
    data = distill.load_data(settings, teacher)
    if plain:
        trainer = lightning.Trainer(**distill.arguments(settings, "trainer"), logger=False)
    else:
        trainer = distill.make_trainer(settings)
    trainer.fit(method, data)
    return settings, method


def files(folder: Path) -> dict[str, bytes]:
    """Path -> content of all files but the model card, which describes the run."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if name != "README.md"}


@pytest.mark.parametrize(
    "name",
    tiny.tiered(RUNS, quick=["LADD"], slow=["LADD lora", "ADD", "NitroFusion", "DMD2"]),
)
def test_training_in_python_equals_the_command(name, command, pipelines, shards, tmp_path, capsys):
    family, words = RUNS[name]
    if family == "pixart":
        path = families.write(family, tmp_path / family)
        words = ["teacher=pixart_sigma", "teacher.dtype=float32", *FEW, *words]
    else:
        path = pipelines(family)
        words = [f"teacher={SHAPES[family]}", *FEW, *words, f"data.path={shards}"]
    words.append(f"teacher.path={path}")
    code, _, err = command("run", *words, "run_dir=run")
    assert code == 0, err
    plain = name != "NitroFusion"
    settings, method = trained([*words, "run_dir=mine"], plain=plain)
    saved = distill.save_student(settings, method, "student")
    expected = files(tmp_path / "run" / "student")
    assert expected
    assert files(saved) == expected
    prompts = tiny.CAPTIONS[:2]
    if "lora" in name:  # the command merges the adapters, so its pictures differ by rounding
        return
    listed = json.dumps(list(prompts))
    options = ["steps=2", "count=2", "seed=5"]
    code, out, err = command("sample", "run=run", f"prompts={listed}", *options, "out=pictures")
    assert code == 0, err
    expected_images = [np.asarray(Image.open(path)) for path in out.split()[:4]]
    images = distill.sample_images(settings, method, prompts, steps=2, count=2, seed=5)
    assert len(images) == 4
    assert all(np.array_equal(a, b) for a, b in zip(expected_images, images, strict=True))


@pytest.mark.slow
def test_make_trainer_writes_the_files_of_the_command(command, pipelines, shards, tmp_path):
    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", *FEW]
    code, _, err = command("run", *words, "run_dir=run")
    assert code == 0, err
    settings, _ = trained([*words, "run_dir=mine"], plain=False)
    for name in ("samples/captions.txt", "samples/step_000003.png", "alarms.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "mine" / name).read_bytes()
    assert (tmp_path / "mine" / "checkpoints" / "step_000003.ckpt").is_file()
    head = [(tmp_path / f / "metrics.csv").read_text(encoding="utf-8") for f in ("run", "mine")]
    assert head[0].splitlines()[0] == head[1].splitlines()[0]
    with pytest.raises(FileExistsError, match="run_dir=mine: is not empty"):
        distill.make_trainer(settings)


@pytest.mark.slow
def test_a_plain_trainer_resumes_from_a_checkpoint(pipelines, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", *FEW]
    words += ["trainer.max_steps=4", "loop.schedule=constant"]
    _, straight = trained(words, plain=True)
    settings = distill.compose(*words)
    teacher = distill.load_teacher(settings)
    for steps, checkpoint in ((2, None), (4, "half.ckpt")):
        players = distill.make_players(settings, teacher, distill.make_student(settings, teacher))
        method = distill.LADD(players, **distill.arguments(settings))
        options = distill.arguments(settings, "trainer") | {"max_steps": steps, "logger": False}
        trainer = lightning.Trainer(**options, enable_checkpointing=False)
        data = distill.load_data(settings, teacher)
        trainer.fit(method, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        trainer.save_checkpoint("half.ckpt")
    assert method.step == straight.step == 4
    assert tiny.same(tiny.weights(method.student), tiny.weights(straight.student))


def test_sampling_and_saving_do_not_change_the_training(pipelines, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", *FEW]
    settings, method = trained(words, plain=True)
    weights = tiny.weights(method.student)
    average = {name: x.clone() for name, x in method.ema.state_dict().items()}
    before = distill.sample_images(settings, method, ["a star"])[0]
    saved = distill.save_student(settings, method, "student")
    (file,) = saved.glob("transformer/*.safetensors")
    averaged = {name.removeprefix("model."): x for name, x in average.items()}
    written = load_file(file)
    assert all(torch.equal(written[name], x) for name, x in averaged.items())
    assert tiny.same(tiny.weights(method.student), weights)
    assert method.student.training
    again = distill.load_teacher("student")
    reread = distill.sample_images(settings, again, ["a star"])[0]
    assert np.array_equal(before, reread)
    with pytest.raises(FileExistsError, match="folder=student: is there already; remove it or"):
        distill.save_student(settings, method, "student")


def test_a_teacher_samples_with_guidance(pipelines, command, tmp_path):
    path = pipelines("unet")
    options = ["steps=3", "guidance=2.0", "seed=1"]
    code, out, err = command("sample", f"run={path}", "prompt=a star", *options)
    assert code == 0, err
    settings = distill.compose()
    teacher = distill.load_teacher(path)
    (image,) = distill.sample_images(settings, teacher, ["a star"], steps=3, guidance=2.0, seed=1)
    assert np.array_equal(np.asarray(Image.open(out.split()[0])), image)


# -- settings and parts ----------------------------------------------------------------------------


def test_settings_equal_those_of_the_command_and_have_its_name():
    words = ["method=add", "teacher=shapes_unet", "seed=3"]
    settings = distill.compose(*words)
    assert settings.name == "add_shapes_unet"
    expected = golden.configuration(words)
    assert {**settings, "name": None} == {**expected, "name": None}


def test_a_teacher_is_loaded_by_name_by_path_and_by_settings(pipelines):
    by_name = distill.load_teacher("shapes_unet", path=str(pipelines("unet")), dtype="bfloat16")
    by_path = distill.load_teacher(pipelines("unet"))
    assert type(by_name) is type(by_path)
    assert by_name.network.model.dtype == torch.bfloat16
    assert by_path.network.model.dtype == torch.float32
    settings = distill.compose("teacher=shapes_small", "+teacher.dtype=bfloat16")
    assert distill.load_teacher(settings).network.model.dtype == torch.bfloat16


class MeanHeads(nn.Module):
    """One linear layer for each map."""

    def __init__(self, channels, pooled):
        super().__init__()
        assert pooled >= 0
        self.layers = nn.ModuleList(nn.Linear(width, 1) for width in channels.values())

    def forward(self, maps, t, cond):
        means = [m.flatten(2).mean(2) for m in maps]
        logits = [layer(m) for layer, m in zip(self.layers, means, strict=True)]
        return distill.Logits(torch.cat(logits, dim=1), (1,) * len(logits))

    def draw(self, generator):
        return self

    def refresh(self, generator):
        return ()


def test_heads_passed_as_a_class_are_trained(pipelines, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = []

    def heads(*arguments, **options):
        built.append(MeanHeads(*arguments, **options))
        built.append([layer.weight.detach().clone() for layer in built[0].layers])
        return built[0]

    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", *FEW]
    _, method = trained(words, plain=True, heads=heads)
    assert method.heads is built[0]
    assert method.step == 3
    for layer, start in zip(method.heads.layers, built[1], strict=True):
        assert not torch.equal(layer.weight, start)


def test_a_module_is_used_as_it_is(teachers):
    settings, teacher = distill.compose(), teachers("mmdit")
    student = teacher.network.trainable_copy()
    features = distill.TeacherFeatures(teacher, taps=["block0"])
    heads = MeanHeads(features.channels, 0)
    players = distill.make_players(settings, teacher, student, features=features, heads=heads)
    assert (players.features, players.heads) == (features, heads)


# -- mistakes --------------------------------------------------------------------------------------

PAIRING = (
    "method needs a discriminator of latents, and this one works on pixels; choose another"
    " discriminator="
)


def error_of(command: Any, *words: str) -> str:
    code, _, err = command("run", *words)
    assert code == 1
    return err.removeprefix("distill: ").rstrip("\n")


@pytest.mark.parametrize(
    "words",
    [
        ["method=ladd", "discriminator=dino"],
        ["trainer.max_steps=abc"],
        ["teacher=shape"],
        ["optimizer.shedule=cosine"],
        ["+optimizer.shedule=cosine"],
        ["seed=1,2"],
        ["teacher=sd3"],
        ["teacher.path=./nope"],
        ["method=regression", "loop.head_start=5"],
        ["~sampler"],
        ["data=latents"],
        ["optimizer.student._target_=os.system"],
        ["method.levels.odds=[1,0,0]"],
    ],
    ids=" ".join,
)
def test_a_mistake_gives_the_error_of_the_command(words, command):
    with pytest.raises((ValueError, OSError)) as caught:
        distill.arguments(distill.compose(*words))
    assert type(caught.value).__module__ == "builtins"
    assert str(caught.value) == error_of(command, *words)


def test_objects_that_do_not_fit_give_the_error_of_the_command(teachers, command):
    assert error_of(command, "method=ladd", "discriminator=dino") == PAIRING
    settings, teacher = distill.compose("method=ladd"), teachers("mmdit")
    student, features = teacher.network.trainable_copy(), tiny.eyes()
    with pytest.raises(ValueError, match="works on pixels") as caught:
        distill.make_players(settings, teacher, student, features=features)
    assert str(caught.value) == PAIRING
    heads = MeanHeads(features.channels, 0)
    players = distill.Players(teacher=teacher, student=student, features=features, heads=heads)
    with pytest.raises(ValueError, match="works on pixels") as caught:
        distill.LADD(players, **distill.arguments(settings))
    assert str(caught.value) == PAIRING


def test_teachers_and_students_of_another_family_are_refused(teachers, pipelines, command):
    path = str(pipelines("unet"))
    with pytest.raises(ValueError, match="but this teacher reads") as caught:
        distill.load_teacher("sd3", path=path)
    words = ["teacher=sd3", f"teacher.path={path}", "debug=smoke"]
    assert str(caught.value) == error_of(command, *words)
    settings = distill.compose()
    with pytest.raises(ValueError, match="student: its class is UNet2DConditionModel and the"):
        distill.make_players(settings, teachers("mmdit"), teachers("unet").network.trainable_copy())
    with pytest.raises(ValueError, match="teacher of the same family"):
        distill.make_players(settings, teachers("unet"), teachers("sdxl").network.trainable_copy())


def test_data_that_do_not_fit_the_teacher_are_refused(teachers, tmp_path, command):
    latents = ((f"{i}", np.zeros((3, 16, 16)), tiny.CAPTIONS[i]) for i in range(4))
    write_latents(str(tmp_path / "x-%06d.tar"), latents, per_shard=4)
    word = f"data.path={tmp_path / 'x-000000.tar'}"
    with pytest.raises(ValueError, match="its latents have 3 channels") as caught:
        distill.load_data(distill.compose(word), teachers("mmdit"))
    err = error_of(command, word, f"teacher.path={teachers('mmdit').folder}")
    assert str(caught.value) == err.splitlines()[-1].removeprefix("distill: ")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, m, t: distill.sample_images(s, m, "a star"), r"prompts=a star: must be a list"),
        (lambda s, m, t: distill.sample_images(s, m, ["x"], guidance=2), "guidance=2: a student"),
        (
            lambda s, m, t: distill.sample_images(s, t, ["x"], guidance=1e40),
            r"guidance=1e\+40: must be from 0 to 1000",
        ),
        (lambda s, m, t: distill.sample_images(s, t, ["x"]), "guidance=None: a teacher was not"),
        (lambda s, m, t: distill.sample_images(s, m, ["x"], steps=0), "steps=0: must be a whole"),
        (lambda s, m, t: distill.sample_images(s, m, ["x"], precision="x"), "precision=x: is not"),
        (lambda s, m, t: distill.load_teacher(s, dtype="float16"), "give it to compose, as teach"),
        (lambda s, m, t: distill.load_teacher("sdxl", dtpe="x"), "teacher.dtpe: distill.teachers"),
        (lambda s, m, t: distill.load_teacher("sdxl", dtype="f"), "teacher.dtype=f: must be a d"),
        (lambda s, m, t: distill.compose("resume=runs/x"), "resume=runs/x: only the command"),
        (lambda s, m, t: distill.compose("-m"), "-m: is a flag, and only"),
    ],
)
def test_mistakes_that_only_python_can_make_are_refused(call, message, teachers):
    settings, teacher = distill.compose(), teachers("mmdit")
    method = tiny.ladd(teacher)
    with pytest.raises(ValueError, match=message):
        call(settings, method, teacher)


FIRST = """
import importlib, os, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "distill"]:
    del sys.modules[name]
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} cannot be imported first")
"""


def test_every_module_of_a_public_name_can_be_imported_first(forks, tmp_path):
    """No import cycle hides behind what another module has loaded."""
    modules = sorted({f"distill.{path.partition(':')[0]}" for path in distill.PUBLIC.values()})
    done = forks.script(FIRST, *modules, err=tmp_path / "err.txt")
    assert done.wait(timeout=300) == 0, done.said()
