"""Generate samples of prompts with a teacher, for data=synthetic. Sample i shows prompt i; after
the last prompt comes the first again. Its seed is `seed` + i, and its key: `data.seeded=true` gives
its noise in training. Give a killed command again, and it continues.

    python -m distill.synthesize teacher=sd3 prompts=prompts.txt out=synthetic guidance=4.5
    python -m distill.synthesize teacher=sdxl prompts=prompts.txt out=synthetic devices=8
"""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from distill.config import validate
from distill.config.errors import command
from distill.data import begun_job
from distill.data.lines import Lines
from distill.machine.faults import RERUN
from distill.machine.hardware import check_precision
from distill.terminal.progress import importing


def generate(cfg: DictConfig, folder: Path) -> int:
    """Generate this process's share of the samples; returns the exit code."""
    import torch

    from distill.config.models import teacher_of
    from distill.data import shard_job
    from distill.data.write import cached
    from distill.machine import hardware
    from distill.sampling import seeded
    from distill.sampling.guided import guided

    lines = (prompts := Lines(cfg.prompts, "prompts")).lines
    teacher = teacher_of(cfg, deferred=["vae"]).to(hardware.device())
    shape, dtype = teacher.shape_of(cfg.size), cfg.teacher.get("dtype") or "float32"
    job = shard_job.ShardJob(folder, cfg.count or len(lines), cfg.per_shard, prompts.digest())
    if cfg.embeddings:
        shard_job.put_null(teacher, folder, dtype)

    def samples(_: int, numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        for start in numbers[:: cfg.batch_size]:
            part = range(start, min(start + cfg.batch_size, numbers.stop))
            captions, seeds = [lines[i % len(lines)] for i in part], [cfg.seed + i for i in part]
            with torch.no_grad():
                cond = teacher.embed(captions)
                options = {"shape": shape, "steps": cfg.steps, "guidance": cfg.guidance}
                with hardware.autocast(cfg.precision, teacher.device.type):
                    latents = guided(teacher, cond, seeded(seeds), **options)
                latents = latents.float().cpu().numpy()
            embeddings = shard_job.embedded(cond) if cfg.embeddings else [{}] * len(part)
            for seed, *rest in zip(seeds, latents, captions, embeddings, strict=True):
                name = f"seed {seed}, {rest[1]!r}"
                shard_job.checked(name, rest[0], rest[2], dtype, cfg.precision)
                yield cached(f"{seed:09d}", *rest)

    job.make(samples)
    size = [side * teacher.unit // teacher.patch for side in shape[:0:-1]]
    about = {
        "what": "samples of a teacher",
        **shard_job.of_teacher(cfg),
        "size": size,
        "buckets": None,
    }
    asked = ("seed", "guidance", "steps", "precision", "embeddings")
    job.finish(**about, **{key: cfg[key] for key in asked})
    return 0


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    validate.check_number(cfg, "guidance")
    validate.check_size(cfg.size)
    check_precision(cfg.precision)
    Lines(cfg.prompts, "prompts")
    begun_job.check_shard_job(cfg)


@command("synthesize", hint=RERUN)
def main(cfg: DictConfig) -> int:
    check(cfg)
    with importing("torch"):
        from distill.data.shard_job import start

    return start(cfg, "synthesize", generate)


if __name__ == "__main__":
    main()
