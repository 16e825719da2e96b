"""A shard job: a command writes a folder of shards with any number of ranks, and can be killed and
resumed.

<out>/making.yaml         the job's settings; the same command resumes it, another is refused
<out>/inputs.sha256       a hash of the prompts or of the data's names, which may not change
<out>/null.npz            the embedded empty caption
<out>/latents-000000.tar  samples 0 to per_shard - 1, and so on
<out>/manifest.json       what was made, written last

Shard k holds samples k * per_shard to (k + 1) * per_shard - 1, without bad ones, and no batch
crosses its end. So every rank and every restart writes the same bytes. A shard appears when it is
complete, so existing shards are finished. Ranks do not communicate: each writes every world-th
shard, and the one that finds all of them writes the manifest.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from distill.config import compose, paths, trust
from distill.data.bad import reasons_of
from distill.data.named import BEGUN, shards_in
from distill.data.shards import index_tar
from distill.data.write import MANIFEST, NULL, write_shard
from distill.machine import faults
from distill.machine.hardware import precision
from distill.storage.atomic import write_atomic
from distill.storage.bounded import mapping_of
from distill.storage.locks import one_writer
from distill.teachers.families import embedding_options
from distill.terminal.progress import Bar, track
from distill.terminal.secret import masked
from distill.terminal.shown import shown
from distill.training import launch
from distill.training.run_metadata import versions

INPUTS = "inputs.sha256"


@dataclass(frozen=True)
class ShardJob:
    """The samples of `count` numbers in shards of `per_shard`, in `folder`; `inputs` is a hash of
    their sources.

    Raises ValueError if the folder was started with other inputs.
    """

    folder: Path
    count: int
    per_shard: int
    inputs: str

    def __post_init__(self) -> None:
        file = self.folder / INPUTS
        if shards_in(self.folder) and file.read_text(encoding="utf-8") != self.inputs:
            raise ValueError(
                f"out={self.folder}: prompts or data have changed since its start; choose"
                " another out="
            )
        write_atomic(file, self.inputs.encode())

    def path(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:06d}.tar"

    @property
    def shards(self) -> range:
        return range(-(-self.count // self.per_shard))

    def missing(self) -> dict[int, range]:
        """The missing shards of this rank, with the numbers of their samples."""
        own_shards = [
            shard
            for shard in self.shards[compose.rank() :: compose.world_size()]
            if not self.path(shard).exists()
        ]
        return {
            k: range(k * self.per_shard, min(self.count, (k + 1) * self.per_shard))
            for k in own_shards
        }

    def make(self, samples: Callable[[int, range], Iterator[tuple[str, dict[str, bytes]]]]) -> None:
        """Write every missing shard k from `samples(k, numbers)`, with a progress bar over the
        numbers.
        """
        missing = self.missing()
        by_rank = f" by process 1 of {compose.world_size()}" if compose.world_size() > 1 else ""
        total, done = sum(map(len, missing.values())), 0
        with Bar(f"making samples{by_rank}", total, unit="sample", rate="samples") as bar:
            for shard, numbers in missing.items():
                write_shard(self.path(shard), with_progress(samples(shard, numbers), bar.advance))
                done += len(numbers)
                bar.update(done)  # bad ones included

    def finish(
        self, max_bad_share: float = 0.0, bad: Mapping[str, str] | None = None, **about: Any
    ) -> None:
        """Write the manifest if every shard exists.

        Raises ValueError if more than this share of the samples is bad. `bad` are those that this
        process found, name -> reason.
        """
        paths = [self.path(shard) for shard in self.shards]
        if not all(path.exists() for path in paths):
            return
        counted = track(paths, "counting samples", unit="shard")
        samples, digest = sum(len(index_tar(str(path))) for path in counted), hashlib.sha256()
        where = (
            f"data.path={masked(str(about['data']))}" if "data" in about else f"out={self.folder}"
        )
        if not samples:
            for path in paths:  # leave no shards behind
                path.unlink(missing_ok=True)
            what = f"all {self.count} samples are bad; repair them"
            raise ValueError(f"{where}: {what}. {_reasons(bad)}")
        dropped = self.count - samples
        if dropped > max_bad_share * self.count:
            what = f"{dropped} of {self.count} samples are bad, more than"
            what = f"{what} data.max_bad_share={max_bad_share:g}; raise it, or repair them and"
            raise ValueError(f"{where}: {what} choose another out=. {_reasons(bad)}")
        for path in track(paths, "hashing", unit="shard"):
            with path.open("rb") as file:
                while block := file.read(2**24):
                    digest.update(block)
        about |= {"samples": samples, "dropped": dropped, "shards": len(paths)}
        about |= {"sha256": digest.hexdigest(), "versions": versions()}
        write_atomic(self.folder / MANIFEST, json.dumps(about, indent=2).encode() + b"\n")


def _reasons(bad: Mapping[str, str] | None) -> str:
    """Why samples are bad, or how to learn it: another process may have found them."""
    return reasons_of(bad) if bad else "`python -m distill.check` says why"


def with_progress(samples: Iterator[Any], advance: Callable[[], None]) -> Iterator[Any]:
    for sample in samples:
        yield sample
        advance()


def start(cfg: DictConfig, command: str, work: Callable[[DictConfig, Path], int]) -> int:
    """Write the settings of a job, then run it, here or in `devices` ranks; returns the exit code.

    `begun_job.check_shard_job` must have been called before: it refuses a folder with other shards.
    """
    cfg = paths.absolute(cfg)
    folder, done, several = Path(cfg.out), Path(cfg.out) / MANIFEST, launch.needed(cfg.devices, 1)
    if "precision" in cfg:
        _settle_precision(cfg, folder)
    for key, node in cfg.items():  # what is made; `out` and prompts may be called by any text
        if isinstance(node, DictConfig):
            compose.checked_node(node, str(key))
    with one_writer(folder, "out"), faults.hint_on_failure(lambda: launch.way_on(folder, command)):
        code = _run_job(cfg, folder, command, None if several else work)
    if compose.world_size() == 1 and not done.is_file():
        with suppress(OSError):  # not empty
            folder.rmdir()
    if done.is_file():
        made = mapping_of(done)
        samples, shards, dropped = (made.get(k) for k in ("samples", "shards", "dropped"))
        print(shown(f"{folder}: {samples} samples in {shards} shards, {dropped} bad ones left out"))
    return code


def _run_job(
    cfg: DictConfig, folder: Path, command: str, work: Callable[[DictConfig, Path], int] | None
) -> int:
    """Write the settings and do the work, with a launcher where `work` is None; returns the exit
    code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not shards_in(folder):
        write_atomic(folder / BEGUN, compose.to_yaml(cfg))
    try:
        if (folder / MANIFEST).is_file():
            return 0
        if work:
            return work(cfg, folder)
        return launch.launch(folder, cfg.devices, command, secrets=compose.secrets(cfg))
    finally:
        if compose.world_size() == 1 and not shards_in(
            folder
        ):  # after a mistake, leave nothing behind
            for name in (BEGUN, INPUTS, NULL):
                (folder / name).unlink(missing_ok=True)


def _settle_precision(cfg: DictConfig, folder: Path) -> None:
    """Replace `precision=auto`: by that of the started job, else by the best of this machine."""
    settings = folder / BEGUN
    if cfg.precision == "auto" and settings.is_file():
        cfg.precision = trust.data(settings, "precision").get("precision", "32-true")
    chosen = precision(cfg.precision)
    cfg.precision = chosen.name
    if compose.rank() == 0:
        print(f"precision: {chosen.name} ({chosen.reason})")


def of_teacher(cfg: DictConfig) -> dict[str, Any]:
    """The teacher's entry in a manifest."""
    own = {"vae": cfg.teacher.vae} if cfg.teacher.get("vae") else {}
    options = embedding_options(cfg.teacher)
    without = list(cfg.teacher.get("without") or [])
    return {"teacher": cfg.teacher.path, "without": without, "told": options, **own}


def embedded(cond: Any) -> list[dict[str, np.ndarray]]:
    """The tensors of each sample of a Cond, by name."""
    tensors = {name: x.cpu().numpy() for name, x in cond.tensors().items()}
    return [{name: x[i] for name, x in tensors.items()} for i in range(len(cond))]


def checked(
    name: str,
    latent: np.ndarray,
    embedded: Mapping[str, np.ndarray],
    dtype: str,
    precision: str | None = None,
) -> None:
    """Raise ValueError, naming the sample, for latents or embeddings that float16 cannot represent.

    `dtype` and `precision` are those of their computation.
    """
    _finite(name, "latents", latent, dtype, precision)
    for part, x in embedded.items():
        _finite(name, f"embeddings ({part})", x.astype(np.float32), dtype, precision)


def _finite(name: str, what: str, x: np.ndarray, dtype: str, precision: str | None) -> None:
    computed = f"computed in {dtype}{f' under precision={precision}' if precision else ''}"
    if not np.isfinite(x).all():
        wanted = [] if dtype == "float32" else ["teacher.dtype=float32"]
        wanted += [] if precision in (None, "32-true") else ["precision=32-true"]
        advice = f"give {' '.join(wanted)}" if wanted else "check the teacher's files"
        raise ValueError(f"{name}: its {what} hold nan or inf, {computed}; {advice}")
    largest = np.abs(x).max(initial=0)
    if largest > np.finfo(np.float16).max:
        raise ValueError(
            f"{name}: its {what} reach {largest:.3g}, beyond float16, in which they are kept "
            f"({computed}); check the teacher's config, or leave the sample out"
        )


def put_null(teacher: Any, folder: Path, dtype: str = "float32") -> None:
    """Write the embedded empty caption in half precision; raises ValueError as `checked`."""
    tensors = {name: x.float().cpu().numpy() for name, x in teacher.embed([""]).tensors().items()}
    checked("the empty caption", np.zeros(1), tensors, dtype)
    np.savez(file := io.BytesIO(), **{k: x.astype(np.float16) for k, x in tensors.items()})
    write_atomic(folder / NULL, file.getvalue())
