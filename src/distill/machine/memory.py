"""Peak memory of a computation: the most bytes of tensors that live at the same time.

On meta tensors, which have no values, counting takes no memory and little time: the largest models
can be counted on any machine.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import get_worker_info


@torch.no_grad()
def peak(work: Callable[[], Any]) -> int:
    """The peak bytes of tensors that `work` creates, without gradients.

    Earlier tensors and workspaces of kernels do not count. Attention counts as in fused kernels,
    without its matrix of weights.
    """
    counter = Counter()
    with _FusedAttention(), counter:
        work()
    return counter.most


class Counter(TorchDispatchMode):
    """Adds the bytes of each new storage, and subtracts them when it is freed.

    `now` are those of all that is counted, `most` the largest number of them so far. With `kind`
    only tensors on devices of this kind count.
    """

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self.now = self.most = 0
        self._kind = kind
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count these, which exist already, each storage once; returns the bytes that are new."""
        before = self.now
        for x in tensors:
            if _key(x) not in self._known:
                self._add(x)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        found = (made,) if isinstance(made, Tensor) else tree_leaves(made)
        new = [x for x in found if isinstance(x, Tensor) and _key(x) not in self._known]
        if not new:
            return made
        given: set[int] | None = None
        for x in new:
            if self._kind is not None and x.device.type != self._kind:
                continue
            if given is None:
                leaves = tree_leaves([args, kwargs])
                given = {_key(y) for y in leaves if isinstance(y, Tensor)}
            # A view shares the storage of its base.
            if _key(x) not in given and _key(x) not in self._known:
                self._add(x)
        return made

    def _add(self, x: Tensor) -> None:
        storage, key = x.untyped_storage(), _key(x)
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by an uninitialised tensor of the shape of its result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        query, _, value = [*args[:3], *(given[k] for k in ("query", "key", "value")[len(args) :])]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def to_shared_memory(tree: Any) -> Any:
    """Move the tensors to shared memory in a DataLoader worker, to pass them to the main process.

    The DataLoader would move them in a thread: if shared memory is full, the batch is lost there,
    and the main process waits for ever. Here it raises RuntimeError.
    """
    if get_worker_info() is None:
        return tree
    return tree_map_only(Tensor, lambda x: x.share_memory_(), tree)
