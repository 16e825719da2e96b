"""A student's networks as functions of plain tensors, for exporters that trace a forward pass.

    x0(x_t, t, cond), embed(ids, ...), decode(latents)

The denoiser returns x0, whatever it predicts, so a sampler outside needs only alpha and sigma of
its steps. The text encoders are one function, since pipelines combine their outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from distill.core.types import EMBEDDED, Cond
from distill.exporting.traceable import traceable
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.ragged import Ragged

ANY = "a"  # a caption in place of that whose tokens are given
MARK = "qzq"  # a caption that stands in no template, and that cleaning leaves as it is


class Denoise(nn.Module):
    """x_t [B, C, H, W], t [B] and the tensors `names` of a Cond -> x0 [B, C, H, W]."""

    def __init__(self, network: Network, names: Sequence[str]):
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, x_t: Tensor, t: Tensor, *conditioning: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.names, conditioning, strict=True))
        if torch.compiler.is_exporting():
            with traceable(self.network):
                return self.network.x0(x_t, t, Cond(**given))
        return self.network.x0(x_t, t, Cond(**given))


class Embed(nn.Module):
    """Token ids of one caption, [1, L] of each tokenizer -> the tensors `names` of its Cond."""

    def __init__(self, student: PipelineTeacher, tokenizers: Sequence[str], names: Sequence[str]):
        super().__init__()
        self._student = (student,)  # not a submodule: its denoiser would be traced too
        parts = student.pipeline.components.items()
        self.encoders = nn.ModuleList(
            part for name, part in parts if part is not None and name.startswith("text_encoder")
        )
        self.tokenizers, self.names = tuple(tokenizers), tuple(names)
        empty, self._empty = token_ids(student, "")
        self._silent = not empty.tokens.any()  # SDXL: the empty caption is all zeros

    def forward(self, *ids: Tensor) -> tuple[Tensor, ...]:
        student = self._student[0]
        given = dict(zip(self.tokenizers, ids, strict=True))
        if isinstance(student, Ragged):
            [(name, each)] = given.items()
            found = student.of_ids(each, _mask(student, name, each)).tensors()
        else:
            with _replaced(student.pipeline, {n: _Given(student, n, x) for n, x in given.items()}):
                found = student.embed([ANY]).tensors()
        outputs = tuple(found[name] for name in self.names)
        if not self._silent:
            return outputs
        name = self.tokenizers[0]
        has_text = (given[name] != self._empty[name]).any()
        return tuple(torch.where(has_text, x, torch.zeros_like(x)) for x in outputs)


class Decode(nn.Module):
    """Scaled latents [B, C, H, W] -> pixels [B, 3, S, S], about in [-1, 1]."""

    def __init__(self, student: PipelineTeacher):
        super().__init__()
        self._student = (student,)
        self.vae = student.vae

    def forward(self, latents: Tensor) -> Tensor:
        return self._student[0].decode(latents)


class Untraceable(ValueError):
    """A network that cannot leave torch, or differs where it runs: the reason, as a clause."""


@dataclass(frozen=True)
class Traced:
    """A module with an example of its inputs, and their names and those of its outputs.

    batched: whether the first dimension of all is a batch of any size.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    batched: bool = True

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.module(*inputs.values())
        return dict(zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True))

    def sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
        """Name -> shape, with the word batch for a batch of any size."""
        first = ["batch"] if self.batched else []
        return {name: [*first, *x.shape[len(first) :]] for name, x in tensors.items()}


def networks_of(student: PipelineTeacher, captions: tuple[str, str], t: Tensor) -> list[Traced]:
    """Denoiser, text encoder and decoder of a student, with an example of two pictures.

    Raises Untraceable for one of a family that is not traced.
    """
    if why := student.not_traced():
        raise Untraceable(f"a {student.kind_name()} was given, {why}")
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *student.latent_shape, generator=generator)
    cond = student.embed(captions)
    names = read_by(student.network, x_t, t, cond)
    given = {name: cond.tensors()[name] for name in names}
    _, ids = token_ids(student, captions[0])
    return [
        Traced("denoiser", Denoise(student.network, names), {"x_t": x_t, "t": t, **given}, ["x0"]),
        Traced("text_encoder", Embed(student, list(ids), names), ids, names, batched=False),
        Traced("decoder", Decode(student), {"latents": x_t}, ["pixels"]),
    ]


@torch.no_grad()
def read_by(network: Network, x_t: Tensor, t: Tensor, cond: Cond) -> list[str]:
    """Names of the tensors of a Cond on which the network's x0 depends.

    SD's network, for example, does not read the pooled caption, which is for heads.
    """
    names = [n for n in EMBEDDED if n in cond.tensors() and not (n == "mask" and cond.all_ones)]
    given: dict[str, Any] = {name: cond.tensors()[name] for name in names}
    x0 = network.x0(x_t, t, Cond(**given))

    def matters(name: str) -> bool:
        other = Cond(**{**given, name: _changed(given[name], name)})
        return not torch.equal(network.x0(x_t, t, other), x0)

    return [name for name in names if matters(name)]


def _changed(x: Tensor, name: str) -> Tensor:
    """Another tensor of a Cond: of a mask one that also hides the first token."""
    if name == "mask":
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
    return x + torch.arange(x[0].numel()).view(x[0].shape)


def token_ids(student: PipelineTeacher, caption: str) -> tuple[Cond, dict[str, Tensor]]:
    """The Cond of a caption, and its token ids [1, L] by the name of the tokenizer."""
    cond, kept = _read(student, caption)
    return cond, {name: each.ids for name, each in kept.items() if each.ids is not None}


def _read(student: PipelineTeacher, caption: str) -> tuple[Cond, dict[str, _Kept]]:
    """The Cond of a caption, and the tokenizers that have read it."""
    loaded = student.pipeline.components.items()
    made = {n: _Kept(part) for n, part in loaded if n.startswith("tokenizer") and part is not None}
    with _replaced(student.pipeline, made):
        cond = student.embed([caption or " ", caption])  # embedded, and not taken from the null
    used = {name: each for name, each in made.items() if each.ids is not None}
    return cond.index(slice(1, 2)), used


def reading(student: PipelineTeacher) -> dict[str, dict[str, Any]]:
    """How a program gives each tokenizer a caption.

    before, after: the text around it. empty: the text in place of the empty caption; None where its
    pipeline reads that in another length. padding_side: left or right. special_tokens: whether the
    tokenizer adds its own. Raises Untraceable for ids that no such call gives.
    """
    found, (_, empty) = {}, _read(student, "")
    for name, kept in _read(student, MARK)[1].items():
        before, mark, after = kept.text.partition(MARK)
        ids, of_empty = kept.ids, empty[name].ids
        assert ids is not None
        adds = [special for special in (True, False) if torch.equal(kept.again(special), ids)]
        if not mark or not adds:
            what = f"the {name} of a {type(student.pipeline).__name__} reads more than a text"
            raise Untraceable(what)
        same = of_empty is not None and of_empty.shape == ids.shape
        found[name] = {
            "before": before,
            "after": after,
            "empty": empty[name].text if same else None,
            "padding_side": kept.tokenizer.padding_side,
            "special_tokens": adds[0],
        }
    return found


@contextmanager
def _replaced(pipeline: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    """The pipeline with other tokenizers inside; its index does not change."""
    before = {name: pipeline.__dict__[name] for name in parts}
    pipeline.__dict__.update(parts)
    try:
        yield
    finally:
        pipeline.__dict__.update(before)


PADS = ("max_length", True)  # values of `padding` with which a pipeline reads a caption


class _Kept:
    """A tokenizer that keeps the last caption: its padded ids [1, L], and its text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.ids: Tensor | None = None
        self.text = ""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        if options.get("padding") in PADS:
            padded = {**options, "padding": "max_length"}
            self.ids = self._tokenizer(*texts, **padded).input_ids[-1:]
            given = texts[0] if texts else options["text"]
            self.text = given if isinstance(given, str) else given[-1]
        return self._tokenizer(*texts, **options)

    def apply_chat_template(self, conversations: Any, **options: Any) -> Any:
        found = self._tokenizer.apply_chat_template(conversations, **options)
        if options.get("tokenize") and options.get("padding") in PADS:
            self.ids = found["input_ids"][-1:]
            untokenized = {"tokenize": False, "add_generation_prompt": False}
            self.text = self._tokenizer.apply_chat_template(conversations, **untokenized)[-1]
        return found

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself, also of a processor."""
        return getattr(self._tokenizer, "tokenizer", self._tokenizer)

    def again(self, special: bool) -> Tensor:
        """The ids [1, L] of the kept text, as a program reads it."""
        assert self.ids is not None
        how = {"padding": "max_length", "max_length": self.ids.shape[1], "truncation": True}
        call = {**how, "return_tensors": "pt", "add_special_tokens": special}
        found: Tensor = self.tokenizer([self.text], **call).input_ids
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _Given:
    """A tokenizer that returns given ids [1, L] for any caption."""

    def __init__(self, student: PipelineTeacher, name: str, ids: Tensor):
        self._tokenizer = getattr(student.pipeline, name)
        self._ids, self._mask = ids, _mask(student, name, ids)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        # Pipelines ask again without padding, and warn of tokens that were cut: here of none.
        last = None if options.get("padding") in PADS else 1
        ids, mask = self._ids[:, :last], self._mask[:, :last]
        places = (mask.cumsum(1) - 1).clamp(min=0)  # ChatGLM's, which pads at the beginning
        return BatchEncoding({"input_ids": ids, "attention_mask": mask, "position_ids": places})

    def apply_chat_template(self, conversations: Any, **options: Any) -> Any:
        if options.get("tokenize"):
            return self(**options)
        return self._tokenizer.apply_chat_template(conversations, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _mask(student: PipelineTeacher, name: str, ids: Tensor) -> Tensor:
    """1 for each token of ids [1, L] that is no padding."""
    part = getattr(student.pipeline, name)
    tokenizer = getattr(part, "tokenizer", part)  # of a processor its own
    return (ids != tokenizer.pad_token_id).to(ids.dtype)
