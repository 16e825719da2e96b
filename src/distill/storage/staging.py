"""A copy of a state in memory, from which it can be written while training goes on.

staging = Staging()
copied = staging.copy(state)     # the next copy uses the same memory
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from distill.machine.hardware import memory_available

# Ours: the share of the available memory that copies may take. The rest is for training, and for
# the system's cache of the file that is being written.
SHARE = 0.5


class Staging:
    """Memory on the CPU for the tensors of a state, allocated once for all copies.

    Touching new memory takes several times as long as copying into memory that was used before.
    """

    def __init__(self) -> None:
        self.refused = 0  # bytes of the last state that did not fit
        self._buffers: list[Tensor] = []  # uint8 [bytes] of each storage, in the state's order

    def copy(self, state: Any) -> Any | None:
        """`state` with all tensors copied to the CPU; None if it cannot be copied.

        That is so if the copies would take more than SHARE of the available memory, and for
        tensors without plain values, such as sharded ones. The result is valid until the next
        call. Tensors that share memory also share it in the copy, so both give the same file.
        """
        tensors = {id(x): x for x in tree_leaves(state) if isinstance(x, Tensor)}
        if any(type(x) not in (Tensor, Parameter) or x.is_meta for x in tensors.values()):
            return None
        storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors.values()}
        if not self._allocate([storage.nbytes() for storage in storages.values()]):
            return None
        buffers = dict(zip(storages, self._buffers, strict=True))
        for key, storage in storages.items():
            values = torch.empty(0, dtype=torch.uint8, device=storage.device)
            buffers[key].copy_(values.set_(storage))
        # deepcopy takes what this says for a tensor, and copies everything else.
        copies = {key: _view(buffers[x.untyped_storage()._cdata], x) for key, x in tensors.items()}
        return copy.deepcopy(state, copies)

    def clear(self) -> None:
        """Free the memory."""
        self._buffers = []

    def _allocate(self, sizes: list[int]) -> bool:
        """Have a buffer of each size; whether they fit."""
        if sizes == [len(buffer) for buffer in self._buffers]:
            return True
        self.clear()
        if sum(sizes) > SHARE * memory_available():
            self.refused = sum(sizes)
            return False
        self._buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        return True


def _view(buffer: Tensor, like: Tensor) -> Tensor:
    """The tensor in `buffer`, a copy of the storage of `like`, with dtype and shape of `like`."""
    place = like.storage_offset(), like.size(), like.stride()
    return torch.empty(0, dtype=like.dtype).set_(buffer.untyped_storage(), *place)
