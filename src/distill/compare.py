"""Put runs side by side: a table, a CSV and one page with pictures. Seeds of the same settings are
one line. Means and differences have 95 % intervals over seeds and prompts.

    python -m distill.compare runs='runs/*'
    python -m distill.compare runs=[runs/ladd,runs/add] by_name=true out=ladd_or_add
    python -m distill.compare runs='runs/*' judge=reader
    python -m distill.compare runs=[runs/ladd,runs/add] votes=true
    python -m distill.compare runs=[runs/ladd,runs/add] votes=votes.json
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from yaml import YAMLError

from distill.config.errors import command, sentence
from distill.storage.atomic import write_text_atomic
from distill.storage.locks import one_writer
from distill.terminal.shown import shown
from distill.training.run_folders import check_ours

WRITTEN = ("compare.md", "compare.csv", "compare.html", "wins.md", "wins.csv", "wins.json")
BALLOT = ("votes.html", "votes_key.json")


@command("compare")
def main(cfg: DictConfig) -> None:
    """Write `compare.md`, `compare.csv` and `compare.html` into `out`.

    With `judge` or files of `votes` also `wins.md`, `wins.csv` and `wins.json`: pairwise win rates
    and ELO ratings. With votes=true also `votes.html`, a page of blind votes, and `votes_key.json`.
    Runs that cannot be read are named and left out. Raises ValueError or OSError if none is left.
    """
    from distill.report.blind import ballot
    from distill.report.comparison import page
    from distill.report.differences import as_text
    from distill.report.judged import as_csv as wins_csv
    from distill.report.judged import as_json as wins_json
    from distill.report.judged import as_text as wins_text
    from distill.report.judged import judged
    from distill.report.people import people
    from distill.report.runs import as_csv, grouped, lines_of

    files, out = _voted(cfg.votes), Path(cfg.out)
    _check_steps(cfg.votes, cfg.votes_steps)
    asked = cfg.votes is True
    if type(cfg.seed) is not int or cfg.seed < 0:
        raise ValueError(f"seed={cfg.seed}: is no number from 0; give one")
    check_ours(out, "out", *WRITTEN, *(BALLOT if asked else ()))
    groups = grouped(_runs(cfg.runs), by_name=cfg.by_name)
    lines = lines_of(groups)
    table = as_text(lines)
    verdicts = [judged(lines, str(cfg.judge))] if cfg.judge is not None else []
    verdicts += [people(files, groups, out)] if files else []
    written = {"compare.md": table, "compare.csv": as_csv(groups)}
    if asked:
        written |= dict(zip(BALLOT, ballot(groups, cfg.seed, cfg.votes_steps), strict=True))
    written["compare.html"] = page(groups, BALLOT[0] if asked else "", verdicts)
    if verdicts:
        written |= {"wins.md": wins_text(verdicts), "wins.csv": wins_csv(verdicts)}
        written["wins.json"] = wins_json(verdicts)
    with one_writer(out, "out"):
        for name, text in written.items():
            write_text_atomic(out / name, text)
    print(table)
    if verdicts:
        print(written["wins.md"])
    print(f"wrote {out / 'compare.html'}, compare.md, compare.csv")
    if asked:
        print(f"wrote {out / BALLOT[0]} to vote on, and its key, {BALLOT[1]}, to keep back")


def _voted(votes: Any) -> list[Path]:
    """The files of `votes`; none for null, true and false."""
    if votes is None or isinstance(votes, bool):
        return []
    listed = [votes] if isinstance(votes, str) else votes
    texts = isinstance(listed, Sequence) and all(isinstance(file, str) for file in listed)
    if not texts or not listed or "" in listed:
        raise ValueError(f"votes={votes}: is no file; give true, a votes.json, or a list of these")
    files = [Path(file).expanduser() for file in listed]
    known: dict[Path, Path] = {}
    for file in files:
        if (first := known.setdefault(file.resolve(), file)) is not file:
            what = f"is given twice, also as {shown(first)}, and a file is the votes of one person"
            raise ValueError(f"votes={file}: {what}; name it once")
    return files


def _check_steps(votes: Any, steps: Any) -> None:
    """Raise ValueError for a number of steps that is none, or without votes."""
    if steps is None:
        return
    if type(steps) is not int or steps < 1:
        raise ValueError(f"votes_steps={steps}: must be a whole number, 1 or more")
    if not votes:
        what = "has no effect without votes; add votes=true, or leave it out"
        raise ValueError(f"votes_steps={steps}: {what}")


def _runs(asked: Any) -> list[Any]:
    """The evaluated runs of these patterns. Names those that are left out."""
    from distill.report.runs import read_comparable, read_run

    patterns = [asked] if isinstance(asked, str) else list(asked)
    folders, without = [], []
    for pattern in patterns:
        found = [Path(path) for path in sorted(glob.glob(os.path.expanduser(str(pattern))))]
        inside = [f.parent for path in found for f in sorted(path.glob("**/run.json"))]
        folders += inside
        without += [] if inside else [pattern]
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
    for pattern in without:
        print(f"left out, no runs there: {shown(pattern)}")
    return runs


if __name__ == "__main__":
    main()
