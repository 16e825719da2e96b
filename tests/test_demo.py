"""What the demo draws, says and refuses, without its page: that is `test_demo_page.py`."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import tiny
from distill import students
from distill.config import models
from distill.demonstration import html
from distill.demonstration.generation import Answer, Models, Request, read, timed
from distill.sampling import Consistency, seeded, to_bytes
from distill.sampling.guided import guided
from distill.worlds.shapes.grammar import parse
from distill.worlds.shapes.judge import Judge
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import draw_scene


@pytest.fixture(scope="module")
def run(teachers, pipelines, tmp_path_factory):
    """A run folder of a tiny student: its configuration names the teacher."""
    folder, teacher = tmp_path_factory.mktemp("demo") / "run", teachers("mmdit")
    student = tiny.shake(students.full(teacher), 21, std=0.03)
    scheduler = Consistency().scheduler(student, teacher)
    folder.mkdir()
    students.save_pipeline(student, teacher, folder / "student", scheduler)
    (folder / "config.yaml").write_text(
        f"teacher: {{_target_: distill.teachers.sd3.SD3, path: {pipelines('mmdit')}}}\n"
        "sampler: {_target_: distill.sampling.Consistency}\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def studio(run):
    return Models.load(str(run), None, size=None, dtype="float32")


def drawn(studio, who, request, steps):
    """The drawing, and how often its job gave way."""
    job, times = studio.job(who, request, steps), 0
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value, times
        times += 1


def test_a_student_draws_what_distill_sample_does(studio, run):
    request = Request(tiny.CAPTIONS[0], seed=3, count=2)
    found, gave_way = drawn(studio, "student", request, 2)
    model = models.student_of(str(run))
    how = {"shape": model.latent_shape, "steps": 2}
    with torch.no_grad():
        x0 = Consistency()(model, model.embed([tiny.CAPTIONS[0]] * 2), seeded([3, 4]), **how)
        assert torch.equal(found.pictures, to_bytes(model.decode(x0)))
    assert gave_way == 3  # two steps and the decoding
    assert found.seconds > 0


def test_a_teacher_is_guided_and_gives_way_at_each_step(studio):
    found, gave_way = drawn(studio, "teacher", Request(tiny.CAPTIONS[0], guidance=3.0), 5)
    model = studio.teacher
    how = {"shape": model.latent_shape, "steps": 5, "guidance": 3.0}
    with torch.no_grad():
        x0 = guided(model, model.embed([tiny.CAPTIONS[0]]), seeded([0]), **how)
        assert torch.equal(found.pictures, to_bytes(model.decode(x0)))
    assert gave_way == 6


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_picture_to_begin_from_matters_the_more_the_less_it_is_noised(studio, who):
    image = Image.new("RGBA", (90, 70), (250, 20, 20, 255))
    from_noise, _ = drawn(studio, who, Request("x"), 4)
    near, _ = drawn(studio, who, Request("x", image=image, strength=0.25), 4)
    far, _ = drawn(studio, who, Request("x", image=image, strength=1.0), 4)
    assert torch.equal(far.pictures, from_noise.pictures)
    assert not torch.equal(near.pictures, from_noise.pictures)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_strength_that_leaves_no_step_is_said(studio, who):
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match=r"strength 0.5 of 1 step leaves no step.* at least 1"):
        drawn(studio, who, Request("x", image=image, strength=0.5), 1)
    # Of the four SD3's pipeline makes one, that from t = 1/4.
    little, quarter = (
        drawn(studio, who, Request("x", image=image, strength=s), 4)[0] for s in (0.2, 0.25)
    )
    assert torch.equal(little.pictures, quarter.pictures)


def test_a_text_that_is_too_long_is_still_drawn_and_its_end_named(studio):
    found, _ = drawn(studio, "student", Request("a red star " * 60 + "zebra"), 1)
    assert found.unread.endswith("zebra")
    assert drawn(studio, "student", Request("a red star"), 1)[0].unread is None


def test_the_sampler_says_how_many_steps_there_are(studio):
    assert studio.student_steps(8) == list(range(1, 9))
    sampler = Consistency(levels=[1.0, 0.5])
    assert Models(studio.student, None, sampler).student_steps(8) == [1, 2]


def test_pauses_between_steps_do_not_count(monkeypatch):
    clock = iter([0.0, 1.0, 100.0, 102.0, 500.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    steps = timed(iter(["x", "y"]))
    next(steps)
    next(steps)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == ("y", 3.0)


def test_a_folder_without_a_run_has_no_teacher_unless_one_is_given(run, pipelines):
    folder = str(run / "student")
    assert Models.load(folder, None, size=None, dtype="float32").teacher is None
    given = Models.load(folder, str(pipelines("mmdit")), size=None, dtype="float32")
    assert given.teacher is not None
    with pytest.raises(ValueError, match="was not distilled to few steps; give a student"):
        Models.load(str(pipelines("mmdit")), None, size=None, dtype="float32")


def test_a_shipped_student_is_shown_beside_the_teacher_that_has_its_parts(run, pipelines, tmp_path):
    from distill.worlds.shapes.pretraining.assemble import save_beside

    shutil.copytree(pipelines("mmdit"), tmp_path / "teacher")
    folder = save_beside(run / "student", tmp_path / "teacher", "student")
    studio = Models.load(str(folder), None, size=None, dtype="float32")
    assert str(studio.teacher.folder) == str(tmp_path / "teacher")


def test_the_reader_is_asked_what_the_caption_says():
    caption = "a large red star to the left of a small blue circle on black"
    prompt = parse(caption)
    scenes = [draw_scene(np.random.default_rng(i), prompt) for i in range(4)]
    pictures = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2)
    words = read(Judge.load(), pictures, prompt)
    assert [word.said for word in words] == [
        "large", "red", "star", "small", "blue", "circle", "horizontal", "black", "2",
    ]  # fmt: skip
    assert all(word.right == 4 for word in words)
    other = parse("a large green star to the left of a small blue circle on black")
    wrong = [word for word in read(Judge.load(), pictures, other) if word.right < 4]
    assert wrong == [Answer("colour0", "green", ("red",) * 4)]


def test_a_verdict_is_shown_by_word():
    words = [
        Answer("colour0", "red", ("red",)),
        Answer("kind0", "star", ("cross",)),
        Answer("axis", "vertical", ("vertical", "horizontal")),
        Answer("count", "2", ("2",)),
    ]
    shown = html.answer_list(words)
    assert '<li class="right" title="colour of object 1">red ✓</li>' in shown
    assert '<li class="wrong" title="kind of object 1">star ✗ cross</li>' in shown
    assert '<li class="wrong" title="axis">one above the other 1/2</li>' in shown
    assert "2 objects ✓" in shown
    assert "not read" in html.answer_list(None)


def test_what_was_typed_cannot_become_markup(studio):
    request = Request('"><script>alert(1)</script>')
    found, _ = drawn(studio, "student", request, 1)
    shown = html.column("student", 1, found, request, reads=True)
    shown += html.refused("student", 1, "<b>") + html.status("<i>", 1, 0) + html.heading("<u>", "")
    assert not [mark for mark in ("<script", "<b>", "<i>", "<u>") if mark in shown]
    assert "not read" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["steps=[]"], "steps=[]: must be numbers of steps"),
        (["steps=[1,x]"], "must be numbers of steps"),
        (["steps=0"], "steps=0: must be numbers of steps"),
        (["strength=0"], "strength=0: must be above 0 and at most 1"),
        (["guidance=0.5"], "guidance=0.5: must be from 1 to 1000"),
        (["count=0"], "count=0: must be a whole number, 1 or more"),
        (["open=maybe"], "open=maybe: must be true or false"),
        (["port=-1"], "port=-1: must be a whole number, 0 or more"),
        (["port=70000"], "port=70000: is in use or not allowed"),
        (["run=nowhere"], "run=nowhere: neither a finished run"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, said, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # gradio, here or not
    code, _, err = command("demo", *options)
    assert code == 1
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_port_that_is_taken_is_named(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = command("demo", f"port={port}")
    assert code == 1
    assert f"port={port}: is in use" in err
    assert not out


def test_without_gradio_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = command("demo")
    assert (code, out) == (1, "")
    assert err == (
        "distill: the page needs gradio, which is not installed; use `make demo`, "
        "or pip install gradio\n"
    )


def test_a_change_of_the_page_updates_every_column(studio):
    """Without a browser: the generator that gradio calls marks columns old, then fills them."""
    pytest.importorskip("gradio")
    from distill.commandline.composed import Composed
    from distill.demonstration.page import Page
    from distill.demonstration.worker import Worker

    cfg = OmegaConf.create({**Composed("demo").tree, "steps": [1, 2], "teacher_steps": 2})
    worker = Worker()
    page = Page(studio, worker, cfg)
    settings = ([1, 2], 3, 1, None, 0.5, 2, 1.0, 1.0, SimpleNamespace(session_hash="tab"))

    async def updates(prompt):
        return [update async for update in page.generate(prompt, *settings)]

    try:
        first, *later = asyncio.run(updates(tiny.CAPTIONS[0]))
        nothing = asyncio.run(updates(""))
    finally:
        worker.close()
    wanted = [("student", 1), ("student", 2), ("teacher", 0)]
    places = list(page.columns)
    assert all("old" in first[places.index(key)].elem_classes for key in wanted)
    assert len(later) == 3
    for key in wanted:
        assert "<img" in later[-1][places.index(key)].value
    assert "data-requests" in later[-1][-1]
    assert len(nothing) == 1


def test_a_picture_is_embedded_whole():
    """Values on a page are cut at some length; a picture's data must not be."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    shown = html.picture(pixels, "noise")
    data = re.search(r"base64,([^\"]+)\"", shown)[1]
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), pixels)
