"""Check whether this machine can run a configuration: versions, accelerators, memory, disk, and
what the options need. Each line says ok, warn or fail, and what to do. After a fail the exit code
is 1.

    python -m distill.doctor
    python -m distill.doctor teacher=sd3 trainer=ddp trainer.devices=8
"""

import importlib
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config import validate
from distill.config.compose import check_counts, processes
from distill.config.defaults import with_placeholder_data
from distill.config.errors import command, is_mistake, sentence
from distill.config.sources import DRAWN
from distill.machine import faults
from distill.storage import locks
from distill.terminal.shown import shown

GB = 1e9
BAD_LIGHTNING = ("2.6.2", "2.6.3")
Line = tuple[str, str, str]  # ok, warn or fail; what; remedy
WAIT = "wait for it, or choose another run_dir="
RANK_PROCESS = "distill.training.rank_process"  # in the command of launched processes
PREFETCH = 2  # batches that each DataLoader worker reads ahead: torch's prefetch_factor
SAMPLE = 2**18  # ours: numbers per sample if its size is not known, as latents of 1024x1024
SHARD = "more devices with trainer=fsdp2, or teacher.dtype=bfloat16"
SAVE = "teacher.quantize=nf4, optimizer=adamw8bit or student.checkpointing=true"  # unsharded
UNTRIED = "one process should work; report it if it does not"
UNTESTED = {  # what should work on a system, and what does not
    "Darwin": "one process should work on the CPU, and may on an Apple GPU; report it if not",
    "Windows": (
        "one process should work, by `python -m distill.run`; there is no make, and no "
        "trainer=fsdp2"
    ),
}


def system() -> Line:
    """The operating system, and what is not tested on it."""
    kind, processor = platform.system(), platform.machine()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    what = f"{kind} {platform.release()} on {processor}, {python}"
    if kind in UNTESTED:
        return "warn", f"{what}: distill is only tested on Linux", UNTESTED[kind]
    if kind != "Linux" or processor not in ("x86_64", "AMD64"):
        return "warn", f"{what}: distill is only tested on Linux with x86-64", UNTRIED
    return "ok", what, ""


def machine() -> Iterator[Line]:
    """Versions, whether torchvision matches torch, accelerators, memory, disk and caches."""
    import torch

    from distill.machine.faults import first_line
    from distill.machine.hardware import best_precision, hardware, memory
    from distill.training.run_metadata import versions

    yield system()
    found = versions()
    yield "ok", ", ".join(f"{name} {version}" for name, version in found.items()), ""
    if found.get("lightning") in BAD_LIGHTNING:
        yield (
            "fail",
            f"lightning {found['lightning']} is a withdrawn release",
            "pip install -U lightning",
        )
    try:
        # The operator that a mismatched pair lacks.
        importlib.import_module("torchvision.ops").nms  # noqa: B018
        yield (
            "ok",
            f"torchvision {importlib.import_module('torchvision').__version__} fits torch",
            "",
        )
    except Exception as error:  # a broken pair fails in many ways
        what = f"torchvision does not fit torch ({first_line(error, 80)})"
        yield "fail", what, "install both from one index, without +cpu"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield "ok", f"GPU {i}: {card.name}, {card.total_memory / GB:.0f} GB", ""
    if not torch.cuda.is_available():
        yield (
            "warn",
            "no GPU: only small models train in reasonable time",
            "teacher=shapes is made for it",
        )
    yield "ok", f"{hardware()}, {memory() / GB:.0f} GB of memory", ""
    best = best_precision()
    yield "ok", f"trainer.precision=auto is {best.name} here: {best.reason}", ""
    free = shutil.disk_usage(".").free / GB
    yield (
        "ok" if free > 20 else "warn",
        f"{free:.0f} GB of disk free here",
        "checkpoints need room: set run_dir=",
    )
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    yield (
        "ok",
        f"model cache {cache}{' (offline)' if os.environ.get('HF_HUB_OFFLINE') == '1' else ''}",
        "",
    )


def fit(cfg: DictConfig) -> Iterator[Line]:
    """Whether the options fit together, and the least memory that training needs by strategy."""
    from distill.config.build import check
    from distill.config.counting import counts, pipeline_of

    try:
        check(cfg)
        counted, path, file = pipeline_of(cfg)
        found = counts(path, file) if path.is_dir() else {}
        yield "ok", "the options of this configuration fit each other", ""
    except Exception as error:
        if not is_mistake(error):
            raise
        yield "fail", sentence(error), ""
        return
    if cfg.data.get("_target_") == DRAWN:
        yield "warn", "no data given: renders of shapes are assumed", "data=images data.path=..."
    if not path.is_dir():
        what = f"teacher.{'config' if file else 'path'}={path} is no local pipeline folder"
        yield "warn", what, "sizes are counted only there"
        return
    yield from memory_lines(counted, path, found, (file or path).name)


def memory_lines(cfg: DictConfig, path: Path, counts: dict[str, int], named: str) -> Iterator[Line]:
    """The memory of teacher, student and sample pictures, compared with that of the machine.

    `counts` are the parameters of the teacher, which is `named` so.
    """
    import torch

    from distill.config import counting
    from distill.machine import budget, hardware

    part = "transformer" if "transformer" in counts else "unet"
    network, total = counts.get(part, 0), sum(counts.values())
    what = (
        f"teacher {named}: denoiser {network / 1e6:.1f} M parameters in safetensors, all"
        f" {total / 1e6:.1f} M"
    )
    yield "ok" if network else "fail", what, "point teacher.path at a pipeline"
    if not network:
        return
    dtype = cfg.teacher.get("dtype", "float32")
    width, count = getattr(torch, dtype).itemsize, processes(cfg)
    frozen = network * budget.frozen_bytes(
        counting.frozen_width(cfg, width), cfg.teacher.get("quantize") or None
    )
    on_device, on_host = counting.trained_bytes(cfg, path, part, network)
    shared = frozen + on_device
    encoders = counting.other_weights(cfg, path, counts, width)
    decoding = counting.sample_decoding(cfg, path, part)
    room = hardware.memory("cuda" if torch.cuda.is_available() else "cpu")
    step, reason = step_memory(cfg)
    on_top = ", and activations on top"
    if step is None:
        what = (
            f"denoiser, frozen {frozen / GB:.2f} GB; student with gradient, optimiser and average"
        )
        yield "ok", f"{what} {on_device / GB:.2f} GB, and {on_host / GB:.2f} GB on the CPU", ""
        yield "ok", f"beside the denoisers: {_listed(encoders | decoding, ' GB')}", ""
        yield "warn", f"activations are not counted: {reason}", "leave room for them"
    else:
        what = f"held between steps, in GB: {_listed(step.held)}; on the host {step.host / GB:.2f}"
        yield "ok", what, ""
        if decoding:
            yield "ok", f"beside steps: {_listed(decoding, ' GB')}", ""
        on_top = f", {step.within / GB:.2f} GB of them within a step"
    shards, rows = counting.can_shard(cfg), {"one process or trainer=ddp": 1}
    rows |= {f"trainer=fsdp2 on {count}": count} if shards else {}
    for name, share in rows.items():
        beside = sum(encoders.values()) + sum(decoding.values())
        taken = shared / share + beside + (step.within if step else 0)
        if step and share == 1:
            taken = max(step.peak, sum(step.held.values()) + sum(decoding.values()))
        level = "ok" if taken < 0.7 * room else "warn" if taken < room else "fail"
        what = f"{name}: {taken / GB:.2f} GB of {room / GB:.0f} GB a process{on_top}"
        yield level, what, SHARD if shards else SAVE
    if step:
        what = "these are counts: the allocator's fragments, workspaces and CUDA come on top"
        yield "ok", what, ""


def step_memory(cfg: DictConfig) -> tuple[Any, str]:
    """The memory of a training step of this configuration, or None and the reason for that."""
    from distill.config import build
    from distill.config.step_memory import of_step
    from distill.machine.hardware import device

    cfg = cfg.copy()
    kind = device(cfg.trainer.get("accelerator") or "auto").type
    said = StringIO()
    quiet = (redirect_stdout(said), redirect_stderr(said))
    with faults.quiet_logging(), quiet[0], quiet[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            build.settle_precision(cfg)
            return of_step(cfg, "cpu" if kind == "cpu" else "cuda"), ""
        except Exception as error:  # networks of many libraries, most of which read no meta tensors
            return None, shown(sentence(error), 200)


def leftovers(cfg: DictConfig) -> Iterator[Line]:
    """Shared memory for DataLoader workers, locked run folders, and orphaned processes."""
    yield from shared_memory(cfg)
    folders = {path.parent for path in Path("runs").glob(f"*/{locks.NAME}")}
    folders |= {Path(cfg[key]) for key in ("run_dir", "resume") if cfg.get(key)}
    for folder in sorted(folders):
        if holder := locks.holder_of(folder):
            remedy = f"if it has ended, remove {folder / locks.NAME}" if not holder.here else WAIT
            yield "warn", f"{folder} is written by {holder}", remedy
        elif (folder / locks.NAME).exists():
            yield "ok", f"{folder} was locked by a killed command; the next one can write there", ""
    orphans = orphaned()
    for pid in orphans:
        yield "warn", f"process {pid} still runs for a command that has ended", f"kill {pid}"
    if not orphans:
        yield "ok", "no process still runs for a command that has ended", ""


def shared_memory(cfg: DictConfig) -> Iterator[Line]:
    """Whether the batches that DataLoader workers read ahead fit into shared memory."""
    workers = cfg.data.get("num_workers") or 0
    if not faults.SHARED.is_dir():
        return
    free = shutil.disk_usage(faults.SHARED).free
    numbers = 3 * cfg.data.size**2 if cfg.data.get("size") else SAMPLE
    ahead = workers * PREFETCH * cfg.data.get("batch_size", 1) * numbers * 4 * processes(cfg)
    level = "ok" if ahead < free / 2 else "warn" if ahead < free else "fail"
    what = f"{faults.SHARED} has {free / 1e6:,.0f} MB free; {workers} loader workers a process"
    remedy = "data.num_workers=0, or more of it: docker run --shm-size=8g"
    yield level, f"{what} read ahead {ahead / 1e6:,.0f} MB", remedy


def orphaned() -> list[int]:
    """The ids of this user's rank processes whose launcher has ended."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if RANK_PROCESS not in process.cmdline():
                continue
            if process.username() != psutil.Process().username():
                continue
            parent = process.parent()
            if parent is None or not any("distill" in argument for argument in parent.cmdline()):
                found.append(process.pid)
    return sorted(found)


def _listed(sizes: Mapping[str, float], unit: str = "") -> str:
    """Names and gigabytes of what takes any."""
    return ", ".join(f"{name} {size / GB:.2f}{unit}" for name, size in sizes.items() if size)


@command("config", prepare=with_placeholder_data)
def main(cfg: DictConfig) -> int:
    validate.check_groups(cfg)
    validate.check_players(cfg.discriminator)
    validate.check_keys(cfg)
    check_counts(cfg, validate.COUNTS)
    lines = [*machine(), *leftovers(cfg), *fit(cfg)]
    for level, what, remedy in lines:
        print(shown(f"{level:5}{what}{f'  ->  {remedy}' if remedy and level != 'ok' else ''}"))
    return int(any(level == "fail" for level, *_ in lines))


if __name__ == "__main__":
    main()
