"""Check that the method of a run belongs to its data and sampler, and that a LoRA to add exists."""

from pathlib import Path

from omegaconf import DictConfig
from safetensors import safe_open

from distill.config.compose import shipped
from distill.config.editing import GIVE_MASKED, GIVE_PAIRS
from distill.config.generator import refuse_generator
from distill.config.paths import SHIPPED
from distill.config.sources import DRAWN, EDIT_PAIRS, IMAGES, LATENTS, PREFERENCES, PROMPTS
from distill.core.limits import DOES, LARGEST_SCALE, NO_SAMPLES
from distill.machine.faults import first_line
from distill.storage import source_code
from distill.storage.bounded import check_header
from distill.teachers.families import Family, family
from distill.teachers.loading import locate
from distill.terminal.shown import shown

TORCH = (b"PK\x03\x04", b"\x80")  # how files of torch start, new ones and old ones
OTHERS = (IMAGES, LATENTS, DRAWN, EDIT_PAIRS, PROMPTS)
# What a family reads beside the caption -> data for it, with a method that reads no pairs.
WITHOUT_PAIRS = {
    "source": GIVE_PAIRS,
    "mask": GIVE_MASKED,
    None: "use method=dpo sampler=guided, or give pictures by data=images data.path=<folder>",
}


def check_preference(cfg: DictConfig) -> None:
    """Raise ValueError for a method of pairs on data without losers or with a few-step sampler, and
    for pairs or the sampler of many steps with another method.
    """
    method = str(cfg.method._target_)
    of_pairs, many_steps = (
        bool(source_code.attribute(method, name)) for name in ("of_pairs", "many_steps")
    )
    _check_data(cfg, of_pairs, family(str(cfg.teacher._target_)))
    if many_steps != _keeps_steps(str(cfg.sampler._target_)):
        what = "keeps the teacher's many steps" if many_steps else "trains few steps"
        chosen = "sampler=guided" if many_steps else "sampler=consistency or the like"
        name = cfg.sampler._target_.rpartition(".")[2]
        raise ValueError(f"sampler: {name} does not fit a method that {what}; choose {chosen}")


def _check_data(cfg: DictConfig, of_pairs: bool, facts: Family | None) -> None:
    target, read = str(cfg.data._target_), facts.image if facts else None
    lacks_pairs = of_pairs and target in OTHERS and not cfg.data.get("pairs")
    if not of_pairs and target == DRAWN and cfg.data.get("pairs"):
        what = "adds losers, which this method does not read; make it false, or choose"
        raise ValueError(f"data.pairs={cfg.data.pairs}: {what} method=dpo sampler=guided")
    if not of_pairs and target == PREFERENCES:
        what = "holds pairs of a preference, which this method does not read"
        raise ValueError(f"data.path={cfg.data.path}: {what}; {WITHOUT_PAIRS[read]}")
    if facts is not None and read and (lacks_pairs or target == PREFERENCES):
        what = f"{DOES[read]}, and pairs of a preference have no such picture"
        own = str(cfg.teacher.get("path")).startswith(SHIPPED)
        how = f"as in experiment={'dpo_lora_shapes' if own else 'dpo_sdxl'}"
        raise ValueError(
            f"teacher: a {facts.kind_name()} {what}; choose a text-to-image model, {how}"
        )
    if lacks_pairs:
        what = "this method learns from pairs of a winner and a loser"
        how = "data.pairs=true" if target == DRAWN else "some by data=preference data.path=<shards>"
        raise ValueError(f"data: {what}; give {how}")


def check_captions_alone(cfg: DictConfig) -> None:
    """Raise ValueError for captions alone where nothing makes samples of them. A method of one's
    own may do so itself.
    """
    ours = str(cfg.method._target_).startswith("distill.")
    if ours and str(cfg.data._target_) == PROMPTS and cfg.method.get("real") is None:
        raise ValueError(NO_SAMPLES)


def _keeps_steps(sampler: str) -> bool:
    """Whether this sampler takes the many steps of a model that was not distilled."""
    return source_code.attribute(sampler, "few") is False


def check_lora(cfg: DictConfig) -> None:
    """Check `lora` and `lora_scale` of a command: a file or folder that exists, and a number."""
    scale = cfg.lora_scale
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not abs(scale) <= LARGEST_SCALE:
        what = f"must be a number from -{LARGEST_SCALE} to {LARGEST_SCALE}"
        raise ValueError(f"lora_scale={scale}: {what}; 1 adds the LoRA as it is")
    if cfg.lora == "":
        raise ValueError("lora: is empty; give the file of a LoRA, or leave lora= out")
    if cfg.lora is None:
        if scale != 1:
            raise ValueError(f"lora_scale={scale}: has no effect without lora=; leave it out")
        return
    refuse_generator(shipped(str(cfg.run)), f"lora={cfg.lora}: run={cfg.run}", "leave the LoRA out")
    file = locate.lora_in(str(cfg.lora))
    locate.check_weights(file, "lora")
    if Path(file).is_file():
        _check_is_lora(str(cfg.lora), Path(file))


def _check_is_lora(given: str, file: Path) -> None:
    """Check by the names of its tensors that a safetensors file is a LoRA, and by its first bytes
    that another file may be one.
    """
    if file.suffix != ".safetensors":
        with file.open("rb") as opened:
            start = opened.read(4)
        if not start.startswith(TORCH):
            raise ValueError(f"lora={given}: is no file of weights; give one, as .safetensors")
        return
    try:
        check_header(file)
        with safe_open(file, "numpy") as weights:
            names = list(weights.keys())
    except Exception as error:  # damaged files raise nearly anything
        said = first_line(error, 120).removeprefix(f"{file}: ").removesuffix("; fetch it anew")
        what = f"cannot be read as weights ({said}); fetch it anew, as .safetensors"
        raise ValueError(f"lora={given}: {what}") from None
    if not locate.is_lora(names):
        raise ValueError(f"lora={given}: holds no LoRA, only {shown(names, 60)}; give a LoRA")
