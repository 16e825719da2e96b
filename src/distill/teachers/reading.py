"""Reading a diffusers pipeline so that nothing in it is made up, and nothing in it can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from distill.teachers.network import read_quietly

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_pipeline(
    kind: type,
    path: str,
    *,
    dtype: str,
    revision: str | None = None,
    variant: str | None = None,
    use_safetensors: bool = True,
    **without: Any,
) -> Any:
    """The pipeline of class `kind` at `path`, a folder or hub id; `without` are parts to leave out, each None.

    Each network is read by itself: a pipeline would only warn of tensors that are not there, and take random ones.
    Raises FileNotFoundError and ValueError that say what is wrong in it.
    """
    check_folder(path, kind.__name__)
    if not isinstance(precision := getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"teacher.dtype={dtype}: must be a dtype of torch: float32, bfloat16, float16")
    read_quietly()
    safe = True if use_safetensors else None
    if not Path(path).exists():
        path = _fetched(kind, path, revision=revision, variant=variant, use_safetensors=safe, **without)
    parts = dict(without)
    for name, (library, found) in _index(path).items():
        if name in parts or library is None:
            continue
        if library not in LIBRARIES:
            raise ValueError(f"teacher.path={path}: {name} is code of {library!r}, which this teacher does not read")
        if isinstance(network := getattr(LIBRARIES[library], found, None), type) and issubclass(network, nn.Module):
            _check_files(path, name, use_safetensors)
            options = {"dtype": precision, "variant": variant, "use_safetensors": safe}
            with _silent():
                parts[name] = _whole(network, path, name, **options)
    return kind.from_pretrained(path, use_safetensors=safe, **parts)


def _fetched(kind: type, path: str, **options: Any) -> str:
    """The folder that the hub's pipeline is in, once it is here."""
    try:
        with _silent():
            return kind.download(path, **options)
    except (OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"teacher.path={path}: cannot be fetched ({what}); check the name, the network and its licence"
        ) from None


@contextmanager
def _silent() -> Iterator[None]:
    """What the libraries would warn of in several lines is made one sentence here."""
    logs = [library.utils.logging for library in LIBRARIES.values()]
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)


def check_folder(path: str, expected: str) -> None:
    """Refuse, in one sentence, a local path that is no pipeline folder of the class `expected`."""
    folder = Path(path)
    if not folder.exists():
        if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
            raise FileNotFoundError(
                f"teacher.path={path}: no such folder; give a diffusers pipeline folder or a hub id"
            )
        return  # a hub id
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"teacher.path={path}: not a diffusers pipeline folder (it has no model_index.json)")
    found = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if found != expected:
        raise ValueError(
            f"teacher.path={path} holds a {found}, but this teacher reads a {expected}; choose another teacher="
        )


def _index(path: str) -> dict[str, tuple[str | None, str]]:
    """Part -> library and class, as the pipeline's own index has them."""
    index = json.loads((Path(path) / "model_index.json").read_text())
    return {name: tuple(pair) for name, pair in index.items() if isinstance(pair, list) and len(pair) == 2}


def _check_files(path: str, part: str, use_safetensors: bool) -> None:
    folder = Path(path) / part
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"teacher.path={path}: its {part}/ is missing or has no config.json; fetch it anew")
    pickled = [file.name for pattern in PICKLED for file in sorted(folder.glob(pattern))]
    if use_safetensors and pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"teacher.path={path}: {part}/ has only pickled weights ({pickled[0]}), which can run code when read; "
            "use safetensors, or if you trust their maker add teacher.use_safetensors=false"
        )


def _whole(network: type, path: str, part: str, **options: Any) -> nn.Module:
    """The network with every one of its tensors from the files."""
    ours = issubclass(network, transformers.PreTrainedModel)  # it names tensors of another shape only if it may go on
    try:
        model, report = network.from_pretrained(
            path,
            subfolder=part,
            output_loading_info=True,
            **options,
            **({"ignore_mismatched_sizes": True} if ours else {}),
        )
    except Exception as error:  # damaged files raise nearly anything
        what = str(error).strip().partition(". ")[0].splitlines() or [type(error).__name__]
        raise ValueError(f"teacher.path={path}: {part}/ does not load ({what[0][:200]}); fetch it anew") from None
    other = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
    for names, what in ((sorted(report["missing_keys"]), "lacks"), (sorted(other), "has in another shape")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"teacher.path={path}: {part}/ {what} {', '.join(names[:3])}{more} of its {network.__name__}; "
                "fetch it anew, or correct its config.json"
            )
    return model
