"""The stages of pretraining in their order; each leaves its result in a file, so that any may be the last of a command.

<out>/data, captions.json     what is learnt from (data only for `shapes`)
<out>/train                   curves, states to go on from, the parts in full precision
<out>/models                  what to keep: pipelines, reader, feature networks, latents, all in half precision
<out>/scores.json             seconds and scores, as they come
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from distill.pretraining import assemble, diffusion, material, reader, scores, text, vae, vit
from distill.pretraining.card import write_card
from distill.pretraining.diffusion import Captions
from distill.pretraining.plan import NEEDS, Ledger, Plan
from distill.shapes import judge
from distill.teachers.network import PipelineTeacher, read_quietly
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3


@dataclass(frozen=True)
class Shared(Captions):
    """Encodings of distinct captions; `rows` [N] says which of them is sample i's."""

    rows: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return super().draw(self.rows[index], generator)


class Work:
    """The folder that is worked in, and what earlier stages have left there."""

    def __init__(self, plan: Plan):
        self.plan, self.out = plan, Path(plan.out)
        self.train, self.models, self.ledger = self.out / "train", self.out / "models", Ledger(self.out)

    @property
    def source(self) -> str:
        return self.plan.data.path or str(self.out / "data")

    @cached_property
    def pictures(self) -> Tensor:
        return material.read(self.plan.data, self.source)[0]

    @cached_property
    def captions(self) -> list[str]:
        return json.loads((self.out / "captions.json").read_text())

    @property
    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.train / "vae").eval().requires_grad_(False)

    @property
    def clip(self) -> CLIPModel:
        return CLIPModel.from_pretrained(self.train / "clip").eval().requires_grad_(False)

    @property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.train / "tokenizer")

    @property
    def latents(self) -> Tensor:
        return torch.load(self.out / "latents.pt", weights_only=True)

    @property
    def judge(self) -> judge.Judge:
        """The reader trained here, or else the one that is shipped."""
        own = self.models / "reader"
        return judge.Judge.load(own if own.exists() else judge.MODEL)

    def encoded(self, layer: int) -> Shared:
        """The captions through `layer` of the text encoder, each distinct one once; cached on disk."""
        path = self.train / f"captions{layer}.pt"
        distinct = sorted(set(self.captions))
        if not path.exists():
            clip, ids = self.clip, text.tokenize(self.tokenizer, distinct)
            empty = text.tokenize(self.tokenizer, [""])
            parts = track(ids.split(1024), description="captions")
            done = [diffusion.encode_captions(clip, part, empty, layer=layer) for part in parts]
            tokens, pooled = ([getattr(c, name) for c in done] for name in ("tokens", "pooled"))
            save((_joined(tokens), _joined(pooled)), path)
        number = {caption: i for i, caption in enumerate(distinct)}
        rows = torch.tensor([number[caption] for caption in self.captions])
        return Shared(*torch.load(path, weights_only=True), rows)


def _joined(parts: list[Tensor]) -> Tensor:
    """Each part begins with the empty caption; one of them is enough."""
    return torch.cat([parts[0], *(part[1:] for part in parts[1:])])


def save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _data(work: Work) -> dict[str, Any]:
    data = work.plan.data
    if data.path is None:
        material.write_shapes(data.count, data.seed, work.out / "data")
    work.pictures, captions = material.read(data, work.source)
    part = work.out / "captions.part"
    part.write_text(json.dumps(captions))
    part.replace(work.out / "captions.json")
    return {"pictures": len(captions), "distinct_captions": len(set(captions))}


def _clip(work: Work) -> dict[str, Any]:
    plan = work.plan
    tokenizer = text.train_tokenizer(work.captions, length=plan.text_length)
    clip, values = text.train(work.pictures, work.captions, tokenizer, plan.clip, out=work.train, seed=plan.seed)
    tokenizer.save_pretrained(work.train / "tokenizer")
    clip.save_pretrained(work.train / "clip")
    assemble.save_half(assemble.vision(clip), work.models / "clip_vision")
    return {**values, "vocabulary": len(tokenizer)}


def _vae(work: Work) -> dict[str, Any]:
    model, values = vae.train(work.pictures, work.plan.vae, out=work.train, seed=work.plan.seed)
    model.save_pretrained(work.train / "vae")
    return values


def _latents(work: Work) -> dict[str, Any]:
    model = work.vae
    parts = track(work.pictures.split(512), description="latents")
    latents = torch.cat([vae.encode(model, part).half() for part in parts])
    save(latents, work.out / "latents.pt")
    spread = latents.float().std((0, 2, 3))
    return {"deviation": [round(float(v), 3) for v in spread]}


def _reader(work: Work) -> dict[str, Any]:
    plan, model = work.plan, work.vae
    shared = min(plan.reader_scenes.shared, plan.data.count)
    scenes = material.scenes(plan.data.seed, shared, plan.reader_scenes.fresh)
    copies = _copies(model, work.latents[:shared])
    truth = [material.facts(scene) for scene in scenes]
    net, values = reader.train(material.draw(scenes), copies, truth, plan.reader, out=work.train, seed=plan.seed)
    net.save(work.models / "reader")
    return values | scores.reader_accuracy(work.judge, model, 5 * plan.scoring.prompts)


@torch.no_grad()
def _copies(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents [N, 4, s, s] -> uint8 pictures [N, 3, 4 s, 4 s]."""
    parts = track(latents.split(256), description="reader: copying")
    pixels: Iterable[Tensor] = (model.decode(z.float()).sample.clamp(-1, 1) for z in parts)
    return torch.cat([((x + 1) * 127.5).round().to(torch.uint8) for x in pixels])


def _vit(work: Work) -> dict[str, Any]:
    plan = work.plan
    net, seconds = vit.train(work.pictures, plan.vit, out=work.train, seed=plan.seed)
    values: dict[str, Any] = {"seconds": seconds}
    if plan.data.path is None:
        n = plan.scoring.prompts
        values["neighbour_accuracy"] = scores.vit_accuracy(net, plan.data.seed, known=5 * n, asked=n)
    assemble.save_half(net, work.models / "vit")
    return values


def _mmdit(work: Work) -> dict[str, Any]:
    plan, folder = work.plan, work.models / "mmdit"
    net, seconds = diffusion.train_mmdit(work.latents, work.encoded(-2), plan.mmdit, out=work.train, seed=plan.seed)
    assemble.save_sd3(net, work.vae, work.clip, work.tokenizer, folder)
    _judge_teacher(work, "mmdit", SD3(str(folder)))
    return {"seconds": seconds}


def _unet(work: Work) -> dict[str, Any]:
    plan, folder = work.plan, work.models / "unet"
    net, seconds = diffusion.train_unet(work.latents, work.encoded(-1), plan.unet, out=work.train, seed=plan.seed)
    assemble.save_sd(net, work.vae, work.clip, work.tokenizer, folder)
    _judge_teacher(work, "unet", SD(str(folder)))
    return {"seconds": seconds}


def _judge_teacher(work: Work, stage: str, teacher: PipelineTeacher) -> None:
    """Prompt accuracy at each guidance, and at one step; noted one by one, for they take minutes."""
    if work.plan.data.path is not None:
        return
    asked = work.plan.scoring
    for steps, guidance in [*((asked.steps, g) for g in asked.guidance), (1, work.plan.shards.guidance)]:
        for sort in ("training", "held_out"):
            name, known = (
                f"{steps} step{'s' * (steps > 1)}, guidance {guidance:g}",
                work.ledger.scores(stage).get("prompt_accuracy", {}),
            )
            if sort in known.get(name, {}):
                continue
            share = scores.teacher_accuracy(
                teacher, work.judge, asked.prompts, held_out=sort == "held_out", steps=steps, guidance=guidance
            )
            work.ledger.note(stage, prompt_accuracy=known | {name: known.get(name, {}) | {sort: share}})


def _shards(work: Work) -> dict[str, Any]:
    plan, asked = work.plan, work.plan.shards
    if plan.data.path is None:
        captions = material.new_captions(plan.data.seed, asked.count)
    else:
        captions = [work.captions[i % len(work.captions)] for i in range(asked.count)]
    teacher = SD3(str(work.models / "mmdit"))
    folder = work.models / "latents"
    assemble.write_teacher_latents(teacher, captions, folder, guidance=asked.guidance, steps=asked.steps)
    return {"latents": asked.count}


STAGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "data": _data,
    "clip": _clip,
    "vae": _vae,
    "latents": _latents,
    "reader": _reader,
    "vit": _vit,
    "mmdit": _mmdit,
    "unet": _unet,
    "shards": _shards,
}


def run(plan: Plan, command: str) -> Path:
    """Every stage asked for that is not finished yet; returns the folder of the models."""
    read_quietly()
    work, chosen = Work(plan), plan.chosen()
    if plan.data.path is not None and "reader" in chosen:
        chosen.remove("reader")
        print("reader: left out, for only shapes knows what its pictures show")
    for name in chosen:
        work.ledger.agree(name, plan.settings(name))
    for name in chosen:
        if work.ledger.finished(name):
            print(f"{name}: done before")
            continue
        if missing := [each for each in NEEDS[name] if not work.ledger.finished(each)]:
            raise ValueError(f"stages: {name} needs {', '.join(missing)} first, which out={plan.out} does not have")
        work.ledger.begin(name, plan.settings(name), command)
        began = time.monotonic()
        values = STAGES[name](work)
        seconds = round(values.pop("seconds", time.monotonic() - began), 1)
        work.ledger.note(name, **values, seconds=seconds, finished=True)
        write_card(work.out, plan)
    return work.models
