"""Copying a pipeline's parts: what its model_index.json names, in one precision, and nothing else
that lies there.

Folders of real models hold the same weights several times over: a root single file, ONNX, OpenVINO,
Flax, both precisions. Beside them may lie what is nobody else's business. So nothing is taken but
what diffusers reads.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.storage.aside import put, remove
from distill.teachers.loading.locate import INDEX, TOLD, WEIGHTS, index_of, shards_in
from distill.teachers.loading.reading import BASE, home_of, lineage
from distill.teachers.loading.weights import read_weights, write_weights
from distill.terminal.progress import track

CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers', transformers' two
WORDS = (".json", ".txt", ".model", ".jinja")  # what tokenizers and processors are made of
VARIANTS = ("fp16", "bf16")  # tried where there are no weights without one
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*")  # they go with the weights


def copy_part(source: Path, target: Path, variant: str | None = None) -> None:
    """Write the part of a pipeline in folder `source` as `target`, its weights under their plain
    names.

    `variant` is of the weights that are wanted; where there are none of it, those without, and then
    any.
    """
    target.mkdir(parents=True)
    for name, file in _files(source, variant):
        shutil.copyfile(file, target / name)


def copy_pipeline(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Write the pipeline of folder `source` as `target`: what its index names, in `dtype` (None: as
    it is).

    `target` is the writer's own, and begun anew. Raises ValueError for values that a dtype cannot
    hold.
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
    put(target / INDEX, json.dumps(index, indent=2).encode() + b"\n")
    return target


def sampled_by(folder: Path, name: str, scheduler: Any) -> None:
    """Have the student in this folder step by the sampler of this name, as this scheduler does."""
    remove(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = index_of(str(folder))
    told = index.setdefault(TOLD, {})
    told["sampler"] = {**(told.get("sampler") or {}), "name": name}
    put(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def cast(folder: Path, dtype: str | None) -> None:
    """Keep the weights of this part in `dtype` from now on; None leaves them."""
    if dtype is None:
        return
    for file in sorted(folder.glob("*.safetensors")):
        state, _ = read_weights(file)
        write_weights(state, file, dtype=dtype)


def copy_terms(source: Path, target: Path) -> None:
    """Copy the files beside a pipeline's parts that say on which terms it may be used."""
    for pattern in TERMS:
        for file in source.glob(pattern):
            if file.is_file() and _inside(file, source):
                shutil.copyfile(file, target / file.name)


def _files(folder: Path, variant: str | None) -> Iterator[tuple[str, Path]]:
    """Name in the copy -> file, of all that is read of this part."""
    if (folder / CONFIG).is_file():  # a network
        yield CONFIG, folder / CONFIG
        extra = folder / "generation_config.json"
        if extra.is_file() and _inside(extra, folder):
            yield extra.name, extra
        yield from weights_of(folder, variant)
        return
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in WORDS and not file.name.startswith(".")
        if wanted and file.is_file() and _inside(file, folder):
            yield file.name, file


def weights_of(folder: Path, variant: str | None = None) -> list[tuple[str, Path]]:
    """Name in a copy -> file, of one set of weights in this folder: shards with the index that
    names them.
    """
    wanted = dict.fromkeys([variant, None, *VARIANTS, *_variants(folder)])
    for kind in WEIGHTS:
        for each in wanted:
            mark = f".{each}" if each else ""
            for stem in STEMS:
                if (file := folder / f"{stem}{mark}{kind}").is_file():
                    return [(f"{stem}{kind}", file)]
                if (index := folder / f"{stem}{kind}.index{mark}.json").is_file():
                    return [(f"{stem}{kind}.index.json", index), *_shards(index)]
    return []


def _shards(index: Path) -> list[tuple[str, Path]]:
    """The shards that an index names, under the names that it has for them."""
    return [(name, index.parent / name) for name in shards_in(index)]


def _variants(folder: Path) -> list[str]:
    """The variants of which there are weights: the middle of `model.ema.safetensors`."""
    names = (file.name.split(".") for file in sorted(folder.iterdir()) if file.suffix in WEIGHTS)
    return [name[1] for name in names if len(name) == 3 and name[0] in STEMS]


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file is of this folder, and no link out of it but into the store of the hub's
    cache.

    A link of a stranger's may point to anything; what is read as weights or configuration is
    followed all the same.
    """
    place = file.resolve()
    kept = [parent for parent in folder.absolute().parents if parent.name == "snapshots"]
    store = [parent.with_name("blobs") for parent in kept]
    return any(place.is_relative_to(root.resolve()) for root in (folder, *store))
