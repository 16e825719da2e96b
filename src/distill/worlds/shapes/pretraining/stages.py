"""The stages of pretraining in order; each writes its result to files, so a command can end after
any.

<out>/data, captions.json  training data (data only for `shapes`)
<out>/train                curves, states for resuming, the parts in full precision
<out>/models               results: pipelines, reader, networks, latents, in half precision
<out>/pretraining.json     settings, seconds and scores
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.data.write import write_images
from distill.machine.hardware import hardware, precision
from distill.storage.atomic import write_atomic, write_text_atomic
from distill.storage.checkpoint_files import write_checkpoint
from distill.teachers.loading.reading import read_quietly
from distill.terminal.console import note
from distill.terminal.progress import Bar, track
from distill.worlds.shapes.pretraining import (
    diffusion,
    editing,
    inpainting,
    labelled_vit,
    parts,
    reader,
    text,
    vae,
    vit,
)
from distill.worlds.shapes.pretraining.asked import (
    OF_LABELS,
    check_data,
    chosen,
    teaching_stage,
    trains,
)
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import PER_SHARD, Work
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import sample

FOLDERS = {
    "mmdit": "`StableDiffusion3Pipeline`: an MMDiT on the rectified flow",
    "mmdit_small": "`StableDiffusion3Pipeline`: a smaller one, which learnt from `mmdit`",
    "mmdit_tiny": "`StableDiffusion3Pipeline`: the smallest, which learnt from `mmdit_small`",
    "mmdit_large": "`StableDiffusion3Pipeline`: twice the size of `mmdit`",
    "unet": "`StableDiffusionPipeline`: a UNet that predicts noise",
    "unet_inpaint": "`StableDiffusionInpaintPipeline`: `unet`, which also reads a masked picture",
    "unet_edit": "`StableDiffusionInstructPix2PixPipeline`: `unet`, which learnt to edit",
    "latents": "WebDataset shards of latents made by `mmdit`, with their captions",
    "vit": "`Dinov2Model` trained on masked pictures; reads pixels in [-1, 1]",
    "vit_labels": "`Dinov2Model` trained on labels of patches; reads pixels in [-1, 1]",
    "clip_vision": (
        "`CLIPVisionModelWithProjection` of the text encoders' CLIP; reads pixels in [-1, 1]"
    ),
    "reader": "the judge of `shapes`",
}


def _data(work: Work) -> dict[str, Any]:
    """For `shapes` write shards with scene i of the seed as sample i: picture, caption, and stated
    attributes.
    """

    def samples() -> Iterator[tuple[str, np.ndarray, str, dict]]:
        numbers = range(work.data["count"])
        for i in track(numbers, "data: drawing", unit="image", rate="images"):
            prompt, scene = sample(work.data["seed"], i)
            yield f"{i:06d}", render([scene])[0], prompt.caption, asdict(prompt)

    if work.of_shapes:
        write_images(str(work.out / "data" / "shapes-%06d.tar"), samples(), PER_SHARD)
    work.pictures, captions = work.read()
    write_atomic(work.out / "captions.json", json.dumps(captions).encode())
    return {"pictures": len(captions), "distinct_captions": len(set(captions))}


def _latents(work: Work) -> dict[str, Any]:
    model, pictures = work.vae.to(DEVICE), track(work.pictures.split(512), "encoding", unit="batch")
    latents = torch.cat([vae.encode(model, part).half() for part in pictures])
    write_checkpoint(latents, work.out / "latents.pt")
    return {"deviation": [round(float(v), 3) for v in latents.float().std((0, 2, 3))]}


def _clip(work: Work) -> dict[str, Any]:
    source = parts.folder(work)
    return text.train(work) if source is None else parts.take_text(work, source)


def _vae(work: Work) -> dict[str, Any]:
    source = parts.folder(work)
    return vae.train(work) if source is None else parts.take_vae(work, source)


class Stage(NamedTuple):
    make: Callable[[Work], dict[str, Any]]  # returns scores, and the seconds if it trains
    needs: tuple[str, ...]  # the stages whose results it reads
    # Nodes of the configuration on which its result depends, beside seed and data.
    decided_by: tuple[str, ...] = ()


def _mmdit(name: str) -> Stage:
    make = partial(diffusion.train, stage=name)
    return Stage(make, ("data", "clip", "vae", "latents"), (name, f"networks.{name}"))


STAGES = {  # in the order of asked.ORDER
    "data": Stage(_data, ()),
    "clip": Stage(_clip, ("data",), ("text_length", "clip", "parts")),
    "vae": Stage(_vae, ("data",), ("vae", "parts")),
    "latents": Stage(_latents, ("data", "vae")),
    "reader": Stage(reader.train, ("data", "vae", "latents"), ("reader_scenes", "reader")),
    "vit": Stage(vit.train, ("data",), ("vit",)),
    "vit_labels": Stage(labelled_vit.train, (), ("vit_labels", "labelled_scenes")),
    **{name: _mmdit(name) for name in ("mmdit", "mmdit_small", "mmdit_tiny", "mmdit_large")},
    "unet": Stage(
        partial(diffusion.train, stage="unet"), ("data", "clip", "vae", "latents"), ("unet",)
    ),
    "unet_inpaint": Stage(
        inpainting.train,
        ("data", "clip", "vae", "latents"),
        ("unet_inpaint", "networks.unet_inpaint"),
    ),
    "shards": Stage(diffusion.write_own, ("data", "mmdit"), ("shards",)),
    "edits": Stage(editing.write_edits, (), ("edit_pairs",)),
    "unet_edit": Stage(
        editing.train, ("edits",), ("edit_pairs", "unet_edit", "networks.unet_edit")
    ),
}


def run(asked: Mapping[str, Any], command: str) -> Path:
    """Run every chosen stage that is not finished; returns the folder of the models."""
    read_quietly()
    check_data(asked["data"]["path"], asked["data"]["size"], asked["data"]["count"])
    best = precision(asked["precision"])
    print(f"precision: {best.name} ({best.reason})")
    work, names = Work({**asked, "precision": best.name}), chosen(asked["stages"])
    for name in () if work.of_shapes else [each for each in names if each in OF_LABELS]:
        names.remove(name)
        print(f"{name}: left out, for only shapes knows what its pictures show")
    with Bar("pretraining", len(names), unit="stage") as bar:
        for k, name in enumerate(names):
            place = f"stage {k + 1} of {len(names)}, {name}"
            bar.update(k, place=place)
            note(f"pretraining: {place}")
            _run(work, name, command)
        bar.update(len(names))
    return work.models


def _run(work: Work, name: str, command: str) -> None:
    """Run one stage, unless it is finished. Raises ValueError if a stage that it needs is not."""
    finished = [each for each, about in work.known()["stages"].items() if about.get("finished")]
    needed = (*STAGES[name].needs, *teaching_stage(work.asked, name))
    if missing := [each for each in needed if each not in finished]:
        raise ValueError(
            f"stages: {name} needs {', '.join(missing)} first, which out={work.out} does not have"
        )
    work.start(name, STAGES[name].decided_by, command)
    if name in finished:
        print(f"{name}: done before")
        return
    if trains(work.asked, name):
        work.note(name, precision=work.fit(name).precision)
    began = time.monotonic()
    scores = STAGES[name].make(work)
    seconds = round(scores.pop("seconds", time.monotonic() - began), 1)
    work.note(name, **scores, seconds=seconds, finished=True)
    write_card(work)


def write_card(work: Work) -> None:
    """Write `models/README.md`, with origin and scores of the models, and their training curves
    beside it.
    """
    known, models = work.known(), work.models
    (models / "curves").mkdir(parents=True, exist_ok=True)
    for curve in (work.train / f"{name}.csv" for name in STAGES):
        if curve.is_file():
            write_atomic(models / "curves" / curve.name, curve.read_bytes())
    rows = []
    for name, stage in known["stages"].items():
        if stage.get("finished"):
            scores = {
                k: v
                for k, v in stage.items()
                if k not in ("settings", "seconds", "finished", "precision")
            }
            rows.append(f"| {name} | {stage['seconds']:,.0f} | {_in_words(scores)} |")
    paragraphs = [
        "# Tiny text-to-image models",
        (
            "All weights are in half precision; all open with diffusers and transformers, the"
            " reader with `distill`."
        ),
        "\n".join(f"- `{k}`: {what}" for k, what in FOLDERS.items() if (models / k).exists()),
        "```\n" + "\n".join(known["commands"]) + "\n```",
        (
            f"Seed {work.asked['seed']}, {hardware()}. Seconds are of training, without judging; of"
            " the whole stage where nothing is trained. Prompt accuracy: share of pictures that"
            " show all their prompt says, judged by the reader."
        ),
        "| stage | seconds | scores |\n|---|---|---|\n" + "\n".join(rows),
        "`curves/` holds the losses, one line every 20 steps.",
    ]
    write_text_atomic(models / "README.md", "\n\n".join(paragraphs) + "\n")


def _in_words(value: Any) -> str:
    """Scores in one line."""
    if isinstance(value, dict):
        apart = "; " if any(isinstance(v, dict) for v in value.values()) else ", "
        return apart.join(f"{k} {_in_words(v)}" for k, v in value.items()).replace("_", " ")
    return f"{value:.3f}" if isinstance(value, float) else str(value)
