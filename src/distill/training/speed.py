"""Faster passes of a run: compiled blocks, faster float32 products, channels-last UNets.

Weights, their names and checkpoints stay as they are: a run may be resumed with other values.
"""

import logging
from collections.abc import Iterator
from functools import wraps
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from distill.machine.faults import first_line
from distill.machine.ranks import rank
from distill.training.sharding import listed_modules

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
            machine or a block that cannot be compiled is named once, and the run goes on without.
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
    """Modules whose forward is compiled. Their hooks stay outside, and no name changes.

    Where a block fails to compile, no more is compiled for its class, and passes without a graph
    run as they are. Graphs that exist stay in use: checkpointing must compute a pass again in the
    same way.
    """

    def __init__(self) -> None:
        self._forwards: list[tuple[nn.Module, Any]] = []  # and the forward of its own, if any
        self._failed: set[type] = set()
        self._settings: list[tuple[Any, str, Any]] = []  # of torch, and their values before

    def add(self, modules: Iterator[nn.Module], backend: Any = "inductor") -> None:
        import torch._dynamo.config as dynamo
        import torch._functorch.config as autograd

        self._set(dynamo, "recompile_limit", max(VARIANTS, dynamo.recompile_limit))
        # Derivatives are compiled with their graph: an error in a backward pass would come too late
        # to run the block as it is.
        self._set(autograd, "force_non_lazy_backward_lowering", True)
        for module in modules:
            self._forwards.append((module, vars(module).get("forward")))
            module.forward = self._compiled(module, backend)

    def _compiled(self, module: nn.Module, backend: Any) -> Any:
        """The module's forward, compiled if that succeeds."""
        from torch._dynamo.exc import TorchDynamoException

        eager = module.forward
        # Not `module.compile()`: it would trace the hooks of the taps, which are new in every pass.
        compiled = torch.compile(eager, backend=backend)

        @wraps(eager)
        def forward(*inputs: Any, **options: Any) -> Any:
            if type(module) in self._failed:
                with torch.compiler.set_stance("eager_on_recompile"):
                    return compiled(*inputs, **options)
            try:
                return compiled(*inputs, **options)
            except TorchDynamoException as error:  # of every stage of compiling
                self._note(module, error)
            return eager(*inputs, **options)

        return forward

    def _note(self, module: nn.Module, error: Exception) -> None:
        if not self._failed and rank() == 0:
            what = "cannot be compiled, and the run goes on without"
            log.warning("trainer.compile: %s %s (%s)", type(module).__name__, what, _reason(error))
        self._failed.add(type(module))

    def _set(self, config: Any, name: str, value: Any) -> None:
        if hasattr(config, name):  # other releases of torch may not have it
            self._settings.append((config, name, getattr(config, name)))
            setattr(config, name, value)

    def undo(self) -> None:
        """Give the modules their forward back, and forget what was compiled for them."""
        for module, before in self._forwards:
            del module.forward
            if before is not None:
                module.forward = before
        if self._forwards:
            # Graphs are stored by class: the next training in this process, as in a sweep, would
            # try all of them at each call, until their number reaches the limit.
            torch._dynamo.reset()
        self._forwards, self._failed = [], set()
        while self._settings:
            config, name, value = self._settings.pop()
            setattr(config, name, value)


def speed_of(options: dict[str, Any]) -> list[Speed]:
    """Take the keys of `Speed` out of a trainer's options; [] if they change nothing."""
    found = {key: options.pop(key) for key in KEYS if key in options}
    return [Speed(**found)] if any(found.values()) else []


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile fails on this device, as a few words; None if it works."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(2, device=device))
    except Exception as error:  # compilers, headers and drivers fail in many ways
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """What a compiler said, without the sentence in which torch wraps it."""
    return first_line(getattr(error, "inner_exception", error), 100)


def blocks_of(method: Any) -> Iterator[nn.Module]:
    """The modules of a method to compile, each once."""
    fake_score = [] if method.fake_score is None else [method.fake_score.network]
    networks = [*_networks(method), *fake_score]
    models = {id(network.model): network.model for network in networks}
    for model in models.values():
        yield from repeated_blocks(model)
    if method.has_discriminator and not method.second_order:
        yield from listed_modules(method.heads)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers class names; for other classes the items of its module lists."""
    names = {*(getattr(model, "_repeated_blocks", None) or ()), *BLOCKS}
    # Sharding changes the class of a module into a subclass.
    found = [m for m in model.modules() if names & {kind.__name__ for kind in type(m).__mro__}]
    return found or list(listed_modules(model))


def _lay_out(method: Any, memory_format: torch.memory_format) -> None:
    for network in _networks(method):
        if hasattr(network, "lay_out"):
            network.lay_out(memory_format)


def _networks(method: Any) -> list[Any]:
    """Student and teacher, where they are networks of diffusers' models."""
    both = (method.student, getattr(method.teacher, "network", None))
    return [network for network in both if isinstance(getattr(network, "model", None), nn.Module)]
