"""Optimisers of a configuration: what their options and recipes leave to each other, and what this
machine lacks for them.

Nothing here imports torch.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config.compose import overrides
from distill.storage.source_code import find
from distill.terminal.console import note

HERE = "distill.training.optimizers"
PRODIGY, SCHEDULE_FREE = f"{HERE}.prodigy", f"{HERE}.schedule_free"
ON_GPU = f"{HERE}.adamw8bit_bnb"
PACKAGES = {  # target -> the package that it needs, which pip knows by the same name
    f"{HERE}.adamw8bit": "torchao",
    ON_GPU: "bitsandbytes",
    PRODIGY: "prodigyopt",
    SCHEDULE_FREE: "schedulefree",
}
EXTRAS = {"bitsandbytes": "bitsandbytes"}  # package -> extra of pyproject.toml; else OPTIMIZERS
OPTIMIZERS = "optimizers"
# Keys that recipes and options of the group `optimizer` set, for those optimisers that take them.
OF_SOME = ("betas", "per_tensor")
# Those whose states and steps are of shards as of whole tensors.
SHARDED = ("torch.optim.", SCHEDULE_FREE)
WHOLE = ("torch.optim.Muon", "torch.optim._muon.Muon")
LARGEST_RATE = (
    0.1  # ours: no recipe has a learning rate of AdamW as large, and Prodigy's is about 1
)
# Options of optimisers of torch and of ours: which numbers they take, in words and as a test.
# Learning rates, weight decays and betas are in `ranges`. ns_steps is torch's limit.
Numbers = tuple[str, Callable[[Any], bool]]
COUNT: Numbers = ("1 or more", lambda x: x >= 1)
ABOVE: Numbers = ("above 0", lambda x: x > 0)
NOT_BELOW: Numbers = ("0 or more", lambda x: x >= 0)
SHARE: Numbers = ("from 0 to below 1", lambda x: 0 <= x < 1)
TAKES: dict[str, Numbers] = {
    "beta1": SHARE,
    "block_size": COUNT,
    "clip_threshold": ABOVE,
    "d0": ABOVE,
    "d_coef": ABOVE,
    "decay_rate": ("below 0", lambda x: x < 0),
    "eps": NOT_BELOW,
    "growth_rate": ("1 or more, or null", lambda x: x >= 1),
    "momentum": SHARE,
    "ns_steps": ("from 1 to 99", lambda x: 1 <= x <= 99),
    "slice_p": COUNT,
}
PAIRS = ("betas", "eps")


def players(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Dotted key and node of each optimiser."""
    for name, node in (cfg.get("optimizer") or {}).items():
        if isinstance(node, DictConfig) and "_target_" in node:
            yield f"optimizer.{name}", node


def fit_to_recipe(cfg: DictConfig) -> None:
    """Leave out what a recipe sets for another optimiser than the chosen one.

    Recipes give betas, and learning rates of AdamW. Adafactor takes no betas, and Prodigy's rate is
    a factor of its own estimate. Values that were typed stay.
    """
    typed = [word.lstrip("+~") for word in overrides()]
    for key, node in players(cfg):
        target = str(node._target_)
        for name in OF_SOME:
            is_typed = any(word.startswith(f"{key}.{name}=") for word in typed)
            if (
                name in node
                and not is_typed
                and target.startswith(HERE)
                and not takes(target, name)
            ):
                OmegaConf.set_struct(node, False)
                node.pop(name)
                OmegaConf.set_struct(node, None)
        rate, is_typed = node.get("lr"), any(word.startswith(f"{key}.lr=") for word in typed)
        if target == PRODIGY and isinstance(rate, float) and rate < LARGEST_RATE and not is_typed:
            note(f"{key}.lr: 1.0, since {rate:g} is a rate of AdamW, and Prodigy finds its own")
            node.lr = 1.0


def takes(target: str, name: str) -> bool:
    """Whether a function of the package's optimisers takes this key."""
    found = find(*target.rpartition(".")[::2])
    args = getattr(found[1], "args", None) if found else None
    return args is None or name in [arg.arg for arg in (*args.args, *args.kwonlyargs)]


def check_numbers(cfg: DictConfig) -> None:
    """Raise ValueError for an option of an optimiser that is outside its range."""
    for key, node in players(cfg):
        if not str(node._target_).startswith((HERE, "torch.optim.")):
            continue  # of the user's own classes, whose options may mean something else
        for name, value in node.items():
            listed = isinstance(value, ListConfig)
            values = [x for x in (value if listed else [value]) if type(x) in (int, float)]
            if name in PAIRS and listed and len(value) != 2:
                raise ValueError(f"{key}.{name}={list(value)}: must be two numbers")
            words, fits = TAKES.get(str(name), ("", lambda _: True))
            if not all(map(fits, values)):
                given = list(value) if listed else value
                raise ValueError(f"{key}.{name}={given}: must be {words}")


def check_optimizers(cfg: DictConfig) -> None:
    """Check the options and packages of the optimisers, and that strategy and device fit."""
    check_numbers(cfg)
    sharded = "FullySharded" in str(OmegaConf.select(cfg, "trainer.strategy._target_"))
    for key, node in players(cfg):
        target = str(node._target_)
        name = target.removeprefix(f"{HERE}.")
        package = PACKAGES.get(target)
        if package and importlib.util.find_spec(package) is None:
            what = f"{name} needs {package}, which is not installed"
            extra = EXTRAS.get(package, OPTIMIZERS)
            raise ValueError(f"{key}: {what}; pip install 'distill[{extra}]'")
        if target == ON_GPU and cfg.trainer.get("accelerator") == "cpu":
            raise _needs_gpu(key, name)
        if target == SCHEDULE_FREE and not (node.get("betas") or [0.9])[0]:
            what = "schedule_free weighs its mean by the first, which must be above 0"
            raise ValueError(f"{key}.betas={list(node.betas)}: {what}; 0.9 is usual")
        if sharded and (not target.startswith(SHARDED) or target in WHOLE):
            what = f"{name} reads whole tensors, and trainer=fsdp2 shards them"
            raise ValueError(f"{key}: {what}; use optimizer=adamw or schedule_free, or trainer=ddp")
    for key in ("optimizer_device", "ema_device"):
        if sharded and cfg.loop.get(key):
            what = "trainer=fsdp2 shards what this would move"
            raise ValueError(f"loop.{key}={cfg.loop[key]}: {what}; use trainer=ddp, or null")


def check_on_device(cfg: DictConfig) -> None:
    """Check that an optimiser that needs a GPU has one. Imports torch if there is such."""
    for key, node in players(cfg):
        if str(node._target_) == ON_GPU:
            from distill.machine.hardware import device

            if device(cfg.trainer.get("accelerator") or "auto").type == "cpu":
                raise _needs_gpu(key, "adamw8bit_bnb")


def _needs_gpu(key: str, name: str) -> ValueError:
    what = f"{name} has kernels for GPUs alone, and this run has none"
    return ValueError(f"{key}: {what}; use optimizer=adamw8bit, which is torchao's")
