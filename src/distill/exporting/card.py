"""The model card of a student: origin, licence, how to load it, and its scores."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from distill.evaluation.tables import Row, as_markdown, rows_of, table_in_order
from distill.storage.atomic import write_atomic, write_text_atomic
from distill.storage.bounded import check_yaml, configuration_of, mapping_of, number_of, text_of
from distill.teachers.families import teacher_class
from distill.teachers.loading.locate import STUDENT_INFO, is_hub_id
from distill.terminal.shown import in_markdown, shown

PAPERS = {"LADD": "2403.12015", "ADD": "2311.17042", "NitroFusion": "2412.02030"}
PAPERS |= {"ConsistencyDistillation": "2310.04378", "Regression": "2101.02388"}
PAPERS |= {"Consistency": "2310.04378"}  # its name in runs of earlier versions
HEAD = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---")  # the metadata of a card
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
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
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
    text += [
        f"A student of 1 to 4 steps, without guidance, of {name or 'its teacher'}, "
        f"by {in_markdown(method)}{paper}{trained}.\n"
    ]
    licence_name = licence.get("license_name") or licence.get("license")
    terms = "its folder names no licence: look it up, since it also applies to"
    if licence_name:
        terms = f"its licence, {in_markdown(licence_name)}, also applies to"
    text += [f"Teacher: {name or 'unknown'}; {terms} the student.\n"]
    # Older folders do not have the call options in their index, only the guidance in config.yaml.
    guidance = float(number_of(teacher_node, "guidance", "config.yaml") or 0.0)
    options = index.get(STUDENT_INFO) or {"call": {"guidance_scale": guidance}}
    options = options if isinstance(options, dict) else {}
    text += [_usage(folder, index, options), _measured(rows, evaluation)]
    file_name = str(evaluation.get("picture", "comparison.png"))
    # Only the last part and no link: an untrusted file must not show other pictures.
    picture = run / "samples" / Path(file_name).name
    if picture.is_file() and not picture.is_symlink():
        write_atomic(folder / "comparison.png", picture.read_bytes())
        who = in_markdown(", ".join(f"{row.who} at {row.steps}" for row in rows))
        text += [
            f"![{who or 'teacher and student'}; one prompt and noise a column](comparison.png)\n"
        ]
    write_text_atomic(folder / "README.md", "\n".join(filter(None, text)))
    return folder / "README.md"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    # YAML would read NaN and 1e-05 as text.
    return mapping_of(file) if file.suffix == ".json" else configuration_of(file)


def _licence(folder: Path | None) -> dict[str, Any]:
    """The licence from the model card of a folder, else the first line of its LICENSE file."""
    if folder is None:
        return {}
    if (folder / "README.md").is_file():
        text = text_of(folder / "README.md")
        if head := HEAD.match(text):
            check_yaml(head[1], f"{folder / 'README.md'}: its metadata")
        metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        keys = ("license", "license_name", "license_link")
        values = {key: metadata[key] for key in keys if metadata.get(key)}
        found = {k: _as_text(x) for k, x in values.items() if isinstance(x, str | list)}
        if found:
            return found
    for file in sorted(folder.glob("LICENSE*")):
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
    call = {"num_inference_steps": "steps", **(_python_arguments(options.get("call")) or GUIDANCE)}
    trailing = family.trailing or scheduler == "FlowScheduler"  # by itself, with no sigmas
    call |= _grid(scheduler, trailing, levels) | {"generator": "generator"}
    # Pipelines without this method give their scheduler no generator for the noise between steps.
    passes_generator = hasattr(getattr(diffusers, kind, None), "prepare_extra_step_kwargs")
    patched = "Flow" in scheduler and sampler.get("name") != "Euler" and not passes_generator
    step = "pipe.scheduler.step = partial(pipe.scheduler.step, generator=generator)\n"
    arguments = "".join(f"    {name}={value},\n" for name, value in call.items())
    notes = []
    if "Flow" in scheduler and not trailing:
        notes.append("Without `sigmas` the default grid of diffusers wastes its last step.")
    notes += _notes(scheduler, library, kind, patched, without) + family.remarks(call)
    if "Ancestral" in scheduler and levels:
        notes.append(f"This scheduler cannot use the student's own levels, {list(levels)}.")
    return f"""## Use

```python
{"from functools import partial" + chr(10) * 2 if patched else ""}import torch
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("<this folder>"{without})
generator = torch.Generator().manual_seed(0)
{step if patched else ""}steps = {min(4, len(levels or [4] * 4))}
picture = pipe(
    "a prompt",
{arguments}).images[0]
```

Scheduler: `{scheduler}`, in the folder. {" ".join(notes)}
"""


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


def _grid(scheduler: str, trailing: bool, levels: list[float] | None) -> dict[str, str]:
    """The argument that makes a pipeline use our levels; {} if it does so by default."""
    if "Ancestral" in scheduler:  # it takes no levels
        return {}
    if "Flow" not in scheduler:
        indices = [max(round(1000 * level) - 1, 0) for level in levels or []]
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
    if without:
        third = "third text encoder" if "text_encoder_3" in without else "such part"
        notes.append(f"It has no {third}, hence `{without[2:]}`.")
    if library != "diffusers":
        notes.append(f"Its scheduler is `{library}.{scheduler}`: distill must be installed.")
    return notes


def _measured(rows: Sequence[Row], evaluation: dict[str, Any]) -> str:
    """The rows of the evaluation as a table."""
    if not rows:
        return ""
    table = as_markdown(table_in_order(rows, COLUMNS, "{:.3f}"))
    settings = ", ".join(f"{key} {value}" for key, value in evaluation.get("protocol", {}).items())
    return f"## Measured\n\n{table}\nProtocol: {in_markdown(settings)}.\n"
