"""Distil a many-step diffusion model into one of 1 to 4 steps: a teacher teaches a student against
a discriminator by a method, on data. One run, one folder: the student as a diffusers pipeline, its
evaluation, a report.

    python -m distill.run
    python -m distill.run method=add teacher=shapes_unet seed=1 trainer.max_steps=600
    python -m distill.run experiment=sd3_turbo data.path=synthetic trainer=ddp trainer.devices=8
    python -m distill.run resume=runs/2026-01-31_12-00-00_ladd_shapes
    python -m distill.run -m seed=0,1,2 method=add,ladd
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill import console, faults
from distill.defaults import settled
from distill.errors import command
from distill.limits import checkpoints_at
from distill.locks import check_free, one_writer
from distill.progress import importing, stage

LOG = "run.log"


def begin(cfg: DictConfig) -> int:
    """Make or find the run folder and train, here or in as many processes as are asked for; returns the exit code."""
    from distill import compose, validate

    cfg.resume = cfg.resume or compose.requeued(cfg)
    if cfg.resume:
        compose.folder_of(cfg.resume)
        checkpoints_at(Path(cfg.resume))
        cfg = compose.going_on(cfg)
    validate.check_run(cfg)  # all that needs neither torch nor Lightning: these take seconds
    if not cfg.resume:
        if cfg.run_dir:
            check_free(Path(cfg.run_dir), "run_dir")
        return _checked(cfg)
    with one_writer(compose.folder_of(cfg.resume), "resume", deep=True):
        return _checked(cfg)


def _checked(cfg: DictConfig) -> int:
    """Build all parts, then write and train; returns the exit code."""
    from distill import compose, launch

    with importing("torch"):
        from distill import build
        from distill.files import newest

    if cfg.resume:
        newest(Path(cfg.resume))  # a mistake in it is said before anything is read
    build.check(cfg)
    precision = build.settle_precision(cfg)
    processes = compose.processes(cfg)
    several = launch.needed(processes, cfg.trainer.get("num_nodes", 1))
    # Nothing is written before all parts are there: a mistake in the configuration leaves no empty run behind.
    parts = None if several else build.parts(cfg)
    folder = compose.run_folder(cfg)
    fresh = not any(folder.iterdir())
    code = 1
    try:
        with (
            one_writer(folder, "resume" if cfg.resume else "run_dir", deep=True),
            faults.goes_on(lambda: launch.way_on(folder)),
        ):
            code = _written(cfg, folder, precision, parts, processes if several else 0)
        return code
    finally:
        if code and fresh and compose.rank() == 0:
            undo(folder)


def _written(cfg: DictConfig, folder: Path, precision: Any, parts: Any, processes: int) -> int:
    """Note what is done, and train, here or in so many `processes`; returns the exit code."""
    from distill import compose, launch
    from distill.aside import put
    from distill.record import RunRecord

    command = " ".join(["python -m distill.run", *sys.argv[1:]])
    console.keep(folder / LOG, command)
    if compose.rank() == 0:
        # Only when complete: a full disk must not cost an earlier run its own.
        put(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        print(f"run folder: {folder}")
        print(said_of(precision, cfg))
        said = {"name": precision.name, "reason": precision.reason}
        RunRecord(folder).begun(command, compose.name_of(cfg), compose.overrides(), said)
    return launch.launch(folder, processes) if processes else train(cfg, folder, parts)


def undo(folder: Path) -> None:
    """Remove what a run that failed has left, unless it has trained; of a crash the log and notes stay."""
    from distill.launch import PROCESSES

    left = {path.name for path in folder.iterdir()}
    if not left <= {"config.yaml", "run.json", LOG, PROCESSES}:
        return
    if PROCESSES not in left:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in ("config.yaml", "run.json"):
        (folder / name).unlink(missing_ok=True)


def said_of(precision: Any, cfg: DictConfig) -> str:
    """The precision of a run in words; where it goes on, what this machine would have chosen."""
    from distill.hardware import best_precision

    here = best_precision(cfg.trainer.get("accelerator", "auto"))
    if not cfg.resume or here.name == precision.name:
        return f"precision: {precision.name} ({precision.reason})"
    said = f"precision: {precision.name}, as the run began; {here.name} is faster here"
    return f"{said} ({here.reason}): trainer.precision={here.name} changes it"


def train(cfg: DictConfig, folder: Path, parts: Any = None) -> int:
    """Fit in this process, one of several perhaps; the first of them finishes the run. Returns the exit code."""
    with importing("torch"):
        from distill import build, compose
        from distill.files import newest, read
        from distill.record import RunRecord

    console.keep(folder / LOG)
    source, method = parts or build.parts(cfg)
    trainer = build.trainer(cfg, folder)
    checkpoint = newest(Path(cfg.resume)) if cfg.resume else None
    start = read(checkpoint)["distill"]["iteration"] * method.engine.accumulate if checkpoint else 0
    loader = source.loader(
        seed=cfg.seed, rank=compose.rank(), world=compose.processes(cfg), start=start
    )
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    student = build.averaged(method, first=trainer.is_global_zero)
    if trainer.is_global_zero:
        RunRecord(folder).trained(method)
    if code := build.stopped(trainer, method, folder):
        return code
    if trainer.is_global_zero:
        finish(cfg, method, student, folder)
    return 0


def finish(cfg: DictConfig, method: Any, average: Any, folder: Path) -> None:
    """Leave behind the averaged student, what it is worth, and the report."""
    from distill import build, compose
    from distill.students import save_pipeline
    from distill.teachers.locate import denoiser_part

    (teacher, student), sampler = build.whole(cfg, method, average), compose.make(cfg.sampler)
    scheduler = sampler.scheduler(student, teacher)
    with stage("saving the student"):
        saved = save_pipeline(student, teacher, folder / "student", scheduler, sampler)
    print(f"student: {saved}")
    if student.adapters is not None:
        from distill.students.lora import factors
        from distill.students.low_rank import about, save_lora

        said = {"part": denoiser_part(saved), "about": about(saved)}
        print(f"adapters: {save_lora(factors(student), folder / 'lora.safetensors', **said)}")
    try:
        if "_target_" in (cfg.get("metrics") or {}):  # `~metrics` leaves the judging out
            rows = compose.make(cfg.metrics)(student, teacher, folder, sampler)
            print(build.table(rows))
    except Exception:  # what cannot be judged now is trained all the same
        report(folder, teacher.folder)
        raise
    report(folder, teacher.folder)


def report(folder: Path, teacher: Path) -> None:
    """Say that the run is finished, in its record, the student's card and the report."""
    from distill.record import RunRecord
    from distill.report import write_report
    from distill.students.card import write_card

    RunRecord(folder).finished()
    write_card(folder / "student", folder, teacher)
    with stage("writing the report"):
        written = write_report(folder)
    print(f"report: {written}")


@command("config", prepare=settled)
def main(cfg: DictConfig) -> int:
    return begin(cfg)


if __name__ == "__main__":
    main()
