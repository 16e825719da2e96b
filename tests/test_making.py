"""Shards that commands make: pictures encoded once, and a teacher's samples; killed, shared out,
read back, checked.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import diffusers
import numpy as np
import pytest
import torch
import transformers

import hostile
import tiny
from distill.data.datasets import LatentShards
from distill.data.shards import Shards
from distill.sampling import guided
from distill.teachers.pipeline import PipelineTeacher
from test_data import npy, png, put_tar

PROMPTS = tiny.CAPTIONS[:5]
COUNT, PER_SHARD = 11, 3


def pictures(path, count: int = COUNT, bad: tuple[int, ...] = (4,), sizes=((64, 64),)) -> str:
    """Named pictures with captions; the bad ones have none."""
    files = {}
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        files[f"{i:03d}.png"] = png(
            np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        )
        files |= {} if i in bad else {f"{i:03d}.txt": tiny.CAPTIONS[i].encode()}
    return put_tar(path, files)


@pytest.fixture
def asked(pipelines, tmp_path):
    """Command -> its arguments but for `out`."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    fixed = [f"teacher.path={pipelines('mmdit')}", f"per_shard={PER_SHARD}"]
    data = [
        f"data.path={pictures(tmp_path / 'x.tar')}",
        "data.size=64",
        "data.num_workers=0",
        "data.batch_size=2",
    ]
    prompts = [
        f"prompts={tmp_path / 'prompts.txt'}",
        f"count={COUNT}",
        "seed=5",
        "steps=2",
        "batch_size=2",
    ]
    return {"cache": [*fixed, *data], "synthesize": [*fixed, *prompts]}


def content(folder) -> dict[str, bytes]:
    """Everything that was made, by name; no part of a file among it."""
    assert not list(folder.glob("*.part"))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "making.yaml"}


def keys(folder) -> list[str]:
    shards = Shards(str(folder))
    return [shards.read(i)["__key__"] for i in range(len(shards))]


EXPECTED = {
    "cache": [f"{i:09d}" for i in range(COUNT) if i != 4],
    "synthesize": [f"{i:09d}" for i in range(5, 5 + COUNT)],
}
each_command = pytest.mark.parametrize("name", ["cache", "synthesize"])


# -- killed, and shared out ------------------------------------------------------------------------


@each_command
def test_an_error_in_the_middle_leaves_no_duplicate_and_no_hole(
    name, command, asked, monkeypatch, tmp_path
):
    code, out, _ = command(name, *asked[name], "out=whole")
    assert code == 0
    assert keys(tmp_path / "whole") == EXPECTED[name]
    assert (
        f"whole: {len(EXPECTED[name])} samples in 4 shards, {COUNT - len(EXPECTED[name])} bad ones"
        " left out" in out
    )
    calls, embed = itertools.count(), PipelineTeacher.embed

    def failing(self, captions):
        if next(calls) in (4, 9):
            raise OSError("the power is gone")
        return embed(self, captions)

    monkeypatch.setattr(PipelineTeacher, "embed", failing)
    for left in (1, 2):
        assert command(name, *asked[name], "out=parts")[0] == 1
        assert not (tmp_path / "parts" / "manifest.json").exists()
        assert len(list((tmp_path / "parts").glob("*.tar"))) >= left
        with pytest.raises(
            ValueError,
            match="its shard job is not finished; give the command of the job once more",
        ):
            LatentShards(str(tmp_path / "parts"))
    assert command(name, *asked[name], "out=parts")[0] == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert (
        "11 samples" in command(name, *asked[name], "out=parts")[1] or name == "cache"
    )  # done: nothing is made anew


@pytest.mark.slow
@each_command
def test_sigkill_at_any_moment_leaves_no_duplicate_and_no_hole(name, asked, forks, tmp_path):
    def start(out):
        return forks.command(name, [*asked[name], f"out={out}"])

    asked[name] += ["per_shard=1"]
    assert start(tmp_path / "whole").wait(timeout=300) == 0
    parts = tmp_path / "parts"
    for kill in ("*.tar.*.part", "latents-000003.tar", "latents-000005.tar.*.part"):
        process = start(parts)
        while process.poll() is None and not list(parts.glob(kill)):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert start(parts).wait(timeout=300) == 0
    assert keys(parts) == EXPECTED[name]
    assert content(parts) == content(tmp_path / "whole")


@pytest.mark.slow
@each_command
def test_two_ranks_make_what_one_makes(name, command, asked, monkeypatch, tmp_path):
    assert command(name, *asked[name], "out=whole")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # as torchrun starts them; one after the other here
        assert not (tmp_path / "parts" / "manifest.json").exists()
        monkeypatch.setenv("RANK", rank)
        assert command(name, *asked[name], "out=parts")[0] == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", tiny.tiered(["cache", "synthesize"], slow=["cache"]))
def test_two_processes_of_the_command_make_what_one_makes(name, asked, tmp_path):
    for devices, out in ((1, "whole"), (2, "parts")):
        command = [
            sys.executable,
            "-m",
            f"distill.{name}",
            *asked[name],
            f"out={tmp_path / out}",
            f"devices={devices}",
        ]
        said = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert said.returncode == 0, said.stderr
        assert "samples in 4 shards" in said.stdout
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@each_command
def test_other_settings_are_refused_and_mistakes_leave_nothing(name, command, asked, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    wrong = "data.size=60" if name == "cache" else "size=[60,64]"
    for out in ("gone", "mine"):
        code, _, err = command(name, *asked[name], wrong, f"out={out}")
        assert (code, "multiple" in err) == (1, True)
    assert not (tmp_path / "gone").exists()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert command(name, *asked[name], "out=made")[0] == 0
    code, _, err = command(name, *asked[name], "out=made", "embeddings=false")
    assert code == 1
    assert (
        "out=made was started with other settings: embeddings=False (was True); choose another out="
        in err
    )
    assert (
        "per_shard=0: must be a whole number, 1 or more"
        in command(name, *asked[name], "out=x", "per_shard=0")[2]
    )


def test_too_many_bad_pictures_stop_the_cache(command, asked, tmp_path):
    path = pictures(tmp_path / "bad.tar", 40, tuple(range(1, 40, 2)))
    code, _, err = command("cache", *asked["cache"], f"data.path={path}", "out=made")
    assert code == 1
    assert f"distill: data.path={path}: " in err
    assert "more than data.max_bad_share=0.1; repair the data, or raise the share" in err
    assert "it has no caption (txt, caption, json), only png" in err
    only = ["data=prompts", f"data.path={tmp_path / 'prompts.txt'}", "out=other"]
    assert (
        "only pictures can be encoded; choose data=images"
        in command("cache", *asked["cache"][:2], *only)[2]
    )


def test_a_cache_without_a_usable_picture_leaves_nothing(command, asked, tmp_path):
    """What is no picture is found before anything is loaded; one that is cut short, in its turn."""
    whole = hostile.png(64, 64)
    for data, what in (
        (b"no picture", "none of its first 6 samples is usable,"),
        (whole[: len(whole) // 2], "all 6 samples are bad; repair them. The first:"),
    ):
        files = {f"{i:03d}.png": data for i in range(6)}
        files |= {f"{i:03d}.txt": tiny.CAPTIONS[i].encode() for i in range(6)}
        path = put_tar(tmp_path / "bad.tar", files)
        given = [*asked["cache"], f"data.path={path}", "data.max_bad_share=1"]
        code, _, err = command("cache", *given, "out=made")
        said = f"distill: data.path={path}: {what} {path}:000: its .png does not decode ("
        assert code == 1
        assert err.splitlines()[-1].startswith(said)
        assert not (tmp_path / "made").exists()


def test_bad_pictures_of_several_parts_count_together(command, asked, tmp_path):
    path = pictures(tmp_path / "bad.tar", 12, (1, 2, 3))  # too few for the alarm on the way
    code, _, err = command("cache", *asked["cache"], f"data.path={path}", "out=made")
    assert code == 1
    assert (
        f"data.path={path}: 3 of 12 samples are bad, more than data.max_bad_share=0.1; raise it, or"
        " repair them and choose another out=. The first: "
    ) in err
    assert f"{path}:001: it has no caption (txt, caption, json), only png" in err
    assert (
        command(
            "cache", *asked["cache"], f"data.path={path}", "out=made", "data.max_bad_share=0.3"
        )[0]
        == 0
    )


@each_command
def test_inputs_that_have_changed_are_refused(name, command, asked, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(
            "distill.data.shard_job.ShardJob.finish", lambda *_, **__: None
        )  # killed just before
        assert command(name, *asked[name], "out=made")[0] == 0
    if name == "cache":
        pictures(tmp_path / "x.tar", COUNT + 1)
    else:
        (tmp_path / "prompts.txt").write_text("another\n" * 5, encoding="utf-8")
    code, _, err = command(name, *asked[name], "out=made")
    assert (
        code,
        "prompts or data have changed since its start; choose another out=" in err,
    ) == (1, True)
    assert (
        "prompts=gone.txt: no such file; check the path"
        in command("synthesize", "prompts=gone.txt", "out=other")[2]
    )
    assert not (tmp_path / "other").exists()


# -- what was made ---------------------------------------------------------------------------------


def test_each_sample_is_what_its_teacher_made_of_the_noise_of_its_seed(
    command, asked, teachers, monkeypatch, tmp_path
):
    drawn = []

    def noise(_teacher, shape, generators):
        drawn.append(
            found := torch.cat([torch.randn((1, *shape), generator=g) for g in generators])
        )
        return found

    monkeypatch.setattr(guided, "first_noise", noise)
    words = [*asked["synthesize"], "precision=32-true", "out=made"]
    assert command("synthesize", *words)[0] == 0
    data = LatentShards(str(tmp_path / "made"), seeded=True)
    items = [data[i] for i in range(len(data))]
    assert torch.equal(torch.stack([item["noise"] for item in items]), torch.cat(drawn))
    assert [item["caption"] for item in items] == [PROMPTS[i % 5] for i in range(COUNT)]
    teacher, made = teachers("mmdit"), items[:2]  # the first batch
    monkeypatch.setattr(
        guided, "first_noise", lambda *_: torch.stack([item["noise"] for item in made])
    )
    how = {"shape": teacher.latent_shape, "steps": 2, "guidance": 4.0}
    again = guided.guided(teacher, teacher.embed([item["caption"] for item in made]), [], **how)
    assert torch.equal(again.half().float(), torch.stack([item["x0"] for item in made]))
    about = json.loads((tmp_path / "made" / "manifest.json").read_text(encoding="utf-8"))
    wanted = {
        "samples": COUNT,
        "size": [64, 64],
        "guidance": 4.0,
        "steps": 2,
        "seed": 5,
        "dropped": 0,
    }
    assert about | wanted == about
    assert {"teacher", "versions", "sha256", "what"} <= set(about)


def test_samples_of_another_size(command, asked, tmp_path):
    more = ["size=[32,64]", "count=2", "embeddings=false", "out=made"]
    assert command("synthesize", *asked["synthesize"], *more)[0] == 0
    data = LatentShards(str(tmp_path / "made"), seeded=True)
    assert data.shape == (4, 16, 8)
    assert command("synthesize", *asked["synthesize"], "size=32", *more[1:-1], "out=square")[0] == 0
    assert LatentShards(str(tmp_path / "square")).shape == (4, 8, 8)
    assert set(data[0]) == {"x0", "noise", "caption", "key"}


def test_a_cached_sample_is_what_the_encoders_make(command, asked, teachers, tmp_path):
    assert command("cache", *asked["cache"], "out=made")[0] == 0
    teacher, data = teachers("mmdit"), LatentShards(str(tmp_path / "made"))
    assert [data[i]["caption"] for i in range(len(data))] == [
        c for i, c in enumerate(tiny.CAPTIONS[:COUNT]) if i != 4
    ]
    cond, null = teacher.embed([data[3]["caption"]]), teacher.embed([""])
    for name, x in cond.tensors().items():
        torch.testing.assert_close(data[3][name].float(), x[0], rtol=1e-3, atol=1e-3)
        assert torch.equal(data.null[name], null.tensors()[name].half())
        assert data[3][name].dtype == torch.float16


def test_a_cache_in_buckets(command, asked, tmp_path):
    path = pictures(tmp_path / "y.tar", 12, (), ((64, 64), (48, 24), (50, 25)))
    more = [f"data.path={path}", "data.buckets=[[64,64],[48,24]]", "out=made"]
    assert command("cache", *asked["cache"], *more)[0] == 0
    data = LatentShards(str(tmp_path / "made"))
    assert data.buckets == [(16, 16), (12, 6)]
    assert sorted(keys(tmp_path / "made")) == [f"{i:09d}" for i in range(12)]
    assert {key: len(group) for key, group in data.groups.items()} == {0: 4, 1: 8}
    code, _, err = command("cache", *asked["cache"], "data.buckets=[[60,64]]", "out=other")
    assert (code, "data.buckets: [60, 64] must be multiples of 8 for this teacher" in err) == (
        1,
        True,
    )


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ({}, r"it has no embedding \(tokens.npy\), only latent.npy, txt"),
        (
            {"tokens.npy": npy(np.zeros((3, 4), np.float16))},
            r"its .tokens.npy is float16 \[3, 4\], not finite float16",
        ),
        ({"tokens.npy": npy(np.zeros((2, 4), np.float32))}, "its .tokens.npy is float32"),
        ({"tokens.npy": npy(np.full((2, 4), np.nan, np.float16))}, "not finite"),
        ({"tokens.npy": b"x"}, "its .tokens.npy does not decode"),
    ],
)
def test_embeddings_that_are_refused(member, said, tmp_path):
    np.savez(tmp_path / "null.npz", tokens=np.zeros((1, 2, 4), np.float16))
    files = {"latent.npy": npy(np.zeros((1, 2, 2), np.float16)), "txt": b"c", **member}
    path = put_tar(tmp_path / "x.tar", {f"0.{end}": data for end, data in files.items()})
    with pytest.raises(ValueError, match=f"none of its first 1 samples is usable.*{said}"):
        LatentShards(path)


# -- a run on it -----------------------------------------------------------------------------------

ENCODERS = (
    diffusers.AutoencoderKL,
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
)


@pytest.fixture
def read(monkeypatch):
    """The names of the encoders' classes that are constructed."""
    seen: list[str] = []
    for kind in (*ENCODERS, transformers.T5EncoderModel):

        @functools.wraps(kind.__init__)  # diffusers asks for its signature
        def init(self, *args, _before=kind.__init__, _name=kind.__name__, **keys):
            seen.append(_name)
            _before(self, *args, **keys)

        monkeypatch.setattr(kind, "__init__", init)
    return seen


def steps(command, folder, *arguments) -> list[dict[str, float]]:
    """A short run -> what it logged of each step."""
    common = [
        "debug=smoke",
        "data.num_workers=0",
        "data.batch_size=3",
        "~metrics",
        f"run_dir={folder}",
    ]
    code, _, err = command("run", *common, *arguments)
    assert code == 0, err
    rows = [
        {k: float(v) for k, v in row.items() if v}
        for row in csv.DictReader((folder / "metrics.csv").open(encoding="utf-8"))
    ]
    return [row for row in rows if "g/grad_norm" in row]


@pytest.mark.parametrize("family", ["mmdit", pytest.param("unet", marks=pytest.mark.slow)])
def test_a_cached_run_reads_no_encoder_and_equals_the_uncached_one(
    family, command, pipelines, read, tmp_path
):
    path, teacher = pictures(tmp_path / "x.tar", bad=()), f"teacher.path={pipelines(family)}"
    kind = [] if family == "mmdit" else ["teacher=shapes_unet"]
    cache = [*kind, teacher, f"data.path={path}", "data.size=64", "data.num_workers=0", "out=made"]
    assert command("cache", *cache)[0] == 0
    run = [*kind, teacher, "~callbacks.samples", "trainer.precision=32-true"]
    plain = steps(
        command, tmp_path / "plain", *run, "data=images", "data.size=64", f"data.path={path}"
    )
    assert "AutoencoderKL" in read
    read.clear()
    cached = steps(
        command, tmp_path / "cached", *run, "data=latents", f"data.path={tmp_path / 'made'}"
    )
    assert read == []
    assert (tmp_path / "cached" / "student" / "vae").is_dir()  # the student is whole all the same
    for a, b in zip(plain, cached, strict=True):
        for name in ("g/adv", "d/adv", "d/real", "d/fake", "g/grad_norm", "d/grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=5e-3, abs=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "encoders"), [([], 0), (["callbacks.samples.prompts=[a red star]"], 2)]
)
def test_pictures_on_the_way_read_what_they_need_and_let_it_go(
    prompts, encoders, command, pipelines, read, monkeypatch, asked, tmp_path
):
    """Captions of the data need no encoder; prompts of one's own need the teacher's two, once for
    all.
    """
    assert command("synthesize", *asked["synthesize"], "out=made")[0] == 0
    read.clear()
    gone, release = [], PipelineTeacher.release

    def with_progress(self):
        release(self)
        gone.append(all(getattr(self.pipeline, name) is None for name in self.pipeline.deferred))

    monkeypatch.setattr(PipelineTeacher, "release", with_progress)
    data = [
        "data=synthetic",
        f"data.path={tmp_path / 'made'}",
        f"teacher.path={pipelines('mmdit')}",
    ]
    steps(command, tmp_path / "run", *data, *prompts)
    assert gone == [True] * 3  # before the first step, after it, and after the second
    assert read.count("CLIPTextModelWithProjection") == encoders
    assert read.count("AutoencoderKL") == 3
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 3


def test_add_keeps_the_decoder_of_its_loss(command, pipelines, read, asked, tmp_path):
    assert command("synthesize", *asked["synthesize"], "out=made")[0] == 0
    read.clear()
    data = [
        "data=synthetic",
        f"data.path={tmp_path / 'made'}",
        f"teacher.path={pipelines('mmdit')}",
    ]
    steps(
        command,
        tmp_path / "run",
        *data,
        "method=add",
        f"discriminator.features.path={tiny.vit()}",
        "~callbacks.samples",
    )
    assert read == ["AutoencoderKL"]


def test_embeddings_of_another_teacher(command, pipelines, tmp_path):
    np.savez(tmp_path / "null.npz", tokens=np.zeros((1, 2, 4), np.float16))
    files = {"0.latent.npy": npy(np.zeros((4, 16, 16), np.float16)), "0.txt": b"c"}
    path = put_tar(tmp_path / "x.tar", files | {"0.tokens.npy": npy(np.zeros((2, 4), np.float16))})
    code, _, err = command(
        "run", "data=latents", f"data.path={path}", f"teacher.path={pipelines('mmdit')}"
    )
    assert code == 1
    assert "its embeddings are 4 wide and this teacher reads" in err


def test_pictures_are_not_taken_for_samples_with_their_noise(command, asked):
    assert command("cache", *asked["cache"], "out=made")[0] == 0
    run = ["debug=smoke", "data.path=made", "data.num_workers=0", "~metrics", asked["cache"][0]]
    said = "data.path=made: holds pictures, of which no noise is known; use data=latents"
    assert said in command("run", "data=synthetic", "method=regression", *run)[2]


@pytest.mark.slow
def test_a_cache_is_held_against_its_teacher(command, asked, caplog, tmp_path):
    assert command("cache", *asked["cache"], "out=made")[0] == 0
    teacher, run = (
        asked["cache"][0],
        ["debug=smoke", "data.path=made", "data.num_workers=0", "~metrics"],
    )
    manifest = tmp_path / "made" / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8"))
    assert (made["what"], made["without"]) == ("encoded pictures", [])
    manifest.write_text(
        json.dumps(made | {"without": ["text_encoder_3", "tokenizer_3"]}), encoding="utf-8"
    )
    said = (
        "were made with teacher.without=[text_encoder_3,tokenizer_3], and this run has []; give"
        " both the same"
    )
    assert said in command("run", "data=latents", teacher, *run)[2]
    manifest.write_text(json.dumps(made | {"teacher": "another"}), encoding="utf-8")
    code, *said = command("run", "data=latents", teacher, *run)
    assert code == 0
    assert "was made with another, not with this run's teacher: right if both" in " ".join(
        [*said, caplog.text]
    )


# -- check, and what img2dataset leaves ------------------------------------------------------------


def test_check_says_what_is_wrong_and_how_much(command, tmp_path):
    path = pictures(tmp_path / "x.tar", 20, (3, 7), ((64, 64), (128, 64)))
    code, out, _ = command("check", f"data.path={path}", "data.size=64", "data.num_workers=0")
    assert code == 0  # a tenth is allowed
    assert "18 of 20 samples are good" in out
    assert f"        2  it has no caption (txt, caption, json), only png (as {path}:003)" in out
    assert "   1.00        10  " + "#" * 20 in out
    assert "   2.00        10  " + "#" * 20 in out
    assert "words of a caption: " in out
    code, out, _ = command(
        "check",
        f"data.path={path}",
        "data.size=64",
        "data.num_workers=0",
        "data.max_bad_share=0.05",
    )
    assert code == 1
    code, out, _ = command(
        "check", f"data.path={path}", "data.size=200", "data.num_workers=0", "data.limit=4"
    )
    assert code == 1
    assert "0 of 4 samples are good" in out
    assert (
        "        4  its image is 64 x 64, under half of data.size=200; remove it, or make that 128"
        in out
    )


def test_one_fault_is_one_reason(command, tmp_path):
    page = b"<html>not found</html>"
    files = {f"{i}.{end}": data for i in range(5) for end, data in (("jpg", page), ("txt", b"a"))}
    path = put_tar(tmp_path / "x.tar", files)
    out = command("check", f"data.path={path}", "data.size=64", "data.num_workers=0")[1]
    assert "        5  its .jpg does not decode" in out


def test_check_reads_latents_and_prompts_too(command, shards, tmp_path):
    code, out, _ = command("check", "data=latents", f"data.path={shards}", "data.num_workers=0")
    assert (code, "24 of 24 samples are good" in out) == (0, True)
    (tmp_path / "p.txt").write_text("a b\nc\n", encoding="utf-8")
    code, out, _ = command("check", "data=prompts", "data.path=p.txt")
    assert (code, "1 to 2, median 1.5; 0 are empty" in out) == (0, True)


def test_img2dataset_s_output_is_read_as_it_comes(command, tmp_path):
    folder = tmp_path / "laion"
    folder.mkdir()
    for shard in range(2):
        files = {}
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            picture = np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8)
            from PIL import Image

            Image.fromarray(picture).save(file := io.BytesIO(), "JPEG")
            record = {
                "caption": f"alt text {i}",
                "url": "...",
                "status": "success",
                "width": 80,
                "long": f"recaption {i}",
            }
            files |= {f"{key}.jpg": file.getvalue(), f"{key}.txt": b"alt text %d" % i}
            files[f"{key}.json"] = json.dumps(record).encode()
        put_tar(folder / f"{shard:05d}.tar", files)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}", encoding="utf-8")
    from distill.data.datasets import ImageShards

    data = ImageShards(str(folder), size=64)
    assert [data[i]["caption"] for i in (0, 5)] == ["alt text 0", "alt text 2"]
    assert ImageShards(str(folder), size=64, caption_key="long")[4]["caption"] == "recaption 1"
    code, out, _ = command(
        "check",
        f"data.path={folder}",
        "data.size=64",
        "data.num_workers=0",
        "data.caption_key=shrot",
    )
    assert code == 1
    assert "        6  its .json has no text under 'shrot'" in out


def test_a_folder_with_json_captions(tmp_path):
    from distill.data.datasets import ImageShards

    (tmp_path / "a.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "a.json").write_text('{"caption": "a dog"}', encoding="utf-8")
    assert ImageShards(str(tmp_path), size=8)[0]["caption"] == "a dog"


def test_a_cache_that_overflows_names_picture_and_dtype(command, pipelines, tmp_path):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "teacher")
    config = folder / "vae" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"scaling_factor": 1e9}),
        encoding="utf-8",
    )
    path = tmp_path / "photos"
    path.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (path / "a.png").write_bytes(png(noise))
    (path / "a.txt").write_text("c", encoding="utf-8")
    code, _, err = command(
        "cache", f"teacher.path={folder}", f"data.path={path}", "data.size=64",
        "data.num_workers=0", "data.batch_size=1", "out=made",
    )  # fmt: skip
    assert code == 1
    said = r"its latents reach .*, beyond float16, .*computed in float32\)"
    assert re.search(rf"{path}:a\.png: {said}", err), err
    assert not (tmp_path / "made").exists()


def test_what_overflowed_and_what_to_give_instead():
    from distill.data.shard_job import checked

    good, bad = np.zeros((1, 2, 2), np.float32), np.full((1, 2, 2), np.nan, np.float32)
    tokens = {"tokens": np.full((2, 3), np.inf, np.float16)}
    checked("a.png", good, {"tokens": good}, "float16")
    for latent, embedded, what in ((bad, {}, "latents"), (good, tokens, r"embeddings \(tokens\)")):
        said = (
            rf"^a\.png: its {what} hold nan or inf, computed in float16; give"
            r" teacher\.dtype=float32$"
        )
        with pytest.raises(ValueError, match=said):
            checked("a.png", latent, embedded, "float16")
    said = r"computed in float32 under precision=16-mixed; give precision=32-true$"
    with pytest.raises(ValueError, match=said):
        checked("seed 3, 'a dog'", bad, {}, "float32", "16-mixed")
