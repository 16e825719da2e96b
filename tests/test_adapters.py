"""LoRA files of other programs: every layer by its own alpha and rank, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import families
import ldm
import tiny
from distill.teachers.flux import Flux
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from distill.teachers.sdxl import SDXL

MAKE = {"unet": SD, "sdxl": SDXL, "mmdit": SD3, "flux": Flux}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = (
                families.write(family, tmp_path_factory.mktemp("flux") / family)
                if family == "flux"
                else pipelines(family)
            )
        return made[family]

    return folder


@pytest.fixture
def model(folders):
    """Family -> the denoiser of a teacher without a LoRA."""
    return lambda family: made(folders(family)).network.model


def made(folder, **options):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    families_of = {
        "StableDiffusionPipeline": SD,
        "StableDiffusionXLPipeline": SDXL,
        "StableDiffusion3Pipeline": SD3,
        "FluxPipeline": Flux,
    }
    options |= {"size": 64} if index["_class_name"] == "FluxPipeline" else {}
    return families_of[index["_class_name"]](str(folder), **options)


def factors(model, ranks=(2, 3, 5), alphas=(1.0, 2.0, 6.0)):
    """Layer -> A, B and alpha; ranks and alphas differ by layer, and convolutions are among them."""
    random, found = torch.Generator().manual_seed(3), {}
    ends = ("to_q", "to_out.0", "ff.net.2", "conv1", "proj_in")
    layers = {n: m for n, m in model.named_modules() if n.endswith(ends) and hasattr(m, "weight")}
    for i, (name, layer) in enumerate(layers.items()):
        rank, (out, *rest) = ranks[i % len(ranks)], layer.weight.shape
        a, b = torch.Size([rank, *rest]), torch.Size([out, rank, *[1] * (len(rest) - 1)])
        pair = (torch.randn(shape, generator=random) for shape in (a, b))
        found[name] = (*pair, alphas[i // 2 % len(alphas)])
    assert len({alpha / len(a) for a, _, alpha in found.values()}) > 3
    return found


def kohya(layers, names=None):
    state = {}
    for name, (a, b, alpha) in layers.items():
        stem = "lora_unet_" + (names[name] if names else name).replace(".", "_")
        state |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state


def dotted(layers, part, sides=("lora_A", "lora_B")):
    state = {}
    for name, (a, b, alpha) in layers.items():
        state |= {f"{part}.{name}.{sides[0]}.weight": a, f"{part}.{name}.{sides[1]}.weight": b}
        state[f"{part}.{name}.alpha"] = torch.tensor(alpha)
    return state


def moved(before, layers):
    """The state that W + (alpha / rank) B A makes, from its definition."""
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for name, (a, b, alpha) in layers.items():
        change = (b.flatten(1).double() @ a.flatten(1).double()) * alpha / len(a)
        weight = expected[f"{name}.weight"]
        weight += change.view(weight.shape).to(weight)
    return expected


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def original(model):
    """Layer of a UNet -> its name in the makers' code, which kohya's files of SDXL use."""
    names = zip(model.state_dict(), ldm.unet(model), strict=True)
    return {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for ours, theirs in names
        if ours.endswith(".weight")
    }


NAMINGS = [
    ("unet", "kohya"),
    ("sdxl", "kohya"),
    ("sdxl", "sgm"),
    ("unet", "peft"),
    ("unet", "lora.down"),
    ("mmdit", "peft"),
    ("flux", "peft"),
]


@pytest.mark.parametrize(("family", "naming"), NAMINGS)
def test_every_layer_has_its_own_alpha_and_rank(family, naming, model, folders, tmp_path):
    net = model(family)
    layers, part = factors(net), "unet" if family in ("unet", "sdxl") else "transformer"
    if naming == "sgm":
        state = kohya(layers, original(net))
    elif naming == "kohya":
        state = kohya(layers)
    else:
        sides = ("lora_A", "lora_B") if naming == "peft" else ("lora.down", "lora.up")
        state = dotted(layers, part, sides)
    save_file(state, tmp_path / "lora.safetensors")
    teacher = made(folders(family), weights=str(tmp_path / "lora.safetensors"))
    assert_same(teacher.network.model.state_dict(), moved(net.state_dict(), layers))


def test_halves_keep_their_small_numbers(model, folders, tmp_path):
    net = model("unet")
    layers = {n: (a, b * 1e-6, 0.25) for n, (a, b, _) in factors(net).items()}
    halves = {n: (a.half(), b.half(), alpha) for n, (a, b, alpha) in layers.items()}
    save_file(kohya(halves), tmp_path / "lora.safetensors")
    teacher = made(folders("unet"), weights=str(tmp_path / "lora.safetensors"))
    name, (a, b, alpha) = next(iter(halves.items()))
    weights = [m.state_dict()[f"{name}.weight"] for m in (teacher.network.model, net)]
    change = weights[0] - weights[1]
    expected = (b.flatten(1).float() @ a.flatten(1).float() * alpha / len(a)).view(change.shape)
    assert float((change - expected).norm() / expected.norm()) < 0.05


def test_what_peft_was_told_beside_the_tensors_is_heeded(model, folders, tmp_path):
    """diffusers writes peft's settings into the file: ranks and alphas by patterns of names."""
    net = model("unet")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    patterns = {"rank_pattern": {"attn1.to_q": 5}, "alpha_pattern": {"attn1.to_q": 2}}
    net.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False, **patterns)
    )
    low = get_peft_model_state_dict(net)
    layers = {}
    for name in [n for n in low if "lora_A" in n]:
        stem = name.removesuffix(".lora_A.weight")
        alpha = 2.0 if "attn1" in stem else 8.0
        layers[stem] = (low[name].clone(), low[name.replace("lora_A", "lora_B")].clone(), alpha)
    pipe = SD(str(folders("unet"))).pipeline
    settings = net.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=low, unet_lora_adapter_metadata=settings)
    (file,) = tmp_path.glob("*.safetensors")
    found = made(folders("unet"), weights=str(file)).network.model.state_dict()
    assert {len(a) for a, _, _ in layers.values()} == {2, 5}
    assert_same(found, moved(before, layers))


# -- files that would not be used whole ------------------------------------------------------------


def said(folders, state, tmp_path, family="unet"):
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"^teacher\.weights=") as caught:
        made(folders(family), weights=str(tmp_path / "lora.safetensors"))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize("end", ["dora_scale", "hada_w1_a", "lokr_w1", "lora_mid.weight", "diff"])
def test_terms_that_are_not_read_are_named(end, model, folders, tmp_path):
    state = kohya(factors(model("unet")))
    stem = next(iter(state)).partition(".")[0]
    state[f"{stem}.{end}"] = torch.ones(2, 2)
    text = said(folders, state, tmp_path)
    assert f"1 of its tensors are no part of a plain LoRA, {stem}.{end} for one; " in text


def test_half_a_layer_is_named(model, folders, tmp_path):
    state = dotted(factors(model("unet")), "unet")
    name = next(n for n in state if "lora_B" in n)
    state.pop(name)
    assert name.replace("lora_B", "lora_A") in said(folders, state, tmp_path)


@pytest.mark.parametrize("naming", ["kohya", "peft", "both"])
def test_layers_that_are_not_there_are_named(naming, model, folders, tmp_path):
    """diffusers would apply the others. Of a file with blocks under two namings it drops one's."""
    net = model("unet")
    layers = factors(net)
    state = dotted(layers, "unet") if naming == "peft" else kohya(layers)
    prefix, sides = "lora_unet_", ("down", "up")
    if naming == "peft":
        prefix, sides = "unet.", ("A", "B")
    other = {
        "kohya": "down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q",
        "peft": "down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q",
        "both": "input_blocks_2_1_transformer_blocks_0_attn1_to_q",
    }[naming]
    for side, shape in zip(sides, [(2, 16), (16, 2)], strict=True):
        state[f"{prefix}{other}.lora_{side}.weight"] = torch.ones(shape)
    text = said(folders, state, tmp_path)
    assert f"1 of its {len(layers) + 1} layers are none of this UNet2DConditionModel, " in text
    where = "input_blocks_2" if naming == "both" else "down_blocks.7"
    assert where in text


@pytest.mark.parametrize("family", ["unet", "mmdit"])
def test_another_model_s_widths_are_one_line(family, model, folders, tmp_path):
    net = model(family)
    layers = {
        name: (torch.ones(2, 40), torch.ones(40, 2), 1.0)
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear) and name.endswith("to_q")
    }
    part = "unet" if family == "unet" else "transformer"
    text = said(folders, dotted(layers, part), tmp_path, family)
    name, weight = next((n, net.get_submodule(n).weight) for n in layers)
    kind = type(net).__name__
    what = f"is a LoRA of another {kind} ({name} is {list(weight.shape)} here and [40, 40] there)"
    assert what in text


def test_a_lora_that_fits_still_leaves_nothing_behind(model, folders, tmp_path):
    """The network has no adapters afterwards: a LoRA student may add its own."""
    save_file(kohya(factors(model("unet"))), tmp_path / "lora.safetensors")
    teacher = made(folders("unet"), weights=str(tmp_path / "lora.safetensors"))
    names = teacher.network.model.state_dict()
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert not getattr(teacher.network.model, "peft_config", None)
    assert tiny.same(tiny.weights(teacher.network.model), names)
