"""Judging by prompts: runs, pipelines and folders of pictures, end to end on tiny networks; killed,
and gone on.
"""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

import eyes
import tiny
from distill.evaluation import prompted
from distill.evaluation.results import captions_digest, comparable, outcomes_of, results_in
from distill.evaluation.shapes import Shapes
from distill.evaluation.tables import MEASURES, rows_of
from distill.report.evaluation import headline, table
from distill.students import save_pipeline
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3

ALL = (
    "metrics.measures=[fid,kid,fd_dinov2,manifolds,cmmd,clip_score,clip_score_b32,pick_score,hps,"
    "variety]"
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return eyes.write_all(tmp_path_factory.mktemp("eyes"))


@pytest.fixture(scope="module")
def student(pipelines, tmp_path_factory):
    """A few-step pipeline folder, as another maker's."""
    from distill.sampling import Consistency

    folder, teacher = tmp_path_factory.mktemp("student") / "fast", SD3(str(pipelines("mmdit")))
    network = tiny.shake(teacher.network.trainable_copy(), 8, std=0.02)
    return save_pipeline(network, teacher, folder, Consistency().scheduler(network, teacher))


@pytest.fixture
def judged(command, places, monkeypatch, tmp_path):
    """Evaluate by coco5k made small; in another folder each -> what it wrote."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(run, *more, metrics="coco5k", out="out"):
        words = [
            f"run={run}",
            f"metrics={metrics}",
            f"metrics.path={places['coco']}",
            "metrics.prompts=8",
            f"out={out}",
        ]
        code, said, err = command("evaluate", *words, *eyes.small(places), *more)
        assert code == 0, err
        assert "evaluation.json" in said
        return json.loads((tmp_path / out / "evaluation.json").read_text(encoding="utf-8"))

    return call


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in every process: a sum in another order may show in a picture of 8 bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain(evaluation):
    """Without times."""
    return {
        **evaluation,
        "rows": [
            {k: v for k, v in r.items() if k != "seconds_per_image"} for r in evaluation["rows"]
        ],
    }


def test_a_pipeline_is_judged_by_every_measure(judged, student, tmp_path):
    found = judged(student, ALL, "steps=1,2")
    assert [(row["who"], row["steps"]) for row in found["rows"]] == [("student", 1), ("student", 2)]
    measures = [
        "fid",
        "kid",
        "fd_dinov2",
        "precision",
        "recall",
        "density",
        "coverage",
        "cmmd",
        "pick_score",
        "hps",
    ]
    measures += ["clip_score", "clip_score_b32", "variety", "seconds_per_image"]
    for row in found["rows"]:
        assert set(measures) | {"kid_std", "who", "steps", "outcomes"} == set(row)
        assert all(np.isfinite(row[name]) for name in measures)
        assert row["fid"] > 0
        assert row["variety"] > 0
        outcomes = outcomes_of(row)  # of every prompt, for the measures that are means over them
        assert set(outcomes) == {
            "fid", "fd_dinov2", "clip_score", "clip_score_b32", "pick_score", "hps",
        }  # fmt: skip
        for name, numbers in outcomes.items():
            assert len(numbers) == 8
            assert np.mean(numbers) == pytest.approx(row[name], rel=1e-4)
    assert set(measures) <= set(MEASURES)
    assert found["rows"][0] != found["rows"][1]
    protocol = found["protocol"]
    assert protocol["data"].startswith("COCO2017 val, first caption of each picture, sha256 ")
    assert (protocol["prompts"], protocol["reference"], protocol["seeds"]) == (
        8,
        "8 pictures",
        "0 + number",
    )
    assert protocol["pictures"] == "64 x 64, 8 bit, centred square"
    assert protocol["student sampler"] == "Consistency(levels=None)"
    assert "weights " in protocol["fid"]
    assert protocol["kid"].endswith("subsets 100, size 1000, seed 0")
    assert f"run: {student}\n" in (tmp_path / "out" / "evaluation" / "asked.yaml").read_text(
        encoding="utf-8"
    )
    pictures = sorted((tmp_path / "out" / "evaluation").glob("student-2-*/*.png"))
    assert [path.name for path in pictures] == [
        f"{i:06d}.png" for i in range(8 + 6)
    ]  # and those for variety
    captions = json.loads((pictures[0].parent / "captions.json").read_text(encoding="utf-8"))
    assert protocol["data"].endswith(captions_digest(captions))
    assert len(captions) == 8
    assert Image.open(tmp_path / "out" / "samples" / "comparison.png").size == (
        8 * 258 + 2,
        2 * 258 + 2,
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "In 1 step the student has an FID of" in page
    assert "FD-DINOv2" in page


def test_scores_are_those_of_their_definition(judged, student, places, tmp_path):
    """From the PNG files that it left, by other code: the reference features, the mean cosine, the
    distance.
    """
    import open_clip
    from scipy.linalg import sqrtm

    found = judged(student, "steps=1", "metrics.measures=[fid,clip_score]")["rows"][0]
    drawn = sorted((tmp_path / "out" / "evaluation").glob("student-1-*/*.png"))
    assert len(drawn) == 8  # nothing asks for variety
    name = f"local-dir:{places['open_clip']}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        images = model.eval().encode_image(
            torch.stack([preprocess(Image.open(path)) for path in drawn])
        )
        texts = model.encode_text(open_clip.get_tokenizer(name)(tiny.CAPTIONS[8:16]))
    cosine = torch.nn.functional.cosine_similarity(images, texts).mean().item()
    assert found["clip_score"] == pytest.approx(cosine, rel=1e-4)

    from transformers import AutoImageProcessor, CLIPModel

    clip, processor = (
        CLIPModel.from_pretrained(places["clip"]).eval(),
        AutoImageProcessor.from_pretrained(places["clip"]),
    )
    sides = []
    for paths in (drawn, sorted((places["coco"] / "val2017").iterdir())):
        shown = []
        for path in paths:
            picture = Image.open(path).convert("RGB")
            (w, h), side = picture.size, min(picture.size)
            left, top = (w - side) // 2, (h - side) // 2
            shown.append(
                processor(
                    picture.crop((left, top, left + side, top + side)), return_tensors="pt"
                ).pixel_values
            )
        with torch.no_grad():
            features = clip.get_image_features(torch.cat(shown)).pooler_output.double()
        sides.append((features / features.norm(dim=1, keepdim=True)).numpy())
    (a, b), cov = sides, np.cov
    root = sqrtm(cov(a.T) @ cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov(a.T) + cov(b.T) - 2 * root)
    assert found["fid"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same(judged, student, monkeypatch, tmp_path):
    whole = judged(student, "steps=[1,2]", out="whole")
    write, left = prompted.write_atomic, [7]

    def dying(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt  # what was being written is lost
        write(path, content)

    monkeypatch.setattr(prompted, "write_atomic", dying)
    with pytest.raises(KeyboardInterrupt):
        judged(student, "steps=1,2", out="killed")
    monkeypatch.setattr(prompted, "write_atomic", write)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.png")}
    assert len(kept) == 7
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    assert plain(judged(student, "steps=1,2", out="killed")) == plain(whole)
    done = {path.name for path in kept if kept[path] == path.stat().st_mtime_ns}
    assert done == {
        f"{i:06d}.png" for i in range(6)
    }  # of the third batch one was there, and all of it was made anew
    # once more: nothing is drawn, and no feature is computed
    monkeypatch.setattr(prompted, "seeded", lambda seeds: pytest.fail("drawn again"))
    monkeypatch.setattr(
        "distill.evaluation.features.DataLoader", lambda *_, **__: pytest.fail("computed again")
    )
    assert judged(student, "steps=1,2", out="killed") == json.loads(
        (tmp_path / "killed" / "evaluation.json").read_text(encoding="utf-8")
    )


@pytest.mark.slow
def test_pictures_of_other_settings_are_not_taken_for_these(judged, student, tmp_path):
    def folders():
        return {path.name for path in (tmp_path / "out" / "evaluation").iterdir() if path.is_dir()}

    few = ("steps=1", "metrics.measures=[fid]")
    judged(student, *few)
    first = folders()
    judged(student, *few, "metrics.seed=1")
    found = judged(student, *few, "metrics.size=[48,32]")
    assert found["protocol"]["pictures"] == "48 x 32, 8 bit, centred square"
    assert len(folders()) == 3
    with pytest.raises(
        AssertionError,
        match=r"metrics\.size=33: must be a multiple of 8 for this teacher; use 32 or 40",
    ):
        judged(student, *few, "metrics.size=33")
    other = shutil.copytree(student, tmp_path / "other")
    network = SD3(str(other)).network
    tiny.shake(network.model, 4, std=1e-3).save_pretrained(other / "transformer")
    judged(other, *few)
    assert len(folders()) == 4
    shutil.rmtree(other / "text_encoder")
    encoder = tiny.shake(SD3(str(student)).pipeline.text_encoder, 5, std=1e-2)
    encoder.save_pretrained(other / "text_encoder")
    judged(other, *few)
    assert len(folders()) == 5
    assert first <= folders()


def test_a_teachers_pictures_are_its_schedulers_too(pipelines, tmp_path):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "teacher")
    before, again = (SD3(str(folder)) for _ in range(2))
    assert before.provenance(before, scheduled=True) == again.provenance(again, scheduled=True)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps({"shift": 9.0, "_class_name": "FlowMatchEulerDiscreteScheduler"}),
        encoding="utf-8",
    )  # short, as SD3's
    shifted = SD3(str(folder))
    assert shifted.provenance(shifted, scheduled=True) != before.provenance(before, scheduled=True)
    assert shifted.provenance(before.network, scheduled=False) == before.provenance(
        before.network, scheduled=False
    )
    # and in no process otherwise: diffusers lists what the file lacks in the order of a set
    found = shifted.provenance(shifted, scheduled=True)
    shifted.pipeline.scheduler._internal_dict = FrozenDict(
        {**shifted.pipeline.scheduler.config, "_use_default_values": ["base_shift", "max_shift"]}
    )
    assert shifted.provenance(shifted, scheduled=True) == found


def test_a_model_that_was_not_distilled_is_guided(judged, command, pipelines, places):
    found = judged(
        pipelines("unet"), "steps=2", "metrics.measures=[clip_score]", "metrics.guidance=3.0"
    )
    assert [(row["who"], row["steps"]) for row in found["rows"]] == [("teacher", 2)]
    assert found["protocol"]["teacher guidance"] == 3.0
    assert found["protocol"]["teacher sampler"] == "DDIM, trailing steps"
    assert "student sampler" not in found["protocol"]
    words = ["metrics=coco5k", f"metrics.path={places['coco']}", "metrics.prompts=8"]
    code, _, err = command("evaluate", f"run={pipelines('unet')}", *words)
    assert code == 1
    assert "was not distilled to few steps; add steps=28 or the like" in err


def test_what_the_reader_of_shapes_cannot_read_is_refused_before_it_is_drawn(
    command, pipelines, shards, monkeypatch, tmp_path
):
    """A model of larger pictures; `metrics: shapes` is what evaluate and run take unless told
    otherwise.
    """
    large = shutil.copytree(pipelines("unet"), tmp_path / "large")
    config = json.loads((large / "unet" / "config.json").read_text(encoding="utf-8"))
    (large / "unet" / "config.json").write_text(
        json.dumps({**config, "sample_size": 32}), encoding="utf-8"
    )
    monkeypatch.setattr(
        "distill.evaluation.shapes.generate_pictures", lambda *_: pytest.fail("drawn")
    )
    code, _, err = command("evaluate", f"run={large}", "steps=1", "out=out")
    assert code == 1
    said = err.splitlines()[-1]
    assert said.startswith(
        "distill: metrics: the reader of shapes needs pictures of 64 pixels a side, and this "
    )
    assert said.endswith("teacher's have 128; use metrics=coco5k or prompts, or ~metrics to train")
    assert not (tmp_path / "out").exists()
    run = [
        "debug=smoke",
        "method=ladd",
        "teacher=shapes_unet",
        f"teacher.path={large}",
        f"run_dir={tmp_path / 'run'}",
    ]
    code, _, err = command("run", *run, f"data.path={shards}")
    assert code == 1
    assert err.splitlines()[-1] == said
    assert not (tmp_path / "run").exists()  # before training
    Shapes().fits(SD(str(pipelines("unet"))))


@pytest.mark.slow
def test_shapes_are_evaluated_at_other_sizes(command, pipelines, tmp_path):
    small = ["metrics.prompts=4", "steps=1", f"out={tmp_path / 'out'}"]
    asked = ["evaluate", f"run={pipelines('unet')}", *small]
    assert command(*asked)[0] == 0
    code, out, err = command(*asked, "metrics.size=[96,48]")
    assert code == 0, err
    assert "render accuracy" in out
    square, wide = results_in(
        json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    )
    if "render_accuracy" in square["rows"][0]:
        square, wide = wide, square
    assert wide["rows"][0]["render_accuracy"] == 1.0
    assert wide["protocol"]["reference"].endswith(", 96 x 48 pixels")
    assert not comparable(square["protocol"], wide["protocol"])
    with Image.open(tmp_path / "out" / "samples" / wide["picture"]) as strips:
        assert strips.size == (4 * 98 + 2, 98 + 2)  # squares, as the pages cut them


@pytest.mark.parametrize(
    ("run", "words", "said"),
    [
        ("unet", ["metrics=shapes", "metrics.size=[32,96]"], "largest object needs 40 pixels"),
        ("unet", ["metrics=shapes", "metrics.size=[63,96]"], "must be multiples of 4 for this"),
        ("unet_inpaint", ["metrics=shapes_fill", "metrics.size=96"], "of 64 pixels a side alone"),
        ("unet_edit", ["metrics=shapes_edit", "metrics.size=96"], "of 64 pixels a side alone"),
    ],
)
def test_sizes_that_cannot_be_judged_are_refused(run, words, said, command, tmp_path):
    asked = ["evaluate", f"run=shapes:{run}", "steps=1", f"out={tmp_path / 'out'}", *words]
    code, _, err = command(*asked)
    assert code == 1
    assert err.splitlines()[-1].startswith("distill: metrics.size=")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_student_and_a_teacher_side_by_side(judged, student, pipelines, tmp_path):
    more = [
        "teacher=shapes",
        f"teacher.path={pipelines('mmdit')}",
        "metrics.teacher_steps=[2]",
        "metrics.measures=[fid]",
    ]
    found = judged(student, "steps=1", *more)
    assert [(row["who"], row["steps"]) for row in found["rows"]] == [("teacher", 2), ("student", 1)]
    assert "its teacher," in headline(rows_of(found)) or "In 1 step the student" in headline(
        rows_of(found)
    )
    assert "<td><b>" in table({"rows": [{**row, "steps": 1} for row in found["rows"]]})


def test_a_folder_of_pictures_scores_as_the_model_that_drew_it(judged, student, places, tmp_path):
    few = "metrics.measures=[fid,clip_score,manifolds,variety]"
    (row,) = plain(judged(student, "steps=1", few))["rows"]
    (drawn,) = (tmp_path / "out" / "evaluation").glob("*/")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        shutil.copy(drawn / f"{i:06d}.png", folder)
    found = judged(folder, few, out="again")
    (again,) = found["rows"]
    assert again == {
        **{k: v for k, v in row.items() if k != "variety"},
        "who": "pictures",
        "steps": 0,
    }
    assert found["protocol"]["judged"] == f"8 pictures in {folder}"
    assert found["protocol"]["prompts"] == 8
    assert "Pictures<" in table(found)
    for i, path in enumerate(
        sorted(folder.iterdir())
    ):  # other names, captions beside them, in another order
        path.rename(folder / f"a_{9 - i}.png")
        (folder / f"a_{9 - i}.txt").write_text(tiny.CAPTIONS[8 + i], encoding="utf-8")
    (folder / "a_2.png").unlink()
    found = judged(folder, few, out="fewer")["protocol"]
    assert found["prompts"] == 7  # and not what the protocol would have had drawn
    assert found["data"].startswith("captions of the pictures, sha256 ")
    assert "data" not in judged(folder, "metrics.measures=[fid]", out="fid")["protocol"]
    shutil.copy(drawn / "000007.png", folder / "a_2.png")
    (renamed,) = judged(folder, few, out="renamed")["rows"]
    assert renamed["clip_score"] == pytest.approx(row["clip_score"], rel=1e-5)
    assert renamed["fid"] == pytest.approx(row["fid"], rel=1e-4)


def test_cocos_own_pictures_are_at_no_distance_from_themselves(judged, places):
    """Their captions are known by their names."""
    (row,) = judged(places["coco"] / "val2017", "metrics.measures=[fid,cmmd,clip_score,manifolds]")[
        "rows"
    ]
    assert row["fid"] == pytest.approx(0, abs=1e-6)
    assert row["cmmd"] == pytest.approx(0, abs=1e-6)
    assert (row["precision"], row["recall"], row["coverage"]) == (1, 1, 1)
    assert -1 < row["clip_score"] < 1


def test_prompts_of_a_file_without_and_with_reference(judged, student, places, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:5]) + "\n\n", encoding="utf-8")
    own = ["metrics.path=prompts.txt", "metrics.prompts=null", "steps=1"]
    found = judged(student, *own, metrics="prompts")
    assert set(found["rows"][0]) == {
        "who",
        "steps",
        "clip_score",
        "pick_score",
        "variety",
        "seconds_per_image",
        "outcomes",
    }
    assert found["protocol"]["data"].startswith("prompts.txt, sha256 ")
    assert (found["protocol"]["prompts"], found["protocol"]["reference"]) == (5, "none")
    real = places["coco"] / "val2017"
    found = judged(
        student, *own, "metrics.measures=[cmmd]", f"metrics.reference={real}", metrics="prompts"
    )
    assert found["protocol"]["reference"] == "8 pictures"
    assert set(found["rows"][0]) == {"who", "steps", "cmmd", "seconds_per_image"}


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(judged, student, one_thread, tmp_path):
    few = ("steps=1", "metrics.measures=[fid,variety]")
    alone = judged(student, *few, out="alone")
    several = judged(student, *few, "devices=2", out="several")
    assert plain(several) == plain(alone)
    made = [
        len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted((tmp_path / "several").rglob("seconds-*.txt"))
    ]
    assert made == [3, 2]  # batches of three, of 14 pictures
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("0*.png")}
        for folder in (tmp_path / "alone", tmp_path / "several")
    )
    assert len(one) == 14
    assert one == two


@pytest.mark.slow
def test_a_run_judges_itself_so_and_is_judged_again(
    command, pipelines, shards, places, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = [
        "debug=smoke",
        f"teacher.path={pipelines('mmdit')}",
        f"data.path={shards}",
        f"run_dir={tmp_path / 'run'}",
    ]
    metrics = ["metrics=coco5k", f"metrics.path={places['coco']}", *eyes.small(places)]
    code, out, err = command(
        "run", *run, *metrics, "metrics.prompts=8", "metrics.measures=[fid,cmmd]"
    )
    assert code == 0, err
    assert "fid" in out
    first = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    found = [(row["who"], row["steps"]) for row in first["rows"]]
    assert found == [("teacher", 1), ("teacher", 2), ("student", 1), ("student", 2)]
    again = [
        f"run={tmp_path / 'run'}",
        *metrics,
        "metrics.prompts=8",
        "metrics.measures=[fid]",
        "steps=2",
    ]
    assert command("evaluate", *again, "metrics.teacher_steps=[]")[0] == 0
    then = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert [(row["who"], row["steps"]) for row in then["rows"]] == found
    assert then["rows"][:3] == first["rows"][:3]
    row = then["rows"][3]
    assert row["fid"] == pytest.approx(first["rows"][3]["fid"], rel=1e-2)  # with weights read back
    assert row["cmmd"] == first["rows"][3]["cmmd"]  # which was not asked for again
    assert "| fid |" in (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8")
    code, out, err = command("compare", f"runs={tmp_path / 'run'}", f"out={tmp_path / 'compared'}")
    assert code == 0, err
    assert "FID" in out
    page = (tmp_path / "compared" / "compare.html").read_text(encoding="utf-8")
    assert re.search(r"with \d+ steps?: fid \d", page)


@pytest.mark.slow
def test_a_run_that_could_not_be_judged_does_not_begin(
    command, pipelines, shards, places, tmp_path
):
    run = [
        "debug=smoke",
        f"teacher.path={pipelines('mmdit')}",
        f"data.path={shards}",
        f"run_dir={tmp_path / 'run'}",
    ]
    metrics = [
        "metrics=coco5k",
        f"metrics.path={places['coco']}",
        *eyes.small(places),
        "metrics.measures=[cmmd]",
    ]
    lost = f"metrics.networks.clip_l.path={tmp_path / 'nowhere'}"
    code, _, said = command("run", *run, *metrics, "metrics.prompts=8", lost)
    assert code == 1
    said = said.splitlines()[-1]
    assert said.startswith("distill: metrics.networks.clip_l.path=")
    assert not (tmp_path / "run").exists()
