"""Reading a whole pipeline from one file in the layout of its makers: what ComfyUI and Civitai call a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import FromSingleFileMixin
from huggingface_hub import snapshot_download
from torch import nn

from distill.teachers.reading import PICKLED, dtype_of, first_line, pipeline_classes, silent
from distill.teachers.weights import local_file

SINGLE = (".safetensors", *PICKLED)


@silent()
def read_single(
    kind: type, path: str, *, config: str | None, dtype: str, use_safetensors: bool, without: Sequence[str] = ()
) -> Any:
    """The pipeline of class `kind` in the file at `path`, but for the parts `without`.

    `config`, a pipeline folder or hub id, has what the file does not: shapes, tokenizers, scheduler; a folder also the
    weights of a part that the file leaves out. Raises FileNotFoundError and ValueError that say what is wrong.
    """
    precision, file = dtype_of(dtype), local_file(path, "teacher.path")
    if not issubclass(kind, FromSingleFileMixin):
        raise ValueError(f"teacher.path={path}: diffusers reads no {kind.__name__} from one file; give a folder")
    if use_safetensors and file.suffix in PICKLED:
        advice = "use safetensors, or if you trust its maker add teacher.use_safetensors=false"
        raise ValueError(f"teacher.path={path} is pickled, which can run code when read; {advice}")
    folder = _config(config, path)
    pipeline_classes(folder, kind.__name__, without, "teacher.config")
    try:
        pipeline = kind.from_single_file(str(file), config=folder, torch_dtype=precision, **dict.fromkeys(without))
    except Exception as error:  # what is not there, or of another shape, raises nearly anything
        what = f"does not load as the {kind.__name__} of teacher.config={config} ({first_line(error)[:200]})"
        raise ValueError(f"teacher.path={path} {what}; choose another teacher= or teacher.config=") from None
    for name, part in pipeline.components.items():
        # What the file lacks is left without a value, on the device `meta`.
        if isinstance(part, nn.Module) and (missing := [k for k, p in part.state_dict().items() if p.is_meta]):
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            advice = "choose another teacher= or teacher.config=, or fetch it anew"
            raise ValueError(f"teacher.path={path} lacks {some} of its {name}; {advice}")
    return pipeline


def _config(config: str | None, path: str) -> str:
    """The folder of the pipeline that says what is in the file; of one on the hub all but the weights, once here."""
    if config is None:
        raise ValueError(
            f"teacher.config=null: {path} is a single file; give the pipeline folder or hub id of its kind"
        )
    if Path(config).is_dir():
        return config
    if config.startswith(("/", ".", "~")) or config.count("/") != 1:
        raise FileNotFoundError(
            f"teacher.config={config}: no such folder; give a diffusers pipeline folder or a hub id"
        )
    try:
        return snapshot_download(config, allow_patterns=["*.json", "*.txt", "*.model"])
    except (OSError, ValueError) as error:
        what = f"cannot be fetched ({first_line(error)})"
        raise ValueError(f"teacher.config={config}: {what}; check the name, the network and its licence") from None
