"""Distil a many-step diffusion model into one of 1 to 4 steps: a teacher teaches a student against
a discriminator by a method, on data. One run, one folder: the student as a diffusers pipeline, its
evaluation, a report.

    python -m distill.run
    python -m distill.run method=add teacher=shapes_unet seed=1 trainer.max_steps=600
    python -m distill.run experiment=sd3_turbo data.path=synthetic trainer=ddp trainer.devices=8
    python -m distill.run resume=runs/2026-01-31_12-00-00_ladd_shapes
    python -m distill.run -m seed=0,1,2 method=add,ladd
"""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config import compose, paths
from distill.config.defaults import settled
from distill.config.errors import command
from distill.config.typed import as_said
from distill.machine import faults
from distill.storage.checkpoint_names import checkpoints_at
from distill.storage.locks import check_free, one_writer
from distill.terminal import console
from distill.terminal.progress import importing, stage
from distill.terminal.secret import told
from distill.training import run_folders as folders
from distill.training.run_folders import LOG


def begin(cfg: DictConfig) -> int:
    """Make or find the run folder and train, here or in as many processes as are asked for; returns
    the exit code.
    """
    from distill.config import continued, validate
    from distill.training import resuming

    cfg.resume = paths.escaped(cfg.resume or compose.requeued(cfg))
    before = None
    if cfg.resume:
        before = compose.looked_at(compose.folder_of(cfg.resume))
        checkpoints_at(Path(cfg.resume))
        resuming.check_folder(cfg)
        cfg = continued.going_on(cfg)
    validate.check_run(cfg)  # all that needs neither torch nor Lightning: these take seconds
    if not cfg.resume:
        if cfg.run_dir:
            check_free(Path(cfg.run_dir), "run_dir")
        return _checked(cfg, None)
    with one_writer(compose.folder_of(cfg.resume), "resume", deep=True):
        return _checked(cfg, before)


def _checked(cfg: DictConfig, before: DictConfig | None) -> int:
    """Build all parts, then write and train; returns the exit code.

    `before`: what a run that goes on was.
    """
    from distill.training import launch

    with importing("torch"):
        from distill.config import build

    about = the_same_run(cfg, before) if before else {}
    build.check(cfg)
    precision = build.settle_precision(cfg)
    processes = compose.processes(cfg)
    several = launch.needed(processes, cfg.trainer.get("num_nodes", 1))
    # Nothing is written before all parts are there: a mistake in the configuration leaves no empty
    # run behind.
    parts = None if several else build.parts(cfg)
    if before:
        the_same_data(cfg, before, parts)
    cfg = paths.absolute(cfg)  # so that what is kept of it is found from every working folder
    folder = compose.run_folder(cfg)
    went_on = {"train_seconds": about.get("train_seconds"), "anew": not cfg.resume}
    with (
        folders.kept_if_filled(folder),
        one_writer(folder, "resume" if cfg.resume else "run_dir", deep=True),
        faults.goes_on(lambda: launch.way_on(folder)),
    ):
        return _written(cfg, folder, precision, parts, processes if several else 0, went_on)


def _written(
    cfg: DictConfig,
    folder: Path,
    precision: Any,
    parts: Any,
    processes: int,
    went_on: dict[str, Any],
) -> int:
    """Note what is done, and train, here or in so many `processes`; returns the exit code.

    `went_on`: the seconds of training behind the checkpoint that is gone on from, and whether there
    is none.
    """
    from distill.storage.aside import put
    from distill.training import launch
    from distill.training.run_metadata import RunRecord

    if compose.rank() == 0 and not cfg.resume and folders.untouched(folder):
        folders.cleared(folder)  # of a command that came to no step, in the same folder
    there = {path.name for path in folder.iterdir()}
    fresh = not folders.foreign(folder)
    command = " ".join(["python -m distill.run", *told(sys.argv[1:])])
    typed = [as_said(word) for word in compose.overrides()]
    console.keep(folder / LOG, command)
    if compose.rank() == 0:
        # Only when complete: a full disk must not cost an earlier run its own.
        put(folder / "config.yaml", compose.written(cfg))
        print(f"run folder: {folder}")
        print(said_of(precision, cfg))
        said = {"name": precision.name, "reason": precision.reason}
        RunRecord(folder).begun(command, compose.name_of(cfg), typed, said, **went_on)
    code = 1
    try:
        if processes:
            code = launch.launch(folder, processes, secrets=compose.secrets(cfg))
        else:
            code = train(cfg, folder, parts)
    finally:
        # Of what came to no step nothing stays, so that the mended command can be given with the
        # same run_dir.
        if code and fresh and compose.rank() == 0 and folders.untouched(folder):
            folders.undone(folder, there, crashed=(folder / launch.PROCESSES).exists())
    return code


def the_same_run(cfg: DictConfig, before: DictConfig) -> dict[str, Any]:
    """What the checkpoint to go on from says of itself.

    ValueError if it, or a model that moved, is of another run.
    """
    from distill.storage.checkpoint_files import newest, read
    from distill.training import resuming
    from distill.training.run_metadata import RunRecord

    checkpoint = newest(Path(cfg.resume))  # a mistake in it is said before anything is read
    about = read(checkpoint).get("about", {})
    resuming.check_moved(before, cfg, RunRecord(compose.folder_of(cfg.resume)).facts)
    resuming.check_checkpoint(about, cfg, checkpoint)
    return about


def the_same_data(cfg: DictConfig, before: DictConfig, parts: Any) -> None:
    """Say that the data of a run that goes on have changed; ValueError if they moved and are
    others.
    """
    from distill.training import resuming
    from distill.training.run_metadata import RunRecord

    facts = RunRecord(compose.folder_of(cfg.resume)).facts
    if facts.get("content"):
        source, _ = parts or (compose.make(cfg.data, "data"), None)
        resuming.check_data(before, cfg, facts, resuming.data_mark(source.dataset))


def said_of(precision: Any, cfg: DictConfig) -> str:
    """The precision of a run in words; where it goes on, what this machine would have chosen."""
    from distill.machine.hardware import best_precision

    here = best_precision(cfg.trainer.get("accelerator", "auto"))
    if not cfg.resume or here.name == precision.name:
        return f"precision: {precision.name} ({precision.reason})"
    said = f"precision: {precision.name}, as the run began; {here.name} is faster here"
    return f"{said} ({here.reason}): trainer.precision={here.name} changes it"


def train(cfg: DictConfig, folder: Path, parts: Any = None) -> int:
    """Fit in this process, one of several perhaps; the first of them finishes the run.

    Returns the exit code.
    """
    with importing("torch"):
        from distill.config import build
        from distill.storage.checkpoint_files import newest, read
        from distill.training import resuming
        from distill.training.checkpoints import taken_up
        from distill.training.run_metadata import RunRecord

    console.keep(folder / LOG)
    source, method = parts or build.parts(cfg)
    models = resuming.marks(cfg)
    if compose.rank() == 0:
        RunRecord(folder).made_of(
            models, resuming.data_mark(source.dataset), resuming.texts_of(cfg)
        )
    checkpoint = newest(Path(cfg.resume)) if cfg.resume else None
    kept = read(checkpoint) if checkpoint else None
    trainer = build.trainer(cfg, folder, models, kept)
    start = kept["distill"]["iteration"] * method.loop.engine.accumulate if kept else 0
    del kept  # Lightning reads it by itself
    loader = source.loader(
        seed=cfg.seed, rank=compose.rank(), world=compose.processes(cfg), start=start
    )
    try:
        with taken_up(checkpoint):
            trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        if compose.rank() == 0 and method.loop.iteration:
            RunRecord(folder).came_to(method.loop.iteration)
        raise
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
    from distill.config import build
    from distill.evaluation.tables import in_terminal
    from distill.students import save_pipeline
    from distill.teachers.loading.locate import denoiser_part

    teacher, student = build.whole(cfg, method, average)
    sampler = compose.make(cfg.sampler, "sampler")
    scheduler = sampler.scheduler(student, teacher)
    with stage("saving the student"):
        saved = save_pipeline(student, teacher, folder / "student", scheduler, sampler)
    print(f"student: {saved}")
    if student.adapters is not None:
        from distill.exporting.low_rank import about, save_lora
        from distill.students.lora import factors

        said = {"part": denoiser_part(saved), "about": about(saved)}
        print(f"adapters: {save_lora(factors(student), folder / 'lora.safetensors', **said)}")
    try:
        if "_target_" in (cfg.get("metrics") or {}):  # `~metrics` leaves the judging out
            rows = compose.make(cfg.metrics, "metrics")(student, teacher, folder, sampler)
            own_verdict(folder)
            print(in_terminal(rows))
    except Exception:  # what cannot be judged now is trained all the same
        report(folder, teacher.folder)
        raise
    report(folder, teacher.folder)


def report(folder: Path, teacher: Path) -> None:
    """Say that the run is finished, in its record, the student's card and the report."""
    from distill.exporting.card import write_card
    from distill.report import write_report
    from distill.training.run_metadata import RunRecord

    RunRecord(folder).finished()
    write_card(folder / "student", folder, teacher)
    with stage("writing the report"):
        written = write_report(folder)
    print(f"report: {written}")


def own_verdict(folder: Path) -> None:
    """Have what the run was judged by now stand first, whatever `evaluate` asks later."""
    from distill.evaluation import results as verdicts
    from distill.storage.aside import put

    evaluation = verdicts.read(folder)
    if evaluation:  # a protocol of one's own may write none
        owned = json.dumps(verdicts.owned(evaluation), indent=2)
        put(folder / verdicts.FILE, owned.encode() + b"\n")


@command("config", prepare=settled)
def main(cfg: DictConfig) -> int:
    return begin(cfg)


if __name__ == "__main__":
    main()
