"""The training loop of all pretraining stages: one objective, seeded batches, a curve, resumable.

Batch and noise of step k are a function of (seed, k) alone, so a stage that is killed and resumed
gives the same result.
"""

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.core.ema import Ema
from distill.machine.hardware import autocast, device
from distill.storage import checkpoint_files
from distill.storage.atomic import write_atomic
from distill.terminal.progress import Bar

DEVICE = device()
Objective = Callable[[int, Tensor, torch.Generator], dict[str, Tensor]]


@dataclass(kw_only=True)
class Fit:
    """Training settings of stage `name`. Learning rates are peaks; over the last `decay` share of
    steps they fall to 0.

    Writes `<out>/<name>.csv` (the curve) and `<out>/<name>.pt` (for resuming).
    """

    name: str
    out: Path
    seed: int = 0
    steps: int
    batch_size: int
    lr: float
    muon_lr: float = 0.0  # > 0: Muon for hidden matrices, AdamW for the rest
    weight_decay: float = 0.01
    warmup: int = 100  # steps
    decay: float = 0.3
    ema: float = 0.0  # > 0: the result has the averaged weights
    clip: float = 1.0
    precision: str = "32-true"  # or bf16-mixed
    save_every: int = 200
    seconds: float = field(default=0.0, init=False)  # of training so far, over resumptions

    def __call__(self, net: nn.Module, objective: Objective, samples: int) -> nn.Module:
        """Train `net` in place by `objective(step, index, generator) -> named losses`; freeze and
        return it.

        `index` [batch_size] is drawn from range(samples). The net is on DEVICE during training and
        on the CPU afterwards. Random numbers are drawn on the CPU, the same on every machine.
        """
        optimizers = self._optimizers(net.to(DEVICE))
        average = Ema(net, self.ema)
        start = self._resume(net, optimizers, average)
        began = time.monotonic() - self.seconds
        counted = {"rate": "images", "done": start, "images": start * self.batch_size}
        with (
            Bar(self.name, self.steps, **counted) as bar,
            self._file("csv").open("a", newline="", encoding="utf-8") as file,
        ):
            curve, said = csv.writer(file), ""
            for step in range(start, self.steps):
                last = step == self.steps - 1
                terms = self._step(step, net, objective, samples, optimizers)
                if self.ema:
                    average.update(step)
                self.seconds = time.monotonic() - began
                if step % 20 == 0 or last:
                    values = {k: float(v.detach()) for k, v in terms.items()}
                    if step == 0:
                        curve.writerow(["step", "seconds", *values])
                    curve.writerow([step, round(self.seconds, 1), *values.values()])
                    file.flush()
                    said = " ".join(f"{k} {v:.4f}" for k, v in values.items())
                bar.update(step + 1, images=(step + 1) * self.batch_size, said=said)
                if (step + 1) % self.save_every == 0 or last:
                    self._save(step, net, optimizers, average)
        if self.ema:
            net.load_state_dict(average.state_dict(), strict=False)
        return net.cpu().eval().requires_grad_(False)

    def _save(
        self, step: int, net: nn.Module, optimizers: list[torch.optim.Optimizer], average: Ema
    ) -> None:
        state = {
            "net": net.state_dict(),
            "players": [player.state_dict() for player in optimizers],
            "step": step + 1,
            "seconds": self.seconds,
            "average": average.state_dict(),
        }
        checkpoint_files.write_checkpoint(state, self._file("pt"))

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step`: linear rise, constant, cosine fall."""
        start = self.steps * (1 - self.decay)
        down = max(0.0, (step - start) / max(1.0, self.steps - start))
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * down))

    def _step(
        self, step: int, net: nn.Module, objective: Objective, samples: int, optimizers: list
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        index = torch.randint(samples, (self.batch_size,), generator=generator)
        with autocast(self.precision, DEVICE.type):
            terms = objective(step, index, generator)
        net.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), self.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.rate(step)
            optimizer.step()
        return terms

    def _optimizers(self, net: nn.Module) -> list[torch.optim.Optimizer]:
        """AdamW for all parameters, or Muon for matrices inside blocks and AdamW for the rest."""
        rest, hidden = [], []
        for name, p in net.named_parameters():
            if p.requires_grad:
                matrix = self.muon_lr and p.ndim == 2 and "blocks" in name and "norm" not in name
                (hidden if matrix else rest).append(p)
        groups = [{"params": rest, "lr": self.lr, "initial_lr": self.lr}]
        optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=self.weight_decay)]
        if hidden:
            groups = [{"params": hidden, "lr": self.muon_lr, "initial_lr": self.muon_lr}]
            optimizers.append(
                torch.optim.Muon(
                    groups, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        return optimizers

    def _resume(self, net: nn.Module, optimizers: list[torch.optim.Optimizer], average: Ema) -> int:
        """Load the saved state, and drop later rows of the curve; returns the next step."""
        start = 0
        if self._file("pt").exists():
            state = torch.load(self._file("pt"), map_location=DEVICE, weights_only=True)
            start, self.seconds = state["step"], state["seconds"]
            net.load_state_dict(state["net"])
            average.load_state_dict(state["average"])
            for optimizer, saved in zip(optimizers, state["players"], strict=True):
                optimizer.load_state_dict(saved)
        self.out.mkdir(parents=True, exist_ok=True)
        if (curve := self._file("csv")).exists():
            lines = curve.read_text(encoding="utf-8").splitlines(keepends=True)
            early = [
                x for i, x in enumerate(lines) if start and (i == 0 or int(x.split(",")[0]) < start)
            ]
            write_atomic(curve, "".join(early).encode())
        return start

    def _file(self, kind: str) -> Path:
        return self.out / f"{self.name}.{kind}"
