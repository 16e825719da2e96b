"""A LoRA of what a student has learnt: what random projections cost, and what its file says of
itself.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import nn

from distill.exporting.low_rank import _nearest, difference, lora_metadata, save_lora


def spectrum(side: int, power: float) -> torch.Tensor:
    """A matrix [side, side] whose singular values fall as i^-power."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(side, side, generator=generator)).Q for _ in range(2))
    return (u * torch.arange(1, side + 1).float().pow(-power)) @ v.T


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_projections_cost_little_of_what_the_exact_factors_keep(power):
    """Also of values that hardly fall, of which no low rank keeps much."""
    change = spectrum(512, power)
    left, right = _nearest(change, 32)
    assert left.shape == (512, 32)
    assert right.shape == (32, 512)
    least = torch.linalg.svdvals(change)[32:].square().sum()
    error = (change - left @ right).square().sum()
    assert least <= error * 1.0001
    assert error < 1.07 * least
    again = _nearest(change, 32)
    assert torch.equal(again[0], left)  # from a seed of its own
    assert torch.equal(again[1], right)


def test_the_share_is_that_of_what_is_written():
    """Measured on the factors themselves, with what no LoRA holds counted as lost."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.norm = nn.Linear(512, 512), nn.LayerNorm(8)

    base, student = Net(), Net()
    student.load_state_dict(base.state_dict())
    with torch.no_grad():
        student.wide.weight += spectrum(512, 0.7)
        student.norm.weight += 0.1
    factors, share = difference(student, base, 32)
    left, right = (factors[f"wide.lora_{side}.weight"] for side in "BA")
    changes = {k: v - base.state_dict()[k] for k, v in student.state_dict().items()}
    whole = sum(float(v.square().sum()) for v in changes.values())
    lost = float((changes["wide.weight"] - left @ right).square().sum())
    lost += float(changes["norm.weight"].square().sum())
    assert share == pytest.approx(1 - lost / whole, abs=1e-5)
    assert 0.3 < share < 0.99


def test_a_rank_above_every_layers_is_that_of_the_highest():
    """More would fill memory and the file with zeros."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(2, 16, 3))
    base = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(2, 16, 3))
    factors, share = difference(student, base, 10**9)
    assert {factors[name].shape[0] for name in factors if "lora_A" in name} == {16}
    assert share == pytest.approx(difference(student, base, 16)[1])


def said(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_kohya_file_says_its_base_and_rank(pipelines, tmp_path):
    """As tools of LoRAs, which look at nothing else, know of what base it is."""
    factors = {"mid.lora_A.weight": torch.ones(4, 8), "mid.lora_B.weight": torch.ones(8, 4)}
    folder = pipelines("sdxl")
    for naming in ("kohya", "diffusers"):
        file = tmp_path / f"{naming}.safetensors"
        save_lora(factors, file, part="unet", naming=naming, metadata=lora_metadata(folder))
        assert said(file)["ss_base_model_version"] == "sdxl_base_v1-0"
        assert said(file)["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    words = said(tmp_path / "kohya.safetensors")
    assert (words["ss_network_dim"], words["ss_network_alpha"]) == ("4", "4.0")
    assert words["ss_network_module"] == "networks.lora"
    assert lora_metadata(pipelines("unet")) == {}  # of neither width of Stable Diffusion's
    assert lora_metadata(pipelines("mmdit")) == {}


def test_a_dtype_that_cannot_hold_a_value_is_said_and_leaves_no_file(tmp_path):
    factors = {"mid.lora_A.weight": torch.full((4, 8), 1e6), "mid.lora_B.weight": torch.ones(8, 4)}
    with pytest.raises(ValueError, match=r"dtype=float16: unet\.mid\.lora_A\.weight has values"):
        save_lora(factors, tmp_path / "x.safetensors", part="unet", dtype="float16")
    assert not list(tmp_path.iterdir())
