"""Reading a whole pipeline from one file in the layout of its makers: what ComfyUI and Civitai call a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from diffusers.loaders import FromSingleFileMixin
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from distill.files import first_line, silent
from distill.teachers.locate import PICKLED
from distill.teachers.reading import dtype_of, fetched, pipeline_classes, whole
from distill.teachers.weights import local_file

META = "meta tensor"  # a tensor that is not there stays without a value, on torch's device `meta`
WORDS = ["*.json", "*.txt", "*.model"]  # a pipeline's files without its weights
PLACES = {  # part of a pipeline -> where it stands in a file of SD, SDXL, or SD3
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}


@silent()
def read_single(
    kind: type,
    path: str,
    *,
    config: str | None,
    dtype: str,
    use_safetensors: bool,
    without: Sequence[str] = (),
) -> Any:
    """The pipeline of class `kind` in the file at `path`, but for the parts `without`.

    `config`, a pipeline folder or hub id, has what the file does not: shapes, tokenizers, scheduler, and whichever of
    the text encoders and autoencoder the file leaves out. Raises FileNotFoundError and ValueError that say what is
    wrong.
    """
    precision, file = dtype_of(dtype), local_file(path, "teacher.path")
    if not issubclass(kind, FromSingleFileMixin):
        raise ValueError(
            f"teacher.path={path}: diffusers reads no {kind.__name__} from one file; give a folder"
        )
    if use_safetensors and file.suffix in PICKLED:
        advice = "use safetensors, or if you trust its maker add teacher.use_safetensors=false"
        raise ValueError(f"teacher.path={path} is pickled, which can run code when read; {advice}")
    folder, parts = _config(config, path, WORDS), dict.fromkeys(without)
    classes = pipeline_classes(folder, kind.__name__, without, "teacher.config")
    try:
        held = _held(file)
        for name in _left_out(held, classes):
            there = _config(config, path, [f"{name}/*.json", f"{name}/*.safetensors"])
            key = f"teacher.path={path} has no {name}, and teacher.config"
            options = {
                "use_safetensors": use_safetensors or None,
                "variant": None,
                "dtype": precision,
            }
            parts[name] = whole(classes[name], there, name, key=key, **options)
        pipeline = kind.from_single_file(str(file), config=folder, torch_dtype=precision, **parts)
        kept = pipeline.scheduler.config.get("prediction_type")
        if (
            "v_pred" in held and kept != "v_prediction"
        ):  # as ComfyUI marks it; diffusers does not look
            what = f"says that it predicts v, and teacher.config={config} says {kept}"
            raise ValueError(f"teacher.path={path} {what}; give a teacher.config of its kind")
        _tie(pipeline)
        pipeline.deferred = {}
        return pipeline
    except Exception as error:  # what is not there, or of another shape, raises nearly anything
        if str(error).startswith("teacher."):
            raise
        what = "it lacks tensors of it" if META in str(error) else first_line(error)
        what = f"does not load as the {kind.__name__} of teacher.config={config} ({what})"
        raise ValueError(
            f"teacher.path={path} {what}; choose another teacher= or teacher.config="
        ) from None


def _tie(pipeline: Any) -> None:
    """Tie what a text encoder has twice and a file may have once; raise ValueError if a tensor has no value after."""
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()
        if isinstance(part, nn.Module) and any(
            tensor.is_meta for tensor in part.state_dict().values()
        ):
            raise ValueError(META)


def _left_out(held: set[str], classes: dict[str, Any]) -> list[str]:
    """The text encoders and autoencoder of the pipeline that a file with these tensors has nothing of."""
    if not held:
        return []
    wanted = {
        part: places
        for part, places in PLACES.items()
        if classes.get(part, NoneType) is not NoneType
    }
    return [part for part, places in wanted.items() if not any(k.startswith(places) for k in held)]


def _held(file: Path) -> set[str]:
    """The names of its tensors; nothing for a pickled one, which is whole, from before safetensors."""
    if file.suffix in PICKLED:
        return set()
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def _config(config: str | None, path: str, patterns: list[str]) -> str:
    """The folder of the pipeline that says what is in the file; of one on the hub the files of these `patterns`."""
    if config is None:
        raise ValueError(
            f"teacher.config=null: {path} is a single file; give the pipeline folder or id of its kind"
        )
    here = Path(config).is_dir()
    return (
        config
        if here
        else fetched("teacher.config", config, snapshot_download, allow_patterns=patterns)
    )
