"""`export to=web`: the page reads captions, draws noise and paints as Python does.

The picture tests need onnxruntime-web from npm, playwright from PyPI, and a Chromium on the PATH.
ONNXRUNTIME_WEB=<its .tgz or folder> saves the download.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.config.models import sampler_of, student_of
from distill.exporting import web
from distill.exporting.traced import token_ids
from distill.sampling import to_bytes
from distill.worlds.shapes import world

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
PATIENCE = 180_000  # milliseconds
ODD = (
    "", " ", "A  LARGE\tred\nstar ", "it's 12 o'clock, we'll see... isn't it?!", "naïve Café déjà",
    "ΟΔΟΣ ὈΔΥΣΣΕΎΣ", "İstanbul ẞ", "e\u0301 nfc", "a\u00a0b\u2003c\u0085d\ufeffe", "日本語 の星",
    "🌟 star 👩‍🚀", "<|endoftext|> a <|startoftext|>b<|endoftext|>", "<|ENDOFTEXT|>", "''s 'S 'tis",
    "½ ² ٣ x2", "red-star_blue/ring\\", "\x00\x07 bell", "a" * 200, "word " * 60, "constructor",
    "__proto__ toString", "$& $1 \\d",
)  # fmt: skip


@pytest.fixture(scope="module")
def student():
    return student_of("shapes:student")


def many_captions(count: int = 400) -> list[str]:
    """Captions of the world, and random ones of odd characters."""
    draw = random.Random(0)
    letters = "aZé'.,-<|> \t9½ßΣσ漢🌟" + "".join(
        chr(draw.randrange(32, 0x3000)) for _ in range(200)
    )
    odd = ["".join(draw.choices(letters, k=draw.randrange(1, 40))) for _ in range(count // 2)]
    scenes = [world.sample(0, i)[0].caption for i in range(count // 2)]
    return [*ODD, *scenes, *odd]


def in_node(files: list[str], code: str, *, given: object) -> object:
    """The value of `code` in node, where these scripts of the page were read and `given` is set."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on the PATH")
    scripts = "\n".join((web.PAGE / name).read_text(encoding="utf-8") for name in files)
    whole = f"{scripts}\nconst given = {json.dumps(given)};\nconsole.log(JSON.stringify({code}));"
    done = subprocess.run([node, "-"], input=whole, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_reads_captions_as_python_does(student):
    texts = many_captions()
    about = web.tokenizers_of(student)
    assert list(about) == ["tokenizer", "tokenizer_2"]  # the third encoder is silent
    pipeline = student.pipeline
    for name, each in about.items():
        tokenizer, length = getattr(pipeline, name), each["length"]
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        expected = tokenizer(texts, **options).input_ids
        code = "(t => given.texts.map(x => t.ids(x)))(new Tokenizer(given.about))"
        got = in_node(["tokenizer.js"], code, given={"texts": texts, "about": each})
        wrong = [(t, a, b) for t, a, b in zip(texts, expected, got, strict=True) if a != b]
        assert not wrong, wrong[:3]
        assert len({tuple(ids) for ids in got}) > 300
    assert token_ids(student, texts[-1])[1]["tokenizer"].tolist() == [got[-1]]


def test_the_page_draws_the_noise_that_python_draws():
    code = "given.map(([seed, count, step]) => [...drawNoise(seed, count, step)])"
    given = [(0, 1024, 0), (4294967295, 1024, 3), (7, 5, 1), (2**32 + 7, 5, 1)]
    for (seed, count, step), got in zip(
        given, in_node(["sampling.js"], code, given=given), strict=True
    ):
        expected = web.page_noise(seed, (count,), step)
        assert np.abs(np.float32(got) - expected).max() < 1e-6
    many = np.concatenate([web.page_noise(seed, (1024,), s) for seed in range(40) for s in (0, 1)])
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
    assert abs(np.mean(many**4) - 3) < 0.1
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.01
    first, second = web.page_noise(1, (4, 16, 16)), web.page_noise(1, (4, 16, 16), 1)
    assert first.shape == (4, 16, 16)
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.1


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Path:
    """onnxruntime-web, as npm packs it."""
    if given := os.environ.get("ONNXRUNTIME_WEB"):
        return Path(given)
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm on the PATH")
    folder = tmp_path_factory.mktemp("npm")
    words = [npm, "pack", "onnxruntime-web"]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    if done.returncode:
        pytest.skip(f"npm cannot get onnxruntime-web: {done.stderr.strip()[-200:]}")
    return next(folder.glob("*.tgz"))


@pytest.fixture(scope="module")
def page(runtime, forks, tmp_path_factory) -> Path:
    """The folder that the command writes."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="pip install -e '.[onnx]'")
    folder = tmp_path_factory.mktemp("web")
    words = ["run=shapes:student", "to=web", f"runtime={runtime}", f"out={folder / 'page'}"]
    fork = forks.command("export", words, err=folder / "err")
    assert fork.wait(900) == 0, (folder / "err").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {"page", "err"}
    return folder / "page"


@pytest.fixture(scope="module")
def tab(page):
    """The page in Chromium, from the disk; at the end no error was said, and nothing fetched."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH")
    wrong: list[str] = []
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page()
        opened.set_default_timeout(PATIENCE)
        own = (page.as_uri(), "data:", "blob:")
        opened.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
        opened.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.goto((page / "index.html").as_uri())
        opened.wait_for_function("window.student && document.body.dataset.shown")
        yield opened
        browser.close()
    assert not wrong


def painted(student, caption: str, seed: int, steps: int) -> np.ndarray:
    """What torch paints from the page's noise, uint8 [3, H, W]."""
    sampler, shape = sampler_of("shapes:student", student), student.latent_shape
    cond, levels = student.embed([caption]), sampler.grid(steps)
    x_t = torch.from_numpy(web.page_noise(seed, (1, *shape)))
    for i, level in enumerate(levels):
        x0 = student.x0(x_t, torch.tensor([level]), cond)
        if i + 1 < len(levels):
            noise = torch.from_numpy(web.page_noise(seed, (1, *shape), i + 1))
            x_t = student.process.diffuse(x0, noise, torch.tensor([levels[i + 1]]))
    return to_bytes(student.pictures(x0))[0].numpy()


def closeness(got: list[int], expected: np.ndarray) -> tuple[int, float]:
    """The largest difference of a byte, and the share of bytes that differ."""
    difference = np.abs(np.array(got) - expected.flatten().astype(int))
    return int(difference.max()), float((difference > 0).mean())


@pytest.mark.slow
def test_the_page_paints_what_torch_paints(tab, student):
    with torch.no_grad():
        for caption, seed, steps in (
            ("a large red star on black", 0, 1),
            ("a small blue circle to the left of a green square", 4294967295, 2),
            ("a striped yellow cross on pink", 7, 4),
        ):
            got = tab.evaluate(
                "async ([c, seed, n]) => [...await student.picture(c, seed, n)]",
                [caption, seed, steps],
            )
            expected = painted(student, caption, seed, steps)
            most, share = closeness(got, expected)
            assert most <= 1, (steps, most, share)
            assert share < 0.01
            assert expected.std() > 5


@pytest.mark.slow
def test_one_types_and_the_pictures_change(tab, student, page):
    read = "i => [...document.querySelectorAll('canvas')[i].getContext('2d')" + (
        ".getImageData(0, 0, 64, 64).data]"
    )

    def canvas(i: int) -> list[int]:
        whole = np.array(tab.evaluate(read, i)).reshape(64, 64, 4)
        assert (whole[..., 3] == 255).all()
        return whole[..., :3].transpose(2, 0, 1).flatten().tolist()

    def shown(*settings) -> None:
        tab.wait_for_function(
            "wanted => document.body.dataset.shown === wanted",
            arg=json.dumps(settings, separators=(",", ":"), ensure_ascii=False),
        )

    first = "a large red star on black"
    shown(first, 0, "1")
    with torch.no_grad():
        assert closeness(canvas(0), painted(student, first, 0, 1))[0] <= 1
        assert closeness(canvas(3), painted(student, first, 3, 1))[0] <= 1
        tab.fill("#caption", "a blue ring")
        tab.fill("#caption", "a small green triangle on white")  # drops the one before
        tab.check("input[name=steps][value='2']")
        tab.click("#another")
        shown("a small green triangle on white", 4, "2")
        expected = painted(student, "a small green triangle on white", 5, 2)
        assert closeness(canvas(1), expected)[0] <= 1
    assert "s a picture, in this browser" in tab.inner_text("#status")
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / "onnx_page.png")


@pytest.mark.slow
def test_captions_in_the_browser(tab, student):
    texts = many_captions(60)
    got = tab.evaluate("texts => texts.map(t => student.tokenizers.tokenizer.ids(t))", texts)
    tokenizer = student.pipeline.tokenizer
    how = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    assert got == tokenizer(texts, **how).input_ids


@pytest.mark.slow
def test_what_lies_beside_the_page(page):
    names = {path.name for path in page.iterdir()}
    own = {"files.js", "runtime.js", "tokenizer.js", "sampling.js", "page.js", "style.css"}
    assert names == {"index.html", *own}
    assert sum(path.stat().st_size for path in page.iterdir()) < 30e6
