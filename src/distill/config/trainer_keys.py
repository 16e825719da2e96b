"""Check keys of Lightning's trainer: some do not work with two optimisers.

Nothing here imports torch.
"""

import re
from typing import Any

from omegaconf import DictConfig, ListConfig

from distill.config.compose import nearest
from distill.core.limits import check_reduction, check_replicas
from distill.machine.hardware import check_precision

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
# Keys of Lightning's trainer that are for one optimiser, or that a run sets itself -> what to type
# instead.
SET = "is set by the run itself; leave it out"
NOT_LIGHTNINGS = {
    "accumulate_grad_batches": "Lightning's is for one optimiser; use loop.accumulate=",
    "gradient_clip_val": (
        "Lightning's is for one optimiser; use loop.clip_student= and clip_discriminator="
    ),
    "gradient_clip_algorithm": "Lightning's is for one optimiser; use loop.clip_student=",
    "max_epochs": "a run is counted in steps; use trainer.max_steps=",
    **dict.fromkeys(("callbacks", "logger", "plugins", "default_root_dir"), SET),
}


def check_trainer(trainer: DictConfig) -> None:
    """Raise ValueError for wrong devices and precisions, and for keys that need one optimiser."""
    devices = trainer.get("devices", 1)
    whole = r"auto|-1|[1-9]\d*"
    if isinstance(devices, str | int | float) and not re.fullmatch(whole, str(devices)):
        raise ValueError(
            f"trainer.devices={devices}: must be a number of devices, a list of them, or auto"
        )
    several = list(devices) if isinstance(devices, ListConfig) else None
    if several is not None and (not several or any(type(x) is not int or x < 0 for x in several)):
        what = "must be a number of devices, a list of their numbers, or auto"
        raise ValueError(f"trainer.devices={several}: {what}")
    check_precision(trainer.get("precision", "auto"), "trainer.precision")
    accelerator = trainer.get("accelerator", "auto")
    if accelerator is not None and accelerator not in ACCELERATORS and not has_target(accelerator):
        near = nearest(str(accelerator), ACCELERATORS)
        what = f"must be {' or '.join(ACCELERATORS)}{near}"
        raise ValueError(f"trainer.accelerator={accelerator}: {what}")
    for key, hint in NOT_LIGHTNINGS.items():
        if trainer.get(key) not in (None, 1 if key == "accumulate_grad_batches" else None):
            raise ValueError(f"trainer.{key}={trainer[key]}: {hint}")
    strategy = trainer.get("strategy", "auto")
    named = str(strategy.get("_target_") if has_target(strategy) else strategy)
    if "fsdp" in named.lower():
        raise ValueError(
            f"trainer.strategy={named}: FSDP1 wraps the forward pass of one model; use"
            " trainer=fsdp2"
        )
    if named.startswith("ddp") or named.endswith("DDPStrategy"):
        raise ValueError(
            f"trainer.strategy={named}: expects one graph, but student and discriminator take"
            " turns; use trainer=ddp"
        )
    if named.startswith("distill."):
        check_reduction(strategy.get("reduce_dtype", "float32"), strategy.get("bucket_mib", 1.0))
        check_replicas(strategy.get("replicas", 1), _processes(trainer))
    if not has_target(strategy) and strategy != "auto":
        raise ValueError(
            f"trainer.strategy={named}: must be auto; or use trainer=ddp or trainer=fsdp2"
        )


def _processes(trainer: DictConfig) -> int | None:
    """How many processes train; None if only the machine knows."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    return devices * nodes if type(devices) is int and devices > 0 and type(nodes) is int else None


def has_target(node: Any) -> bool:
    """Whether this is a node from which an object is built."""
    return isinstance(node, DictConfig) and "_target_" in node
