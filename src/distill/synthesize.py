"""Generate samples of prompts with a teacher, for data=synthetic. Sample i shows prompt i; after
the last prompt comes the first again. Its seed is `seed` + i, and its key: `data.seeded=true` gives
its noise in training. Give a killed command again, and it continues.

    python -m distill.synthesize teacher=sd3 prompts=prompts.txt out=synthetic guidance=4.5
    python -m distill.synthesize teacher=sdxl prompts=prompts.txt out=synthetic devices=8
    python -m distill.synthesize teacher=sdxl prompts=prompts.txt out=synthetic \\
        buckets='[[1024,1024],[1216,832],[832,1216]]' shares='[2,1,1]'

With buckets each sample has one of these sizes, drawn by its seed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distill.config import picture_units, validate
from distill.config.errors import command
from distill.core.limits import check_buckets, check_guidance_scale
from distill.data import begun_job
from distill.data.by_share import batches_of, size_of
from distill.data.lines import Lines
from distill.machine.faults import RERUN
from distill.machine.hardware import check_precision
from distill.teachers import families
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

    lines = (prompts := Lines(cfg.prompts, "prompts", cfg.column)).lines
    teacher = teacher_of(cfg, deferred=["vae"]).to(hardware.device())
    buckets, shares = _buckets(cfg)
    shapes = {size: teacher.shape_of(list(size), "buckets") for size in buckets}
    shape, dtype = teacher.shape_of(cfg.size), cfg.teacher.get("dtype") or "float32"

    def shape_of(seed: int) -> tuple[int, ...]:
        return shapes[size_of(seed, buckets, shares)] if buckets else shape

    job = shard_job.ShardJob(folder, cfg.count or len(lines), cfg.per_shard, prompts.digest())
    if cfg.embeddings:
        shard_job.put_null(teacher, folder, dtype)

    def samples(_: int, numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        by_shape = batches_of(numbers, cfg.batch_size, lambda i: shape_of(cfg.seed + i))
        for drawn, part in by_shape:
            captions, seeds = [lines[i % len(lines)] for i in part], [cfg.seed + i for i in part]
            with torch.no_grad():
                cond = teacher.embed(captions)
                options = {"shape": drawn, "steps": cfg.steps, "guidance": cfg.guidance}
                with hardware.autocast(cfg.precision, teacher.device.type):
                    latents = guided(teacher, cond, seeded(seeds), **options)
                latents = latents.float().cpu().numpy()
            embeddings = shard_job.embedded(cond) if cfg.embeddings else [{}] * len(part)
            for seed, *rest in zip(seeds, latents, captions, embeddings, strict=True):
                name = f"seed {seed}, {rest[1]!r}"
                shard_job.checked(name, rest[0], rest[2], dtype, cfg.precision)
                yield cached(f"{seed:09d}", *rest)

    job.make(samples)
    cell = teacher.unit // teacher.patch
    about = {
        "what": "samples of a teacher",
        **shard_job.of_teacher(cfg),
        "size": None if buckets else [side * cell for side in shape[:-3:-1]],
        "buckets": [[side // cell for side in bucket] for bucket in buckets] or None,
        "shares": shares,
    }
    asked = ("seed", "guidance", "steps", "precision", "embeddings")
    job.finish(**about, **{key: cfg[key] for key in asked})
    return 0


def _buckets(cfg: DictConfig) -> tuple[list[tuple[int, int]], Sequence[float] | None]:
    """The sizes of the samples, (width, height), [] for one size; and their shares."""
    shares = None if cfg.shares is None else list(cfg.shares)
    return [(width, height) for width, height in cfg.buckets or ()], shares


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    check_guidance_scale(cfg.guidance, "guidance")
    validate.check_size(cfg.size)
    buckets, shares = (OmegaConf.to_object(cfg)[key] for key in ("buckets", "shares"))
    check_buckets(buckets, shares)
    if buckets and cfg.size is not None:
        raise ValueError(f"size={cfg.size}: the sizes are those of buckets; leave it out")
    check_precision(cfg.precision)
    facts = families.family(str(cfg.teacher._target_))
    if facts is not None and facts.image:
        what = f"a {facts.kind_name()} reads pictures beside the caption, and prompts have none"
        raise ValueError(f"teacher: {what}; choose a text-to-image model")
    Lines(cfg.prompts, "prompts", cfg.column)
    picture_units.check_made(cfg.teacher, OmegaConf.masked_copy(cfg, ["size", "buckets"]))
    begun_job.check_shard_job(cfg)


@command("synthesize", hint=RERUN)
def main(cfg: DictConfig) -> int:
    check(cfg)
    with importing("torch"):
        from distill.data.shard_job import start

    return start(cfg, "synthesize", generate)


if __name__ == "__main__":
    main()
