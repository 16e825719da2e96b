"""The model card of a student: what it is, what it may be used for, how it is loaded, and what it
was measured at.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from distill.evaluation.tables import Row, as_markdown, in_order, rows_of
from distill.storage.aside import put, put_text
from distill.storage.bounded import check_yaml, configuration_of, mapping_of, number_of, text_of
from distill.teachers.loading.locate import TOLD, is_hub_id
from distill.terminal.shown import in_markdown, shown

PAPERS = {"LADD": "2403.12015", "ADD": "2311.17042", "NitroFusion": "2412.02030"}
PAPERS |= {"Consistency": "2310.04378", "Regression": "2101.02388"}
HEAD = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---")  # the metadata of a card
GUIDANCE = {"guidance_scale": "0.0"}
COLUMNS = ("prompt_accuracy", "frechet", "precision", "recall", "stripe_sharpness", "diversity")
COLUMNS += ("fid", "clip_score", "clip_score_b32", "fd_dinov2", "cmmd", "pick_score", "hps")


def write_card(folder: Path, run: Path, teacher: Path | None = None) -> Path:
    """Write `folder`/README.md, and the run's comparison beside it; `teacher` is the folder of
    that, if it is here.
    """
    facts, config, judged = (
        _read(run / "run.json"),
        _read(run / "config.yaml"),
        _read(run / "evaluation.json"),
    )
    index, rows = _read(folder / "model_index.json"), rows_of(judged, finite=False)
    taught = config.get("teacher") if isinstance(config.get("teacher"), dict) else {}
    method, path = str(facts.get("method", "distill")), str(taught.get("path", ""))
    local = not is_hub_id(path) or Path(path).exists()
    name = (
        Path(path).name if local else path
    )  # a path of someone's machine is nobody else's business
    about: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    about |= {
        "base_model": None if local else path,
        "tags": ["distill", "few-step", shown(method.lower())],
    }
    licence = _licence(teacher) or _licence(folder)
    text = [
        f"---\n{ModelCardData(**about, **licence).to_yaml()}\n---\n",
        f"# {in_markdown(facts.get('name', folder.name))}\n",
    ]
    paper = (
        f" ([{PAPERS[method]}](https://arxiv.org/abs/{PAPERS[method]}))" if method in PAPERS else ""
    )
    steps, images = (number_of(facts, key, "run.json") for key in ("steps", "images_seen"))
    trained = "" if steps is None else f", trained for {steps} steps on {images} images"
    name = in_markdown(name)
    text += [
        f"A student of 1 to 4 steps, without guidance, of {name or 'its teacher'}, "
        f"by {in_markdown(method)}{paper}{trained}.\n"
    ]
    said = licence.get("license_name") or licence.get("license")
    binding = (
        f"its licence, {in_markdown(said)}, binds"
        if said
        else "its folder names no licence: look it up, for it binds"
    )
    text += [f"Teacher: {name or 'unknown'}; {binding} the student.\n"]
    # Folders from before this stood in the index: what a guidance-distilled teacher was told.
    guidance = float(number_of(taught, "guidance", "config.yaml") or 0.0)
    told = index.get(TOLD) or {"call": {"guidance_scale": guidance}}
    told = told if isinstance(told, dict) else {}
    text += [_usage(folder, index, told), _measured(rows, judged)]
    named = str(judged.get("picture", "comparison.png"))
    picture = run / "samples" / Path(named).name  # not elsewhere, whatever a stranger's says
    if picture.is_file() and not picture.is_symlink():  # which may lead to what is not ours
        put(folder / "comparison.png", picture.read_bytes())
        who = in_markdown(", ".join(f"{row.who} at {row.steps}" for row in rows))
        text += [
            f"![{who or 'teacher and student'}; one prompt and noise a column](comparison.png)\n"
        ]
    put_text(folder / "README.md", "\n".join(filter(None, text)))
    return folder / "README.md"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    # For YAML NaN and 1e-05 are text.
    return mapping_of(file) if file.suffix == ".json" else configuration_of(file)


def _licence(folder: Path | None) -> dict[str, Any]:
    """What the card in a folder says of the licence, or the first line of a file of its own."""
    if folder is None:
        return {}
    if (folder / "README.md").is_file():
        text = text_of(folder / "README.md")
        if head := HEAD.match(text):
            check_yaml(head[1], f"{folder / 'README.md'}: its metadata")
        said = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        named = {key: said.get(key) for key in ("license", "license_name", "license_link")}
        if found := {k: _word(x) for k, x in named.items() if x and isinstance(x, str | list)}:
            return found
    for file in sorted(folder.glob("LICENSE*")):
        title = text_of(file, errors="replace").strip().partition("\n")[0]
        return {
            "license": "other",
            "license_name": shown(title.strip("# ")),
            "license_link": file.name,
        }
    return {}


def _word(said: str | list[Any]) -> str | list[str]:
    """A licence's name, or names, as text."""
    return shown(said) if isinstance(said, str) else [shown(word) for word in said]


def _usage(folder: Path, index: dict[str, Any], told: dict[str, Any]) -> str:
    """How it is loaded, and the call in plain diffusers that gives the pictures of our sampler."""
    library, scheduler = _words(index.get("scheduler"))
    parts = ("text_encoder_3", "tokenizer_3")
    absent = [name for name in parts if name in index and not (folder / name).is_dir()]
    without = "".join(f", {name}=None" for name in absent)
    kind = str(index.get("_class_name"))
    kind = kind if kind.isidentifier() else "DiffusionPipeline"
    sampler = told.get("sampler") if isinstance(told.get("sampler"), dict) else {}
    levels = _numbers(sampler.get("levels"))
    call = {"num_inference_steps": "steps", **(_plain(told.get("call")) or GUIDANCE)}
    call |= _grid(scheduler, kind, levels) | {"generator": "generator"}
    # Pipelines without this method hand their scheduler no generator for the noise of later steps.
    handed = hasattr(getattr(diffusers, kind, None), "prepare_extra_step_kwargs")
    drawn = "Flow" in scheduler and sampler.get("name") != "Euler" and not handed
    step = "pipe.scheduler.step = partial(pipe.scheduler.step, generator=generator)\n"
    given = "".join(f"    {name}={value},\n" for name, value in call.items())
    says = _says(scheduler, library, kind, drawn, without)
    if kind == "StableDiffusionPipeline" and "clip_skip" in call:
        says.append(
            "With transformers 5.6 and later diffusers' pipeline of Stable Diffusion fails over"
            " `clip_skip`: take an earlier transformers, or `distill.sample`."
        )
    if "Ancestral" in scheduler and levels:
        says.append(f"Its own levels, {list(levels)}, are none that this scheduler can be told.")
    return f"""## Use

```python
{"from functools import partial" + chr(10) * 2 if drawn else ""}import torch
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("<this folder>"{without})
generator = torch.Generator().manual_seed(0)
{step if drawn else ""}steps = {min(4, len(levels or [4] * 4))}
picture = pipe(
    "a prompt",
{given}).images[0]
```

Scheduler: `{scheduler}`, in the folder. {" ".join(says)}
"""


def _words(pair: Any) -> tuple[str, str]:
    """Library and class of a scheduler, as an index has them; what is no name is none."""
    given = pair if isinstance(pair, list) and len(pair) == 2 else ["diffusers", "scheduler"]
    library, name = (str(word) for word in given)
    dotted = all(part.isidentifier() for part in library.split("."))
    return library if dotted else "diffusers", name if name.isidentifier() else "scheduler"


def _numbers(levels: Any) -> list[float] | None:
    listed = isinstance(levels, list) and all(type(x) in (int, float) for x in levels)
    return levels if listed and levels else None


def _plain(call: Any) -> dict[str, str]:
    """Arguments of a call in Python's words: of names and values that can run nothing where they
    are pasted.
    """
    given = call if isinstance(call, dict) else {}
    kinds = (bool, int, float, str, list, NoneType)
    return {k: repr(x) for k, x in given.items() if k.isidentifier() and isinstance(x, kinds)}


def _grid(scheduler: str, kind: str, levels: list[float] | None) -> dict[str, str]:
    """The argument that has a pipeline step at our levels, where it would not by itself."""
    if "Ancestral" in scheduler:  # it cannot be told where to step
        return {}
    if "Flow" not in scheduler:
        indices = [max(round(1000 * level) - 1, 0) for level in levels or []]
        return {"timesteps": f"{indices}[:steps]"} if levels else {}
    if levels:
        return {"sigmas": f"{[float(level) for level in levels]}[:steps]"}
    if _has_our_grid(scheduler, kind):
        return {}
    return {"sigmas": "[1 - i / steps for i in range(steps)]"}


def _has_our_grid(scheduler: str, kind: str) -> bool:
    """Whether the pipeline, or the scheduler by itself, steps at 1, 1 - 1/n, ..., 1/n."""
    return kind == "FluxPipeline" or scheduler == "FlowScheduler"


def _says(scheduler: str, library: str, kind: str, drawn: bool, without: str) -> list[str]:
    """What a reader must know of the call, a sentence each."""
    says = []
    if "Flow" in scheduler and not _has_our_grid(scheduler, kind):
        says.append("Without `sigmas` the default grid of diffusers wastes its last step.")
    if drawn:
        says.append(
            f"In 2 and more steps it draws noise between them, and `{kind}` hands its scheduler no "
            "generator: without the line of `partial` each call, and each device, gives another "
            "picture of the same `generator`. One step needs none of this, nor does a folder that "
            "`distill.export scheduler=euler` writes, which draws no noise between steps."
        )
    if without:
        says.append(f"It has no third text encoder, hence `{without[2:]}`.")
    if library != "diffusers":
        says.append(f"Its scheduler is `{library}.{scheduler}`: distill must be installed.")
    return says


def _measured(rows: Sequence[Row], judged: dict[str, Any]) -> str:
    """The run's judging as a table."""
    if not rows:
        return ""
    table = as_markdown(in_order(rows, COLUMNS, "{:.3f}"))
    said = ", ".join(f"{key} {value}" for key, value in judged.get("protocol", {}).items())
    return f"## Measured\n\n{table}\nProtocol: {in_markdown(said)}.\n"
