"""Encode pictures and captions once, for training without encoders (data=latents). Samples keep
their numbers; a bad one is named and left out. More than `data.max_bad_share` of bad samples stop
the command. Give a killed command again, and it continues.

    python -m distill.cache teacher=sdxl data.path=photos data.size=1024 out=cached
    python -m distill.cache teacher=sd3 data.path='shards-{000..127}.tar' out=cached devices=8
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config import picture_units, validate
from distill.config.data_files import check_first_samples
from distill.config.errors import command
from distill.config.sources import EDIT_PAIRS, IMAGES
from distill.data import begun_job
from distill.machine.faults import RERUN
from distill.teachers import families
from distill.terminal.progress import importing, stage

SOURCES = (IMAGES, EDIT_PAIRS)  # what can be encoded


def encode(cfg: DictConfig, folder: Path) -> int:
    """Encode this process's share of the samples; returns the exit code."""
    import torch

    from distill.config.build import make
    from distill.config.fitting import check_data_fits
    from distill.config.models import teacher_of
    from distill.data import shard_job
    from distill.data.write import EDIT_PAIRS as ENCODED_PAIRS
    from distill.data.write import PICTURES, cached
    from distill.machine import hardware

    with stage("opening the data"):
        source = make(cfg.data, "data")
    teacher, pairs = teacher_of(cfg), cfg.data.get("_target_") == EDIT_PAIRS
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
                    if pairs:
                        embeddings = _with_images(teacher, good, embeddings)
                for (i, _), *rest in zip(good, latents, captions, embeddings, strict=True):
                    shard_job.checked(source.dataset.shards.name(i), rest[0], rest[2], dtype)
                    yield cached(f"{i:09d}", *rest)

    job.make(samples)
    cell, buckets = teacher.unit // teacher.patch, source.dataset.buckets
    what = ENCODED_PAIRS if pairs else PICTURES
    about = {"what": what, **shard_job.of_teacher(cfg), "data": cfg.data.path}
    about["size"] = None if buckets else [cfg.data.size] * 2
    about["buckets"] = [[side // cell for side in bucket] for bucket in buckets] or None
    bad = source.dataset.bad
    job.finish(source.dataset.max_bad_share, bad, **about, embeddings=cfg.embeddings)
    return 0


def _with_images(teacher: Any, good: list[Any], samples: list[Any]) -> list[dict[str, Any]]:
    """The arrays of each sample, and what the teacher reads of the source of its pair."""
    import torch

    sources = torch.stack([item["source"] for _, item in good]).to(teacher.device)
    images = teacher.image_of({"source": sources}).float().cpu().numpy()
    return [{**own, "image": image} for own, image in zip(samples, images, strict=True)]


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    if cfg.data.get("_target_") not in SOURCES:
        raise ValueError("data: only pictures can be encoded; choose data=images or data=pairs")
    facts = families.family(str(cfg.teacher._target_))
    if facts is not None and facts.image == "mask":
        what = f"a {facts.kind_name()} reads masks, which are drawn on pictures and not on latents"
        raise ValueError(f"teacher: {what}; train it by data=images data.masks=true")
    if masks := cfg.data.get("masks"):
        what = "masks are drawn while a model trains, and cached latents have none; make it false"
        raise ValueError(f"data.masks={masks}: {what}, or train by data=images data.masks=true")
    validate.check_data(cfg.data)
    begun_job.check_shard_job(cfg)
    picture_units.check_fit(cfg.data, cfg.teacher, published=True)
    check_first_samples(cfg.data)


@command("cache", hint=RERUN)
def main(cfg: DictConfig) -> int:
    check(cfg)
    with importing("torch"):
        from distill.data.shard_job import start

    return start(cfg, "cache", encode)


if __name__ == "__main__":
    main()
