"""What a configuration means where it says nothing: the data of a teacher that brings none, and the
judge of its pictures. Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.config.compose import overrides
from distill.config.location import CONF_DIR
from distill.terminal.console import note

WORLD = "shapes"  # whose teachers and data are shipped together
SHIPPED_DATA = "shapes:latents"
RENDERS = Path(CONF_DIR) / "data" / "renders.yaml"
OTHER_METRICS = "metrics=coco5k and metrics=prompts judge other pictures"


def with_defaults(cfg: DictConfig) -> DictConfig:
    """The configuration of a run with what it leaves open.

    A smoke test of a teacher from elsewhere, to which no data were given, has renders of `shapes`.
    The judge of `shapes`, if nobody asked for it, leaves the pictures of others alone. Raises
    ValueError that names the ways to data where there are none.
    """
    if cfg.get("resume") or not HydraConfig.initialized():
        return cfg
    said = missing_data(cfg)
    if said and (_choice("debug") != "smoke" or _typed_overrides("data=")):
        raise ValueError(said)
    if said:
        use_renders(cfg)
    if not is_shapes_teacher() and _choice("metrics") == WORLD and not _typed_overrides("metrics"):
        if "_target_" in (cfg.get("metrics") or {}):
            note(f"not judged: the judge of shapes reads its own pictures alone; {OTHER_METRICS}")
        cfg.metrics = None
    return cfg


def with_placeholder_data(cfg: DictConfig) -> DictConfig:
    """As `settled`, for who only looks at the configuration: renders stand for data that were not
    given.
    """
    if HydraConfig.initialized() and missing_data(cfg):
        use_renders(cfg)
    return cfg


def is_shapes_teacher() -> bool:
    """Whether the teacher that was chosen is one of `shapes`, or of the same make at another
    path.
    """
    return _choice("teacher").partition("_")[0] == WORLD


def missing_data(cfg: DictConfig) -> str | None:
    """A sentence that names the ways to data, for a run that has none which its teacher can
    read.
    """
    asked = _typed_overrides("data=")
    missing = OmegaConf.is_missing(cfg.data, "path") and not asked
    foreign = not is_shapes_teacher() and cfg.data.get("path") == SHIPPED_DATA
    if not (missing or foreign):
        return None
    teacher = " ".join([f"teacher={_choice('teacher')}", *_typed_overrides("teacher.")])
    return (
        f"data: none given that {teacher} can read; give pictures by `data=images"
        f" data.path=<folder>`, or latents cached once by `python -m distill.cache {teacher}"
        " data.path=<folder> out=cached` as `data=latents data.path=cached`, or prompts drawn by"
        f" the teacher in `python -m distill.synthesize {teacher} prompts=<file> out=synthetic` as"
        " `data=synthetic data.path=synthetic`; debug=smoke tries a run without any"
    )


def use_renders(cfg: DictConfig) -> None:
    """Give the configuration renders of `shapes` for its data; what was typed of batch and size
    stays.
    """
    node = OmegaConf.load(RENDERS)
    for key in node:
        if value := _typed_overrides(f"data.{key}="):
            node[key] = OmegaConf.from_dotlist(value).data[key]
    node.batch_size = cfg.data.batch_size
    node.seeded = True  # for methods that want pairs, which are none here
    OmegaConf.set_struct(cfg, False)
    cfg.data = node
    OmegaConf.set_struct(cfg, True)


def _choice(group: str) -> str:
    return str(HydraConfig.get().runtime.choices.get(group))


def _typed_overrides(*begins: str) -> Sequence[str]:
    """The words of the command that begin so."""
    return [word for word in overrides() if word.lstrip("+~").startswith(begins)]
