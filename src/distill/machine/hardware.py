"""The hardware of this machine: device, cores, memory, and the precision in which it is fast.

Torch is imported inside functions, since commands need the number of cores before torch.
"""

import difflib
import itertools
import logging
import math
import os
import platform
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
PRECISIONS = ("auto", "bf16-mixed", "32-true")  # values of keys named `precision`
SHORT = {"32": "32-true", "bf16": "bf16-mixed"}  # Lightning's short names
SLOW = 2.0  # ours: above this ratio of bfloat16 to float32 time, bfloat16 is emulated
SIDE = 192  # ours: of the matrices in that measurement, 15 ms if bfloat16 is emulated
TRIES = 5  # ours: of each product at least
PATIENCE = 0.5  # ours: seconds of trying before bfloat16 is called slow
AMPERE = (8, 0)  # the first CUDA capability with bfloat16
CONTAINER = Path("/sys/fs/cgroup")  # of this process, on Linux
X86_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Precision:
    """A precision by its name in Lightning, and the reason for it as a sentence."""

    name: str
    reason: str


def cores() -> int:
    """The CPU cores that this process may use; all cores if the system does not limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device(accelerator: str = "auto") -> "torch.device":
    """The device of this process: the GPU of its local rank, Apple's GPU, or the CPU.

    `accelerator` is a name of Lightning.
    """
    import torch

    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local % torch.cuda.device_count())
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def memory(kind: str = "cpu") -> int:
    """Bytes of memory: of the GPU, or of the machine within the limit of its container."""
    import psutil
    import torch

    if kind == "cuda":
        return int(torch.cuda.get_device_properties(device()).total_memory)
    total, limit = psutil.virtual_memory().total, _container_limit()
    return total if limit is None else min(total, limit)


def memory_available() -> int:
    """Bytes of the machine's memory that processes can still take, within the limit of its
    container.
    """
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit = _container_limit()
        if limit is None:
            return available
        used = int((CONTAINER / "memory.current").read_text(encoding="utf-8"))
        lines = (CONTAINER / "memory.stat").read_text(encoding="utf-8").splitlines()
        counts = {name: int(value) for name, value in map(str.split, lines)}
    except (OSError, ValueError):
        return available
    # The system gives up its cache of files when processes need memory.
    return min(available, limit - used + counts.get("inactive_file", 0))


def room(kind: str) -> int:
    """Bytes that work on this kind of device may take, at most: on the CPU what is free now."""
    return memory_available() if kind == "cpu" else memory(kind)


def _container_limit() -> int | None:
    """Bytes that this container may take; None on another system, or without a limit ("max")."""
    limit = CONTAINER / "memory.max"
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return int(text) if text.isdigit() else None


def memory_left(*models: Any) -> float:
    """0.9 of the memory in bytes of the first module's device, minus the weights of all modules."""
    where = next(p.device for p in models[0].parameters() if not p.is_meta)
    parameters = {id(p): p for model in models for p in model.parameters() if not p.is_meta}
    taken = sum(p.numel() * p.element_size() for p in parameters.values())
    return 0.9 * memory(where.type) - taken


def hardware() -> str:
    """The hardware as text: 'one NVIDIA H200', '2 CPU cores (AMD EPYC, AVX512, avx512_bf16)'."""
    import torch

    if count := torch.cuda.device_count():
        return f"{'one' if count == 1 else count} {torch.cuda.get_device_name(0)}"
    return f"{cores()} CPU cores ({cpu()})"


def cpu() -> str:
    """Name and instructions of the CPU: 'AMD EPYC, AVX512, avx512_bf16'."""
    return f"{cpu_model()}, {capability()}"


@cache
def cpu_model() -> str:
    """The name of the CPU from the system."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def capability() -> str:
    """The vector instructions that torch uses, and those for bfloat16: 'AVX512, avx512_bf16'.

    ATEN_CPU_CAPABILITY restricts the former, not the latter.
    """
    import torch

    return ", ".join([torch.backends.cpu.get_cpu_capability(), *bf16_flags()])


@cache
def bf16_flags() -> tuple[str, ...]:
    """The bfloat16 instructions of this CPU."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # of x86, of Arm
            known = (*X86_FLAGS, "bf16")
            return tuple(flag for flag in known if flag in value.split())
    if platform.system() == "Darwin" and _sysctl("hw.optional.arm.FEAT_BF16") == "1":
        return ("bf16",)
    return tuple(flag for flag in X86_FLAGS if _torch_capabilities().get(flag))


def _cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo; [] on other systems than Linux."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _sysctl(name: str) -> str:
    command = ["sysctl", "-n", name]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
        return done.stdout.strip()
    return ""


def _torch_capabilities() -> dict[str, Any]:
    """CPU capabilities by torch, if this version detects them; {} otherwise."""
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)
    return dict(found())


@cache
def bf16_cost(kind: str = "cpu") -> float:
    """Time of a matrix product in bfloat16 divided by that in float32, on this kind of device.

    Takes milliseconds where bfloat16 is fast, up to `PATIENCE` seconds where it is not. The same
    command must get the same precision on a busy machine: the two products take turns, each is the
    best of its tries, and a slow bfloat16 is measured for longer before it is believed.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    try:
        dtypes = (torch.bfloat16, torch.float32)
        products = [torch.ones(SIDE, SIDE, dtype=dtype, device=kind) for dtype in dtypes]
        for x in products:
            _product_seconds(x)  # the first one prepares the kernel
        best, began = [math.inf, math.inf], time.perf_counter()
        for tries in itertools.count(1):
            best = [min(b, _product_seconds(x)) for b, x in zip(best, products, strict=True)]
            half, whole = best
            fast = tries >= TRIES and half <= SLOW * whole
            if fast or (tries > 1 and time.perf_counter() - began > PATIENCE):
                break
        return half / whole
    finally:
        torch.set_num_threads(threads)


def _product_seconds(x: "torch.Tensor") -> float:
    start = time.perf_counter()
    (x @ x).sum().item()
    return time.perf_counter() - start


def best_precision(accelerator: str = "auto") -> Precision:
    """bf16-mixed if the hardware has fast bfloat16, else 32-true."""
    import torch

    where = device(accelerator)
    if where.type == "cuda":
        version, name = torch.cuda.get_device_capability(where), torch.cuda.get_device_name(where)
        if torch.version.hip or version >= AMPERE:
            return Precision("bf16-mixed", f"{name} has bfloat16")
        reason = f"{name} has compute capability {version[0]}.{version[1]}, and bfloat16 needs 8.0"
        return Precision("32-true", reason)
    flags = ("mps",) if where.type == "mps" else bf16_flags()
    name = cpu_model()
    if not flags:
        return Precision("32-true", f"{name} has no instructions for bfloat16")
    try:
        cost = bf16_cost(where.type)
    except (RuntimeError, TypeError) as error:  # Apple's first GPUs
        return Precision("32-true", f"{name} has no bfloat16 ({error})")
    ratio = f"a product in bfloat16 takes {cost:.2g} times as long as in float32"
    if cost > SLOW:
        return Precision("32-true", f"{name}: {ratio}")
    return Precision("bf16-mixed", f"{name} has {' and '.join(flags)}, {ratio}")


def precision(asked: str, accelerator: str = "auto", key: str = "precision") -> Precision:
    """The requested precision, or the best of this machine for `auto`.

    Warns if bf16-mixed is emulated. Raises ValueError, naming `key`, for an unsupported precision.
    """
    check_precision(asked, key)
    asked = SHORT.get(str(asked), asked)
    if asked == "auto":
        return best_precision(accelerator)
    if asked == "bf16-mixed" and device(accelerator).type == "cpu":
        cost = bf16_cost()
        if cost > SLOW:
            ratio = f"a product in bfloat16 takes {cost:.0f} times as long as in float32"
            log.warning("%s=%s: %s emulates it, and %s", key, asked, cpu_model(), ratio)
            log.warning("%s=auto or 32-true is faster here", key)
    return Precision(asked, f"{key} says so")


def check_precision(asked: object, key: str = "precision") -> None:
    """Raise ValueError for an unsupported precision. Does not import torch."""
    if str(asked) not in (*PRECISIONS, *SHORT):
        # 16-mixed scales the gradients, and they would be clipped without unscaling.
        why = "is not supported"
        if str(asked).startswith("16"):
            why = "does not work with two optimisers"
        close = difflib.get_close_matches(str(asked), PRECISIONS, n=1, cutoff=0.8)
        meant = f" (did you mean {close[0]}?)" if close and why == "is not supported" else ""
        raise ValueError(f"{key}={asked}: {why}{meant}; use auto, bf16-mixed or 32-true")


def autocast(name: str, kind: str) -> AbstractContextManager[Any]:
    """Autocast to the precision of this name, on a device of this kind."""
    import torch

    return torch.autocast(kind, torch.bfloat16) if name == "bf16-mixed" else nullcontext()
