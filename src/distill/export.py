"""Write a student in the form that others read.

    python -m distill.export run=runs/... to=diffusers out=student
    python -m distill.export run=runs/... to=lora rank=64 naming=kohya
    python -m distill.export run=runs/... to=single_file dtype=float16
    python -m distill.export base=<pipeline folder> delta=runs/.../delta.safetensors out=student

diffusers     the pipeline folder of the run with a model card of what is known by now
lora          a LoRA's adapters; of a full student the nearest of `rank` to what it has learnt
single_file   Stable Diffusion 1, 2 and XL in the layout of the original code, for ComfyUI
delta         student minus base: `teacher.weights=<delta>` adds it to a teacher
"""

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill import validate
from distill.compose import check_counts, nearest
from distill.errors import command
from distill.limits import check_dtype
from distill.progress import stage


def export(cfg: DictConfig) -> Path:
    """Write and return the file or folder."""
    check(cfg)
    if cfg.delta is None:
        return FORMS[cfg.to](cfg, Path(cfg.run))

    from distill import build
    from distill.students import apply_delta

    out = _new(cfg.out or f"{cfg.delta}.student")
    return apply_delta(build.student_of(cfg.base), Path(cfg.delta), out)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be, before anything that takes time is imported."""
    if cfg.delta is None and (cfg.run is None or cfg.to not in FORMS):
        what = f"give run=<folder> to={'|'.join(FORMS)}, or base=<folder> delta=<file>"
        raise ValueError(f"run={cfg.run} to={cfg.to}: {what}{nearest(str(cfg.to), FORMS)}")
    if cfg.delta is not None:
        _new(cfg.out or f"{cfg.delta}.student")
    if cfg.delta is not None and not Path(cfg.delta).is_file():
        raise FileNotFoundError(f"delta={cfg.delta}: no such file; give one that to=delta wrote")
    if cfg.delta is not None and cfg.base is None:
        raise ValueError("base: not given; add base=<the pipeline folder that delta is put on>")
    if cfg.delta is None:
        validate.check_model(cfg.run)
    if cfg.base is not None:
        validate.check_model(cfg.base, "base")
    check_counts(cfg, {"rank": 1})
    check_dtype(cfg.dtype, "dtype")
    validate.check_word(cfg, "naming", "diffusers", "kohya")
    own = Path(cfg.run or "") / "lora.safetensors"
    if cfg.delta is None and cfg.to == "lora" and cfg.rank is None and not own.is_file():
        raise ValueError(
            f"rank=null: run={cfg.run} has no adapters (student=lora); give the rank of what is kept"
        )


def _new(out: str) -> Path:
    """Where a folder goes. Raises FileExistsError if something is there: it may be anyone's."""
    if Path(out).exists():
        raise FileExistsError(f"out={out}: is there already; remove it or name another")
    return Path(out)


def _base(cfg: DictConfig) -> Any:
    """What the student was made from: `base`, or the teacher that the run names."""
    from distill import build, compose

    if cfg.base is not None:
        return build.student_of(cfg.base)
    if (config := compose.config_of(cfg.run)) is None:
        raise ValueError(
            f"base=null: run={cfg.run} does not say what its student was made from; add base=<folder>"
        )
    return build.make(config.teacher)


def _delta(cfg: DictConfig, run: Path) -> Path:
    from distill import build
    from distill.students import save_delta

    return save_delta(
        build.student_of(cfg.run), _base(cfg), Path(cfg.out or run / "delta.safetensors")
    )


def _lora(cfg: DictConfig, run: Path) -> Path:
    from distill import build
    from distill.students import low_rank
    from distill.teachers.locate import denoiser_part, pipeline_folder

    own, suffix = run / "lora.safetensors", "" if cfg.naming == "diffusers" else f"_{cfg.naming}"
    suffix += f"_{cfg.dtype}" if cfg.dtype else ""  # the run's own are in float32, and stay
    if cfg.rank is None:
        factors, out = low_rank.read_lora(own), run / f"lora{suffix}.safetensors"
    else:
        student, base = build.student_of(cfg.run), _base(cfg)
        factors, share = low_rank.difference(student.network.model, base.network.model, cfg.rank)
        print(
            f"rank {cfg.rank} keeps {100 * share:.1f} % of the square of what the student has learnt"
        )
        out = run / f"lora_rank{cfg.rank}{suffix}.safetensors"
    part = denoiser_part(pipeline_folder(run))
    return low_rank.save_lora(
        factors, Path(cfg.out or out), part=part, naming=cfg.naming, dtype=cfg.dtype
    )


def _single_file(cfg: DictConfig, run: Path) -> Path:
    from distill import build
    from distill.students.single_file import save_single_file

    pipeline = build.student_of(cfg.run).pipeline
    return save_single_file(pipeline, Path(cfg.out or run / "student.safetensors"), cfg.dtype)


def _diffusers(cfg: DictConfig, run: Path) -> Path:
    from distill import compose
    from distill.files import remove
    from distill.students.card import write_card
    from distill.teachers.locate import pipeline_folder
    from distill.teachers.reading import class_of

    student, teacher = pipeline_folder(run), None
    class_of(str(student))
    if config := compose.config_of(run):
        teacher = Path(compose.shipped(config.teacher.path))
    if cfg.out is None or Path(cfg.out) == student:
        write_card(student, run, teacher)
        return student
    out = _new(cfg.out)
    partial = out.with_name(out.name + ".part")
    remove(partial)
    shutil.copytree(student, partial)
    write_card(partial, run, teacher)
    return partial.replace(out)


FORMS = {"diffusers": _diffusers, "lora": _lora, "single_file": _single_file, "delta": _delta}


@command("export")
def main(cfg: DictConfig) -> None:
    with stage("exporting"):
        wrote = export(cfg)
    print(f"wrote {wrote}")


if __name__ == "__main__":
    main()
