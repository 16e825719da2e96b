"""Loading a pipeline from one file in its authors' layout, a checkpoint in ComfyUI's and Civitai's
terms.

diffusers ignores what it does not know in the file; `check_held` does not.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from diffusers.loaders import FromOriginalModelMixin, FromSingleFileMixin
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from distill.machine.faults import first_line, quiet_logging
from distill.storage.loaded_weights import check_finite
from distill.teachers.families import Family
from distill.teachers.loading.held import (
    DENOISER,
    Held,
    check_counts,
    check_held,
    check_only_denoiser,
    check_schedule,
    held_in,
    places_in,
)
from distill.teachers.loading.locate import PICKLED
from distill.teachers.loading.reading import (
    download,
    dtype_of,
    pipeline_classes,
    read_network,
    read_pipeline,
)
from distill.teachers.loading.settings import check_settings, configurations
from distill.teachers.loading.weights import local_file, read_weights

META = "meta tensor"  # part of the error for a missing tensor, which stays on the meta device
CONFIG_FILES = ["*.json", "*.txt", "*.model"]  # a pipeline's files without its weights


@quiet_logging()
def read_single(
    family: Family,
    path: str,
    *,
    config: str | None,
    dtype: str,
    use_safetensors: bool,
    without: Sequence[str] = (),
    variant: str | None = None,
) -> Any:
    """The pipeline of `family` in the file at `path`, without the parts `without`.

    `config`, a pipeline folder or hub id, has what the file lacks: shapes, tokenizers, scheduler,
    and missing text encoders or autoencoder. Raises FileNotFoundError and ValueError that say what
    is wrong.
    """
    precision, file = dtype_of(dtype), local_file(path, "teacher.path")
    kind = family.kind
    transformer = None if issubclass(kind, FromSingleFileMixin) else transformer_of(kind)
    if not (transformer or issubclass(kind, FromSingleFileMixin)):
        what = f"diffusers reads no {kind.__name__} from one file; give a folder"
        more = "and weights of its denoiser, under diffusers' names, as teacher.weights="
        raise ValueError(f"teacher.path={path}: {what}, {more}")
    if use_safetensors and file.suffix in PICKLED:
        advice = "use safetensors, or if you trust its maker add teacher.use_safetensors=false"
        raise ValueError(f"teacher.path={path} is pickled, which can run code when read; {advice}")
    folder, parts = _config(config, path, CONFIG_FILES), dict.fromkeys(without)
    classes = pipeline_classes(folder, kind.__name__, without, "teacher.config")
    check_settings(family, configurations(folder), f"teacher.config={config}")
    try:
        held = held_in(file)
        check_held(held, classes, without, f"teacher.path={path}")
        if transformer:
            check_only_denoiser(held, f"teacher.path={path}")
            options = {"use_safetensors": use_safetensors, "without": without, "variant": variant}
            pipeline = _around(family, transformer, file, str(config), dtype=dtype, **options)
            return _checked(pipeline, file, held, path, config)
        for name in _left_out(held, classes):
            there = _config(config, path, [f"{name}/*.json", f"{name}/*.safetensors"])
            key = f"teacher.path={path} has no {name}, and teacher.config"
            options = {
                "use_safetensors": use_safetensors or None,
                "variant": None,
                "dtype": precision,
            }
            parts[name] = read_network(classes[name], there, name, key=key, **options)
        pipeline = kind.from_single_file(str(file), config=folder, torch_dtype=precision, **parts)
        return _checked(pipeline, file, held, path, config)
    except Exception as error:  # missing tensors, or other shapes, may raise anything
        if str(error).startswith("teacher."):
            raise
        what = "it lacks tensors of it" if META in str(error) else first_line(error)
        what = f"does not load as the {kind.__name__} of teacher.config={config} ({what})"
        raise ValueError(
            f"teacher.path={path} {what}; choose another teacher= or teacher.config="
        ) from None


def transformer_of(kind: type) -> Any:
    """The class of a pipeline's transformer, if diffusers reads it from a file of its makers."""
    hint = get_type_hints(kind.__init__).get("transformer")
    classes = [x for x in (get_args(hint) or (hint,)) if isinstance(x, type)]
    return next((x for x in classes if issubclass(x, FromOriginalModelMixin)), None)


def _around(
    family: Family,
    transformer: Any,
    file: Path,
    config: str,
    *,
    dtype: str,
    variant: str | None,
    **options: Any,
) -> Any:
    """The pipeline of `config` with the transformer of the file, as users of diffusers make it."""
    folder = config
    if not Path(config).is_dir():
        others = {"transformer": None, "variant": variant}
        folder = download("teacher.config", config, family.kind.download, **others)
        _config(config, str(file), ["transformer/config.json"])
    state, _ = read_weights(file)
    state = {name.removeprefix(DENOISER): tensor for name, tensor in state.items()}
    model = transformer.from_single_file(
        state, config=folder, subfolder="transformer", torch_dtype=dtype_of(dtype)
    )
    given = {"transformer": model.eval()}
    pipeline = read_pipeline(family, folder, dtype=dtype, given=given, variant=variant, **options)
    pipeline.register_to_config(_name_or_path=None)  # no folder has these weights
    return pipeline


def _checked(pipeline: Any, file: Path, held: Held, path: str, config: str | None) -> Any:
    """The pipeline, if it has all that the file has. Raises ValueError."""
    check_schedule(file, held, pipeline.scheduler, f"teacher.path={path}", config)
    check_counts(held, pipeline, f"teacher.path={path}", config)
    _tie(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_finite(part, f"teacher.path={path}: its {name}")
    pipeline.deferred = {}
    return pipeline


def _tie(pipeline: Any) -> None:
    """Tie weights that a text encoder has twice and the file once. Raises ValueError if a tensor
    has no value.
    """
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()
        if isinstance(part, nn.Module) and any(
            tensor.is_meta for tensor in part.state_dict().values()
        ):
            raise ValueError(META)


def _left_out(held: Collection[str], classes: dict[str, Any]) -> list[str]:
    """The text encoders and autoencoder of the pipeline that a file with these tensors lacks."""
    if not held:
        return []
    wanted = places_in(classes)
    return [part for part, places in wanted.items() if not any(k.startswith(places) for k in held)]


def _config(config: str | None, path: str, patterns: list[str]) -> str:
    """The local folder of the pipeline that describes the file; from the hub, files of these
    `patterns`.
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
        else download("teacher.config", config, snapshot_download, allow_patterns=patterns)
    )
