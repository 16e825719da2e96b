"""How FSDP2 shards a network: its units, their dtypes, and which are gathered early or kept.

A unit is gathered for its own part of a pass, and freed after it. The first pass shows in which
order the units run. From then on each gathers the next one while it computes (forward; in the
backward pass FSDP2 does so by itself), and the last one is not freed after a pass with gradient,
since the backward pass begins with it.

A feature pass ends after the last tapped block:

- `ends_at_last_tap` lets the network return there, so FSDP2's hook on the whole network runs, which
  frees what lies outside the units. The blocks before have been freed by their own hooks.
- The blocks after it are not gathered, but for one: where the first pass went further, the unit
  after the last tap has been gathered early. It waits for the next pass that needs it, and is
  dropped at the end of the next backward pass. It cannot be outdated, since feature networks are
  frozen.
- The backward pass begins in the last tapped block. It gathers that block again where the first
  pass went further, since then another unit is the last one.
- What the backward pass gathers early are the units that ran, in reverse. None is gathered in vain.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distill.teachers.network import ends_at_last_tap


def shard(
    module: nn.Module,
    mesh: Any,
    policy: MixedPrecisionPolicy,
    unsharded: Iterable[nn.Parameter] = (),
) -> None:
    """Shard `module` in place: unit by unit, then the rest. The parameters `unsharded` stay."""
    found = list(units(module))
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": set(unsharded)}
    # Resharded after every forward, the rest too, which FSDP2 would keep: otherwise the EMA's
    # parameters would not be those that run.
    for unit in (*found, module):
        fully_shard(unit, reshard_after_forward=True, **options)
    ends_at_last_tap(module)
    if found:
        _FirstPass(module, found)


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks, in the order of their registration.

    These are the innermost items of module lists that a diffusers network names as not to be
    split: a transformer's blocks, a UNet's transformer blocks and residual blocks. Of networks that
    name none, such as heads, they are the items of the outermost module lists and dictionaries.
    """
    names = getattr(module, "_no_split_modules", None)
    return _whole_blocks(module, set(names)) if names else listed_modules(module)


def _whole_blocks(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        inner = list(_whole_blocks(child, names))
        listed = isinstance(module, nn.ModuleList) and type(child).__name__ in names
        yield from [child] if listed and not inner else inner


def listed_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Items of the outermost lists and dictionaries of modules."""
    for child in module.children():
        listed = isinstance(child, nn.ModuleList | nn.ModuleDict)
        yield from child.children() if listed else listed_modules(child)


class _FirstPass:
    """Learns the order of the units in the first pass; then sets what is gathered early or kept."""

    def __init__(self, network: nn.Module, found: Iterable[nn.Module]):
        self._order: list[Any] = []
        self._handles = [unit.register_forward_pre_hook(self._note) for unit in found]
        network.register_forward_hook(self._after_pass)

    def _note(self, unit: nn.Module, _inputs: object) -> None:
        if unit not in self._order:
            self._order.append(unit)

    def _after_pass(self, network: nn.Module, _inputs: object, _output: object) -> None:
        if self._handles and self._order:
            self._settle(network)
        elif self._order and not torch.is_grad_enabled():
            # No backward pass will free it, and whoever sets weights sets the sharded ones.
            self._order[-1].reshard()

    def _settle(self, network: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for unit, following in pairwise([network, *self._order]):
            unit.set_modules_to_forward_prefetch([following])
        self._order[-1].set_reshard_after_forward(False, recurse=False)
