"""The report: complete from a whole run, honest about a torn one, safe with any text, and one file
for ever.
"""

import base64
import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw

from distill.report import write_report
from distill.report.curves import chart_figure

HOSTILE = "<script>alert(1)</script>"
CHARTS = [
    "Student&#x27;s losses", "Discriminator&#x27;s losses", "Logits", "Gap by head",
    "Discriminator&#x27;s accuracy",
    "Gradient norms", "Learning rates", "Update-to-weight ratio", "Speed",
]  # fmt: skip
COLOURS = {"#7d8189", "#3b7ddd", "#e0662e", "#1fa37a", "#9a5fd0", "#b8921a", "#d9518f"}
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Fails on tags that do not balance; collects the words, the tags and what the page would
    load.
    """

    def __init__(self, page: str):
        super().__init__()
        self.open, self.words, self.tags, self.loads, self.ids = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(folder) -> tuple[str, Reader]:
    path = write_report(folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    return page, Reader(page)


def drawings(page) -> list[str]:
    return [
        base64.b64decode(data).decode()
        for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    ]


def write_run(folder, **more):
    facts = {
        "name": "ladd-shapes", "command": "python -m distill.run method=ladd teacher=shapes",
        "started": "2026-01-02",
        "wall_seconds": 4000, "train_seconds": 3700.0, "images_seen": 64000, "steps": 2000,
        "commit": "0123abc",
        "versions": {"torch": "2.11.0", "lightning": "2.6.6"}, "hardware": "2 CPU cores",
        "method": "LADD",
        "teacher": "SD3", "status": "finished",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts | more), encoding="utf-8")
    (folder / "config.yaml").write_text(
        "method:\n  r1_weight: 0.1\nnote: '<b>&'\n", encoding="utf-8"
    )


def write_metrics(folder, steps=200, heads=3):
    """As Lightning's CSVLogger: one header of all columns, rows in which the cells of other loggers
    are empty.
    """
    draw = random.Random(0)
    columns = [
        "step",
        "images_seen",
        "images_per_second",
        "g/adv",
        "g/distill",
        "g/grad_norm",
        "g/lr",
        "g/update_ratio",
    ]
    columns += ["d/adv", "d/r1", "d/real", "d/fake", "d/accuracy", "d/grad_norm", "d/lr"]
    columns += [f"d/{side}_head{k}" for side in ("real", "fake") for k in range(heads)]
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        for step in range(1, steps + 1):
            u, noise = step / steps, draw.gauss(0, 0.15)
            gap = 1.2 * math.exp(-3 * u) + 0.3
            row = {
                "step": step,
                "images_seen": 32 * step,
                "g/adv": gap / 2 + noise,
                "g/distill": 0.4 * math.exp(-u),
            }
            row |= {
                "d/adv": 2 - gap + noise,
                "d/r1": 0.05 + abs(noise) / 5,
                "d/real": gap / 2,
                "d/fake": noise - gap / 2,
            }
            row |= {
                "d/accuracy": min(1, 0.5 + gap / 3 + noise / 5),
                "g/lr": 1e-4 * min(1, 9 * u),
                "d/lr": 2e-4,
            }
            row |= {
                "g/grad_norm": math.exp(noise * 3),
                "d/grad_norm": 4 * math.exp(draw.gauss(0, 0.5)),
            }
            for k in range(heads):
                row |= {
                    f"d/real_head{k}": gap * k / 3 + draw.gauss(0, 0.1),
                    f"d/fake_head{k}": -gap / 2,
                }
            rows.writerow(row)
            if step % 10 == 0:
                rows.writerow(
                    {
                        "step": step,
                        "images_per_second": 30 + noise,
                        "g/update_ratio": 1e-3 * math.exp(noise),
                    }
                )


def row(who, steps, accuracy, frechet, seconds):
    more = {
        "kind": 0.97,
        "colour": 0.99,
        "stripe_sharpness": 0.8 + accuracy / 5,
        "precision": 0.7,
        "recall": accuracy / 2,
    }
    return {
        "who": who,
        "steps": steps,
        "prompt_accuracy": accuracy,
        "frechet": frechet,
        "seconds_per_image": seconds,
        **more,
    }


def write_evaluation(folder, rows=None):
    protocol = {
        "prompts": 400,
        "seed": 0,
        "teacher guidance": 3.0,
        "feature network": "reader of shapes, 96 features",
    }
    rows = rows or [
        row("teacher", 1, 0.31, 80.25, 0.012),
        row("teacher", 4, 0.62, 30.5, 0.045),
        row("teacher", 28, 0.952, 4.125, 0.31),
        row("student", 1, 0.93, 12.375, 0.006),
        row("student", 2, 0.94, 9.5, 0.012),
        row("student", 4, 0.95, 7.75, 0.024),
    ]
    (folder / "evaluation.json").write_text(
        json.dumps({"protocol": protocol, "rows": rows}), encoding="utf-8"
    )


def grid(path, columns, rows, seed=0):
    """Coloured shapes in squares of 64 pixels, two apart, as torchvision lays them out."""
    draw = random.Random(seed)
    picture = Image.new("RGB", (66 * columns + 2, 66 * rows + 2))
    pen = ImageDraw.Draw(picture)
    for i in range(columns * rows):
        x, y = 66 * (i % columns) + 2, 66 * (i // columns) + 2
        pen.rectangle(
            (x, y, x + 63, y + 63), fill=draw.choice(["#dddddd", "#efe6d0", "#cfe0ee", "#303848"])
        )
        corner, size = draw.randrange(6, 24), draw.randrange(16, 32)
        box = (x + corner, y + corner, x + corner + size, y + corner + size)
        (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(
            box, fill=draw.choice(["#c33", "#2a6", "#36c", "#e90"])
        )
    picture.save(path)


def write_samples(folder, frames=12):
    samples = folder / "samples"
    samples.mkdir()
    for i in range(frames):
        grid(samples / f"step_{200 * i:06d}.png", 8, 2, seed=i)
    grid(samples / "comparison.png", 16, 6)
    prompts = [
        HOSTILE,
        *(f"a small red striped circle left of a large blue square, number {i}" for i in range(15)),
    ]
    (samples / "captions.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path)
    write_metrics(tmp_path)
    write_evaluation(tmp_path)
    write_samples(tmp_path)
    return tmp_path


def test_a_whole_run_is_one_file_that_loads_nothing(run):
    page, reader = read(run)
    assert all(value.startswith(("data:", "#")) for value in reader.loads), reader.loads
    assert not re.search(r"url\((?!#)|@import", page)
    assert "script" not in reader.tags
    assert reader.ids == ["pictures", "evaluation", "training", "run"]


def test_alarms_stand_above_the_curves_with_their_steps(run):
    assert "alarm" not in read(run)[1].text  # of a run that nobody watched nothing is claimed
    (run / "alarms.jsonl").write_text("", encoding="utf-8")
    assert "No health alarm was raised." in read(run)[1].text
    raised = [(50, HOSTILE), (150, "it has collapsed"), (1250, HOSTILE)]
    rows = [json.dumps({"step": step, "alarm": said}) for step, said in raised]
    (run / "alarms.jsonl").write_text(
        "\n".join([*rows, "[1]", '{"step": 1300, "al']), encoding="utf-8"
    )
    page, reader = read(run)
    assert f"Health alarm at steps 50, 1,250: {HOSTILE}." in reader.text
    assert "Health alarm at step 150: it has collapsed." in reader.text
    assert HOSTILE not in page
    assert page.index("Health alarm") < page.index('class="charts"')
    many = [json.dumps({"step": 50 * k, "alarm": "again"}) for k in range(40)]
    (run / "alarms.jsonl").write_text("\n".join(many), encoding="utf-8")
    assert "500, 550 and 28 more: again." in read(run)[1].text


def test_the_headline_and_the_key_figures_come_from_the_rows(run):
    text = read(run)[1].text
    assert (
        "In 1 step the student gets 93.0% of prompts right; its teacher, 95.2% in 28 steps and"
        " 31.0% in 1 step." in text
    )
    assert "Student, prompts right 93.0% in 1 step" in text
    assert "Teacher, prompts right 95.2% in 28 steps" in text
    assert "Student, Fréchet distance 12.4 in 1 step" in text
    assert "Teacher, Fréchet distance 4.1 in 28 steps" in text
    assert "Training time 1:01:40 2,000 steps, 64,000 images" in text
    for said in (
        "LADD",
        "0123abc",
        "2 CPU cores",
        '"torch": "2.11.0"',
        "python -m distill.run method=ladd",
    ):
        assert said in text


def test_every_chart_is_drawn_on_any_background(run):
    page, reader = read(run)
    for title in CHARTS:
        assert f"<h3>{title}</h3>" in page
    pictures = drawings(page)
    assert len(pictures) == len(CHARTS)
    for svg in pictures:
        ElementTree.fromstring(svg)
        assert "mathdefault" not in svg, "a number of a log scale reads as a formula's code"
        assert set(re.findall(r"(?:fill|stroke): ?(#\w+)", svg)) <= COLOURS, (
            "not seen on white and on black"
        )
    assert "head 2" in pictures[CHARTS.index("Gap by head")]
    assert reader.tags.count("img") == 8 + 1 + len(CHARTS)
    assert "Step 0" in reader.text
    assert "Step 2,200" in reader.text


def test_words_of_a_vertical_axis_lie_within_the_picture():
    """Their left end by the font's own widths; which numbers stand there depends on the range."""
    font, places = FontProperties(size=8.5), []
    for low, high in (
        (0.81, 4.38),
        (1.18, 4.39),
        (0, 1),
        (-6, 0),
        (0.5, 12),
        (-0.02, 0.03),
        (100, 2300),
        (1e-4, 3e-4),
    ):
        page = chart_figure(
            "", "", lambda axes, y=(low, high): axes.plot([0, 1], y, label="a curve")
        )
        ends = re.findall(r'text-anchor: end[^>]*?x="([\d.]+)"[^>]*>([^<]*)<', drawings(page)[0])
        assert len(ends) > 2
        places += [
            (float(x) - TextPath((0, 0), text, prop=font).get_extents().width, text)
            for x, text in ends
        ]
    assert min(places)[0] > 0, min(places)


@pytest.mark.filterwarnings("error")  # matplotlib's, of axes that collapsed
def test_a_legend_of_many_long_rows_leaves_room_for_the_curves():
    names = [f"optimizer.student.lr=0.{i:03d}, refresh=0.01" for i in range(20)]
    page = chart_figure(
        "", "", lambda axes: [axes.plot([0, 1], [0, 1], label=name) for name in names]
    )
    assert all(name in drawings(page)[0] for name in names)


def test_the_table_marks_the_best_of_those_with_as_many_steps(run):
    page, reader = read(run)
    assert reader.tags.count("tbody") == 4, "one for each number of steps"
    body = page[page.index("<tbody>") : page.rindex("</tbody>")]
    lines = {m[1]: m[2] for m in re.finditer(r'<th scope="row">(.*?)</th>(.*?)</tr>', body)}
    assert list(lines)[:3] == ["Student, 1 step", "Teacher, 1 step", "Student, 2 steps"]
    assert lines["Student, 1 step"].startswith("<td><b>93.0%</b></td><td><b>12.4</b></td>")
    assert lines["Teacher, 1 step"].startswith("<td>31.0%</td><td>80.2</td>")
    assert "<b>" not in lines["Teacher, 28 steps"], "nothing else had 28 steps"
    assert "<b>" not in lines["Student, 2 steps"]
    assert "prompts: 400; seed: 0; teacher guidance: 3.0" in page


def test_text_from_the_run_stays_text(run):
    write_run(
        run,
        name=HOSTILE,
        command=f"run note={HOSTILE}",
        versions={HOSTILE: HOSTILE},
        status=HOSTILE,
    )
    write_evaluation(run, [row(HOSTILE, 1, 0.5, 2.0, 1.0), row("student", 1, 0.4, 2.0, 1.0)])
    page, reader = read(run)
    assert "<script" not in page.lower()
    assert reader.text.count(HOSTILE) >= 6
    assert "note: '<b>&'" in reader.text


@pytest.mark.parametrize("missing", ["run.json", "config.yaml", "metrics.csv", "evaluation.json"])
def test_a_missing_file_costs_its_own_section_only(run, missing):
    (run / missing).unlink()
    page, reader = read(run)
    assert f"This run has no {missing}" in reader.text
    assert bool(drawings(page)) == (missing != "metrics.csv")
    assert ("<table" in page) == (missing != "evaluation.json")
    assert ("<summary>Configuration" in page) == (missing != "config.yaml")


def test_an_empty_folder_has_a_report(tmp_path):
    text = read(tmp_path)[1].text
    assert "not evaluated" in text
    assert "No samples were kept" in text
    assert "not measured" in text


def test_torn_files_are_named_and_survived(run):
    (run / "evaluation.json").write_text('{"rows": [', encoding="utf-8")
    (run / "run.json").write_text('{"name": "torn', encoding="utf-8")
    (run / "samples" / "comparison.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    whole = (run / "samples" / "step_000000.png").read_bytes()
    (run / "samples" / "step_000000.png").write_bytes(whole[: len(whole) // 2])
    lines = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    (run / "metrics.csv").write_bytes(b"".join(lines[:-1]) + b"12,\0,nan,inf,oops,\xff\n201,5")
    page, reader = read(run)
    for said in (
        "evaluation.json cannot be shown",
        '{"name": "torn',
        "comparison.png cannot",
        "step_000000.png cannot",
    ):
        assert said in reader.text
    assert "not finite" in reader.text
    assert len(drawings(page)) == len(CHARTS)


def test_a_score_that_is_not_a_number_is_not_shown(run):
    write_evaluation(run, [{"who": "student", "steps": 1, "frechet": math.nan}])
    assert "no measured rows" in read(run)[1].text
    write_evaluation(run, [row("student", 1, 0.5, 2.0, 1.0), row("teacher", 1, 0.5, math.nan, 1.0)])
    page, _ = read(run)
    assert "<td>50.0%</td><td>–</td>" in page
    assert "<td>50.0%</td><td>2.0</td>" in page, "nothing to be better than"


def test_without_a_reader_the_distance_is_the_headline(run):
    rows = [
        {"who": "student", "steps": 2, "frechet": 12.375},
        {"who": "teacher", "steps": 2, "frechet": 80.25},
    ]
    write_evaluation(run, rows)
    text = read(run)[1].text
    assert (
        "In 2 steps the student has a Fréchet distance of 12.4; its teacher, 80.2 in 2 steps."
        in text
    )
    assert "Student, prompts right – not measured" in text


def test_a_run_that_stopped_says_so(run):
    write_run(run, status="stopped")
    assert "This run was stopped before its end." in read(run)[1].text


@pytest.mark.parametrize(("frames", "shown"), [(1, ["0"]), (8, None), (30, ["0", "800", "1,600"])])
def test_the_filmstrip_has_the_first_the_last_and_few_between(tmp_path, frames, shown):
    write_samples(tmp_path, frames)
    text = read(tmp_path)[1].text
    steps = re.findall(r"Step ([\d,]+)", text)
    assert len(steps) == min(frames, 8)
    assert steps[0] == "0"
    assert steps[-1] == f"{200 * (frames - 1):,}"
    if shown:
        assert steps[: len(shown)] == shown


def test_rows_of_the_comparison_are_named_by_the_evaluation(run):
    assert '<div class="names"><span>Teacher, 1 step</span>' in read(run)[0]


def test_a_large_picture_is_shrunk(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (3200, 800)).save(tmp_path / "samples" / "step_000005.png")
    assert 'width="1600" height="400"' in read(tmp_path)[0]


def test_many_heads_a_long_run_and_a_resumed_one_stay_readable(tmp_path):
    write_metrics(tmp_path, steps=5000, heads=8)
    lines = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_text("".join(lines + lines[4000:]), encoding="utf-8")
    page, _ = read(tmp_path)
    assert "median of 8" in drawings(page)[CHARTS.index("Gap by head")]
    assert len(page) < 1_500_000


def test_a_run_of_one_step_shows_its_points(tmp_path):
    write_metrics(tmp_path, steps=1)
    assert len(drawings(read(tmp_path)[0])) == len(CHARTS) - 2
