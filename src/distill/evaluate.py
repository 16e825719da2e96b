"""Judge a run, any pipeline that we read, or a folder of pictures: scores, a comparison and a
report. What was drawn stays under `evaluation/`, so a killed command goes on when it is given
again.

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

from distill.config import paths, validate
from distill.config.compose import (
    check_counts,
    config_of,
    file_name,
    is_run,
    looked_at,
    rank,
    secrets,
    world,
    written,
)
from distill.config.errors import command
from distill.core.limits import check_dtype
from distill.evaluation.references import in_folder
from distill.machine.faults import AGAIN
from distill.storage.locks import check_free, one_writer
from distill.terminal.progress import importing
from distill.training.run_folders import check_ours

ASKED = "evaluation/asked.yaml"  # the command: for its other processes, and for who asks later


def judge(cfg: DictConfig) -> int:
    """Write evaluation.json, a comparison and a report into `out`; returns the exit code."""
    check(cfg)
    with importing("torch"):
        from distill.training import launch

    run, protocol, several = Path(cfg.run), _protocol(cfg), launch.needed(cfg.devices, 1)
    pictures = _pictures(run)
    if several and (pictures or not hasattr(protocol, "draw")):
        raise ValueError(
            f"devices={cfg.devices}: only drawing for coco5k or prompts is shared out; leave it out"
        )
    if pictures and not hasattr(protocol, "judge_folder"):
        raise ValueError(
            f"run={run} is a folder of pictures; add metrics=coco5k or metrics=prompts"
        )
    out = _out(cfg)
    parts = (
        None if pictures or several else _models(cfg, protocol)
    )  # a mistake in them leaves nothing behind
    if hasattr(protocol, "load"):
        # what cannot be read is said before hours of drawing, and before anything is written
        protocol.load()
    with one_writer(out, "out" if cfg.out else "run", deep=True):
        return _written(cfg, out, protocol, parts, several)


def _out(cfg: DictConfig) -> Path:
    """The folder that is written into."""
    name = file_name(cfg.run) or Path(cfg.run).resolve().name  # a/student and b/student are two
    return Path(cfg.out or (cfg.run if is_run(Path(cfg.run)) else Path("evaluations") / name))


def _written(cfg: DictConfig, out: Path, protocol: Any, parts: Any, several: bool) -> int:
    """Draw, judge and report into `out`; returns the exit code."""
    from distill.evaluation.tables import in_terminal
    from distill.exporting.card import write_card
    from distill.machine import hardware
    from distill.report import write_report
    from distill.storage.aside import put
    from distill.training import launch

    run, pictures = Path(cfg.run), _pictures(Path(cfg.run))
    (out / ASKED).parent.mkdir(parents=True, exist_ok=True)
    put(out / ASKED, written(paths.absolute(cfg)))
    try:
        if several and (code := launch.launch(out, cfg.devices, "evaluate", secrets=secrets(cfg))):
            return code
        if not pictures:
            protocol, student, teacher, sampler = parts or _models(cfg, protocol)
            rows = protocol(student, teacher, out, sampler)
        else:
            rows = protocol.judge_folder(run, out, hardware.device())
    finally:
        _leave_nothing(out)
    print(in_terminal(rows))
    if out == run and (run / "student").is_dir():
        write_card(run / "student", run, teacher.folder)
    print(f"wrote {out / 'evaluation.json'} and {write_report(out)}")
    return 0


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be, before anything that takes time is imported."""
    check_counts(cfg, {"devices": 1})
    check_dtype(cfg.dtype, "dtype", "auto")
    _steps(cfg)
    if world() > 1:
        raise ValueError(
            "devices: judging starts its processes itself; use devices=8 or the like, without"
            " torchrun"
        )
    validate.check_metrics(cfg.metrics)
    if not _pictures(Path(cfg.run)):
        validate.check_model(cfg.run)
        looked_at(cfg.run, "discriminator.features")
    if cfg.get("teacher"):
        validate.check_teacher(cfg.teacher)
    else:
        config_of(cfg.run, "teacher")
    if cfg.out:
        check_ours(Path(cfg.out), "out", "evaluation.json", "report.html")
    check_free(_out(cfg), "out" if cfg.out else "run")


def _leave_nothing(out: Path) -> None:
    """Remove what was made for a judging that came to nothing; what was drawn stays, and is gone on
    with.
    """
    drawn = any((out / "evaluation").glob("*/*")) or (out / "evaluation.json").exists()
    if drawn:
        return
    (out / ASKED).unlink(missing_ok=True)
    for folder in [*(out / "evaluation").glob("*/"), out / "evaluation", out]:
        with suppress(OSError):  # what else is in it is not ours
            folder.rmdir()


def _pictures(run: Path) -> list[Path]:
    """Those of a folder of pictures; none of what holds a model."""
    model = any((run / name).exists() for name in ("config.yaml", "student", "model_index.json"))
    return [] if model else in_folder(run)


def _steps(cfg: DictConfig) -> list[int]:
    """The student's, none if the protocol has them."""
    steps = [cfg.steps] if isinstance(cfg.steps, int) else cfg.steps
    if isinstance(steps, str) or any(type(n) is not int or n < 1 for n in steps or []):
        raise ValueError(f"steps={cfg.steps}: must be numbers of steps, 1,2,4 or the like")
    return list(steps or [])


def draw(cfg: DictConfig, folder: Path) -> int:
    """This process's part of the pictures; returns the exit code."""
    protocol, student, teacher, sampler = _models(cfg, _protocol(cfg))
    protocol.draw(student, teacher, folder, sampler, rank=rank(), world=world())
    return 0


def _protocol(cfg: DictConfig) -> Any:
    """How it is judged; refused where that cannot be, or would flatter the run."""
    from distill.config import build

    protocol = build.protocol(cfg.metrics, looked_at(cfg.run, "discriminator.features"))
    return replace(protocol, student_steps=steps) if (steps := _steps(cfg)) else protocol


def _models(cfg: DictConfig, protocol: Any) -> tuple[Any, Any, Any, Any]:
    """The protocol for what there is; student, or None; teacher, or what stands in for it; the
    student's sampler.
    """
    from distill.config import build, models
    from distill.machine import hardware
    from distill.sampling import distilled

    model = models.student_of(cfg.run, cfg.dtype).to(hardware.device())
    if hasattr(protocol, "fits"):
        protocol.fits(model)
    if not is_run(cfg.run) and not distilled(model.pipeline):  # it is a teacher itself
        steps = protocol.student_steps if cfg.steps else protocol.teacher_steps
        if not steps:
            raise ValueError(
                f"run={cfg.run}: was not distilled to few steps; add steps=28 or the like"
            )
        return replace(protocol, teacher_steps=steps, student_steps=[]), None, model, None
    node = cfg.get("teacher") or (config_of(cfg.run, "teacher") or {}).get("teacher")
    if not protocol.teacher_steps or not node:
        return replace(protocol, teacher_steps=[]), model, model, models.sampler_of(cfg.run, model)
    return (
        protocol,
        model,
        build.make(node, "teacher").to(hardware.device()),
        models.sampler_of(cfg.run, model),
    )


_main = command("evaluate", way_on=AGAIN)(judge)


def main() -> None:
    # Hydra takes 1,2,4 for a sweep.
    sys.argv[1:] = [re.sub(r"^steps=(\d+(,\d+)+)$", r"steps=[\1]", word) for word in sys.argv[1:]]
    _main()


if __name__ == "__main__":
    main()
