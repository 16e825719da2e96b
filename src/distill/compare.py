"""Put runs side by side: a table, a CSV and one page with pictures. Seeds of the same settings make
one line.

    python -m distill.compare runs='runs/*'
    python -m distill.compare runs=[runs/ladd,runs/add] by_name=true out=ladd_or_add
"""

import glob
from pathlib import Path

from omegaconf import DictConfig

from distill.aside import put_text
from distill.errors import command
from distill.locks import one_writer


@command("compare")
def main(cfg: DictConfig) -> None:
    """Write `compare.md`, `compare.csv` and `compare.html` into `out`; what cannot be read is named and left out.

    The exit code is 0 as long as one run can be shown.
    """
    from distill.report.comparison import page
    from distill.report.runs import as_csv, as_markdown, grouped, lines_of, read_run

    patterns = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    found = [Path(path) for pattern in patterns for path in sorted(glob.glob(str(pattern)))]
    folders = [f.parent for path in found for f in sorted(path.glob("**/run.json"))]
    runs, without = [], []
    for folder in dict.fromkeys(folders):
        try:
            if (folder / "evaluation.json").is_file():
                runs.append(read_run(folder))
            else:
                without.append(f"left out, not judged yet: {folder}")
        except ValueError as error:
            without.append(f"left out, damaged: {error}")
    for sentence in sorted(without):
        print(sentence)
    if not runs:
        what = "no runs"
        if folders:
            what = f"{len(set(folders))} runs, none judged yet: python -m distill.evaluate run=..."
        raise FileNotFoundError(f"runs={', '.join(map(str, patterns))}: {what}")
    groups, out = grouped(runs, by_name=cfg.by_name), Path(cfg.out)
    table = as_markdown(lines_of(groups))
    with one_writer(out, "out"):
        put_text(out / "compare.md", table)
        put_text(out / "compare.csv", as_csv(groups))
        put_text(out / "compare.html", page(groups))
    print(table)
    print(f"wrote {out / 'compare.html'}, compare.md, compare.csv")


if __name__ == "__main__":
    main()
