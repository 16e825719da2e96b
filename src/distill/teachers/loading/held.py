"""What a single file holds, by the names and shapes of its tensors: all of it is used, or known to
mean nothing.

A file may say in a tensor what no configuration does: that it predicts v, that its noise goes on to
infinity, that its weights are to be multiplied by something.
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

from distill.storage.bounded import check_archive
from distill.storage.loaded_weights import SCALED, advice, first_few
from distill.teachers.loading.locate import PICKLED

Held = Mapping[str, Sequence[int]]

DENOISER = "model.diffusion_model."
PLACES = {  # part of a pipeline -> where it stands in a file of SD, SDXL, or SD3
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
MARKS = ("v_pred", "ztsnr")  # ComfyUI's, of what a network predicts and on which noise
TABLE = "alphas_cumprod"
ENDS, HALF = 1e-6, 5e-3  # of alphas_cumprod: what counts as zero; rounding in half precision
EDM = ("edm_",)  # of networks in EDM's form: CosXL, Playground 2.5
# What training has left in the file: averages beside the weights, tables, the autoencoder's losses.
SPENT = re.compile(
    r"(^|\.)model_ema\.|^first_stage_model\.loss\.|^denoiser\.(log_)?sigmas$|^global_step$"
    r"|^(alphas_cumprod(_prev)?|betas|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)$"
)
TEXT = re.compile(  # ends of names in text encoders, of which some have a tokenizer besides
    r"(weight|bias|in_proj_weight|in_proj_bias|positional_embedding|text_projection|logit_scale"
    r"|position_ids|attn_mask|spiece_model)$"
)


def held_in(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a file, which are not read."""
    if file.suffix in PICKLED:
        check_archive(file)
        state = torch.load(file, weights_only=True, map_location="meta")
        state = state.get("state_dict", state)
        return {name: list(x.shape) for name, x in state.items() if isinstance(x, Tensor)}
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def places_of(part: str, network: Any) -> tuple[str, ...]:
    """What the names of the tensors of this part begin with; a T5 has one place, whichever encoder
    it is.
    """
    return PLACES["text_encoder_3" if network.__name__.startswith("T5") else part]


def places_in(classes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The same of all parts of a pipeline that a file may have besides the denoiser."""
    there = [part for part in PLACES if classes.get(part, NoneType) is not NoneType]
    return {part: places_of(part, classes[part]) for part in there}


def check_held(held: Held, classes: Mapping[str, Any], without: Sequence[str], where: str) -> None:
    """Raise ValueError, beginning with `where`, for tensors that a pipeline with parts of these
    classes leaves over.

    What belongs to the parts `without` is left out on purpose.
    """
    if edm := sorted(name for name in held if name.startswith(EDM)):
        what = f"is a model in the form of EDM ({edm[0]}), which no teacher here reads"
        raise ValueError(f"{where} {what}; give one that predicts eps, v or flow")
    used = [place for places in places_in(classes).values() for place in places]
    spared = [place for part in without for place in PLACES.get(part, ()) if place not in used]
    known = tuple(place for places in PLACES.values() for place in places)
    unnamed = not any(name.startswith(DENOISER) for name in held)  # a denoiser and nothing else
    left = []
    for name in held:
        if name in MARKS or SPENT.search(name) or name.startswith(tuple(spared)):
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
        raise ValueError(f"{where} holds {first_few(left)}, of which nothing would be made; {more}")


def check_schedule(file: Path, held: Held, scheduler: Any, where: str, config: str | None) -> None:
    """Raise ValueError where the file says another prediction or other noise than the scheduler of
    `config`.
    """
    said = scheduler.config.get("prediction_type")
    if "v_pred" in held and said != "v_prediction":
        what = f"says that it predicts v, and teacher.config={config} says {said}"
        raise ValueError(f"{where} {what}; give a teacher.config of its kind")
    table = getattr(scheduler, TABLE, None)
    if "ztsnr" in held and table is not None and float(table[-1]) > ENDS:
        what = f"says that its noise ends in zero signal, and teacher.config={config} has another"
        raise ValueError(
            f"{where} {what}; give one whose scheduler has rescale_betas_zero_snr=true"
        )
    if TABLE not in held or table is None or file.suffix in PICKLED:
        return
    with safe_open(file, "pt") as opened:
        own = opened.get_tensor(TABLE).float()
    if own.shape != table.shape or (own.sqrt() - table.sqrt()).abs().max() > HALF:
        what = f"has another schedule of noise ({TABLE}) than teacher.config={config}"
        raise ValueError(f"{where} {what}; give a teacher.config of its kind")


def check_counts(held: Held, pipeline: Any, where: str, config: str | None) -> None:
    """Raise ValueError if the file has more numbers of the denoiser or the autoencoder than the
    pipeline has.
    """
    every = tuple(place for places in PLACES.values() for place in places)
    named = any(name.startswith(DENOISER) for name in held)
    rest = {n: x for n, x in held.items() if n not in MARKS and not SPENT.search(n)}
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
