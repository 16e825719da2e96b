"""Write a student in a form that other programs read.

    python -m distill.export run=runs/... to=diffusers out=student dtype=float16
    python -m distill.export run=runs/... to=diffusers weights=int8 out=student_int8
    python -m distill.export run=runs/... to=lora rank=64 naming=kohya
    python -m distill.export run=runs/... to=single_file dtype=float16
    python -m distill.export run=runs/... to=onnx out=onnx
    python -m distill.export run=runs/... to=openvino out=openvino
    python -m distill.export run=runs/... to=web runtime=onnxruntime-web.tgz out=page
    python -m distill.export run=runs/... to=hub repo=me/my-student
    python -m distill.export run=runs/... to=diffusers lora=runs/dpo lora_scale=1 out=student
    python -m distill.export base=<pipeline folder> delta=runs/.../delta.safetensors out=student

diffusers     the pipeline folder of the run, with an up-to-date model card
lora          the adapters of a LoRA; for a full student the best LoRA of this `rank`
single_file   for ComfyUI: Stable Diffusion 1, 2 and XL in the original layout; for SD3, FLUX,
              PixArt, Z-Image and Qwen-Image only the transformer, with diffusers' names
delta         student minus base: `teacher.weights=<delta>` adds it to a teacher
onnx          denoiser, text encoder and decoder for onnxruntime, checked against torch
openvino      the same for OpenVINO
web           a page that runs a small student in the browser, without a server
hub           as diffusers, pushed to `repo` on the hub; a new repository is private

`lora` is added to the student's weights before they are written.
"""

import importlib.util
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config import validate
from distill.config.compose import check_counts, config_of, is_run, nearest, shipped
from distill.config.errors import command
from distill.config.generator import refuse_generator
from distill.config.preference import check_lora
from distill.core.limits import check_dtype
from distill.exporting import NAMINGS, web_runtime
from distill.storage.atomic import atomic_folder
from distill.storage.bounded import mapping_of
from distill.storage.locks import check_free, one_writer, one_writer_of
from distill.teachers import families
from distill.teachers.loading.locate import (
    check_distilled,
    denoiser_part,
    index_of,
    is_repository,
    pipeline_folder,
)
from distill.teachers.loading.settings import refuse_quantised_parts
from distill.terminal.progress import stage


def export(cfg: DictConfig) -> Path | str:
    """Write the file or folder; returns its path, or its address on the hub."""
    check(cfg)
    run, out = Path(shipped(cfg.run)) if cfg.run else None, _out(cfg)
    # Only the card of the run's own student is written: lock the run, which also writes there.
    in_run = run is not None and out == pipeline_folder(run) and is_run(run)
    lock = one_writer(run, "run", deep=True) if run and in_run else one_writer_of(out, "out")
    with lock:
        return FORMS[cfg.to](cfg, run, out) if run else _apply_delta(cfg, out)


def _apply_delta(cfg: DictConfig, out: Path) -> Path:
    """Write the student that `base` and a delta give."""
    from distill.config import models
    from distill.students import apply_delta

    return apply_delta(models.student_of(cfg.base, key="base"), Path(cfg.delta), _new(str(out)))


def _out(cfg: DictConfig) -> Path:
    """The file or folder to write: `out`, else a path in the run folder that names the settings."""
    if cfg.out is not None or cfg.run is None:
        return Path(cfg.out or f"{cfg.delta}.student")
    run = Path(shipped(cfg.run))
    if cfg.to == "lora":
        rank = f"_rank{cfg.rank}" if cfg.rank is not None else ""
        naming = cfg.naming if cfg.naming not in (None, NAMINGS[0]) else None
        # The run's own adapters, lora.safetensors in float32, are not overwritten.
        suffix = "".join(f"_{setting}" for setting in (naming, cfg.dtype) if setting)
        return run / f"lora{rank}{suffix}.safetensors"
    if cfg.to in ("single_file", "delta"):
        name = "student" if cfg.to == "single_file" else "delta"
        return run / f"{name}{WITH_LORA if cfg.lora else ''}.safetensors"
    student = pipeline_folder(run)
    form = cfg.to if cfg.to in PACKAGES else None
    suffix = "".join(f"_{setting}" for setting in (form, *_settings(cfg)) if setting)
    return student.with_name(student.name + (WITH_LORA if cfg.lora else "") + suffix)


def _settings(cfg: DictConfig) -> tuple[str | None, ...]:
    """What a pipeline folder differs in from the run's own, besides a LoRA."""
    return (cfg.scheduler, cfg.weights, cfg.dtype)


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported or read."""
    if cfg.run is not None and cfg.to in (None, *FORMS):
        validate.check_model(cfg.run)
        compared = cfg.base is None and (cfg.to == "delta" or cfg.rank is not None)
        config_of(cfg.run, "teacher" if compared else "teacher.path")
    if (cfg.run is None) == (cfg.delta is None) or (cfg.delta is None and cfg.to not in FORMS):
        what = f"give run=<folder> to={'|'.join(FORMS)}, or base=<folder> delta=<file>"
        raise ValueError(
            f"run={cfg.run} to={cfg.to} delta={cfg.delta}: {what}{nearest(str(cfg.to), FORMS)}"
        )
    check_counts(cfg, {"rank": 1})
    check_dtype(cfg.dtype, "dtype")
    validate.check_word(cfg, "naming", *NAMINGS)
    validate.check_word(cfg, "scheduler", "euler", "consistency")
    validate.check_word(cfg, "weights", "int8", "fp8")
    if cfg.base is not None:
        validate.check_model(cfg.base, "base")
    if cfg.delta is not None:
        _check_delta(cfg)
        return
    for key, forms in MEANT_FOR.items():
        if cfg[key] is not None and cfg.to not in forms:
            what = f"has no effect on to={cfg.to}, only on to={' and to='.join(forms)}"
            raise ValueError(f"{key}={cfg[key]}: {what}; leave it out")
    check_lora(cfg)
    _check_kind(cfg)  # first: nothing to install or to fetch makes a student another
    if cfg.to in PACKAGES:
        check_distilled(pipeline_folder(Path(shipped(cfg.run))), f"to={cfg.to}: run={cfg.run}")
    _check_packages(cfg)
    if cfg.out is not None and not Path(cfg.out).name:
        raise ValueError(f"out={cfg.out}: is no name of a new file or folder; give one")
    check_free(_out(cfg), "out")
    _check_out(cfg)
    if cfg.out is not None and cfg.to in OF_A_FILE and not str(cfg.out).endswith(ENDING):
        what = f"to={cfg.to} writes a file that is read by its ending; name it {cfg.out}{ENDING}"
        raise ValueError(f"out={cfg.out}: {what}")


def _check_packages(cfg: DictConfig) -> None:
    """Check that what writes this form is installed."""
    if cfg.weights == "fp8" and cfg.to in PACKAGES:
        raise ValueError(f"weights=fp8: to={cfg.to} has no such weights; use weights=int8")
    by_torchao = cfg.weights and cfg.to not in PACKAGES
    if by_torchao and importlib.util.find_spec("torchao") is None:
        what = "needs torchao, not installed here; pip install 'distill[quantise]'"
        raise ValueError(f"weights={cfg.weights}: {what}")
    if cfg.weights and cfg.dtype:
        what = f"weights={cfg.weights} computes in bfloat16, as all parts then do; leave it out"
        raise ValueError(f"dtype={cfg.dtype}: {what}")
    missing = [name for name in PACKAGES.get(cfg.to, ()) if importlib.util.find_spec(name) is None]
    if missing:
        extra = "openvino" if cfg.to == "openvino" else "onnx"
        what = f"needs {', '.join(missing)}, not installed here; pip install 'distill[{extra}]'"
        raise ValueError(f"to={cfg.to}: {what}")
    if cfg.to == "web":
        web_runtime.read(cfg.runtime)


def _check_delta(cfg: DictConfig) -> None:
    _new(cfg.out or f"{cfg.delta}.student")
    if not Path(cfg.delta).is_file():
        raise FileNotFoundError(f"delta={cfg.delta}: no such file; give one that to=delta wrote")
    if cfg.base is None:
        raise ValueError("base: not given; add base=<the pipeline folder that delta is added to>")
    for key in ("to", "repo", *MEANT_FOR):
        if key != "base" and cfg[key] is not None:
            raise ValueError(f"{key}={cfg[key]}: has no effect on delta=; leave it out")


def _check_kind(cfg: DictConfig) -> None:
    """Check that a student of this class has this form, and that its base is known if needed."""
    folder = pipeline_folder(Path(shipped(cfg.run)))
    if not folder.is_dir():
        what = f"is on the hub, and to={cfg.to} reads a folder"
        raise ValueError(f"run={cfg.run}: {what}; fetch it by `hf download {cfg.run} --local-dir`")
    _check_generator(cfg, folder)
    kind = str(index_of(str(folder), "run")["_class_name"])
    family, of_unet = families.family_of_kind(kind), denoiser_part(folder) == "unet"
    if cfg.to == "single_file" and family.single_file is None:
        what = f"is for {', '.join(families.in_one_file())}, and run={cfg.run} holds a {kind}"
        raise ValueError(f"to=single_file: {what}; use to=diffusers")
    if cfg.to in PACKAGES and (why := family.not_traced()):
        raise ValueError(f"to={cfg.to}: run={cfg.run} holds a {kind}, {why}; use to=diffusers")
    scheduler = (index_of(str(folder), "run").get("scheduler") or ["", ""])[1]
    if cfg.to == "single_file" and of_unet and scheduler == FLOW_OF_UNETS:
        what = "cannot mark a UNet that predicts a flow; other programs would read it as eps"
        raise ValueError(f"to=single_file: {what}; use to=diffusers")
    if cfg.weights or cfg.dtype:  # forms that read the student refuse such weights themselves
        refuse_quantised_parts(folder, f"run={cfg.run}")
    if cfg.naming == "kohya" and not of_unet:
        what = "is for UNets; for a transformer use naming=diffusers, which ComfyUI reads"
        raise ValueError(f"naming=kohya: {what}")
    if cfg.scheduler is not None and not family.flow:
        what = f"is for students of flow models, and run={cfg.run} holds a {kind}"
        raise ValueError(f"scheduler={cfg.scheduler}: {what}; leave it out")
    if cfg.scheduler is not None and scheduler == FRESH_NOISE:
        what = f"a {kind} adds fresh noise between steps, and has no other scheduler"
        raise ValueError(f"scheduler={cfg.scheduler}: {what}; leave it out")
    if cfg.base is not None and cfg.to == "lora" and cfg.rank is None:
        raise ValueError(
            f"base={cfg.base}: is not needed for the run's own adapters; add rank= or leave it out"
        )
    adapters = Path(cfg.run) / "lora.safetensors"
    if cfg.to == "lora" and cfg.rank is None and not adapters.is_file():
        raise ValueError(
            f"rank=null: run={cfg.run} has no adapters (student=lora); give the rank of an"
            " approximation"
        )
    compared = cfg.to == "delta" or cfg.rank is not None
    if compared and cfg.base is None and not (Path(cfg.run) / "config.yaml").is_file():
        what = f"run={cfg.run} does not say what its student was made from; add base=<folder>"
        raise ValueError(f"base=null: {what}")


def _check_generator(cfg: DictConfig, folder: Path) -> None:
    """Check that a GAN's generator is only exported as the folder that it is in."""
    if cfg.to in ("diffusers", "hub") and cfg.weights is None:
        return
    chosen = f"weights={cfg.weights}" if cfg.weights else f"to={cfg.to}"
    refuse_generator(str(folder), f"{chosen}: run={cfg.run}", "use to=diffusers alone")


def _check_out(cfg: DictConfig) -> None:
    """Check that nothing is overwritten, and that to=hub has a repository."""
    if (cfg.to == "hub") != (cfg.repo is not None) or (cfg.repo and not is_repository(cfg.repo)):
        raise ValueError(f"repo={cfg.repo}: only to=hub takes repo=<owner>/<name>, and needs it")
    if cfg.to in PACKAGES:
        if cfg.out is None and not is_run(Path(cfg.run)):
            raise ValueError(f"out=null: run={cfg.run} is no run folder; name the folder to write")
        _new(str(_out(cfg)))
    if cfg.out is None:
        return
    if cfg.to in (*PACKAGES, "diffusers", "hub"):
        if cfg.lora or Path(cfg.out) != pipeline_folder(Path(cfg.run)):
            _new(cfg.out)
    elif Path(cfg.out).is_dir():
        raise ValueError(f"out={cfg.out}: is a folder, and to={cfg.to} writes a file; name a file")


def _new(out: str) -> Path:
    """The path of a new folder. Raises FileExistsError if something is there already."""
    if Path(out).exists():
        raise FileExistsError(f"out={out}: is there already; remove it or name another")
    return Path(out)


def _base(cfg: DictConfig) -> Any:
    """The model that the student started from: `base`, or the teacher of the run."""
    from distill.config import build, models

    if cfg.base is not None:
        return models.student_of(cfg.base, key="base")
    return build.make(config_of(cfg.run, "teacher").teacher, "teacher")


def _student(cfg: DictConfig) -> Any:
    """The student, with `lora` added to its weights."""
    from distill.config import models

    return models.student_of(cfg.run, lora=cfg.lora, lora_scale=cfg.lora_scale)


def _delta(cfg: DictConfig, run: Path, out: Path) -> Path:
    from distill.students import save_delta

    return save_delta(_student(cfg), _base(cfg), out)


def _lora(cfg: DictConfig, run: Path, out: Path) -> Path:
    from distill.config import models
    from distill.exporting import low_rank

    if cfg.rank is None:
        factors = low_rank.read_lora(run / "lora.safetensors")
    else:
        student, base = models.student_of(cfg.run), _base(cfg)
        factors, share = low_rank.difference(student.network.model, base.network.model, cfg.rank)
        print(
            f"rank {cfg.rank} keeps {100 * share:.1f} % of the squared difference between student"
            " and base"
        )
    folder = pipeline_folder(run)
    return low_rank.save_lora(
        factors,
        out,
        part=denoiser_part(folder),
        naming=cfg.naming or NAMINGS[0],
        dtype=cfg.dtype,
        metadata=low_rank.lora_metadata(folder),
    )


def _single_file(cfg: DictConfig, run: Path, out: Path) -> Path:
    from distill.exporting.single_file import save_single_file

    return save_single_file(_student(cfg).pipeline, out, cfg.dtype)


def _diffusers(cfg: DictConfig, run: Path, out: Path) -> Path:
    from distill.exporting.card import write_card
    from distill.students import replace_denoiser
    from distill.students.parts import copy_pipeline, set_sampler

    student = pipeline_folder(run)
    if out == student and not (any(_settings(cfg)) or cfg.lora):
        write_card(student, run, _teacher_of(run))
        return student
    with atomic_folder(_new(str(out))) as partial:
        # Quantised layers compute in bfloat16, so the other parts are in it too.
        copy_pipeline(student, partial, "bfloat16" if cfg.weights else cfg.dtype)
        if cfg.lora:
            replace_denoiser(_student(cfg).network.model, partial, cfg.dtype)
        if cfg.weights:
            from distill.exporting.quantised import quantise_denoiser

            quantise_denoiser(partial, cfg.weights)
        if cfg.scheduler is not None:
            from distill.sampling import flow_scheduler
            from distill.sampling.shifts import shift_of
            from distill.teachers.loading.reading import student_info

            of_unet = denoiser_part(student) == "unet"
            settings = mapping_of(student / "scheduler" / "scheduler_config.json")
            shift = shift_of(settings, student_info(str(student))["sampler"])
            stochastic = cfg.scheduler == "consistency"
            scheduler = flow_scheduler(of_unet=of_unet, stochastic=stochastic, shift=shift)
            set_sampler(partial, cfg.scheduler.capitalize(), scheduler)
        write_card(partial, run, _teacher_of(run))
    return out


def _onnx(cfg: DictConfig, run: Path, out: Path) -> Path:
    from distill.config.models import sampler_of
    from distill.exporting.onnx_files import save_onnx

    student = _student(cfg)
    sampler = sampler_of(cfg.run, student)
    how = {"form": cfg.to, "weights": cfg.weights}
    return save_onnx(student, sampler, pipeline_folder(run), out, **how)


def _web(cfg: DictConfig, run: Path, out: Path) -> Path:
    from distill.config.models import sampler_of
    from distill.exporting.web import save_page

    student, runtime = _student(cfg), web_runtime.read(cfg.runtime)
    return save_page(student, sampler_of(cfg.run, student), pipeline_folder(run), out, runtime)


def _teacher_of(run: Path) -> Path | None:
    """The folder of the run's teacher, which may name its licence."""
    config = config_of(run, "teacher.path")
    return Path(shipped(config.teacher.path)) if config else None


def _hub(cfg: DictConfig, run: Path, out: Path) -> str:
    """Write the folder, and push it. The folder stays: a failed push can be repeated by hand."""
    from distill.exporting.hub import push

    return push(_diffusers(cfg, run, out), cfg.repo)


WITH_LORA = "_with_lora"  # in names of what a LoRA was added to
ENDING = ".safetensors"
OF_A_FILE = ("lora", "delta", "single_file")  # forms that write one file of weights
FORMS = {
    "diffusers": _diffusers,
    "lora": _lora,
    "single_file": _single_file,
    "delta": _delta,
    "onnx": _onnx,
    "openvino": _onnx,
    "web": _web,
    "hub": _hub,
}
PACKAGES = dict.fromkeys(("onnx", "web"), ("onnx", "onnxscript", "onnxruntime"))  # form -> needs
PACKAGES["openvino"] = ("onnx", "onnxscript", "openvino")
# Option -> the forms that use it. With other forms it is refused, since it would have no effect.
MEANT_FOR = {
    "rank": ("lora",),
    "naming": ("lora",),
    "scheduler": ("diffusers", "hub"),
    "weights": ("diffusers", "onnx", "hub"),
    "dtype": ("diffusers", "lora", "single_file", "hub"),
    "base": ("lora", "delta"),
    "lora": ("diffusers", "single_file", "delta", "onnx", "openvino", "web", "hub"),
    "runtime": ("web",),
}
FRESH_NOISE = "SCMScheduler"  # of Sana-Sprint
FLOW_OF_UNETS = "FlowScheduler"  # ours, of students of UNets that predict a flow


@command("export")
def main(cfg: DictConfig) -> None:
    with stage("exporting"):
        wrote = export(cfg)
    print(f"wrote {wrote}")


if __name__ == "__main__":
    main()
