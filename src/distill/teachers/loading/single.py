"""Reading a whole pipeline from one file in the layout of its makers: what ComfyUI and Civitai call
a checkpoint.

diffusers takes from the file what it knows and is silent of the rest; `check_held` is not.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import FromSingleFileMixin
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from distill.machine.faults import first_line, silent
from distill.storage.unread import refuse_broken
from distill.teachers.families import Family
from distill.teachers.loading.held import (
    check_counts,
    check_held,
    check_schedule,
    held_in,
    places_in,
)
from distill.teachers.loading.locate import PICKLED
from distill.teachers.loading.reading import (
    configurations,
    dtype_of,
    fetched,
    pipeline_classes,
    whole,
)
from distill.teachers.loading.settings import check_settings
from distill.teachers.loading.weights import local_file

META = "meta tensor"  # a tensor that is not there stays without a value, on torch's device `meta`
WORDS = ["*.json", "*.txt", "*.model"]  # a pipeline's files without its weights


@silent()
def read_single(
    family: Family,
    path: str,
    *,
    config: str | None,
    dtype: str,
    use_safetensors: bool,
    without: Sequence[str] = (),
) -> Any:
    """The pipeline of `family` in the file at `path`, but for the parts `without`.

    `config`, a pipeline folder or hub id, has what the file does not: shapes, tokenizers,
    scheduler, and whichever of the text encoders and autoencoder the file leaves out. Raises
    FileNotFoundError and ValueError that say what is wrong.
    """
    precision, file = dtype_of(dtype), local_file(path, "teacher.path")
    kind = family.kind
    if not issubclass(kind, FromSingleFileMixin):
        raise ValueError(
            f"teacher.path={path}: diffusers reads no {kind.__name__} from one file; give a folder"
        )
    if use_safetensors and file.suffix in PICKLED:
        advice = "use safetensors, or if you trust its maker add teacher.use_safetensors=false"
        raise ValueError(f"teacher.path={path} is pickled, which can run code when read; {advice}")
    folder, parts = _config(config, path, WORDS), dict.fromkeys(without)
    classes = pipeline_classes(folder, kind.__name__, without, "teacher.config")
    check_settings(family, configurations(folder), f"teacher.config={config}")
    try:
        held = held_in(file)
        check_held(held, classes, without, f"teacher.path={path}")
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
        check_schedule(file, held, pipeline.scheduler, f"teacher.path={path}", config)
        check_counts(held, pipeline, f"teacher.path={path}", config)
        _tie(pipeline)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                refuse_broken(part, f"teacher.path={path}: its {name}")
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
    """Tie what a text encoder has twice and a file may have once; raise ValueError if a tensor has
    no value after.
    """
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()
        if isinstance(part, nn.Module) and any(
            tensor.is_meta for tensor in part.state_dict().values()
        ):
            raise ValueError(META)


def _left_out(held: Collection[str], classes: dict[str, Any]) -> list[str]:
    """The text encoders and autoencoder of the pipeline that a file with these tensors has nothing
    of.
    """
    if not held:
        return []
    wanted = places_in(classes)
    return [part for part, places in wanted.items() if not any(k.startswith(places) for k in held)]


def _config(config: str | None, path: str, patterns: list[str]) -> str:
    """The folder of the pipeline that says what is in the file; of one on the hub the files of
    these `patterns`.
    """
    if config is None:
        raise ValueError(
            f"teacher.config=null: {path} is a single file; give the pipeline folder or id of its"
            " kind"
        )
    here = Path(config).is_dir()
    return (
        config
        if here
        else fetched("teacher.config", config, snapshot_download, allow_patterns=patterns)
    )
