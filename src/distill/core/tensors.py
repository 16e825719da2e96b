"""Fingerprints of a network's tensors, and tensors that are sharded over ranks."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

SHARD = "cut along dimension 0"  # key of a rank's shard in a checkpoint


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits that identify a network, on any device.

    They hash names, shapes and up to 64 evenly chosen values of every tensor.
    """
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        digest.update(f"{name}{list(x.shape)}".encode())
        chosen = x.flatten()[:: -(-x.numel() // 64) or 1].cpu()  # some devices have no float64
        digest.update(str(chosen.double().tolist()).encode())
    return digest.hexdigest()[:12]


def strips(pixels: Tensor, most: int = 8) -> Tensor:
    """Videos [B, 3, F, H, W] -> pictures [B, 3, H, n W] of n frames side by side; pictures stay.

    n is at most `most` (ours), evenly spaced from the first frame to the last.
    """
    if pixels.ndim == 4:
        return pixels
    frames, n = pixels.shape[2], min(most, pixels.shape[2])
    chosen = [round(i * (frames - 1) / max(1, n - 1)) for i in range(n)]
    return torch.cat([pixels[:, :, i] for i in chosen], dim=-1)


def full_tensor(x: Tensor) -> Tensor:
    """The full tensor of a sharded one; other tensors are returned as they are. All ranks must call
    this.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device of `target`, and sharded as `target` is."""
    value = value.to(target.device)
    if isinstance(value, DTensor) or not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements)


def gather(tree: Any, *, keep: bool) -> Any:
    """Every tensor in full and on the CPU. All ranks must call this; ranks with `keep` get the
    result.
    """

    def take(x: Tensor) -> Tensor | None:
        x = full_tensor(x)  # one at a time: all of them may not fit on the device
        return x.cpu() if keep else None

    return tree_map_only(Tensor, take, tree)


def local_shards(tree: Any) -> Any:
    """This rank's shards of sharded tensors, and all other tensors, on the CPU."""
    return tree_map_only(
        Tensor, lambda x: {SHARD: x.to_local().cpu()} if isinstance(x, DTensor) else x.cpu(), tree
    )


def unsharded(shards: list[Any]) -> Any:
    """Inverse of `local_shards`, from the shards of all ranks in rank order."""
    first = shards[0]
    if isinstance(first, dict) and SHARD in first:
        return torch.cat([shard[SHARD] for shard in shards])
    if isinstance(first, dict):
        return {key: unsharded([shard[key] for shard in shards]) for key in first}
    return (
        [unsharded(list(items)) for items in zip(*shards, strict=True)]
        if isinstance(first, list)
        else first
    )
