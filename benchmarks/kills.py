"""Kill every long command at random points, give it again, and count what is lost.

    python benchmarks/kills.py trials=100 seed=0
    python benchmarks/kills.py trials=20 commands=run,synthesize out=kills

Each trial is a line of `<out>/trials.jsonl`; the same command resumes where it was stopped. At
the end a table is printed; with docs=true it is also written into docs/understand/guarantees.md.
tests/kills.py says what is killed and compared.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
START, END = "<!-- kills: written by benchmarks/kills.py -->", "<!-- end of kills -->"
SEARCHES = 10  # ours: of so many trials one is a search, whose runs are processes of their own


def plan(trials: int, commands: list[str]) -> list[str]:
    """The command of each trial: all in turn, but for the search, which takes long."""
    quick = [name for name in commands if name != "search"]
    found = []
    for i in range(trials):
        slow = "search" in commands and (i % SEARCHES == SEARCHES - 1 or not quick)
        found.append("search" if slow else quick[(i - i // SEARCHES) % len(quick)])
    return found


def table(results: list[dict]) -> str:
    """Trials, kills, how many ended as undisturbed, what was lost and what stayed behind, by
    command.
    """
    rows = ["| command | trials | killed | survived | lost | litter |", "|---|---|---|---|---|---|"]
    groups = {result["command"]: Counter() for result in results}
    for result in results:
        count, lost = groups[result["command"]], bool(result["code"] or result["lost"])
        count.update(trials=1, killed=int(result["killed"]), survived=int(not lost), lost=int(lost))
        count.update(litter=int(bool(result["litter"])))
    total = sum(groups.values(), Counter())
    for name, count in [*groups.items(), ("**all**", total)]:
        cells = [count[key] for key in ("trials", "killed", "survived", "lost", "litter")]
        rows.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def machine() -> str:
    from distill.machine.hardware import cpu, hardware

    return (
        f"{hardware()}, {cpu()}, one thread, {platform.system()}, Python"
        f" {platform.python_version()}"
    )


def into_docs(text: str) -> None:
    page = ROOT / "docs" / "understand" / "guarantees.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    from kills import COMMANDS, World, prepare

    options = {"trials": "100", "seed": "0", "commands": ",".join(COMMANDS), "out": "kills"}
    options |= dict(word.split("=", 1) for word in sys.argv[1:])
    out, seed, names = Path(options["out"]).resolve(), int(options["seed"]), options["commands"]
    prepare()
    world, file = World(out), out / "trials.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    done = {result["seed"]: result for result in map(json.loads, lines)}
    for i, name in enumerate(plan(int(options["trials"]), names.split(","))):
        if seed + i in done and done[seed + i]["command"] == name:
            continue
        done[seed + i] = result = world.trial(name, seed + i)
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(result) + "\n")
        said = [f"{key} {result[key]}" for key in ("code", "lost", "litter") if result[key]]
        print(f"{i + 1}: {name}: {'; '.join(said) or 'as undisturbed'}", flush=True)
    results = [done[key] for key in sorted(done)]
    text = table(results)
    print(text)
    if options.get("docs") == "true":
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        command = f"python benchmarks/kills.py trials={options['trials']} seed={seed}"
        into_docs(f"{text}\n`{command}` at commit {commit.stdout.strip()}; {machine()}.\n")
    return int(any(r["code"] or r["lost"] or r["litter"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
