"""One picture of some runs: the same prompts and noise across, a sampler down, the teacher first.

    python experiments/methods_on_shapes/grid.py grid.png name=folder [name=folder ...]

A folder is a run's, or one that holds a run's evaluation.json and comparison.png. The pictures of a
study, and that of all methods, are made by `experiments/run.py`.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from runner.pictures import labelled, rows_of, sheet  # noqa: E402

STEPS = (1, 4)  # of the student


def main() -> None:
    out, *words = sys.argv[1:]
    named = (word.split("=", 1) for word in words)
    found = {name: rows_of(Path(folder)) for name, folder in named}
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
