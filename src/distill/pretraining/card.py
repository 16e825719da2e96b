"""`models/README.md`: where the models come from and what they are worth; beside it the curves of their training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from distill.pretraining.plan import NEEDS, Ledger, Plan
from distill.record import hardware

TERMS = {  # of each curve, in the order in which `fit` writes them
    "clip": ("image", "text"),
    "vae": ("l1", "l2", "kl"),
    "reader": ("ce",),
    "vit": ("dino",),
    "mmdit": ("mse",),
    "unet": ("mse",),
}
FOLDERS = {  # folder -> what it holds, the stage that makes it
    "mmdit": ("`StableDiffusion3Pipeline`: an MMDiT on the rectified flow", "mmdit"),
    "unet": ("`StableDiffusionPipeline`: a UNet that predicts noise", "unet"),
    "latents": ("WebDataset shards of latents made by `mmdit`, with their captions", "shards"),
    "vit": ("`Dinov2Model` trained by DINO; reads pixels in [-1, 1]", "vit"),
    "clip_vision": ("`CLIPVisionModelWithProjection` of the text encoders' CLIP; reads pixels in [-1, 1]", "clip"),
    "reader": ("the judge of `shapes`", "reader"),
}


def write_card(out: Path, plan: Plan) -> None:
    ledger, models = Ledger(out), out / "models"
    models.mkdir(parents=True, exist_ok=True)
    for stage in TERMS:
        if ledger.finished(stage):
            _copy_curve(out / "train" / f"{stage}.csv", models / "curves" / f"{stage}.csv", TERMS[stage])
    scores = {stage: ledger.scores(stage) for stage in NEEDS if ledger.finished(stage)}
    commands = "\n".join(ledger.settings()["commands"])
    made_of = "scenes of `shapes`" if plan.data.path is None else f"pictures of `{plan.data.path}`"
    parts = [
        "# Tiny text-to-image models",
        f"Trained on {scores['data']['pictures']:,} {made_of}, {plan.data.size} x {plan.data.size} pixels. "
        "All weights are in half precision; all open with diffusers and transformers, the reader with `distill`.",
        _table(("folder", "what"), [(f"`{k}`", what) for k, (what, stage) in FOLDERS.items() if stage in scores]),
        f"```\n{commands}\n```",
        f"Seed {plan.seed} (data: {plan.data.seed}), {hardware()}. "
        "Seconds are of training, without judging; of the whole stage where nothing is trained.",
        _table(("stage", "seconds", "scores"), [(k, f"{v['seconds']:,.0f}", _said(v)) for k, v in scores.items()]),
        *(
            _teacher(stage, scores[stage], plan)
            for stage in ("mmdit", "unet")
            if "prompt_accuracy" in scores.get(stage, {})
        ),
        "`curves/` holds the losses, one line every 20 steps.",
    ]
    (models / "README.md").write_text("\n\n".join(parts) + "\n")


def _said(values: dict[str, Any]) -> str:
    """Scores in one line; a dictionary by its entries."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict) and name != "prompt_accuracy":
            words.append(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in value.items()))
        elif name not in ("seconds", "finished", "prompt_accuracy"):
            words.append(f"{name} {round(value, 3) if isinstance(value, float) else json.dumps(value)}")
    return "; ".join(words).replace("_", " ")


def _teacher(stage: str, values: dict[str, Any], plan: Plan) -> str:
    rows = [(name, f"{v['training']:.3f}", f"{v['held_out']:.3f}") for name, v in values["prompt_accuracy"].items()]
    title = f"`{stage}`: share of {plan.scoring.prompts} pictures that show all their prompt says, judged by the reader"
    return f"{title}\n\n" + _table(("sampling", "training's prompts", "held-out pairs"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _copy_curve(source: Path, target: Path, terms: tuple[str, ...]) -> None:
    """With a head, and without the lines that a stage killed between two savings wrote twice."""
    with source.open(newline="") as file:
        rows = {int(row[0]): row for row in csv.reader(file)}  # the later line of a step wins
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("step", "seconds", *terms), *(rows[k] for k in sorted(rows))])
