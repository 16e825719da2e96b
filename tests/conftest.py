"""Tiny random pipelines and latent shards, written once a session."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Images of containers set it, and every process would compile all that it imports: 8 of 17 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch is imported: processes side by side have a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
FAMILIES = ("mmdit", "unet")
LONGEST = (  # files, the longest first: one that is begun last keeps one worker busy, and no other
    *("distributed", "contracts", "strangers", "onnx", "smoke", "kill", "first_mile", "learning"),
    *("launch", "quantize", "stopping", "editors", "store_kinds", "every_key", "speed", "wan"),
    *("experiments", "resume", "processes", "step_memory", "writers", "run", "kills", "trackers"),
    *("making", "quick_answers", "bad_input", "conf", "export", "families", "waiting", "api"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is not searched for garbage again, half a second each time


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> Callable[[str], Path]:
    """Family name -> folder of its random pipeline."""
    from tiny import write_pipeline

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_pipeline(family, tmp_path_factory.mktemp("pipelines") / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def teachers(pipelines) -> Callable[[str], Any]:
    """Family name -> its teacher.

    One object a session: it is frozen, and a test says that it stays so.
    """
    from families import teacher_at

    made: dict[str, Any] = {}

    def teacher(family: str) -> Any:
        if family not in made:
            made[family] = teacher_at(pipelines(family))
        return made[family]

    return teacher


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory) -> Callable[[str], Path]:
    """Family of the table in `families` -> the folder of its random pipeline."""
    import families

    @cache
    def folder(family: str) -> Path:
        return families.write(family, tmp_path_factory.mktemp("families") / family)

    return folder


@pytest.fixture(scope="session")
def family_teachers(family_folders) -> Callable[[str], Any]:
    """Family of the table -> its teacher, which is frozen."""
    import families

    return cache(lambda family: families.teacher_of(family, family_folders(family)))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def teacher(teachers, family) -> Any:
    """Both teachers, one after the other."""
    return teachers(family)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of 24 random latents with captions."""
    from tiny import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def forks():
    """Begins tasks in forks of one process that has imported everything; see `forks.py`."""
    import forks

    if not hasattr(os, "fork"):
        pytest.skip("forks")
    return forks.shared()


@pytest.fixture(autouse=True)
def _lightning_is_quiet():
    """Its hints about loaders and manual optimisation, which `run` silences as well."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*in eval mode.*",
            ".*treespec, LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `python -m distill.<name> key=value ...` in this process, in an empty folder -> (exit
    code, out, err).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"distill.{name}", *map(str, arguments)])
        capsys.readouterr()  # what fixtures have said
        code = 0
        try:
            importlib.import_module(f"distill.{name}").main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def own_store_cache(tmp_path, monkeypatch):
    """Shards of stores are cached in a folder of this test, and stores are listed anew."""
    from distill.data import stores

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stores.listed.cache_clear()
    yield
    stores.listed.cache_clear()
