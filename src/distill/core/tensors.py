"""Tensors of a network: marks of their values, and what several processes hold parts of."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

CUT = "cut along dimension 0"  # key under which a process keeps its part of a tensor


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits of names, shapes and an even choice of at most 64 values of every tensor,
    on any device.
    """
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        digest.update(f"{name}{list(x.shape)}".encode())
        some = x.flatten()[:: -(-x.numel() // 64) or 1].cpu()  # where there is float64
        digest.update(str(some.double().tolist()).encode())
    return digest.hexdigest()[:12]


def full_tensor(x: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which must all call this; any other
    stays as it is.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(value: Tensor, target: Tensor) -> Tensor:
    """A tensor as `target` keeps it: on its device, and cut among the processes or not."""
    value = value.to(target.device)
    if isinstance(value, DTensor) or not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements)


def gather(tree: Any, *, keep: bool) -> Any:
    """Every tensor whole and on the CPU; all processes must call this, those with `keep` get the
    result.
    """

    def take(x: Tensor) -> Tensor | None:
        x = full_tensor(x)  # one after the other: together they may not fit on the device
        return x.cpu() if keep else None

    return tree_map_only(Tensor, take, tree)


def local_shards(tree: Any) -> Any:
    """This process's parts of all cut tensors, and all others, on the CPU."""
    return tree_map_only(
        Tensor, lambda x: {CUT: x.to_local().cpu()} if isinstance(x, DTensor) else x.cpu(), tree
    )


def unsharded(parts: list[Any]) -> Any:
    """The inverse of `local_shards`, from the parts of all processes in the order of their
    ranks.
    """
    first = parts[0]
    if isinstance(first, dict) and CUT in first:
        return torch.cat([part[CUT] for part in parts])
    if isinstance(first, dict):
        return {key: unsharded([part[key] for part in parts]) for key in first}
    return (
        [unsharded(list(of)) for of in zip(*parts, strict=True)]
        if isinstance(first, list)
        else first
    )
