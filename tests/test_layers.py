"""House rules that a machine can check: imports point down, heavy libraries stay in their places,
files stay small.

The tables come first. A new module gets a row in `LAYERS`; nothing else needs to change.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "distill"

# Layer -> its rooms: a folder below src/distill, or a module of one that stands higher or lower
# than its room.
LAYERS = {
    "ground": {
        "core", "machine", "storage", "terminal", "evaluation.categories", "evaluation.judged",
        "evaluation.results", "evaluation.statistics", "evaluation.tables",
        "training.run_metadata",
    },
    "parts": {
        "teachers", "discriminators", "data", "worlds", "evaluation.references",
        "evaluation.networks", "evaluation.rewards",
        "evaluation.features", "evaluation.scores", "training.loop_settings",
    },
    "models": {"students", "sampling"},
    "base": {"methods.base"},
    "methods": {"methods"},
    "training": {"training", "training.optimizers", "evaluation", "exporting", "report"},
    "config": {
        "config", "training.resuming", "training.run_folders",
    },
    "building": {
        "config.build", "config.counting", "config.fitting", "config.models", "config.step_memory",
        "training.loggers",
    },
    "commands": {
        "__main__", "cache", "check", "cli", "commandline", "compare", "completion",
        "config.errors", "data.begun_job",
        "data.shard_job", "demo", "demonstration", "doctor", "evaluate", "export", "inspect",
        "pretrain", "recipes",
        "run", "sample", "search", "synthesize", "training.launch", "training.rank_process",
        "worlds.shapes.pretraining",
    },
    "python": {"api"},
}  # fmt: skip

# Layer -> the layers it may import. A folder may always import itself, except that methods do not
# know each other.
MAY_IMPORT = {
    "ground": {"ground"},
    "parts": {"ground"},
    "models": {"ground", "parts"},
    "base": {"ground"},
    "methods": {"ground", "base"},
    "training": {"ground", "parts", "models", "base"},
    "config": {"ground", "parts", "config"},
    "building": {"ground", "parts", "models", "base", "methods", "training", "config", "building"},
    "commands": set(LAYERS) - {"python"},
    "python": set(LAYERS),
}

# Library -> the layers and modules in which it may be imported, at the top of a file or inside a
# function.
HEAVY = {
    "diffusers": {
        "teachers", "discriminators", "evaluation", "students", "sampling", "exporting", "worlds",
    },
    "transformers": {
        "teachers", "discriminators", "evaluation", "worlds", "training.optimizers", "exporting",
    },
    "torchao": {"training.optimizers", "exporting"},
    **dict.fromkeys(("bitsandbytes", "prodigyopt", "schedulefree"), {"training.optimizers"}),
    "open_clip": {"teachers", "discriminators", "evaluation", "worlds"},
    "webdataset": {"data", "worlds"},
    "torchmetrics": {"evaluation"},
    "torch_fidelity": {"evaluation"},
    "scipy": {"evaluation"},
    "peft": {"students"},
    "onnx": {"exporting"},
    "onnxruntime": {"exporting"},
    "openvino": {"exporting"},
    "gradio": {"demonstration"},
    "lightning": {"methods.base", "training", "building", "worlds", "python"},
    "pytorch_lightning": set(),  # the same library under its old name: two copies of every class
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "markupsafe": {"demonstration", "report"},
    "hydra": {"config", "building", "commands", "python"},
    "omegaconf": {"config", "building", "commands", "python"},
    "experiments": set(),
    "tests": set(),
}  # fmt: skip

# Lines of a file, of a method's file and of a function, docstring included. Totals are not limited:
# a limit on them makes people pack code.
FILE, METHOD_FILE, FUNCTION = 400, 180, 60


def module_of(path: Path, package: Path) -> str:
    """The name of a file below the package: `teachers.sd3`; the package's own __init__ is the empty
    name.
    """
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(module: str) -> str:
    """The longest part of a module's name that the tables have; its first part, where they have
    none.
    """
    parts = module.split(".")
    known = set().union(*LAYERS.values())
    found = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in found if name in known), parts[0])


def layer_of(module: str) -> str | None:
    return next((layer for layer, members in LAYERS.items() if place_of(module) in members), None)


def imports_of(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Each (line, full dotted name) that a file imports, wherever in the file it does so."""
    module = module_of(path, package)
    here = ["distill", *module.split(".")] if module else ["distill"]
    parents = here if path.stem == "__init__" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names)


def wrong_imports(package: Path) -> list[str]:
    """Every import that the tables forbid, one sentence each."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        module = module_of(path, package)
        if module and layer_of(module) is None:
            wrong.append(f"{module}: unknown module; add it to LAYERS in tests/test_layers.py")
            continue
        homes = {place_of(module), module.partition(".")[0], layer_of(module)}
        for line, name in imports_of(path, package):
            library, _, target = name.partition(".")
            if library == "distill":
                reason = wrong_target(module, target)
            elif library in HEAVY and not HEAVY[library] & homes:
                reason = (
                    f"{library} belongs to {sorted(HEAVY[library]) or 'no file of the package'}"
                )
            else:
                reason = None
            if reason:
                wrong.append(f"{path.relative_to(package)}:{line} imports {name}: {reason}")
    return wrong


def wrong_target(module: str, target: str) -> str | None:
    """Why `module` may not import `target` (both without `distill.`), if it may not."""
    if not module:
        return "the package's own __init__ imports nothing of the package"
    mine, theirs = layer_of(module), layer_of(target)
    if theirs is None:
        return "not a module in LAYERS; add it there, or import from the module that defines it"
    if theirs in MAY_IMPORT[mine]:
        return None
    if mine == theirs != "methods" and module.partition(".")[0] == target.partition(".")[0]:
        return None
    return f"{mine} may import {sorted(MAY_IMPORT[mine])}, not {theirs}"


def too_long(package: Path) -> list[str]:
    """Every file and function that is longer than one reads at a time."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        name, text = path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        is_method = name.startswith("methods/") and path.stem not in ("base", "__init__")
        limit = METHOD_FILE if is_method else FILE
        if lines > limit:
            wrong.append(f"{name} has {lines} lines, {limit} are its limit")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION:
                    wrong.append(f"{name}:{node.name} has {length} lines, {FUNCTION} are its limit")
    return wrong


def test_imports_point_down_and_heavy_libraries_stay_in_their_places():
    assert list(PACKAGE.rglob("*.py")), f"no source in {PACKAGE}"
    assert not (wrong := wrong_imports(PACKAGE)), "\n" + "\n".join(wrong)


def test_files_and_functions_are_short():
    assert not (wrong := too_long(PACKAGE)), "\n" + "\n".join(wrong)


def write(package: Path, name: str, text: str) -> None:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("core/losses.py", "from distill.teachers.sd3 import SD3", "ground may import"),
        ("core/losses.py", "def f():\n    from distill.config import build", "ground may import"),
        ("teachers/sd3.py", "from ..data import images", "parts may import"),
        ("teachers/sd3.py", "import distill.worlds.shapes.world", "parts may import"),
        ("students.py", "import distill.sampling", "models may import"),
        ("methods/add.py", "from distill.methods.ladd import LADD", "methods may import"),
        ("methods/add.py", "from . import ladd", "methods may import"),
        ("methods/add.py", "from distill.teachers import taps", "methods may import"),
        ("methods/base.py", "from distill.methods import add", "base may import"),
        ("training/callbacks.py", "from distill.methods.add import ADD", "training may import"),
        ("training/callbacks.py", "from distill.config.build import make", "training may import"),
        (
            "config/build.py",
            "import importlib\nimportlib.import_module('distill.run')",
            "building may import",
        ),
        ("config/compose.py", "from distill.config import build", "config may import"),
        ("data/datasets.py", "from distill.data import shard_job", "parts may import"),
        ("__init__.py", "from distill.core.losses import hinge", "imports nothing"),
        ("run.py", "from distill import __version__", "not a module in LAYERS"),
        ("gadgets.py", "", "unknown module"),
        ("data/images.py", "def f():\n    import diffusers", "diffusers belongs to"),
        ("methods/add.py", "import lightning.pytorch as pl", "lightning belongs to"),
        ("methods/base.py", "import pytorch_lightning", "no file of the package"),
        ("training/callbacks.py", "from matplotlib import pyplot", "matplotlib belongs to"),
        ("core/process.py", "from omegaconf import DictConfig", "omegaconf belongs to"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path, name, text, expected):
    write(tmp_path, name, text)
    wrong = wrong_imports(tmp_path)
    assert len(wrong) == 1
    assert expected in wrong[0]


def test_allowed_imports_pass(tmp_path):
    write(tmp_path, "__init__.py", "")
    write(tmp_path, "core/losses.py", "from distill.core.types import Cond\nimport torch")
    write(
        tmp_path,
        "teachers/sd3.py",
        "from . import taps\nfrom ..core.process import Process\nimport diffusers",
    )
    write(tmp_path, "methods/base.py", "import lightning\nfrom distill.core import ema")
    write(
        tmp_path,
        "methods/add.py",
        "from .base import Distillation\nfrom distill.core.losses import hinge",
    )
    write(
        tmp_path,
        "report.py",
        "from matplotlib import pyplot\nfrom distill.methods.base import Distillation",
    )
    write(tmp_path, "run.py", "import hydra\nfrom distill.config import build, location")
    assert wrong_imports(tmp_path) == []


def test_long_files_and_functions_are_caught(tmp_path):
    write(tmp_path, "losses.py", "x = 1\n" * (FILE + 1))
    write(tmp_path, "methods/add.py", "x = 1\n" * (METHOD_FILE + 1))
    write(tmp_path, "methods/base.py", "def f():\n" + "    x = 1\n" * FUNCTION)
    wrong = too_long(tmp_path)
    assert [line.split()[0] for line in wrong] == [
        "losses.py", "methods/add.py", "methods/base.py:f",
    ]  # fmt: skip
