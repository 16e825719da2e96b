"""Copies of a pipeline's parts: only what its model_index.json names, in one precision.

Folders of real models hold the same weights several times: a root single file, ONNX, OpenVINO,
Flax, both precisions. They may also hold private files. So only files that diffusers reads are
copied.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from distill.storage.atomic import remove, write_atomic
from distill.storage.bounded import check_header, mapping_of
from distill.storage.safe_paths import is_own
from distill.teachers.loading.locate import (
    BASE,
    INDEX,
    STUDENT_INFO,
    WEIGHTS,
    home_of,
    index_of,
    lineage,
    shards_in,
)
from distill.teachers.loading.weights import read_weights, write_weights
from distill.terminal.progress import track

CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers', transformers' two
TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")  # of tokenizers and processors
# Names of the files of tokenizers, processors and schedulers, in a folder that is a link.
TOKENIZERS_OWN = re.compile(
    r"(tokenizer|vocab|merges|added_tokens|special_tokens_map|chat_template|spiece|sentencepiece"
    r"|(tokenizer|processor|preprocessor|scheduler)_config)(\.\w+)+"
)
NETWORKS_OWN = {"_class_name", "model_type", "architectures"}  # keys of their configurations
VARIANTS = ("fp16", "bf16")  # used where there are no plain weights
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*")  # copied with the weights


def copy_part(source: Path, target: Path, variant: str | None = None) -> None:
    """Copy a part of a pipeline from folder `source` to `target`, its weights under their plain
    names.

    `variant` is the wanted variant of the weights; without it plain ones are copied, then any
    variant. Raises ValueError for a link out of the pipeline's folder to what is no part of a
    model.
    """
    found = list(_files(source, variant))
    target.mkdir(parents=True)
    for name, file in found:
        shutil.copyfile(file, target / name)


def copy_pipeline(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Copy the pipeline of folder `source` to `target`: what its index names, in `dtype` (None:
    unchanged).

    An existing `target` is removed. Raises ValueError for values that a dtype cannot represent, and
    FileNotFoundError for a pipeline without its denoiser.
    """
    remove(target)
    index = index_of(str(source), "run")
    named = [name for name, pair in index.items() if isinstance(pair, list) and pair[0]]
    for name in (name for name in named if name in ("transformer", "unet")):
        if not Path(home_of(source, name), name).is_dir():
            raise FileNotFoundError(f"run={source}: its {name}/ is missing; fetch it anew")
    target.mkdir(parents=True, exist_ok=True)
    for name in track(named, "copying", unit="part"):
        home = Path(home_of(source, name), name)
        if home.is_dir():
            copy_part(home, target / name)
            cast(target / name, dtype)
    index.pop(BASE, None)
    for folder in reversed(lineage(source)):
        copy_terms(folder, target)
    write_atomic(target / INDEX, json.dumps(index, indent=2).encode() + b"\n")
    return target


def files_of(folder: Path) -> list[Path]:
    """The files of the pipeline in this folder that a copy would have, without those of a base."""
    index = index_of(str(folder), "run")
    named = [name for name, pair in index.items() if isinstance(pair, list) and pair[0]]
    parts = [folder / name for name in named if (folder / name).is_dir()]
    found = [file for part in parts for _, file in _files(part, None)]
    return [folder / INDEX, *found, *_terms(folder)]


def set_sampler(folder: Path, name: str, scheduler: Any) -> None:
    """Set the sampler of the student in this folder, and its diffusers scheduler."""
    remove(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = index_of(str(folder))
    info = index.setdefault(STUDENT_INFO, {})
    info["sampler"] = {**(info.get("sampler") or {}), "name": name}
    write_atomic(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def cast(folder: Path, dtype: str | None) -> None:
    """Convert the weights of this part to `dtype`; None leaves them."""
    if dtype is None:
        return
    for file in sorted(folder.glob("*.safetensors")):
        state, _ = read_weights(file)
        write_weights(state, file, dtype=dtype)


def copy_terms(source: Path, target: Path) -> None:
    """Copy licence files beside a pipeline's parts."""
    for file in _terms(source):
        shutil.copyfile(file, target / file.name)


def _terms(folder: Path) -> Iterator[Path]:
    for pattern in TERMS:
        yield from (
            file for file in folder.glob(pattern) if file.is_file() and is_own(file, folder)
        )


def _files(folder: Path, variant: str | None) -> Iterator[tuple[str, Path]]:
    """Name in the copy -> file, for all files of this part that are read.

    A link out of the pipeline's folder, such as to the same part of another model, may lead to
    files of a model, and to no others.
    """
    own = folder.parent
    if (folder / CONFIG).is_file():  # a network
        extra = folder / "generation_config.json"
        if extra.is_file() and is_own(extra, own):
            yield extra.name, extra
        for name, file in [(CONFIG, folder / CONFIG), *weights_of(folder, variant)]:
            if not is_own(file, own) and not _is_of_model(file):
                what = "is a link to a file of no model, which would be copied; remove it"
                raise ValueError(f"{file}: {what}")
            yield name, file
        return
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in TOKENIZER_FILES and not file.name.startswith(".")
        usual = TOKENIZERS_OWN.fullmatch(file.name) and is_own(file, folder.resolve())
        if wanted and file.is_file() and (is_own(file, own) or usual):
            yield file.name, file


def _is_of_model(file: Path) -> bool:
    """Whether this is the configuration of a network, or a file of weights, by its content."""
    try:
        if file.suffix == ".json":
            settings = mapping_of(file)
            return not NETWORKS_OWN.isdisjoint(settings) or "weight_map" in settings
        if file.suffix == ".safetensors":
            check_header(file)
            with safe_open(file, "pt") as opened:
                return bool(opened.keys())
        with zipfile.ZipFile(file) as archive:  # as torch writes them
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # a file of another kind raises nearly anything
        return False


def weights_of(folder: Path, variant: str | None = None) -> list[tuple[str, Path]]:
    """Name in a copy -> file, of one set of weights in this folder: shards with their index."""
    wanted = dict.fromkeys([variant, None, *VARIANTS, *_variants(folder)])
    for kind in WEIGHTS:
        for each in wanted:
            infix = f".{each}" if each else ""
            for stem in STEMS:
                if (file := folder / f"{stem}{infix}{kind}").is_file():
                    return [(f"{stem}{kind}", file)]
                if (index := folder / f"{stem}{kind}.index{infix}.json").is_file():
                    return [(f"{stem}{kind}.index.json", index), *_shards(index)]
    return []


def _shards(index: Path) -> list[tuple[str, Path]]:
    """The shards that an index names, under these names."""
    return [(name, index.parent / name) for name in shards_in(index)]


def _variants(folder: Path) -> list[str]:
    """The variants of the weights: the middle of `model.ema.safetensors`."""
    names = (file.name.split(".") for file in sorted(folder.iterdir()) if file.suffix in WEIGHTS)
    return [name[1] for name in names if len(name) == 3 and name[0] in STEMS]
