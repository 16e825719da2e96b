"""`python -m distill.doctor teacher=sd3`: whether this machine can run that configuration, line by line.

Every line says ok, warn or fail, and what to do about it. The exit code is 1 if any line says fail.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hydra

from distill._conf import CONF_DIR
from distill.errors import said_plainly

if TYPE_CHECKING:
    from omegaconf import DictConfig

GB = 1e9
BAD_LIGHTNING = ("2.6.2", "2.6.3")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Line(NamedTuple):
    level: str
    what: str
    remedy: str = ""


def software() -> Iterator[Line]:
    """Versions, and whether torch and torchvision belong together."""
    from distill.record import versions

    found = versions()
    yield Line("ok", ", ".join(f"{name} {version}" for name, version in found.items()))
    if found.get("lightning") in BAD_LIGHTNING:
        yield Line("fail", f"lightning {found['lightning']} is a withdrawn release", "pip install -U lightning")
    try:
        importlib.import_module("torchvision.ops").nms  # noqa: B018  # the operator that a mismatched pair lacks
        yield Line("ok", f"torchvision {importlib.import_module('torchvision').__version__} fits torch")
    except Exception as error:  # a broken pair fails in many ways
        what = str(error).splitlines()[0][:80]
        yield Line("fail", f"torchvision does not fit torch ({what})", "install both from one index, without +cpu")


def hardware() -> Iterator[Line]:
    """Accelerators, memory, disk and caches."""
    import torch

    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield Line("ok", f"GPU {i}: {card.name}, {card.total_memory / GB:.0f} GB")
    if not torch.cuda.is_available():
        yield Line("warn", "no GPU: only small models train in reasonable time", "teacher=shapes is made for it")
    yield Line("ok", f"{len(os.sched_getaffinity(0))} CPU cores, {_memory() / GB:.0f} GB of memory")
    free = shutil.disk_usage(".").free / GB
    yield Line("ok" if free > 20 else "warn", f"{free:.0f} GB of disk free here", "checkpoints need room: set run_dir=")
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    yield Line(
        "ok", f"model cache {cache}{' (offline)' if offline else ''}{'' if cache.exists() else ', empty so far'}"
    )


def fit(cfg: DictConfig) -> Iterator[Line]:
    """Parameters of the teacher, and the memory that training needs at least, by strategy."""
    from distill.compose import processes, shipped

    path = Path(shipped(str(cfg.teacher.path)))
    if not path.is_dir():
        yield Line("warn", f"teacher.path={path} is no local folder", "its size is known only once it is downloaded")
        return
    sizes = {part.name: parameters(part) for part in sorted(path.iterdir()) if part.is_dir()}
    network = sizes.get("transformer", 0) or sizes.get("unet", 0)
    if not network:
        yield Line("fail", f"teacher.path={path} has no denoiser in safetensors", "point teacher.path at a pipeline")
        return
    yield Line(
        "ok", f"teacher {path.name}: denoiser {network / 1e6:.1f} M parameters, all {sum(sizes.values()) / 1e6:.1f} M"
    )
    frozen = BYTES[cfg.teacher.get("dtype", "float32")]
    others = (sum(sizes.values()) - network) * frozen
    count = processes(cfg)
    shared = network * (frozen + 4 * 5)  # teacher; the student's weights, gradient, two moments and average in float32
    room = _card() or _memory()
    for name, need in {"one process or trainer=ddp": shared, f"trainer=fsdp2 on {count}": shared / count}.items():
        level = "ok" if need + others < 0.7 * room else "warn" if need + others < room else "fail"
        what = f"{name}: {(need + others) / GB:.2f} GB of {room / GB:.0f} GB a process, and activations on top"
        yield Line(level, what, "more devices with trainer=fsdp2, or teacher.dtype=bfloat16")


def parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, from their headers alone; of variants, the first."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    plain = [f for f in files if not any(v in f.name for v in (".fp16.", ".bf16.", ".non_ema."))] or files
    total = 0
    for file in plain:
        with safe_open(file, "pt") as kept:
            for key in kept.keys():  # noqa: SIM118  # not a dict
                size = 1
                for side in kept.get_slice(key).get_shape():
                    size *= side
                total += size
    return total


def _memory() -> float:
    """Memory that this process may use, in bytes: the machine's, or the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _card() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def examine(cfg: DictConfig) -> int:
    """Print all lines; 1 if any says fail."""
    from distill.build import check

    lines = [*software(), *hardware(), *fit(cfg)]
    try:
        check(cfg)
        lines.append(Line("ok", "the options of this configuration fit each other"))
    except ValueError as error:
        lines.append(Line("fail", str(error)))
    for level, what, remedy in lines:
        print(f"{level:5}{what}{f'  ->  {remedy}' if remedy and level != 'ok' else ''}")
    return int(any(line.level == "fail" for line in lines))


@hydra.main(config_path=CONF_DIR, config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with said_plainly():
        if code := examine(cfg):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
