"""A device that is not there, to count what would wait for a real one.

    with pretended.device() as seen:
        ...                       # tensors compute on the CPU, and say that they are on a GPU
    seen.reads, seen.uploads      # where values were read, and where a copy to the device blocks

Within, every tensor claims to be on `GPU`, with two exceptions: those that Python has made without
naming a device or drawn from a generator of the CPU, and what was computed of these alone. Values
of the others are on the device; to read them is to wait for all of its queued work. Real numbers
are computed, so what is trained here can be compared with what is trained on the CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
HOST = "_pretended_host"  # attribute of a tensor on the host
READS = {
    *("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"),
    *("is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
    *("equal", "allclose", "__contains__", "__format__", "__repr__"),
}
PLAIN = torch.Generator


class DeviceGenerator(torch.Generator):
    """A generator that says it is of the device."""

    device = GPU


def make_generator(device: Any = "cpu") -> torch.Generator:
    return DeviceGenerator() if torch.device(device).type == "cuda" else PLAIN()


class Pretended(TorchFunctionMode):
    """Counts by place: `reads` of values, and `uploads` whose copy to the device blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return torch.device("cpu") if hasattr(args[0], HOST) else GPU
        if func == Tensor.is_cuda.__get__:
            return not hasattr(args[0], HOST)
        if name == "pin_memory":
            return args[0]
        if name in ("to", "cpu", "cuda"):
            return self._moved(func, name, args, kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = all(hasattr(x, HOST) for x in inputs)
        if not on_host and (name in READS or _is_dynamic(name, args, kwargs)):
            self.reads[f"{name} {_place()}"] += 1
        on_host = self._of_call(func, name, args, kwargs, inputs, on_host)
        found = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: _marked(x, on_host), found)

    def _of_call(
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: Any, on_host: bool
    ) -> bool:
        """Whether the result is on the host; `kwargs` then name the device that there is."""
        own = "new_" in name or name.endswith("_like")  # on the device of their input
        if kwargs.get("device") is not None:
            on_host = torch.device(kwargs["device"]).type == "cpu"
            kwargs["device"] = "cpu"
        elif not inputs and isinstance(kwargs.get("generator"), DeviceGenerator):
            raise RuntimeError(f"{name} draws on the host from a generator of the device")
        if name in ("tensor", "as_tensor", "new_tensor") and not on_host:
            given = args[1] if own else args[0]
            if not isinstance(given, Tensor) or hasattr(given, HOST):
                self.uploads[f"{name} {_place()}"] += 1
        return on_host

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result of `x.to(...)`: a copy where the device changes, as on a real one."""
        x = args[0]
        before = not hasattr(x, HOST)  # on the device
        after = {"cpu": False, "cuda": True}.get(name, before)
        rest = []
        for value in args[1:]:
            if isinstance(value, Tensor):
                after, value = not hasattr(value, HOST), value.dtype
            if isinstance(value, str | torch.device):
                after = torch.device(value).type != "cpu"
            else:
                rest.append(value)
        if kwargs.get("device") is not None:
            after = torch.device(kwargs.pop("device")).type != "cpu"
        kwargs.pop("device", None)
        if before != after and not kwargs.get("non_blocking") and "clip_grad.py" not in _caller():
            (self.reads if before else self.uploads)[f"{name} {_place()}"] += 1
        found = x if name != "to" else func(x, *rest, **kwargs) if rest or kwargs else x
        found = found.clone() if found is x and before != after else found
        return _marked(found, not after)


def _marked(x: Tensor, on_host: bool) -> Tensor:
    if on_host:
        setattr(x, HOST, True)
    elif hasattr(x, HOST):
        delattr(x, HOST)
    return x


def _is_dynamic(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the shape of the result depends on values."""
    if name in ("__getitem__", "__setitem__"):
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1]))
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        return len(args) > 1 and isinstance(args[1], Tensor)
    # its check of the odds reads them
    return name == "multinomial" and not (kwargs.get("replacement") and args[1] != 1)


def _caller() -> str:
    return _frames()[0]


def _place() -> str:
    """The innermost line of distill that is running, or else of another library."""
    frames = _frames()
    return next((f for f in frames if "/distill/" in f), frames[0])


def _frames() -> list[str]:
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return found


@contextmanager
def device(own_generators: bool = True) -> Iterator[Pretended]:
    """Within this context tensors are on the device that is not there. Without generators of its
    own the numbers drawn are those of a training on the CPU.
    """
    make = make_generator if own_generators else lambda device="cpu": PLAIN()
    with mock.patch("torch.Generator", make), Pretended() as seen:
        yield seen


class OnDevice(L.Callback):
    """A training on the device: `seen` has what each iteration reads. The first of the callbacks.

    `Last`, the last of them, ends what this one begins.
    """

    def __init__(self, own_generators: bool = True) -> None:
        self.own_generators = own_generators
        self.seen: list[Pretended] = []
        self.last = Last(self)
        self.stack = ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module._device = GPU
        _keep_on_host(pl_module.teacher.process)
        self.seen.append(self.stack.enter_context(device(self.own_generators)))

    def end(self, pl_module: Any) -> None:
        self.stack.close()
        pl_module._device = torch.device("cpu")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end(pl_module)


def _keep_on_host(process: Any) -> None:
    """Mark the table of alpha that a process has on the CPU, which was made outside."""
    tables, cpu = getattr(process, "_on_device", None), torch.device("cpu")
    if tables is not None:
        tables[cpu] = process._table(cpu).clone()
        setattr(tables[cpu], HOST, True)


class Last(L.Callback):
    def __init__(self, first: OnDevice) -> None:
        self.first = first

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.first.end(pl_module)


def line(place: str) -> str:
    """The source text of a place that `reads` or `uploads` name, with the lines around it."""
    path, _, number = place.partition(" ")[2].rpartition(":")
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[max(0, int(number) - 4) : int(number) + 1])
