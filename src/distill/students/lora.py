"""A LoRA student: adapters on the teacher's own weights. Student, teacher and feature network are
one network.

    y = W x + (alpha / rank) B A x      in a pass of the student; y = W x in any other

The adapters are on only within a student's pass. A block that gradient checkpointing computes again
has them as in the forward pass. Only the adapters are the student's parameters, in its EMA and in
its checkpoint.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from distill.core.limits import check_adapted
from distill.machine.faults import first_line
from distill.students import shifted
from distill.teachers.network import Context, Network
from distill.teachers.pipeline import PipelineTeacher

INITS = {"kaiming": True, "gaussian": "gaussian"}  # of A, peft's names; B starts at 0


def lora(
    teacher: PipelineTeacher,
    *,
    rank: int = 64,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    shift: int | None = None,
    checkpointing: bool = False,
) -> Network:
    """The teacher's network with its own float32 adapters, equal to the teacher at the start; one
    per teacher.

    `rank` is that of each weight update, scaled by `alpha / rank` (None: by 1). `targets` are ends
    of names of linear and convolutional layers (None: those of the architecture). `init` is kaiming
    or gaussian. With `checkpointing` the backward pass computes the activations of blocks again, in
    every role of the network. `shift` is NitroFusion's timestep shift, of 1,000. Raises ValueError
    for options that do not fit.
    """
    if not isinstance(rank, int) or rank < 1 or init not in INITS:
        raise ValueError(
            f"student.rank={rank} student.init={init}: a rank from 1, and {' or '.join(INITS)}"
        )
    check_adapted(targets)
    network = teacher.network
    names = list(network.targets if targets is None else targets)
    scale = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
    try:
        _adapt(
            network.model,
            LoraConfig(**scale, target_modules=names, init_lora_weights=INITS[init]),
        )
    except ValueError as error:
        what = f"cannot be adapted ({first_line(error, 120)})"
        raise ValueError(
            f"student.targets={names}: {what}; name linear or convolutional layers"
        ) from None
    student, switch = copy.copy(network), Switch(network.model)
    # Not registered here, because its weights are the teacher's and not the student's parameters.
    student._modules = {}
    object.__setattr__(student, "model", network.model)
    student.adapters = _tree(layers(network.model)).float().requires_grad_(True)
    student.pass_context, student.context_savers = (
        switch.on,
        [*network.context_savers, switch.save_context],
    )
    if checkpointing:
        student.enable_checkpointing()
    return shifted(student, shift)


def _adapt(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters into a model: by PEFT alone where diffusers' class knows nothing of them
    (PixArt's).
    """
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:
        inject_adapter_in_model(config, model)


class Switch:
    """Turns the adapters of a model on within `on`; otherwise they are off."""

    def __init__(self, model: nn.Module):
        self._layers = list(layers(model).values())
        self._set(False)

    def on(self) -> Any:
        return self.at(True)

    def save_context(self) -> Context:
        """A function that returns a context with the present state."""
        return partial(self.at, self._is_on)

    @contextmanager
    def at(self, on: bool) -> Iterator[None]:
        before = self._is_on
        self._set(on)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, on: bool) -> None:
        self._is_on = on
        for layer in self._layers:
            # Peft's enable_adapters would also freeze them; nn.Module's setattr is 50 times slower.
            vars(layer)["_disable_adapters"] = not on


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _tree(adapted: dict[str, LoraLayer]) -> nn.Module:
    """The adapters alone, under their names in the model."""
    root = nn.Module()
    for path, layer in adapted.items():
        node = root
        for name in path.split("."):
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node._modules[name]
        node.lora_A, node.lora_B = layer.lora_A, layer.lora_B
    return root


def merged(student: Network) -> nn.Module:
    """A copy of the student's model with the adapters added to its weights, in float32."""
    student.weights.restore()
    model = copy.deepcopy(student.model).float()
    if hasattr(model, "fuse_lora"):
        model.fuse_lora(safe_fusing=True)
        model.unload_lora()
    else:
        for name, layer in layers(model).items():
            layer.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
    # checkpointing would restore states of the student's passes
    model.disable_gradient_checkpointing()
    return model


@torch.no_grad()
def factors(student: Network) -> dict[str, Tensor]:
    """The adapters as `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, scaled so that alpha =
    rank.
    """
    found = {}
    for name, layer in layers(student.model).items():
        a, b = (
            side["default"].weight.detach().float().cpu() for side in (layer.lora_A, layer.lora_B)
        )
        found |= {
            f"{name}.lora_A.weight": a.clone(),
            f"{name}.lora_B.weight": b * layer.scaling["default"],
        }
    return found
