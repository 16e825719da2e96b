"""`python -m distill.evaluate run=... steps=1,2,4`: judge a run, any pipeline that we know, or a folder of pictures.

What was drawn stays under `evaluation/`, so a killed command goes on when it is given again.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

ASKED = "evaluation/asked.yaml"  # the command, for its other processes


def judge(cfg: DictConfig) -> int:
    """Write evaluation.json, a comparison and a report into `out`; returns the exit code."""
    from omegaconf import OmegaConf

    from distill import build, launch, making
    from distill.compose import check_counts
    from distill.report import write_report
    from distill.students.card import write_card

    check_counts(cfg, {"devices": 1, "metrics.batch_size": 1, "metrics.workers": 0, "metrics.prompts": 1})
    run, protocol = Path(cfg.run), _protocol(cfg)
    out = Path(cfg.out or (run if _is_run(run) else Path("evaluations") / run.resolve().name))
    several = launch.needed(cfg.devices, 1)
    if several and _is_pictures(run):
        raise ValueError(f"devices={cfg.devices}: pictures that are there are scored by one process; leave it out")
    if not hasattr(protocol, "draw") and (several or _is_pictures(run)):
        raise ValueError("metrics=shapes judges a model, in one process; choose metrics=coco5k or metrics=prompts")
    if several:
        (out / ASKED).parent.mkdir(parents=True, exist_ok=True)
        making.put(out / ASKED, OmegaConf.to_yaml(cfg, resolve=True).encode())
        if code := launch.launch(out, cfg.devices, "evaluate"):
            return code
    if _is_pictures(run):
        rows = protocol.judge_folder(run, out, making.device())
    else:
        protocol, student, teacher, sampler = _models(cfg, protocol)
        out.mkdir(parents=True, exist_ok=True)
        rows = protocol(student, teacher, out, sampler)
        if out == run:
            write_card(run / "student", run, teacher.folder)
    print(build.table(rows))
    print(f"wrote {out / 'evaluation.json'} and {write_report(out)}")
    return 0


def draw(cfg: DictConfig, folder: Path) -> int:
    """This process's part of the pictures; returns the exit code."""
    from distill import compose

    protocol, student, teacher, sampler = _models(cfg, _protocol(cfg))
    protocol.draw(student, teacher, folder, sampler, rank=compose.rank(), world=compose.world())
    return 0


def _protocol(cfg: DictConfig) -> Any:
    """How it is judged; refused where that cannot be, or would flatter the run."""
    from omegaconf import OmegaConf

    from distill import build

    run = OmegaConf.load(Path(cfg.run) / "config.yaml") if _is_run(Path(cfg.run)) else OmegaConf.create()
    protocol = build.protocol(cfg.metrics, run)
    steps = [cfg.steps] if isinstance(cfg.steps, int) else cfg.steps
    if steps is None:
        return protocol
    if not (isinstance(steps, (list, tuple)) or OmegaConf.is_list(steps)) or any(
        not isinstance(n, int) or n < 1 for n in steps
    ):
        raise ValueError(f"steps={cfg.steps}: must be numbers of steps, 1,2,4 or the like")
    return replace(protocol, student_steps=list(steps))


def _models(cfg: DictConfig, protocol: Any) -> tuple[Any, Any, Any, Any]:
    """The protocol for what there is; student, or None; teacher, or what stands in for it; the student's sampler."""
    from omegaconf import OmegaConf

    from distill import build, making
    from distill.sampling import distilled, sampler_of

    run, device = Path(cfg.run), making.device()
    model = build.student_of(cfg.run, cfg.dtype).to(device)
    if not _is_run(run) and not distilled(model.pipeline):  # it is a teacher itself
        steps = protocol.student_steps if cfg.steps else protocol.teacher_steps
        if not steps:
            raise ValueError(f"run={cfg.run}: was not distilled to few steps; add steps=28 or the like")
        return replace(protocol, teacher_steps=steps, student_steps=[]), None, model, None
    sampler = sampler_of(model.pipeline)
    if protocol.teacher_steps and _is_run(run):
        return protocol, model, build.make(OmegaConf.load(run / "config.yaml").teacher).to(device), sampler
    if protocol.teacher_steps and cfg.teacher:
        return protocol, model, build.student_of(cfg.teacher, cfg.dtype).to(device), sampler
    return replace(protocol, teacher_steps=[]), model, model, sampler


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _is_pictures(path: Path) -> bool:
    """Whether it is a folder with pictures and no model."""
    from distill.metrics.pictures import SUFFIXES

    if not path.is_dir() or any((path / name).exists() for name in ("config.yaml", "student", "model_index.json")):
        return False
    return any(file.suffix.lower() in SUFFIXES for file in path.iterdir())


_main = command("evaluate")(judge)


def main() -> None:
    # Hydra takes 1,2,4 for a sweep.
    sys.argv[1:] = [re.sub(r"^steps=(\d+(,\d+)+)$", r"steps=[\1]", word) for word in sys.argv[1:]]
    _main()


if __name__ == "__main__":
    main()
