"""One picture of all methods: the same prompts and noise across, a sampler down, the teacher first.

    python experiments/methods_on_shapes/grid.py [grid.png] [name=folder ...]

A folder is a run's, or one that holds a run's evaluation.json and comparison.png; without any, the
committed ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from distill.evaluation.results import PADDING
from distill.report.comparison import tiles

HERE = Path(__file__).parent
STUDIES = {"LADD": "ladd_shapes", "ADD": "add_shapes", "NitroFusion": "nitrofusion_shapes"}
COMMITTED = {name: HERE.parent / study for name, study in STUDIES.items()} | {
    name: HERE / name for name in ("consistency", "regression")
}
STEPS, SHOWN, LABEL = (1, 4), 14, 150  # of the student, pictures a row, pixels


def rows(folder: Path) -> dict[tuple[str, int], list[Image.Image]]:
    """(who, steps) -> its pictures, cut from the comparison of a run."""
    path = next(
        p for p in (folder / "comparison.png", folder / "samples" / "comparison.png") if p.is_file()
    )
    judged = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    cut = zip(judged, tiles(path, len(judged)), strict=True)
    return {(row["who"], row["steps"]): pictures[:SHOWN] for row, pictures in cut}


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "grid.png"
    given = {
        name: Path(folder) for name, folder in (word.split("=", 1) for word in sys.argv[2:])
    } or COMMITTED
    found = {
        name: rows(folder)
        for name, folder in given.items()
        if (folder / "evaluation.json").is_file()
    }
    taught = next(part for part in found.values() if ("teacher", 28) in part)
    lines = [
        (f"teacher, {n} steps", row)
        for (who, n), row in taught.items()
        if who == "teacher" and n > 1
    ]
    for name, part in found.items():
        lines += [
            (f"{name}, {n} step{'s' * (n > 1)}", part["student", n])
            for n in STEPS
            if ("student", n) in part
        ]
    side = lines[0][1][0].width + PADDING
    sheet = Image.new("RGB", (LABEL + SHOWN * side, side * len(lines)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (label, pictures) in enumerate(lines):
        draw.text((4, i * side + side // 2 - 9), label, "black", font)
        for k, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL + k * side, i * side))
    sheet.save(out, optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
