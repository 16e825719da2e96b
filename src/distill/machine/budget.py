"""Bytes that a training holds for each weight: frozen and trained ones, and optimisers' states."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.core.quantized_weights import BITS

HERE = "distill.training.optimizers."
# Target -> bytes of state for each trained weight, in float32 where nothing else is said.
STATES = {
    f"{HERE}adamw8bit": 2 + 2 * 4 / 256,  # two moments, each with a scale for 256 values
    f"{HERE}adamw8bit_bnb": 2 + 2 * 4 / 256,
    f"{HERE}adafactor": 0.02,  # a row and a column of each matrix
    f"{HERE}schedule_free": 8.0,  # z and the second moment
    f"{HERE}muon": 4.0,  # the momentum; of what is no matrix two moments, which are few
}
ADAM = 8.0  # two moments


def state_bytes(node: Mapping[str, Any]) -> float:
    """Bytes of state for each weight of the optimiser of this node."""
    target = str(node.get("_target_"))
    if target == f"{HERE}prodigy":
        betas = node.get("betas") or [0.9]
        first = 4.0 if betas[0] else 0.0
        return first + 4.0 + 8.0 / int(node.get("slice_p") or 1)
    if target == f"{HERE}adafactor" and node.get("beta1") is not None:
        return STATES[target] + 4.0
    return STATES.get(target, ADAM)


def step_bytes(node: Mapping[str, Any], kind: str) -> float:
    """Bytes that the optimiser of this node takes for each weight while it steps, on a device of
    this kind: those that step through all tensors together need a copy of one moment.
    """
    target = str(node.get("_target_"))
    of_torch = target in ("torch.optim.AdamW", "torch.optim.Adam")
    together = of_torch and not node.get("fused") and kind == "cuda"
    return 4.0 if together or target == f"{HERE}schedule_free" else 0.0


def trained_bytes(node: Mapping[str, Any], loop: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes on the device and on the host for each weight of the student: itself, its gradient, its
    optimiser's state and its average. `node` is its optimiser's, `loop` the loop's settings.
    """
    state = state_bytes(node)
    device, host = 8.0 + state + 4.0, 0.0
    if loop.get("optimizer_device"):
        device, host = device - state, host + state + 8.0  # and room for weight and gradient
    if loop.get("ema_device"):
        device, host = device - 4.0, host + 4.0
    return device, host


def frozen_bytes(width: float, kind: str | None) -> float:
    """Bytes on the device for each frozen weight, `width` where it is not quantised."""
    return min(width, BITS[kind] / 8) if kind else width


def adapters(shapes: Mapping[str, Sequence[int]], targets: Sequence[str], rank: int) -> int:
    """Weights of a LoRA of this rank on the layers whose names end in one of `targets`.

    `shapes` are those of the tensors by name. A layer [M, N, ...] has rank (N ... + M) of them.
    """
    total = 0
    for name, shape in shapes.items():
        layer, _, last = name.rpartition(".")
        adapted = any(layer == end or layer.endswith(f".{end}") for end in targets)
        if last == "weight" and adapted and len(shape) > 1:
            inputs = 1
            for side in shape[1:]:
                inputs *= side
            total += rank * (inputs + shape[0])
    return total
