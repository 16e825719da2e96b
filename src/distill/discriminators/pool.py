"""NitroFusion's dynamic pool: many small heads, each for one map and one noise level, few of them
used at a time.

    each iteration:  one head per map and level is drawn from the pool and alone learns
    each step:       every head is replaced by a fresh one with probability `refresh`

    head:  norm(map) -> [conv 4x4, stride 2 -> group norm -> SiLU] x layers
           -> one number at each place

A head is one flat parameter, so that what is not drawn has no gradient, which leaves its weights
and its optimiser's state alone. Drawn heads of maps of one shape are stacked and evaluated
together, as groups of one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from distill.core.types import Cond, Logits

# In a group: the last maps may have one place, and over two numbers a norm says hardly more than a
# sign.
NORM_CHANNELS = 16


class Pool(nn.Module):
    """
    Args:
        channels: width of each map.
        pooled: taken and not used: these heads are told nothing, but see maps of a network that
            was.
        size: heads in all, dealt out evenly to the maps and levels. At least one each, so 1 is a
            pool without choice.
        levels: t* of the partitions; a sample goes to the nearest.
        refresh: share of the heads that is replaced after each step.
        single: heads of maps whose name begins with one of these say one number for all places.
        width, layers: channels and number of the 4x4 convolutions.
        norm_input: bring every map to unit scale first; residual streams grow with depth.
    """

    unsharded = True  # FSDP2 would gather every head, also those that are not drawn

    def __init__(
        self,
        channels: Mapping[str, int],
        *,
        pooled: int = 0,
        size: int = 480,
        levels: Sequence[float] = (0.01, 0.25, 0.5, 0.75),
        refresh: float = 0.01,
        single: Sequence[str] = ("global",),
        width: int = 64,
        layers: int = 2,
        norm_input: bool = True,
    ):
        super().__init__()
        if not levels or not all(0 < level <= 1 for level in levels) or not 0 <= refresh <= 1:
            what = f"levels={list(levels)} must lie in (0, 1], refresh={refresh} in [0, 1]"
            raise ValueError(f"discriminator.heads: {what}")
        if width % NORM_CHANNELS or min(width, layers, size) < 1:
            what = f"width={width} must be a multiple of {NORM_CHANNELS}; layers, size above 0"
            raise ValueError(f"discriminator.heads: {what}")
        self.refresh_rate, self.width, self.layers, self.norm_input = (
            refresh,
            width,
            layers,
            norm_input,
        )
        self.channels, self.levels = dict(channels), [float(level) for level in levels]
        self.single = {name for name in channels if name.startswith(tuple(single))}
        places = [(level, name) for level in range(len(levels)) for name in channels]
        self.owners = [
            places[i % len(places)][1] for i in range(max(size, len(places)))
        ]  # the map of each head
        self.members = {
            place: range(i, len(self.owners), len(places)) for i, place in enumerate(places)
        }
        self.heads = nn.ParameterList(self._fresh(name, None) for name in self.owners)

    def draw(self, generator: Generator) -> Drawn:
        """The critic of an iteration: a head per map and level."""
        luck = torch.rand(len(self.members), generator=generator, device=generator.device).tolist()
        pairs = zip(luck, self.members.items(), strict=True)
        return Drawn(self, {place: heads[int(u * len(heads))] for u, (place, heads) in pairs})

    @torch.no_grad()
    def refresh(self, generator: Generator) -> list[nn.Parameter]:
        """Replace heads by fresh ones, each with probability `refresh`; returns their
        parameters.
        """
        luck = torch.rand(len(self.heads), generator=generator, device=generator.device)
        gone = (luck < self.refresh_rate).nonzero().flatten().tolist()
        for i in gone:
            self.heads[i].copy_(self._fresh(self.owners[i], generator))
        return [self.heads[i] for i in gone]

    def judge(self, heads: Sequence[int], maps: Sequence[Tensor]) -> list[Tensor]:
        """A head for each map [B, C_k, h_k, w_k] -> logits [B, places] of each; maps of one shape
        go together.
        """
        names = list(self.channels)
        logits: dict[int, Tensor] = {}

        def kind(k: int) -> tuple[Any, ...]:
            return (*maps[k].shape[1:], names[k] in self.single)

        for _, alike in groupby(sorted(range(len(maps)), key=kind), key=kind):
            group = list(alike)
            stacked = torch.stack([self.heads[heads[k]] for k in group])
            answers = self._evaluate(
                stacked, torch.stack([maps[k] for k in group], dim=1)
            )  # [B, G, h, w]
            answers = (
                answers.mean((2, 3), keepdim=True) if names[group[0]] in self.single else answers
            )
            logits |= dict(zip(group, answers.flatten(2).unbind(1), strict=True))
        return [logits[k] for k in range(len(maps))]

    def _evaluate(self, stacked: Tensor, x: Tensor) -> Tensor:
        """Parameters [G, P] of heads of one shape, a map for each x [B, G, C, h, w] -> logits [B,
        G, h', w'].
        """
        batch, count, channels = x.shape[:3]
        x = x.flatten(1, 2)
        x = F.group_norm(x, count) if self.norm_input else x
        parts = iter(
            stacked.split([math.prod(shape) for shape, _ in self._shapes(channels)], dim=1)
        )
        for _ in range(self.layers):
            kernel, gain, shift = next(parts), next(parts), next(parts)
            # A kernel of 4 does not fit into one place and its padding.
            x = F.pad(x, (0, max(0, 2 - x.shape[-1]), 0, max(0, 2 - x.shape[-2])))
            kernel = kernel.reshape(count * self.width, -1, 4, 4)
            x = F.conv2d(x, kernel, stride=2, padding=1, groups=count)
            x = F.silu(
                F.group_norm(
                    x, count * self.width // NORM_CHANNELS, gain.flatten(), shift.flatten()
                )
            )
        out, bias = next(parts), next(parts)
        x = F.conv2d(x, out.reshape(count, -1, 1, 1), bias.flatten(), groups=count)
        return x.view(batch, count, *x.shape[-2:])

    def _shapes(self, channels: int) -> Iterator[tuple[tuple[int, ...], str]]:
        """Of a head's parameters, in the order in which they lie in the flat one, and how each
        begins.
        """
        for layer in range(self.layers):
            yield (self.width, self.width if layer else channels, 4, 4), "weight"
            yield (self.width,), "one"
            yield (self.width,), "zero"
        yield (1, self.width), "weight"
        yield (1,), "zero"

    def _fresh(self, name: str, generator: Generator | None) -> Tensor:
        """Flat parameters as torch's own layers begin: weights uniform within 1 / sqrt(inputs)."""
        device = None if generator is None else generator.device
        parts = []
        for shape, how in self._shapes(self.channels[name]):
            limit = 1 / math.sqrt(math.prod(shape[1:])) if how == "weight" else 0.0
            noise = torch.rand(math.prod(shape), generator=generator, device=device)
            parts.append(
                limit * (2 * noise - 1)
                if how == "weight"
                else torch.full_like(noise, float(how == "one"))
            )
        return torch.cat(parts)


class Drawn:
    """A head per map and level, as drawn for one iteration: maps -> logits [B, K], K = sum of
    places over maps.
    """

    def __init__(self, pool: Pool, chosen: Mapping[tuple[int, str], int]):
        self.pool, self.chosen = pool, chosen

    def __call__(self, maps: Sequence[Tensor], t: Tensor, cond: Cond) -> Logits:
        nearest = (t[:, None] - t.new_tensor(self.pool.levels)).abs().argmin(dim=1)
        rows, parts = [], []
        for level in nearest.unique().tolist():
            rows.append((nearest == level).nonzero().flatten())
            heads = [self.chosen[level, name] for name in self.pool.channels]
            parts.append(
                self.pool.judge(
                    heads, [m[rows[-1]] for m in maps] if len(t) > len(rows[-1]) else maps
                )
            )
        values = torch.cat([torch.cat(part, dim=1) for part in parts])[torch.cat(rows).argsort()]
        return Logits(values, tuple(part.shape[1] for part in parts[0]))
