"""`models/README.md`: where the models come from and what they are worth; beside it the curves of their training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distill.pretraining.plan import Ledger
from distill.record import hardware

FOLDERS = {
    "mmdit": "`StableDiffusion3Pipeline`: an MMDiT on the rectified flow",
    "unet": "`StableDiffusionPipeline`: a UNet that predicts noise",
    "latents": "WebDataset shards of latents made by `mmdit`, with their captions",
    "vit": "`Dinov2Model` trained by DINO; reads pixels in [-1, 1]",
    "clip_vision": "`CLIPVisionModelWithProjection` of the text encoders' CLIP; reads pixels in [-1, 1]",
    "reader": "the judge of `shapes`",
}
NOT_SCORES = ("settings", "seconds", "finished")


def write_card(out: Path, seed: int) -> None:
    known, models = Ledger(out).read(), out / "models"
    (models / "curves").mkdir(parents=True, exist_ok=True)
    for curve in (out / "train").glob("*.csv"):
        shutil.copy(curve, models / "curves" / curve.name)
    rows = []
    for name in Ledger(out).finished():
        stage = known["stages"][name]
        scores = {k: v for k, v in stage.items() if k not in NOT_SCORES}
        rows.append(f"| {name} | {stage['seconds']:,.0f} | {_said(scores)} |")
    parts = [
        "# Tiny text-to-image models",
        "All weights are in half precision; all open with diffusers and transformers, the reader with `distill`.",
        "\n".join(f"- `{k}`: {what}" for k, what in FOLDERS.items() if (models / k).exists()),
        "```\n" + "\n".join(known["commands"]) + "\n```",
        f"Seed {seed}, {hardware()}. Seconds are of training, without judging; of the whole stage where nothing is "
        "trained. Prompt accuracy: share of pictures that show all their prompt says, judged by the reader.",
        "| stage | seconds | scores |\n|---|---|---|\n" + "\n".join(rows),
        "`curves/` holds the losses, one line every 20 steps.",
    ]
    (models / "README.md").write_text("\n\n".join(parts) + "\n")


def _said(value: Any) -> str:
    """Scores in a line; a dictionary by its entries."""
    if isinstance(value, dict):
        apart = "; " if any(isinstance(v, dict) for v in value.values()) else ", "
        return apart.join(f"{k} {_said(v)}" for k, v in value.items()).replace("_", " ")
    return f"{value:.3f}" if isinstance(value, float) else str(value)
