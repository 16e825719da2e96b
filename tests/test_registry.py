"""Which teacher class reads which pipeline, and the facts of each family, read from the sources."""

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

class Editing(Base):
    image = "source"

class LuminaThatEdits(Editing, Lumina):
    kind = diffusers.Lumina2Pipeline

class NoTeacher:
    kind = diffusers.MarigoldDepthPipeline
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A trusted package of the user, with teachers in a submodule."""
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
    for name in [name for name in sys.modules if name.partition(".")[0] == "tuned"]:
        del sys.modules[name]
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("kind", "target"), BUILT_IN.items())
def test_facts_from_the_source_equal_those_of_the_class(kind, target):
    family, facts = get_object(target), registry.family(target)
    assert family.kind.__name__ == facts.kind == facts.kind_name() == kind
    assert registry.teacher_class(kind) is family
    for name in set(Family.__annotations__) - {"kind"}:
        assert getattr(family, name) == getattr(facts, name), name


def test_bases_are_read_in_python_s_order_of_resolution(package):
    """A fact of a part that several families share comes before that of their common base."""
    target = f"{package}.LuminaThatEdits"
    facts, found = registry.family(target), source_code.lineage(target)
    expected = [f"{each.__module__}.{each.__name__}" for each in get_object(target).__mro__]
    assert [each for each in expected if each in found] == found
    assert found[1:3] == [f"{package}.Editing", f"{package}.Lumina"]
    assert (facts.image, facts.flow) == ("source", True)


def test_a_family_is_known_without_torch():
    code = (
        "import sys; from distill.teachers.families import family_of_kind as f;"
        "print(f('FluxPipeline').packing, f('NoPipeline').packing, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.split() == [b"2", b"1", b"False"]


def test_teachers_of_a_trusted_package_are_found_by_their_pipelines(package, monkeypatch):
    assert registry.reader_of("LuminaPipeline") == f"{package}.Lumina"
    facts = registry.family_of_kind("LuminaPipeline")
    assert (facts.flow, facts.spare) == (True, ("text_encoder", "tokenizer"))
    assert registry.reader_of("MarigoldDepthPipeline") is None  # its class is no teacher
    assert (
        registry.reader_of("FluxPipeline") == BUILT_IN["FluxPipeline"]
    )  # built-in families come first
    assert registry.family(f"{package}.Other").packing == 1
    monkeypatch.setenv("DISTILL_TRUST", "")
    assert registry.reader_of("LuminaPipeline") is None


def test_facts_of_a_family_must_be_plain_values(package):
    message = (
        r"teacher._target_=tuned.inner.teachers.Tuned: embedding_options must be a plain value,"
        r" not \(\*flux"
    )
    with pytest.raises(ValueError, match=message):
        registry.family(f"{package}.Tuned")


def test_a_class_that_is_no_teacher_has_no_facts():
    assert registry.family("distill.teachers.network.Network") is None
    assert registry.family("distill.teachers.pipeline.PipelineTeacher") is None
    assert registry.family("nowhere.Teacher") is None
