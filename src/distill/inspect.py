"""`python -m distill.inspect run=...`: what the discriminator of a run sees, by head and noise level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def inspect(cfg: DictConfig) -> Path:
    """Judge real samples and the student's with the heads of the run's newest checkpoint; returns the page's path."""
    import torch
    from omegaconf import OmegaConf

    from distill import build
    from distill.compose import check_counts
    from distill.files import newest, read
    from distill.report.inspection import look, write

    check_counts(cfg, {"samples": 2, "seed": 0})
    folder = Path(cfg.run)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"run={cfg.run}: not a run folder (it has no config.yaml)")
    if not all(0 < level <= 1 for level in cfg.levels):
        raise ValueError(f"levels={list(cfg.levels)}: must lie in (0, 1]")
    kept = newest(folder)
    if kept.is_dir():
        raise ValueError(
            f"run={cfg.run}: its checkpoints are cut up among processes, which inspect does not put together"
        )
    made = OmegaConf.load(folder / "config.yaml")
    made.data.batch_size = cfg.samples
    source, method = build.parts(made)
    if method.alone:
        raise ValueError(f"run={cfg.run}: it was made without a discriminator")
    method.load_state_dict(read(kept)["state_dict"], strict=False)
    batch = method._embedded(next(iter(source.loader(seed=cfg.seed))))
    generator = torch.Generator(batch.x0.device).manual_seed(cfg.seed)
    return write(look(method, batch, list(cfg.levels), generator), Path(cfg.out or folder / "inspect"), folder.name)


@command("inspect")
def main(cfg: DictConfig) -> None:
    print(f"wrote {inspect(cfg)}")


if __name__ == "__main__":
    main()
