"""The training loop of every pretraining stage: one objective, seeded batches, a bar, a curve, resumable.

Batch and noise of step k are a function of (seed, k) alone, so a stage killed at any moment and started again goes on
as if nothing had happened.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Objective = Callable[[int, torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how fast. Rates are peaks, reached after `warmup` steps; the last `decay` share falls to 0."""

    steps: int
    batch_size: int
    lr: float
    muon_lr: float = 0.0  # > 0: hidden matrices learn by Muon, the rest by AdamW
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.3
    ema: float = 0.0  # > 0: averaged weights are what the stage leaves behind
    clip: float = 1.0
    bf16: bool = True
    save_every: int = 200

    def rate(self, step: int) -> float:
        """Share of the peak rate at `step`: linear up, flat, cosine down."""
        start = self.steps * (1 - self.decay)
        down = max(0.0, (step - start) / max(1.0, self.steps - start))
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * down))


def fit(name: str, net: nn.Module, objective: Objective, budget: Budget, *, out: Path, seed: int = 0) -> float:
    """Train `net` in place by `objective(step, generator) -> named losses`; returns the seconds it took in all.

    The net is on DEVICE meanwhile and on the CPU afterwards; random numbers are drawn on the CPU, alike everywhere.
    Writes `<out>/<name>.csv` (the curve) and `<out>/<name>.pt` (for resuming; also the mark of a finished stage).
    """
    out.mkdir(parents=True, exist_ok=True)
    net.to(DEVICE)
    players = _optimizers(net, budget)
    average = {k: p.detach().float().clone() for k, p in net.named_parameters() if p.requires_grad}
    start, spent = _resume(out / f"{name}.pt", net, players, average)
    began = time.monotonic()
    _cut_curve(out / f"{name}.csv", start)
    with _bar() as bar, (out / f"{name}.csv").open("a", newline="") as file:
        task = bar.add_task(name, total=budget.steps, completed=start)
        for step in range(start, budget.steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            for optimizer in players:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * budget.rate(step)
            autocast = torch.autocast(DEVICE.type, torch.bfloat16) if budget.bf16 else nullcontext()
            with autocast:
                terms = objective(step, generator)
            _update(net, players, sum(terms.values()), budget, average, step)
            if step % 20 == 0 or step == budget.steps - 1:
                values = {k: float(v.detach()) for k, v in terms.items()}
                if step == 0:
                    csv.writer(file).writerow(["step", "seconds", *values])
                csv.writer(file).writerow([step, round(spent + time.monotonic() - began, 1), *values.values()])
                file.flush()
                bar.update(task, description=f"{name} " + " ".join(f"{k} {v:.4f}" for k, v in values.items()))
            bar.update(task, completed=step + 1)
            if (step + 1) % budget.save_every == 0 or step == budget.steps - 1:
                seconds = spent + time.monotonic() - began
                _save(out / f"{name}.pt", net, players, average, step + 1, seconds)
    if budget.ema:
        for key, parameter in net.named_parameters():
            if key in average:
                parameter.data.copy_(average[key])
    net.cpu()
    return spent + time.monotonic() - began


def _cut_curve(path: Path, start: int) -> None:
    """Without what a killed stage wrote after its last saving, and will write again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(x for i, x in enumerate(lines) if start and (i == 0 or int(x.split(",")[0]) < start)))


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), refresh_per_second=1
    )


def _optimizers(net: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside blocks and AdamW for the rest."""
    trainable = [(k, p) for k, p in net.named_parameters() if p.requires_grad]
    hidden = [p for k, p in trainable if p.ndim == 2 and "blocks" in k and "norm" not in k] if budget.muon_lr else []
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in trainable if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=budget.lr, betas=(0.9, 0.99), weight_decay=budget.weight_decay)
    ]
    if hidden:
        muon = torch.optim.Muon(
            hidden, lr=budget.muon_lr, weight_decay=budget.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _update(net: nn.Module, players: list, loss: Tensor, budget: Budget, average: dict[str, Tensor], step: int) -> None:
    net.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), budget.clip)
    for optimizer in players:
        optimizer.step()
    if budget.ema:
        keep = min(budget.ema, (1 + step) / (10 + step))
        current = [p.detach().float() for k, p in net.named_parameters() if k in average]
        torch._foreach_lerp_(list(average.values()), current, 1 - keep)


def _save(path: Path, net: nn.Module, players: list, average: dict[str, Tensor], step: int, seconds: float) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "net": net.state_dict(),
        "players": [o.state_dict() for o in players],
        "average": average,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(path: Path, net: nn.Module, players: list, average: dict[str, Tensor]) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=next(net.parameters()).device, weights_only=True)
    net.load_state_dict(state["net"])
    for optimizer, saved in zip(players, state["players"], strict=True):
        optimizer.load_state_dict(saved)
    for key, value in state["average"].items():
        average[key].copy_(value)
    return state["step"], state["seconds"]
