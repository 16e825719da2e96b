"""Weights that are loaded into a pipeline's denoiser: full ones, a LoRA, or the difference of two
checkpoints.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.machine.faults import first_line
from distill.storage.atomic import atomic_file
from distill.storage.bounded import check_header, parse_json_object
from distill.storage.loaded_weights import check_finite, tensors_of
from distill.teachers.loading.locate import in_repository, is_lora, lora_in, no_file
from distill.teachers.loading.lora_files import add_lora
from distill.teachers.loading.reading import not_fetched

# Setting -> the network that its weights must be like, and what to do with those of another.
LIKE = {
    "teacher.weights": (
        "this teacher's",
        "choose the teacher that they are for, or weights of this one",
    ),
    "delta": ("that of base=", "give base=<the teacher of the run that wrote it>"),
}


def put_on(pipeline: Any, path: str, key: str = "teacher.weights") -> None:
    """Load a local file, or `owner/repository/file` of the hub, into the pipeline's denoiser.

    It holds a UNet's or transformer's weights with diffusers' names (DMD2); a LoRA, which is fused
    (Hyper-SD); or a delta of `distill.export to=delta`, which is added. Of a LoRA only layers of
    the denoiser are used, because a student's text encoders are copies of the teacher's files.

    `key` is the setting: teacher.weights, or `delta` of the export. Raises FileNotFoundError, or
    ValueError for weights of another network.
    """
    file, where = local_file(path, key), f"{key}={path}"
    with readable(where):
        state, about = read_weights(file)
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    if is_lora(state):
        add_lora(pipeline, model, state, where, file)
    else:
        _check_shapes(model, state, key, where)
        _load_state(model, state, add="delta" in about)
    check_finite(model, f"{where}: with it the {type(model).__name__}")


def put_lora(pipeline: Any, path: str, scale: float = 1.0) -> None:
    """Add a LoRA times `scale` to the pipeline's denoiser, as diffusers' `set_adapters` weighs it.

    `path` is a file, or `owner/repository/file` of the hub, or a folder: of a run, or of a LoRA as
    diffusers or peft write it. Its layers for text encoders are left out. Raises FileNotFoundError,
    or ValueError for what is no LoRA, or is one of which the denoiser lacks layers.
    """
    file = local_file(lora_in(path), "lora")
    with readable(f"lora={path}"):
        state, _ = read_weights(file)
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    if not is_lora(state):
        what = "holds no LoRA; give the file of one"
        raise ValueError(f"lora={path}: {what}")
    add_lora(pipeline, model, state, f"lora={path}", file, scale)
    check_finite(model, f"lora={path}: with it the {type(model).__name__}")


def _check_shapes(model: nn.Module, state: dict[str, Tensor], key: str, where: str) -> None:
    """Raise ValueError, starting with `where`, for tensors of another network."""
    own, kind = model.state_dict(), type(model).__name__
    shapes, theirs = ({k: v.shape for k, v in tensors.items()} for tensors in (own, state))
    if other := [k for k in shapes | theirs if shapes.get(k) != theirs.get(k)]:
        what = f"{len(other)} tensors are not there or of another shape, {sorted(other)[0]} for one"
        whose, how = LIKE[key]
        raise ValueError(f"{where}: not of a {kind} like {whose} ({what}); {how}")


def _load_state(model: nn.Module, state: dict[str, Tensor], add: bool) -> None:
    """Load the tensors of the state into the model, or `add` them."""
    own = model.state_dict()
    model.load_state_dict(
        {k: (own[k].float() + v.float() if add else v).to(own[k].dtype) for k, v in state.items()}
    )


def local_file(path: str, key: str) -> Path:
    """The local file at this path, or of `owner/repository/file` after its download; `key` is the
    setting.
    """
    file = Path(path)
    if not file.is_file() and in_repository(path):
        owner, name, inside = path.split("/", 2)
        repository = f"{owner}/{name}"
        try:
            file = Path(hf_hub_download(repository, inside))
        except (OSError, ValueError) as error:
            raise not_fetched(f"{key}={path}", error) from None
    if not file.is_file():
        raise no_file(path, key)
    return file


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors or torch file, also under `state_dict`, and our metadata.

    Raises ValueError for a damaged file, and for one of too many tensors.
    """
    if file.is_file():
        check_header(file)
    try:
        if file.suffix != ".safetensors":
            return tensors_of(file), {}
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, about_weights(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        what = f"cut short or no file of weights ({first_line(error, 90)})"
        raise ValueError(f"{file}: {what}; fetch it anew") from None


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Within this context errors of a damaged file become a ValueError that starts with `where`."""
    try:
        yield
    except Exception as error:
        said = first_line(error).removeprefix(f"{where.partition('=')[2]}: ")
        what = f"cannot be read as weights ({said.removesuffix('; fetch it anew')[:80]})"
        advice = "fetch it anew, as .safetensors"
        raise ValueError(f"{where}: {what}; {advice}") from None


def about_weights(file: Path) -> dict[str, Any]:
    """Our metadata in a safetensors file, without its tensors; {} for a file of others."""
    check_header(file)
    with safe_open(file, "pt") as opened:
        return parse_json_object(
            (opened.metadata() or {}).get("distill", "{}"), f"{file}: its metadata"
        )


def write_weights(
    state: dict[str, Tensor],
    file: Path,
    *,
    dtype: str | None = None,
    about: dict | None = None,
    words: dict[str, str] | None = None,
) -> Path:
    """Write a safetensors file atomically, its floats as `dtype`, a name of torch (None:
    unchanged).

    `about` is our metadata, `words` metadata for other programs. Raises ValueError for an unknown
    dtype, and for values that it cannot represent.
    """
    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(
            f"dtype={dtype}: must be a floating dtype of torch: float32, bfloat16, float16"
        )
    state = {
        k: v.to(kind if kind and v.is_floating_point() else v.dtype).contiguous()
        for k, v in state.items()
    }
    for name, value in state.items():
        if kind and value.is_floating_point() and not value.isfinite().all():
            what = f"{name} has values that it cannot hold, or that are not finite"
            raise ValueError(f"dtype={dtype}: {what}; use dtype=bfloat16 or float32")
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {"format": "pt", **(words or {})} | ({"distill": json.dumps(about)} if about else {})
    with atomic_file(file) as part:
        save_file(state, part, said)
    return file
