"""Speed and memory of methods on networks of full size with random weights, so that nothing is
downloaded.

    python benchmarks/full_size.py sd3 ladd 20 trainer.precision=bf16-mixed data.batch_size=4
    python benchmarks/full_size.py sdxl add 20 trainer.precision=bf16-mixed data.batch_size=4

Arguments: sd3 (medium, 2.0 B) or sdxl (2.6 B); a method; steps; overrides of distill.run. `--small`
before them shrinks every width, to try the script itself. Writes the pipeline into a temporary
folder, trains on noise pictures of 512 x 512 (the method does not mind) and prints the seconds of
the median step and, on a GPU, the peak of memory.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

import distill.worlds.shapes

TOKENIZER = Path(distill.worlds.shapes.__file__).parent / "models" / "mmdit" / "tokenizer"
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def vae(channels: int, small: bool) -> diffusers.AutoencoderKL:
    widths = (32, 32, 32, 32) if small else (128, 256, 512, 512)
    return diffusers.AutoencoderKL(block_out_channels=widths, latent_channels=channels, **VAE)


def clip(
    width: int, layers: int, heads: int, kind: type, small: bool
) -> transformers.PreTrainedModel:
    if small:
        width, layers, heads = 64, 1, 2
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }
    return kind(transformers.CLIPTextConfig(**shape, intermediate_size=4 * width))


def sd3(small: bool) -> diffusers.DiffusionPipeline:
    kind = transformers.CLIPTextModelWithProjection
    texts = [clip(768, 12, 12, kind, small), clip(1280, 32, 20, kind, small)]
    pooled = sum(text.config.projection_dim for text in texts)
    shape = (
        {"num_layers": 2, "num_attention_heads": 2}
        if small
        else {"num_layers": 24, "num_attention_heads": 24}
    )
    net = diffusers.SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        caption_projection_dim=64 * shape["num_attention_heads"],
        joint_attention_dim=4096,
        pooled_projection_dim=pooled,
        pos_embed_max_size=192,
        **shape,
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    return diffusers.StableDiffusion3Pipeline(
        transformer=net,
        vae=vae(16, small),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
    )


def sdxl(small: bool) -> diffusers.DiffusionPipeline:
    texts = [
        clip(768, 12, 12, transformers.CLIPTextModel, small),
        clip(1280, 32, 20, transformers.CLIPTextModelWithProjection, small),
    ]
    net = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32, 64, 64) if small else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1) if small else (1, 2, 10),
        attention_head_dim=(2, 2, 2) if small else (5, 10, 20),
        cross_attention_dim=sum(text.config.hidden_size for text in texts),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + texts[1].config.projection_dim,
        use_linear_projection=True,
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.StableDiffusionXLPipeline(
        unet=net,
        vae=vae(4, small),
        scheduler=diffusers.EulerDiscreteScheduler(**schedule),
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )


def eyes(folder: Path, small: bool) -> list[str]:
    """DINOv2 ViT-S with random weights in the places of ADD's image networks; captions by the
    teacher.
    """
    shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2} if small else {
        "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6
    }  # fmt: skip
    transformers.Dinov2Model(
        transformers.Dinov2Config(**shape, image_size=518, patch_size=14)
    ).save_pretrained(folder)
    told = ["discriminator.condition.text=teacher", "discriminator.condition.image=features"]
    return [f"discriminator.features.path={folder}", "discriminator.features.size=224", *told]


def pictures(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        (folder / f"{i}.txt").write_text(f"a picture of noise, number {i}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    small = arguments[:1] == ["--small"]
    family, method, steps, *overrides = arguments[small:]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            pipeline = {"sd3": sd3, "sdxl": sdxl}[family](small)
        networks = {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
        counts = {n: sum(p.numel() for p in m.parameters()) for n, m in networks.items()}
        print({name: f"{count / 1e6:,.0f} M" for name, count in counts.items()})
        pipeline.to(torch.bfloat16).save_pretrained(folder / "teacher")
        del pipeline
        pictures(folder / "pictures", 64, 64 if small else 512)
        command = [sys.executable, "-m", "distill.run", f"method={method}", f"teacher={family}"]
        command += [
            f"teacher.path={folder / 'teacher'}",
            "data=images",
            f"data.path={folder / 'pictures'}",
        ]
        command += ["data.size=64"] if small else []
        command += ["teacher.without=[text_encoder_3,tokenizer_3]"] if family == "sd3" else []
        command += eyes(folder / "eyes", small) if method == "add" else []
        command += [
            f"trainer.max_steps={steps}",
            "trainer.log_every_n_steps=1",
            "~metrics",
            "callbacks.samples=null",
        ]
        command += [
            f"run_dir={folder / 'run'}",
            "callbacks.checkpoint=null",
            "+callbacks.health.every=4",
        ]
        command += overrides
        subprocess.run(command, check=True)
        with open(folder / "run" / "metrics.csv", encoding="utf-8") as file:
            rates = [
                float(row["images_per_second"])
                for row in csv.DictReader(file)
                if row["images_per_second"]
            ]
        facts = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
        batch = facts["images_seen"] / facts["steps"]
        seconds = batch / statistics.median(rates[2:] or rates)
        print(f"{family} {method} {' '.join(overrides)}, {facts['hardware']}:")
        print(
            f"{seconds:.2f} s a step of {batch:.0f}, peak {facts.get('peak_memory_gib', '-')} GiB"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
