"""The stages of pretraining in their order; each leaves its result in a file, so that any may be the last of a command.

<out>/data, captions.json     what is learnt from (data only for `shapes`)
<out>/train                   curves, states to go on from, the parts in full precision
<out>/models                  what to keep: pipelines, reader, feature networks, latents, all in half precision
<out>/pretraining.json        settings, seconds and scores, as they come
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
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
from distill.pretraining.fit import Budget
from distill.pretraining.plan import NEEDS, Ledger, check_data, chosen
from distill.shapes import judge
from distill.teachers.network import read_quietly
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3

DECIDES = {  # stage -> nodes of the configuration that decide what it makes, beside seed, data and its own budget
    "clip": ("text_length",),
    "reader": ("reader_scenes",),
}
TEACHERS = {  # stage -> layer of the text encoder that it reads, how it is trained, saved and opened
    "mmdit": (-2, diffusion.train_mmdit, assemble.save_sd3, SD3),
    "unet": (-1, diffusion.train_unet, assemble.save_sd, SD),
}


@dataclass(frozen=True)
class Shared(Captions):
    """Encodings of distinct captions; `rows` [N] says which of them is sample i's."""

    rows: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return super().draw(self.rows[index], generator)


class Work:
    """The folder that is worked in, and what earlier stages have left there."""

    def __init__(self, asked: Mapping[str, Any]):
        self.asked, self.out, self.seed = asked, Path(asked["out"]), asked["seed"]
        self.train, self.models, self.ledger = self.out / "train", self.out / "models", Ledger(self.out)
        self.data, self.scoring = asked["data"], asked["scoring"]
        self.of_shapes = self.data["path"] is None

    def fit(self, stage: str) -> tuple[Budget, dict[str, Any]]:
        """What every trained stage is given last."""
        return Budget(**self.asked[stage]), {"out": self.train, "seed": self.seed}

    @cached_property
    def pictures(self) -> Tensor:
        return material.read(self.data, self.out)[0]

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
        """The captions through `layer` of the text encoder, each distinct one once."""
        distinct = sorted(set(self.captions))
        ids = text.tokenize(self.tokenizer, ["", *distinct])
        number = {caption: i for i, caption in enumerate(distinct)}
        rows = torch.tensor([number[caption] for caption in self.captions])
        encoded = diffusion.encode_captions(self.clip, ids, layer=layer)
        return Shared(encoded.tokens, encoded.pooled, rows)


def save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _data(work: Work) -> dict[str, Any]:
    if work.of_shapes:
        material.write_shapes(work.data["count"], work.data["seed"], work.out / "data")
    work.pictures, captions = material.read(work.data, work.out)
    part = work.out / "captions.part"
    part.write_text(json.dumps(captions))
    part.replace(work.out / "captions.json")
    return {"pictures": len(captions), "distinct_captions": len(set(captions))}


def _clip(work: Work) -> dict[str, Any]:
    tokenizer = text.train_tokenizer(work.captions, length=work.asked["text_length"])
    budget, how = work.fit("clip")
    clip, values = text.train(work.pictures, work.captions, tokenizer, budget, **how)
    tokenizer.save_pretrained(work.train / "tokenizer")
    clip.save_pretrained(work.train / "clip")
    assemble.save_half(assemble.vision(clip), work.models / "clip_vision")
    return {**values, "vocabulary": len(tokenizer)}


def _vae(work: Work) -> dict[str, Any]:
    budget, how = work.fit("vae")
    model, values = vae.train(work.pictures, budget, **how)
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
    model, asked = work.vae, work.asked["reader_scenes"]
    shared = min(asked["shared"], work.data["count"])
    scenes = material.scenes(work.data["seed"], shared, asked["fresh"])
    latents = track(work.latents[:shared].split(256), description="reader: copying")
    copies = torch.cat([vae.decode(model, part) for part in latents])
    truth = [material.facts(scene) for scene in scenes]
    budget, how = work.fit("reader")
    net, values = reader.train(material.draw(scenes), copies, truth, budget, **how)
    net.save(work.models / "reader")
    return values | scores.reader_accuracy(work.judge, model, 5 * work.scoring["prompts"])


def _vit(work: Work) -> dict[str, Any]:
    budget, how = work.fit("vit")
    net, seconds = vit.train(work.pictures, budget, **how)
    values: dict[str, Any] = {"seconds": seconds}
    if work.of_shapes:
        n = work.scoring["prompts"]
        values["neighbour_accuracy"] = scores.vit_accuracy(net, work.data["seed"], known=5 * n, asked=n)
    assemble.save_half(net, work.models / "vit")
    return values


def _teacher(work: Work, stage: str) -> dict[str, Any]:
    layer, train, save_pipeline, family = TEACHERS[stage]
    budget, how = work.fit(stage)
    net, seconds = train(work.latents, work.encoded(layer), budget, **how)
    save_pipeline(net, work.vae, work.clip, work.tokenizer, work.models / stage)
    if work.of_shapes:
        _judge_teacher(work, stage, family(str(work.models / stage)))
    return {"seconds": seconds}


def _judge_teacher(work: Work, stage: str, teacher: Any) -> None:
    """Prompt accuracy at each guidance, and at one step; noted one by one, for they take minutes."""
    asked = work.scoring
    for steps, guidance in [*((asked["steps"], g) for g in asked["guidance"]), (1, work.asked["shards"]["guidance"])]:
        name, known = f"{steps} steps, guidance {guidance:g}", work.ledger.stage(stage).get("prompt_accuracy", {})
        if name not in known:
            shares = {
                sort: scores.teacher_accuracy(
                    teacher,
                    work.judge,
                    asked["prompts"],
                    held_out=sort == "held_out",
                    steps=steps,
                    guidance=guidance,
                )
                for sort in ("training", "held_out")
            }
            work.ledger.note(stage, prompt_accuracy=known | {name: shares})


def _shards(work: Work) -> dict[str, Any]:
    asked = work.asked["shards"]
    if work.of_shapes:
        captions = material.new_captions(work.data["seed"], asked["count"])
    else:
        captions = [work.captions[i % len(work.captions)] for i in range(asked["count"])]
    teacher = SD3(str(work.models / "mmdit"))
    folder = work.models / "latents"
    assemble.write_teacher_latents(teacher, captions, folder, guidance=asked["guidance"], steps=asked["steps"])
    return {"latents": asked["count"]}


STAGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "data": _data,
    "clip": _clip,
    "vae": _vae,
    "latents": _latents,
    "reader": _reader,
    "vit": _vit,
    "mmdit": lambda work: _teacher(work, "mmdit"),
    "unet": lambda work: _teacher(work, "unet"),
    "shards": _shards,
}


def settings(asked: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """All that decides what `stage` makes, apart from what it reads: name -> value."""
    names = ("seed", "data", *DECIDES.get(stage, ()), *([stage] if stage in asked else []))
    flat: dict[str, Any] = {}
    for name in names:
        node = asked[name]
        flat |= {f"{name}.{key}": value for key, value in node.items()} if isinstance(node, Mapping) else {name: node}
    return flat


def run(asked: Mapping[str, Any], command: str) -> Path:
    """Every stage asked for that is not finished yet; returns the folder of the models."""
    read_quietly()
    check_data(asked["data"]["path"], asked["data"]["size"], asked["data"]["count"])
    work, names = Work(asked), chosen(asked["stages"])
    if not work.of_shapes and "reader" in names:
        names.remove("reader")
        print("reader: left out, for only shapes knows what its pictures show")
    for name in names:
        finished = work.ledger.finished()
        if missing := [each for each in NEEDS[name] if each not in finished]:
            raise ValueError(f"stages: {name} needs {', '.join(missing)} first, which out={work.out} does not have")
        work.ledger.begin(name, settings(asked, name), command)
        if name in finished:
            print(f"{name}: done before")
            continue
        began = time.monotonic()
        values = STAGES[name](work)
        seconds = round(values.pop("seconds", time.monotonic() - began), 1)
        work.ledger.note(name, **values, seconds=seconds, finished=True)
        write_card(work.out, work.seed)
    return work.models
