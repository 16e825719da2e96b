"""Defaults that depend on the teacher: data for a teacher without its own, and the evaluation.

Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.config.compose import overrides
from distill.config.editing import EDITS, SHIPPED_DATA
from distill.config.location import CONF_DIR
from distill.config.optimizers import fit_to_recipe
from distill.config.signatures import signature
from distill.config.videos import of_videos
from distill.storage import source_code
from distill.teachers.families import family
from distill.terminal.console import note

WORLD = "shapes"  # the world whose teachers and data are shipped
OPTIONS = Path(CONF_DIR) / "data"
RENDERS = OPTIONS / "renders.yaml"
# Data for models that read pictures beside the caption, by their fact `image`.
READ = {
    "mask": "give pictures, on which masks are drawn, by `data=images data.masks=true"
    " data.path=<folder>`",
    "source": "give edit pairs by `data=pairs data.path=<shards>`",
}
PREFERRED = "data=preference data.path=<shards>"
OTHER_METRICS = "use metrics=coco5k or metrics=prompts for other pictures"


def with_defaults(cfg: DictConfig) -> DictConfig:
    """The configuration of a run with defaults that depend on its teacher.

    What its recipe sets for AdamW does not reach other optimisers. A smoke test of another teacher
    without data gets renders of `shapes`. metrics=shapes is dropped for other teachers, unless it
    was typed. Raises ValueError, with the ways to give data, if there are none.
    """
    if cfg.get("resume") or not HydraConfig.initialized():
        return cfg
    fit_to_recipe(cfg)
    fit_to_own_data(cfg)
    problem = missing_data(cfg)
    if problem and (_choice("debug") != "smoke" or _typed_overrides("data=")):
        raise ValueError(problem)
    if problem:
        use_renders(cfg)
    if not is_shapes_teacher() and _choice("metrics") == WORLD and not _typed_overrides("metrics"):
        if "_target_" in (cfg.get("metrics") or {}):
            other = "" if of_videos(cfg.teacher) else f"; {OTHER_METRICS}"
            note(f"not evaluated: metrics=shapes only reads pictures of shapes{other}")
        cfg.metrics = None
    return cfg


def with_placeholder_data(cfg: DictConfig) -> DictConfig:
    """For commands that only inspect the configuration: renders in place of missing data."""
    if HydraConfig.initialized():
        fit_to_recipe(cfg)
        fit_to_own_data(cfg)
        if missing_data(cfg):
            use_renders(cfg)
    return cfg


def fit_to_own_data(cfg: DictConfig) -> None:
    """Leave out keys that the chosen data do not take and that nobody typed.

    For a function of the user they are null keys of the option, as `column` of data=prompts. For
    data= beside an experiment they are what it sets for its own option, as `reader`.
    """
    target = str(cfg.data.get("_target_"))
    own, taken = target.startswith("distill."), signature(target)
    if taken is None or taken.open or (own and not _typed_overrides("data=")):
        return
    plain: Any = OmegaConf.to_container(cfg.data)
    unfit = [
        key
        for key in plain
        if key not in taken.keys and not _typed_overrides(f"data.{key}=", f"data.{key}.")
    ]
    known = keys_of_options() if own and unfit else set()
    OmegaConf.set_struct(cfg, False)
    for key in unfit:
        if key in known if own else plain[key] is None:
            del cfg.data[key]  # also a key without a value
    OmegaConf.set_struct(cfg, True)


def keys_of_options() -> set[str]:
    """The keys of all our options of data; others are mistakes, which are refused."""
    options = [OmegaConf.load(file) for file in OPTIONS.glob("*.yaml")]
    return {str(key) for option in options for key in option} - {"_target_"}


def is_shapes_teacher() -> bool:
    """Whether the chosen teacher option is one of `shapes`, at any path."""
    return _choice("teacher").partition("_")[0] == WORLD


def missing_data(cfg: DictConfig) -> str | None:
    """A sentence with the ways to give data, if the run has none that its teacher can read; else
    None.
    """
    typed = _typed_overrides("data=")
    missing = OmegaConf.is_missing(cfg.data, "path") and not typed
    foreign = not is_shapes_teacher() and cfg.data.get("path") == SHIPPED_DATA
    if not (missing or foreign):
        return None
    teacher = " ".join([f"teacher={_choice('teacher')}", *_typed_overrides("teacher.")])
    what, smoke = f"data: none given that {teacher} can read", "debug=smoke tries a run without any"
    facts = family(str(cfg.teacher._target_))
    if facts is not None and facts.image:
        return f"{what}; {READ[facts.image]}; {smoke}"
    if source_code.attribute(str(cfg.method._target_), "of_pairs"):
        return f"{what}; give pairs of a winner and a loser by `{PREFERRED}`; {smoke}"
    return (
        f"{what}; give pictures by `data=images"
        f" data.path=<folder>`, or latents cached once by `python -m distill.cache {teacher}"
        " data.path=<folder> out=cached` as `data=latents data.path=cached`, or samples of the"
        f" teacher by `python -m distill.synthesize {teacher} prompts=<file> out=synthetic` as"
        f" `data=synthetic data.path=synthetic`; {smoke}"
    )


def use_renders(cfg: DictConfig) -> None:
    """Set renders of `shapes` as data; keys of data that were typed stay."""
    node = OmegaConf.load(RENDERS)
    for key in node:
        if value := _typed_overrides(f"data.{key}="):
            node[key] = OmegaConf.from_dotlist(value).data[key]
    facts = family(str(cfg.teacher._target_))
    if facts and facts.image == "source":
        node.reader._target_ = EDITS
    if facts and facts.image == "mask" and not _typed_overrides("data.masks="):
        node.masks = True
    node.batch_size = cfg.data.batch_size
    node.seeded = True  # methods that need pairs of noise and sample accept it
    node.pairs = bool(source_code.attribute(str(cfg.method._target_), "of_pairs"))
    OmegaConf.set_struct(cfg, False)
    cfg.data = node
    OmegaConf.set_struct(cfg, True)


def _choice(group: str) -> str:
    return str(HydraConfig.get().runtime.choices.get(group))


def _typed_overrides(*prefixes: str) -> Sequence[str]:
    """The overrides of the command line with one of these prefixes."""
    return [override for override in overrides() if override.lstrip("+~").startswith(prefixes)]
