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
LOOP = "distill.training.loop_settings.LoopSettings"  # what a loop is that had no node of its own
# Classes whose own name changed, under their modules of today.
CLASSES = {
    "distill.methods.consistency": {"Consistency": "ConsistencyDistillation"},
}


def renamed(tree: Any) -> Any:
    """The tree of a configuration with current names: its keys, and every `_target_`."""
    if isinstance(tree, Mapping) and isinstance(tree.get("optimizer"), Mapping):
        tree = _with_loop(tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("method"), Mapping):
        tree = {**tree, "method": _with_keys("method", tree["method"])}
    return _with_targets(tree)


def _with_loop(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `optimizer` held besides optimisers lies in `loop` now."""
    before = tree["optimizer"]
    moved = {k: v for k, v in before.items() if f"optimizer.{k}" in KEYS}
    if not moved:
        return tree
    rest = {k: v for k, v in before.items() if k not in moved and k != "_target_"}
    return {**tree, "optimizer": rest, "loop": {"_target_": LOOP, **moved}}


def _with_keys(group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    return {KEYS.get(f"{group}.{k}", f"{group}.{k}").partition(".")[2]: v for k, v in node.items()}


def _with_targets(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _moved(v) if k == "_target_" else _with_targets(v) for k, v in tree.items()}
    return [_with_targets(value) for value in tree] if isinstance(tree, list) else tree


def _moved(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    new_module = MOVED.get(module, module)
    new_name = CLASSES.get(new_module, {}).get(name, name)
    return target if (new_module, new_name) == (module, name) else f"{new_module}.{new_name}"
