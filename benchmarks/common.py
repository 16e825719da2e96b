"""What the benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import numpy as np
import torch
import transformers
from hydra import compose, initialize_config_dir

import distill.worlds.shapes
from distill.config.build import settle_precision
from distill.config.location import CONF_DIR
from distill.data.write import write_latents
from distill.training.speed import speed_of

TOKENIZER = Path(distill.worlds.shapes.__file__).parent / "models" / "mmdit" / "tokenizer"


def composed(overrides: Sequence[str]) -> Any:
    """The configuration of a run, without a head start: every step is a whole one."""
    with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "loop.head_start=0"])
    settle_precision(cfg)
    return cfg


def fit(cfg: Any, method: Any, source: Any, steps: int, *callbacks: L.Callback) -> L.Trainer:
    """Train on one device and leave nothing behind."""
    bare = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    given = {
        "accelerator": cfg.trainer.accelerator,
        "precision": cfg.trainer.precision,
        "callbacks": [*speed_of(dict(cfg.trainer)), *callbacks],
    }
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, devices=1, **bare, **given)
    trainer.fit(method, source.loader(seed=cfg.seed))
    return trainer


class States(L.Callback):
    """Gives optimisers their states before the first step, as they have them after many: heads of a
    pool have none before they are drawn.
    """

    def on_train_start(self, trainer: L.Trainer, method: Any) -> None:
        for optimizer in trainer.optimizers:  # a step without effect makes the states
            every = [p for group in optimizer.param_groups for p in group["params"]]
            for p in getattr(optimizer, "_own", every):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def unet_overrides(folder: Path) -> list[str]:
    """Write a pipeline whose UNet has SD 1.5's layout and 37.5 M random weights, and latents.

    Returns the overrides of a run on them by LADD without the distillation term.
    """
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    text = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1}
    text["vocab_size"] = len(tokenizer)
    diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=16, block_out_channels=(64, 128, 256, 256), cross_attention_dim=768
        ),
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "teacher")
    given = [
        "teacher=sd15",
        f"teacher.path={folder / 'teacher'}",
        *noise_latents(folder, (4, 16, 16)),
    ]
    return [*given, "data.batch_size=8", "method=ladd", "trainer.precision=32-true"]


def noise_latents(folder: Path, shape: tuple[int, ...], count: int = 64) -> list[str]:
    """Write latents of noise with captions; returns what distill.run needs to read them."""
    random = np.random.default_rng(0)
    samples = ((f"{i:03d}", random.standard_normal(shape), f"number {i}") for i in range(count))
    write_latents(str(folder / "latents-%06d.tar"), samples, per_shard=count)
    path = folder / "latents-000000.tar"
    return ["data=latents", f"data.path={path}", "data.num_workers=0", "~metrics"]
