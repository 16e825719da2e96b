"""A student as ONNX: denoiser, text encoder and decoder, each checked in onnxruntime.

denoiser.onnx       x_t [batch, C, H, W], t [batch], conditioning -> x0
text_encoder.onnx   token ids of one caption -> conditioning
decoder.onnx        latents [batch, C, H, W] -> pixels in [-1, 1]
tokenizer*/         as in the pipeline
student.json        inputs, shapes, and alpha and sigma of the steps

As OpenVINO's files the same networks are .xml and .bin, checked in its runtime too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.exporting import openvino_files
from distill.exporting.graphs import corrected
from distill.exporting.traced import Traced, Untraceable, networks_of, reading, token_ids
from distill.machine.faults import first_line, quiet_logging
from distill.sampling import EulerAncestral, FewSteps, distilled
from distill.storage.atomic import atomic_folder
from distill.students.parts import copy_part, copy_terms
from distill.teachers.loading.locate import home_of, lineage
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import stage

MANIFEST = "student.json"
CAPTIONS = ("a red star", "two blue rings on a table, at dawn")  # ours: any two, of unequal length
MOST_STEPS = 4
MOST_AT_ONCE = 63  # pictures for which diffusers' upsampling is one graph: from 64 it copies
# ours: the largest difference from torch, as a share of the largest value; float32 gives about 1e-5
TOLERANCE = 1e-3
ONE_FILE = 1_500_000_000  # bytes of weights that one .onnx file can hold; the format ends at 2 GiB
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "web": ".onnx"}
Run = Callable[[Path, Mapping[str, Tensor]], dict[str, np.ndarray]]


def save_onnx(
    student: PipelineTeacher,
    sampler: FewSteps,
    source: Path,
    out: Path,
    *,
    form: str = "onnx",
    weights: str | None = None,
) -> Path:
    """Write the folder `out` for a student of the pipeline folder `source`.

    form: onnx, openvino, or web, which has the files of onnx.
    weights: int8 quantises the denoiser's matrix products, after the check.
    Raises ValueError for a pipeline that was not distilled or cannot be traced, and for outputs in
    the runtime that differ from torch's.
    """
    if not distilled(student.pipeline):
        what = "was not distilled to few steps, and has no sampler to export"
        raise ValueError(f"to={form}: {source} {what}; give a student")
    try:
        _save(student, sampler, source, out, form, weights)
    except Untraceable as error:
        raise ValueError(f"to={form}: {error}; use to=diffusers") from error
    return out


def _save(
    student: PipelineTeacher,
    sampler: FewSteps,
    source: Path,
    out: Path,
    form: str,
    weights: str | None,
) -> None:
    steps = steps_of(student, sampler)
    first, last = (levels[-1]["t"] for levels in (steps["1"], steps[max(steps)]))
    parts = networks_of(student, CAPTIONS, torch.tensor([first, last]))
    with atomic_folder(out) as partial:
        partial.mkdir(parents=True)
        found = {
            **described(student, sampler, steps),
            "weights": weights or "float32",
            "networks": _written(student, parts, partial, form),
            "largest_difference_from_torch": _checked(student, parts, partial, form),
        }
        if weights:
            found["int8_difference_of_x0"] = quantise(student, parts[0], partial)
        found["networks"]["text_encoder"]["reads"] = reading(student)
        for name in parts[1].inputs:
            copy_part(Path(home_of(source, name), name), partial / name)
        for folder in reversed(lineage(source)):
            copy_terms(folder, partial)
        text = json.dumps(found, indent=2) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")


def _written(
    student: PipelineTeacher, parts: Sequence[Traced], folder: Path, form: str
) -> dict[str, Any]:
    """Write all networks; returns what the manifest says of each."""
    for part in parts:
        with stage(f"exporting the {part.name.replace('_', ' ')}"):
            file = folder / f"{part.name}.onnx"
            write(part, file, type(student.pipeline).__name__)
            if form == "openvino":
                openvino_files.convert(file)
    return {part.name: _described(part, form) for part in parts}


def _checked(
    student: PipelineTeacher, parts: list[Traced], folder: Path, form: str
) -> dict[str, float]:
    run_it = openvino_files.run if form == "openvino" else run
    differences = compare(student, parts, folder, run_it, SUFFIX[form])
    each = (f"{name.replace('_', ' ')} {worst:.1e}" for name, worst in differences.items())
    print(f"largest difference from torch: {', '.join(each)}")
    return differences


def quantise(student: PipelineTeacher, denoiser: Traced, folder: Path) -> float:
    """Quantise the denoiser's file to int8; returns the difference of its outputs.

    Weights of matrix products have a scale for each column, and their inputs are quantised as they
    come, by one scale. The difference is the root mean square of that of x0, as a share of x0's.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "denoiser.onnx"
    given = _examples(student, denoiser)[-1]
    before = run(file, given)["x0"]
    smaller, large = file.with_suffix(".int8"), file.with_name(f"{file.name}.data")
    with stage("quantising the denoiser, int8"), quiet_logging():
        quantize_dynamic(
            file,
            smaller,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=large.exists(),
        )
    was, now = (sum(x.stat().st_size for x in folder.glob(f"{y.name}*")) for y in (file, smaller))
    large.unlink(missing_ok=True)
    smaller.replace(file)  # its own data, if any, keep their name
    share = float(np.sqrt(np.mean((run(file, given)["x0"] - before) ** 2) / np.mean(before**2)))
    size = f"{was / 1e6:.1f} MB of the denoiser are now {now / 1e6:.1f}"
    print(f"int8: {size}, and x0 differs by {share:.1%} (root mean square)")
    return share


def write(part: Traced, file: Path, kind: str) -> None:
    """Trace a network and write it. Raises Untraceable where torch.onnx cannot."""
    batch = torch.export.Dim("batch", min=1, max=MOST_AT_ONCE) if part.batched else None
    shapes = [{0: batch} if part.batched else {} for _ in part.inputs]
    inputs = tuple(part.inputs.values())
    held = sum(p.numel() * p.element_size() for p in part.module.parameters())
    try:
        with torch.no_grad(), warnings.catch_warnings(), quiet_logging():
            warnings.simplefilter("ignore")
            traced = torch.export.export(
                part.module.eval(), inputs, dynamic_shapes=_shapes(part, shapes), strict=False
            )
            program = torch.onnx.export(
                corrected(traced),
                inputs,
                dynamo=True,
                verbose=False,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
            )
            assert program is not None
            program.save(file, external_data=held > ONE_FILE)
    except Exception as error:  # of any kind: torch's own, of the class of the model
        what = f"torch.onnx cannot write the {part.name} of a {kind} ({first_line(error, 120)})"
        raise Untraceable(what) from error


def _shapes(part: Traced, shapes: list[dict[int, Any]]) -> Any:
    """The dynamic dimensions in the order of the arguments of `forward`."""
    if part.name == "denoiser":  # x_t, t, *conditioning
        return (*shapes[:2], tuple(shapes[2:]))
    return (tuple(shapes),) if part.name == "text_encoder" else tuple(shapes)


def compare(
    student: PipelineTeacher,
    parts: list[Traced],
    folder: Path,
    run_it: Run | None = None,
    suffix: str = ".onnx",
) -> dict[str, float]:
    """The largest absolute difference of each network's outputs from torch.

    run_it: runs a file, by default in onnxruntime.

    Batches of 1 and 2 are compared, and two captions. Raises Untraceable above TOLERANCE.
    """
    found = {}
    for part in parts:
        worst = 0.0
        for inputs in _examples(student, part):
            expected, got = (
                part(inputs),
                _ran(run_it or run, folder / f"{part.name}{suffix}", inputs),
            )
            for name, values in expected.items():
                difference = np.abs(got[name] - values.numpy()).max()
                share = difference / max(float(values.abs().max()), 1e-12)
                if not share <= TOLERANCE:  # also for values that are not finite
                    what = f"{name} of the {part.name} differs from torch's by {difference:.2g}"
                    most = f"{share:.1%} of its largest value, and {TOLERANCE:.1%} is allowed"
                    raise Untraceable(f"{what}, {most}")
                worst = max(worst, float(difference))
        found[part.name] = worst
    return found


def _examples(student: PipelineTeacher, part: Traced) -> list[dict[str, Tensor]]:
    if part.batched:
        return [{name: x[:n] for name, x in part.inputs.items()} for n in (1, 2)]
    found = [token_ids(student, caption)[1] for caption in ("", *CAPTIONS)]
    # Sana reads the empty caption without its instruction, and so in another length.
    return [ids for ids in found if all(x.shape == part.inputs[n].shape for n, x in ids.items())]


def run(file: Path, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Outputs by name of a network in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {name: x.numpy() for name, x in inputs.items()}
    return dict(zip(names, session.run(names, given), strict=True))


def _ran(run_it: Run, file: Path, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """As `run_it`. Raises Untraceable, in one clause, where the runtime cannot run the network."""
    try:
        return run_it(file, inputs)
    except Exception as error:  # its own classes, which derive from nothing else
        who = "OpenVINO" if file.suffix == ".xml" else "onnxruntime"
        what = f"{who} cannot run the {file.stem} ({first_line(error, 200)})"
        raise Untraceable(what) from error


def steps_of(student: PipelineTeacher, sampler: FewSteps) -> dict[str, list[dict[str, float]]]:
    """Number of steps -> t, alpha and sigma of each."""
    found = {}
    for count in range(1, MOST_STEPS + 1):
        try:
            levels = sampler.grid(count, student=student, shape=student.latent_shape)
        except ValueError:  # this sampler has fewer levels
            break
        t, process = torch.tensor(levels), student.process
        columns = zip(levels, process.alpha(t).tolist(), process.sigma(t).tolist(), strict=True)
        found[str(count)] = [
            dict(zip(("t", "alpha", "sigma"), row, strict=True)) for row in columns
        ]
    return found


def described(
    student: PipelineTeacher, sampler: FewSteps, steps: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """What a program needs to know to sample with the networks."""
    # Euler-ancestral steps start from x_1 of no data, the others from unit noise.
    scaled = isinstance(sampler, EulerAncestral) and steps["1"][0]["t"] == 1
    return {
        "format": 1,
        "made_by": f"distill {version('distill')}",
        "pipeline": type(student.pipeline).__name__,
        "process": type(student.process).__name__,
        "prediction": student.prediction,
        "latents": list(student.latent_shape),
        "pixels": list(student.sides_of(student.latent_shape)),
        "scale": student.vae.config.get("scaling_factor") or 1.0,
        "scale_is_in": "decoder",
        "sampler": type(sampler).__name__,
        "first_noise_times": steps["1"][0]["sigma"] if scaled else 1.0,
        "steps": steps,
    }


def _described(part: Traced, form: str) -> dict[str, Any]:
    return {
        "file": f"{part.name}{SUFFIX[form]}",
        "inputs": part.sizes(part.inputs),
        "outputs": part.sizes(part(part.inputs)),
    }
