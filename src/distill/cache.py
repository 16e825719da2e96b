"""Encode pictures and captions once, for training without encoders (data=latents). Samples keep
their numbers; a bad one is named and left out. More than `data.max_bad_share` of bad samples stop
the command. Give a killed command again, and it continues.

    python -m distill.cache teacher=sdxl data.path=photos data.size=1024 out=cached
    python -m distill.cache teacher=sd3 data.path='shards-{000..127}.tar' out=cached devices=8
"""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from distill.config import validate
from distill.config.errors import command
from distill.data import begun_job
from distill.machine.faults import RERUN
from distill.terminal.progress import importing, stage

SOURCE = "distill.data.source.images"  # the only kind of data that can be encoded


def encode(cfg: DictConfig, folder: Path) -> int:
    """Encode this process's share of the samples; returns the exit code."""
    import torch

    from distill.config.build import make
    from distill.config.fitting import check_data_fits
    from distill.config.models import teacher_of
    from distill.data import shard_job
    from distill.data.write import PICTURES, cached
    from distill.machine import hardware

    with stage("opening the data"):
        source = make(cfg.data, "data")
    teacher = teacher_of(cfg)
    check_data_fits(cfg, source.dataset, teacher)
    device, dtype = hardware.device(), cfg.teacher.get("dtype") or "float32"
    teacher.only_encode(device)
    job = shard_job.ShardJob(
        folder, len(source.dataset), cfg.per_shard, source.dataset.shards.digest()
    )
    if cfg.embeddings:
        shard_job.put_null(teacher, folder, dtype)
    plan = {shard: source.batches(numbers) for shard, numbers in job.missing().items()}
    stream = source.once([batch for batches in plan.values() for batch in batches])

    def samples(shard: int, _: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        for numbers, found in zip(plan[shard], stream, strict=False):
            good = [(i, item) for i, (item, _) in zip(numbers, found, strict=True) if item]
            source.dataset.account(
                len(good), [pair for _, bad in found for pair in bad], needed=False
            )
            captions = [item["caption"] for _, item in good]
            source.dataset.account_captions(captions, drawn=False)
            if good:
                pixels = torch.stack([item["pixels"] for _, item in good]).to(device)
                with torch.no_grad():
                    latents = teacher.encode(pixels).float().cpu().numpy()
                    embeddings = (
                        shard_job.embedded(teacher.embed(captions))
                        if cfg.embeddings
                        else [{}] * len(good)
                    )
                for (i, _), *rest in zip(good, latents, captions, embeddings, strict=True):
                    shard_job.checked(source.dataset.shards.name(i), rest[0], rest[2], dtype)
                    yield cached(f"{i:09d}", *rest)

    job.make(samples)
    cell, buckets = teacher.unit // teacher.patch, source.dataset.buckets
    about = {"what": PICTURES, **shard_job.of_teacher(cfg), "data": cfg.data.path}
    about["size"] = None if buckets else [cfg.data.size] * 2
    about["buckets"] = [[side // cell for side in bucket] for bucket in buckets] or None
    job.finish(source.dataset.max_bad_share, **about, embeddings=cfg.embeddings)
    return 0


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    if cfg.data.get("_target_") != SOURCE:
        raise ValueError("data: only pictures can be encoded; choose data=images")
    validate.check_data(cfg.data)
    begun_job.check_shard_job(cfg)
    validate.check_fit(cfg.data, cfg.teacher)


@command("cache", hint=RERUN)
def main(cfg: DictConfig) -> int:
    check(cfg)
    with importing("torch"):
        from distill.data.shard_job import start

    return start(cfg, "cache", encode)


if __name__ == "__main__":
    main()
