"""Memory and speed of training on networks of full size with random weights, so that nothing is
downloaded.

    python benchmarks/full_size.py memory|speed [minutes=10] [rows=...] [steps=5] [at_once=4] \
        [folder=/dev/shm] [out=FOLDER] [small] [any overrides of distill.run]

`memory` is what runs on small cards take: the peak of the allocator in the steps, beside the count
of `doctor`. Optimisers have their states from the first step on, as after many. The allocator of a
run with a target may hold no more than the target, less CONTEXT. Rows share a card, so their
seconds are no measurement with at_once > 1.

`speed` is one network after another, alone on the card: the step, the passes that it cannot avoid,
the quotient, the share of the card's matrix product in bfloat16 that the passes' operations reach
in a step, and the peak. Passes and steps take turns, as in step_time.py.

Every row is LADD on latents of noise (the method does not mind) in bfloat16 unless its options say
otherwise. Rows come in order of importance. None starts after `minutes`, and what runs a minute
later is stopped. A row that fails says why. `rows=z_image,klein` are the rows of these networks.
Text encoders are small: a run that minds its memory has embedded its captions before. Networks are
in networks.py, rows in full_size_rows.py. `small` shrinks every network, to try the script itself.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import Child, Failed  # before torch: it says how CUDA is asked for

# isort: split
import lightning as L
import torch
from common import States, composed, fit, noise_latents
from full_size_queue import Queue
from full_size_rows import MEMORY, SPEED, Row
from networks import latents_of, words_of, write
from step_time import measure, now

from distill.config import build
from distill.config.step_memory import of_step
from distill.machine.hardware import hardware

GB = 1e9
CONTEXT = 0.6  # GB of a card that are CUDA's, not the allocator's
SAMPLES = 16  # latents
OWN = ("minutes", "rows", "steps", "at_once", "folder", "out")
HEADS = {
    "memory": (
        "run, with options|counted, GB|peak of the steps|quotient|peak with the start|reserved"
        "|card|seconds a step"
    ),
    "speed": "network|pixels a side|batch|options|step|passes|quotient|share of peak|memory",
}


# -- what children do ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """The machine: its name, GB of its GPU, and operations a second of a product in bfloat16."""

    name: str
    memory: float | None
    rate: float


def card() -> Card:
    memory = torch.cuda.get_device_properties(0).total_memory / GB if gpu() else None
    return Card(f"{hardware()}; torch {torch.__version__}", memory, peak_rate())


def gpu() -> bool:
    return torch.cuda.is_available()


def peak_rate() -> float:
    """Operations a second of a product of 8192 x 8192 matrices in bfloat16."""
    side = 8192 if gpu() else 512
    a, b = torch.randn(2, side, side, device="cuda" if gpu() else "cpu", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    began = now()
    for _ in range(10):
        a @ b
    return 10 * 2 * side**3 / (now() - began)


@dataclass(frozen=True)
class Plan:
    """How all rows of a call run."""

    full: bool
    steps: int
    overrides: tuple[str, ...]

    def settings(self, row: Row, teacher: Path, place: Path) -> list[str]:
        """The overrides of a row's run; its latents are written into `place`."""
        place.mkdir(exist_ok=True)
        shape = latents_of(row.network, row.side, row.frames, full=self.full)
        data = noise_latents(place, shape, SAMPLES)
        words = words_of(row.network, teacher, row.side, row.frames, full=self.full)
        run = ["method=ladd", f"data.batch_size={row.batch}", "trainer.precision=bf16-mixed"]
        return [*words, *data, *run, *row.words, *self.overrides]


def count(plan: Plan, row: Row, place: Path) -> float:
    """GB of the peak of a step on a GPU, as `doctor` counts it, from config.json files alone."""
    write(row.network, place / "teacher", full=plan.full, weights=False)
    return of_step(composed(plan.settings(row, place / "teacher", place)), "cuda").peak / GB


class Steps(L.Callback):
    """When steps ended, and the GPU's peak before the first one."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.start = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.ends:
            self.ends.append(now())
            if gpu():
                self.start = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(now())


@dataclass(frozen=True)
class Held:
    """GB of the allocator in the steps, with the start, and reserved; and a step's seconds."""

    peak: float
    whole: float
    reserved: float
    seconds: float


def hold(plan: Plan, row: Row, teacher: Path, place: Path) -> Held:
    """Train a few steps, under the row's limit of memory."""
    if gpu() and row.card:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (row.card - CONTEXT) * GB / whole))
    cfg = composed(plan.settings(row, teacher, place))
    torch.manual_seed(cfg.seed)
    source, method = build.build_training(cfg)
    steps = Steps()
    fit(cfg, method, source, plan.steps, States(), steps)
    seconds = statistics.median(b - a for a, b in zip(steps.ends[1:], steps.ends[2:], strict=False))
    peak = torch.cuda.max_memory_allocated() / GB if gpu() else 0.0
    reserved = torch.cuda.max_memory_reserved() / GB if gpu() else 0.0
    return Held(peak, max(peak, steps.start / GB), reserved, seconds)


@dataclass(frozen=True)
class Timed:
    """Seconds of a step and of its passes, operations of the passes, and GB at the peak."""

    step: float
    passes: float
    operations: int
    peak: float


def clock(plan: Plan, row: Row, teacher: Path, place: Path) -> Timed:
    found = measure(plan.settings(row, teacher, place), plan.steps)
    return Timed(found.step, found.unavoidable, found.turns.operations, (found.peak or 0) / GB)


# -- what is printed -------------------------------------------------------------------------------


def memory_row(row: Row, counted: Any, held: Any, shared: bool) -> list[str]:
    target = f"{row.card:g} GB" if row.card else "-"
    said = counted.said if isinstance(counted, Failed) else f"{counted:.1f}"
    if isinstance(held, Failed):
        return [row.label, said, held.said, "-", "-", "-", target, "-"]
    took = f"{held.seconds:.2f}{' (shared card)' if shared else ''}"
    if not held.peak:
        return [row.label, said, "no GPU", "-", "-", "-", target, took]
    quotient = "-" if isinstance(counted, Failed) else f"{counted / held.peak:.2f}"
    sizes = [f"{x:.1f}" for x in (held.whole, held.reserved)]
    return [row.label, said, f"{held.peak:.1f}", quotient, *sizes, target, took]


def speed_row(row: Row, found: Any, rate: float) -> list[str]:
    named = [row.network, row.sides, str(row.batch), row.options]
    if isinstance(found, Failed):
        return [*named, found.said, "-", "-", "-", "-"]
    share = f"{found.operations / found.step / rate:.0%}"
    times = [f"{found.step:.3f} s", f"{found.passes:.3f} s", f"{found.step / found.passes:.2f}"]
    return [*named, *times, share, f"{found.peak:.1f} GB" if found.peak else "no GPU"]


class Table:
    """Rows of Markdown, printed and kept in `out` as they come."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def say(self, line: str) -> None:
        print(line, flush=True)
        if self.file:
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(line + "\n")

    def row(self, cells: list[str]) -> None:
        self.say(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")


# -- the command -----------------------------------------------------------------------------------


def chosen(mode: str, names: str | None) -> list[Row]:
    rows = MEMORY if mode == "memory" else SPEED
    return [row for row in rows if not names or row.network in names.split(",")]


@contextmanager
def folders(given: dict[str, str]) -> Iterator[tuple[Path, Path | None]]:
    """One for what is written and removed, and one for what is kept."""
    out = Path(given["out"]) if "out" in given else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as place:
        yield Path(place), out


def main(arguments: list[str]) -> None:
    began = time.monotonic()
    mode = next((word for word in arguments if word in HEADS), "speed")
    given = dict(word.split("=", 1) for word in arguments if word.split("=")[0] in OWN)
    flags = (*HEADS, "small")
    overrides = tuple(w for w in arguments if w not in flags and w.split("=")[0] not in OWN)
    plan = Plan("small" not in arguments, int(given.get("steps", 5)), overrides)
    at_once = int(given.get("at_once", 4)) if mode == "memory" else 1
    rows = chosen(mode, given.get("rows"))
    with folders(given) as (place, out):
        table = Table(out / f"{mode}.md" if out else None)
        log = out / f"{mode}.log" if out else place / "log"
        asked = Child(log, card)
        while (here := asked.result()) is None:
            time.sleep(0.05)
        if isinstance(here, Failed):
            raise SystemExit(f"full_size.py: {here.said}")
        table.say(f"{here.name}; product {here.rate / 1e12:.0f} TFLOP/s; {plan.steps} steps")
        table.row(HEADS[mode].split("|"))
        table.row(["---"] * len(HEADS[mode].split("|")))
        end = began + 60 * float(given.get("minutes", 10))
        room = 0.95 * here.memory if here.memory else float("inf")
        work, counts = (hold, count) if mode == "memory" else (clock, None)
        queue = Queue(plan, rows, work, counts, place, log, at_once, end, room)
        left = list(rows)
        try:
            for row, counted, found in queue.results():
                left.remove(row)
                if mode == "memory":
                    table.row(memory_row(row, counted, found, at_once > 1))
                else:
                    table.row(speed_row(row, found, here.rate))
        finally:
            queue.stop()
        for row in left:
            table.say(f"not started: {row.label}")
        table.say(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
