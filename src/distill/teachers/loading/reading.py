"""Loading a diffusers pipeline: no tensor is made up, and no code in it runs."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from distill.core.limits import check_dtype
from distill.machine.faults import first_line, quiet_logging
from distill.machine.meta_device import is_shapes_only
from distill.storage.bounded import mapping_of
from distill.storage.hub_settings import check_folder
from distill.storage.loaded_weights import check_all_loaded, check_finite
from distill.teachers.families import Family
from distill.teachers.generator import StyleGenerator
from distill.teachers.loading.locate import (
    GENERATOR,
    INDEX,
    PICKLED,
    STUDENT_INFO,
    check_kind,
    check_part,
    home_of,
    index_of,
    is_hub_id,
    lineage,
    no_folder,
    no_model,
)
from distill.teachers.loading.settings import (
    check_settings,
    configurations,
    lacking,
    refuse_quantised,
)
from distill.teachers.loading.shapes_only import without_weights

OURS = "distill.teachers.schedulers"  # module of these schedulers
SCHEDULERS = ((OURS, "FlowScheduler"), (OURS, "ShiftedLCMScheduler"))
HUB = {  # an error of the hub, specific ones first -> its meaning
    GatedRepoError: "it is gated: accept its licence on its page, then log in with `hf auth login`",
    RepositoryNotFoundError: "there is no such repository, or it is private",
    RevisionNotFoundError: "it has no such revision",
}
VARIANT = re.compile(r"^[^.]+\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")  # of a file name
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


@quiet_logging()
def read_pipeline(
    family: Family,
    path: str,
    *,
    dtype: str,
    use_safetensors: bool,
    without: Sequence[str] = (),
    deferred: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    **version: str | None,
) -> Any:
    """The pipeline of `family` at `path`, a folder or hub id, without the parts `without`.

    `given` has parts that were read from elsewhere.

    `version` is revision and variant on the hub. Networks whose names start with one of `deferred`
    are not loaded: the pipeline's attribute `deferred` maps them to functions that load them. Each
    network is loaded by itself, because a pipeline would only warn of missing tensors and
    initialise them at random. Raises FileNotFoundError and ValueError that say what is wrong.
    """
    precision = dtype_of(dtype)
    kind = family.kind
    parts: dict[str, Any] = {**dict.fromkeys(without), **(given or {})}
    later: dict[str, Any] = {}
    files = {"use_safetensors": use_safetensors or None, "variant": version["variant"]}
    if not Path(path).exists():
        path = download(
            "teacher.path", path, kind.download, revision=version["revision"], **files, **parts
        )
    classes = pipeline_classes(path, kind.__name__, without)
    check_settings(family, configurations(path), f"teacher.path={path}")
    check_parts_exist(path, classes, family, deferred)
    for folder in lineage(Path(path)):
        check_folder(folder, f"teacher.path={path}")
    for name, network in classes.items():
        if given and name in given:
            continue
        home = home_of(Path(path), name)
        check_part(Path(home, name), f"teacher.path={path}")
        if network is NoneType:
            parts[name] = None  # some pipelines need the name, as of SD3's third text encoder
        elif isinstance(network, type) and issubclass(network, nn.Module):
            read = partial(read_network, network, home, name, dtype=precision, **files)
            if name.startswith(tuple(deferred)):
                parts[name], later[name] = None, read
            else:
                parts[name] = read()
        elif home != str(path):  # a tokenizer, which diffusers would search in `path`
            parts[name] = network.from_pretrained(home, subfolder=name)
    try:
        pipeline = kind.from_pretrained(path, use_safetensors=use_safetensors or None, **parts)
    except Exception as error:  # schedulers and tokenizers may raise anything
        what = f"does not load as a {kind.__name__} ({first_line(error)})"
        raise ValueError(f"teacher.path={path} {what}; fetch it anew") from None
    pipeline.deferred = later
    return pipeline


def check_parts_exist(
    path: str, classes: Mapping[str, Any], family: Family, deferred: Sequence[str]
) -> None:
    """Raise FileNotFoundError for a missing part that the index names, ValueError for a quantised
    one.

    No part is loaded for it. Transformers would make up a missing tokenizer. Networks whose names
    start with one of `deferred` may be missing.
    """
    for name, found in classes.items():
        place = Path(home_of(Path(path), name), name)
        network = isinstance(found, type) and issubclass(found, nn.Module)
        if found is NoneType or (network and name.startswith(tuple(deferred))):
            continue
        if not place.is_dir() or (network and not (place / "config.json").is_file()):
            what = "is missing or has no config.json" if network else "is missing"
            how = lacking(family, name)
            raise FileNotFoundError(f"teacher.path={path}: its {name}/ {what}; {how}")
        if network:
            said = mapping_of(place / "config.json")
            refuse_quantised(said, f"teacher.path={path}: its {name}/")


def dtype_of(name: str) -> torch.dtype:
    check_dtype(name, "teacher.dtype")
    return getattr(torch, name)


def class_of(path: str, key: str = "run") -> str:
    """The class of the pipeline in a folder or of a hub id.

    Raises FileNotFoundError, or ValueError if it has none.
    """
    file = Path(path) / INDEX
    if not file.is_file() and not Path(path).exists() and is_hub_id(path):
        try:
            file = Path(hf_hub_download(path, file.name))
        except (OSError, ValueError) as error:
            raise not_fetched(
                f"{key}={path}", error, "no such folder, and cannot be fetched from the hub"
            ) from None
    if not file.is_file():
        raise no_model(path)
    return str(mapping_of(file).get("_class_name"))


def student_info(path: str) -> dict[str, Any]:
    """A student's entry in its index, in a folder or of a hub id: `options`, and `sampler` if it
    has one.

    The index may be from someone else: only numbers, a name and a list of numbers are taken from
    it.
    """
    file = Path(path) / INDEX
    if not file.is_file() and is_hub_id(path):  # fetched by `class_of`
        file = Path(hf_hub_download(path, file.name))
    said = mapping_of(file).get(STUDENT_INFO) if file.is_file() else None
    said = said if isinstance(said, dict) else {}
    options, sampler = said.get("options"), said.get("sampler")
    options = options if isinstance(options, dict) else {}
    sampler = sampler if isinstance(sampler, dict) else {}
    if not isinstance(sampler.get("name"), str):
        return {"options": _numbers(options), "sampler": {}}
    levels = sampler.get("levels")
    listed = isinstance(levels, list) and all(isinstance(x, int | float) for x in levels)
    kept = {"name": sampler["name"], "levels": levels if listed and levels else None}
    if type(sampler.get("patch")) is int and sampler["patch"] > 0:
        kept["patch"] = sampler["patch"]
    return {"options": _numbers(options), "sampler": kept}


def _numbers(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are booleans or positive numbers; all saved options are."""
    return {
        key: value
        for key, value in options.items()
        if isinstance(value, bool) or (isinstance(value, int | float) and value > 0)
    }


def download(key: str, path: str, fetch: Callable[..., str], **options: Any) -> str:
    """The local folder of a hub pipeline, after `fetch` downloaded it; `key` is the setting, for
    errors.
    """
    if not is_hub_id(path):
        raise no_folder(path, key)
    try:
        return fetch(path, **options)
    except (OSError, ValueError) as error:
        raise not_fetched(f"{key}={path}", error) from None


def pipeline_classes(
    path: str, expected: str, without: Sequence[str], key: str = "teacher.path"
) -> dict[str, Any]:
    """Part -> class from the index of an `expected` pipeline; NoneType for an empty part.

    Parts in `without` are left out. Raises ValueError for another pipeline, and for code of
    libraries other than diffusers and transformers. Some parts are in the pipeline's own package
    in diffusers, as Kolors' text encoder. `key` is the setting, for errors.
    """
    index, classes = index_of(path, key), {}
    check_kind(index.get("_class_name"), expected, path, key)
    for name, pair in index.items():
        if name in without or not isinstance(pair, list) or len(pair) != 2:
            continue
        if pair[0] is None:
            classes[name] = NoneType
            continue
        if tuple(pair) in SCHEDULERS:
            continue
        if pair == GENERATOR:
            classes[name] = StyleGenerator
            continue
        library, found = pair
        module = LIBRARIES.get(library) or own_package(library, expected)
        if module is None:
            raise ValueError(
                f"{key}={path}: {name} is code of {library!r}, which this teacher does not read"
            )
        classes[name] = getattr(module, found, None)
    return classes


def own_package(library: str, pipeline: str) -> ModuleType | None:
    """The package of this pipeline in diffusers, if it has the name `library`."""
    package, _, _ = getattr(getattr(diffusers, pipeline, None), "__module__", "").rpartition(".")
    return sys.modules[package] if package == f"diffusers.pipelines.{library}" else None


@quiet_logging()
def read_network(
    network: type, path: str, part: str, *, key: str = "teacher.path", **options: Any
) -> nn.Module:
    """The network, with all tensors from the files. `key` is the setting, for errors."""
    folder = Path(path) / part
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{key}={path}: its {part}/ is missing or has no config.json; fetch it anew"
        )
    check_part(folder, f"{key}={path}")
    refuse_quantised(mapping_of(folder / "config.json"), f"{key}={path}: its {part}/")
    if is_shapes_only():
        return without_weights(network, folder, options["dtype"])
    options["variant"] = variant_of(folder, options["variant"], key=f"{key}={path}")
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if options["use_safetensors"] and pickled and not any(folder.glob("*.safetensors")):
        what = f"only pickled weights ({pickled[0]}), which can run code when read"
        advice = "use safetensors, or if you trust their maker add teacher.use_safetensors=false"
        raise ValueError(f"{key}={path}: {part}/ has {what}; {advice}")
    if issubclass(network, transformers.PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # else it does not name tensors of other shapes
    try:
        model, report = network.from_pretrained(
            path, subfolder=part, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files raise nearly anything
        what = first_line(error).partition(". ")[0]
        raise ValueError(f"{key}={path}: {part}/ does not load ({what}); fetch it anew") from None
    check_all_loaded(report, f"{key}={path}: {part}/", network.__name__)
    check_finite(model, f"{key}={path}: {part}/")
    return model


def variant_of(folder: Path, asked: str | None, key: str) -> str | None:
    """The variant of this network's weights to load; None for plain weights.

    A family's configuration names the variant on the hub. A folder with plain weights alone is
    loaded with these. Raises ValueError, starting with `key`, if several variants are possible.
    """
    if asked is None:
        return only_variant(folder, key)
    files = [file.name for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin"))]
    found = {match[1] if (match := VARIANT.search(name)) else None for name in files}
    return asked if asked in found or None not in found else None


def only_variant(folder: Path, key: str) -> str | None:
    """The only variant of this network's weights; None where there are plain ones.

    Raises ValueError, starting with `key`, if there are several.
    """
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    names = [file.name for file in files]
    found = {match[1] if (match := VARIANT.search(name)) else None for name in names}
    if None in found or not found:
        return None
    if len(found) > 1:
        what = f"{folder.name}/ has weights of variants alone"
        ways = " or ".join(f"teacher.variant={name}" for name in sorted(found, key=str))
        raise ValueError(f"{key}: {what}; choose one by {ways}")
    return found.pop()


def check_without(kind: type, without: Sequence[str]) -> None:
    """Raise ValueError for a part in `without` that pipelines of this class lack, and for
    a string.
    """
    parts, _ = kind._get_signature_keys(kind)  # type: ignore[attr-defined]
    if isinstance(without, str):
        what = f"must be a list of {', '.join(sorted(parts))}"
        raise ValueError(f"teacher.without={without}: {what}")
    if wrong := [name for name in without if name not in parts]:
        said = f"teacher.without=[{','.join(without)}]: a {kind.__name__} has no {wrong[0]}"
        raise ValueError(f"{said}; must be a list of {', '.join(sorted(parts))}")


def check_parts(path: str, parts: Mapping[str, Any]) -> None:
    """Raise ValueError for a tokenizer with more tokens than its text encoder has embeddings."""
    for name, encoder in parts.items():
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if not name.startswith("text_encoder") or encoder is None or tokenizer is None:
            continue
        if not hasattr(tokenizer, "__len__"):  # a processor has its tokenizer as a part
            tokenizer = tokenizer.tokenizer
        if len(tokenizer) > (known := encoder.get_input_embeddings().num_embeddings):
            what = (
                f"{name.replace('text_encoder', 'tokenizer')}/ has {len(tokenizer)} tokens and"
                f" {name}/ has embeddings for {known}"
            )
            raise ValueError(
                f"teacher.path={path}: {what}; they are not of one model: fetch both anew"
            )


def not_fetched(setting: str, error: BaseException, what: str = "cannot be fetched") -> ValueError:
    """The error for a failed download, with its cause: diffusers hides the hub's own error."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    meanings = (
        meaning for cause in causes for kind, meaning in HUB.items() if isinstance(cause, kind)
    )
    why = next(meanings, first_line(error))
    return ValueError(f"{setting}: {what} ({why}); check the name, the network and its licence")


def read_quietly() -> None:
    """Disable the loading bars of diffusers and transformers."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
