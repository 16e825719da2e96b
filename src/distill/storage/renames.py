"""New names of classes in configurations of earlier versions, so that saved runs still work."""

from collections.abc import Mapping
from typing import Any

# Former module -> current module, of classes that a configuration could name.
MOVED = {
    "distill.times": "distill.core.times",
    "distill.distillation": "distill.core.score_distillation",
    "distill.callbacks": "distill.training.callbacks",
    "distill.checkpoint": "distill.training.checkpoints",
    "distill.csvlog": "distill.training.csv_logger",
    "distill.strategies": "distill.training.strategies",
    "distill.evaluation": "distill.evaluation.shapes",
    "distill.metrics.networks": "distill.evaluation.networks",
    "distill.metrics.scores": "distill.evaluation.scores",
    "distill.shapes.scenes": "distill.worlds.shapes.scenes",
}
# Dotted keys of a run's configuration.
KEYS = {
    "method.opening": "method.warm_start",
    "method.keep": "method.one_step_prob",
    **{
        f"optimizer.{name}": f"loop.{name}"
        for name in (
            "warmup_steps", "schedule", "final_rate", "clip_student", "clip_discriminator",
            "discriminator_updates", "head_start", "accumulate", "ema_decay", "stop_after_bad",
        )
    },
}  # fmt: skip
LOOP = "distill.training.loop_settings.LoopSettings"  # class of `loop`, which was in `optimizer`
# Classes whose own name changed, under their modules of today.
CLASSES = {
    "distill.methods.consistency": {"Consistency": "ConsistencyDistillation"},
}


def renamed(tree: Any) -> Any:
    """The tree of a configuration with current names: its keys, and every `_target_`."""
    return _with_targets(_with_keys(tree) if isinstance(tree, Mapping) else tree)


def _with_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every former key moved to its new group and name."""
    found = {key: dict(node) if isinstance(node, Mapping) else node for key, node in tree.items()}
    for former, current in KEYS.items():
        (group, name), (new_group, new_name) = former.split("."), current.split(".")
        node = found.get(group)
        if not isinstance(node, dict) or name not in node:
            continue
        if new_group not in found:  # the loop had no node: what had its keys was its class
            node.pop("_target_", None)
            found[new_group] = {"_target_": LOOP}
        found[new_group][new_name] = node.pop(name)
    return found


def _with_targets(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _moved(v) if k == "_target_" else _with_targets(v) for k, v in tree.items()}
    return [_with_targets(value) for value in tree] if isinstance(tree, list) else tree


def _moved(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    new_module = MOVED.get(module, module)
    new_name = CLASSES.get(new_module, {}).get(name, name)
    return target if (new_module, new_name) == (module, name) else f"{new_module}.{new_name}"
