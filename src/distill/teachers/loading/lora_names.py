"""Layer names of LoRA files from other programs, converted to names that diffusers reads.

Only a prefix is changed. The rest must be the layer's name in the denoiser, or in its authors'
code, which diffusers translates. Other names are left unchanged.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.storage.bounded import mapping_of
from distill.terminal.shown import shown

State = dict[str, Tensor]

PEFT = "base_model.model."  # peft's prefix
PREFIXES = (PEFT, "diffusion_model.", "model.diffusion_model.", "lora_unet_", "lora_transformer_")
END = re.compile(r"[._](lora|alpha$|dora_scale$)")  # end of a layer name
NAMED = re.compile(
    r"(lora_(?:A|B|magnitude_vector))\.(\w+)(\.weight|\.bias)?"
)  # with the name of an adapter
# Layer names of the authors' code, which diffusers translates in kohya's form.
MAKERS = re.compile(r"(input_blocks|middle_block|output_blocks|double_blocks|single_blocks)\.")
SD3 = re.compile(r"(lora_unet_|(model\.)?diffusion_model\.)?joint_blocks[._]")
KOHYA = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
DIFFUSERS = {theirs: ours for ours, theirs in KOHYA.items()}
DIFFUSERS |= {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
SETTINGS = "adapter_config.json"  # peft writes the alphas there
# Its keys that change a layer's weights, or that a plain LoRA does not have.
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
READ += ("use_dora",)


def renamed(state: State, model: nn.Module, part: str, where: str) -> State:
    """The tensors under names that diffusers reads as layers of `model`, its pipeline's `part`.

    Raises ValueError, naming `where`, for names that neither this module nor diffusers translates.
    """
    if sd3 := [name for name in state if SD3.match(name)]:
        what = (
            f"names layers as in SD3's own code ({shown(sd3[0], 80)}), which diffusers does not"
            " read in a LoRA"
        )
        how = "convert it to diffusers' names (transformer.transformer_blocks...), or merge it"
        raise ValueError(f"{where}: {what}; {how} into a checkpoint")
    state = _of_one_adapter(state, where)
    layers = {name for name, module in model.named_modules() if name}
    flat = {name.replace(".", "_"): name for name in layers} if part == "transformer" else {}
    return {_name(name, part, layers, flat): tensor for name, tensor in state.items()}


def _name(name: str, part: str, layers: set[str], flat: Mapping[str, str]) -> str:
    """The name for diffusers; unchanged where it is unknown."""
    bare = name
    for prefix in PREFIXES:
        bare = bare.removeprefix(prefix)
    layer = _layer(bare)
    found, end = layer if layer in layers else flat.get(layer), bare[len(layer) :]
    if found:
        return f"{part}.{found}{DIFFUSERS.get(end, end)}"
    if MAKERS.match(layer) and not name.startswith(PEFT):  # diffusers reads these
        return f"lora_unet_{layer.replace('.', '_')}{KOHYA.get(end, end)}"
    return name


def _layer(name: str) -> str:
    match = END.search(name)
    return name[: match.start()] if match else name


def _of_one_adapter(state: State, where: str) -> State:
    """Remove the adapter's name that peft writes in a model's state: `lora_A.default.weight`."""
    found = {match[2] for name in state if (match := _adapter(name))}
    if len(found) > 1:
        what = f"holds {len(found)} adapters ({', '.join(sorted(found))})"
        raise ValueError(f"{where}: {what}, and one is read; give each its own file")
    return {_without_adapter(name): tensor for name, tensor in state.items()}


def _adapter(name: str) -> re.Match[str] | None:
    match = NAMED.search(name)
    return match if match and match[2] not in ("weight", "bias") else None


def _without_adapter(name: str) -> str:
    match = _adapter(name)
    return name if match is None else NAMED.sub(r"\1\3", name)


def is_pefts(state: State) -> bool:
    """Whether peft wrote the file, with ranks and alphas in a configuration beside it.

    FLUX files with its authors' names have none, and diffusers reads them without.
    """
    own = [name for name in state if not MAKERS.match(name.removeprefix(PEFT))]
    return any(name.startswith(PEFT) or _adapter(name) for name in own)


def settings_beside(file: Path, where: str) -> dict[str, Any]:
    """Ranks and alphas of a file of peft, from the configuration beside it.

    Raises ValueError, naming `where`, where it is missing, since the alphas are then unknown, and
    for a configuration that is not of a LoRA.
    """
    beside = file.parent / SETTINGS
    if not beside.is_file():
        what = f"is a file of PEFT's, which keeps the alphas of its layers in {SETTINGS}"
        raise ValueError(f"{where}: {what}; put that beside it")
    said = mapping_of(beside)
    if (kind := said.get("peft_type", "LORA")) != "LORA":
        what = f"{SETTINGS} beside it says peft_type={shown(kind, 40)}"
        raise ValueError(f"{where}: {what}; give a plain LoRA")
    return {key: said[key] for key in READ if said.get(key) is not None}
