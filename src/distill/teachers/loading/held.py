"""Contents of a single-file checkpoint, by names and shapes of its tensors.

Every tensor must be used, or be known to be irrelevant. A tensor may state what no configuration
does: a v prediction, zero terminal SNR, or a scale of the weights.
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.storage.bounded import check_archive, check_header
from distill.storage.loaded_weights import SCALED, advice, first_few
from distill.teachers.loading.locate import PICKLED

Held = Mapping[str, Sequence[int]]

DENOISER = "model.diffusion_model."
PLACES = {  # part of a pipeline -> prefixes of its tensors in a file of SD, SDXL, or SD3
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
MARKERS = ("v_pred", "ztsnr")  # ComfyUI's, of v prediction and zero terminal SNR
TABLE = "alphas_cumprod"
ZERO, ROUNDING = 1e-6, 5e-3  # of alphas_cumprod: zero signal; half precision
EDM = ("edm_",)  # networks preconditioned as in EDM: CosXL, Playground 2.5
# Leftovers of training: EMA weights, tables of the schedule, the autoencoder's losses.
LEFTOVERS = re.compile(
    r"(^|\.)model_ema\.|^first_stage_model\.loss\.|^denoiser\.(log_)?sigmas$|^global_step$"
    r"|^(alphas_cumprod(_prev)?|betas|sqrt_\w+|log_one_minus_\w+|posterior_\w+)$"
    r"|^(lvlb_weights|logvar)$"
    # Unused in makers' files: Lumina's and Z-Image's last norm, Sana's empty caption and positions.
    r"|^(model\.diffusion_model\.)?(norm_final\.weight|y_embedder\.y_embedding|pos_embed)$"
)
TEXT = re.compile(  # ends of names in text encoders; some include a tokenizer
    r"(weight|bias|in_proj_weight|in_proj_bias|positional_embedding|text_projection|logit_scale"
    r"|position_ids|attn_mask|spiece_model)$"
)


def held_in(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a file, without reading them. Raises ValueError for too many
    of them.
    """
    check_header(file)
    if file.suffix in PICKLED:
        check_archive(file)
        state = torch.load(file, weights_only=True, map_location="meta")
        state = state.get("state_dict", state)
        return {name: list(x.shape) for name, x in state.items() if isinstance(x, Tensor)}
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def places_of(part: str, network: Any) -> tuple[str, ...]:
    """Prefixes of the tensors of this part. A T5 has one prefix, whichever encoder it is."""
    return PLACES["text_encoder_3" if network.__name__.startswith("T5") else part]


def places_in(classes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Part -> prefixes, for all parts of a pipeline except the denoiser that a file may hold."""
    there = [part for part in PLACES if classes.get(part, NoneType) is not NoneType]
    return {part: places_of(part, classes[part]) for part in there}


def check_held(held: Held, classes: Mapping[str, Any], without: Sequence[str], where: str) -> None:
    """Raise ValueError, starting with `where`, for tensors that a pipeline of these classes would
    not use.

    Tensors of the parts `without` are left out on purpose.
    """
    if edm := sorted(name for name in held if name.startswith(EDM)):
        what = f"is a model with EDM preconditioning ({edm[0]}), which no teacher supports"
        raise ValueError(f"{where} {what}; give one that predicts eps, v or flow")
    used = [place for places in places_in(classes).values() for place in places]
    spared = [place for part in without for place in PLACES.get(part, ()) if place not in used]
    known = tuple(place for places in PLACES.values() for place in places)
    unnamed = not any(name.startswith(DENOISER) for name in held)  # a denoiser and nothing else
    left = []
    for name in held:
        if name in MARKERS or LEFTOVERS.search(name) or name.startswith(tuple(spared)):
            continue
        scaled = SCALED.search(name) is not None
        if name.startswith(PLACES["vae"]):
            kept = not scaled
        elif name.startswith(known):
            kept = name.startswith(tuple(used)) and TEXT.search(name) and not scaled
        else:
            kept = (unnamed or name.startswith(DENOISER)) and not scaled
        if not kept:
            left.append(name)
    if left:
        more = advice(left, "choose another teacher= or teacher.config=")
        raise ValueError(f"{where} holds {first_few(left)}, which would not be used; {more}")


def check_only_denoiser(held: Held, where: str) -> None:
    """Raise ValueError, starting with `where`, for tensors of other parts than the denoiser."""
    known = tuple(place for places in PLACES.values() for place in places)
    if left := [name for name in held if name.startswith(known)]:
        more = "give a file of the denoiser alone: the rest is read from teacher.config"
        raise ValueError(f"{where} holds {first_few(left)}, which would not be used; {more}")


def check_schedule(file: Path, held: Held, scheduler: Any, where: str, config: str | None) -> None:
    """Raise ValueError if the file states another prediction or noise schedule than the scheduler
    of `config`.
    """
    said = scheduler.config.get("prediction_type")
    if "v_pred" in held and said != "v_prediction":
        what = f"says that it predicts v, and teacher.config={config} says {said}"
        raise ValueError(f"{where} {what}; give a teacher.config of its kind")
    table = getattr(scheduler, TABLE, None)
    if "ztsnr" in held and table is not None and float(table[-1]) > ZERO:
        what = f"has zero terminal SNR, and teacher.config={config} has another"
        raise ValueError(
            f"{where} {what}; give one whose scheduler has rescale_betas_zero_snr=true"
        )
    if TABLE not in held or table is None or file.suffix in PICKLED:
        return
    with safe_open(file, "pt") as opened:
        own = opened.get_tensor(TABLE).float()
    if own.shape != table.shape or (own.sqrt() - table.sqrt()).abs().max() > ROUNDING:
        what = f"has another schedule of noise ({TABLE}) than teacher.config={config}"
        raise ValueError(f"{where} {what}; give a teacher.config of its kind")


def check_counts(held: Held, pipeline: Any, where: str, config: str | None) -> None:
    """Raise ValueError if the file's denoiser or autoencoder has more values than the
    pipeline's.
    """
    every = tuple(place for places in PLACES.values() for place in places)
    named = any(name.startswith(DENOISER) for name in held)
    rest = {n: x for n, x in held.items() if n not in MARKERS and not LEFTOVERS.search(n)}
    of_denoiser = [
        n for n in rest if (n.startswith(DENOISER) if named else not n.startswith(every))
    ]
    net = getattr(pipeline, "transformer", None) or pipeline.unet
    of_vae = [n for n in rest if n.startswith(PLACES["vae"])]
    for what, names, model in (("denoiser", of_denoiser, net), ("vae", of_vae, pipeline.vae)):
        count, own = (
            sum(prod(rest[name]) for name in names),
            sum(x.numel() for x in model.state_dict().values()),
        )
        if count > own:
            kind = type(model).__name__
            more = f"{count - own} numbers more than the {kind} of teacher.config={config}"
            raise ValueError(
                f"{where}: its {what} has {more}; choose another teacher= or teacher.config="
            )
