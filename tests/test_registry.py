"""Which class reads which pipeline, and what each family says of itself, by the sources alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra.utils import get_object

from distill.storage import source_code
from distill.teachers import families as registry
from distill.teachers.families import BUILT_IN, Family

OWN = """
import diffusers
from distill.teachers import flux
from distill.teachers.pipeline import PipelineTeacher as Base

class Lumina(Base):
    kind = diffusers.LuminaPipeline
    flow: bool = True
    spare = ("text_encoder", "tokenizer")

class Tuned(flux.Flux):
    usual_unit = 32
    embedding_options = (*flux.Flux.embedding_options, "more")

class Other(flux.Flux):
    kind = diffusers.FluxPipeline
    packing = 1

class NoTeacher:
    kind = diffusers.MarigoldDepthPipeline
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's with teachers in a module below its top, trusted."""
    folder = tmp_path / "tuned" / "inner"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent):
        (place / "__init__.py").write_text("", encoding="utf-8")
    (folder / "teachers.py").write_text(OWN, encoding="utf-8")
    (folder / "broken.py").write_text("x = (", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DISTILL_TRUST", "tuned")
    caches = (source_code.source, registry._declared)
    for cache in caches:
        cache.cache_clear()
    yield "tuned.inner.teachers"
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("kind", "target"), BUILT_IN.items())
def test_the_source_says_of_a_family_what_its_class_says(kind, target):
    made, said = get_object(target), registry.family(target)
    assert made.kind.__name__ == said.kind == said.kind_name() == kind
    assert registry.teacher_class(kind) is made
    for name in set(Family.__annotations__) - {"kind"}:
        assert getattr(made, name) == getattr(said, name), name


def test_a_family_is_known_without_torch():
    code = (
        "import sys; from distill.teachers.families import family_of_kind as f;"
        "print(f('FluxPipeline').packing, f('NoPipeline').packing, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.split() == [b"2", b"1", b"False"]


def test_teachers_of_a_trusted_package_are_found_by_their_pipelines(package, monkeypatch):
    assert registry.reader_of("LuminaPipeline") == f"{package}.Lumina"
    said = registry.family_of_kind("LuminaPipeline")
    assert (said.flow, said.spare) == (True, ("text_encoder", "tokenizer"))
    assert registry.reader_of("MarigoldDepthPipeline") is None  # no class of a teacher's
    assert registry.reader_of("FluxPipeline") == BUILT_IN["FluxPipeline"]  # ours before another
    assert registry.family(f"{package}.Other").packing == 1
    monkeypatch.setenv("DISTILL_TRUST", "")
    assert registry.reader_of("LuminaPipeline") is None


def test_what_a_family_says_must_be_plain(package):
    said = (
        r"teacher._target_=tuned.inner.teachers.Tuned: embedding_options must be a plain value,"
        r" not \(\*flux"
    )
    with pytest.raises(ValueError, match=said):
        registry.family(f"{package}.Tuned")


def test_a_class_that_is_no_teacher_says_nothing():
    assert registry.family("distill.teachers.network.Network") is None
    assert registry.family("distill.teachers.pipeline.PipelineTeacher") is None
    assert registry.family("nowhere.Teacher") is None
