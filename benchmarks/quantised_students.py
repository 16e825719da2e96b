"""What 8-bit weights cost a student of `shapes`: the scores of `metrics=shapes` for each kind.

    python benchmarks/quantised_students.py [prompts [kinds]]

Text encoders and decoder are in float32 in every row, and all rows have the same prompts and noise.
onnx_int8 is the file of `export to=onnx weights=int8`, in onnxruntime.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from distill.config.compose import shipped
from distill.config.models import sampler_of, student_of
from distill.evaluation.shapes import Shapes, evaluated_samplers
from distill.exporting.onnx_files import save_onnx
from distill.exporting.quantised import quantised
from distill.students.parts import copy_pipeline
from distill.teachers.loading.locate import denoiser_part, pipeline_folder
from distill.terminal.progress import Bar
from distill.worlds.shapes.judge import Judge

RUN = "shapes:student"
KINDS = ("float32", "bfloat16", "int8", "fp8", "onnx_int8")


def of_kind(kind: str, folder: Path) -> tuple[Any, int]:
    """The student with such a denoiser, and the bytes of its file."""
    student, copy = student_of(RUN), copy_pipeline(pipeline_folder(Path(shipped(RUN))), folder)
    part = copy / denoiser_part(copy)
    if kind == "onnx_int8":
        return student, in_onnxruntime(student, folder.with_name("onnx"))
    model = student.network.model
    if kind in ("int8", "fp8"):
        model = quantised(copy, kind)
    elif kind == "bfloat16":
        model = model.to(torch.bfloat16)
    student.network = student.network.with_model(model)
    model.save_pretrained(part / kind)
    return student, sum(f.stat().st_size for f in (part / kind).glob("*.safetensors"))


def in_onnxruntime(student: Any, folder: Path) -> int:
    """Have onnxruntime compute the student's x0 by its int8 file; returns the bytes of the file."""
    save_onnx(
        student,
        sampler_of(RUN, student),
        pipeline_folder(Path(shipped(RUN))),
        folder,
        weights="int8",
    )
    file = folder / "denoiser.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    read = [each.name for each in session.get_inputs()]

    def x0(x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        inputs = {"x_t": x_t, "t": t, **cond.tensors()}
        [found] = session.run(["x0"], {name: inputs[name].numpy() for name in read})
        return torch.from_numpy(found)

    student.network.__dict__["x0"] = x0
    return file.stat().st_size


def main() -> None:
    prompts = int(sys.argv[1]) if sys.argv[1:] else 400
    judge = Judge.load()
    protocol = Shapes(prompts=prompts, student_steps=(1, 4), teacher_steps=(), precision="32-true")
    print("| weights | MB | steps | prompt accuracy | Frechet distance |\n|---|---|---|---|---|")
    for kind in sys.argv[2:] or KINDS:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            student, size = of_kind(kind, Path(folder) / "student")
            shape, sampler = student.latent_shape, sampler_of(RUN, student)
            for _, steps, sample in evaluated_samplers(protocol, student, student, sampler, shape):
                with Bar(f"{kind} in {steps}", 2 * prompts, unit="image") as bar:
                    row, _ = protocol._evaluate(judge, student, sample, bar)
                scores = f"{row['prompt_accuracy']:.3f} | {row['frechet']:.0f}"
                print(f"| {kind} | {size / 1e6:.1f} | {steps} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
