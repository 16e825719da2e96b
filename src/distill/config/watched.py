"""What the callbacks of a run watch and draw, held against what there is.

Nothing here imports torch.
"""

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config.compose import shipped
from distill.data.lines import Lines


def check_watched(cfg: DictConfig) -> None:
    """That what a callback watches is among what a run of our methods logs.

    Lightning's own callbacks see none of that, unless a class of the user's logs by Lightning.
    """
    nodes = {f"callbacks.{k}": n for k, n in (cfg.get("callbacks") or {}).items() if n is not None}
    targets = [str(cfg.method._target_), *(str(node._target_) for node in nodes.values())]
    if not all(target.startswith(("distill.", "lightning.")) for target in targets):
        return
    alone = OmegaConf.select(cfg, "discriminator.features") is None
    players = ("g/",) if alone else ("g/", "d/")
    for key, node in nodes.items():
        watched = node.get("monitor")
        if watched is not None and str(node._target_).startswith("lightning."):
            what = "Lightning's callbacks see none of what a run logs"
            how = "leave it out; callbacks.checkpoint.best= keeps the best checkpoint"
            raise ValueError(f"{key}.monitor={watched}: {what}; {how}")
        best = node.get("best")
        if best is not None and not str(best).startswith(players):
            what = f"what a run logs begins with {' or '.join(players)}"
            raise ValueError(f"{key}.best={best}: {what}; metrics.csv of a run has all names")


def check_samples_prompts(cfg: DictConfig) -> None:
    """That the prompts of pictures on the way, where they are a file's, can be read."""
    key = "callbacks.samples.prompts"
    prompts = OmegaConf.select(cfg, key)
    if isinstance(prompts, ListConfig) and not prompts:
        raise ValueError(f"{key}=[]: has no prompt; give one, or null for captions of the data")
    if isinstance(prompts, str):
        Lines(shipped(prompts), key)
