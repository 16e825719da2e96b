"""LoRA files of other programs: every layer by its own alpha and rank, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import families
import ldm
import tiny
from distill.teachers.sd import SD

WRITTEN = ("flux", "flux2_klein", "chroma")


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = (
                families.write(family, tmp_path_factory.mktemp("flux") / family)
                if family in WRITTEN
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
    options |= {"size": 64} if index["_class_name"].startswith(("Flux", "Chroma")) else {}
    return families.teacher_at(folder, **options)


def factors(model, ranks=(2, 3, 5), alphas=(1.0, 2.0, 6.0)):
    """Layer -> A, B and alpha; ranks and alphas differ by layer, and convolutions are among
    them.
    """
    random, found = torch.Generator().manual_seed(3), {}
    ends = ("to_q", "to_out.0", "ff.net.2", "conv1", "proj_in", "ff.linear_out", "attn.to_out")
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
    ("unet", "bare"),
    ("sdxl", "bare"),
    ("sdxl", "bare lora_down"),
    ("flux", "diffusion_model"),
    ("mmdit", "diffusion_model"),
    ("sdxl", "makers"),
    ("mmdit", "flat"),
    ("flux", "flat"),
    pytest.param("flux2_klein", "peft", marks=pytest.mark.slow),
    pytest.param("flux2_klein", "flat", marks=pytest.mark.slow),
    pytest.param("chroma", "peft", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "naming"), NAMINGS)
def test_every_layer_has_its_own_alpha_and_rank(family, naming, model, folders, tmp_path):
    net = model(family)
    layers, part = factors(net), "unet" if family in ("unet", "sdxl") else "transformer"
    if naming == "sgm":
        state = kohya(layers, original(net))
    elif naming in ("kohya", "flat"):
        state = kohya(layers)
    elif naming == "makers":  # as ComfyUI saves them
        names = original(net)
        theirs = {names[name]: terms for name, terms in layers.items()}
        state = dotted(theirs, "diffusion_model")
    elif naming == "diffusion_model":
        state = dotted(layers, naming)
    elif naming.startswith("bare"):
        sides = ("lora_down", "lora_up") if naming.endswith("down") else ("lora_A", "lora_B")
        named = dotted(layers, part, sides)
        state = {name.removeprefix(f"{part}."): tensor for name, tensor in named.items()}
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


@pytest.mark.parametrize("family", ["unet", "mmdit"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_pefts_own_is_read_with_the_settings_beside_it(
    family, dora, model, folders, tmp_path
):
    patterns = {"rank_pattern": {"to_k": 5}, "alpha_pattern": {"to_k": 2}}
    names = ["to_q", "to_k"]
    low = LoraConfig(
        r=2, lora_alpha=8, target_modules=names, init_lora_weights=False, use_dora=dora, **patterns
    )
    tuned = get_peft_model(made(folders(family)).network.model, low)
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert all(name.startswith("base_model.model.") for name in load_file(file))
    found = made(folders(family), weights=str(file)).network.model.state_dict()
    expected = tuned.merge_and_unload().state_dict()
    assert not tiny.same(found, model(family).state_dict())
    assert_same(found, expected)


def test_an_adapter_s_name_within_names_is_left_out(model, folders, tmp_path):
    """As `model.state_dict()` has it: `lora_A.default.weight`."""
    low = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    tuned = get_peft_model(made(folders("unet")).network.model, low)
    tuned.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    state = {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k}
    assert all(".default.weight" in name for name in state)
    save_file(state, tmp_path / "lora.safetensors")
    file = tmp_path / "lora.safetensors"
    found = made(folders("unet"), weights=str(file)).network.model.state_dict()
    assert_same(found, tuned.merge_and_unload().state_dict())
    more = state | {k.replace(".default.", ".other."): v.clone() for k, v in state.items()}
    text = said(folders, more, tmp_path)
    assert "holds 2 adapters (default, other), and one is read; give each its own file" in text


def test_flux_s_makers_names_are_read_as_kohya_s(model, folders, tmp_path):
    net, random = model("flux"), torch.Generator().manual_seed(3)
    width = net.transformer_blocks[0].attn.to_q.weight.shape[1]
    a, b = (torch.randn(shape, generator=random) for shape in ((2, width), (3 * width, 2)))
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    state = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(state | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    found = made(folders("flux"), weights=str(tmp_path / "lora.safetensors")).network.model
    parts = zip(("to_q", "to_k", "to_v"), b.chunk(3), strict=True)
    layers = {f"transformer_blocks.0.attn.{name}": (a, up, 1.0) for name, up in parts}
    assert_same(found.state_dict(), moved(net.state_dict(), layers))


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


def test_pefts_file_without_its_settings_says_what_lacks(model, folders, tmp_path):
    layers = factors(model("unet"))
    state = {k: v for k, v in dotted(layers, "base_model.model").items() if "alpha" not in k}
    text = said(folders, state, tmp_path)
    assert "keeps the alphas of its layers in adapter_config.json; put that beside it" in text
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}', encoding="utf-8")
    assert "says peft_type=LOHA; give a plain LoRA" in said(folders, state, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["lora_unet_joint_blocks_0_x_block_attn_qkv", "diffusion_model.joint_blocks.0.x_block.mlp.fc1"],
)
def test_kohya_s_names_of_sd3_are_refused_for_what_they_are(name, folders, tmp_path):
    state = {
        f"{name}.lora_down.weight": torch.ones(2, 16),
        f"{name}.lora_up.weight": torch.ones(48, 2),
    }
    text = said(folders, state, tmp_path, "mmdit")
    assert f"names layers as in SD3's own code ({name}" in text
    assert "convert it to diffusers' names (transformer.transformer_blocks...), or merge it" in text


def test_names_that_nobody_knows_are_shown(folders, tmp_path):
    state = {"other.lora_A.weight": torch.ones(2, 16), "other.lora_B.weight": torch.ones(16, 2)}
    text = said(folders, state, tmp_path)
    assert "none of its layers is one of this UNet2DConditionModel, other for one; choose" in text


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
