"""`python -m distill.inspect run=...`: what the discriminator of a run sees, by head and noise level."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distill.compose import check_counts, run_at
from distill.errors import command
from distill.progress import importing, stage


@command("inspect")
def main(cfg: DictConfig) -> None:
    """Judge real samples and the student's with the heads of the run's newest checkpoint."""
    with importing("torch"):
        import torch

        from distill import build
        from distill.files import newest, read
        from distill.report.inspection import look, write

    check_counts(cfg, {"samples": 2, "seed": 0})
    folder = run_at(cfg.run)
    if not all(0 < level <= 1 for level in cfg.levels):
        raise ValueError(f"levels={list(cfg.levels)}: must lie in (0, 1]")
    kept = newest(folder)
    if kept.is_dir():
        raise ValueError(
            f"run={cfg.run}: its checkpoints are cut up among processes, and inspect reads whole ones"
        )
    made = OmegaConf.load(folder / "config.yaml")
    made.data.batch_size = cfg.samples
    source, method = build.parts(made)
    if method.alone:
        raise ValueError(f"run={cfg.run}: it was made without a discriminator")
    method.load_state_dict(read(kept)["state_dict"], strict=False)
    batch = method._embedded(next(iter(source.loader(seed=cfg.seed))))
    generator = torch.Generator(batch.x0.device).manual_seed(cfg.seed)
    with stage("looking with the discriminator"):
        seen = look(method, batch, list(cfg.levels), generator)
    out = Path(cfg.out or folder / "inspect")
    print(f"wrote {write(seen, out, folder.name)}")


if __name__ == "__main__":
    main()
