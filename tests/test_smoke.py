"""`debug=smoke` runs two steps of anything: every family of teachers under every method, without a
word about data.
"""

from __future__ import annotations

import json
from itertools import cycle, product

import pytest
from omegaconf import OmegaConf
from PIL import Image

import families
import tiny
from families import FAMILIES

# Option of the group `teacher` -> the family that plays it.
PLAYED_BY = {name: family for family, row in FAMILIES.items() for name in row.named}
EYES = [
    f"discriminator.{key}"
    for key in ("features.size=64", "condition.text=null", "condition.image=null")
]
METHODS = {
    "add": EYES,
    "nitrofusion": [],
    "ladd": [],
    "consistency": [],
    "regression": [],
    "dmd2": [],
    "dpo": ["sampler=guided"],
}
# DPO's pictures take the teacher's many steps: on one teacher of each prediction, among the slow.
OF_DPO = ("sd15", "sd21_v", "sd3", "flux")
# Each family and each other method once. With LADD each class of networks is slow, of the rest one
# pair in five; the others are nightly.
QUICKER = [method for method in METHODS if method != "dpo"]
FIRST = [row.named[0] for row in FAMILIES.values() if not row.slow]
QUICK = set(zip(FIRST, cycle(QUICKER), strict=False))
# Other options of the newer families: they differ from the first by their hub id alone.
VARIANTS = {name for row in FAMILIES.values() if row.slow for name in row.named[1:]}
VARIANTS |= {"flux2", "flux_schnell"}  # of a network that another option has
PAIRS = [
    pair
    for pair in product(PLAYED_BY, METHODS)
    if (pair[1] != "dpo" or pair[0] in OF_DPO) and (pair[1] == "ladd" or pair[0] not in VARIANTS)
]


OF_LADD = [(name, "ladd") for name, f in PLAYED_BY.items() if f not in families.VARIANTS]
ALL = tiny.tiered(PAIRS, quick=QUICK, slow=[*OF_LADD, *PAIRS[::5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Option of the group `teacher` -> the folder of its pipeline."""
    made = {}

    def of(teacher):
        family = PLAYED_BY[teacher]
        if family not in made:
            made[family] = families.write(family, tmp_path_factory.mktemp("smoke") / family)
        return made[family]

    return of


def asked(teacher, method, path):
    eyes = [f"discriminator.features.path={tiny.vit()}"] if method == "add" else []
    known = [f"teacher={teacher}", f"teacher.path={path}", f"method={method}"]
    return [*known, *FAMILIES[PLAYED_BY[teacher]].words, *METHODS[method], *eyes]


@pytest.mark.parametrize(("teacher", "method"), ALL)
def test_two_steps_of_any_teacher_by_any_method(teacher, method, folder, command, tmp_path):
    run = tmp_path / "run"
    words = asked(teacher, method, folder(teacher))
    code, out, err = command("run", "debug=smoke", *words, f"run_dir={run}")
    assert code == 0, err
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    data = OmegaConf.load(run / "config.yaml").data
    assert (data._target_, data.batch_size) == ("distill.data.source.drawn", 4)
    for step in range(3):
        assert Image.open(run / "samples" / f"step_{step:06d}.png").width == 8 * 66 + 2
    captions = (run / "samples" / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(captions)) == 16
    many = ["guidance=4", "steps=2"] if method == "dpo" else []
    code, out, _ = command("sample", f"run={run}", "prompt=a red square", "out=drawn", *many)
    assert code == 0
    assert [line.endswith(".png") for line in out.splitlines()][-1:] == [True]
    assert out.count(".png") == 1


def test_renders_have_the_teachers_own_size_or_the_one_that_is_given(folder):
    from distill.data.source import drawn
    from distill.teachers.sd import SD
    from distill.worlds.shapes.scenes import Scenes

    teacher = SD(str(folder("sd15")))
    for size, side in ((None, 64), (32, 32), (128, 128)):
        data = drawn(Scenes(5), size=size, seeded=True, batch_size=2).dataset
        data.fit(teacher)
        item, again = data[3], data[3]
        assert item["pixels"].shape == (3, side, side)
        assert item["noise"].shape == teacher.encode(item["pixels"][None])[0].shape
        assert item["caption"] == tiny.sample(0, 3)[0].caption
        assert all(bool((item[key] == again[key]).all()) for key in ("pixels", "noise"))
        assert item["pixels"].min() >= -1
        assert item["pixels"].max() <= 1
        assert item["pixels"].std() > 0.1
    odd = drawn(Scenes(5), size=62, batch_size=2).dataset
    with pytest.raises(ValueError, match=r"data.size=62: must be a side.* in multiples of 4"):
        odd.fit(teacher)
