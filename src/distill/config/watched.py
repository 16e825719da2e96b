"""Check what callbacks monitor and which prompts they show.

Nothing here imports torch.
"""

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config.compose import shipped
from distill.data.lines import Lines


def check_watched(cfg: DictConfig) -> None:
    """Raise ValueError if a callback monitors a value that the run does not log.

    Lightning's callbacks only see values that are logged by Lightning, which our methods do not do.
    A run with classes of the user is not checked.
    """
    nodes = {f"callbacks.{k}": n for k, n in (cfg.get("callbacks") or {}).items() if n is not None}
    targets = [str(cfg.method._target_), *(str(node._target_) for node in nodes.values())]
    if not all(target.startswith(("distill.", "lightning.")) for target in targets):
        return
    has_discriminator = OmegaConf.select(cfg, "discriminator.features") is not None
    prefixes = ("g/", "d/") if has_discriminator else ("g/",)
    if OmegaConf.select(cfg, "optimizer.fake_score") is not None:
        prefixes = (*prefixes, "f/")
    for key, node in nodes.items():
        watched = node.get("monitor")
        if watched is not None and str(node._target_).startswith("lightning."):
            what = "callbacks of Lightning do not see the values that a run logs"
            hint = "leave it out; callbacks.checkpoint.best= keeps the best checkpoint"
            raise ValueError(f"{key}.monitor={watched}: {what}; {hint}")
        best = node.get("best")
        if best is not None and not str(best).startswith(prefixes):
            what = f"names of logged values start with {' or '.join(prefixes)}"
            raise ValueError(f"{key}.best={best}: {what}; metrics.csv of a run has all names")


def check_samples_prompts(cfg: DictConfig) -> None:
    """Raise ValueError or OSError if the prompts of sample pictures cannot be read."""
    key = "callbacks.samples.prompts"
    prompts = OmegaConf.select(cfg, key)
    if isinstance(prompts, ListConfig) and not prompts:
        raise ValueError(f"{key}=[]: is empty; give a prompt, or null for captions of the data")
    if isinstance(prompts, str):
        Lines(shipped(prompts), key, OmegaConf.select(cfg, "callbacks.samples.column"))
