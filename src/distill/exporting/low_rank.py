"""LoRA files: the adapters of a run, or a low-rank approximation of what a student has learnt.

The run's alpha is multiplied into B, so that programs that ignore alpha are right too.
"""

from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor, nn

from distill.exporting import NAMINGS
from distill.storage.bounded import mapping_of
from distill.students import states
from distill.teachers.families import teacher_class
from distill.teachers.loading.locate import denoiser_part, index_of
from distill.teachers.loading.weights import read_weights, write_weights
from distill.terminal.progress import track

# A matrix whose smaller side exceeds EXACT * (rank + MORE) is decomposed by randomised SVD with
# rank + MORE columns and PASSES power iterations. tests/test_low_rank.py measures its error.
EXACT, MORE, PASSES = 4, 16, 2


def save_lora(
    factors: dict[str, Tensor],
    file: Path,
    *,
    part: str,
    naming: str = "diffusers",
    dtype: str | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write `<layer>.lora_A.weight` and `<layer>.lora_B.weight` of a `unet` or `transformer`.

    `metadata` is written into the header of the file: see `lora_metadata`. Raises ValueError for an
    unknown naming, or one that does not fit this network.
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
        state = convert_state_dict_to_kohya(state)  # sets alpha to the rank
    rank = next((len(value) for name, value in factors.items() if ".lora_A." in name), 0)
    header = dict(metadata or {})
    if naming == "kohya":
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
        header |= {"ss_network_alpha": str(float(rank))}
    return write_weights(state, file, dtype=dtype, words=header)


def lora_metadata(folder: Path) -> dict[str, str]:
    """Metadata of a LoRA for the pipeline in this folder: its base model and architecture.

    {} if they are not known for sure.
    """
    kind = str(index_of(str(folder))["_class_name"])
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = mapping_of(scheduler) if scheduler.is_file() else {}
    predicts_v = settings.get("prediction_type") == "v_prediction"
    denoiser = mapping_of(folder / denoiser_part(folder) / "config.json")
    found = teacher_class(kind).lora_base(denoiser, predicts_v)
    if found is None:
        return {}
    base, architecture = found
    return {
        "ss_base_model_version": base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": "few-step student",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }


def read_lora(file: Path) -> dict[str, Tensor]:
    """The factors in a file that `save_lora` wrote in diffusers' naming."""
    state, _ = read_weights(file)
    return {name.partition(".")[2]: value for name, value in state.items()}


@torch.no_grad()
def difference(student: nn.Module, base: nn.Module, rank: int) -> tuple[dict[str, Tensor], float]:
    """The best approximation of student minus base by factors of this rank, layer by layer.

    Also returns its share of the squared difference, in [0, 1]. Only linear layers and convolutions
    have factors. All get the same rank, padded with zeros: readers expect one rank for all. It is
    at most the highest that a layer can have, since more would be zeros alone. Raises ValueError
    for networks of different shapes.
    """
    ours, theirs = states(student, base)
    found, error, rest, total = {}, 0.0, 0.0, 0.0
    linear = {
        f"{name}.weight"
        for name, m in student.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    highest = max((min(ours[name].flatten(1).shape) for name in linear), default=rank)
    rank = min(rank, highest)
    for name, value in track(ours.items(), "comparing tensors", len(ours), unit="tensor"):
        change = value.float() - theirs[name].float()
        total += float(change.square().sum())
        if name not in linear or not change.any():
            rest += float(change.square().sum())
            continue
        left, right = _nearest(change.flatten(1), rank)
        error += float((change.flatten(1) - left @ right).square().sum())
        stem, shape = name.removesuffix(".weight"), change.shape[1:]
        found[f"{stem}.lora_A.weight"] = right.unflatten(1, shape)
        found[f"{stem}.lora_B.weight"] = left[..., None, None] if change.ndim == 4 else left
    return found, 1 - (error + rest) / total if total else 1.0


def _nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [M, rank] and [rank, N] whose product is nearest to `change` [M, N].

    A matrix of lower rank is padded with zeros. Large matrices use randomised SVD: its error is
    slightly above the minimum, and it is much faster. Its seed is fixed, so files are reproducible
    bit by bit.
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
