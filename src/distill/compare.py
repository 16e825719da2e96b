"""Put runs side by side: a table, a CSV and one page with pictures. Seeds of the same settings make
one line.

    python -m distill.compare runs='runs/*'
    python -m distill.compare runs=[runs/ladd,runs/add] by_name=true out=ladd_or_add
"""

import glob
import os
from pathlib import Path

from omegaconf import DictConfig
from yaml import YAMLError

from distill.errors import command, sentence
from distill.shown import shown


@command("compare")
def main(cfg: DictConfig) -> None:
    """Write `compare.md`, `compare.csv` and `compare.html` into `out`."""
    from distill.report.comparison import page
    from distill.report.runs import as_csv, as_markdown, grouped, lines_of, read_run

    patterns = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    places = (os.path.expanduser(str(pattern)) for pattern in patterns)
    found = [Path(path) for place in places for path in sorted(glob.glob(place))]
    folders = [f.parent for path in found for f in sorted(path.glob("**/run.json"))]
    runs, damaged = [], {}
    for folder in dict.fromkeys(folders):
        try:
            runs += [read_run(folder)] if (folder / "evaluation.json").is_file() else []
        except (OSError, ValueError, YAMLError) as error:
            damaged[folder] = shown(sentence(error))
    if not runs and damaged:
        raise ValueError(f"runs={', '.join(map(str, patterns))}: {next(iter(damaged.values()))}")
    if not runs:
        what = (
            f"{len(folders)} runs, none judged yet: python -m distill.evaluate run=..."
            if folders
            else "no runs"
        )
        raise FileNotFoundError(f"runs={', '.join(map(str, patterns))}: {what}")
    for folder in sorted(set(folders) - {run.folder for run in runs}):
        why = damaged.get(folder, "not judged yet")
        print(f"left out, {why}: {shown(folder)}")
    groups, out = grouped(runs, by_name=cfg.by_name), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    table = as_markdown(lines_of(groups))
    (out / "compare.md").write_text(table, encoding="utf-8", errors="backslashreplace")
    (out / "compare.csv").write_text(as_csv(groups), encoding="utf-8", errors="backslashreplace")
    (out / "compare.html").write_text(page(groups), encoding="utf-8", errors="backslashreplace")
    print(table)
    print(f"wrote {out / 'compare.html'}, compare.md, compare.csv")


if __name__ == "__main__":
    main()
