"""What must not move while the code is rearranged: configurations, help pages, three training
steps, exported files.

    python tests/golden.py write      # the records of tests/goldens, anew
    python tests/golden.py bits FILE  # to the last bit, for two checkouts on one machine

`test_goldens.py` compares the records with what the code gives. Numbers of a training are compared
with a tolerance there, since processors round differently; `bits` has none.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file

HERE = Path(__file__).parent
CONF = HERE.parent / "conf"
RECORDS = HERE / "goldens"
EYES = [
    "discriminator.features.size=64",
    "discriminator.condition.text=null",
    "discriminator.condition.image=null",
]
HEAD_START = ["loop.head_start=1"]
# Method and discriminator -> family of the tiny teacher, and what else the command says.
TRAININGS: dict[tuple[str, str], tuple[str, list[str]]] = {
    ("ladd", "teacher_features"): ("mmdit", HEAD_START),
    ("ladd", "pool"): ("unet", HEAD_START),
    ("add", "dino"): ("unet", [*HEAD_START, *EYES]),
    ("nitrofusion", "pool"): ("unet", [*HEAD_START, "method.warm_start=1"]),
    ("nitrofusion", "teacher_features"): ("mmdit", HEAD_START),
    ("dmd2", "fake_score"): ("unet", [*HEAD_START, "loop.discriminator_updates=2"]),
    ("regression", "none"): ("mmdit", []),
    ("consistency", "none"): ("unet", []),
    ("dpo", "none"): (
        "mmdit",
        ["data=renders", "data.pairs=true", "sampler=guided", "student=lora"],
    ),
}
FEW = [
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.every=1000",
    "optimizer.student.lr=1e-3",
    "data.num_workers=0",
    "data.batch_size=2",
    "~metrics",
]
PACE = re.compile(r"second|time|memory")  # columns of metrics.csv that no two runs share


# -- configurations --------------------------------------------------------------------------------


def experiments() -> list[str]:
    files = (CONF / "experiment").rglob("*.yaml")
    return sorted(
        f.relative_to(CONF / "experiment").as_posix().removesuffix(".yaml") for f in files
    )


def choices() -> Iterator[tuple[str, list[str]]]:
    """The name and the overrides of each configuration that is recorded."""
    for name in experiments():
        yield f"experiment={name}", [f"experiment={name}"]
    for file in sorted((CONF / "method").glob("*.yaml")):
        for teacher in ("shapes", "sd3"):
            words = [f"method={file.stem}", f"teacher={teacher}"]
            yield " ".join(words), words


def configuration(overrides: list[str]) -> dict[str, Any]:
    """As the run would have it, interpolations resolved; what must be given stays `???`."""
    import distill.config.compose  # noqa: F401, its resolvers

    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config.yaml", overrides=overrides), resolve=True)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; empty nodes and lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.rstrip("."): tree}
    return {k: v for key, inner in tree.items() for k, v in flat(inner, f"{prefix}{key}.").items()}


def configurations() -> dict[str, dict[str, Any]]:
    """Of the first one every key; of the others those in which they differ from it, `None` for a
    key they lack.
    """
    base = flat(configuration([]))
    found = {"": base}
    for name, overrides in choices():
        this = flat(configuration(overrides))
        changed = {k: v for k, v in this.items() if k not in base or base[k] != v}
        found[name] = changed | {f"~{k}": None for k in base if k not in this}
    return found


# -- help ------------------------------------------------------------------------------------------


def page(command: str) -> str:
    """What `python -m distill.<command> --help` prints."""
    before, sys.argv = sys.argv, [f"distill.{command}", "--help"]
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            importlib.import_module(f"distill.{command}").main()
    except SystemExit:
        pass
    finally:
        sys.argv = before
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    return said.getvalue()


def pages() -> dict[str, str]:
    from distill import cli

    return {name: page(name) for name in sorted(cli.COMMANDS) if name not in cli.NO_CONFIG}


# -- training --------------------------------------------------------------------------------------


def called(command: str, *words: str) -> None:
    """Run a command in this process. Raises RuntimeError where it ends badly."""
    before, sys.argv = sys.argv, [f"distill.{command}", *words]
    try:
        with redirect_stdout(io.StringIO()):
            importlib.import_module(f"distill.{command}").main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{command} {' '.join(words)}: exit code {stop.code}") from None
    finally:
        sys.argv = before


def training(method: str, discriminator: str, folder: Path) -> dict[str, Any]:
    """Three steps: the logged values of each, and of the student's weights the norm, the sum and a
    hash.
    """
    import tiny

    family, words = TRAININGS[method, discriminator]
    teacher = tiny.write_pipeline(family, folder / "teacher")
    eyes = [f"discriminator.features.path={tiny.vit()}"] if discriminator == "dino" else []
    torch.manual_seed(0)
    called(
        "run",
        f"method={method}",
        f"discriminator={discriminator}",
        "teacher=shapes" if family == "mmdit" else "teacher=shapes_unet",
        f"teacher.path={teacher}",
        *FEW,
        *words,
        *eyes,
        f"run_dir={folder / 'run'}",
    )
    with (folder / "run" / "metrics.csv").open(encoding="utf-8") as file:
        rows = [
            {k: float(v) for k, v in row.items() if v and not PACE.search(k)}
            for row in csv.DictReader(file)
        ]
    return {"rows": rows, "weights": weights(folder / "run" / "student")}


def weights(pipeline: Path) -> dict[str, Any]:
    (file,) = [
        f for part in ("transformer", "unet") for f in (pipeline / part).glob("*.safetensors")
    ]
    tensors = load_file(file)
    joined = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
    return {
        "norm": joined.norm().item(),
        "sum": joined.sum().item(),
        "sha256": hashlib.sha256(joined.numpy().tobytes()).hexdigest(),
    }


def trainings() -> dict[str, Any]:
    found = {}
    for method, discriminator in TRAININGS:
        with tempfile.TemporaryDirectory() as folder:
            found[f"{method} {discriminator}"] = training(method, discriminator, Path(folder))
    return found


# -- exports ---------------------------------------------------------------------------------------

# Of the shipped student's bytes, which are alike on every machine.
EXPORTS = {
    "diffusers": ["to=diffusers"],
    "diffusers in float16, euler": ["to=diffusers", "dtype=float16", "scheduler=euler"],
}


def exports() -> dict[str, Any]:
    """Of the shipped student: each file's name and hash."""
    found = {}
    for name, words in EXPORTS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            called("export", "run=shapes:student", *words, f"out={out}")
            # a card names places and versions
            files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "README.md")
            found[name] = {
                p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
                for p in files
            }
    return found


# -- records ---------------------------------------------------------------------------------------

KINDS = {
    "configurations": configurations,
    "pages": pages,
    "trainings": trainings,
    "exports": exports,
}


def record(kind: str) -> Any:
    return json.loads((RECORDS / f"{kind}.json").read_text(encoding="utf-8"))


def write(values: Any, file: Path) -> None:
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "bits":
        write({kind: make() for kind, make in KINDS.items()}, Path(arguments[0]))
        return
    for kind in arguments or KINDS:
        write(KINDS[kind](), RECORDS / f"{kind}.json")


if __name__ == "__main__":
    main()
