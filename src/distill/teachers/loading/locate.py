"""Where a pipeline or its weights lie: a folder, one file, or the hub.

Nothing here imports torch or asks the hub.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.storage.bounded import MIB, is_number, mapping_of, too_large
from distill.storage.elsewhere import check_elsewhere
from distill.terminal.shown import shown

INDEX = "model_index.json"
TOLD = "_distill"  # in a student's: what it is told besides, which diffusers leaves alone
PART = re.compile(r"[A-Za-z_]\w*", re.ASCII)
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)  # which C:/models is not
WEIGHTS = (".safetensors", ".bin")  # the better first
MOST_WORDS = 256 * MIB  # ours: bytes of a tokenizer's file; that of Sana has 33 MiB
MOST_LAYERS = 1000  # ours; FLUX has 57 blocks
MOST_TOKENS = 2**31  # of a vocabulary: ids are kept as integers of at least 32 bits
MOST_SIDE = 16_384  # ours: latents, or pixels, a side
LAYERS = re.compile(r"(^|_)(num_|n_)?(hidden_)?(layers|blocks)(_|$)")
# A path of such an end is of a file here. No name of a repository ends so.
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yaml", ".yml", ".txt", ".csv")
FILES += (".tar", ".zip", ".gz", ".npy", ".npz", ".png", ".jpg", ".jpeg", ".webp", ".part")
# What this program and its users call folders: nobody's name on the hub that anybody means.
FOLDERS = ("runs", "evaluations", "outputs", "multirun", "models", "checkpoints", "data")
MOST_NAMES = 1000  # of a folder, among which one of nearly this name is looked for
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SINGLE = (".safetensors", *PICKLED)  # ends of a whole pipeline in one file
FAMILIES = {  # class of a pipeline -> what reads it
    "FluxPipeline": "distill.teachers.flux.Flux",
    "PixArtSigmaPipeline": "distill.teachers.pixart.PixArtSigma",
    "SanaPipeline": "distill.teachers.sana.Sana",
    "StableDiffusion3Pipeline": "distill.teachers.sd3.SD3",
    "StableDiffusionPipeline": "distill.teachers.sd.SD",
    "StableDiffusionXLPipeline": "distill.teachers.sdxl.SDXL",
}

# Those whose image-to-image pipelines make more steps of a picture: see `limits.steps_left`.
ROUNDING_UP = {"FluxPipeline", "StableDiffusion3Pipeline"}

# Options of a teacher on which it hangs what its captions are embedded to.
TELLING = ("clip_skip", "instruction", "length")


def telling(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of a teacher that are given, from its configuration."""
    return {key: teacher[key] for key in TELLING if teacher.get(key) is not None}


def is_repository(name: str) -> bool:
    """Whether this is written as `owner/repository`, which a path may be as well."""
    return HUB_ID.fullmatch(name) is not None


def is_local(path: str) -> bool:
    """Whether this can only be meant for a path: by its look, or since a folder here has the name
    of its first part.

    Of that the hub is never asked: who mistypes a path does not want a stranger's repository of
    this name.
    """
    first = re.split(r"[\\/]", path, maxsplit=1)[0]
    looks = path.startswith((".", "/", "~")) or "\\" in path or re.match("[A-Za-z]:", path)
    named = path.lower().endswith(FILES) or first in FOLDERS
    return bool(looks) or named or (bool(first) and Path(first).is_dir())


def is_hub_id(path: str) -> bool:
    """Whether `owner/repository` is what this looks like, and not a path."""
    return is_repository(path) and not is_local(path)


def near(path: str) -> str:
    """` (did you mean ...?)` for the most alike of what is there, where a path leads nowhere; or
    nothing.
    """
    place, missing = Path(path), ""
    while not place.exists() and place != place.parent:
        place, missing = place.parent, place.name
    try:
        names = sorted(os.listdir(place)) if missing and place.is_dir() else []
    except OSError:
        return ""
    close = difflib.get_close_matches(missing, names[:MOST_NAMES], n=1)
    return f" (did you mean {shown(place / close[0])}?)" if close else ""


def in_repository(path: str) -> bool:
    """Whether `owner/repository/file` is what this looks like."""
    owner, name, inside = [*path.split("/", 2), "", ""][:3]
    return bool(inside) and is_hub_id(f"{owner}/{name}")


def no_file(path: str, key: str) -> FileNotFoundError:
    """What is said of a file that is not there; `key` is what was given."""
    return FileNotFoundError(
        f"{key}={path}: no such file{near(path)}; give one, or owner/repository/file of the hub"
    )


def check_weights(path: str, key: str = "teacher.weights") -> None:
    """Raise FileNotFoundError for a file that is neither here nor can be one of the hub."""
    if not Path(path).is_file() and not in_repository(path):
        raise no_file(path, key)


def no_folder(path: str, key: str) -> FileNotFoundError:
    """What is said of a folder that is not there and no hub id; `key` is what was given."""
    what = (
        "a folder of diffusers' layout" if key == "teacher.vae" else "a diffusers pipeline folder"
    )
    return FileNotFoundError(f"{key}={path}: no such folder{near(path)}; give {what} or a hub id")


def check_pipeline(path: str, key: str = "teacher.path") -> None:
    """Raise FileNotFoundError for a pipeline that is neither here nor can be one of the hub."""
    if Path(path).suffix in SINGLE:
        check_weights(path, key)
    elif Path(path).exists():
        index_of(path, key)
    elif not is_hub_id(path):
        raise no_folder(path, key)


def autoencoder_in(folder: Path, path: str) -> Path:
    """Where the autoencoder lies in a folder of one, or of a pipeline with one.

    `path` is what was given.
    """
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    what = (
        "no autoencoder of diffusers lies here (a folder with config.json, or one with vae/ in it)"
    )
    raise FileNotFoundError(f"teacher.vae={path}: {what}; give one, or a hub id")


def check_autoencoder(path: str) -> None:
    """Raise FileNotFoundError for an autoencoder that is neither here nor can be one of the hub."""
    if Path(path).exists():
        autoencoder_in(Path(path), path)
    elif not is_hub_id(path):
        raise no_folder(path, "teacher.vae")


def index_of(path: str, key: str = "teacher.path") -> dict:
    """What a pipeline folder says that it holds. Raises FileNotFoundError, naming `key`, if it is
    none.

    And ValueError for a part that is not written as one: its name becomes that of a folder, which
    must lie inside.
    """
    file = Path(path) / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"{key}={path}: not a diffusers pipeline folder (it has no {INDEX})"
        )
    index = mapping_of(file)
    for name, pair in index.items():
        if not isinstance(pair, list):
            continue
        said = len(pair) > 2 or (pair and all(isinstance(word, str | None) for word in pair))
        if not PART.fullmatch(name) or not said:
            what = f"its {INDEX} names a part {shown(name, 60)} as {shown(pair, 60)}"
            raise ValueError(f"{key}={path}: {what}, which is none of diffusers'; fetch it anew")
    return index


def shards_in(index: Path) -> list[str]:
    """The files of weights that an index of shards names, sorted.

    Raises ValueError for one that is not beside it.
    """
    named = mapping_of(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index}: names no weights; fetch it anew")
    names = {str(name) for name in named.values()}
    for name in sorted(names):
        if not name.endswith(WEIGHTS) or Path(name).name != name or "\\" in name:
            what = f"names {shown(name, 80)}, and must name files of weights beside it"
            raise ValueError(f"{index}: {what}; fetch it anew")
    return sorted(names)


def check_part(folder: Path, where: str) -> None:
    """Raise ValueError, beginning with `where`, for files of a part that no model has: without
    bounds, or of others.
    """
    try:
        _check_files(folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_files(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        if ".index." in file.name:
            shards_in(file)
        elif file.name.endswith("config.json"):
            said = mapping_of(file)
            check_elsewhere(said, file)
            _check_layers(said, file)
            if file.name == "config.json":
                _check_numbers(said, file)
        elif file.stat().st_size > MOST_WORDS:
            raise too_large(file, file.stat().st_size, MOST_WORDS)


def _check_numbers(said: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for numbers of a network that are none, or that no tensor has room for."""
    for key, value in said.items():
        each = value if isinstance(value, list) else [value]
        if value is None or not each:
            continue
        if key.endswith("_token_id"):
            fits = all(type(x) is int and -1 <= x < MOST_TOKENS for x in each)
            expected = f"a whole number below {MOST_TOKENS}"
        elif key == "sample_size":
            fits = all(is_number(x) and 0 < x <= MOST_SIDE for x in each)
            expected = f"a side, {MOST_SIDE} at most"
        elif key in ("scaling_factor", "shift_factor"):
            fits = is_number(value) and (value != 0 or key == "shift_factor")
            expected = "a number" if key == "shift_factor" else "a number other than 0"
        elif key in ("latents_mean", "latents_std"):
            fits = isinstance(value, list) and all(map(is_number, each))
            expected = "a list of numbers"
        else:
            continue
        if not fits:
            what = f"{key}={shown(value, 60)}, which must be {expected}"
            raise ValueError(f"{file}: {what}; fetch it anew")


def _check_layers(said: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for a network of so many layers that to build it would not end."""
    for key, value in said.items():
        each = value if isinstance(value, list) else [value]
        many = [x for x in each if isinstance(x, int) and x > MOST_LAYERS]
        if many and LAYERS.search(key):
            what = f"{key}={shown(many[0], 40)}, and at most {MOST_LAYERS} are built"
            raise ValueError(f"{file}: {what}; fetch it anew")


def check_kind(found: str | None, expected: str, path: str, key: str = "teacher.path") -> None:
    """Raise ValueError, naming `key`, for a pipeline of another class than the teacher reads."""
    if found != expected:
        what = f"holds a {found}, but this teacher reads a {expected}"
        raise ValueError(f"{key}={path} {what}; choose another teacher=")


def pipeline_folder(run: Path) -> Path:
    """The student of a run folder; any other folder itself."""
    return run / "student" if (run / "student").is_dir() else run


def denoiser_part(folder: Path) -> str:
    """Which part of the pipeline in this folder denoises."""
    return "transformer" if (folder / "transformer").is_dir() else "unet"


def denoiser_in(path: str, key: str, or_else: str = "must be") -> Path:
    """The denoiser in a run or pipeline folder.

    Raises ValueError, naming `key`, if there is none.
    """
    folder = pipeline_folder(Path(path))
    part = folder / denoiser_part(folder)
    if not (part / "config.json").is_file():
        what = f"{or_else} a run or pipeline folder with a unet/ or transformer/ in it"
        raise ValueError(f"{key}={path}: {what}{near(path)}")
    return part


def check_model(folder: str, path: str, key: str = "run") -> None:
    """Raise ValueError or FileNotFoundError for a folder without a pipeline that we read, unless it
    may be a hub id.

    `path` is what `key` was given, and an error names.
    """
    file = Path(folder) / INDEX
    if file.is_file():
        family_of(str(index_of(folder, key).get("_class_name")), path, key)
    elif Path(folder).exists() or not is_hub_id(path):
        raise no_model(path, key)


def no_model(path: str, key: str = "run") -> FileNotFoundError:
    """What is said of a place without a pipeline; `key` is what was given."""
    return FileNotFoundError(
        f"{key}={path}: neither a finished run (with a student/) nor a diffusers pipeline folder"
        f"{near(path)}"
    )


def family_of(kind: str, path: str, key: str = "run") -> str:
    """What reads a pipeline of this class.

    Raises ValueError, naming `key`, for one that we do not know.
    """
    if kind not in FAMILIES:
        raise ValueError(f"{key}={path} holds a {kind}; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
