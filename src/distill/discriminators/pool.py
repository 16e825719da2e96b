"""NitroFusion's dynamic pool: many small heads, each for one feature map and one noise level.

    each iteration:  one head per map and level is drawn from the pool; only these learn
    each step:       every head is re-initialised with probability `refresh`

    head:  norm(map) -> [conv 4x4, stride 2 -> group norm -> SiLU] x layers
           -> one logit at each position

A head is one flat parameter. A head that is not drawn has no gradient, so its weights and its
optimiser state do not change. Drawn heads of maps of one shape are stacked and run together, as
groups of one convolution.

A level is t of a training step of 1,000: t = (step + 1) / 1000, since t = 0 is clean data. The
paper's steps 10, 250, 500 and 750 are .011, .251, .501 and .751.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from distill.core.randomness import on_host, uniform
from distill.core.transfers import host_values, send
from distill.core.types import Cond, Logits
from distill.discriminators.heads import by_frame, positions
from distill.discriminators.strided import strided

# Channels per group: the last maps may have one position, and norming two values leaves two signs.
NORM_CHANNELS = 16


class Pool(nn.Module):
    """All heads, from which an iteration draws some.

    Args:
        channels: channels of each map.
        pooled: accepted and ignored; these heads are not conditioned, the feature network is.
        size: number of heads, distributed evenly over maps and levels, at least one each.
        levels: t* of the partitions; a sample belongs to the nearest.
        refresh: share of the heads that is re-initialised after each step.
        single: heads of maps whose name starts with one of these give one logit, the mean over
            positions.
        width, layers: channels and number of the 4x4 convolutions.
        norm_input: normalise every map first; residual streams grow with depth.
    """

    unsharded = True  # FSDP2 would gather every head, also those that are not drawn

    def __init__(
        self,
        channels: Mapping[str, int],
        *,
        pooled: int = 0,
        size: int = 480,
        levels: Sequence[float] = (0.011, 0.251, 0.501, 0.751),
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
        self.refresh_rate, self.norm_input = refresh, norm_input
        self.width, self.layers = width, layers
        self.channels, self.levels = dict(channels), [float(level) for level in levels]
        self.single = {name for name in channels if name.startswith(tuple(single))}
        partitions = [(level, name) for level in range(len(levels)) for name in channels]
        count = max(size, len(partitions))
        self.map_of_head = [partitions[i % len(partitions)][1] for i in range(count)]
        self.heads_of = {
            partition: range(i, count, len(partitions)) for i, partition in enumerate(partitions)
        }
        self.heads = nn.ParameterList(self._initial(name, None) for name in self.map_of_head)

    def draw(self, generator: Generator) -> DrawnHeads:
        """The critic of an iteration: one head per map and level.

        All ranks pass generators of one seed, so that all train the same heads.
        """
        u = uniform(len(self.heads_of), generator, "draw")
        pairs = zip(u, self.heads_of.items(), strict=True)
        return DrawnHeads(self, {part: heads[int(x * len(heads))] for x, (part, heads) in pairs})

    @torch.no_grad()
    def refresh(self, generator: Generator, applied: Tensor | None = None) -> list[nn.Parameter]:
        """Re-initialise each head with probability `refresh`; returns the parameters of those.

        Where `applied`, a bool [] on their device, is false they keep their values.
        """
        u = torch.rand(len(self.heads), generator=on_host(generator, "refresh"))
        refreshed = (u < self.refresh_rate).nonzero().flatten().tolist()
        for i in refreshed:
            head, initial = self.heads[i], self._initial(self.map_of_head[i], generator)
            head.copy_(initial if applied is None else torch.where(applied, initial, head))
        return [self.heads[i] for i in refreshed]

    def logits_of(self, heads: Sequence[int], maps: Sequence[Tensor]) -> list[Tensor]:
        """One head for each map [B, C_k, h_k, w_k] -> the logits [B, positions] of each. A head
        reads a video, [B, C_k, T, h_k, w_k], frame by frame.

        Heads of maps of one shape run together.
        """
        names = list(self.channels)
        logits: dict[int, Tensor] = {}

        def shape_of(k: int) -> tuple[Any, ...]:
            return (*maps[k].shape[1:], names[k] in self.single)

        for _, indices in groupby(sorted(range(len(maps)), key=shape_of), key=shape_of):
            group = list(indices)
            stacked = torch.stack([self.heads[heads[k]] for k in group])
            x = torch.stack([by_frame(maps[k]) for k in group], dim=1)
            found = positions(self._run(stacked, x), len(maps[0]))  # [B, G, h w]
            if names[group[0]] in self.single:
                found = found.mean(2, keepdim=True)
            logits |= dict(zip(group, found.unbind(1), strict=True))
        return [logits[k] for k in range(len(maps))]

    def _run(self, stacked: Tensor, x: Tensor) -> Tensor:
        """Parameters [G, S] of G heads of one shape, S numbers each, and their maps x [B, G, C, h,
        w] -> logits [B, G, h', w'].
        """
        batch, count, channels = x.shape[:3]
        x = x.flatten(1, 2)
        x = F.group_norm(x, count) if self.norm_input else x
        parts = iter(
            stacked.split([math.prod(shape) for shape, _ in self._shapes(channels)], dim=1)
        )
        for _ in range(self.layers):
            kernel, gain, shift = next(parts), next(parts), next(parts)
            # A map of one position with its padding is smaller than the kernel of 4.
            x = F.pad(x, (0, max(0, 2 - x.shape[-1]), 0, max(0, 2 - x.shape[-2])))
            kernel = kernel.reshape(count * self.width, -1, 4, 4)
            x = strided(x, kernel, stride=2, padding=1, groups=count)
            x = F.silu(
                F.group_norm(
                    x, count * self.width // NORM_CHANNELS, gain.flatten(), shift.flatten()
                )
            )
        out, bias = next(parts), next(parts)
        x = F.conv2d(x, out.reshape(count, -1, 1, 1), bias.flatten(), groups=count)
        return x.view(batch, count, *x.shape[-2:])

    def _shapes(self, channels: int) -> Iterator[tuple[tuple[int, ...], str]]:
        """Shapes of a head's parameters in the order of the flat one, and how each is
        initialised.
        """
        for layer in range(self.layers):
            yield (self.width, self.width if layer else channels, 4, 4), "weight"
            yield (self.width,), "one"
            yield (self.width,), "zero"
        yield (1, self.width), "weight"
        yield (1,), "zero"

    def _initial(self, name: str, generator: Generator | None) -> Tensor:
        """Flat parameters, initialised as torch's layers: weights uniform within 1 /
        sqrt(inputs).
        """
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


class DrawnHeads:
    """The heads of one iteration, one per map and level: maps -> logits [B, K].

    K is the number of positions over all maps.
    """

    per_sample = True

    def __init__(self, pool: Pool, head_of: Mapping[tuple[int, str], int]):
        self.pool, self.head_of = pool, head_of
        self._used: dict[int, None] = {}  # heads that have run, in order

    def used_parameters(self) -> list[nn.Parameter]:
        """Parameters of the heads that have run: those of the levels of all t so far."""
        return [self.pool.heads[i] for i in self._used]

    def __call__(self, maps: Sequence[Tensor], t: Tensor, cond: Cond) -> Logits:
        known = host_values(t)  # of a t that is on the device alone this must wait for a read
        times = t.cpu() if known is None else known
        nearest = (times[:, None] - times.new_tensor(self.pool.levels)).abs().argmin(dim=1)
        rows, parts = [], []
        for level in nearest.unique().tolist():
            rows.append((nearest == level).nonzero().flatten())
            heads = [self.head_of[level, name] for name in self.pool.channels]
            self._used |= dict.fromkeys(heads)
            if len(rows[-1]) == len(t):
                parts.append(self.pool.logits_of(heads, maps))
            else:
                chosen = send(rows[-1], t.device)
                parts.append(self.pool.logits_of(heads, [m[chosen] for m in maps]))
        order = send(torch.cat(rows).argsort(), t.device)
        values = torch.cat([torch.cat(part, dim=1) for part in parts])[order]
        return Logits(values, tuple(part.shape[1] for part in parts[0]))
