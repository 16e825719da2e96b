"""Put runs side by side: a table, a CSV and one page with pictures. Seeds of the same settings make
one line.

    python -m distill.compare runs='runs/*'
    python -m distill.compare runs=[runs/ladd,runs/add] by_name=true out=ladd_or_add
"""

import glob
from pathlib import Path

from omegaconf import DictConfig

from distill.errors import command


@command("compare")
def main(cfg: DictConfig) -> None:
    """Write `compare.md`, `compare.csv` and `compare.html` into `out`."""
    from distill.report.comparison import page
    from distill.report.runs import as_csv, as_markdown, grouped, lines_of, read_alike

    patterns = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    found = [Path(path) for pattern in patterns for path in sorted(glob.glob(str(pattern)))]
    folders = [f.parent for path in found for f in sorted(path.glob("**/run.json"))]
    judged = [f for f in dict.fromkeys(folders) if (f / "evaluation.json").is_file()]
    runs = read_alike(judged)
    if not runs:
        what = (
            f"{len(folders)} runs, none judged yet: python -m distill.evaluate run=..."
            if folders
            else "no runs"
        )
        raise FileNotFoundError(f"runs={', '.join(map(str, patterns))}: {what}")
    for folder in sorted(set(folders) - {run.folder for run in runs}):
        print(f"left out, not judged yet: {folder}")
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
