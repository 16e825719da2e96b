"""Show how well the discriminator of a run tells real samples from the student's, by head and
noise level, and where in the picture. It reads the newest checkpoint.

    python -m distill.inspect run=runs/...
    python -m distill.inspect run=runs/... samples=64 levels=[0.1,0.5,0.9]
"""

from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config.compose import check_counts, config_of, run_at
from distill.config.errors import command
from distill.config.validate import LOCAL_HEADS
from distill.config.videos import of_videos
from distill.core.limits import check_local_batch
from distill.storage.checkpoint_names import checkpoints_at
from distill.storage.locks import check_free, one_writer
from distill.storage.safe_paths import check_written_paths
from distill.terminal.progress import importing, stage

# The keys of a run that are built again: all but training, logging and sample pictures.
READ = (
    *(
        "seed",
        "method",
        "teacher",
        "student",
        "discriminator",
        "data",
        "optimizer",
        "loop",
        "sampler",
    ),
    *("metrics", "trainer.accelerator"),
)


def check(cfg: DictConfig) -> DictConfig:
    """The run's configuration. Raises ValueError or OSError before anything slow is imported."""
    check_counts(cfg, {"samples": 2, "seed": 0})
    folder = run_at(cfg.run)
    levels = list(cfg.levels) if isinstance(cfg.levels, ListConfig) else [cfg.levels]
    numbers = all(isinstance(level, int | float) for level in levels)
    if not numbers or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"levels={levels}: must lie in (0, 1]")
    run_cfg = config_of(folder, *READ)
    if of_videos(run_cfg.get("teacher")):
        what = "its teacher makes videos, and this command shows heads on pictures"
        raise ValueError(f"run={cfg.run}: {what}; look at {folder}/report.html")
    if OmegaConf.select(run_cfg, "discriminator.features") is None:
        raise ValueError(f"run={cfg.run}: was trained without a discriminator; name another run")
    if OmegaConf.select(run_cfg, "discriminator.heads._target_") == LOCAL_HEADS:
        check_local_batch(cfg.samples, "samples")
    checkpoints_at(folder, "run")
    if not cfg.out:
        check_written_paths(folder, "run")
    check_free(_out(cfg), "out")
    return run_cfg


def _out(cfg: DictConfig) -> Path:
    return Path(cfg.out or Path(cfg.run) / "inspect")


def examine(cfg: DictConfig) -> None:
    """Score real samples and the student's with the heads of the run's newest checkpoint."""
    run_cfg = check(cfg)
    with importing("torch"):
        import torch

        from distill.config import build
        from distill.machine.hardware import device
        from distill.report.inspection import inspect_heads, write_inspection
        from distill.storage.checkpoint_files import check_fits, newest_checkpoint, read_checkpoint
        from distill.training.resuming import check_checkpoint

    folder = Path(cfg.run)
    checkpoint = newest_checkpoint(folder)
    if checkpoint.is_dir():
        raise ValueError(
            f"run={cfg.run}: its checkpoints are sharded, and inspect reads unsharded ones"
        )
    state = read_checkpoint(checkpoint)
    check_checkpoint(state.get("about"), run_cfg, checkpoint, "run")
    run_cfg.data.batch_size = cfg.samples
    source, method = build.build_training(run_cfg)
    check_fits(state["state_dict"], method, f"run={cfg.run}: {checkpoint.name}")
    method.load_state_dict(state["state_dict"])
    method.to(device(OmegaConf.select(run_cfg, "trainer.accelerator", default="auto")))
    loaded = next(iter(source.loader(seed=cfg.seed)))
    loaded = method.transfer_batch_to_device(loaded, method.device, 0)
    batch = method.loop.prepare_batch(method, loaded)
    generator = torch.Generator(batch.x0.device).manual_seed(cfg.seed)
    with stage("inspecting the discriminator"):
        inspection = inspect_heads(method, batch, list(cfg.levels), generator)
    out = _out(cfg)
    with one_writer(out, "out"):
        print(f"wrote {write_inspection(inspection, out, folder.name)}")


main = command("inspect")(examine)

if __name__ == "__main__":
    main()
