"""How to leave out a key that nothing reads: it was typed, or a file sets it.

    leave_out("data.x", ["+data.x=2"])                    leave it out
    leave_out("data.x", ["experiment=a", "data=images"])  leave it out by ~data.x
    leave_out("data.x", ["resume=runs/a"])                take it out of the config.yaml of runs/a

Nothing here imports torch.
"""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig

GROUP = "experiment"  # a command with this group composes a whole run


def leave_out(key: str, overrides: Sequence[str]) -> str:
    """What to type so that the key is not there; `overrides` are those of the command line."""
    if not _composes_run() or any(_adds(override, key) for override in overrides):
        return "leave it out"
    resumed = [text.partition("=")[2] for text in overrides if text.startswith("resume=")]
    if resumed:
        return f"take it out of the config.yaml of {resumed[-1]}"
    return f"leave it out by ~{key}"


def _composes_run() -> bool:
    """Whether the keys are those that Hydra composed, and not of a folder or of Python."""
    return HydraConfig.initialized() and GROUP in HydraConfig.get().runtime.choices


def _adds(override: str, key: str) -> bool:
    """Whether this override adds the key, a part of it, or a node with it.

    Without a `+` Hydra only changes keys that are there, so a file sets the key too.
    """
    name = override.partition("=")[0]
    added = name.lstrip("+")
    inside = f"{key}.".startswith(f"{added}.") or added.startswith(f"{key}.")
    return name.startswith("+") and inside
