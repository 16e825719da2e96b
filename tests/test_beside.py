"""A pipeline folder that leaves to another, beside it, the parts that both share."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import tiny
from distill import students
from distill.config.models import student_of
from distill.sampling import Consistency, distilled
from distill.teachers.loading.locate import lineage
from distill.worlds.shapes.pretraining.assemble import save_beside


@pytest.fixture
def beside(family, teachers, pipelines, tmp_path):
    """The student, and its folder beside that of its teacher."""
    teacher, base = teachers(family), tmp_path / "models" / "teacher"
    shutil.copytree(pipelines(family), base)
    student = tiny.shake(students.full(teacher), 3, std=0.03)
    scheduler = Consistency().scheduler(student, teacher)
    whole = students.save_pipeline(student, teacher, tmp_path / "student", scheduler)
    return student, save_beside(whole, base, "student")


def test_it_holds_its_own_parts_and_opens_with_all(beside, family):
    student, folder = beside
    part = "transformer" if family == "mmdit" else "unet"
    assert {path.name for path in folder.iterdir()} == {"model_index.json", part, "scheduler"}
    model = student_of(str(folder))
    assert distilled(model.pipeline)
    for name, x in student.model.state_dict().items():
        torch.testing.assert_close(model.network.model.state_dict()[name], x, rtol=1e-3, atol=1e-5)
    assert model.embed(["a red star"]).tokens.isfinite().all()
    assert model.decode(torch.zeros(1, *model.latent_shape)).shape[1] == 3


def test_a_student_of_it_is_complete(beside, tmp_path):
    _, folder = beside
    teacher = student_of(str(folder))
    saved = students.save_pipeline(
        teacher.network, teacher, tmp_path / "out", teacher.pipeline.scheduler
    )
    assert lineage(saved) == [saved]
    teacher = student_of(str(saved))
    assert teacher.embed([""]).tokens.isfinite().all()


@pytest.mark.parametrize("name", ["../models/teacher", "student", "nothing", "..", ""])
def test_a_base_is_another_folder_beside_it(beside, name):
    _, folder = beside
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | {"_base": name}), encoding="utf-8")
    with pytest.raises(ValueError, match="must be the name of another folder beside it"):
        student_of(str(folder))


def test_parts_that_differ_are_not_left_out(beside, tmp_path):
    _, folder = beside
    file = folder.parent / "teacher" / "vae" / "config.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vae/config.json differs from that of"):
        save_beside(tmp_path / "student", folder.parent / "teacher", "again")
