"""A configuration, model folder, shard or checkpoint from a stranger cannot run code."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from omegaconf import OmegaConf

import families
import tiny
from distill.config import compose, trust
from distill.data.shards import Shards
from distill.discriminators.images import ImageFeatures
from distill.evaluation import networks
from distill.storage import checkpoint_files

HOSTILE = (
    "os.system",
    "posix.system",
    "builtins.eval",
    "subprocess.Popen",
    "torch.hub.load",
    "torch.load",
    "torch.nn.Module.__init__.__globals__",
    "torch.nn.functional.torch.hub.load",
    "torch.nn.modules.module.torch.load",
    "torch.optim.optimizer.torch.load",
    "distill.machine.signals.subprocess.run",
    "distill.machine.signals.requeue",
    "distill.training.run_metadata.subprocess.run",
    "distill.training.run_metadata.subprocess.Popen",
    "distill.training.run_metadata.Path",
    "distill.storage.atomic.remove",
    "distill.config.models.student_of",
    "distill.config.compose.make",
    "distill.config.compose.instantiate",
    "distill.students.shutil.rmtree",
    "distill.exporting.card.write_card",
    "distill.students.lora.copy.deepcopy",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "functools.partial",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.trainer.trainer.os.system",
    "lightning.LightningModule.load_from_checkpoint",
    "lightning.fabric.utilities.cloud_io._load",
    "distill",
    "distill.no_such_module.Thing",
)
NODES = (  # where in a configuration a target can hide
    "method",
    "method.levels",
    "teacher",
    "student",
    "discriminator.heads",
    "data",
    "optimizer",
    "optimizer.student",
    "callbacks.progress",
    "logger.csv",
    "metrics",
    "trainer",
)


class Bomb:
    """Unpickled, it makes the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", HOSTILE)
def test_a_hostile_target_is_refused(target):
    node = {"_target_": target, "args": ["true"]}
    nested = {"_target_": "distill.core.times.LogitNormal", "m": [{"deep": [node]}]}
    refused = rf"_target_: {re.escape(target)}( is refused|: there is nothing of this)"
    for tree in (node, [node], {"a": node}, nested, {"name": target, "a": {"_target_": "${name}"}}):
        with pytest.raises(ValueError, match=rf"^method\.renoise[\w.]*\.{refused}"):
            compose.make(OmegaConf.create(tree), "method.renoise")
    for key in (*trust.SHIPPED, "seed", "method.deep.down", "teacher.path"):
        with pytest.raises(ValueError, match=rf"^{re.escape(key)}\.{refused}"):
            compose.make(OmegaConf.create(node), key)
    # read a second time, this would be a node
    escaped = {
        "_target_": "distill.core.times.LogitNormal",
        "m": "\\${oc.create:{_target_: " + target + "}}",
    }
    with pytest.raises(ValueError, match=r"method\.renoise\.m=.*must not hold \$\{, an"):
        compose.make(OmegaConf.create(escaped), "method.renoise")


def test_what_runs_are_made_of_is_allowed():
    trainer = compose.make(
        OmegaConf.create({"_target_": "lightning.Trainer", "_partial_": True, "max_steps": 3}),
        "trainer",
    )
    assert trainer.keywords == {"max_steps": 3}
    callback = {"_target_": "lightning.pytorch.callbacks.DeviceStatsMonitor"}
    made = compose.make(OmegaConf.create(callback), "callbacks.mine")
    assert type(made).__name__ == "DeviceStatsMonitor"


@pytest.mark.parametrize("node", NODES)
def test_a_hostile_node_is_refused_before_anything_is_made(node, command, tmp_path):
    code, _, err = command(
        "run", f"++{node}._target_=os.system", f"++{node}.command='touch {tmp_path / 'owned'}'"
    )
    assert code == 1
    assert err.startswith(f"distill: {node}._target_: os.system is refused")
    assert list(tmp_path.iterdir()) == []


def test_hydra_itself_runs_nothing_either(command, tmp_path):
    order = f"touch {tmp_path / 'owned'}"
    for argument in (
        f"+hydra.callbacks.evil={{_target_: os.system, command: '{order}'}}",
        f"+hydra.job_logging.formatters.evil={{'()': os.system, command: '{order}'}}",
    ):
        code, _, _ = command("run", argument, "trainer.max_steps=0")
        assert code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {evil: {_target_: evil.Callback}}}",
        "hydra: {job_logging: {formatters: {evil: {(): evil.Formatter}}}}",
        "hydra: {job_logging: {handlers: {evil: {class: evil.Handler}}}}",
        "defaults: [/method@hydra.callbacks.evil: ladd]",
        "# @package hydra.callbacks\nevil: {_target_: evil.Callback}",
        "# @package _global_.hydra.callbacks\nevil: {_target_: evil.Callback}",
        '"hy\\x64ra": {callbacks: {evil: {_target_: evil.Callback}}}',
        'defaults: ["/method@hy\\x64ra.callbacks.evil: ladd"]',
        'defaults: [{"/method@hy\\x64ra.callbacks.evil": ladd}]',
    ],
)
def test_a_recipe_from_a_stranger_has_hydra_call_nothing(text, command, tmp_path, monkeypatch):
    owned = tmp_path / "owned"
    (tmp_path / "evil.py").write_text(f"open({str(owned)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "conf" / "experiment" / "odd.yaml"
    recipe.parent.mkdir(parents=True)
    head = "" if text.startswith("#") else "# @package _global_\n"
    recipe.write_text(f"{head}{text}\n", encoding="utf-8")
    for words in (["--config-dir", "conf"], ["--config-dir=conf"]):
        code, _, err = command("run", *words, "experiment=odd", "trainer.max_steps=0")
        assert code == 1
        assert "conf/experiment/odd.yaml: " in err
        assert "a file may not say what Hydra itself calls; type it, or if" in err
    assert not owned.exists()


def test_so_it_does_behind_a_link(command, tmp_path):
    text = "# @package _global_\nhydra: {callbacks: {evil: {_target_: evil.Callback}}}\n"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "odd.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "experiment").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "conf")
    (tmp_path / "conf" / "a").symlink_to(tmp_path / "elsewhere")  # the same, checked first
    code, _, err = command("run", "--config-dir", "conf", "experiment=odd", "trainer.max_steps=0")
    assert code == 1
    assert "hydra.callbacks.evil._target_: a file may not say what Hydra itself calls" in err


def test_a_recipe_may_say_where_hydra_starts_jobs(command, tmp_path):
    recipe = tmp_path / "conf" / "experiment" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(
        "# @package _global_\nhydra: {sweep: {dir: x}}\ntrainer: {max_steps: 0}\n",
        encoding="utf-8",
    )
    code, _, err = command("run", "--config-dir", "conf", "experiment=mine")
    assert code == 1
    assert "trainer.max_steps=0: must be a whole number" in err


def test_a_run_folder_from_a_stranger_runs_nothing(command, pipelines, tmp_path):
    run, owned = tmp_path / "run", tmp_path / "owned"
    shutil.copytree(pipelines("mmdit"), run / "student")
    hostile = {"_target_": "os.system", "command": f"touch {owned}"}
    (tmp_path / "evil.py").write_text(
        f"open({str(owned)!r}, 'w')\n", encoding="utf-8"
    )  # would be imported from the current folder
    checkpoint_files.write_checkpoint(
        {"distill": {"iteration": 1}, "about": {"config": {}}},
        run / "checkpoints" / "step_000001.ckpt",
    )
    for node in (
        hostile,
        {"_target_": "evil.Teacher"},
        {"_target_": "distill.teachers.sd3.SD3", "path": hostile},
    ):
        OmegaConf.save({"teacher": node}, run / "config.yaml")
        code, _, err = command("evaluate", f"run={run}")
        assert code == 1
        assert err.count("distill: ") == 1
        cfg = {
            "data": {"batch_size": 4},
            "optimizer": {},
            "trainer": {"devices": 1},
            "method": node,
            "teacher": node,
        }
        OmegaConf.save(cfg, run / "config.yaml")
        code, _, err = command("run", f"resume={run}")
        assert code == 1
        assert "is refused" in err
    assert not owned.exists()


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_pickled_weights_are_refused_unless_asked_for(part, command, pipelines, tmp_path):
    from safetensors.torch import load_file

    from distill.teachers.sd3 import SD3

    folder, owned = shutil.copytree(pipelines("mmdit"), tmp_path / "copy"), tmp_path / "owned"
    safe = next((folder / part).glob("*.safetensors"))
    pickled = safe.with_name(
        "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    )
    torch.save(load_file(safe), pickled)
    safe.unlink()
    run = ["debug=smoke", f"teacher.path={folder}", "~metrics", f"run_dir={tmp_path / 'run'}"]
    code, _, err = command("run", *run)
    assert code == 1
    assert (
        f"distill: teacher.path={folder}: {part}/ has only pickled weights ({pickled.name}), which"
        in err
    )
    assert err.strip().endswith("add teacher.use_safetensors=false")
    SD3(str(folder), use_safetensors=False)
    pickled.write_bytes(pickle.dumps(Bomb(owned)))
    code, _, err = command(
        "run", *run, "teacher.use_safetensors=false"
    )  # even then a pickle may hold tensors alone
    assert code == 1
    assert f"{part}/ does not load" in err
    assert not owned.exists()


def test_a_model_index_cannot_name_other_libraries(command, pipelines, tmp_path):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "copy")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n", encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(
        json.dumps(index | {"tokenizer": ["evil", "Tokenizer"]}), encoding="utf-8"
    )
    code, _, err = command("sample", f"run={folder}", "prompt=x", "guidance=4")
    assert code == 1
    assert "tokenizer is code of 'evil', which this teacher does not read" in err
    assert not (tmp_path / "owned").exists()


# -- code in the folder of a network ---------------------------------------------------------------


def owns(folder, owned):
    """Let every file of settings below the folder name code beside it, which makes `owned`."""
    code = (
        f"open({str(owned)!r}, 'w')\nfrom transformers import *\n"
        "class Config(ViTConfig): model_type = 'evil'\n"
        "class Model(ViTModel): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    named = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    named |= {"AutoTokenizer": [None, "evil.Tokenizer"], "AutoImageProcessor": "evil.Config"}
    new = {"tokenizer_class": "Evil", "image_processor_type": "Evil"}
    for file in folder.rglob("*config.json"):
        said = json.loads(file.read_text(encoding="utf-8"))
        said |= {"auto_map": named} | {key: new[key] for key in new if key in said}
        said |= {"model_type": "evil"} if file.name == "config.json" else {}
        file.write_text(json.dumps(said), encoding="utf-8")
        (file.parent / "evil.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture
def agreeing(monkeypatch):
    """A terminal at which someone answers every question by yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))


@pytest.mark.usefixtures("agreeing")
@pytest.mark.parametrize("kind", ["features", "dinov2", "clip"])
def test_a_feature_network_does_not_bring_code(kind, tmp_path, capsys):
    import transformers

    folder, owned = tmp_path / "network", tmp_path / "owned"
    shutil.copytree(tiny.vit(), folder)
    if kind == "clip":
        families.clip(16)["tokenizer"].save_pretrained(folder)
        transformers.CLIPImageProcessor().save_pretrained(folder)
    owns(folder, owned)
    load = {
        "features": lambda: ImageFeatures(str(folder), size=tiny.SIDE),
        "dinov2": networks.Dinov2(str(folder)).load,
        "clip": networks.Clip(str(folder)).load,
    }
    with pytest.raises(ValueError, match="contains custom code|does not recognize"):
        load[kind]()
    assert not owned.exists()
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.usefixtures("agreeing")
@pytest.mark.parametrize(
    ("family", "named"),
    [
        pytest.param("flux2", {}, marks=pytest.mark.slow),
        ("zimage", {"tokenizer": "AutoTokenizer"}),
        ("zimage", {"text_encoder": "AutoModel"}),
    ],
)
def test_a_pipelines_parts_do_not_bring_code(family, named, tmp_path, capsys):
    folder, owned = families.write(family, tmp_path / family), tmp_path / "owned"
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {part: ["transformers", kind] for part, kind in named.items()}
    for part in named or ("text_encoder", "tokenizer"):
        config = folder / part / "config.json"
        text = "{}" if part == "tokenizer" else config.read_text(encoding="utf-8")
        config.write_text(text, encoding="utf-8")
        owns(folder / part, owned)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with suppress(ValueError):  # whatever it says of such a folder
        families.teacher_at(folder, **families.FAMILIES[family].options)
    assert not owned.exists()
    assert "[y/N]" not in capsys.readouterr().out


# -- chat templates --------------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
NO_TEXT = r"its chat template gives no text within 2 s and 512 MiB \(.*fetch it anew"
TWICE = "{{ messages[-1].content }}"


def templated(text, folder):
    """A teacher whose captions stand in a chat template that the folder's maker wrote."""
    families.write("zimage", folder)
    (folder / "tokenizer" / "chat_template.jinja").write_text(text, encoding="utf-8")
    return families.teacher_at(folder, **families.FAMILIES["zimage"].options)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        pytest.param(LOOP, NO_TEXT, id="loop"),
        pytest.param("{{ 'x' * 10**10 }}", NO_TEXT, id="memory", marks=pytest.mark.slow),
        pytest.param("{{ 'x' * 10**6 }}", NO_TEXT, id="text", marks=pytest.mark.slow),
        pytest.param(
            "{{ cycler.__init__.__globals__ }}", NO_TEXT, id="escape", marks=pytest.mark.slow
        ),
        pytest.param(2 * TWICE, "has the caption 2 times", id="twice", marks=pytest.mark.slow),
    ],
)
def test_a_hostile_chat_template_is_refused(text, wrong, tmp_path):
    teacher = templated(text, tmp_path / "zimage")
    with pytest.raises(ValueError, match=f"^teacher.path={tmp_path / 'zimage'}: .*{wrong}"):
        teacher.embed(["a red circle"])


def test_threads_that_embed_captions_at_once_leave_the_template_as_it_is(tmp_path):
    """Meanwhile the tokenizer has the short template, and the second must not find that."""
    teacher = templated(text := "say: {{ messages[-1].content }}", tmp_path / "zimage")
    own, inside = teacher._embedded, threading.Semaphore(0)

    def slow(captions):
        inside.release()
        inside.acquire()  # its own
        inside.acquire(timeout=0.3)  # the other's, if it is in here too
        return own(captions)

    teacher._embedded = slow
    with ThreadPoolExecutor(2) as together:
        found = list(together.map(lambda words: teacher.embed([words]).tokens, ["ab", "ab"]))
    assert torch.equal(*found)
    assert teacher.pipeline.tokenizer.chat_template == text


def test_a_chat_template_runs_once_on_no_caption_of_ours(tmp_path):
    """So it cannot wait for a word, or for a day."""
    trap = f"{{% if 'circle' in messages[-1].content %}}{LOOP}{{% endif %}}"
    text = f"{trap}<|im_start|>{{{{ messages[-1].content | trim }}}}<|im_end|>"
    teacher = templated(text, tmp_path / "zimage")
    caption = "{{ 1 }} a circle'"
    plain = teacher.pipeline.tokenizer(f"<|im_start|>{caption}<|im_end|>").input_ids
    assert int(teacher.embed([f" {caption} "]).mask.sum()) == len(plain)
    assert teacher.pipeline.tokenizer.chat_template == text  # a student's folder gets it
    teacher.pipeline.tokenizer.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8")
    assert saved == text


# -- checkpoints and shards ------------------------------------------------------------------------


@pytest.mark.parametrize("disguised", [False, True])
def test_a_pickle_bomb_as_checkpoint_is_named_and_the_one_before_used(disguised, tmp_path, caplog):
    folder, owned = tmp_path / "checkpoints", tmp_path / "owned"
    ours = {"iteration": 1, "images_seen": 4, "skipped": 0, "ema": {}}
    good = {"distill": ours, "about": {"config": {}}, "state_dict": {}, "optimizer_states": []}
    good |= {"loops": {}, "callbacks": {}, "global_step": 1, "pytorch-lightning_version": "2"}
    checkpoint_files.write_checkpoint(good, folder / "step_000001.ckpt")
    bomb = folder / "step_000002.ckpt"
    if disguised:  # inside a proper file of torch
        torch.save(good | {"state_dict": Bomb(owned)}, bomb)
    else:
        bomb.write_bytes(pickle.dumps(Bomb(owned)))
    assert checkpoint_files.newest_checkpoint(tmp_path) == folder / "step_000001.ckpt"
    assert f"{bomb} is incomplete or no checkpoint of distill" in caplog.text
    assert "resuming from step_000001.ckpt instead" in caplog.text
    (folder / "step_000001.ckpt").unlink()
    with pytest.raises(
        ValueError,
        match="no checkpoint can be used: .*step_000002.ckpt is incomplete or no checkpoint",
    ):
        checkpoint_files.newest_checkpoint(tmp_path)
    assert not owned.exists()
    assert bomb.exists()


def test_a_tar_cannot_leave_its_folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    with tarfile.open(data / "x.tar", "w") as tar:
        for name, kind in (("link.txt", tarfile.SYMTYPE), ("hard.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.txt"
            tar.addfile(info)
        for name in ("../../up.txt", "/absolute.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    before = sorted(tmp_path.rglob("*"))
    shards = Shards(str(data))
    assert [shards.read(i)["txt"] for i in range(len(shards))] == [
        b"evil",
        b"evil",
    ]  # text of odd keys, and no secret
    assert sorted(tmp_path.rglob("*")) == before
