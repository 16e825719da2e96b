"""Types of adversarial distillation: what teacher, student, discriminator and data are to a method.

Legend of shapes, used throughout the package: `B` batch, `C` channels, `H W` latent grid, `L` text
tokens, `D` and `P` widths of token and pooled embeddings, `E` extra numbers, `K` logits per sample.
An index k counts feature maps and the heads that read them: `C_k`, `h_k w_k`, `K_k`. Where a shape
has `H W`, that of a video has `T H W` with T frames; its maps are [B, C_k, T, h_k, w_k].
`x0` is a clean (scaled) latent, `x_t` a noised one, and `t` a float tensor [B] in [0, 1] with 0 =
data and 1 = noise, never a step index.

Methods use the protocols below. Any object with these few members can replace a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distill.core.process import Process
from distill.core.transfers import send

EMBEDDED = ("tokens", "pooled", "mask", "extra")  # tensors of a Cond, and their names in a cache
FILL = "fill"  # name in a batch of the masks of inpainting, 1 where a picture is to be filled
Terms = dict[str, Tensor]
"""Scalar losses under the paper's names, weights applied; the objective is their sum."""
Decoder = Callable[[Tensor], Tensor]
"""Latents [B, C, H, W] -> pixels [B, 3, h, w] in [-1, 1]."""
TeacherSampler = Callable[..., Tensor]
"""(teacher, noise [B, C, H, W], Cond, generator) -> samples [B, C, H, W] of the teacher."""


@dataclass(frozen=True, eq=False)
class Cond:
    """Conditioning of each sample: embedded captions, and the embedded empty caption.

    tokens [B, L, D]; pooled [B, P]; mask [B, L], the weight of each token in attention (0 hides
    it); extra [B, E], other numbers (SDXL's time ids); null, the same record of batch size 1 for
    the empty caption, which every operation passes on unchanged; all_ones, whether all of the
    mask is known to be 1, so that nobody need read it; image [B, C', H, W], channels that the
    network reads beside a sample [B, C, H, W], in their pipeline's order: a mask and the latents
    around it, or those of a source picture. The null has no image: the empty caption goes with each
    sample's own. Raises ValueError for unequal batch sizes.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    extra: Tensor | None = None
    null: Cond | None = None
    all_ones: bool = False
    image: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {name: x.shape[0] for name, x in self.tensors().items()}
        if any(size != self.tokens.shape[0] for size in sizes.values()):
            raise ValueError(f"the tensors of a Cond must share one batch size, got {sizes}")
        if self.null is not None and len(self.null) != 1:
            raise ValueError(
                f"the null of a Cond describes one empty caption, got batch size {len(self.null)}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        """As `nn.Module.to`: all tensors move, only floating ones change dtype (a mask stays a
        mask).
        """

        def move(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return x.to(*args, **kwargs)
            # An empty tensor finds the device that the arguments name, in any of their forms.
            return x.to(torch.empty(0, device=x.device).to(*args, **kwargs).device)

        return replace(
            self._map(move), null=None if self.null is None else self.null.to(*args, **kwargs)
        )

    def index(self, i: slice | Tensor) -> Cond:
        """The samples at a slice, a long tensor of positions or a bool tensor [B]."""
        return self._map(lambda x: x[send(i, x.device) if isinstance(i, Tensor) else i])

    def unconditional(self) -> Cond:
        """The empty caption for every sample, without a copy, beside its image channels."""
        if self.null is None:
            raise ValueError(
                "this Cond has no null record; build it with null=, the embedding of the empty"
                " caption"
            )
        empty = self.null._map(lambda x: x.expand(len(self), *x.shape[1:]))
        return replace(empty, null=self.null, image=self.image)

    def crop(self, corner: Sequence[int], size: Sequence[int]) -> Cond:
        """With the image channels of a part [B, C', h, w] at `corner`, (row, column)."""
        if self.image is None:
            return self
        rows, columns = (slice(i, i + n) for i, n in zip(corner, size, strict=True))
        return replace(self, image=self.image[..., rows, columns])

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """All samples in order.

        The null is the first one found; records of one text encoder share it.
        """
        if not conds:
            raise ValueError("cannot concatenate an empty list of Cond")
        parts = [cond.tensors() for cond in conds]
        for name in set().union(*parts):
            count = sum(name in part for part in parts)
            if count < len(parts):
                raise ValueError(
                    f"cannot concatenate: {count} of {len(parts)} Conds have {name!r}, all or none"
                    " must"
                )
        concatenated: dict[str, Any] = {
            name: torch.cat([part[name] for part in parts]) for name in parts[0]
        }
        null = next((c.null for c in conds if c.null is not None), None)
        return Cond(**concatenated, null=null, all_ones=all(c.all_ones for c in conds))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name, without those of the null."""
        found = {name: getattr(self, name) for name in (*EMBEDDED, "image")}
        return {name: x for name, x in found.items() if x is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cond:
        changed: dict[str, Any] = {name: change(x) for name, x in self.tensors().items()}
        return replace(self, **changed)


def mask_is_ones(tensors: Mapping[str, Any]) -> bool:
    """Whether these tensors of a Cond, on the host, hold a mask of nothing but 1."""
    mask = tensors.get("mask")
    return mask is not None and bool((mask == 1).all())


@dataclass(frozen=True, eq=False)
class Batch:
    """Training data: x0 [B, C, H, W] scaled latents, B captions, and their conditioning.

    noise [B, C, H, W] is the noise from which a teacher generated x0, where known. pixels [B, 3,
    H', W'] in [-1, 1] are the images that x0 encodes, where the data hold images. loser [B, C, H,
    W] are the latents to which x0 is preferred, where the data are pairs.
    """

    x0: Tensor
    captions: tuple[str, ...]
    cond: Cond
    noise: Tensor | None = None
    pixels: Tensor | None = None
    loser: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.x0) == len(self.captions) == len(self.cond):
            counts = (
                f"{len(self.x0)} latents has {len(self.captions)} captions and {len(self.cond)}"
                " Conds"
            )
            raise ValueError(f"a batch of {counts}")

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True, eq=False)
class Renoising:
    """Noise level t [B] and noise [B, C, H, W] at which a network sees a sample."""

    t: Tensor
    noise: Tensor

    def of(self, x0: Tensor, process: Process) -> Tensor:
        """x_t of x0 [B, C, H, W] in this process."""
        return process.diffuse(x0, self.noise, self.t)


class Logits(NamedTuple):
    """Logits of a critic: those of all heads concatenated, values [B, K], and the number K_k of
    each head.
    """

    values: Tensor
    sizes: Sequence[int]

    def by_head(self) -> Sequence[Tensor]:
        """The logits of each head, [B, K_k]."""
        return torch.split(self.values, list(self.sizes), dim=1)

    @staticmethod
    def of(answer: Logits | Tensor) -> Logits:
        """A plain tensor [B, K] counts as one head."""
        return Logits(answer, (answer.shape[1],)) if isinstance(answer, Tensor) else answer


@dataclass(frozen=True, eq=False)
class Losses:
    """The objective of a player is the sum of `terms`, scalars with their weights applied.

    `metrics` are logged beside them.
    """

    terms: Terms
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Denoiser(Protocol):
    """Teacher or student, as a method sees it. It returns an x0 prediction for any network."""

    @property
    def process(self) -> Process: ...

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, C, H, W], t [B] -> x0 prediction [B, C, H, W]."""


class Teacher(Denoiser, Protocol):
    """A frozen pretrained denoiser with its text encoder and autoencoder."""

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of the feature map at every tap of the network."""

    @property
    def blocks(self) -> Sequence[str]:
        """The taps after whole blocks."""

    @property
    def encoder(self) -> Sequence[str]:
        """The taps of the encoder half of the network."""

    @property
    def latent_shape(self) -> Sequence[int]:
        """(C, H, W) of a sample at the size on which it was trained."""

    @property
    def patch(self) -> int:
        """Side of a token in latents; 1 for networks without tokens."""

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """x_t [B, C, H, W], t [B] -> one map [B, channels[tap], h, w] per tap; differentiable in
        x_t.
        """

    @property
    def image_channels(self) -> int:
        """Channels of `image_of`; 0 for a text-to-image model."""

    def image_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """What the network reads of a batch's pictures beside the sample, `Cond.image`; None for a
        text-to-image model.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H', W'] in [-1, 1] -> scaled latents [B, C, H, W]."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, H, W] -> pixels [B, 3, H', W'], about in [-1, 1]; differentiable."""

    def embed(self, captions: Sequence[str]) -> Cond:
        """B captions -> their conditioning, with the null."""

    def of_patch(self, cond: Cond, full: Sequence[int], corner: Sequence[int]) -> Cond:
        """The conditioning for a patch with its upper left at `corner` (row, column) of `full`
        latents (H, W).
        """


class Features(Protocol):
    """The frozen feature network of a discriminator: images or latents -> feature maps.

    Networks on images ignore t and cond.
    """

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each map, in the order of the maps."""

    def __call__(
        self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """x [B, ...], t [B] -> maps [B, C_k, ...]; differentiable in x.

        `generator` draws patches and augmentations.
        """


class Critic(Protocol):
    """The discriminator heads of an iteration: feature maps -> logits.

    One that sets `per_sample = True` states that the logits of a sample do not depend on the other
    samples of its batch. Then one call reads real and fake. A subclass does not inherit this: it
    states it in its own body.
    """

    def __call__(self, maps: list[Tensor], t: Tensor, cond: Cond) -> Logits | Tensor:
        """maps [B, C_k, ...], t [B] -> logits [B, K]; a plain tensor for one head.

        Heads that an iteration draws may have a method `used_parameters`: the parameters of those
        that have run. With it, ranks that draw the same heads need not ask each other for them.
        """


class Heads(Protocol):
    """The trainable heads of a discriminator."""

    def draw(self, generator: torch.Generator) -> Critic:
        """The critic of an iteration: all heads, or a random subset. `generator` is the same on
        every rank.
        """

    def refresh(
        self, generator: torch.Generator, applied: Tensor | None = None
    ) -> Sequence[torch.nn.Parameter]:
        """Called after each student step. Returns the parameters that were re-initialised.

        Their optimiser state is then cleared. `applied` is None, or a bool [] on their device:
        where it is false the student's update was skipped, and they must keep their values. Python
        does not know it yet; for heads whose `refresh` does not take it, it waits.
        """


class Times(Protocol):
    """A distribution of noise levels."""

    def sample(self, n: int, step: int, generator: torch.Generator | None = None) -> Tensor:
        """n levels t [n], float32 in (0, 1], at this student step."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Players:
    """The networks of a distillation.

    teacher: frozen. student: trained. features and heads: the discriminator's frozen feature
    network and trainable heads; None for methods without one. condition: computes the conditioning
    of the heads; None: the teacher's embedding. score_teacher: frozen, of another family than the
    student, for ADD's distillation term; None: the teacher.
    """

    teacher: Teacher
    student: Denoiser
    features: Features | None = None
    heads: Heads | None = None
    condition: Any = None
    score_teacher: Teacher | None = None
