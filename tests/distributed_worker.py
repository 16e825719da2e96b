"""One process of a test in `test_distributed.py`: trains methods on a tiny pipeline and writes what
each ended with.

It is asked for one run, or by `jobs` for several, one after another.
"""

from __future__ import annotations

import os
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from torch.nn.utils.parametrizations import _SpectralNorm

import tiny  # beside this script, hence on the path
from distill.core.score_distillation import ScoreDistillation, TeacherSamples
from distill.core.tensors import gather
from distill.data import source
from distill.storage.checkpoint_files import read_checkpoint
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from distill.training.checkpoints import AtomicIO
from distill.training.strategies import DataParallel, FullyShardedDataParallel

STEPS = 4


class Losses(L.Callback):
    def __init__(self):
        self.seen: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.loop.updated:
            for name, value in pl_module.loop.last_logged.items():
                if "/" in name and not name.endswith("/lr"):
                    self.seen.setdefault(name, []).append(value)


class SaveAt(L.Callback):
    def __init__(self, step: int | None, folder: Path):
        self.step, self.folder = step, folder

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.step == self.step:
            trainer.save_checkpoint(self.folder / f"step_{self.step:06d}.ckpt")
            trainer.should_stop = True

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["about"] = {"config": {}}


def strategy_of(name: str | None):
    if name is None:
        return "auto"
    dtype = "bfloat16" if name.endswith("reduced") else "float32"
    if name.startswith("ddp"):  # these networks are small: many buckets all the same
        return DataParallel(reduce_dtype=dtype, bucket_mib=0.1)
    options = {"sharded_checkpoints": name.endswith("parts"), "reduce_dtype": dtype}
    replicas = 2 if "replicas" in name else 1
    return FullyShardedDataParallel(**options, replicas=replicas)


def options_of(asked: dict) -> dict:
    """The method's own options, with objects where JSON has their arguments."""
    kinds = {"distill": ScoreDistillation, "real": TeacherSamples}
    given = asked.get("options", {})
    return {key: kinds[key](**v) if key in kinds else v for key, v in given.items()}


def compiled(asked: dict) -> list[L.Callback]:
    if not asked.get("compile"):
        return []
    from test_speed import Compiled

    return [Compiled()]


def main(asked: dict) -> None:
    tiny.vit = lambda: Path(asked["eyes"])  # of the process that reads the results
    folder, rank = Path(asked["folder"]), os.environ["RANK"]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if "jobs" not in asked:
        train(asked, folder / f"end_{rank}.pt")
    for name, job in asked.get("jobs", {}).items():
        try:
            train({**asked, **job}, folder / f"{name}_{rank}.pt")
        except Exception:  # the test of this job shows it
            (folder / f"{name}_{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")


def train(asked: dict, file: Path) -> None:
    rank, folder = int(os.environ["RANK"]), Path(asked["folder"])
    make = tiny.METHODS[asked["method"]]
    # Adam divides the smallest gradients by themselves, and with them what a processor has rounded:
    # not with this eps.
    options = {
        "accumulate": asked.get("accumulate", 1),
        "lora": asked.get("lora"),
        "discriminator_updates": asked.get("discriminator_updates", 1),
        "options": options_of(asked),
        "eps": 1e-4,
        "critic_eps": 1e-2,
    }
    if "score_teacher" in asked:
        options["score_teacher"] = SD(asked[asked["score_teacher"]])
    teacher = (SD if asked.get("family") == "unet" else SD3)(asked["teacher"])
    method = make(teacher, **options)
    for module in (
        method.heads.modules()
    ):  # its power iteration counts passes: two micro-batches make twice as many
        if isinstance(module, _SpectralNorm):
            module.eval()
    losses = Losses()
    if "poison" in asked:  # [rank, iteration]: there one loss of the student is not a number
        loss = method.student_loss

        def poisoned(*arguments):
            bad = asked["poison"] == [rank, method.loop.iteration]
            found = loss(*arguments)
            terms = {k: v * (float("nan") if bad else 1.0) for k, v in found.terms.items()}
            return replace(found, terms=terms)

        method.student_loss = poisoned
    own_files = str(asked.get("strategy")).startswith("fsdp2")
    trainer = L.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        precision=asked.get("precision", "32-true"),
        devices=asked["processes"],
        strategy=strategy_of(asked.get("strategy")),
        plugins=[] if own_files else [AtomicIO()],
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[losses, SaveAt(asked.get("save_at"), folder), *compiled(asked)],
    )
    resume = Path(asked["resume"]) if "resume" in asked else None
    start = (
        read_checkpoint(resume)["distill"]["iteration"] * asked.get("accumulate", 1)
        if resume
        else 0
    )
    loader = source.latents(asked["data"], batch_size=2).loader(
        seed=0, rank=rank, world=asked["processes"], start=start
    )
    trainer.fit(method, loader, ckpt_path=resume, weights_only=True)
    end = {
        "student": gather(method.student.state_dict(), keep=True),
        "heads": gather(method.heads.state_dict(), keep=True),
        "fake_score": gather(method.fake_score.state_dict(), keep=True)
        if method.fake_score
        else {},
        "ema": gather(method.ema.state_dict(), keep=True),
        "losses": {name: values[-2:] for name, values in losses.seen.items()},
        "counts": {
            "step": method.step,
            "iteration": method.loop.iteration - method.loop.skipped,
            "global": trainer.global_step,
        },
        "skipped": method.loop.skipped,
    }
    torch.save(end, file)
