"""LoRA files: a run's own adapters, or the nearest of a rank to what a student has learnt.

Whatever alpha a run had, it is multiplied into B here, so that a reader that knows nothing of alpha
is right as well.
"""

from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor, nn

from distill.exporting import NAMINGS
from distill.storage.bounded import mapping_of
from distill.students import states
from distill.teachers.loading.locate import index_of
from distill.teachers.loading.weights import read_weights, write_weights
from distill.terminal.progress import track

# A matrix whose smaller side is more than EXACT times rank + MORE is projected to so many columns
# at random; PASSES over it sharpen them. What that costs is measured in tests/test_low_rank.py.
EXACT, MORE, PASSES = 4, 16, 2
# Class of a pipeline -> kohya's word for its base model, and the model specification's for its
# architecture.
VERSIONS = {
    "StableDiffusionXLPipeline": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
VERSION_1 = ("sd_v1", "stable-diffusion-v1")
VERSION_2 = ("sd_v2", "stable-diffusion-v2-512")


def save_lora(
    factors: dict[str, Tensor],
    file: Path,
    *,
    part: str,
    naming: str = "diffusers",
    dtype: str | None = None,
    about: dict[str, str] | None = None,
) -> Path:
    """Write `<layer>.lora_A.weight` and `<layer>.lora_B.weight` of a `unet` or `transformer` for
    other programs.

    `about` is what else the file says of itself, in kohya's and the model specification's words:
    see `about`. Raises ValueError for a naming that there is not, or not for this network.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming={naming}: must be {' or '.join(NAMINGS)}")
    state = {f"{part}.{name}": value for name, value in factors.items()}
    if naming == "kohya":
        if part != "unet":
            raise ValueError(
                "naming=kohya: is for UNets; of a transformer ComfyUI and diffusers read"
                " naming=diffusers"
            )
        state = convert_state_dict_to_kohya(state)  # with the rank for alpha
    rank = next((len(value) for name, value in factors.items() if ".lora_A." in name), 0)
    said = dict(about or {})
    if naming == "kohya":
        said |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
        said |= {"ss_network_alpha": str(float(rank))}
    return write_weights(state, file, dtype=dtype, words=said)


def about(folder: Path) -> dict[str, str]:
    """What a LoRA of the pipeline in this folder says that it is for: nothing where that is not
    known for sure.
    """
    kind = str(index_of(str(folder))["_class_name"])
    scheduler = folder / "scheduler" / "scheduler_config.json"
    said = mapping_of(scheduler) if scheduler.is_file() else {}
    version = VERSIONS.get(kind)
    if kind == "StableDiffusionPipeline":
        part = mapping_of(folder / "unet" / "config.json")
        version = {768: VERSION_1, 1024: VERSION_2}.get(part["cross_attention_dim"])
    if version is None:
        return {}
    base, architecture = version
    predicts_v = said.get("prediction_type") == "v_prediction"
    if kind == "StableDiffusionPipeline" and predicts_v:
        base, architecture = f"{base}_v", architecture.replace("-512", "-768-v")
    return {
        "ss_base_model_version": base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": "few-step student",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }


def read_lora(file: Path) -> dict[str, Tensor]:
    """What `save_lora` was given, of a file in diffusers' naming."""
    state, _ = read_weights(file)
    return {name.partition(".")[2]: value for name, value in state.items()}


@torch.no_grad()
def difference(student: nn.Module, base: nn.Module, rank: int) -> tuple[dict[str, Tensor], float]:
    """Factors of student minus base, layer by layer the nearest of this rank, and their share of
    its square in [0, 1].

    Linear layers and convolutions alone have such factors. All get the same rank, if need be with
    zeros: readers take one for all. Raises ValueError for networks of other shapes.
    """
    ours, theirs = states(student, base)
    found, error, rest, whole = {}, 0.0, 0.0, 0.0
    linear = {
        f"{name}.weight"
        for name, m in student.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    for name, value in track(ours.items(), "comparing tensors", len(ours), unit="tensor"):
        change = value.float() - theirs[name].float()
        whole += float(change.square().sum())
        if name not in linear or not change.any():
            rest += float(change.square().sum())
            continue
        left, right = _nearest(change.flatten(1), rank)
        error += float((change.flatten(1) - left @ right).square().sum())
        stem, shape = name.removesuffix(".weight"), change.shape[1:]
        found[f"{stem}.lora_A.weight"] = right.unflatten(1, shape)
        found[f"{stem}.lora_B.weight"] = left[..., None, None] if change.ndim == 4 else left
    return found, 1 - (error + rest) / whole if whole else 1.0


def _nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[M, rank] and [rank, N] whose product is nearest to `change` [M, N]; filled up with zeros
    where it has fewer.

    A large one by random projections, which leave an error a little above the least there is, in a
    small part of the time; from a seed of their own, so that a file is made again bit by bit.
    """
    most = min(change.shape)
    n = min(rank, most)
    if most > EXACT * (rank + MORE):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=rank + MORE, niter=PASSES)
    else:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        v = vh.T
    left, right = (torch.zeros(rank, len(side)) for side in (u, v))
    root = s[:n].sqrt()[:, None]
    left[:n], right[:n] = root * u.T[:n], root * v.T[:n]
    return left.T.contiguous(), right
