"""Moves between the host and a device that do not wait for the device's queue of work.

A read (`.item()`, `bool`, `.tolist()`, a blocking copy) returns when all queued work is done, and
the device then idles until new work is queued. So values that Python decides by are kept on the
host too, and results are read one iteration late.

    t = send(t, device)        # a copy is queued; host_values(t) is the original
    late = Later(values)       # a copy is queued
    ...                        # the work of the next iteration is queued
    late.read()                # waits for what was queued before the copy, not for the rest
"""

from collections.abc import Sequence

import torch
from torch import Tensor

HOST = "_host_values"  # attribute of a sent tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; x itself if it is there. `host_values` of the result is x."""
    if x.device == device or x.device.type != "cpu":
        return x.to(device)
    pinned = x.pin_memory() if device.type == "cuda" else x  # other copies would wait
    sent = pinned.to(device, non_blocking=True)
    setattr(sent, HOST, x)
    return sent


def filled(count: int, value: float, device: torch.device) -> Tensor:
    """`value`, `count` times [count], on `device`, made there; its host values are known."""
    made = torch.full((count,), value, device=device)
    if device.type != "cpu":
        setattr(made, HOST, torch.full((count,), value))
    return made


def on_host(x: Tensor) -> bool:
    """Whether Python may read the values of x at once: on the CPU, unless an exporter traces."""
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


def host_values(x: Tensor) -> Tensor | None:
    """The values of x on the host, if they are known without a read; else None."""
    return x if on_host(x) else getattr(x, HOST, None)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The concatenation of tensors; it has host values if all parts have them."""
    joined, known = torch.cat(list(parts)), [host_values(part) for part in parts]
    if joined.device.type != "cpu" and all(part is not None for part in known):
        setattr(joined, HOST, torch.cat([part for part in known if part is not None]))
    return joined


class Later:
    """The values of a flat float tensor, to be read when newer work has been queued."""

    def __init__(self, values: Tensor):
        self._copy = values.detach().to("cpu", non_blocking=True)
        self._copied: torch.Event | None = None
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and values.device.type == accelerator.type:
            self._copied = torch.Event(values.device.type)
            self._copied.record()

    def read(self) -> list[float]:
        """The values. It waits until they have been computed."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()
