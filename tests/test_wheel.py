"""The package as others get it: a wheel is complete, and asking a command for help loads nothing
heavy.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from distill.cli import COMMANDS, NO_CONFIG

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "src" / "distill" / "worlds" / "shapes" / "models"

# Runs a module as `python -m` does, and then fails if it has loaded one of these.
DRIVER = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "lightning", "diffusers", "transformers", "torchmetrics", "matplotlib"}
loaded = heavy & set(sys.modules)
assert not loaded, f"{module} {sys.argv[1:]} loads {sorted(loaded)}"
"""


MODULES = {"hydra-core": "hydra", "open_clip_torch": "open_clip", "pillow": "PIL", "PyYAML": "yaml"}


def test_what_is_imported_is_declared():
    """A package that comes by chance, with another one, may not come tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = [re.match(r"[\w.-]+", each)[0] for each in asked]
    declared = {MODULES.get(name, name.replace("-", "_")) for name in names}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            tops = {each.partition(".")[0] for each in found} - {"distill", ""}
            assert not tops - sys.stdlib_module_names - declared, path


def python(*args: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints; its complaint is the failure's text."""
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"python {' '.join(args)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("command", "question"),
    [(name, ["--help"]) for name in COMMANDS]
    + [(name, ["--cfg", "job"]) for name in COMMANDS if name not in NO_CONFIG],
    ids=str,
)
def test_a_question_to_a_command_loads_nothing_heavy(command, question, tmp_path):
    assert python("-c", DRIVER, f"distill.{command}", *question, cwd=tmp_path)
    assert not list(tmp_path.iterdir()), "asking leaves files behind"


def test_the_console_script_lists_its_commands(tmp_path):
    code = "import sys; from distill.cli import main; status = main(); "
    code += "assert 'torch' not in sys.modules; sys.exit(status)"
    printed = python("-c", code, "--help", cwd=tmp_path)
    assert all(name in printed for name in COMMANDS)


def test_the_console_script_is_the_module(tmp_path):
    code = "import sys; from distill.cli import main; sys.exit(main())"
    question = ("--cfg", "job", "seed=7")
    assert python("-c", code, "run", *question, cwd=tmp_path) == python(
        "-m", "distill.run", *question, cwd=tmp_path
    )


def test_an_unknown_command_names_the_nearest(monkeypatch, capsys):
    from distill.cli import main

    monkeypatch.setattr(sys, "argv", ["distill", "rnu"])
    assert main() == 1
    assert "did you mean 'run'?" in capsys.readouterr().err


def test_the_console_script_knows_every_command():
    guarded = {
        p.stem
        for p in (ROOT / "src" / "distill").glob("*.py")
        if "\nif __name__ ==" in p.read_text(encoding="utf-8")
    }
    assert set(COMMANDS) == guarded, "distill.cli.COMMANDS and the modules that can be run differ"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_configuration_models_templates_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {
        "distill/conf/" + path.relative_to(ROOT / "conf").as_posix()
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    models = {
        path.relative_to(ROOT / "src").as_posix() for path in MODELS.rglob("*") if path.is_file()
    }
    assert conf
    pages = {f"distill/report/templates/{name}.html" for name in ("page", "parts")}
    assert any(name.endswith(".safetensors") for name in models), f"no model in {MODELS}"
    assert not (missing := (conf | models | pages) - names), sorted(missing)
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configuration(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    python(
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
        cwd=elsewhere,
    )
    where = python("-c", "import distill; print(distill.__path__[0])", cwd=elsewhere, path=site)
    assert Path(where.strip()).samefile(site / "distill"), "another copy of the package answered"
    printed = python("-m", "distill.run", "--cfg", "job", cwd=elsewhere, path=site)
    assert any(line.startswith("method") for line in printed.splitlines()), printed
