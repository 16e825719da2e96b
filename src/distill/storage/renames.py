"""New names of classes in configurations of earlier versions, so that saved runs still work."""

from collections.abc import Mapping
from typing import Any

# Former module -> current module, of classes that a configuration could name.
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


def renamed(tree: Any) -> Any:
    """The tree of a configuration with current names at every `_target_`."""
    if isinstance(tree, Mapping):
        return {k: _name(v) if k == "_target_" else renamed(v) for k, v in tree.items()}
    return [renamed(value) for value in tree] if isinstance(tree, list) else tree


def _name(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else target
