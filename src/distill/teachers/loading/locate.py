"""Where a pipeline or its weights are: a folder, one file, or the hub.

Nothing here imports torch or contacts the hub.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill.storage.bounded import MIB, check_header, is_number, mapping_of, too_large_error
from distill.storage.hub_settings import check_hub_settings
from distill.teachers import families
from distill.terminal.shown import shown

INDEX = "model_index.json"
BASE = "_base"  # key in a pipeline's index: a sibling folder with the parts that it lacks
STUDENT_INFO = "_distill"  # a student's entry in the index; diffusers ignores it
GENERATOR = ["distill.teachers.generator", "StyleGenerator"]  # the denoiser's, of a GAN
PART = re.compile(r"[A-Za-z_]\w*", re.ASCII)
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)  # C:/models does not match
WEIGHTS = (".safetensors", ".bin")  # the preferred first
MAX_TOKENIZER_BYTES = 256 * MIB  # ours: of a tokenizer's file; Sana's has 33 MiB
MAX_LAYERS = 1000  # ours; FLUX has 57 blocks
MAX_VOCABULARY = 2**31  # ids are integers of at least 32 bits
MAX_SIDE = 16_384  # ours: latents, or pixels, a side
LAYERS = re.compile(r"(^|_)(num_|n_)?(hidden_)?(layers|blocks)(_|$)")
# A path with such an end is a local file. No repository name ends so.
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yaml", ".yml", ".txt", ".csv")
FILES += (".tar", ".zip", ".gz", ".npy", ".npz", ".png", ".jpg", ".jpeg", ".webp", ".part")
# Usual names of local folders, which are not owners on the hub.
FOLDERS = ("runs", "evaluations", "outputs", "multirun", "models", "checkpoints", "data")
# Names of a LoRA in a folder: of a run, of diffusers, of peft.
LORAS = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
MAX_NAMES = 1000  # of a folder, searched for a similar name
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
FEW_STEP_SCHEDULERS = {"LCMScheduler", "ShiftedLCMScheduler", "SCMScheduler"}
SINGLE = (".safetensors", *PICKLED)  # ends of a pipeline in one file


def is_repository(name: str) -> bool:
    """Whether this has the form `owner/repository`, which a path may have too."""
    return HUB_ID.fullmatch(name) is not None


def is_local(path: str) -> bool:
    """Whether this must be a path: by its form, or because a local folder has the name of its first
    part.

    The hub is not contacted for such a name, so a mistyped path does not load another user's
    repository.
    """
    first = re.split(r"[\\/]", path, maxsplit=1)[0]
    looks = path.startswith((".", "/", "~")) or "\\" in path or re.match("[A-Za-z]:", path)
    named = path.lower().endswith(FILES) or first in FOLDERS
    return bool(looks) or named or (bool(first) and Path(first).is_dir())


def is_hub_id(path: str) -> bool:
    """Whether this has the form `owner/repository` and is not a path."""
    return is_repository(path) and not is_local(path)


def near(path: str) -> str:
    """` (did you mean ...?)` with the most similar existing name for a path that does not exist; or
    "".
    """
    place, missing = Path(path), ""
    while not place.exists() and place != place.parent:
        place, missing = place.parent, place.name
    try:
        names = sorted(os.listdir(place)) if missing and place.is_dir() else []
    except OSError:
        return ""
    close = difflib.get_close_matches(missing, names[:MAX_NAMES], n=1)
    return f" (did you mean {shown(place / close[0])}?)" if close else ""


def in_repository(path: str) -> bool:
    """Whether this has the form `owner/repository/file`."""
    owner, name, inside = [*path.split("/", 2), "", ""][:3]
    return bool(inside) and is_hub_id(f"{owner}/{name}")


def no_file(path: str, key: str) -> FileNotFoundError:
    """The error for a file that does not exist; `key` is the setting."""
    return FileNotFoundError(
        f"{key}={path}: no such file{near(path)}; give one, or owner/repository/file of the hub"
    )


def check_weights(path: str, key: str = "teacher.weights") -> None:
    """Raise FileNotFoundError for a file that does not exist and has not the form of one on the
    hub.
    """
    if not Path(path).is_file() and not in_repository(path):
        raise no_file(path, key)


def lora_in(path: str) -> str:
    """The file of a LoRA in this folder: a run's, or as diffusers or peft name it.

    `path` itself for anything else. Raises FileNotFoundError for a folder without one.
    """
    if not Path(path).is_dir():
        return path
    found = next((name for name in LORAS if (Path(path) / name).is_file()), None)
    if found is None:
        what = f"holds no {', '.join(LORAS)}"
        raise FileNotFoundError(f"lora={path}: {what}; give the file of a LoRA")
    return str(Path(path) / found)


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a LoRA."""
    return any("lora" in name for name in names)


def no_folder(path: str, key: str) -> FileNotFoundError:
    """The error for a folder that does not exist and is no hub id; `key` is the setting."""
    what = (
        "a folder of diffusers' layout" if key == "teacher.vae" else "a diffusers pipeline folder"
    )
    return FileNotFoundError(f"{key}={path}: no such folder{near(path)}; give {what} or a hub id")


def check_pipeline(path: str, key: str = "teacher.path") -> None:
    """Raise FileNotFoundError for a pipeline that does not exist and has not the form of
    a hub id.
    """
    if Path(path).suffix in SINGLE:
        check_weights(path, key)
    elif Path(path).exists():
        index_of(path, key)
    elif not is_hub_id(path):
        raise no_folder(path, key)


def autoencoder_in(folder: Path, path: str) -> Path:
    """The autoencoder in a folder of one, or of a pipeline with one; `path` is the value of the
    setting.
    """
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    what = "no diffusers autoencoder is here (a folder with config.json, or one with vae/ in it)"
    raise FileNotFoundError(f"teacher.vae={path}: {what}; give one, or a hub id")


def check_autoencoder(path: str) -> None:
    """Raise FileNotFoundError for an autoencoder that does not exist and has not the form of a hub
    id.
    """
    if Path(path).exists():
        autoencoder_in(Path(path), path)
    elif not is_hub_id(path):
        raise no_folder(path, "teacher.vae")


def index_of(path: str, key: str = "teacher.path") -> dict:
    """The index of a pipeline folder. Raises FileNotFoundError, naming `key`, if it has none.

    Raises ValueError for a malformed part: its name becomes that of a folder, which must be inside.
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
            raise ValueError(f"{key}={path}: {what}, which diffusers does not write; fetch it anew")
    return index


def is_distilled(folder: Path) -> bool:
    """Whether a pipeline folder is of few steps: `sampling.distilled` by its files alone.

    True for a folder whose scheduler has no settings: loading it gives the error.
    """
    index, settings = index_of(str(folder)), folder / "scheduler" / "scheduler_config.json"
    info = index.get(STUDENT_INFO)
    sampler = info.get("sampler") if isinstance(info, dict) else None
    if isinstance(sampler, dict) and isinstance(sampler.get("name"), str):
        return True
    if not settings.is_file():
        return True
    return is_few_step({(index.get("scheduler") or ["", ""])[1]}, mapping_of(settings))


def is_few_step(scheduler: set[str], config: Mapping[str, Any]) -> bool:
    """Whether a scheduler with these names, its class's and its bases', samples in few steps."""
    ancestral = "EulerAncestralDiscreteScheduler" in scheduler
    trailing = config.get("timestep_spacing") == "trailing"
    few = bool(scheduler & FEW_STEP_SCHEDULERS) or bool(config.get("stochastic_sampling"))
    return few or (ancestral and trailing)


def check_distilled(folder: Path, where: str) -> None:
    """Raise ValueError, starting with `where`, for a pipeline folder that is not of few steps."""
    if not is_distilled(folder):
        what = "was not distilled to few steps, and has no sampler to export"
        raise ValueError(f"{where} {what}; give a student")


def shards_in(index: Path) -> list[str]:
    """The weight files that an index of shards names, sorted.

    Raises ValueError for a file that is not in the same folder.
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
    """Raise ValueError, starting with `where`, for files of a part with unbounded values or foreign
    links.
    """
    try:
        _check_files(folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_files(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        check_header(file)
    for file in sorted(folder.glob("*.json")):
        if ".index." in file.name:
            shards_in(file)
        elif file.name.endswith("config.json"):
            said = mapping_of(file)
            check_hub_settings(said, file)
            _check_layers(said, file)
            if file.name == "config.json":
                _check_numbers(said, file)
        elif file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise too_large_error(file, file.stat().st_size, MAX_TOKENIZER_BYTES)


def _check_numbers(said: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for numbers of a network that are invalid or too large for any tensor."""
    for key, value in said.items():
        each = value if isinstance(value, list) else [value]
        if value is None or not each:
            continue
        if key.endswith("_token_id"):
            fits = all(type(x) is int and -1 <= x < MAX_VOCABULARY for x in each)
            expected = f"a whole number below {MAX_VOCABULARY}"
        elif key == "sample_size":
            fits = all(is_number(x) and 0 < x <= MAX_SIDE for x in each)
            expected = f"a side, {MAX_SIDE} at most"
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
    """Raise ValueError for a network with too many layers to be built."""
    for key, value in said.items():
        each = value if isinstance(value, list) else [value]
        many = [x for x in each if isinstance(x, int) and x > MAX_LAYERS]
        if many and LAYERS.search(key):
            what = f"{key}={shown(many[0], 40)}, and at most {MAX_LAYERS} are built"
            raise ValueError(f"{file}: {what}; fetch it anew")


def check_kind(found: str | None, expected: str, path: str, key: str = "teacher.path") -> None:
    """Raise ValueError, naming `key`, for a pipeline of another class than the teacher's."""
    if found != expected:
        what = f"holds a {found}, but this teacher reads a {expected}"
        raise ValueError(f"{key}={path} {what}; choose another teacher=")


def pipeline_folder(run: Path) -> Path:
    """The student's folder of a run folder; any other folder is returned."""
    return run / "student" if (run / "student").is_dir() else run


def lineage(folder: Path) -> list[Path]:
    """A pipeline folder and its bases: the folders that hold the parts which it lacks.

    A base is named by its folder name alone and is a sibling, so an index cannot point elsewhere.
    """
    folders = [folder]
    while (folders[-1] / INDEX).is_file():
        name = mapping_of(folders[-1] / INDEX).get(BASE)
        if name is None:
            break
        base = folders[-1].parent / str(name)
        if (
            name in ("", "..")
            or Path(str(name)).name != name
            or base in folders
            or not base.is_dir()
        ):
            what = f"{BASE} is {name!r}, and must be the name of another folder beside it"
            raise ValueError(f"{folders[-1]}/{INDEX}: {what}; fetch both anew")
        folders.append(base)
    return folders


def home_of(folder: Path, part: str) -> str:
    """The folder with this part of a pipeline: itself, or the first of its bases that has it."""
    return str(next((home for home in lineage(folder) if (home / part).is_dir()), folder))


def denoiser_part(folder: Path) -> str:
    """Name of the part of the pipeline in this folder that is the denoiser."""
    return "transformer" if (folder / "transformer").is_dir() else "unet"


def holds_generator(path: str) -> bool:
    """Whether the pipeline or run in this folder has a GAN's generator in place of a denoiser."""
    file = pipeline_folder(Path(path)) / INDEX
    return file.is_file() and mapping_of(file).get("transformer") == GENERATOR


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
    """Raise ValueError or FileNotFoundError for a folder without a supported pipeline that is no
    hub id.

    `path` is the value of `key`, for errors.
    """
    file = Path(folder) / INDEX
    if file.is_file():
        family_of(str(index_of(folder, key).get("_class_name")), path, key)
    elif Path(folder).exists() or not is_hub_id(path):
        raise no_model(path, key)


def no_model(path: str, key: str = "run") -> FileNotFoundError:
    """The error for a place without a pipeline; `key` is the setting."""
    return FileNotFoundError(
        f"{key}={path}: neither a finished run (with a student/) nor a diffusers pipeline folder"
        f"{near(path)}"
    )


def family_of(kind: str, path: str, key: str = "run") -> str:
    """The teacher class for a pipeline of this class.

    Raises ValueError, naming `key`, for an unknown one.
    """
    reader = families.reader_of(kind)
    if reader is None:
        raise families.unknown(kind, path, key)
    return reader
