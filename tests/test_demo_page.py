"""`python -m distill.demo` in a browser: one types, and the pictures change.

It needs gradio (the extra `demo`), playwright from PyPI, and a Chromium on the PATH (Debian's
package `chromium`). DEMO_SCREENSHOTS=<folder> keeps the pictures of the last test.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
PATIENCE = 180_000  # milliseconds: of a machine that does much else
COLUMNS = ".board > .drawn"
PROMPT = "#prompt textarea"
FIRST = "a large red star on black"


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """What the command is given: nothing, where a student is shipped."""
    from distill.config.compose import SHIPPED, shipped

    if (Path(shipped(f"{SHIPPED}mmdit")).parent / "student").is_dir():
        return []
    from distill import students
    from distill.config.models import student_of
    from distill.sampling import Consistency

    teacher, folder = student_of("shapes:mmdit"), tmp_path_factory.mktemp("run")
    scheduler = Consistency().scheduler(teacher.network, teacher)
    students.save_pipeline(teacher.network, teacher, folder / "student", scheduler)
    (folder / "config.yaml").write_text(
        "teacher: {_target_: distill.teachers.sd3.SD3, path: 'shapes:mmdit'}\n"
        "sampler: {_target_: distill.sampling.Consistency}\n",
        encoding="utf-8",
    )
    return [f"run={folder}"]


@pytest.fixture(scope="module")
def address(options, tmp_path_factory):
    """Of the page of the command, which runs until the last test has ended."""
    folder = tmp_path_factory.mktemp("cwd")
    command = [sys.executable, "-u", "-m", "distill.demo", "port=0", "open=false", *options]
    log = folder / "log"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, cwd=folder) as demo,
    ):
        try:
            yield _address(demo, log)
        finally:
            demo.send_signal(signal.SIGINT)
            demo.wait(30)
    assert demo.returncode == 0, log.read_text(encoding="utf-8")
    first, *between, last = log.read_text(encoding="utf-8").splitlines()
    assert first.startswith("loading ")
    assert any(line.startswith("the page is at http://127.0.0.1:") for line in between)
    assert re.fullmatch(r"\d+ requests, \d+ of them dropped for newer ones", last)
    assert list(folder.iterdir()) == [log]


def _address(demo: subprocess.Popen, log: Path) -> str:
    until = time.monotonic() + 900
    while demo.poll() is None and time.monotonic() < until:
        if found := re.search(r"the page is at (\S+);", log.read_text(encoding="utf-8")):
            return found[1]
        time.sleep(0.1)
    pytest.fail("the command did not open a page: " + log.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def tab(browser, address):
    """Opens the page; at the end nothing has been fetched from elsewhere, and no error was said."""
    contexts, wrong = [], []

    def opened(width=1280, height=900, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        own = (address, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        settled(page, FIRST)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def settled(page, text):
    """Wait until every column that is shown was drawn, or refused, for this text."""
    page.wait_for_function(
        """text => {
            const columns = [...document.querySelectorAll('.board > .drawn')];
            const done = column => !column.classList.contains('old')
                && column.querySelector('img, .refused')
                && [...column.querySelectorAll('img')].every(i => i.alt.startsWith(text + ';'));
            return columns.length > 0 && columns.every(done);
        }""",
        arg=text,
    )


def source(page, column):
    return page.get_attribute(f"#{column} img", "src")


def pixels(source):
    with Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return np.asarray(picture, dtype=int)


def counted(page):
    names = ("data-requests", "data-dropped")
    return [int(page.get_attribute(".status", name)) for name in names]


def test_pictures_change_as_one_types(tab):
    page = tab()
    columns = ("student-1", "student-2", "student-4", "teacher")
    before = [source(page, column) for column in columns]
    assert all(image.startswith("data:image/png;base64,") for image in before)
    assert page.locator(COLUMNS).count() == 4
    page.fill(PROMPT, "a large blue star on black")
    settled(page, "a large blue star on black")
    after = [source(page, column) for column in columns]
    assert all(a != b for a, b in zip(before, after, strict=True))
    times = page.locator(f"{COLUMNS} .time").all_inner_texts()
    assert len(times) == 4
    assert all(re.fullmatch(r"[\d,]+ ms", said) for said in times)
    assert re.match(r"large [✓✗]", page.inner_text("#teacher .words li"))
    page.fill(PROMPT, FIRST)
    settled(page, FIRST)
    assert [source(page, column) for column in columns] == before  # a seed is fixed noise


def test_what_was_typed_since_drops_what_was_asked_before(tab):
    page, other = tab(), tab()
    box = page.locator(PROMPT)
    requests, dropped = counted(page)
    begun = source(other, "teacher")
    text = "a small striped green triangle on pink"
    box.fill("")
    box.press_sequentially(text, delay=15)
    settled(page, text)
    now = counted(page)
    assert now[0] - requests >= len(text) / 2
    assert now[1] - dropped >= (now[0] - requests) / 2
    assert source(other, "teacher") == begun  # another tab keeps what it shows
    assert "on pink ✓" in page.inner_text("#teacher .words") or page.inner_text("#teacher .wrong")


def test_settings_change_the_columns(tab):
    page = tab()
    alone = source(page, "student-2")
    page.get_by_label("number input for Pictures").fill("3")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#teacher img').length == 3")
    settled(page, FIRST)
    assert abs(pixels(source(page, "student-2")) - pixels(alone)).max() <= 2  # rounding
    page.check("input[type=checkbox][name='3']")
    page.wait_for_selector("#student-3 img")
    page.uncheck("input[type=checkbox][name='1']")
    page.wait_for_selector("#student-1", state="detached")
    page.get_by_label("Seed").fill("5")
    page.wait_for_selector("#teacher img[alt$='seed 7']")
    assert source(page, "student-2") != alone


def test_one_begins_from_a_picture(tab, tmp_path):
    page = tab()
    before = [source(page, column) for column in ("student-2", "student-4", "teacher")]
    Image.new("RGB", (128, 96), (20, 160, 60)).save(tmp_path / "green.png")
    page.set_input_files("input[type=file]", tmp_path / "green.png")
    page.wait_for_selector("#student-1 .refused")
    settled(page, FIRST)
    assert "strength 0.5 of 1 step leaves no step" in page.inner_text("#student-1")
    after = [source(page, column) for column in ("student-2", "student-4", "teacher")]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_what_cannot_be_drawn_or_read_is_said_on_the_page(tab):
    page = tab()
    box = page.locator(PROMPT)
    box.fill(" ")
    page.wait_for_selector("text=Type what the picture should show.")
    box.fill("a photo of a cat")
    settled(page, "a photo of a cat")
    assert page.locator("text=not read: the text is no caption of shapes").count() == 4
    box.fill("a red star " * 60)
    page.wait_for_selector("text=The text is longer than the model reads")
    box.fill("<img src=x onerror=alert(1)>")
    settled(page, "<img src=x onerror=alert(1)>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_it_fits_a_laptop_and_a_phone(tab, width, height, scheme, tmp_path):
    page = tab(width, height, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    places = [box.bounding_box() for box in page.locator(f"{COLUMNS} img").all()]
    assert len(places) == 4
    assert all(place["x"] >= 0 and place["x"] + place["width"] <= width for place in places)
    assert all(place["width"] >= 140 for place in places)
    assert places[0]["y"] + places[0]["height"] < height  # seen without scrolling
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    folder = Path(os.environ.get("DEMO_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"page-{width}-{scheme}.png", full_page=True)
