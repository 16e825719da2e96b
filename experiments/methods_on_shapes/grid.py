"""One picture of all methods: the same prompts and noise across, a sampler down, the teacher first.

    python experiments/methods_on_shapes/grid.py [grid.png] [name=folder ...]

A folder is a run's, or one that holds a run's evaluation.json and comparison.png; without any, the
committed ones. `experiments/run.py` makes the pictures of a study itself.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from runner.pictures import labelled, rows_of, sheet  # noqa: E402

STUDIES = {"LADD": "ladd_shapes", "ADD": "add_shapes", "NitroFusion": "nitrofusion_shapes"}
COMMITTED = {name: HERE.parent / study for name, study in STUDIES.items()} | {
    name: HERE / name for name in ("consistency", "regression")
}
STEPS = (1, 4)  # of the student


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "grid.png"
    named = (word.split("=", 1) for word in sys.argv[2:])
    given = {name: Path(folder) for name, folder in named} or COMMITTED
    found = {name: rows_of(folder) for name, folder in given.items() if folder.is_dir()}
    taught = next(part for part in found.values() if ("teacher", 28) in part)
    lines = [
        (labelled(who, steps), pictures)
        for (who, steps), pictures in taught.items()
        if who == "teacher" and steps > 1
    ]
    for name, part in found.items():
        lines += [(labelled(name, n), part["student", n]) for n in STEPS if ("student", n) in part]
    sheet(lines).save(out, optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
