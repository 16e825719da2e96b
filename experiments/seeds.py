"""Mean and spread over the runs of one setting, as a Markdown table.

    python experiments/seeds.py runs/a runs/b runs/c

Reads `evaluation.json` and `run.json` of every run; the spread is the standard deviation over runs (n - 1).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

COLUMNS = {
    "prompt_accuracy": "prompts right",
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "stripe_sharpness": "stripe sharpness",
}


def said(values: list[float]) -> str:
    mean = statistics.mean(values)
    digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def main(folders: list[Path]) -> None:
    rows: dict[tuple[str, int], list[dict]] = {}
    for folder in folders:
        for row in json.loads((folder / "evaluation.json").read_text())["rows"]:
            rows.setdefault((row["who"], row["steps"]), []).append(row)
    print("| | steps | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for (who, steps), found in rows.items():
        print(f"| {who} | {steps} | " + " | ".join(said([row[key] for row in found]) for key in COLUMNS) + " |")
    facts = [json.loads((folder / "run.json").read_text()) for folder in folders]
    seconds = said([f["train_seconds"] for f in facts])
    print(f"\n{len(folders)} runs of {facts[0]['steps']} steps; training {seconds} s on {facts[0]['hardware']}.")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
