"""What a discriminator sees: each head's verdict by noise level, which heads disagree, and where a
head looks.

gap        mean logit of real samples minus that of the student's, under one noise
right      share of pairs (real, fake) in which the real one has the higher logit; 0.5 is guessing
agreement  correlation of two heads' logits over all samples
attention  |d logit / d x0|, mean over channels: where a change of the picture moves the head
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
from distill.report.page import figure, html, part
from distill.storage.aside import put_text
from distill.storage.pictures import put_grid
from distill.terminal.shown import in_csv

SHOWN = 8  # pictures
MANY = 10  # heads whose attention is drawn, evenly chosen
PAIRS = 5  # of heads that disagree most


@dataclass(frozen=True)
class Seen:
    """Logits [L, H, B] of L noise levels, H heads, B samples; `looks` [H', B', h, w] of the heads
    `drawn`.
    """

    levels: Sequence[float]
    heads: Sequence[str]
    real: Tensor
    fake: Tensor
    pictures: Tensor
    drawn: Sequence[int]
    looks: Tensor

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each head and level."""
        for h, head in enumerate(self.heads):
            for k, level in enumerate(self.levels):
                said = critic_stats(self.real[k, h, :, None], self.fake[k, h, :, None])
                real, fake, right = (
                    float(said[f"d/{key}"]) for key in ("real", "fake", "accuracy")
                )
                means = {"real": real, "fake": fake, "gap": real - fake, "right": right}
                yield {
                    "head": head,
                    "level": level,
                    **{name: round(x, 4) for name, x in means.items()},
                }

    def agreement(self) -> Tensor:
        """Correlations [H, H], the mean over levels."""
        both = torch.cat([self.real, self.fake], dim=2)
        both = both - both.mean(2, keepdim=True)
        both = both / both.norm(dim=2, keepdim=True).clamp_min(1e-12)
        return (both @ both.transpose(1, 2)).mean(0)


def look(method: Any, batch: Batch, levels: Sequence[float], generator: torch.Generator) -> Seen:
    """Have every head judge real samples and the student's, from pure noise in one step, at each
    level.
    """
    method.heads.eval()  # spectral norm moves on with every pass in training
    streams = method.loop.streams(method)
    critic, noise = method.heads.draw(streams.common("heads")), noise_like(batch.x0, generator)
    with torch.no_grad():
        x0_hat = method.student.x0(
            batch.noise if batch.noise is not None else noise, level_like(noise, 1), batch.cond
        )
        pictures = method.teacher.decode(x0_hat[:SHOWN])
        answers = [
            [_judge(method, critic, x, t, noise, batch) for x in (batch.x0, x0_hat)] for t in levels
        ]
    real, fake = (torch.stack([pair[i] for pair in answers]) for i in (0, 1))
    count = real.shape[1]
    drawn = [round(i * (count - 1) / max(1, min(MANY, count) - 1)) for i in range(min(MANY, count))]
    names = list(method.features.channels)
    looks = _attention(method, critic, x0_hat, levels[len(levels) // 2], noise, batch, drawn)
    return Seen(list(levels), names, real.cpu(), fake.cpu(), pictures.cpu(), drawn, looks.cpu())


def _judge(
    method: Any, critic: Any, x0: Tensor, level: float, noise: Tensor, batch: Batch
) -> Tensor:
    """Mean logit of each head, [H, B]."""
    t = level_like(x0, level)
    generator = method.loop.streams(method).features()
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
    drawn: Sequence[int],
) -> Tensor:
    """|d logit / d x0| of some heads on the first SHOWN samples, [H', B', h, w], each head's
    largest being 1.
    """
    x = x0.detach().requires_grad_()
    logits = _judge(method, critic, x, level, noise, batch)
    maps = [
        torch.autograd.grad(logits[h].sum(), x, retain_graph=True)[0].abs().mean(1)[:SHOWN]
        for h in drawn
    ]
    return torch.stack([m / m.max().clamp_min(1e-12) for m in maps])


def write(seen: Seen, folder: Path, name: str) -> Path:
    """Write `heads.csv`, `attention.png` and `inspect.html`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(seen.rows())
    table = csv.writer(text := io.StringIO(), lineterminator="\n")
    table.writerows(map(in_csv, cells) for cells in (rows[0], *(row.values() for row in rows)))
    put_text(folder / "heads.csv", text.getvalue())
    put_grid(_sheet(seen), folder / "attention.png", nrow=len(seen.pictures))
    best = max(rows, key=lambda row: row["right"])
    mean = sum(row["right"] for row in rows) / len(rows)
    names = ["student", *(seen.heads[h] for h in seen.drawn)]
    caption = (
        "The student's pictures, and where each head looks: bright where a change would move it"
        " most."
    )
    picture = figure(folder / "attention.png", caption)
    said = (
        f"The heads tell real from fake {mean:.0%} of the time; the best, {best['head']} at t ="
        f" {best['level']:g}"
    )
    page = html(
        f"{name}: what the discriminator sees",
        f"{said}, {best['right']:.0%}.",
        pictures=part("labelled", names, picture),
        evaluation=_table(seen),
        training=_disagreement(seen),
    )
    path = folder / "inspect.html"
    put_text(path, page)
    return path


def _sheet(seen: Seen) -> Tensor:
    """The pictures, then a row for each drawn head: [R * B', 3, S, S] in [0, 1]."""
    size = seen.pictures.shape[-2:]
    heat = interpolate(seen.looks.flatten(0, 1)[:, None], size=size, mode="nearest").expand(
        -1, 3, -1, -1
    )
    return torch.cat([(seen.pictures / 2 + 0.5).clamp(0, 1), heat])


def _table(seen: Seen) -> Markup:
    """Share right by head and level, in shades."""
    found = {(row["head"], row["level"]): row for row in seen.rows()}
    heads = [(head, [_share(found[head, level]) for level in seen.levels]) for head in seen.heads]
    return part("shares", [f"{level:g}" for level in seen.levels], heads)


def _share(row: Mapping[str, Any]) -> dict[str, str]:
    """A cell: its text, its shade in percent, and the gap that a pointer shows."""
    shade = max(0.0, 2 * row["right"] - 1)
    gap, right = f"{row['gap']:+.2f}", f"{row['right']:.0%}"
    return {"right": right, "shade": f"{45 * shade:.0f}", "gap": gap}


def _disagreement(seen: Seen) -> Markup:
    """The pairs of heads that agree least."""
    agreement, count = seen.agreement(), len(seen.heads)
    pairs = sorted((float(agreement[i, j]), i, j) for i in range(count) for j in range(i))[:PAIRS]
    return part("disagreement", [(seen.heads[j], seen.heads[i], f"{r:+.2f}") for r, i, j in pairs])
