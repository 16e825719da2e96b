"""Put runs side by side: a table, a CSV and one page with pictures. Seeds of the same settings are
one line.

    python -m distill.compare runs='runs/*'
    python -m distill.compare runs=[runs/ladd,runs/add] by_name=true out=ladd_or_add
"""

import glob
import os
from pathlib import Path

from omegaconf import DictConfig
from yaml import YAMLError

from distill.config.errors import command, sentence
from distill.storage.atomic import write_text_atomic
from distill.storage.locks import one_writer
from distill.terminal.shown import shown
from distill.training.run_folders import check_ours


@command("compare")
def main(cfg: DictConfig) -> None:
    """Write `compare.md`, `compare.csv` and `compare.html` into `out`.

    Runs that cannot be read are named and left out. Raises ValueError or OSError if none is left.
    """
    from distill.evaluation.tables import as_markdown
    from distill.report.comparison import page
    from distill.report.runs import (
        as_csv,
        grouped,
        lines_of,
        read_comparable,
        read_run,
        text_table,
    )

    check_ours(Path(cfg.out), "out", "compare.md", "compare.csv", "compare.html")
    patterns = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    places = (os.path.expanduser(str(pattern)) for pattern in patterns)
    found = [Path(path) for place in places for path in sorted(glob.glob(place))]
    folders = [f.parent for path in found for f in sorted(path.glob("**/run.json"))]
    evaluated, damaged = [], {}
    for folder in dict.fromkeys(folders):
        try:
            if (folder / "evaluation.json").is_file():
                read_run(folder)
                evaluated.append(folder)
        except (OSError, ValueError, YAMLError) as error:
            damaged[folder] = shown(sentence(error))
    if not evaluated and damaged:
        raise ValueError(f"runs={', '.join(map(str, patterns))}: {next(iter(damaged.values()))}")
    runs = read_comparable(evaluated)
    if not runs:
        what = "no runs"
        if folders:
            what = (
                f"{len(set(folders))} runs, none evaluated yet: python -m distill.evaluate run=..."
            )
        raise FileNotFoundError(f"runs={', '.join(map(str, patterns))}: {what}")
    for folder in sorted(set(folders) - set(evaluated)):
        if folder in damaged:
            print(f"left out, damaged: {damaged[folder]}")
        else:
            print(f"left out, not evaluated yet: {shown(folder)}")
    groups, out = grouped(runs, by_name=cfg.by_name), Path(cfg.out)
    table = as_markdown(text_table(lines_of(groups)))
    with one_writer(out, "out"):
        write_text_atomic(out / "compare.md", table)
        write_text_atomic(out / "compare.csv", as_csv(groups))
        write_text_atomic(out / "compare.html", page(groups))
    print(table)
    print(f"wrote {out / 'compare.html'}, compare.md, compare.csv")


if __name__ == "__main__":
    main()
