"""All methods on `shapes`: a search for each with one budget, then three seeds at equal images and
at equal time.

    python experiments/methods_on_shapes/run.py out --steps 1200 --cores 1 [--only ladd,add]
        [--stages search,images]

Give the same command again to go on: judged runs are passed over, stopped ones resumed, a search
goes on. The script uses so many of the cores that it is allowed; `taskset -c 1 python ...` says
which. Its stages, in their order:

    search   `trials` short runs of each by distill.search; `out/search/<name>/trials.csv`
    pace     processor seconds of a step of each, by two short runs; `out/pace.json`
    images   the best settings, seeds 0, 1, 2, `steps` iterations of 16 pictures; `out/images`
    time     the same for as many processor seconds as LADD takes for `steps` iterations; `out/time`
    compare  distill.compare of both
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

STAGES = ("search", "pace", "images", "time", "compare")
SEEDS = (0, 1, 2)
YARDSTICK = "ladd"
QUIET = ("callbacks.samples.every=1000000", "metrics.teacher_steps=[1]")
RATE, CRITIC = "optimizer.student.lr=log(1e-4,1e-3)", "optimizer.discriminator.lr=log(3e-4,5e-3)"
OPENING = 0.58  # of NitroFusion's steps, as in its recipe
LADD = (
    "experiment=ladd_long_shapes",
    "method.distill_weight=0",
)  # the paper's: its data are the teacher's


@dataclass(frozen=True)
class Contestant:
    chosen: tuple[str, ...]
    space: tuple[str, ...]
    head_start: int = 0

    def arguments(self, iterations: int) -> list[str]:
        """Of a run that sees this many batches; the head start sees its share of them."""
        steps = iterations - self.head_start
        opening = (
            [f"method.warm_start={int(OPENING * steps)}"]
            if "method=nitrofusion" in self.chosen
            else []
        )
        return [
            *self.chosen,
            f"loop.head_start={self.head_start}",
            f"trainer.max_steps={steps}",
            *opening,
        ]


CONTESTANTS = {
    "add": Contestant(("method=add",), (RATE, CRITIC, "method.distill_weight=log(1,16)"), 50),
    "ladd": Contestant(LADD, (RATE, CRITIC, "method.renoise.m=uniform(-0.5,1.5)"), 50),
    "ladd_distill": Contestant(
        ("experiment=ladd_long_shapes",), (RATE, CRITIC, "method.distill_weight=log(1,32)"), 50
    ),
    "ladd_pool": Contestant(
        (*LADD, "discriminator=pool"),
        (RATE, CRITIC, "discriminator.heads.refresh=choice(0,0.002,0.01)"),
        50,
    ),
    "nitrofusion": Contestant(
        ("method=nitrofusion",), (RATE, CRITIC, "method.distill_weight=log(1,16)")
    ),
    "nitrofusion_heads": Contestant(
        ("method=nitrofusion", "discriminator=teacher_features"),
        (RATE, CRITIC, "method.distill_weight=log(1,16)"),
    ),
    "regression": Contestant(
        ("method=regression",), (RATE, "loop.ema_decay=choice(0.99,0.995,0.998)")
    ),
    "consistency": Contestant(
        ("method=consistency",),
        (RATE, "method.steps=choice(4,8,16,32)", "method.guidance=uniform(2,6)"),
    ),
}


def some(known: tuple[str, ...], text: str) -> list[str]:
    """Names with commas between, all of them known."""
    if unknown := set(text.split(",")) - set(known):
        raise argparse.ArgumentTypeError(
            f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    return text.split(",")


def call(module: str, *arguments: str) -> None:
    """One command of the package, said before it is run."""
    print(
        " ".join(
            ["python", "-m", module, *(f"'{a}'" if set(a) & set("[]()") else a for a in arguments)]
        ),
        flush=True,
    )
    subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL
    )


def train(folder: Path, arguments: list[str]) -> None:
    """A run, unless it is judged already; one that was stopped is gone on with, if it had come to a
    checkpoint.
    """
    if (folder / "evaluation.json").is_file():
        return
    if list((folder / "checkpoints").glob("*.ckpt")):
        call("distill.run", f"resume={folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        call("distill.run", *arguments, f"run_dir={folder}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def search(name: str, asked: argparse.Namespace) -> None:
    """Fréchet distance in one step: prompts right alone would be won by one picture a prompt."""
    if not asked.trials:
        return
    contestant, out = CONTESTANTS[name], asked.out / "search" / name
    run = [
        *contestant.arguments(asked.search_steps),
        *QUIET,
        "metrics.prompts=200",
        "metrics.student_steps=[1]",
    ]
    goal = ["metric=frechet", "direction=minimize", f"trials={asked.trials}"]
    space, run = (json.dumps(x, separators=(",", ":")) for x in (contestant.space, run))
    call("distill.search", f"space={space}", f"run={run}", *goal, f"out={out}")
    for folder in out.glob("trial_*/checkpoints"):
        shutil.rmtree(folder)


def best(name: str, asked: argparse.Namespace) -> list[str]:
    """What the search has found; nothing, so the recipe, where it was to make no trials."""
    if not asked.trials:
        return []
    with (asked.out / "search" / name / "trials.csv").open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    return [f"{key}={value}" for key, value in first.items() if key not in ("trial", "value")]


def pace(name: str, asked: argparse.Namespace) -> float:
    """Processor seconds of one iteration with both players: what twenty more cost, so that starting
    does not count.
    """
    file = asked.out / "pace.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name not in known:
        used, contestant = [], CONTESTANTS[name]
        for iterations in (10, 30):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            steps = [
                "loop.head_start=0",
                f"trainer.max_steps={iterations}",
                f"run_dir={asked.out / 'pace'}",
            ]
            opening = ["method.warm_start=0"] if "method=nitrofusion" in contestant.chosen else []
            shutil.rmtree(asked.out / "pace", ignore_errors=True)  # of a command that was killed
            call(
                "distill.run",
                *contestant.chosen,
                *best(name, asked),
                *opening,
                *steps,
                QUIET[0],
                "~metrics",
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        shutil.rmtree(asked.out / "pace")
        known[name] = round((used[1] - used[0]) / 20, 4)
        file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return float(known[name])


def contest(budget: str, name: str, seed: int, asked: argparse.Namespace) -> None:
    """One run of the comparison.

    The yardstick's are the same under both budgets, so that one is enough.
    """
    equal = asked.out / "images" / f"{name}_{seed}"
    if budget == "time" and name == YARDSTICK and (equal / "evaluation.json").is_file():
        shutil.copytree(equal, asked.out / budget / equal.name, dirs_exist_ok=True)
        return
    share = 1.0 if budget == "images" else pace(YARDSTICK, asked) / pace(name, asked)
    arguments = [
        *CONTESTANTS[name].arguments(int(share * asked.steps)),
        *best(name, asked),
        QUIET[0],
    ]
    whole = [] if (name, seed) == (YARDSTICK, 0) else [QUIET[1]]  # the teacher's many steps once
    train(
        asked.out / budget / f"{name}_{seed}", [*arguments, *whole, f"name={name}", f"seed={seed}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    for option, value in (("steps", 1200), ("search-steps", 300), ("trials", 8), ("cores", 1)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--only", type=partial(some, tuple(CONTESTANTS)), default=list(CONTESTANTS))
    parser.add_argument("--stages", type=partial(some, STAGES), default=list(STAGES))
    asked = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux; elsewhere the number of threads alone is held
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.cores])
    os.environ["OMP_NUM_THREADS"] = str(asked.cores)
    kept, lengths = (
        asked.out / "lengths.json",
        {"steps": asked.steps, "search_steps": asked.search_steps},
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != lengths:
        raise SystemExit(
            f"{asked.out} was begun with {kept.read_text(encoding='utf-8')}; give these, or another"
            " folder"
        )
    kept.write_text(json.dumps(lengths), encoding="utf-8")
    for name in asked.only if "search" in asked.stages else ():
        search(name, asked)
    for name in asked.only if "pace" in asked.stages else ():
        pace(name, asked)
    budgets = [stage for stage in ("images", "time") if stage in asked.stages]
    for budget, seed, name in product(budgets, SEEDS, asked.only):
        contest(budget, name, seed, asked)
    for budget in ("images", "time") if "compare" in asked.stages else ():
        call(
            "distill.compare",
            f"runs={asked.out / budget}",
            "by_name=true",
            f"out={asked.out / f'compare_{budget}'}",
        )


if __name__ == "__main__":
    main()
