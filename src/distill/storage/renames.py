"""Names that configurations of earlier versions have, and what they are called now: saved runs go
on, and compare.
"""

from collections.abc import Mapping
from typing import Any

# Modules of classes that a configuration could name, before every module had a room.
MOVED = {
    "distill.times": "distill.core.times",
    "distill.distillation": "distill.core.score_distillation",
    "distill.engine": "distill.training.engine",
    "distill.callbacks": "distill.training.callbacks",
    "distill.checkpoint": "distill.training.checkpoints",
    "distill.csvlog": "distill.training.csv_logger",
    "distill.strategies": "distill.training.strategies",
    "distill.evaluation": "distill.evaluation.shapes",
    "distill.metrics.networks": "distill.evaluation.networks",
    "distill.metrics.scores": "distill.evaluation.scores",
    "distill.shapes.scenes": "distill.worlds.shapes.scenes",
}
# Classes whose own name changed, under their modules of today.
CLASSES = {
    "distill.methods.consistency": {"Consistency": "ConsistencyDistillation"},
}


def renamed(tree: Any) -> Any:
    """The same tree of a configuration with today's name at every `_target_`."""
    if isinstance(tree, Mapping):
        return {k: _name(v) if k == "_target_" else renamed(v) for k, v in tree.items()}
    return [renamed(value) for value in tree] if isinstance(tree, list) else tree


def _name(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    new_module = MOVED.get(module, module)
    new_name = CLASSES.get(new_module, {}).get(name, name)
    return target if (new_module, new_name) == (module, name) else f"{new_module}.{new_name}"
