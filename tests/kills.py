"""Kill a command at a random moment, give it again, and compare what it leaves with what it leaves
undisturbed.

Every trial is a fork of one process that has imported everything, so that it costs the work alone.
A kill is SIGKILL, either after a random share of the command's time or right before a random one of
its changes to files: before a file is opened for writing, renamed or removed, or a folder made.
Undisturbed command and trials have the same paths.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LATER = ("run.log", "study.db")  # files that say when something happened
CLOCK = {"seconds_per_image", "images_per_second", "seconds", "train_seconds", "wall_seconds"}
CLOCK |= {"began", "trained", "started", "resumed", "command", "commands", "peak_memory_gib"}
TIMED = {  # files whose names say when something happened
    "features": re.compile(r"[0-9a-f]{32}\.npy"),  # of pictures of these times
    "events": re.compile(r"events\.out\.tfevents\..*"),  # of TensorBoard, one a process
}
FACTS = ("name", "method", "teacher", "steps", "images_seen", "skipped", "status")  # of run.json
MODULES = (
    *("run", "evaluate", "sample", "synthesize", "cache", "export", "pretrain", "search"),
    *("compare", "inspect", "config.build", "data.shard_job", "exporting.low_rank"),
    *("exporting.single_file", "exporting.card", "report.inspection", "report.comparison"),
    *("worlds.shapes.pretraining.stages", "evaluation.prompted", "teachers.sd3", "methods.ladd"),
    *("training.callbacks", "training.csv_logger"),
)
PATIENCE = 600.0  # seconds after which a command hangs


@dataclass(frozen=True)
class Command:
    """A command with its options.

    `work` stands for the folder that it is given, `given` for what it reads.
    """

    module: str
    words: list[str]
    needs: list[str] = field(default_factory=list)  # copied from `given` into `work` beforehand
    go_on: Callable[[Path], list[str] | None] | None = None  # the words that go on, if not the same


@dataclass
class Ended:
    """How a command has ended: exit code, or None of one that was killed; its changes to files;
    seconds.
    """

    code: int | None
    changes: int
    seconds: float
    said: str


def go_on(work: Path) -> list[str] | None:
    """What resumes a run, once it has a checkpoint; before that it is begun again."""
    if any((work / "run" / "checkpoints").glob("step_*.ckpt")):
        return ["resume=work/run"]
    shutil.rmtree(work / "run", ignore_errors=True)
    return None


TRAIN = [
    *("debug=smoke", "teacher.path=given/teacher", "data.path=given/shards", "data.num_workers=0"),
    *("trainer.max_steps=4", "callbacks.checkpoint.every=1", "loop.head_start=2"),
]
JUDGE = ["metrics.prompts=4", "metrics.student_steps=[1]", "metrics.teacher_steps=[1]"]
MAKE = ["teacher.path=given/teacher", "out=work/made", "per_shard=3"]
STAGES = ("clip", "vae", "mmdit")
COMMANDS = {
    "run": Command("run", [*TRAIN, *JUDGE, "run_dir=work/run"], go_on=go_on),
    "run resume=": Command("run", ["resume=work/half", "trainer.max_steps=4"], ["half"]),
    "synthesize": Command(
        "synthesize", [*MAKE, "prompts=given/prompts.txt", "count=11", "steps=2", "batch_size=2"]
    ),
    "cache": Command(
        "cache",
        [
            *MAKE,
            "data.path=given/pictures",
            "data.size=64",
            "data.num_workers=0",
            "data.batch_size=2",
        ],
    ),
    "evaluate": Command(
        "evaluate",
        [
            "run=work/run",
            "metrics=prompts",
            "metrics.path=given/prompts.txt",
            "metrics.batch_size=2",
        ]
        + ["metrics.measures=[variety]", "metrics.variety=[2,2]", "metrics.workers=0", "steps=1"]
        + ["metrics.networks.dinov2.path=given/dinov2", "metrics.networks.dinov2.size=64"],
        ["run"],
    ),
    "sample": Command(
        "sample", ["run=given/run", "prompts=given/prompts.txt", "count=2", "out=work/samples"]
    ),
    "export to=diffusers": Command(
        "export", ["run=given/run", "to=diffusers", "dtype=float16", "out=work/student"]
    ),
    "export to=lora": Command("export", ["run=work/run", "to=lora", "rank=2"], ["run"]),
    "export to=single_file": Command("export", ["run=work/run", "to=single_file"], ["run"]),
    "pretrain": Command(
        "pretrain",
        ["out=work/pretrained", "stages=[data,clip,vae,latents,mmdit,shards]", "data.count=256"]
        + ["shards.count=6", "shards.steps=2", "scoring.prompts=4", "scoring.steps=2"]
        + ["scoring.guidance=[3.0]"]
        + [f"{stage}.{what}" for stage in STAGES for what in ("steps=3", "batch_size=4")]
        + [f"+{stage}.save_every=1" for stage in STAGES],
    ),
    "search": Command(
        "search",
        ["out=work/search", 'space=["seed=choice(0,1)"]', "metric=g/adv", "trials=2"]
        + [f"run={json.dumps([*TRAIN, '~metrics'])}"],
    ),
    "compare": Command("compare", ["runs=given/run*", "out=work/compare"]),
    "inspect": Command("inspect", ["run=given/run", "samples=2", "levels=[0.5]", "out=work/seen"]),
}


class World:
    """A folder with what the commands read, made once, and one to work in.

    given/   teacher, shards, prompts, pictures, a finished run and one that is half done
    work/    what a command writes
    whole/   what each leaves undisturbed
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.given = folder, folder / "work", folder / "given"
        self.undisturbed: dict[str, Ended] = {}
        if not (folder / "given.done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self._make()

    def _make(self) -> None:
        self.given.mkdir(parents=True)
        made = self._forked(lambda: write_given(self.given), "given")
        assert made.code == 0, made.said
        for name, steps in (("run", 2), ("half", 2)):
            words = [*TRAIN, *JUDGE, f"trainer.max_steps={steps}", f"run_dir=given/{name}"]
            ended = self.call("run", words)
            assert ended.code == 0, ended.said
        shutil.copytree(self.given / "run", self.given / "run2")
        (self.folder / "given.done").touch()

    def call(
        self, module: str, words: list[str], *, after: float | None = None,
        before: int | None = None,
        whole_group: bool = True,
    ) -> Ended:  # fmt: skip
        """Run a command in a fork, killed `after` seconds or right `before` its so-manieth change
        to files.
        """

        def task() -> int:
            sys.argv = [f"distill.{module}", *words]
            try:
                importlib.import_module(f"distill.{module}").main()
            except SystemExit as stop:
                return int(stop.code or 0)
            return 0

        return self._forked(task, module, after=after, before=before, whole_group=whole_group)

    def _forked(
        self, task: Callable[[], int | None], name: str, *, after: float | None = None,
        before: int | None = None, whole_group: bool = True,
    ) -> Ended:  # fmt: skip
        log, began = self.folder / "said.txt", time.monotonic()
        sys.stdout.flush()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            _in_child(task, self.folder, log, writer, before)
        os.close(writer)
        status = _wait(child, began + (after if after is not None else PATIENCE))
        if status is None:
            _kill(child, whole_group)
            status = os.waitpid(child, 0)[1]
        seconds = time.monotonic() - began
        if after is None and seconds > PATIENCE:
            raise TimeoutError(f"{name} hangs")
        with os.fdopen(reader, "rb") as pipe:
            changes = int(pipe.read() or 0)
        code = os.waitstatus_to_exitcode(status)
        said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        self.last = child
        return Ended(None if code == -signal.SIGKILL else code, changes, seconds, said)

    def begin(self, name: str) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for needed in COMMANDS[name].needs:
            shutil.copytree(self.given / needed, self.work / needed)

    def whole(self, name: str) -> dict[str, str]:
        """What the command leaves undisturbed, and how long that takes."""
        if name not in self.undisturbed:
            self.begin(name)
            ended = self.call(COMMANDS[name].module, COMMANDS[name].words)
            assert ended.code == 0, (name, ended.said)
            self.undisturbed[name] = ended
            self.left = {**getattr(self, "left", {}), name: snapshot(self.work)}
        return self.left[name]

    def trial(self, name: str, seed: int) -> dict[str, Any]:
        """One kill of the command, which is then given again: what was lost, and what stays
        behind.
        """
        whole, chance, ended = self.whole(name), random.Random(seed), self.undisturbed[name]
        command = COMMANDS[name]
        if chance.random() < 0.5:
            kill: dict[str, Any] = {"before": chance.randint(1, max(1, ended.changes))}
        else:
            kill = {"after": chance.uniform(0.0, ended.seconds)}
        kill["whole_group"] = chance.random() < 0.5
        self.begin(name)
        words, first = command.words, None
        for _ in range(2 if command.module == "run" and chance.random() < 0.5 else 1):
            first = self.call(command.module, words, **kill)
            words = (command.go_on and command.go_on(self.work)) or command.words
            if first.code is not None:
                break  # it has ended before its moment came
        assert first is not None
        group = self.last
        second = first if first.code is not None else self.call(command.module, words)
        _end(group)
        found = snapshot(self.work)
        wanted, seen = (of_search(kept) if name == "search" else kept for kept in (whole, found))
        lost = sorted(key for key in wanted if wanted[key] != seen.get(key))
        litter = sorted(set(seen) - set(wanted))
        result = {"command": name, "seed": seed, "killed": first.code is None, "kill": kill}
        # Killed after its last change an export is complete, and stays.
        done = not lost and command.module == "export" and "is there already" in second.said
        result |= {"code": 0 if done else second.code, "lost": lost, "litter": litter}
        return result | ({"said": second.said[-2000:]} if second.code or lost or litter else {})


def _kill(child: int, whole_group: bool) -> None:
    """Kill a process, and all of its group: which it has not made yet, where it is killed at
    once.
    """
    with suppress(ProcessLookupError):
        if whole_group:
            os.killpg(child, signal.SIGKILL)
            return
    os.kill(child, signal.SIGKILL)


def _wait(child: int, until: float) -> int | None:
    """How a process has ended; None if it runs still at that time."""
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.002)
    return None


def _end(group: int) -> None:
    """End what a killed command had started, and wait for it."""
    try:
        while True:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.05)
    except ProcessLookupError:
        pass


def _in_child(
    task: Callable[[], int | None], folder: Path, log: Path, pipe: int, before: int | None
) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        changes = _watched(f"{folder}/work", before)
        renew_threads()
        code = task() or 0
        os.write(pipe, str(changes[0]).encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def renew_threads() -> None:
    """Make torch's thread pool anew in a fork, before several threads ask for it at once: one of
    them finds none then, and ends with an internal error.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _watched(place: str, before: int | None) -> list[int]:
    """Count this process's changes to files below a folder; right before the so-manieth, it is
    killed.
    """
    count, changing = [0], os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not (arguments[2] or 0) & changing:
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            return
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            if not os.path.abspath(os.fsdecode(path)).startswith(place):
                return
            count[0] += 1
            if count[0] == before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    return count


# -- what is compared ------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Name -> a hash of what each file below a folder holds, but for times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name + "/"] = ""
        elif kind := next(
            (k for k, pattern in TIMED.items() if pattern.fullmatch(path.name)), None
        ):
            found[str(path.relative_to(folder).with_name(kind))] = ""
        else:
            found[name] = content(path)
    return found


def content(path: Path) -> str:
    import torch

    name, kind = path.name, path.suffix
    if name == "run.json":
        said = json.loads(path.read_text(encoding="utf-8"))
        return repr({key: said.get(key) for key in FACTS})
    if name in LATER or re.fullmatch(r"seconds-\d+\.txt", name):
        return ""
    if kind == ".html":
        return str(path.read_text(encoding="utf-8").rstrip().endswith("</html>"))
    if name == "README.md":
        return re.sub(r"[\d.,]+", "#", path.read_text(encoding="utf-8"))
    if name == "config.yaml" and path.parent.name in ("run", "half"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return _hash([line for line in lines if not line.startswith("resume:")])
    if (
        name == "tokenizer.json"
    ):  # the library numbers equally frequent pairs as it happens to meet them
        return _hash(sorted(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]))
    if kind == ".json":
        return _hash(timeless(json.loads(path.read_text(encoding="utf-8"))))
    if kind == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        if name == "trials.csv":  # best first; a trial that was killed has lost its number
            rows = sorted(({**row, "trial": ""} for row in rows), key=str)
        return _hash(timeless(rows))
    if kind in (".ckpt", ".pt"):
        return _hash(timeless(torch.load(path, weights_only=True)))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def timeless(tree: Any) -> Any:
    """Without what a clock says, and what a run says of itself."""
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if k not in CLOCK and k != "about"}
    return [timeless(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _hash(tree: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        elif hasattr(value, "numpy"):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().contiguous().float().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(tree)
    return digest.hexdigest()


def of_search(kept: dict[str, str]) -> dict[str, str]:
    """Of a search the table and the study: a trial that was killed is tried again in another
    folder.
    """
    return {k: v for k, v in kept.items() if "trial_" not in k or k.endswith((".part", ".lock"))}


# -- what is read ----------------------------------------------------------------------------------


def write_given(folder: Path) -> None:
    import tiny

    tiny.write_pipeline("mmdit", folder / "teacher")
    tiny.write_shards(folder / "shards")
    shutil.copytree(tiny.vit(), folder / "dinov2")
    (folder / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:5]) + "\n", encoding="utf-8")
    tiny.write_pictures(folder / "pictures", 11)


def prepare() -> None:
    """Import all that the commands do, on one thread, in the process that is forked."""
    import torch

    torch.set_num_threads(1)
    for module in MODULES:
        importlib.import_module(f"distill.{module}")
    for name in ("StableDiffusion3Pipeline", "AutoencoderKL", "SD3Transformer2DModel"):
        getattr(importlib.import_module("diffusers"), name)
