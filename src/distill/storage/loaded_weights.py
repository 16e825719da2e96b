"""Read files of torch; check weights: no tensor may be missing, unused, or not finite."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from distill.storage.bounded import check_archive, format_bytes

# Tensors of the other half of a larger model, such as the vision half of CLIP: they may be unused.
OTHER_HALF = re.compile(
    r"(^|\.)(vision_model|visual_projection|text_projection|logit_scale|lm_head|position_ids"
    r"|pooler|classifier)(\.|$)"
    # PixArt-alpha was published with its empty caption, which diffusers does not read.
    r"|^caption_projection\.y_embedding$"
)
SCALED = re.compile(
    r"\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$|(^|\.)scaled_fp8$"
)
# Ours: bytes of all tensors of a file over its own. Tied weights are stored once under two names.
MOST_VIEWS = 8
ADVICE = "fetch it anew, or correct its config.json"


def check_all_loaded(
    report: Mapping[str, Any], where: str, network: str, spare: str | None = None
) -> None:
    """Raise ValueError for tensors that are missing, have another shape, or are unused.

    `report` is the loading info of `from_pretrained`; `where` and `network` are named in errors.
    `spare` is a regular expression of tensors that may be missing, since they are not used.
    """
    lacking = [n for n in report["missing_keys"] if spare is None or not re.search(spare, n)]
    other = [n[0] if isinstance(n, tuple) else n for n in report["mismatched_keys"]]
    left = [n for n in report["unexpected_keys"] if not OTHER_HALF.search(n)]
    for what, names in {
        f"lacks {{}} of its {network}": lacking,
        f"has in another shape {{}} of its {network}": other,
        f"holds {{}}, for which its {network} has no place": left,
    }.items():
        if names:
            raise ValueError(f"{where} {what.format(first_few(names))}; {advice(names)}")


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch by name, also under `state_dict`; no code in it runs.

    Raises nearly anything for a damaged file.
    """
    check_archive(file)
    state = torch.load(file, weights_only=True, map_location="cpu")
    state = state.get("state_dict", state)
    tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
    check_stored(tensors.values(), file)
    return tensors


def check_stored(tensors: Iterable[Any], file: Path) -> None:
    """Raise ValueError for tensors of a file of torch that would take far more memory than it.

    A view of one stored number may have any shape, and sparse and meta tensors too.
    """
    there, total = file.stat().st_size, 0
    for x in tensors:
        if x.is_meta or x.layout is not torch.strided:
            raise ValueError(f"holds a {x.layout} tensor on {x.device}; save it anew")
        total += x.numel() * x.element_size()
    if total > MOST_VIEWS * there:
        what = f"its tensors take {format_bytes(total)}, and the file has {format_bytes(there)}"
        raise ValueError(f"{what}; save it anew")


def check_finite(network: Any, where: str) -> None:
    """Raise ValueError, starting with `where`, for a network with numbers that are not finite.

    One such number makes every loss NaN. Buffers may hold -inf, as masks do.
    """
    broken = [name for name, x in network.named_parameters() if not _finite(x, infinite=False)]
    broken += [name for name, x in network.named_buffers() if not _finite(x, infinite=True)]
    if broken:
        what = f"holds numbers that are not finite in {first_few(broken)}"
        half = any(x.dtype.itemsize == 2 for x in network.parameters())
        more = ", or read it in float32 if it is finite there" if half else ""
        raise ValueError(f"{where} {what}; fetch it anew{more}")


def _finite(x: Any, infinite: bool) -> bool:
    """Whether a tensor has no NaN, and no infinity unless `infinite`; True for meta tensors."""
    if x.is_meta or not x.is_floating_point() or not x.numel() or x.dtype.itemsize == 1:
        return True
    ends = [float(end) for end in x.detach().aminmax()]  # NaN if any value is; copies nothing
    return not any(math.isnan(end) or (math.isinf(end) and not infinite) for end in ends)


def first_few(names: list[str]) -> str:
    """The first three of these names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def advice(names: list[str], otherwise: str = ADVICE) -> str:
    """What to do about tensors of these names."""
    scaled = any(SCALED.search(name) for name in names)
    return "scaled fp8 is not read: give weights in bfloat16 or float16" if scaled else otherwise
