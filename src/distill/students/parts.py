"""Copies of a pipeline's parts: only what its model_index.json names, in one precision.

Folders of real models hold the same weights several times: a root single file, ONNX, OpenVINO,
Flax, both precisions. They may also hold private files. So only files that diffusers reads are
copied.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.storage.atomic import remove, write_atomic
from distill.teachers.loading.locate import INDEX, STUDENT_INFO, WEIGHTS, index_of, shards_in
from distill.teachers.loading.reading import BASE, home_of, lineage
from distill.teachers.loading.weights import read_weights, write_weights
from distill.terminal.progress import track

CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers', transformers' two
TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")  # of tokenizers and processors
VARIANTS = ("fp16", "bf16")  # used where there are no plain weights
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*")  # copied with the weights


def copy_part(source: Path, target: Path, variant: str | None = None) -> None:
    """Copy a part of a pipeline from folder `source` to `target`, its weights under their plain
    names.

    `variant` is the wanted variant of the weights; without it plain ones are copied, then any
    variant.
    """
    target.mkdir(parents=True)
    for name, file in _files(source, variant):
        shutil.copyfile(file, target / name)


def copy_pipeline(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Copy the pipeline of folder `source` to `target`: what its index names, in `dtype` (None:
    unchanged).

    An existing `target` is removed. Raises ValueError for values that a dtype cannot represent.
    """
    remove(target)
    index = index_of(str(source), "run")
    named = [name for name, pair in index.items() if isinstance(pair, list) and pair[0]]
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
    for pattern in TERMS:
        for file in source.glob(pattern):
            if file.is_file() and _inside(file, source):
                shutil.copyfile(file, target / file.name)


def _files(folder: Path, variant: str | None) -> Iterator[tuple[str, Path]]:
    """Name in the copy -> file, for all files of this part that are read."""
    if (folder / CONFIG).is_file():  # a network
        yield CONFIG, folder / CONFIG
        extra = folder / "generation_config.json"
        if extra.is_file() and _inside(extra, folder):
            yield extra.name, extra
        yield from weights_of(folder, variant)
        return
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in TOKENIZER_FILES and not file.name.startswith(".")
        if wanted and file.is_file() and _inside(file, folder):
            yield file.name, file


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


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file is in this folder, links resolved, or in the blob store of the hub's cache.

    A link in a downloaded folder may point anywhere. Weights and configurations are read through
    links all the same.
    """
    place = file.resolve()
    kept = [parent for parent in folder.absolute().parents if parent.name == "snapshots"]
    store = [parent.with_name("blobs") for parent in kept]
    return any(place.is_relative_to(root.resolve()) for root in (folder, *store))
