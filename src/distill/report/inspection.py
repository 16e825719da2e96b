"""Inspect a discriminator: logits of each head by noise level, agreement of heads, saliency.

gap        mean logit of real samples minus that of the student's samples, with the same noise
right      share of pairs (real, fake) in which the real one has the higher logit; 0.5 is guessing
agreement  correlation of the logits of two heads over all samples
attention  |d logit / d x0|, mean over channels: where a change of the picture changes the logit
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import interpolate

from distill.core.losses import critic_stats
from distill.core.process import level_like, noise_like
from distill.core.types import Batch, Logits
from distill.report.page import figure, html, render
from distill.storage.atomic import write_text_atomic
from distill.storage.pictures import write_grid
from distill.terminal.shown import in_csv

SHOWN = 8  # pictures
MAX_ATTENTION_HEADS = 10  # evenly chosen heads, whose attention is shown
PAIRS = 5  # listed pairs of heads that agree least


@dataclass(frozen=True)
class Inspection:
    """Logits `real` and `fake` [L, H, B] of L noise levels, H heads, B samples; `pictures` of the
    student [B', 3, S, S]; `attention` [H', B', h, w] of the heads with numbers `attention_heads`.
    """

    levels: Sequence[float]
    heads: Sequence[str]
    real: Tensor
    fake: Tensor
    pictures: Tensor
    attention_heads: Sequence[int]
    attention: Tensor

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each head and level."""
        for h, head in enumerate(self.heads):
            for k, level in enumerate(self.levels):
                stats = critic_stats(self.real[k, h, :, None], self.fake[k, h, :, None])
                real, fake, right = (
                    float(stats[f"d/{key}"]) for key in ("real", "fake", "accuracy")
                )
                means = {"real": real, "fake": fake, "gap": real - fake, "right": right}
                yield {
                    "head": head,
                    "level": level,
                    **{name: round(x, 4) for name, x in means.items()},
                }

    def agreement(self) -> Tensor:
        """Correlations of the heads [H, H], averaged over levels."""
        both = torch.cat([self.real, self.fake], dim=2)
        both = both - both.mean(2, keepdim=True)
        both = both / both.norm(dim=2, keepdim=True).clamp_min(1e-12)
        return (both @ both.transpose(1, 2)).mean(0)


def inspect_heads(
    method: Any, batch: Batch, levels: Sequence[float], generator: torch.Generator
) -> Inspection:
    """Score real samples and the student's one-step samples with every head at each noise level."""
    method.heads.eval()  # in training mode spectral norm changes with every pass
    streams = method.loop.streams(method)
    critic, noise = method.heads.draw(streams.common("heads")), noise_like(batch.x0, generator)
    with torch.no_grad():
        x0_hat = method.student.x0(
            batch.noise if batch.noise is not None else noise, level_like(noise, 1), batch.cond
        )
        pictures = method.teacher.decode(x0_hat[:SHOWN])
        real = [_mean_logits(method, critic, batch.x0, t, noise, batch) for t in levels]
        fake = [_mean_logits(method, critic, x0_hat, t, noise, batch) for t in levels]
    heads = list(method.feature_network.channels)
    count = min(MAX_ATTENTION_HEADS, len(real[0]))
    chosen = [round(i * (len(real[0]) - 1) / max(1, count - 1)) for i in range(count)]
    middle = levels[len(levels) // 2]
    attention = _attention(method, critic, x0_hat, middle, noise, batch, chosen)
    return Inspection(
        list(levels),
        heads,
        torch.stack(real).cpu(),
        torch.stack(fake).cpu(),
        pictures.cpu(),
        chosen,
        attention.cpu(),
    )


def _mean_logits(
    method: Any, critic: Any, x0: Tensor, level: float, noise: Tensor, batch: Batch
) -> Tensor:
    """Mean logit of each head at one noise level, [H, B]."""
    t = level_like(x0, level)
    generator = method.loop.streams(method).patch_generator()
    maps, cond = method.critic_features(x0, t, noise, batch, generator)
    logits = critic(maps, t, cond)
    return torch.stack([part.float().mean(1) for part in Logits.of(logits).by_head()])


def _attention(
    method: Any,
    critic: Any,
    x0: Tensor,
    level: float,
    noise: Tensor,
    batch: Batch,
    heads: Sequence[int],
) -> Tensor:
    """|d logit / d x0| of these heads on the first SHOWN samples, [H', B', h, w], with maximum 1
    for each head.
    """
    x = x0.detach().requires_grad_()
    logits = _mean_logits(method, critic, x, level, noise, batch)
    maps = [
        torch.autograd.grad(logits[h].sum(), x, retain_graph=True)[0].abs().mean(1)[:SHOWN]
        for h in heads
    ]
    return torch.stack([m / m.max().clamp_min(1e-12) for m in maps])


def write_inspection(inspection: Inspection, folder: Path, name: str) -> Path:
    """Write `heads.csv`, `attention.png` and `inspect.html`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(inspection.rows())
    table = csv.writer(text := io.StringIO(), lineterminator="\n")
    table.writerows(map(in_csv, cells) for cells in (rows[0], *(row.values() for row in rows)))
    write_text_atomic(folder / "heads.csv", text.getvalue())
    write_grid(_sheet(inspection), folder / "attention.png", nrow=len(inspection.pictures))
    best = max(rows, key=lambda row: row["right"])
    mean = sum(row["right"] for row in rows) / len(rows)
    names = ["student", *(inspection.heads[h] for h in inspection.attention_heads)]
    caption = (
        "The student's pictures, and the attention of each head: bright where a change of the"
        " picture changes its logit most."
    )
    picture = figure(folder / "attention.png", caption)
    headline = (
        f"The heads tell real from fake {mean:.0%} of the time; the best, {best['head']} at t ="
        f" {best['level']:g}, {best['right']:.0%}."
    )
    page = html(
        f"{name}: inspection of the discriminator",
        headline,
        pictures=render("labelled", names, picture),
        evaluation=_table(inspection),
        training=_disagreement(inspection),
    )
    path = folder / "inspect.html"
    write_text_atomic(path, page)
    return path


def _sheet(inspection: Inspection) -> Tensor:
    """The pictures, then a row of attention for each head: [R * B', 3, S, S] in [0, 1]."""
    size = inspection.pictures.shape[-2:]
    heat = interpolate(
        inspection.attention.flatten(0, 1)[:, None], size=size, mode="nearest"
    ).expand(-1, 3, -1, -1)
    return torch.cat([(inspection.pictures / 2 + 0.5).clamp(0, 1), heat])


def _table(inspection: Inspection) -> Markup:
    """HTML table of the share of right pairs by head and level, with shades."""
    found = {(row["head"], row["level"]): row for row in inspection.rows()}
    levels = [f"{level:g}" for level in inspection.levels]
    heads = [
        (head, [_share(found[head, level]) for level in inspection.levels])
        for head in inspection.heads
    ]
    return render("shares", levels, heads)


def _share(row: Mapping[str, Any]) -> dict[str, str]:
    """A cell of the table: its text, its shade in percent, and the gap for its tooltip."""
    shade = max(0.0, 2 * row["right"] - 1)
    gap, right = f"{row['gap']:+.2f}", f"{row['right']:.0%}"
    return {"right": right, "shade": f"{45 * shade:.0f}", "gap": gap}


def _disagreement(inspection: Inspection) -> Markup:
    """HTML list of the pairs of heads that agree least."""
    agreement, count = inspection.agreement(), len(inspection.heads)
    pairs = sorted((float(agreement[i, j]), i, j) for i in range(count) for j in range(i))[:PAIRS]
    named = [(inspection.heads[j], inspection.heads[i], f"{r:+.2f}") for r, i, j in pairs]
    return render("disagreement", named)
