"""`python -m distill.run method=ladd teacher=shapes`: distil, judge, export, report. One run, one folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra

from distill._conf import CONF_DIR
from distill.errors import said_plainly

if TYPE_CHECKING:
    from omegaconf import DictConfig


def distil(cfg: DictConfig) -> Path:
    """The whole run; returns its folder. Heavy libraries load only now, so that --help stays quick."""
    from omegaconf import OmegaConf

    from distill import build
    from distill.record import RunRecord

    build.seed_everything(cfg.seed)
    # Nothing is written before all parts are there: a mistake in the configuration leaves no empty run behind.
    teacher, source = build.teacher(cfg), build.source(cfg)
    method = build.method(cfg, teacher)
    folder = build.run_folder(cfg)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    record = RunRecord(folder, command=" ".join(["python -m distill.run", *sys.argv[1:]]), name=build.name_of(cfg))
    print(f"run folder: {folder}")
    trainer = build.trainer(cfg, folder)
    checkpoint = folder / "checkpoints" / "last.ckpt" if cfg.resume else None
    start = build.position(checkpoint) if checkpoint else 0
    loader = source.loader(seed=cfg.seed, rank=trainer.global_rank, world=trainer.world_size, start=start)
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    record.trained(method)
    if trainer.is_global_zero:
        finish(cfg, method, folder, record)
    return folder


def finish(cfg: DictConfig, method: Any, folder: Path, record: Any) -> None:
    """Leave behind the averaged student, what it is worth, and the report."""
    from distill import build
    from distill.report import write_report
    from distill.students import save_pipeline

    method.ema.copy_to(method.student)
    method.student.eval()
    print(f"student: {save_pipeline(method.student, method.teacher, folder / 'student')}")
    if "_target_" in (cfg.get("metrics") or {}):  # `~metrics` leaves the judging out
        rows = build.make(cfg.metrics)(method.student, method.teacher, folder)
        print(build.table(rows))
    record.finished()
    print(f"report: {write_report(folder)}")


@hydra.main(config_path=CONF_DIR, config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with said_plainly():
        distil(cfg)


if __name__ == "__main__":
    main()
