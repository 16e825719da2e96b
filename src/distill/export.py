"""`python -m distill.export run=... to=delta`: what a student has learnt, to be put on another checkpoint.

`teacher.weights=<delta>` adds it to a teacher, and `python -m distill.export base=<pipeline folder> delta=<delta>`
makes a pipeline folder of both, with the scheduler of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def export(cfg: DictConfig) -> Path:
    """Write and return the file or folder."""
    from omegaconf import OmegaConf

    from distill import build
    from distill.students import apply_delta, save_delta

    if cfg.delta:
        return apply_delta(build.student_of(cfg.base), Path(cfg.delta), Path(cfg.out or f"{cfg.delta}.student"))
    if cfg.run is None or cfg.to != "delta":
        raise ValueError(f"run={cfg.run} to={cfg.to}: give run=<folder> to=delta, or base=<folder> delta=<file>")
    base = build.make(OmegaConf.load(Path(cfg.run) / "config.yaml").teacher) if cfg.base is None else None
    base = base or build.student_of(cfg.base)
    return save_delta(build.student_of(cfg.run), base, Path(cfg.out or f"{cfg.run}/delta.safetensors"))


@command("export")
def main(cfg: DictConfig) -> None:
    print(f"wrote {export(cfg)}")


if __name__ == "__main__":
    main()
