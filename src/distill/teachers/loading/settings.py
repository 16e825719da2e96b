"""Settings in a pipeline's configuration files that change the computation.

Those that no adapter supports are refused by name. Nothing here imports torch: the check is made
before weights are loaded.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.storage.bounded import mapping_of
from distill.teachers.families import Family
from distill.teachers.loading.locate import home_of
from distill.terminal.shown import shown

Config = Mapping[str, Any]

MOST_LEVELS = 16  # ours: of an autoencoder, each at half the resolution
MOST_STEPS = 100_000  # ours: of a scheduler's grid of noise levels; usual models have 1,000
MOST_TOKENS = 4096  # ours: of a caption; CLIP reads 77
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
CONDITIONED_ON = {  # setting of a UNet -> its additional conditioning, not supported here
    "time_cond_proj_dim": "guidance, as a latent consistency model",
    "class_embed_type": "classes",
    "num_class_embeds": "classes",
}
NETWORKS = ("unet", "transformer", "vae")


def check_settings(family: Family, config_of: Callable[[str], Config], where: str) -> None:
    """Raise ValueError, starting with `where`, for settings that a pipeline of `family` would
    ignore.

    `config_of` returns the configuration of the part of this name, {} for a missing part.
    """
    parts = {name: config_of(name) for name in (*NETWORKS, "scheduler")}
    for name in NETWORKS:
        refuse_quantised(parts[name], f"{where}: its {name}/")
    _check_denoiser(family, parts, where)
    if parts["scheduler"]:
        check_grid(parts["scheduler"], f"{where}: its scheduler")
        prediction_of(parts["scheduler"], where, flow=family.flow)
    if config_of("transformer_2"):
        what = "it has two transformers, one for high noise and one for low (transformer_2/)"
        raise ValueError(f"{where}: {what}, and one is distilled; give a model with one")
    for name in family.padded:
        _check_length(config_of(name).get("model_max_length"), f"{where}: its {name}/")
    given = [key for key in ("latents_mean", "latents_std") if parts["vae"].get(key)]
    if given and not family.standardised:
        what = f"its vae/ has {' and '.join(given)}, which a {family.kind_name()} does not read"
        raise ValueError(f"{where}: {what}; take them out of its config.json if that is right")


def refuse_quantised(config: Config, where: str) -> None:
    """Raise ValueError, starting with `where`, for a network with quantised weights.

    Its tensors are codes and scales that another library unpacks.
    """
    said = config.get("quantization_config")
    if not said:
        return
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    by = f" by {shown(method, 30)}" if method else ""
    what = (
        f"is quantised{by} (quantization_config in its config.json), and no such weights are read"
    )
    raise ValueError(f"{where} {what}; give the folder that is not quantised")


def refuse_quantised_parts(folder: Path, where: str) -> None:
    """Raise ValueError, starting with `where`, for a pipeline folder with a quantised network."""
    for file in sorted(folder.glob("*/config.json")):
        refuse_quantised(mapping_of(file), f"{where}: its {file.parent.name}/")


def lacking(family: Family, part: str) -> str:
    """The remedy for a missing part of a pipeline of `family`."""
    if part not in family.spare:
        return "fetch it anew"
    return f"add teacher.without=[{','.join(family.spare)}] to go without it, or fetch it anew"


def check_grid(scheduler: Config, where: str) -> None:
    """Raise ValueError, starting with `where`, for a grid of noise levels that is none, or has so
    many that it would fill the memory.
    """
    steps = scheduler.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= MOST_STEPS:
        what = f"has num_train_timesteps={shown(steps, 60)}, which must be 1 to {MOST_STEPS:,}"
        raise ValueError(f"{where} {what}; fetch it anew")


def _check_length(length: Any, where: str) -> None:
    """Raise ValueError, starting with `where`, for a caption length that cannot be padded to."""
    if length is not None and not (type(length) is int and 1 < length <= MOST_TOKENS):
        what = f"has model_max_length={shown(length, 60)}"
        raise ValueError(f"{where} {what}, which must be 2 to {MOST_TOKENS:,}; fetch it anew")


def in_folder(folder: Path) -> Callable[[str], Config]:
    """Part -> configuration in a pipeline folder."""

    def config_of(part: str) -> Config:
        kind = part.partition("_")[0]
        name = f"{kind}_config.json" if kind in ("scheduler", "tokenizer") else "config.json"
        file = folder / part / name
        return mapping_of(file) if file.is_file() else {}

    return config_of


def configurations(path: str | Path) -> Callable[[str], Config]:
    """Part -> configuration, from a pipeline folder or from its bases."""
    return lambda part: in_folder(Path(home_of(Path(path), part)))(part)


def pixels_of(config_of: Callable[[str], Config]) -> int | None:
    """Side in pixels of the pictures of a pipeline's training; None where its files lack it."""
    vae, net = config_of("vae"), config_of("transformer") or config_of("unet")
    side = net.get("sample_size")
    return side * cell_of(vae, "vae") if vae and isinstance(side, int) else None


def cell_of(vae: Config, where: str) -> int:
    """Side of a latent in pixels for an autoencoder of this configuration.

    Raises ValueError, starting with `where`, if it is none.
    """
    # Of an autoencoder of videos: one less than its levels. Older files do not say the factor.
    halvings = vae.get("temperal_downsample")
    if isinstance(halvings, list) and len(halvings) < MOST_LEVELS:
        scale = vae.get("scale_factor_spatial") or 2 ** len(halvings)
        if type(scale) is not int or not 0 < scale < 2**MOST_LEVELS:
            what = f"has scale_factor_spatial={shown(scale, 60)}"
            raise ValueError(f"{where}: its vae/config.json {what}; fetch it anew")
        return scale
    widths = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
    if not isinstance(widths, list) or not 0 < len(widths) < MOST_LEVELS:
        what = "does not say block_out_channels, a width for each of its levels"
        raise ValueError(f"{where}: its vae/config.json {what}; fetch it anew")
    return 2 ** (len(widths) - 1)


class Sides(NamedTuple):
    """What the sides of a teacher's pictures are, in pixels."""

    unit: int  # they are multiples of it: pixels per latent times latents per token
    most: float = math.inf  # that its embedded positions reach


def sides_of(family: Family, config_of: Callable[[str], Config], where: str) -> Sides | None:
    """The sides of pictures of a pipeline; None where its files lack them."""
    vae, net = config_of("vae"), config_of("transformer") or config_of("unet")
    # the denoiser's own patch_size is that of what is packed already
    patch = family.packing if family.packing > 1 else _patch_of(net)
    if not vae or not net or type(patch) is not int:
        return None
    unit = patch * family.folding * cell_of(vae, where)
    positions = positions_of(net)
    return Sides(unit, positions * unit) if positions else Sides(unit)


def positions_of(net: Mapping[str, Any]) -> int | None:
    """Largest number of tokens a side that a network's embedded positions reach, of SD3, Wan, or a
    NextDiT, whose first axis is that of captions; None if there is no limit.
    """
    lengths = net.get("axes_lens")
    if isinstance(lengths, list | tuple) and len(lengths) > 1:
        found = lengths[1:]
    else:
        found = [net.get("pos_embed_max_size") or net.get("rope_max_seq_len")]
    return min(found) if all(type(x) is int for x in found) else None


def _patch_of(net: Config) -> Any:
    """Side of a token in latents; networks for several sides read tokens of the first."""
    patch, sides = net.get("patch_size"), net.get("all_patch_size")
    if isinstance(patch, list) and patch:  # of a video's frames, rows and columns
        return patch[-1]
    return patch or (sides[0] if isinstance(sides, list) and sides else 1)


def prediction_of(scheduler: Config, where: str, *, flow: bool = False) -> str:
    """The prediction type of a network with this scheduler configuration: eps, v, x0 or flow.

    With `flow` it must be flow. Raises ValueError, starting with `where`, for any other.
    """
    name = str(scheduler.get("_class_name", ""))
    said = str(scheduler.get("prediction_type", "epsilon"))
    # TrigFlow's network is that of a flow, whose x_t and v the pipeline scales (Sana-Sprint).
    found = "flow" if name.startswith("Flow") or said == "trigflow" else KINDS.get(said)
    if name.startswith("EDM"):
        what = f"its scheduler is an {name}, and networks trained as in EDM are not read"
        raise ValueError(f"{where}: {what}; give a model that predicts eps, v or flow")
    if found is None or (scheduler.get("use_flow_sigmas") and found != "flow"):
        flows = " with use_flow_sigmas" if scheduler.get("use_flow_sigmas") else ""
        what = f"its scheduler ({name}) says prediction_type={said}{flows}"
        raise ValueError(
            f"{where}: {what}; known are {', '.join(KINDS)}, the last with flow sigmas"
        )
    if flow and found != "flow":
        what = f"its scheduler ({name}) says prediction_type={said}, and its network predicts flow"
        raise ValueError(f"{where}: {what}; give the scheduler that it was published with")
    return found


def _misread(family: Family, read: int, latents: int, side: int) -> str | None:
    """What is wrong with a denoiser that reads so many channels, for an autoencoder with so many
    and latents of `side` pixels; None if they are its family's.
    """
    cell = (family.packing * family.folding) ** 2
    counts = {
        None: (latents, "text-to-image model"),
        "mask": (2 * latents + (side**2 if family.whole_mask else 1), "inpainting model"),
        "source": (latents if family.in_context else 2 * latents, "editing model"),
    }
    expected, wanted = counts[family.image]
    if read == expected * cell:
        return None
    others = {latents: "a text-to-image", 2 * latents: "an editing"}
    others |= dict.fromkeys([2 * latents + 1, 2 * latents + side**2], "an inpainting")
    found = others.get(read // cell) if read % cell == 0 else None
    what = f": it is {found} model" if found else ", one that no teacher supports"
    article = "a" if wanted.startswith("text") else "an"
    reads = f"reads {read} channels and {article} {wanted}'s reads {expected * cell}"
    return f"{reads}{what}; give the {wanted}"


def _check_denoiser(family: Family, parts: Mapping[str, Config], where: str) -> None:
    name = "transformer" if parts["transformer"] else "unet"
    net, vae = parts[name], parts["vae"]
    latents = vae.get("latent_channels") or vae.get("z_dim")
    read = net.get("in_channels")
    side = cell_of(vae, where) if family.packing > 1 and vae.get("block_out_channels") else 1
    if read and latents and (said := _misread(family, read, latents, side)):
        raise ValueError(f"{where}: its {name}/ {said}")
    if name != "unet" or not net:
        return
    setting = next((key for key in CONDITIONED_ON if net.get(key)), None)
    if setting:
        cause = f"it is conditioned on {CONDITIONED_ON[setting]}"
        what = f"its unet/ has {setting}={net[setting]}: {cause}"
        raise ValueError(f"{where}: {what}, which no teacher supports; give another model")
    if (hidden := net.get("encoder_hid_dim_type")) not in (None, "text_proj"):
        what = f"its unet/ has encoder_hid_dim_type={hidden}: it is conditioned on images"
        raise ValueError(f"{where}: {what}, which no teacher supports; give another model")
    found, expected = net.get("addition_embed_type"), family.addition_embed_type
    if found != expected:
        kind = family.kind_name()
        what = f"its unet/ has addition_embed_type={found}, and a {kind}'s has {expected}"
        raise ValueError(f"{where}: {what}; choose another teacher=")
