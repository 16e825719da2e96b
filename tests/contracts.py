"""Trainings of any family in the table of `families`, by the words of a command line: what
`distill.run` trains, up to the end of its training, in a second each.
"""

from __future__ import annotations

import os
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import distill
import families
from distill.config import build, compose
from distill.core.tensors import gather
from distill.storage.checkpoint_files import newest_checkpoint, read_checkpoint

STEPS = 2
EVERY_STEP = (
    *("callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=0"),
    "callbacks.checkpoint.background=false",
)
# Adam divides the smallest gradients by themselves, and with them what a processor has rounded: not
# with these. The student goes far enough to tell runs apart.
ROUNDED = (
    *("++optimizer.student.eps=1e-4", "optimizer.student.lr=1e-4"),
    "++optimizer.discriminator.eps=1e-2",
)


@dataclass(frozen=True)
class End:
    """What a training began and ended with: the student's average, its heads, the steps taken."""

    began: dict[str, Tensor]
    student: dict[str, Tensor]
    heads: dict[str, Tensor]
    step: int


def apart(one: End, other: End) -> float:
    """Distance of two students, as a share of the way that the first has gone."""
    pairs = {name: (other.student[name], x, one.began[name]) for name, x in one.student.items()}
    assert other.student.keys() == pairs.keys()
    a, b, began = (torch.cat([p[i].flatten() for p in pairs.values()]) for i in range(3))
    return float((a - b).norm() / (b - began).norm())


def words_of(family: str, folder: Path, *more: str, method: str = "ladd") -> list[str]:
    """A short run by this family's teacher, on renders, which need no data."""
    data = ["data=renders", "data.batch_size=2"]
    data += ["method.distill_weight=2.5"] if method == "ladd" else []
    reads = families.OTHERS[family].reads if family in families.OTHERS else None
    if reads:
        of_sources = "data.reader._target_=distill.worlds.shapes.scenes.Edits"
        data.append({"masks": "data.masks=true", "sources": of_sources}[reads])
        data.append("method.distill.guidance=2")
    quiet = ["metrics=null", "logger=none", "callbacks.samples=null", "callbacks.progress=null"]
    run = [f"method={method}", "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}"]
    run += ["trainer.precision=32-true", "loop.warmup_steps=0"]
    return [*run, *families.words_of(family, folder), *data, *quiet, *more]


def train(words: list[str], folder: Path, *callbacks: L.Callback, goes_on: bool = False) -> End:
    """Train as these words ask for; with `goes_on` from the newest checkpoint in the folder."""
    folder.mkdir(exist_ok=True)
    settings = distill.compose(*words)
    build.check(settings)
    build.settle_precision(settings)
    source, method = build.build_training(settings)
    began = {name: x.clone() for name, x in method.ema.state_dict().items()}
    checkpoint = newest_checkpoint(folder) if goes_on else None
    state = read_checkpoint(checkpoint) if checkpoint else None
    trainer = build.trainer(settings, folder, {}, state)
    trainer.callbacks[:0] = callbacks
    done = state["distill"]["iteration"] * settings.loop.accumulate if state else 0
    world = compose.processes(settings)
    loader = source.loader(seed=settings.seed, rank=compose.rank(), world=world, start=done)
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    found = [gather(part.state_dict(), keep=True) for part in (method.ema, method.heads)]
    student, heads = ({name: x.clone() for name, x in part.items()} for part in found)
    return End(began, student, heads, method.step)


def resumed(words: list[str], folder: Path) -> tuple[End, End]:
    """A training, and the same one whose last step is lost and taken again."""
    words = [*words, *EVERY_STEP]
    whole = train(words, folder)
    last = max((folder / "checkpoints").glob("*.ckpt"))
    last.unlink()
    return whole, train(words, folder, goes_on=True)


def compiled(wanted: bool) -> list[L.Callback]:
    if not wanted:
        return []
    from test_speed import Compiled

    return [Compiled()]


def main(asked: dict[str, Any]) -> None:
    """One process, of several perhaps: does each job, a list of words by its name, and writes its
    end. With `resumed` the last step of each is lost, and taken again by processes of the same
    group; with `compiled` its blocks are compiled.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder, rank = Path(asked["folder"]), os.environ["RANK"]
    for name, words in asked["jobs"].items():
        how: dict[str, Any] = {}
        try:
            if asked["resumed"]:
                train([*words, *EVERY_STEP, f"trainer.max_steps={STEPS - 1}"], folder / name)
                how = {"goes_on": True}
            end = train(words, folder / name, *compiled(asked["compiled"]), **how)
            torch.save(vars(end), folder / f"{name}_{rank}.pt")
        except Exception:  # the test of this job shows it
            said = traceback.format_exc()
            (folder / f"{name}_{rank}.txt").write_text(said, encoding="utf-8")
