"""The model card of a student: origin, licence, how to load it, and its scores."""

import inspect
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from distill.evaluation.tables import Row, as_markdown, rows_of, table_in_order
from distill.sampling import angles
from distill.storage.atomic import write_atomic, write_text_atomic
from distill.storage.bounded import check_yaml, configuration_of, mapping_of, number_of, text_of
from distill.storage.safe_paths import is_own, is_trusted_run
from distill.teachers.families import teacher_class
from distill.teachers.loading.locate import GENERATOR, STUDENT_INFO, denoiser_part, is_hub_id
from distill.terminal.shown import in_markdown, shown

PAPERS = {"LADD": "2403.12015", "ADD": "2311.17042", "NitroFusion": "2412.02030"}
PAPERS |= {"DMD2": "2405.14867", "DPO": "2311.12908"}
PAPERS |= {"ConsistencyDistillation": "2310.04378", "Regression": "2101.02388"}
PAPERS |= {"Consistency": "2310.04378"}  # its name in runs of earlier versions
HEAD = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---")  # the metadata of a card
SCHEDULER = "scheduler/scheduler_config.json"
GUIDANCE = {"guidance_scale": "0.0"}
COLUMNS = ("prompt_accuracy", "frechet", "precision", "recall", "stripe_sharpness", "diversity")
COLUMNS += ("fid", "clip_score", "clip_score_b32", "fd_dinov2", "cmmd", "pick_score", "hps")


def write_card(folder: Path, run: Path, teacher: Path | None = None) -> Path:
    """Write `folder`/README.md, and the comparison of the run beside it; returns the file.

    `teacher` is the folder of the teacher, if it is on this machine.
    """
    facts = _read(run / "run.json")
    config = _read(run / "config.yaml")
    evaluation = _read(run / "evaluation.json")
    index, rows = _read(folder / "model_index.json"), rows_of(evaluation, finite=False)
    teacher_node = config.get("teacher") if isinstance(config.get("teacher"), dict) else {}
    method, path = str(facts.get("method", "distill")), str(teacher_node.get("path", ""))
    local = not is_hub_id(path) or Path(path).exists()
    name = Path(path).name if local else path  # a local path is private: only its last part
    given = teacher_class(str(index.get("_class_name"))).image  # a picture, beside the text
    video = teacher_class(str(index.get("_class_name"))).video
    tag = "image-to-image" if given else "text-to-video" if video else "text-to-image"
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": tag}
    metadata |= {
        "base_model": None if local else path,
        "tags": ["distill", "few-step", shown(method.lower())],
    }
    licence = _licence(teacher) or _licence(folder)
    text = [
        f"---\n{ModelCardData(**metadata, **licence).to_yaml()}\n---\n",
        f"# {in_markdown(facts.get('name', folder.name))}\n",
    ]
    paper = (
        f" ([{PAPERS[method]}](https://arxiv.org/abs/{PAPERS[method]}))" if method in PAPERS else ""
    )
    steps, images = (number_of(facts, key, "run.json") for key in ("steps", "images_seen"))
    trained = "" if steps is None else f", trained for {steps} steps on {images} images"
    name = in_markdown(name)
    tuned = (index.get(STUDENT_INFO) or {}).get("many_steps") is True
    kind = _kind(index, tuned)
    text += [f"{kind} {name or 'its teacher'}, by {in_markdown(method)}{paper}{trained}.\n"]
    licence_name = licence.get("license_name") or licence.get("license")
    terms = "its folder names no licence: look it up, since it also applies to"
    if licence_name:
        terms = f"its licence, {in_markdown(licence_name)}, also applies to"
    text += [f"Teacher: {name or 'unknown'}; {terms} the student.\n"]
    # Older folders do not have the call options in their index, only the guidance in config.yaml.
    guidance = float(number_of(teacher_node, "guidance", "config.yaml") or 0.0)
    options = index.get(STUDENT_INFO) or {"call": {"guidance_scale": guidance}}
    options = options if isinstance(options, dict) else {}
    usage = _tuned_usage(options) if tuned else _usage(folder, index, options)
    text += [usage, _measured(rows, evaluation)]
    file_name = str(evaluation.get("picture", "comparison.png"))
    # Only the last part and no link: an untrusted file must not show other pictures.
    picture = run / "samples" / Path(file_name).name
    own = is_own(picture, run) and not picture.is_symlink()
    if picture.is_file() and (own or is_trusted_run(run)):
        write_atomic(folder / "comparison.png", picture.read_bytes())
        who = in_markdown(", ".join(f"{row.who} at {row.steps}" for row in rows))
        text += [
            f"![{who or 'teacher and student'}; one prompt and noise a column](comparison.png)\n"
        ]
    write_text_atomic(folder / "README.md", "\n".join(filter(None, text)))
    return folder / "README.md"


def _kind(index: dict[str, Any], tuned: bool) -> str:
    """What the model is, up to the name of its teacher."""
    if GENERATOR in index.values():
        return "A GAN's generator without a diffusion prior, of one step, in the latents of"
    if tuned:
        return "A tuned model, which samples in many guided steps as its teacher does, of"
    return "A student of 1 to 4 steps, without guidance, of"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    # YAML would read NaN and 1e-05 as text.
    return mapping_of(file) if file.suffix == ".json" else configuration_of(file)


def _licence(folder: Path | None) -> dict[str, Any]:
    """The licence from the model card of a folder, else the first line of its LICENSE file."""
    if folder is None:
        return {}
    # A link out of the folder would show a line of any file of this machine.
    if (folder / "README.md").is_file() and is_own(folder / "README.md", folder):
        text = text_of(folder / "README.md")
        if head := HEAD.match(text):
            check_yaml(head[1], f"{folder / 'README.md'}: its metadata")
        metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        keys = ("license", "license_name", "license_link")
        values = {key: metadata[key] for key in keys if metadata.get(key)}
        found = {k: _as_text(x) for k, x in values.items() if isinstance(x, str | list)}
        if found:
            return found
    for file in sorted(file for file in folder.glob("LICENSE*") if is_own(file, folder)):
        title = text_of(file, errors="replace").strip().partition("\n")[0]
        return {
            "license": "other",
            "license_name": shown(title.strip("# ")),
            "license_link": file.name,
        }
    return {}


def _as_text(value: str | list[Any]) -> str | list[str]:
    """The name of a licence, or several, as plain text."""
    return shown(value) if isinstance(value, str) else [shown(name) for name in value]


def _usage(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> str:
    """How to load the student, and the diffusers call that gives the pictures of our sampler."""
    library, scheduler = _class_names(index.get("scheduler"))
    kind = str(index.get("_class_name"))
    family = teacher_class(kind)
    absent = [n for n in family.spare if n in index and not (folder / n).is_dir()]
    without = "".join(f", {name}=None" for name in absent)
    kind = kind if kind.isidentifier() else "DiffusionPipeline"
    sampler = options.get("sampler") if isinstance(options.get("sampler"), dict) else {}
    levels = _numbers(sampler.get("levels"))
    edits = family.image == "source"
    task = "Inpainting" if family.image == "mask" else "Text2Image"
    named = not edits and not family.video and _is_found(kind, task)
    opener = f"AutoPipelineFor{task}" if named else kind
    call = {"image": "source"} if edits else {}
    call |= {"num_inference_steps": "steps", **(_python_arguments(options.get("call")) or GUIDANCE)}
    trailing = family.trailing or scheduler == "FlowScheduler"  # by itself, with no sigmas
    if family.image == "mask":
        call |= {"image": "image", "mask_image": "mask", "strength": "1.0"}
    steps = number_of(_read(folder / SCHEDULER), "num_train_timesteps", SCHEDULER) or 1000
    grid = _grid(scheduler, trailing, levels, int(steps))
    told, notes = _of_video(kind, options, grid) if family.video else ("", [])
    call |= grid | {"generator": "generator"}
    if "SCM" in scheduler and levels:  # the pipeline does not pass the number on
        told = "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, steps)\n"
    patched = "Flow" in scheduler and sampler.get("name") != "Euler" and not _passes_generator(kind)
    step = "pipe.scheduler.step = partial(pipe.scheduler.step, generator=generator)\n"
    arguments = "".join(f"    {name}={value},\n" for name, value in call.items())
    if "Flow" in scheduler and not trailing and not family.video:
        notes.append("Without `sigmas` the default grid of diffusers wastes its last step.")
    notes += _notes(scheduler, library, kind, patched, without) + _of_generator(index)
    notes += family.remarks(call)
    quantised = _read(folder / denoiser_part(folder) / "config.json").get("quantization_config")
    if quantised:
        notes.append("The weights are quantised: this needs `pip install torchao`, and bfloat16.")
        without += ", dtype=torch.bfloat16"
    if family.image == "mask":
        notes.append("`image` and `mask` are PIL images of one size; what is white is filled.")
    if "Ancestral" in scheduler and levels:
        notes.append(f"This scheduler cannot use the student's own levels, {list(levels)}.")
    made, of_call = ("video", "frames") if family.video else ("picture", "images")
    source = "from PIL import Image\n" if edits else ""
    picture = 'source = Image.open("<a picture>").convert("RGB")\n' if edits else ""
    return f"""## Use

```python
{"from functools import partial" + chr(10) * 2 if patched or told else ""}import torch
from diffusers import {opener}
{source}
pipe = {opener}.from_pretrained("<this folder>"{without})
generator = torch.Generator().manual_seed(0)
{step if patched else ""}{family.prepares}{picture}steps = {min(4, len(levels or [4] * 4))}
{told}{made} = pipe(
    prompt="a prompt",
{arguments}).{of_call}[0]
```

Scheduler: `{scheduler}`, in the folder. {" ".join(notes)}
"""


def _of_video(kind: str, options: dict[str, Any], grid: dict[str, str]) -> tuple[str, list[str]]:
    """The line that gives a scheduler the levels in `grid`, which a pipeline of videos does not
    take and which leave the grid; and sentences about it.
    """
    of_student = options.get("options")
    fps = (of_student if isinstance(of_student, dict) else {}).get("fps")
    fps = fps if isinstance(fps, int | float) else 16
    notes = [
        "The video is [frames, height, width, 3] in [0, 1];"
        f' `diffusers.utils.export_to_video(video, "video.mp4", fps={fps})` writes it.'
    ]
    if "sigmas" not in grid:
        return "", notes
    set_steps = "pipe.scheduler.set_timesteps"
    notes.append(
        f"`{kind}` takes no `sigmas`, and the default grid of diffusers wastes its last step: give"
        f" the line with `{set_steps}` again for another number of steps."
    )
    return f"{set_steps} = partial({set_steps}, sigmas={grid.pop('sigmas')})\n", notes


def _passes_generator(kind: str) -> bool:
    """Whether a pipeline of this class gives its scheduler a generator for the noise between steps.

    It does so by one method, which some pipelines have and do not call.
    """
    found, method = getattr(diffusers, kind, None), "prepare_extra_step_kwargs"
    if not isinstance(found, type) or not hasattr(found, method):
        return False
    return method in inspect.unwrap(found.__call__).__code__.co_names


def _tuned_usage(options: dict[str, Any]) -> str:
    """How to sample from a model that keeps its teacher's steps."""
    call = {"num_inference_steps": "28", **(_python_arguments(options.get("call")) or {})}
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    return f"""## Use

```python
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("<this folder>")
picture = pipe(prompt="a prompt", {arguments}).images[0]
```
"""


def _is_found(kind: str, task: str) -> bool:
    """Whether the AutoPipeline of this task opens a folder of this class, or the class is not
    diffusers' own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries of pipelines that nobody asked for
        from diffusers.pipelines import auto_pipeline
    name = "INPAINT" if task == "Inpainting" else task.upper()
    mapping = getattr(auto_pipeline, f"AUTO_{name}_PIPELINES_MAPPING")
    return kind in {found.__name__ for found in mapping.values()} or not hasattr(diffusers, kind)


def _class_names(pair: Any) -> tuple[str, str]:
    """Library and class of a scheduler from an index; defaults for what is not an identifier."""
    names = pair if isinstance(pair, list) and len(pair) == 2 else ["diffusers", "scheduler"]
    library, name = (str(part) for part in names)
    dotted = all(part.isidentifier() for part in library.split("."))
    return library if dotted else "diffusers", name if name.isidentifier() else "scheduler"


def _numbers(levels: Any) -> list[float] | None:
    listed = isinstance(levels, list) and all(type(x) in (int, float) for x in levels)
    return levels if listed and levels else None


def _python_arguments(call: Any) -> dict[str, str]:
    """Arguments of a call as Python source, without values that could run code when pasted."""
    arguments = call if isinstance(call, dict) else {}
    kinds = (bool, int, float, str, list, NoneType)
    return {k: repr(x) for k, x in arguments.items() if k.isidentifier() and isinstance(x, kinds)}


def _grid(scheduler: str, trailing: bool, levels: list[float] | None, steps: int) -> dict[str, str]:
    """The argument that makes a pipeline use our levels; {} if it does so by default.

    `steps` is the number of training steps.
    """
    if "Ancestral" in scheduler:  # it takes no levels
        return {}
    if "SCM" in scheduler:  # in angles
        if not levels:
            return {"intermediate_timesteps": f"{angles.SECOND} if steps == 2 else None"}
        listed = f"{angles.angles_of(levels)}[:steps] + [0.0]"
        return {"timesteps": listed, "max_timesteps": "None", "intermediate_timesteps": "None"}
    if "Flow" not in scheduler:
        indices = [max(round(steps * level) - 1, 0) for level in levels or []]
        return {"timesteps": f"{indices}[:steps]"} if levels else {}
    if levels:
        return {"sigmas": f"{[float(level) for level in levels]}[:steps]"}
    if trailing:
        return {}
    return {"sigmas": "[1 - i / steps for i in range(steps)]"}


def _notes(scheduler: str, library: str, kind: str, patched: bool, without: str) -> list[str]:
    """Sentences about the call that a user must know."""
    notes = []
    if patched:
        notes.append(
            f"With 2 and more steps it adds noise between them, and `{kind}` gives its scheduler"
            " no generator: without the line with `partial` each call, and each device, gives"
            " another picture for the same `generator`. One step does not need it. Neither does a"
            " folder that `distill.export scheduler=euler` writes, which adds no noise between"
            " steps."
        )
    if "SCM" in scheduler:
        notes.append("The pipeline's own second of two steps is 1.3; other numbers have none.")
    if without:
        third = "third text encoder" if "text_encoder_3" in without else "such part"
        notes.append(f"It has no {third}, hence `{without[2:]}`.")
    if library != "diffusers":
        notes.append(f"Its scheduler is `{library}.{scheduler}`: distill must be installed.")
    return notes


def _of_generator(index: dict[str, Any]) -> list[str]:
    """A sentence about the network of a GAN, which diffusers does not have."""
    if GENERATOR not in index.values():
        return []
    return [f"Its network is `{'.'.join(GENERATOR)}`: distill must be installed."]


def _measured(rows: Sequence[Row], evaluation: dict[str, Any]) -> str:
    """The rows of the evaluation as a table."""
    if not rows:
        return ""
    table = as_markdown(table_in_order(rows, COLUMNS, "{:.3f}"))
    settings = ", ".join(f"{key} {value}" for key, value in evaluation.get("protocol", {}).items())
    return f"## Measured\n\n{table}\nProtocol: {in_markdown(settings)}.\n"
