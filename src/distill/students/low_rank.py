"""LoRA files: a run's own adapters, or the nearest of a rank to what a student has learnt.

Whatever alpha a run had, it is multiplied into B here, so that a reader that knows nothing of alpha is right as well.
"""

from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor, nn

from distill.students import states
from distill.teachers.weights import read_weights, write_weights

NAMINGS = ("diffusers", "kohya")


def save_lora(
    factors: dict[str, Tensor],
    file: Path,
    *,
    part: str,
    naming: str = "diffusers",
    dtype: str | None = None,
) -> Path:
    """Write `<layer>.lora_A.weight` and `<layer>.lora_B.weight` of a `unet` or `transformer` for other programs.

    Raises ValueError for a naming that there is not, or not for this network.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming={naming}: must be {' or '.join(NAMINGS)}")
    state = {f"{part}.{name}": value for name, value in factors.items()}
    if naming == "kohya":
        if part != "unet":
            raise ValueError(
                "naming=kohya: is for UNets; of a transformer ComfyUI and diffusers read naming=diffusers"
            )
        state = convert_state_dict_to_kohya(state)  # with the rank for alpha
    return write_weights(state, file, dtype=dtype)


def read_lora(file: Path) -> dict[str, Tensor]:
    """What `save_lora` was given, of a file in diffusers' naming."""
    state, _ = read_weights(file)
    return {name.partition(".")[2]: value for name, value in state.items()}


@torch.no_grad()
def difference(student: nn.Module, base: nn.Module, rank: int) -> tuple[dict[str, Tensor], float]:
    """Factors of student minus base, layer by layer the nearest of this rank, and their share of its square in [0, 1].

    Linear layers and convolutions alone have such factors. All get the same rank, if need be with zeros: readers take
    one for all. Raises ValueError for networks of other shapes.
    """
    ours, theirs = states(student, base)
    found, kept, whole = {}, 0.0, 0.0
    linear = {
        f"{name}.weight"
        for name, m in student.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    for name, value in ours.items():
        change = value.float() - theirs[name].float()
        whole += float(change.square().sum())
        if name not in linear or not change.any():
            continue
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        kept += float(s[:rank].square().sum())
        a, b = (torch.zeros(rank, x) for x in (v.shape[1], len(u)))
        root, n = s[:rank].sqrt(), min(rank, len(s))
        a[:n], b[:n] = root[:, None] * v[:n], root[:, None] * u.T[:n]
        stem, b = name.removesuffix(".weight"), b.T
        found[f"{stem}.lora_A.weight"] = a.unflatten(1, change.shape[1:])
        found[f"{stem}.lora_B.weight"] = b[..., None, None] if change.ndim == 4 else b
    return found, kept / whole if whole else 1.0
