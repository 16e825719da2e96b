"""Distil a many-step diffusion model into a student of 1 to 4 steps. A teacher teaches a student
against a discriminator by a method, on data. Each run writes one folder: the student as a diffusers
pipeline, its evaluation, a report.

    python -m distill.run
    python -m distill.run method=add teacher=shapes_unet seed=1 trainer.max_steps=600
    python -m distill.run experiment=sd3_turbo data.path=synthetic trainer=ddp trainer.devices=8
    python -m distill.run resume=runs/2026-01-31_12-00-00_ladd_shapes
    python -m distill.run -m seed=0,1,2 method=add,ladd
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config import compose, paths
from distill.config.defaults import with_defaults
from distill.config.errors import command
from distill.config.recipe_note import recipe_note
from distill.config.typed import masked_override
from distill.machine import faults
from distill.storage.checkpoint_names import checkpoints_at
from distill.storage.locks import check_free, one_writer
from distill.storage.safe_paths import check_can_be_written
from distill.terminal import console
from distill.terminal.progress import importing, stage
from distill.terminal.secret import redacted
from distill.training import run_folders as folders
from distill.training.run_folders import LOG


def start(cfg: DictConfig) -> int:
    """Start or resume a run, in this process or in several; returns the exit code."""
    from distill.config import continued, validate
    from distill.training import resuming

    cfg.resume = paths.escaped(cfg.resume or compose.requeued(cfg))
    before = None
    if cfg.resume:
        before = compose.read_unchecked(compose.folder_of(cfg.resume))
        checkpoints_at(Path(cfg.resume))
        resuming.check_folder(cfg)
        cfg = continued.resumed_config(cfg)
    validate.check_run(cfg)  # before torch and Lightning are imported, which takes seconds
    if not cfg.resume:
        check_can_be_written(Path(cfg.run_dir or "runs"), "run_dir")
        if cfg.run_dir:
            check_free(Path(cfg.run_dir), "run_dir")
        return _build_and_start(cfg, None)
    with one_writer(compose.folder_of(cfg.resume), "resume", deep=True):
        return _build_and_start(cfg, before)


def _build_and_start(cfg: DictConfig, before: DictConfig | None) -> int:
    """Build data and method, then create the run folder and train; returns the exit code.

    `before` is the previous configuration of a resumed run.
    """
    from distill.training import launch

    with importing("torch"):
        from distill.config import build
        from distill.training import loggers

    about = check_same_run(cfg, before) if before else {}
    build.check(cfg)
    if compose.rank() == 0:
        loggers.check(cfg)
    precision = build.settle_precision(cfg)
    processes = compose.processes(cfg)
    several = launch.needed(processes, cfg.trainer.get("num_nodes", 1))
    # Built before anything is written: a mistake in the configuration leaves no empty run behind.
    parts = None if several else build.build_training(cfg)
    if before:
        check_same_data(cfg, before, parts)
    cfg = paths.absolute(cfg)  # the saved configuration must work from every working folder
    folder = compose.run_folder(cfg)
    progress = {"train_seconds": about.get("train_seconds"), "anew": not cfg.resume}
    with (
        folders.kept_if_filled(folder),
        one_writer(folder, "resume" if cfg.resume else "run_dir", deep=True),
        faults.hint_on_failure(lambda: launch.way_on(folder)),
    ):
        launched = processes if several else 0
        return _train_or_launch(cfg, folder, precision, parts, launched, progress)


def _train_or_launch(
    cfg: DictConfig,
    folder: Path,
    precision: Any,
    parts: Any,
    processes: int,
    progress: dict[str, Any],
) -> int:
    """Write config.yaml and run.json, and train; returns the exit code.

    Trains in this process if `processes` is 0, else launches so many. `progress` has the seconds of
    training before the checkpoint, and whether the run is new.
    """
    from distill.storage.atomic import write_atomic
    from distill.training import launch
    from distill.training.run_metadata import RunMetadata

    if compose.rank() == 0 and not cfg.resume and folders.untouched(folder):
        folders.cleared(folder)  # an earlier command failed here before its first step
    names_before = {path.name for path in folder.iterdir()}
    fresh = not folders.foreign(folder)
    command = " ".join(["python -m distill.run", *redacted(sys.argv[1:])])
    overrides = [masked_override(override) for override in compose.overrides()]
    console.log_to(folder / LOG, command)
    if compose.rank() == 0:
        # Atomic: a full disk must not damage the file of an earlier run.
        write_atomic(folder / "config.yaml", compose.to_yaml(cfg))
        print(f"run folder: {folder}")
        print(precision_sentence(precision, cfg))
        note = None if cfg.resume else recipe_note(cfg)
        if note:
            print(note)
        chosen = {"name": precision.name, "reason": precision.reason}
        RunMetadata(folder).start(command, compose.name_of(cfg), overrides, chosen, **progress)
    code = 1
    try:
        if processes:
            code = launch.launch(folder, processes, secrets=compose.secrets(cfg))
        else:
            code = train(cfg, folder, parts)
    finally:
        # A run that fails before its first step is removed: the corrected command can use the same
        # run_dir.
        if code and fresh and compose.rank() == 0 and folders.untouched(folder):
            folders.undone(folder, names_before, crashed=(folder / launch.PROCESSES).exists())
    return code


def check_same_run(cfg: DictConfig, before: DictConfig) -> dict[str, Any]:
    """The metadata of the checkpoint to resume from.

    Raises ValueError if the checkpoint, or a model at a changed path, belongs to another run.
    """
    from distill.storage.checkpoint_files import newest_checkpoint, read_checkpoint
    from distill.training import resuming
    from distill.training.run_metadata import RunMetadata

    checkpoint = newest_checkpoint(Path(cfg.resume))  # checked before models and data are read
    about = read_checkpoint(checkpoint).get("about", {})
    resuming.check_moved(before, cfg, RunMetadata(compose.folder_of(cfg.resume)).facts)
    resuming.check_checkpoint(about, cfg, checkpoint)
    return about


def check_same_data(cfg: DictConfig, before: DictConfig, parts: Any) -> None:
    """Warn if the data of a resumed run have changed. Raises ValueError if a changed path holds
    other data.
    """
    from distill.training import resuming
    from distill.training.run_metadata import RunMetadata

    facts = RunMetadata(compose.folder_of(cfg.resume)).facts
    if facts.get("content"):
        source, _ = parts or (compose.make(cfg.data, "data"), None)
        resuming.check_data(before, cfg, facts, resuming.data_fingerprint(source.dataset))


def precision_sentence(precision: Any, cfg: DictConfig) -> str:
    """The precision of a run; for a resumed run also a faster one on this machine."""
    from distill.machine.hardware import best_precision

    best = best_precision(cfg.trainer.get("accelerator", "auto"))
    if not cfg.resume or best.name == precision.name:
        return f"precision: {precision.name} ({precision.reason})"
    what = f"precision: {precision.name}, as the run began; {best.name} is faster here"
    return f"{what} ({best.reason}): trainer.precision={best.name} changes it"


def train(cfg: DictConfig, folder: Path, parts: Any = None) -> int:
    """Train in this process, which may be one of several; returns the exit code.

    The process of rank 0 saves the student, evaluates it and writes the report.
    """
    with importing("torch"):
        from distill.config import build
        from distill.storage.checkpoint_files import newest_checkpoint, read_checkpoint
        from distill.training import resuming
        from distill.training.run_metadata import RunMetadata
        from distill.training.trackers import logged

    console.log_to(folder / LOG)
    source, method = parts or build.build_training(cfg)
    models = resuming.model_fingerprints(cfg)
    if compose.rank() == 0:
        RunMetadata(folder).record_inputs(
            models, resuming.data_fingerprint(source.dataset), resuming.text_fingerprints(cfg)
        )
    checkpoint = newest_checkpoint(Path(cfg.resume)) if cfg.resume else None
    state = read_checkpoint(checkpoint) if checkpoint else None
    trainer = build.trainer(cfg, folder, models, state)
    start = state["distill"]["iteration"] * method.loop.settings.accumulate if state else 0
    del state  # Lightning reads the checkpoint itself
    loader = source.loader(
        seed=cfg.seed, rank=compose.rank(), world=compose.processes(cfg), start=start
    )
    try:
        return _fit_and_finish(cfg, folder, method, trainer, loader, checkpoint)
    finally:
        logged.close(trainer.loggers)


def _fit_and_finish(
    cfg: DictConfig, folder: Path, method: Any, trainer: Any, loader: Any, checkpoint: Path | None
) -> int:
    """Train, and save and evaluate the student; returns the exit code."""
    from distill.config import build
    from distill.training.checkpoints import naming_checkpoint
    from distill.training.run_metadata import RunMetadata

    try:
        with naming_checkpoint(checkpoint):
            trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        if compose.rank() == 0 and method.loop.iteration:
            RunMetadata(folder).record_iterations(method.loop.iteration)
        raise
    student = build.averaged_weights(method, first=trainer.is_global_zero)
    if trainer.is_global_zero:
        RunMetadata(folder).record_training(method)
    if code := build.stop_code(trainer, method, folder):
        return code
    if trainer.is_global_zero:
        finish(cfg, method, student, folder, trainer.loggers)
    return 0


def finish(
    cfg: DictConfig, method: Any, average: Any, folder: Path, loggers: Sequence[Any] = ()
) -> None:
    """Save the averaged student, evaluate it, and write the report; trackers among the `loggers`
    get the scores and the report.
    """
    from distill.config import build
    from distill.evaluation.tables import in_terminal
    from distill.students import save_pipeline
    from distill.teachers.loading.locate import denoiser_part

    teacher, student = build.unsharded_models(cfg, method, average)
    sampler = compose.make(cfg.sampler, "sampler")
    scheduler = sampler.scheduler(student, teacher)
    with stage("saving the student"):
        saved = save_pipeline(student, teacher, folder / "student", scheduler, sampler)
    print(f"student: {saved}")
    if student.adapters is not None:
        from distill.exporting.low_rank import lora_metadata, save_lora
        from distill.students.lora import factors

        options = {"part": denoiser_part(saved), "metadata": lora_metadata(saved)}
        print(f"adapters: {save_lora(factors(student), folder / 'lora.safetensors', **options)}")
    try:
        if "_target_" in (cfg.get("metrics") or {}):  # `~metrics` skips the evaluation
            rows = compose.make(cfg.metrics, "metrics")(student, teacher, folder, sampler)
            promote_evaluation(folder)
            print(in_terminal(rows))
            log_evaluation(loggers, rows, method.step)
    except Exception:  # the run is trained even if its evaluation fails
        report(folder, teacher.folder, loggers)
        raise
    report(folder, teacher.folder, loggers)


def log_evaluation(loggers: Sequence[Any], rows: Any, step: int) -> None:
    """Give the trackers the scores of the evaluation, as `evaluation/student_1/<measure>`."""
    from distill.training.trackers import logged

    for row in rows if isinstance(rows, list) else ():  # a user's protocol may return anything
        if isinstance(row, Mapping):
            prefix = f"evaluation/{row.get('who')}_{row.get('steps')}"
            logged.scores(loggers, row, step, prefix)


def report(folder: Path, teacher: Path, loggers: Sequence[Any] = ()) -> None:
    """Mark the run as finished in run.json, and write the student's model card and the report."""
    from distill.exporting.card import write_card
    from distill.report import write_report
    from distill.training.run_metadata import RunMetadata
    from distill.training.trackers import logged

    RunMetadata(folder).finish()
    write_card(folder / "student", folder, teacher)
    with stage("writing the report"):
        written = write_report(folder)
    print(f"report: {written}")
    logged.report(loggers, Path(written))


def promote_evaluation(folder: Path) -> None:
    """Make the evaluation of this run the main result of evaluation.json; later ones do not
    replace it.
    """
    from distill.evaluation import results
    from distill.storage.atomic import write_atomic

    evaluation = results.read_evaluation(folder)
    if evaluation:  # a user's own protocol may write no file
        promoted = json.dumps(results.promote_newest(evaluation), indent=2)
        write_atomic(folder / results.FILE, promoted.encode() + b"\n")


@command("config", prepare=with_defaults)
def main(cfg: DictConfig) -> int:
    return start(cfg)


if __name__ == "__main__":
    main()
