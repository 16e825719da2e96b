"""Faster passes of a run: compiled blocks, faster float32 products, channels-last UNets.

Weights, their names and checkpoints stay as they are: a run may be resumed with other values.
"""

import logging
from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from distill.machine.faults import first_line

log = logging.getLogger("distill.training")
KEYS = ("compile", "matmul", "channels_last")  # of the node `trainer`
# A block is compiled for every shape of its weights, with and without gradients, adapters and
# checkpointing. Above this limit, which is 8 in torch, it would run as it is.
VARIANTS = 256
# Blocks of diffusers' models beside those that their classes name in `_repeated_blocks`.
BLOCKS = ("ResnetBlock2D",)


class Speed(L.Callback):
    """Prepares the networks of a method when training starts, and undoes that at its end.

    Args:
        compile: `blocks` compiles the repeated blocks of student and teacher, and the heads unless
            their second derivative is needed, by torch.compile. It takes minutes at the start. A
            machine that cannot compile is named once, and the run goes on without.
        matmul: precision of float32 matrix products, torch's highest, high or medium; None leaves
            torch's setting.
        channels_last: frozen UNets, and the network of a LoRA student, compute in the
            channels-last layout. Transformers have none, and shards keep theirs.
    """

    def __init__(
        self,
        *,
        compile: Literal["blocks"] | None = None,
        matmul: Literal["highest", "high", "medium"] | None = None,
        channels_last: bool = False,
    ) -> None:
        self.compile, self.matmul, self.channels_last = compile, matmul, channels_last
        self._compiled = CompiledBlocks()
        self._matmul_before: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.matmul:
            self._matmul_before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.matmul)
        if self.channels_last:
            _lay_out(pl_module, torch.channels_last)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compile, after the strategy has sharded the networks."""
        if not self.compile:
            return
        if reason := cannot_compile(pl_module.device):
            if trainer.is_global_zero:
                what = "this machine cannot compile, and the run goes on without"
                log.warning("trainer.compile=%s: %s (%s)", self.compile, what, reason)
            return
        self._compiled.add(blocks_of(pl_module))

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._compiled.undo()
        if self.channels_last:
            _lay_out(pl_module, torch.contiguous_format)
        if self._matmul_before:
            torch.set_float32_matmul_precision(self._matmul_before)
            self._matmul_before = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


class CompiledBlocks:
    """Modules whose forward is compiled. Their hooks stay outside, and no name changes."""

    def __init__(self) -> None:
        self._forwards: list[tuple[nn.Module, Any]] = []  # and the forward of its own, if any
        self._limit: int | None = None

    def add(self, modules: Iterator[nn.Module], backend: str = "inductor") -> None:
        import torch._dynamo.config as dynamo

        self._limit = dynamo.recompile_limit
        dynamo.recompile_limit = max(VARIANTS, self._limit)
        for module in modules:
            self._forwards.append((module, vars(module).get("forward")))
            # Not `module.compile()`: it would trace the hooks of the taps, which are new in every
            # pass.
            module.forward = torch.compile(module.forward, backend=backend)

    def undo(self) -> None:
        import torch._dynamo.config as dynamo

        for module, before in self._forwards:
            del module.forward
            if before is not None:
                module.forward = before
        self._forwards = []
        if self._limit is not None:
            dynamo.recompile_limit, self._limit = self._limit, None


def speed_of(options: dict[str, Any]) -> list[Speed]:
    """Take the keys of `Speed` out of a trainer's options; [] if they change nothing."""
    found = {key: options.pop(key) for key in KEYS if key in options}
    return [Speed(**found)] if any(found.values()) else []


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile fails on this device, as a few words; None if it works."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(2, device=device))
    except Exception as error:  # compilers, headers and drivers fail in many ways
        return first_line(error, 100)
    return None


def blocks_of(method: Any) -> Iterator[nn.Module]:
    """The modules of a method to compile, each once."""
    models = {id(network.model): network.model for network in _networks(method)}
    for model in models.values():
        yield from repeated_blocks(model)
    if method.has_discriminator and not method.second_order:
        yield from _items(method.heads)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers class names; for other classes the items of its module lists."""
    names = {*(getattr(model, "_repeated_blocks", None) or ()), *BLOCKS}
    # Sharding changes the class of a module into a subclass.
    found = [m for m in model.modules() if names & {kind.__name__ for kind in type(m).__mro__}]
    return found or list(_items(model))


def _lay_out(method: Any, memory_format: torch.memory_format) -> None:
    for network in _networks(method):
        if hasattr(network, "lay_out"):
            network.lay_out(memory_format)


def _networks(method: Any) -> list[Any]:
    """Student and teacher, where they are networks of diffusers' models."""
    both = (method.student, getattr(method.teacher, "network", None))
    return [network for network in both if isinstance(getattr(network, "model", None), nn.Module)]


def _items(module: nn.Module) -> Iterator[nn.Module]:
    """Items of the outermost lists and dictionaries of modules."""
    for child in module.children():
        several = isinstance(child, nn.ModuleList | nn.ModuleDict)
        yield from child.children() if several else _items(child)
