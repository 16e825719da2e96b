"""What a configuration may call, key by key: the whole list, so that to add to it is a decision."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill.config import compose, trust
from distill.storage import trusted

TEACHERS = (
    "chat.ChatTeacher chroma.Chroma edit.Edits edit.FluxKontext edit.InstructPix2Pix "
    "edit.InstructPix2PixXL flux.Flux flux2.Flux2 flux2.Flux2Family "
    "flux2.Flux2Klein inpaint.Fills inpaint.FluxFill inpaint.SD3Inpaint "
    "inpaint.SDInpaint inpaint.SDXLInpaint kolors.Kolors lumina2.Lumina2 "
    "pipeline.PipelineTeacher pixart.PixArtAlpha pixart.PixArtSigma "
    "qwenimage.QwenImage sana.Sana sana.SanaSprint sd.SD sd3.SD3 sdxl.SDXL "
    "sized.SizedTeacher wan.Wan zimage.ZImage"
)
HEADS = (
    "fake_score.Classifier fake_score.Classifiers fake_score.FakeScore fake_score.Halving "
    "heads.AllHeads heads.ConvHead heads.ConvHeads images.ImageFeatures pool.DrawnHeads pool.Pool "
    "projection.OpenClipText projection.Projection stylegan_t.EqualisedLinear "
    "stylegan_t.LocalBatchNorm stylegan_t.StyleGANTHeads stylegan_t.TokenHead "
    "teacher_features.TeacherFeatures"
)
OPTIMIZERS = (
    "_adafactor.Adafactor _muon.Muon adadelta.Adadelta adagrad.Adagrad adam.Adam adamax.Adamax "
    "adamw.AdamW asgd.ASGD lbfgs.LBFGS nadam.NAdam optimizer.Optimizer radam.RAdam "
    "rmsprop.RMSprop rprop.Rprop sgd.SGD sparse_adam.SparseAdam"
)
OURS = "adafactor adamw8bit adamw8bit_bnb muon prodigy schedule_free"
# Key -> all that a stranger's configuration may name there: module, and what of it. None of these
# removes, sends or runs anything; those that read a model take a folder or a hub id, and no code.
REVIEWED = {
    "method": {
        "distill.methods": (
            "add.ADD base.Distillation consistency.ConsistencyDistillation dmd2.DMD2 dpo.DPO "
            "ladd.LADD nitrofusion.NitroFusion regression.Regression"
        )
    },
    "method.*": {
        "distill.core.score_distillation": "ScoreDistillation ScoreDraws TeacherSamples",
        "distill.teachers.decoder": "TinyDecoder",
        "distill.core.times": "Discrete LogitNormal Refinement ResolutionShift Uniform",
    },
    "teacher": {"distill.teachers": TEACHERS},
    "score_teacher": {"distill.teachers": TEACHERS},
    "student": {"distill.students": "full lora.lora stylegan.stylegan"},
    "discriminator.features": {"distill.discriminators": HEADS},
    "discriminator.heads": {"distill.discriminators": HEADS},
    "discriminator.condition": {"distill.discriminators": HEADS},
    "discriminator.condition.*": {"distill.discriminators": HEADS},
    "data": {"distill.data.source": "drawn images latents pairs preferences prompts"},
    "data.reader": {"distill.worlds.shapes.scenes": "Edits Scenes"},
    "loop": {"distill.training.loop_settings": "LoopSettings"},
    "optimizer.student": {"torch.optim": OPTIMIZERS, "distill.training.optimizers": OURS},
    "optimizer.discriminator": {"torch.optim": OPTIMIZERS, "distill.training.optimizers": OURS},
    "optimizer.fake_score": {"torch.optim": OPTIMIZERS, "distill.training.optimizers": OURS},
    "sampler": {"distill.sampling": "Consistency Euler EulerAncestral FewSteps guided.Guided"},
    "metrics": {
        "distill.evaluation": (
            "shapes.Shapes shapes_edit.EditedShapes shapes_fill.FilledShapes prompted.Prompted"
        )
    },
    "metrics.networks.*": {
        "distill.evaluation.networks": "Clip Describer Dinov2 Inception OpenClip TwoTowers",
        "distill.evaluation.rewards": "Aesthetic ImageReward",
    },
    "metrics.scores.*": {
        "distill.evaluation.scores": "Alignment Frechet Kid Manifolds Mmd Reward Score Variety"
    },
    "trainer": {"lightning": "Trainer pytorch.Trainer"},
    "trainer.strategy": {"distill.training.strategies": "DataParallel FullyShardedDataParallel"},
    "callbacks.*": {
        "distill.training.callbacks": "Alarms Health Progress Samples",
        "distill.training.scoring": "Scores",
        "distill.training.checkpoints": "Checkpoints",
        "lightning.pytorch.callbacks": (
            "DeviceStatsMonitor EarlyStopping LearningRateMonitor ModelSummary Timer"
        ),
    },
    "logger.*": {
        "distill.training.csv_logger": "CsvLog",
        "distill.training.trackers.kinds": "Mlflow Trackio Wandb",
        "lightning.pytorch.loggers": "CSVLogger TensorBoardLogger",
    },
}
# What one may type besides, by the last part of its name: all of it is Lightning's.
TYPED = {
    "callbacks.*": (
        "BackboneFinetuning BaseFinetuning BasePredictionWriter BatchSizeFinder "
        "Callback Checkpoint DeviceStatsMonitor EMAWeightAveraging EarlyStopping "
        "GradientAccumulationScheduler LambdaCallback LearningRateFinder LearningRateMonitor "
        "ModelCheckpoint ModelPruning ModelSummary OnExceptionCheckpoint ProgressBar "
        "RichModelSummary RichProgressBar SpikeDetection "
        "StochasticWeightAveraging TQDMProgressBar ThroughputMonitor Timer WeightAveraging"
    ),
    "logger.*": (
        "CSVLogger CometLogger DummyLogger Logger MLFlowLogger TensorBoardLogger WandbLogger"
    ),
    "trainer.strategy": (
        "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy "
        "ParallelStrategy SingleDeviceStrategy SingleDeviceXLAStrategy Strategy XLAStrategy"
    ),
    "trainer.profiler": (
        "AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler XLAProfiler"
    ),
}


def modules(name: str) -> Iterator[tuple[str, Path]]:
    """The module of this name and those below it, with their files; none is imported."""
    top, *rest = name.split(".")
    root = Path(importlib.util.find_spec(top).submodule_search_locations[0])
    place = root.joinpath(*rest)
    single = place.with_suffix(".py")
    for file in [single] if single.is_file() else sorted(place.rglob("*.py")):
        found = ".".join(file.relative_to(root.parent).with_suffix("").parts)
        yield found.removesuffix(".__init__"), file


def admitted(holds: trust.Allowed) -> set[str]:
    """Every name that is let in as it stands, and every class that is by where it is defined."""
    found = set(holds.names)
    for inside in holds.inside:
        for module, file in modules(inside):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            classes = (node.name for node in tree.body if isinstance(node, ast.ClassDef))
            found |= {f"{module}.{name}" for name in classes if holds.has(f"{module}.{name}")}
    return found


def reviewed(key: str) -> set[str]:
    return {f"{module}.{name}" for module, names in REVIEWED[key].items() for name in names.split()}


def test_the_keys_that_hold_a_class_are_those_that_were_reviewed():
    assert list(trust.SHIPPED) == list(REVIEWED)
    assert list(trust.TYPED) == list(TYPED)


@pytest.mark.parametrize("key", trust.SHIPPED)
def test_what_a_strangers_file_may_name_was_reviewed(key):
    assert admitted(trust.SHIPPED[key]) == reviewed(key)


@pytest.mark.parametrize("key", trust.TYPED)
def test_what_may_be_typed_besides_was_reviewed(key):
    names = {name.rpartition(".")[2] for name in admitted(trust.TYPED[key])}
    assert names == set(TYPED[key].split())


def test_functions_are_let_in_by_name_alone():
    for name in ("students.save_pipeline", "students.shifted", "students.lora.merged"):
        for key in trust.SHIPPED:
            with pytest.raises(ValueError, match="is refused"):
                trust.check_target(f"distill.{name}", key)


@pytest.mark.parametrize("key", [key for key in trust.SHIPPED if not key.startswith("trainer")])
def test_what_a_stranger_may_name_harms_nothing_when_it_is_made(key, tmp_path, monkeypatch):
    """Whatever takes a path or a text gets a place that it had better leave alone."""
    from test_strangers import Listener

    victim, here = tmp_path / "victim", tmp_path / "here"
    (victim / "inside").mkdir(parents=True)
    (victim / "inside" / "kept.txt").write_text("kept", encoding="utf-8")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before, listener, tried = sorted(tmp_path.rglob("*")), Listener(), 0
    for name in sorted(reviewed(key)):
        for place in (str(victim), f"http://127.0.0.1:{listener.port}/x", "owner/name"):
            found = compose._target(name, key.replace("*", "mine"))
            takes = inspect.signature(found).parameters.values()
            plain = [p.name for p in takes if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            node = {"_target_": name, **dict.fromkeys(plain, place)}
            if (
                "TensorBoard" in name or "CSV" in name
            ):  # whose folder is the run's: see build.trainer
                node["save_dir"] = "own"
            tried += 1
            with suppress(Exception):  # of most classes these are no arguments
                compose.make(OmegaConf.create(node), key.replace("*", "mine"))
    assert tried
    assert sorted(tmp_path.rglob("*")) == before
    assert not listener.heard
    listener.close()


# -- one's own classes -----------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch) -> str:
    """A package with a sampler and a callback of one's own."""
    package = tmp_path / "packages" / "mine_for_distill"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "from distill.sampling import Consistency\n\n\n"
        "class Mine(Consistency):\n    pass\n\n\nclass Called(Callback):\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(package.parent))
    return package.name


def test_a_class_of_ones_own_comes_in_by_the_environment(mine, monkeypatch):
    node = OmegaConf.create({"_target_": f"{mine}.Mine"})
    with pytest.raises(ValueError, match=r"DISTILL_TRUST=<its package>$"):
        compose.make(node, "sampler")
    monkeypatch.setenv("DISTILL_TRUST", f"other, {mine}")
    assert type(compose.make(node, "sampler")).__name__ == "Mine"
    other = OmegaConf.create({"_target_": f"{mine}.Called"})
    assert type(compose.make(other, "callbacks.mine")).__name__ == "Called"
    with pytest.raises(ValueError, match=r"must be a distill\.sampling\.FewSteps"):
        compose.make(other, "sampler")
    with pytest.raises(ValueError, match="is refused"):  # another one whose name begins so
        trust.check_target(f"{mine}_too.Mine", "sampler")


def test_an_installed_package_may_let_itself_in(mine, tmp_path, monkeypatch):
    about = tmp_path / "packages" / "mine_for_distill-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text(f"[distill]\nsampler = {mine}\n", encoding="utf-8")
    trusted.plugins.cache_clear()
    try:
        made = compose.make(OmegaConf.create({"_target_": f"{mine}.Mine"}), "sampler")
        assert type(made).__name__ == "Mine"
        with pytest.raises(ValueError, match="is refused"):
            trust.check_target(f"{mine}.Mine", "sampler", untrusted=True)
    finally:
        trusted.plugins.cache_clear()


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return folder / "config.yaml"


def test_a_run_of_ones_own_is_named_by_the_environment(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_TRUST", mine)
    file = written(tmp_path / "runs" / "one", f"sampler: {{_target_: {mine}.Mine}}\n")
    with pytest.raises(ValueError, match=rf"set DISTILL_TRUST_RUN={file.parent}$"):
        trust.read(file)
    for folder in (file.parent, file.parent.parent):
        monkeypatch.setenv("DISTILL_TRUST_RUN", f"elsewhere:{folder}")
        assert trust.read(file).sampler._target_ == f"{mine}.Mine"
    monkeypatch.setenv("DISTILL_TRUST_RUN", str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is refused"):
        trust.read(file)
    # even then it is data
    monkeypatch.setenv("DISTILL_TRUST_RUN", str(tmp_path))
    with pytest.raises(ValueError, match=r"name=.* holds an interpolation"):
        trust.read(written(tmp_path / "runs" / "two", "name: '${oc.env:HOME}'\n"))


# -- files -----------------------------------------------------------------------------------------

# What makes YAML's own constructors raise KeyError, IndexError, AttributeError and the like.
MISFITS = ["seed: !!bool x", "seed: !!int ''", "seed: !!int x", "seed: !!float ''"]
MISFITS += ["seed: !!timestamp x", "seed: !!map [1]", "seed: !!set [1]", "seed: " + "9" * 5000]
MISFITS += ["seed: 0x" + "f" * 5000, "seed: " + "1:" * 5000 + "1"]

WRONG = {
    "name: '${seed}'": "name=${seed}: holds an interpolation",
    "name: '${'": "name=${: holds an interpolation",
    "teacher: {path: '\\${oc.env:HOME}'}": "teacher.path=\\${oc.env:HOME}: holds an interpolation",
    "'${oc.env:HOME}': 1": "'${oc.env:HOME}' is no name of a key",
    "method.levels: {_target_: os.system}": "'method.levels' is no name of a key",
    "seed: ???": "seed: is missing (???)",
    "seed: !!python/object/apply:os.getcwd []": "is no configuration (line 1)",
    "seed: !!python/object/apply:pathlib.Path [x]": "is no configuration (line 1)",
    "seed: !!binary aGk=": "seed: a bytes is no value",
    "seed: {1: x}": "1 is no name of a key",
    **dict.fromkeys(MISFITS, "holds a value that is not of its type, or a number"),
    "method: " + "{a: " * 300 + "1" + "}" * 300: "values nested more than 64 deep",
    "a: &a [1]\nb: *a": "holds an alias (*name)",
    "seed: 1\nseed: 2": "is no configuration (line 2)",
    "[1, 2]": "is no mapping of keys",
    "seed: " + "[" * 3000: "is no configuration",
    "seed: " + "x" * 2**20: "is larger than any configuration",
    "sampler: [{_target_: distill.sampling.Euler}]": "sampler.0 holds no class",
    "sampler: nothing": "sampler=nothing: must be a node with keys",
    "sampler: {_target_: distill.sampling.Euler, _args_: [1]}": "_args_=[1]: is only allowed on",
    "sampler: {_target_: distill.sampling.Euler, _partial_: x}": "_partial_=x: must be true or fal",
    "sampler: {_target_: distill.sampling.seeded}": "sampler._target_: distill.sampling.seeded is",
    "sampler: {_target_: distill.sampling.Eulr}": "there is nothing of this name",
    "sampler: {_target_: distill.sampling.torch.Generator}": "there is nothing of this name",
    "method: {_target_: distill.sampling.Euler}": "method may be a class of distill.methods",
    "method: {levels: {levels: {_target_: distill.core.times.Uniform}}}": (
        "levels.levels holds no class"
    ),
    "data: {path: 's3://bucket/x.tar'}": "data.path=s3://bucket/x.tar: is neither a path on",
    "data: {path: 'x.tar::ftp://h/x'}": "is neither a path on this machine nor a hub id",
    "data: {path: 'pipe:curl h'}": "is neither a path on this machine nor a hub id",
    "data: {path: '\\\\host\\share'}": "is neither a path on this machine nor a hub id",
    "data: {path: '//host/share'}": "is neither a path on this machine nor a hub id",
    "callbacks: {samples: {prompts: 'http://h/x'}}": "is neither a path on this machine nor",
    "logger: {t: {name: $HOME}}": "is neither a path on this machine nor a hub id",
    "logger: {t: {name: ../x}}": "logger.t.name=../x: would leave the run's folder",
    "logger: {t: {_target_: lightning.pytorch.loggers.MLFlowLogger}}": "MLFlowLogger is refused",
    "trainer: {default_root_dir: x}": "trainer.default_root_dir=x: is only allowed on the",
    "trainer: {plugins: [{_target_: x.y}]}": "trainer.plugins.0 holds no class",
    "logger: {w: {api_key: '***'}}": "logger.w.api_key=***: is a secret, which is not saved",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_a_file_may_not_say_is_named(text, tmp_path):
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match="^.*$") as said:
        trust.read(file)
    assert str(said.value).startswith(f"{file}: ")
    assert WRONG[text] in str(said.value)
    assert "\n" not in str(said.value)


def test_texts_may_hold_what_would_be_a_place_elsewhere(tmp_path):
    text = "name: 'a::b'\nmethod: {negative: 'http://x'}\ncallbacks: {samples: {prompts: ['$5']}}"
    assert trust.read(written(tmp_path, text)).name == "a::b"


def test_what_is_not_asked_for_is_neither_read_nor_refused(tmp_path):
    file = written(tmp_path, "seed: 3\nlogger: {_target_: os.system}\nname: '${oc.env:HOME}'\n")
    assert trust.read(file, "seed", "trainer.accelerator") == {"seed": 3}
