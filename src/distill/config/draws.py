"""Check what a method draws at random: noise levels, numbers of steps and sizes."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.core import limits, odds

TIMES = "distill.core.times."
SCORES = "distill.core.score_distillation."
REFINED = "distill.methods.nitrofusion.NitroFusion"


def check_draws(cfg: DictConfig) -> None:
    """Raise ValueError, naming the key, for settings from which the method could not draw. Their
    types have been checked.
    """
    for path, node in _nodes(OmegaConf.to_container(cfg.method, resolve=True), "method."):
        target = str(node["_target_"])
        if target == REFINED:
            odds.check_refinement(node.get("levels", [[1.0]]), node.get("refine", [0]))
        elif target == f"{TIMES}Discrete":
            _check_discrete(node, path)
        elif target == f"{TIMES}LogitNormal":
            odds.check_spread(node.get("m", 1.0), node.get("s", 1.0), path)
        elif target == f"{TIMES}Uniform":
            odds.check_range(node.get("low", 0.0), node.get("high", 1.0), path)
        elif target == f"{SCORES}ScoreDistillation":
            ends = node.get("low", 0.02), node.get("high", 0.98)
            odds.check_range(*ends, path, inside=True)
        elif target == f"{SCORES}TeacherSamples":
            limits.check_falling(node.get("levels", [1.0]), f"{path}levels")
            limits.check_buckets(node.get("buckets"), node.get("shares"), path)


def _check_discrete(node: Mapping[str, Any], path: str) -> None:
    levels, steps = node.get("levels", ()), node.get("warmup_steps", 0)
    odds.check_levels(levels, path)
    odds.check_odds(node.get("odds", ()), len(levels), f"{path}odds")
    if (warm_up := node.get("warmup_odds")) is not None:
        odds.check_odds(warm_up, len(levels), f"{path}warmup_odds")
    odds.check_warm_up(steps, warm_up, path)


def _nodes(tree: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each node with a target below a plain tree, and the prefix of its keys."""
    if not isinstance(tree, Mapping):
        return
    if "_target_" in tree:
        yield path, tree
    for name, inner in tree.items():
        yield from _nodes(inner, f"{path}{name}.")
