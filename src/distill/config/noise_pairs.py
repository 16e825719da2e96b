"""Losses on pairs of a teacher's sample and its noise need data with both. Nothing here imports
torch.
"""

from omegaconf import DictConfig

from distill.config.trainer_keys import has_target
from distill.storage import source_code

WEIGHTS = ("pairs_weight", "regression_weight")  # of the methods' regressions
REGRESSION = "distill.methods.regression.Regression"
OWN_DATA = "distill."  # what other data give, they alone know


def check_noise(cfg: DictConfig) -> None:
    """Check that a method with a regression has samples of which the noise is known."""
    data, method = cfg.data, cfg.method
    made = has_target(method.get("real"))  # the teacher generates samples from known noise
    if made or data.get("seeded") or not str(data.get("_target_")).startswith(OWN_DATA):
        return
    needs = "a regression needs the noise that each sample was made from"
    what = f"{needs}, and these data do not have it"
    how = "use data=synthetic, or latents by their seeds with data.seeded=true"
    if REGRESSION in source_code.lineage(str(method.get("_target_"))):
        raise ValueError(f"method: {what}; {how}")
    if method.get("warm_start") == 0:  # the regression is a part of the warm start
        return
    for key in WEIGHTS:
        if method.get(key):
            raise ValueError(f"method.{key}={method[key]}: {what}; {how}, or make it 0")
