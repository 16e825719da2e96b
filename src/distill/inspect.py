"""Show what the discriminator of a run sees: how far its heads tell real samples from the
student's, by head and noise level, and where in the picture. Reads the newest checkpoint.

    python -m distill.inspect run=runs/...
    python -m distill.inspect run=runs/... samples=64 levels=[0.1,0.5,0.9]
"""

from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.compose import check_counts, run_at
from distill.errors import command
from distill.limits import check_local_batch, checkpoints_at
from distill.locks import one_writer
from distill.progress import importing, stage
from distill.validate import LOCAL_HEADS


def check(cfg: DictConfig) -> DictConfig:
    """The run's configuration; refuses what cannot be before anything that takes time is imported."""
    check_counts(cfg, {"samples": 2, "seed": 0})
    folder = run_at(cfg.run)
    levels = list(cfg.levels) if isinstance(cfg.levels, ListConfig) else [cfg.levels]
    numbers = all(isinstance(level, int | float) for level in levels)
    if not numbers or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"levels={levels}: must lie in (0, 1]")
    made = OmegaConf.load(folder / "config.yaml")
    if OmegaConf.select(made, "discriminator.features") is None:
        raise ValueError(f"run={cfg.run}: it was made without a discriminator")
    if OmegaConf.select(made, "discriminator.heads._target_") == LOCAL_HEADS:
        check_local_batch(cfg.samples, "samples")
    checkpoints_at(folder, "run")
    return made


@command("inspect")
def main(cfg: DictConfig) -> None:
    """Judge real samples and the student's with the heads of the run's newest checkpoint."""
    made = check(cfg)
    with importing("torch"):
        import torch

        from distill import build
        from distill.files import newest, read
        from distill.hardware import device
        from distill.report.inspection import look, write

    folder = Path(cfg.run)
    kept = newest(folder)
    if kept.is_dir():
        raise ValueError(
            f"run={cfg.run}: its checkpoints are cut up among processes, and inspect reads whole ones"
        )
    made.data.batch_size = cfg.samples
    source, method = build.parts(made)
    method.load_state_dict(read(kept)["state_dict"], strict=False)
    method.to(device(made.trainer.get("accelerator", "auto")))
    loaded = next(iter(source.loader(seed=cfg.seed)))
    batch = method._embedded(method.transfer_batch_to_device(loaded, method.device, 0))
    generator = torch.Generator(batch.x0.device).manual_seed(cfg.seed)
    with stage("looking with the discriminator"):
        seen = look(method, batch, list(cfg.levels), generator)
    out = Path(cfg.out or folder / "inspect")
    with one_writer(out, "out"):
        print(f"wrote {write(seen, out, folder.name)}")


if __name__ == "__main__":
    main()
