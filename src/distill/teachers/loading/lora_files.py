"""A LoRA file added to a denoiser's weights: W + (alpha / rank) B A, for every layer by its own
alpha and rank.

diffusers translates the names that programs give to layers; it loses alphas of kohya's that differ
by layer, and passes over what it does not know. So alphas are multiplied into B before, and a file
of which something would not be used is refused.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import nn

from distill.machine.faults import first_line, silent
from distill.storage.bounded import parsed_mapping
from distill.teachers.loading.lora_names import State, is_pefts, renamed, settings_beside

TEXT = ("text_encoder", "lora_te")  # what the names of layers of text encoders begin with
SIDE = re.compile(r"(.+?)[._]lora\d?[._](?:linear_layer[._])?(A|B|down|up)\.weight")
BESIDE = ("lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight")  # peft's own
FIRST = ("A", "down")
PEFT = "lora_adapter_metadata"  # where diffusers keeps peft's settings: ranks and alphas of layers
log = logging.getLogger(__name__)


def add_lora(pipeline: Any, model: nn.Module, state: State, path: str, file: Path) -> None:
    """Add what `state` holds for `model`, the denoiser of `pipeline`; its text encoders stay as
    they are.

    `file` is where the state was read, in or beside which peft's settings are. Raises ValueError,
    naming `path`, for a file that would not be used whole, or is of another network.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        what = f"is a LoRA, and diffusers puts none on a {type(pipeline).__name__}"
        raise ValueError(f"teacher.weights={path} {what}")
    own = {name: tensor for name, tensor in state.items() if not name.startswith(TEXT)}
    if len(own) < len(state):
        what = "its layers for text encoders are left out, and those may matter"
        log.warning("teacher.weights=%s: %s", path, what)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    settings = settings_of(file)
    kept = {k.removeprefix(f"{part}."): v for k, v in settings.items() if k.startswith(f"{part}.")}
    if not kept and is_pefts(own):
        kept = settings_beside(file, path)
    own = renamed(own, model, part, path)
    layers = layers_of(own, path)
    if not layers:
        _refuse_layers(model, [], 0, path)
    if not kept:
        own = folded(own, layers, path)
    found = _translated(pipeline, model, part, own, layers, path)
    _refuse_misfit(model, found, path)
    try:
        with silent():  # it prints an error before it raises it
            model.load_lora_adapter(found, prefix=None, metadata=kept or None)
    except Exception as error:
        what = f"cannot be put on this {type(model).__name__} ({first_line(error)})"
        raise ValueError(f"teacher.weights={path} {what}; choose another file") from None
    model.fuse_lora()
    model.unload_lora()


def settings_of(file: Path) -> dict[str, Any]:
    """What peft was told of the layers in a safetensors file, where diffusers has written it
    there.
    """
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as opened:
        return parsed_mapping((opened.metadata() or {}).get(PEFT, "{}"), f"{file}: {PEFT}")


def layers_of(state: State, path: str) -> dict[str, tuple[str, str]]:
    """Layer -> the names of its A and B. Raises ValueError for a name that is no part of a LoRA."""
    sides: dict[str, dict[bool, str]] = {}
    beside = []
    for name in state:
        if match := SIDE.fullmatch(name):
            sides.setdefault(match[1], {})[match[2] in FIRST] = name
        elif not name.endswith(BESIDE):
            beside.append(name)
    halves = [names for names in sides.values() if len(names) < 2]
    other = [name for name in beside if name.removesuffix(".alpha") not in sides]
    if unread := sorted(other + [name for names in halves for name in names.values()]):
        what = f"{len(unread)} of its tensors are no part of a plain LoRA, {unread[0]} for one"
        raise ValueError(
            f"teacher.weights={path}: {what}; give one without LoHa's, LoKr's or kohya's DoRA's"
            " terms"
        )
    return {layer: (names[True], names[False]) for layer, names in sides.items()}


def folded(state: State, layers: dict[str, tuple[str, str]], path: str) -> State:
    """The same without alphas: each multiplied into its B, so that all layers have a scale of 1."""
    found = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    for layer, (a, b) in layers.items():
        alpha = state.get(f"{layer}.alpha")
        if alpha is None:
            continue
        if alpha.numel() != 1 or not torch.isfinite(alpha.float()).all():
            raise ValueError(f"teacher.weights={path}: {layer}.alpha is not a number")
        scale = float(alpha) / len(state[a])
        if scale != 1:  # a half would lose the small ones
            found[b] = state[b].float() * scale
    return found


@silent()
def _translated(
    pipeline: Any, model: nn.Module, part: str, state: State, layers: dict, path: str
) -> State:
    """The tensors under the names of the denoiser's own layers and of peft."""
    marks = {a: torch.tensor(float(i)) for i, (a, _) in enumerate(layers.values())}
    # A's of which each holds nothing but its number: what comes out tells which have been dropped.
    probes = {name: marks.get(name, torch.ones(())).expand(x.shape) for name, x in state.items()}
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
    except Exception as error:  # of names that it does not know: nearly anything
        raise ValueError(
            f"teacher.weights={path}: diffusers cannot read its names ({first_line(error)})"
        ) from None
    there = {int(x.flatten()[0]) for name, x in found["probes"].items() if ".lora_A." in name}
    if dropped := [layer for i, layer in enumerate(layers) if i not in there]:
        _refuse_layers(model, dropped, len(layers), path)
    return found["tensors"]


def _refuse_misfit(model: nn.Module, state: State, path: str) -> None:
    """Raise ValueError for a layer that the model does not have, or has of other widths."""
    firsts = [name for name in state if name.endswith(".lora_A.weight")]
    stems = [name.removesuffix(".lora_A.weight") for name in firsts]
    modules = dict(model.named_modules())
    if absent := [stem for stem in stems if getattr(modules.get(stem), "weight", None) is None]:
        _refuse_layers(model, absent, len(stems), path)
    for stem in stems:
        shape = modules[stem].weight.shape
        a, b = (state[f"{stem}.lora_{side}.weight"].shape for side in "AB")
        if (b[0], *a[1:]) != tuple(shape) or a[0] != b[1]:
            what = f"{stem} is {list(shape)} here and {[b[0], *a[1:]]} there"
            raise ValueError(
                f"teacher.weights={path}: is a LoRA of another {type(model).__name__} ({what}); "
                "choose the teacher that it was made for"
            )


def _refuse_layers(model: nn.Module, names: list[str], whole: int, path: str) -> None:
    kind = type(model).__name__
    if len(names) < whole:
        what = f"{len(names)} of its {whole} layers are none of this {kind}, {names[0]} for one"
        raise ValueError(f"teacher.weights={path}: {what}; choose the teacher that it was made for")
    example = f", {names[0]} for one" if names else ""
    what = f"none of its layers is one of this {kind}{example}"
    how = "choose the teacher that it was made for, or give one with diffusers' or kohya's names"
    raise ValueError(f"teacher.weights={path}: {what}; {how}")
