"""The nouns of adversarial distillation: what teacher, student, discriminator and data are to a
method.

Legend of shapes, used throughout the package: `B` batch, `C` channels, `H W` latent grid, `L` text
tokens, `D` and `P` widths of token and pooled embeddings, `E` extra numbers, `K` logits per sample.
`x0` is a clean (scaled) latent, `x_t` a noised one, and `t` a float tensor [B] in [0, 1] with
0 = data and 1 = noise, never a step index.

Methods are written against the protocols below, so that any object with these few members can stand
in for a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distill.core.process import Process

EMBEDDED = (
    "tokens",
    "pooled",
    "mask",
    "extra",
)  # the tensors of a Cond, under which names they are cached
Terms = dict[str, Tensor]
"""Already weighted scalar losses under the paper's names; the objective is their sum."""
Decoder = Callable[[Tensor], Tensor]
"""Of latents [B, C, H, W] pixels [B, 3, h, w], in -1 to 1."""
Maker = Callable[..., Tensor]
"""Of a teacher, noise [B, C, H, W], a Cond and a generator the samples that the teacher makes."""


@dataclass(frozen=True, eq=False)
class Cond:
    """What a network is told about each sample: embedded captions, and with them the embedded empty
    caption.

    tokens [B, L, D]; pooled [B, P]; mask [B, L], for how many tokens each one counts (0 hides it);
    extra [B, E], other numbers a network wants (SDXL's time ids); null, the same record of batch
    size 1 for the empty caption, which travels along unchanged. Raises ValueError where batch sizes
    differ.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    extra: Tensor | None = None
    null: Cond | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(x) for name, x in self.tensors().items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the tensors of a Cond must share one batch size, got {sizes}")
        if self.null is not None and len(self.null) != 1:
            raise ValueError(
                f"the null of a Cond describes one empty caption, got batch size {len(self.null)}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        """As `nn.Module.to`: everything moves, only floating tensors change dtype (a mask stays a
        mask).
        """

        def moved(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return x.to(*args, **kwargs)
            # Whatever form the arguments have, an empty probe tells the device they name.
            return x.to(torch.empty(0, device=x.device).to(*args, **kwargs).device)

        return replace(
            self._map(moved), null=None if self.null is None else self.null.to(*args, **kwargs)
        )

    def index(self, i: slice | Tensor) -> Cond:
        """The samples picked by a slice, a long tensor of positions or a bool tensor [B]."""
        return self._map(lambda x: x[i.to(x.device) if isinstance(i, Tensor) else i])

    def unconditional(self) -> Cond:
        """The empty caption for every sample of this record, without copying."""
        if self.null is None:
            raise ValueError(
                "this Cond has no null record; build it with null=, the embedding of the empty"
                " caption"
            )
        return replace(self.null._map(lambda x: x.expand(len(self), *x.shape[1:])), null=self.null)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """All samples in order.

        The null is the first one found: records from one text encoder share it.
        """
        if not conds:
            raise ValueError("cannot concatenate an empty list of Cond")
        parts = [cond.tensors() for cond in conds]
        for name in set().union(*parts):
            if (having := sum(name in part for part in parts)) < len(parts):
                raise ValueError(
                    f"cannot concatenate: {having} of {len(parts)} Conds have {name!r}, all or none"
                    " must"
                )
        joined: dict[str, Any] = {
            name: torch.cat([part[name] for part in parts]) for name in parts[0]
        }
        return Cond(**joined, null=next((c.null for c in conds if c.null is not None), None))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, without the null's."""
        found = {name: getattr(self, name) for name in EMBEDDED}
        return {name: x for name, x in found.items() if x is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cond:
        changed: dict[str, Any] = {name: change(x) for name, x in self.tensors().items()}
        return replace(self, **changed)


@dataclass(frozen=True, eq=False)
class Batch:
    """Training data: x0 [B, C, H, W] scaled latents, B captions, and these embedded.

    noise [B, C, H, W] is what a teacher made x0 from, where that is known; pixels [B, 3, H', W'] in
    [-1, 1] are the pictures that x0 encodes, where the data hold pictures.
    """

    x0: Tensor
    captions: tuple[str, ...]
    cond: Cond
    noise: Tensor | None = None
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.x0) == len(self.captions) == len(self.cond):
            counts = (
                f"{len(self.x0)} latents has {len(self.captions)} captions and {len(self.cond)}"
                " Conds"
            )
            raise ValueError(f"a batch of {counts}")

    def __len__(self) -> int:
        return len(self.x0)


class Logits(NamedTuple):
    """What a critic answers: the logits of all its heads side by side, values [B, K], and how many
    each head has.
    """

    values: Tensor
    sizes: Sequence[int]

    def by_head(self) -> Sequence[Tensor]:
        """Those of each head, [B, K_k]."""
        return torch.split(self.values, list(self.sizes), dim=1)

    @staticmethod
    def of(answer: Logits | Tensor) -> Logits:
        """A plain tensor [B, K] is the answer of one head."""
        return Logits(answer, (answer.shape[1],)) if isinstance(answer, Tensor) else answer


@dataclass(frozen=True, eq=False)
class Losses:
    """What a player minimises: the sum of `terms`, already weighted scalars.

    `metrics` are logged beside them.
    """

    terms: Terms
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Denoiser(Protocol):
    """Teacher or student, as a method sees it: it returns the clean estimate, whatever its network
    predicts.
    """

    @property
    def process(self) -> Process: ...

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, C, H, W], t [B] -> estimate of x0 [B, C, H, W]."""


class Teacher(Denoiser, Protocol):
    """A frozen pretrained denoiser with its text encoder and autoencoder."""

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of the feature map at every tap this network offers."""

    @property
    def blocks(self) -> Sequence[str]:
        """The taps behind whole blocks."""

    @property
    def encoder(self) -> Sequence[str]:
        """The taps of the half of the network that reads."""

    @property
    def latent_shape(self) -> Sequence[int]:
        """(C, H, W) of a sample of the size that it was trained for."""

    @property
    def patch(self) -> int:
        """Latents a side that make one token; 1 where there are none."""

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """x_t [B, C, H, W], t [B] -> one map [B, channels[tap], h, w] per tap; differentiable in
        x_t.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H', W'] in [-1, 1] -> scaled latents [B, C, H, W]."""

    def decode(self, latents: Tensor) -> Tensor:
        """scaled latents [B, C, H, W] -> pixels [B, 3, H', W'], in [-1, 1] up to overshoot;
        differentiable.
        """

    def embed(self, captions: Sequence[str]) -> Cond:
        """B captions -> their Cond, null included."""

    def of_patch(self, cond: Cond, whole: Sequence[int], corner: Sequence[int]) -> Cond:
        """The same captions for a patch whose upper left is at `corner` (row, column) of latents
        `whole` (H, W).
        """


class Features(Protocol):
    """The frozen half of a discriminator: images or latents -> maps.

    Extractors of images ignore t and cond.
    """

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each map, in the order in which the maps are returned."""

    def __call__(
        self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """x [B, ...], t [B] -> maps [B, C_k, ...]; differentiable in x.

        `generator` is for augmentations, if any.
        """


class Critic(Protocol):
    """The heads of an iteration: maps -> logits."""

    def __call__(self, maps: list[Tensor], t: Tensor, cond: Cond) -> Logits | Tensor:
        """maps [B, C_k, ...], t [B] -> logits [B, K]; a plain tensor where there is one head."""


class Heads(Protocol):
    """The trainable half of a discriminator."""

    def draw(self, generator: torch.Generator) -> Critic:
        """The critic of an iteration: these heads, or a random subset; `generator` is the same on
        every rank.
        """

    def refresh(self, generator: torch.Generator) -> Sequence[torch.nn.Parameter]:
        """Called after each student step; returns the parameters that were made anew, whose moments
        are cleared.
        """


class Times(Protocol):
    """A distribution of noise levels."""

    def sample(self, n: int, step: int, generator: torch.Generator | None = None) -> Tensor:
        """n levels t [n], float32 in (0, 1], as drawn at this student step."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Players:
    """Who takes part in a distillation.

    teacher: frozen. student: what is trained. features and heads: the discriminator, its frozen and
    its trainable half, both None where a method has none. condition: what the heads are conditioned
    on, where that is not the teacher's own embedding.
    """

    teacher: Teacher
    student: Denoiser
    features: Features | None = None
    heads: Heads | None = None
    condition: Any = None
