"""What this machine computes with: its device, its cores, and the precision in which it is fast.

Torch is imported where it is used: commands ask for the cores before they need it.
"""

import difflib
import logging
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
PRECISIONS = ("auto", "bf16-mixed", "32-true")  # what keys named `precision` may say,
SHORT = {"32": "32-true", "bf16": "bf16-mixed"}  # and what Lightning takes for the same
SLOW = 2.0  # a bfloat16 product takes this many times as long as a float32 one: it is emulated
SIDE = 192  # of the matrices that are multiplied to find out: 15 ms where bfloat16 is emulated
AMPERE = (8, 0)  # the first CUDA capability with bfloat16
X86_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Precision:
    """A precision as Lightning names it, and in a sentence why it was chosen."""

    name: str
    reason: str


def cores() -> int:
    """CPU cores that this process may use: of all, where the system does not say, as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device(accelerator: str = "auto") -> "torch.device":
    """Where this process computes: its own GPU, Apple's, or the CPU.

    `accelerator` as Lightning names it.
    """
    import torch

    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local % torch.cuda.device_count())
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def memory(kind: str = "cpu") -> int:
    """Bytes that this process may use: the GPU's, or the machine's or its container's limit."""
    import psutil
    import torch

    if kind == "cuda":
        return int(torch.cuda.get_device_properties(device()).total_memory)
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def memory_left(*models: Any) -> float:
    """Bytes that the weights of these modules leave on the device of the first, but for a tenth of
    it.
    """
    where = next(p.device for p in models[0].parameters() if not p.is_meta)
    parameters = {id(p): p for model in models for p in model.parameters() if not p.is_meta}
    taken = sum(p.numel() * p.element_size() for p in parameters.values())
    return 0.9 * memory(where.type) - taken


def hardware() -> str:
    """In plain words: 'one NVIDIA H200', '2 CPU cores (AMD EPYC, AVX512, avx512_bf16)'."""
    import torch

    if count := torch.cuda.device_count():
        return f"{'one' if count == 1 else count} {torch.cuda.get_device_name(0)}"
    return f"{cores()} CPU cores ({cpu()})"


def cpu() -> str:
    """The CPU's name and what it can: 'AMD EPYC, AVX512, avx512_bf16'."""
    return f"{cpu_model()}, {capability()}"


@cache
def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def capability() -> str:
    """The widest instructions that torch uses, and those for bfloat16: 'AVX512, avx512_bf16',
    'AVX2'.

    ATEN_CPU_CAPABILITY, which makes torch use fewer, changes the first and not the second.
    """
    import torch

    return ", ".join([torch.backends.cpu.get_cpu_capability(), *bf16_flags()])


@cache
def bf16_flags() -> tuple[str, ...]:
    """The instructions for bfloat16 that this CPU says it has."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # of x86, of Arm
            known = (*X86_FLAGS, "bf16")
            return tuple(flag for flag in known if flag in value.split())
    if platform.system() == "Darwin" and _sysctl("hw.optional.arm.FEAT_BF16") == "1":
        return ("bf16",)
    return tuple(flag for flag in X86_FLAGS if _torch_capabilities().get(flag))


def _cpuinfo() -> list[str]:
    """Lines of Linux's own account of the CPU; none elsewhere."""
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
    """What torch's own detection says, where this torch has one and the system has no file."""
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)
    return dict(found())


@cache
def bf16_cost(kind: str = "cpu") -> float:
    """How many times as long as in float32 a matrix product takes in bfloat16, on this kind of
    device.

    A few milliseconds, on one thread, the best of several tries: other work must not count.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    try:
        return _product_seconds(torch.bfloat16, kind) / _product_seconds(torch.float32, kind)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: "torch.dtype", kind: str) -> float:
    import torch

    x = torch.ones(SIDE, SIDE, dtype=dtype, device=kind)
    tries = []
    for _ in range(6):
        began = time.perf_counter()
        (x @ x).sum().item()
        tries.append(time.perf_counter() - began)
    return min(tries[1:])  # the first one prepares the kernel


def best_precision(accelerator: str = "auto") -> Precision:
    """bf16-mixed where the hardware has bfloat16 and it is fast, 32-true elsewhere."""
    import torch

    where = device(accelerator)
    if where.type == "cuda":
        version, name = torch.cuda.get_device_capability(where), torch.cuda.get_device_name(where)
        if torch.version.hip or version >= AMPERE:
            return Precision("bf16-mixed", f"{name} has bfloat16")
        said = f"{name} has compute capability {version[0]}.{version[1]}, and bfloat16 needs 8.0"
        return Precision("32-true", said)
    flags = ("mps",) if where.type == "mps" else bf16_flags()
    name = cpu_model()
    if not flags:
        return Precision("32-true", f"{name} has no instructions for bfloat16")
    try:
        cost = bf16_cost(where.type)
    except (RuntimeError, TypeError) as error:  # Apple's first GPUs
        return Precision("32-true", f"{name} has no bfloat16 ({error})")
    said = f"a product in bfloat16 takes {cost:.2g} times as long as in float32"
    if cost > SLOW:
        return Precision("32-true", f"{name}: {said}")
    return Precision("bf16-mixed", f"{name} has {' and '.join(flags)}, {said}")


def precision(asked: str, accelerator: str = "auto", key: str = "precision") -> Precision:
    """`asked` itself, or what is best here for `auto`. Warns of bf16-mixed where it is emulated.

    Raises ValueError, with the setting's `key`, for a precision that this code does not train in.
    """
    check_precision(asked, key)
    asked = SHORT.get(str(asked), asked)
    if asked == "auto":
        return best_precision(accelerator)
    if asked == "bf16-mixed" and device(accelerator).type == "cpu":
        cost = bf16_cost()
        if cost > SLOW:
            said = f"a product in bfloat16 takes {cost:.0f} times as long as in float32"
            log.warning("%s=%s: %s emulates it, and %s", key, asked, cpu_model(), said)
            log.warning("%s=auto or 32-true is faster here", key)
    return Precision(asked, f"{key} says so")


def check_precision(asked: object, key: str = "precision") -> None:
    """Raise ValueError for what is no precision of ours. Needs no torch."""
    if str(asked) not in (*PRECISIONS, *SHORT):
        # The gradients of 16-mixed are scaled, and would be clipped as if they were not.
        why = "is not for two players" if str(asked).startswith("16") else "is not supported"
        close = difflib.get_close_matches(str(asked), PRECISIONS, n=1, cutoff=0.8)
        meant = f" (did you mean {close[0]}?)" if close and why == "is not supported" else ""
        raise ValueError(f"{key}={asked}: {why}{meant}; use auto, bf16-mixed or 32-true")


def autocast(name: str, kind: str) -> AbstractContextManager[Any]:
    """Within: products on a device of this kind are made in the precision of this name."""
    import torch

    return torch.autocast(kind, torch.bfloat16) if name == "bf16-mixed" else nullcontext()
