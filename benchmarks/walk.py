"""The commands of docs/how_to/fine_tune.md and lora.md, as a user gives them, on networks of full
size.

    python benchmarks/walk.py sdxl lora 1024 20
    python benchmarks/walk.py sd3 full 1024 12 loop.accumulate=1

Arguments: a family (sd3, sdxl), the student (lora, full), pixels a side, steps, overrides of
`distill.run`. `--small` before them shrinks every width. The weights are random, so the pictures
are noise; what is measured is what each command takes: its seconds, on a GPU its peak of memory,
and of the run what `distill.doctor` counts beforehand. Nothing is switched off. At the end plain
diffusers opens what was exported and draws one picture.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from full_size import pictures, sd3, sdxl

EXPERIMENTS = {"sdxl": "ladd_sdxl", "sd3": "sd3_turbo"}
WITHOUT_T5 = ["teacher.without=[text_encoder_3,tokenizer_3]"]


def inside(note: Path, module: str, words: list[str]) -> None:
    """Run a command in this process, and leave its peak of GPU memory in the note."""
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if torch.cuda.is_available():
            peak = {
                "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            }
            note.write_text(json.dumps(peak), encoding="utf-8")


def command(folder: Path, module: str, *words: str) -> None:
    """A command in a process of its own; what it took is printed."""
    note = folder / "peak.json"
    note.unlink(missing_ok=True)
    print(f"\n$ python -m {module} {' '.join(words)}".replace(str(folder), "."), flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, __file__, "--inside", str(note), module, *words])
    took = f"{time.monotonic() - began:.0f} s"
    peak = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    print(f"WALK {module}: exit {done.returncode}, {took}, {peak}", flush=True)


def opened(folder: Path, family: str, student: str) -> None:
    """What others do with it."""
    import diffusers

    kind = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd3": diffusers.StableDiffusion3Pipeline}
    source = folder / ("teacher" if student == "lora" else "fast")
    pipeline = kind[family].from_pretrained(source, torch_dtype=torch.bfloat16)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if student == "lora":
        pipeline.load_lora_weights(folder / "lora.safetensors")
    began = time.monotonic()
    size = 64 if folder.name.endswith("small") else None
    pipeline("a red square", num_inference_steps=4, guidance_scale=0.0, height=size, width=size)
    print(f"WALK plain diffusers: four steps in {time.monotonic() - began:.1f} s", flush=True)


def walk(folder: Path, family: str, student: str, side: int, steps: int, more: list[str]) -> None:
    small = folder.name.endswith("small")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = {"sd3": sd3, "sdxl": sdxl}[family](small)
    pipeline.to(torch.bfloat16).save_pretrained(folder / "teacher")
    del pipeline
    torch.cuda.empty_cache()
    pictures(folder / "photos", 32, side)
    teacher = [f"teacher.path={folder / 'teacher'}"]
    teacher += WITHOUT_T5 if family == "sd3" else []
    data = [f"data.path={folder / 'photos'}", f"data.size={side}"]
    command(folder, "distill.check", *data)
    cached = folder / "cached"
    command(folder, "distill.cache", f"teacher={family}", *teacher, *data, f"out={cached}")
    words = [f"experiment={EXPERIMENTS[family]}", f"student={student}", *teacher]
    words += ["data=latents", f"data.path={cached}", "method.distill_weight=2.5"]
    words += ["student.checkpointing=true", "data.batch_size=1", f"trainer.max_steps={steps}"]
    words += ["callbacks.samples.every=10", *more]
    command(folder, "distill.doctor", *words)
    run = folder / "run"
    command(folder, "distill.run", *words, "trainer.log_every_n_steps=1", f"run_dir={run}")
    out = f"out={folder / 'drawn'}"
    command(folder, "distill.sample", f"run={run}", "prompt=a lighthouse", "steps=4", out)
    if student == "lora":
        out = f"out={folder / 'lora.safetensors'}"
        command(folder, "distill.export", f"run={run}", "to=lora", "dtype=float16", out)
    else:
        command(folder, "distill.export", f"run={run}", "to=diffusers", f"out={folder / 'fast'}")
    opened(folder, family, student)


def main(arguments: list[str]) -> None:
    if arguments[0] == "--inside":
        inside(Path(arguments[1]), arguments[2], arguments[3:])
        return
    small = arguments[0] == "--small"
    family, student, side, steps, *more = arguments[small:]
    with tempfile.TemporaryDirectory(suffix="small" if small else "") as name:
        walk(Path(name), family, student, int(side), int(steps), more)


if __name__ == "__main__":
    main(sys.argv[1:])
