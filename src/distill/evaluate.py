"""Evaluate a run, any supported pipeline, or a folder of pictures: scores, a comparison and a
report. Generated pictures stay under `evaluation/`: give a killed command again, and it continues.

    python -m distill.evaluate run=runs/... steps=1,2,4
    python -m distill.evaluate run=stabilityai/sdxl-turbo metrics=coco5k metrics.path=coco devices=8
    python -m distill.evaluate run=pictures metrics=prompts metrics.path=prompts.txt
"""

import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config import paths, picture_keys, validate
from distill.config.compose import (
    check_counts,
    config_of,
    file_name,
    is_run,
    rank,
    read_unchecked,
    secrets,
    to_yaml,
    world_size,
)
from distill.config.errors import command
from distill.config.preference import check_lora
from distill.config.videos import refuse_videos
from distill.core.limits import check_dtype
from distill.evaluation import judged
from distill.evaluation.references import pictures_in
from distill.machine.faults import RERUN
from distill.storage.locks import check_free, one_writer
from distill.terminal.progress import importing
from distill.training.run_folders import check_ours

NOT_FEW = "run={}: was not distilled to few steps; add steps=28 or the like"
COMMAND_FILE = "evaluation/asked.yaml"  # read by the other processes of the command


def evaluate(cfg: DictConfig) -> int:
    """Write `evaluation.json`, a comparison and a report into `out`; returns the exit code."""
    check(cfg)
    with importing("torch"):
        from distill.training import launch

    run, protocol, several = Path(cfg.run), _protocol(cfg), launch.needed(cfg.devices, 1)
    pictures = _pictures(run)
    if several and (pictures or not hasattr(protocol, "generate")):
        raise ValueError(
            f"devices={cfg.devices}: several processes need metrics=coco5k or prompts, and a model;"
            " leave it out"
        )
    if pictures and not hasattr(protocol, "evaluate_folder"):
        raise ValueError(
            f"run={run} is a folder of pictures; add metrics=coco5k or metrics=prompts"
        )
    out = _out(cfg)
    # Built before anything is written: a mistake leaves no files behind.
    models = None if pictures or several else _models(cfg, protocol)
    if hasattr(protocol, "load"):
        # A network that cannot be read is reported before hours of generating.
        protocol.load()
    with one_writer(out, "out" if cfg.out else "run", deep=True):
        return _write_evaluation(cfg, out, protocol, models, several)


def _out(cfg: DictConfig) -> Path:
    """The folder to write into."""
    # The whole path, not its last part: a/student and b/student get different folders.
    name = file_name(cfg.run) or Path(cfg.run).resolve().name
    own = is_run(Path(cfg.run)) and not cfg.lora  # a run's scores are of its student alone
    if cfg.lora:
        name += f"_with_{file_name(cfg.lora)}_{cfg.lora_scale:g}"
    return Path(cfg.out or (cfg.run if own else Path("evaluations") / name))


def _write_evaluation(cfg: DictConfig, out: Path, protocol: Any, models: Any, several: bool) -> int:
    """Generate, evaluate and report into `out`; returns the exit code."""
    from distill.evaluation.tables import in_terminal
    from distill.exporting.card import write_card
    from distill.machine import hardware
    from distill.report import write_report
    from distill.storage.atomic import write_atomic
    from distill.training import launch

    run, pictures = Path(cfg.run), _pictures(Path(cfg.run))
    (out / COMMAND_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out / COMMAND_FILE, to_yaml(paths.absolute(cfg)))
    try:
        if several and (code := launch.launch(out, cfg.devices, "evaluate", secrets=secrets(cfg))):
            return code
        if not pictures:
            protocol, student, teacher, sampler = models or _models(cfg, protocol)
            rows = protocol(student, teacher, out, sampler)
        else:
            rows = protocol.evaluate_folder(run, out, hardware.device())
    finally:
        _remove_unused(out)
    print(in_terminal(rows))
    if out == run and (run / "student").is_dir():
        write_card(run / "student", run, teacher.folder)
    print(f"wrote {out / 'evaluation.json'} and {write_report(out)}")
    return 0


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    check_counts(cfg, {"devices": 1})
    check_dtype(cfg.dtype, "dtype", "auto")
    _steps(cfg)
    if world_size() > 1:
        raise ValueError(
            "devices: this command starts its own processes; use devices=8 or the like, without"
            " torchrun"
        )
    validate.check_metrics(cfg.metrics)
    _check_lora(cfg)
    if not _pictures(Path(cfg.run)):
        validate.check_model(cfg.run)
        refuse_videos(cfg.run, "this evaluation")
        picture_keys.check_size_fits(cfg.run, cfg.metrics.get("size"), "metrics.")
        if "measures" in cfg.metrics:
            picture_keys.refuse_readers(cfg.run, "this evaluation")
        if (family := picture_keys.family_of_run(cfg.run)) is not None:
            judged.check_protocol(cfg.metrics, family.image)
        read_unchecked(cfg.run, "discriminator.features")
        _check_steps_known(cfg)
    if cfg.get("teacher"):
        validate.check_teacher(cfg.teacher)
    else:
        config_of(cfg.run, "teacher")
    if cfg.out:
        check_ours(Path(cfg.out), "out", "evaluation.json", "report.html")
    check_free(_out(cfg), "out" if cfg.out else "run")


def _check_steps_known(cfg: DictConfig) -> None:
    """Check that a model of many steps is evaluated in some number of them."""
    needed = "measures" in cfg.metrics and not cfg.metrics.get("teacher_steps")
    if not needed or cfg.steps or is_run(cfg.run):
        return
    if picture_keys.is_few_step(cfg.run) is False:
        raise ValueError(NOT_FEW.format(cfg.run))


def _check_lora(cfg: DictConfig) -> None:
    check_lora(cfg)
    if cfg.lora and _pictures(Path(cfg.run)):
        raise ValueError(f"lora={cfg.lora}: run={cfg.run} is a folder of pictures; leave it out")
    if cfg.lora and cfg.out and Path(cfg.out).resolve() == Path(cfg.run).resolve():
        what = "is the run's own folder, whose scores are of its student alone; name another"
        raise ValueError(f"out={cfg.out}: {what}")


def _remove_unused(out: Path) -> None:
    """Remove the files of an evaluation that failed before its first picture.

    Pictures stay: the same command resumes from them.
    """
    has_pictures = any((out / "evaluation").glob("*/*"))
    if has_pictures or (out / "evaluation.json").exists():
        return
    (out / COMMAND_FILE).unlink(missing_ok=True)
    for folder in [*(out / "evaluation").glob("*/"), out / "evaluation", out]:
        with suppress(OSError):  # it holds files of the user
            folder.rmdir()


def _pictures(run: Path) -> list[Path]:
    """The pictures of a folder of pictures; [] for a folder that holds a model."""
    names = ("config.yaml", "student", "model_index.json")
    has_model = any((run / name).exists() for name in names)
    return [] if has_model else pictures_in(run)


def _steps(cfg: DictConfig) -> list[int]:
    """The student's numbers of steps; [] to use those of the protocol."""
    steps = [cfg.steps] if isinstance(cfg.steps, int) else cfg.steps
    if isinstance(steps, str) or any(type(n) is not int or n < 1 for n in steps or []):
        raise ValueError(f"steps={cfg.steps}: must be numbers of steps, 1,2,4 or the like")
    return list(steps or [])


def generate(cfg: DictConfig, folder: Path) -> int:
    """Generate this process's share of the pictures; returns the exit code."""
    protocol, student, teacher, sampler = _models(cfg, _protocol(cfg))
    protocol.generate(student, teacher, folder, sampler, rank=rank(), world_size=world_size())
    return 0


def _protocol(cfg: DictConfig) -> Any:
    """The evaluation protocol. Raises ValueError for one that cannot work or favours the run."""
    from distill.config import build

    protocol = build.protocol(cfg.metrics, read_unchecked(cfg.run, "discriminator.features"))
    steps = _steps(cfg)
    return replace(protocol, student_steps=steps) if steps else protocol


def _models(cfg: DictConfig, protocol: Any) -> tuple[Any, Any, Any, Any]:
    """(protocol, student or None, teacher, the student's sampler or None).

    The protocol has only the rows that can be computed. Without a teacher the student stands in.
    """
    from distill.config import build, models
    from distill.machine import hardware
    from distill.sampling import distilled

    given = (cfg.run, cfg.dtype, cfg.lora, cfg.lora_scale)
    model = models.student_of(*given).to(hardware.device())
    if hasattr(protocol, "fits"):
        protocol.fits(model)
    if not is_run(cfg.run) and not distilled(model.pipeline):  # the model itself is a teacher
        steps = protocol.student_steps if cfg.steps else protocol.teacher_steps
        if not steps:
            raise ValueError(NOT_FEW.format(cfg.run))
        return replace(protocol, teacher_steps=steps, student_steps=[]), None, model, None
    node = cfg.get("teacher") or (config_of(cfg.run, "teacher") or {}).get("teacher")
    if not protocol.teacher_steps or not node:
        return replace(protocol, teacher_steps=[]), model, model, models.sampler_of(cfg.run, model)
    teacher = build.make(node, "teacher").to(hardware.device())
    return protocol, model, teacher, models.sampler_of(cfg.run, model)


_main = command("evaluate", hint=RERUN)(evaluate)


def main() -> None:
    # Hydra would read 1,2,4 as a sweep.
    pattern = re.compile(r"^steps=(\d+(,\d+)+)$")
    sys.argv[1:] = [pattern.sub(r"steps=[\1]", argument) for argument in sys.argv[1:]]
    _main()


if __name__ == "__main__":
    main()
