"""What is counted on meta tensors is what a computation takes, and defaults choose what fits."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

import families
import tiny
from distill.config import counting, models
from distill.core.limits import AT_ONCE, BYTES_AT_ONCE, at_once, drawn_at_once
from distill.machine import hardware
from distill.machine.memory import peak
from distill.teachers.loading import sizes

ROOT = Path(__file__).parents[1]


def measured(work) -> int:
    """The most bytes that the CPU's allocator gave out at one time, as torch's profiler records
    them.
    """
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
        torch.no_grad(),
    ):
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in changes))


def on_meta(model):
    with torch.device("meta"):
        return type(model).from_config(model.config).eval()


def autoencoder() -> AutoencoderKL:
    """SDXL's layout with an eighth of its widths."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=256,
    ).eval()


@pytest.mark.parametrize(("many", "side"), [(1, 24), (3, 16)])
def test_the_count_of_a_decoder_is_what_it_takes(many, side):
    """Within a third: kernels of the CPU have workspaces, which differ from machine to machine."""
    vae, x = autoencoder(), torch.zeros(many, 4, side, side)
    vae.decode(x)  # what is made once
    found, empty = measured(lambda: vae.decode(x).sample), on_meta(vae)
    counted = peak(lambda: empty.decode(x.to("meta")).sample)
    assert 0.99 * counted <= found < 1.33 * counted
    assert peak(lambda: vae.decode(x).sample) == pytest.approx(counted, rel=0.01)


def test_the_count_of_a_denoiser_is_what_it_takes():
    unet: UNet2DConditionModel = tiny.sdxl_unet(40, 24).eval()

    def work(model, device):
        x, tokens = torch.zeros(4, 4, 32, 32, device=device), torch.zeros(4, 77, 40, device=device)
        added = {
            "text_embeds": torch.zeros(4, 24, device=device),
            "time_ids": torch.zeros(4, 6, device=device),
        }
        t = torch.zeros(4, dtype=torch.long, device=device)
        return model(x, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample

    work(unet, "cpu")
    found, empty = measured(lambda: work(unet, "cpu")), on_meta(unet)
    counted = peak(lambda: work(empty, "meta"))
    assert 0.9 * counted <= found < 1.5 * counted


def test_views_are_no_memory_and_what_is_freed_does_not_count():
    given = torch.zeros(1000)

    def work():
        view = given.view(10, 100).t()
        first = view + 1  # 4,000 bytes
        del first
        second = given * 2
        second.add_(1)
        return second.reshape(-1)

    assert peak(work) == 4000


def test_pictures_are_decoded_a_few_at_a_time(pipelines, tmp_path):
    """Sixteen pictures take the decoder's memory of as many as make 1024 x 1024 pixels."""
    from distill.teachers.sd import SD

    teacher = SD(str(pipelines("unet")))
    cell = sizes.cell_of(teacher.folder)
    for side, many in ((256, 16), (512, 4), (1024, 1)):
        assert at_once(side, side) == many
        x = torch.zeros(16, 4, side // cell, side // cell, device="meta")
        with torch.device("meta"):
            teacher.pipeline.vae = type(teacher.pipeline.vae).from_config(teacher.vae.config)
        one = peak(lambda x=x, many=many: teacher.vae.decode(x[:many]).sample)
        pictures = 16 * 3 * side**2 * 4
        whole = peak(lambda x=x: teacher.pictures(x))
        assert one <= whole <= one + 2 * pictures + 1e6
        if many < 16:
            assert whole < peak(lambda x=x: teacher.vae.decode(x).sample)


def test_larger_pictures_are_decoded_in_diffusers_tiles():
    """The same as `enable_tiling`, and only above 1024x1024; nothing is left switched on."""
    from distill.teachers.loading.autoencoder import tiled

    vae, x = autoencoder(), torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = vae.decode(x).sample
        vae.enable_tiling()
        expected = vae.decode(x).sample
        vae.disable_tiling()
        with tiled(vae, True):
            found = vae.decode(x).sample
        with tiled(vae, False):
            same = vae.decode(x).sample
    assert not vae.use_tiling
    assert torch.equal(found, expected)
    assert torch.equal(same, plain)
    assert not torch.equal(found, plain)


def test_rows_of_the_rule():
    assert [at_once(s, s) for s in (64, 256, 512, 768, 1024, 2048)] == [256, 16, 4, 1, 1, 1]
    assert at_once(832, 1216) == 1
    assert [drawn_at_once(s, s, 8) for s in (64, 512, 1024, 2048)] == [8, 8, 4, 4]
    assert [drawn_at_once(1024, 1024, 16, room=n * BYTES_AT_ONCE) for n in (0, 1, 2.5, 100)] == [
        1,
        1,
        2,
        4,
    ]
    assert drawn_at_once(512, 512, 16, room=BYTES_AT_ONCE) == 4
    assert AT_ONCE == 1024 * 1024


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SD3 medium", "FLUX"])
def test_the_table_of_the_pages_is_what_the_benchmark_counts(name):
    """Of the real configurations, on meta tensors; the columns of the page on LoRAs and the rows of
    that on memory.
    """
    found = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
    denoiser, texts, channels, side = found["MODELS"][name]
    count = found["parameters"](denoiser)
    full, weights = (size * count / 2**30 for size in (22, 2))
    encoders = 2 * sum(map(found["parameters"], texts)) / 2**30
    vae = 2 * found["parameters"](lambda: found["autoencoder"](channels)) / 2**30
    decoding = found["decoding"](channels, side, at_once(side, side)) / 2**30
    text = (ROOT / "docs" / "how_to" / "lora.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(name)} \| .*$", text, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{full:.1f} GiB"
    assert cells[3:] == [f"{encoders:.1f} GiB", f"{vae:.1f} + {decoding:.1f} GiB"]
    page = (ROOT / "docs" / "look_up" / "troubleshooting_memory.md").read_text(encoding="utf-8")
    if name == "SD 1.5":
        return
    place = ["SDXL", "SD3 medium", "FLUX"].index(name) + 1
    counted = {
        "the teacher's denoiser": weights,
        "student, gradient": full - weights,
        "text encoders": encoders,
        "autoencoder": vae,
        "a picture through": decoding,
    }
    for begins, number in counted.items():
        (line,) = re.findall(rf"^\| {begins}.*$", page, re.MULTILINE)
        assert line.split("|")[place + 1].strip() == f"{number:.1f}"


def test_weights_are_kept_in_what_fits(pipelines, monkeypatch):
    folder = str(pipelines("mmdit"))
    bytes_of = 4 * sum(sizes.of_pipeline(pipelines("mmdit")).values())
    for memory, dtype in ((2 * bytes_of, torch.float32), (2 * bytes_of - 1, torch.bfloat16)):
        monkeypatch.setattr(hardware, "memory", lambda *_, memory=memory: memory)
        model = models.student_of(folder, "auto")
        assert next(model.network.parameters()).dtype == dtype
    assert models.resolve_dtype("float16", "nowhere") == "float16"


@pytest.mark.parametrize("family", families.marked())
def test_a_pipeline_is_counted_from_its_headers(family, tmp_path):
    folder = families.write(family, tmp_path / family)
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    modules = {k: m for k, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    expected = {k: sum(p.numel() for p in m.parameters()) for k, m in modules.items()}
    found = sizes.of_pipeline(folder)
    assert found.keys() == expected.keys()
    for name, count in expected.items():
        assert count <= found[name] <= 1.02 * count + 4000  # and buffers
    side = sizes.pixels_of(folder, "transformer" if "transformer" in found else "unet")
    assert side == (None if "size" in families.FAMILIES[family].options else 64)
    half, single = (sizes.decoding(folder, 64, 64, dtype) for dtype in ("bfloat16", "float32"))
    assert half < single <= 2 * half


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd35", "wan"])
def test_the_doctor_counts_the_autoencoder_in_its_own_dtype(family, dtype, family_folders):
    """Wan's stays in float32, and SDXL's in place of float16, in which it overflows."""
    folder = family_folders(family)
    teacher = families.teacher_of(family, folder, dtype=dtype)
    target = f"{type(teacher).__module__}.{type(teacher).__qualname__}"
    cfg = OmegaConf.create({"teacher": {"_target_": target, "dtype": dtype}, "data": {}})
    assert counting.autoencoder_dtype(cfg, folder) == str(teacher.vae.dtype).removeprefix("torch.")
    count = sum(p.numel() for p in teacher.vae.parameters())
    width = {"wan": 4, "sdxl": 2 if dtype == "bfloat16" else 4}
    expected = count * width.get(family, 4 if dtype == "float32" else 2)
    counted = counting.other_weights(cfg, folder, {"vae": count}, 2)
    assert counted == {"text encoders": 0, "autoencoder": expected}
