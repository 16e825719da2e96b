"""Adding a LoRA file to a denoiser's weights: W + (alpha / rank) B A, with each layer's alpha and
rank.

diffusers translates the layer names of other programs. It loses kohya's alphas where they differ by
layer, and ignores what it does not know. So alphas are multiplied into B first, and a file that
would not be used in full is refused.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import nn

from distill.machine.faults import first_line, quiet_logging
from distill.storage.bounded import parse_json_object
from distill.teachers.loading.lora_names import State, is_pefts, renamed, settings_beside

TEXT = ("text_encoder", "lora_te")  # prefixes of layers of text encoders
SIDE = re.compile(r"(.+?)[._]lora\d?[._](?:linear_layer[._])?(A|B|down|up)\.weight")
EXTRA = ("lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight")  # of peft
FIRST = ("A", "down")
PEFT = "lora_adapter_metadata"  # diffusers' key of peft's settings: ranks and alphas
log = logging.getLogger(__name__)


def add_lora(
    pipeline: Any, model: nn.Module, state: State, where: str, file: Path, scale: float = 1.0
) -> None:
    """Add the LoRA in `state` to `model`, the denoiser of `pipeline`; text encoders are not
    changed.

    `file` is the source of the state; peft's settings are in it or beside it. `scale` multiplies
    the change. Raises ValueError, starting with `where`, the setting, for a file that would not be
    used in full, or that is for another network.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        what = f"is a LoRA, and diffusers puts none on a {type(pipeline).__name__}"
        raise ValueError(f"{where} {what}; choose another file")
    own = {name: tensor for name, tensor in state.items() if not name.startswith(TEXT)}
    if len(own) < len(state):
        what = "its layers for text encoders are left out, and those may matter"
        log.warning("%s: %s", where, what)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    settings = settings_of(file)
    kept = {k.removeprefix(f"{part}."): v for k, v in settings.items() if k.startswith(f"{part}.")}
    if not kept and is_pefts(own):
        kept = settings_beside(file, where)
    own = renamed(own, model, part, where)
    layers = layers_of(own, where)
    if not layers:
        _refuse_layers(model, [], 0, where)
    if not kept:
        own = with_alphas_applied(own, layers, where)
    found = _translated(pipeline, model, part, own, layers, where)
    _refuse_misfit(model, found, where)
    try:
        with quiet_logging():  # it prints an error before it raises it
            model.load_lora_adapter(found, prefix=None, metadata=kept or None)
    except Exception as error:
        what = f"cannot be put on this {type(model).__name__} ({first_line(error)})"
        raise ValueError(f"{where} {what}; choose another file") from None
    model.fuse_lora(lora_scale=scale)
    model.unload_lora()


def settings_of(file: Path) -> dict[str, Any]:
    """peft's settings of the layers, from the metadata that diffusers writes into a safetensors
    file.
    """
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as opened:
        return parse_json_object((opened.metadata() or {}).get(PEFT, "{}"), f"{file}: {PEFT}")


def layers_of(state: State, where: str) -> dict[str, tuple[str, str]]:
    """Layer -> names of its A and B. Raises ValueError for a tensor that is no part of a plain
    LoRA.
    """
    sides: dict[str, dict[bool, str]] = {}
    beside = []
    for name in state:
        if match := SIDE.fullmatch(name):
            sides.setdefault(match[1], {})[match[2] in FIRST] = name
        elif not name.endswith(EXTRA):
            beside.append(name)
    halves = [names for names in sides.values() if len(names) < 2]
    other = [name for name in beside if name.removesuffix(".alpha") not in sides]
    if unread := sorted(other + [name for names in halves for name in names.values()]):
        what = f"{len(unread)} of its tensors are no part of a plain LoRA, {unread[0]} for one"
        raise ValueError(
            f"{where}: {what}; give one without LoHa's, LoKr's or kohya's DoRA's terms"
        )
    return {layer: (names[True], names[False]) for layer, names in sides.items()}


def with_alphas_applied(state: State, layers: dict[str, tuple[str, str]], where: str) -> State:
    """The same LoRA without alphas: each is multiplied into its B, so that all layers have a scale
    of 1.
    """
    found = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    for layer, (a, b) in layers.items():
        alpha = state.get(f"{layer}.alpha")
        if alpha is None:
            continue
        if alpha.numel() != 1 or not torch.isfinite(alpha.float()).all():
            raise ValueError(f"{where}: {layer}.alpha is not a number; fetch it anew")
        scale = float(alpha) / len(state[a])
        if scale != 1:  # float16 would lose small values
            found[b] = state[b].float() * scale
    return found


@quiet_logging()
def _translated(
    pipeline: Any, model: nn.Module, part: str, state: State, layers: dict, where: str
) -> State:
    """The tensors under the denoiser's own layer names, in peft's form."""
    # Each A of the probe is filled with its layer's number: the output shows which were dropped.
    numbers = {a: torch.tensor(float(i)) for i, (a, _) in enumerate(layers.values())}
    probes = {name: numbers.get(name, torch.ones(())).expand(x.shape) for name, x in state.items()}
    options = {"unet_config": model.config} if part == "unet" else {}
    found = {}
    try:
        for key, given in (("probes", probes), ("tensors", state)):
            named = pipeline.lora_state_dict(dict(given), **options)
            named = named[0] if isinstance(named, tuple) else named
            named = {name: x for name, x in named.items() if name.startswith(f"{part}.")}
            named = {name.removeprefix(f"{part}."): x for name, x in named.items()}
            if named and not any("lora_A" in name for name in named):
                named = convert_unet_state_dict_to_peft(named)
            found[key] = named
    except Exception as error:  # unknown names may raise anything
        what = f"diffusers cannot read its names ({first_line(error)})"
        raise ValueError(f"{where}: {what}; choose another file") from None
    there = {int(x.flatten()[0]) for name, x in found["probes"].items() if ".lora_A." in name}
    if dropped := [layer for i, layer in enumerate(layers) if i not in there]:
        _refuse_layers(model, dropped, len(layers), where)
    return found["tensors"]


def _refuse_misfit(model: nn.Module, state: State, where: str) -> None:
    """Raise ValueError for a layer that the model lacks, or has with other widths."""
    firsts = [name for name in state if name.endswith(".lora_A.weight")]
    stems = [name.removesuffix(".lora_A.weight") for name in firsts]
    modules = dict(model.named_modules())
    if absent := [stem for stem in stems if getattr(modules.get(stem), "weight", None) is None]:
        _refuse_layers(model, absent, len(stems), where)
    for stem in stems:
        shape = modules[stem].weight.shape
        a, b = (state[f"{stem}.lora_{side}.weight"].shape for side in "AB")
        if (b[0], *a[1:]) != tuple(shape) or a[0] != b[1]:
            what = f"{stem} is {list(shape)} here and {[b[0], *a[1:]]} there"
            raise ValueError(
                f"{where}: is a LoRA of another {type(model).__name__} ({what}); "
                "choose the model that it was made for"
            )


def _refuse_layers(model: nn.Module, names: list[str], total: int, where: str) -> None:
    kind = type(model).__name__
    if len(names) < total:
        what = f"{len(names)} of its {total} layers are none of this {kind}, {names[0]} for one"
        raise ValueError(f"{where}: {what}; choose the model that it was made for")
    example = f", {names[0]} for one" if names else ""
    what = f"none of its layers is one of this {kind}{example}"
    how = "choose the model that it was made for, or give one with diffusers' or kohya's names"
    raise ValueError(f"{where}: {what}; {how}")
