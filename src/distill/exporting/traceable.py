"""Networks in a form that an exporter can trace, for as long as it traces.

A traced graph has one shape for all values and no complex numbers. Some networks of diffusers cut
each caption to its own length, or rotate queries and keys by complex numbers. Here captions keep
their padding, which is masked, and rotations are pairs of cosine and sine. The output is the same
to rounding, and `onnx_files.compare` compares it with that of diffusers' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from distill.core.types import Cond
from distill.exporting.rotations import JointRotated, Rotated, Tables, grid, picture_of, rows_of
from distill.teachers.chroma import Masked
from distill.teachers.lumina2 import CaptionFirst
from distill.teachers.network import Network
from distill.teachers.qwenimage import DoubleStream
from distill.teachers.zimage import SingleStream

MULTIPLE = 32  # of tokens, to which Z-Image pads the caption and the picture
Predict = Callable[[Tensor, Tensor, Cond], Tensor]


@contextmanager
def traceable(network: Network) -> Iterator[None]:
    """Within it a pass of this network can be traced; after it the network is as before."""
    model: Any = network.model
    if isinstance(network, Masked):
        with _part(model, "time_text_embed", ManyTimes(model.time_text_embed)):
            yield
    elif isinstance(network, DoubleStream):
        places = _part(model, "pos_embed", SignedPlaces(model.pos_embed))
        form = _qwen_image(network)
        with _predicting(network, form), _attending(model, JointRotated()), places:
            yield
    elif isinstance(network, SingleStream | CaptionFirst):
        form = _z_image if isinstance(network, SingleStream) else _lumina2
        with _predicting(network, form(network)), _attending(model, Rotated()):
            yield
    else:
        yield


@contextmanager
def _part(model: nn.Module, name: str, part: nn.Module) -> Iterator[None]:
    before = getattr(model, name)
    setattr(model, name, part)
    try:
        yield
    finally:
        setattr(model, name, before)


@contextmanager
def _predicting(network: Network, predict: Predict) -> Iterator[None]:
    network.__dict__["predict"] = predict
    try:
        yield
    finally:
        del network.__dict__["predict"]


@contextmanager
def _attending(model: nn.Module, processor: Any) -> Iterator[None]:
    """All attention layers with this processor."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Attention)]
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = processor
    try:
        yield
    finally:
        for layer, its in zip(layers, before, strict=True):
            layer.processor = its


class ManyTimes(nn.Module):
    """Chroma's embedding of t [B] for any B: diffusers writes B into the graph as a number."""

    def __init__(self, embedding: Any):
        super().__init__()
        self.embedding = embedding

    def forward(self, timestep: Tensor) -> Tensor:
        time = self.embedding.time_proj(timestep)
        guidance = self.embedding.guidance_proj(torch.zeros_like(timestep))
        places = self.embedding.mod_proj.to(time)
        told = torch.cat([time, guidance], 1)[:, None].expand(-1, places.shape[0], -1)
        return torch.cat([told, places.expand(time.shape[0], -1, -1)], -1).to(timestep.dtype)


class SignedPlaces(nn.Module):
    """Qwen-Image's rotations: rows and columns count from the middle, and the caption follows."""

    def __init__(self, embedding: Any):
        super().__init__()
        halves = [torch.view_as_real(x) for x in (embedding.pos_freqs, embedding.neg_freqs)]
        pairs = [width // 2 for width in embedding.axes_dim]
        self.tables = Tables(torch.cat(halves).split(pairs, dim=1))
        self.size = sum(len(half) for half in halves)  # place -1 is the last

    def forward(self, sizes: Any, device: Any, max_txt_seq_len: int) -> tuple[Tensor, Tensor]:
        [(_, height, width)] = sizes[0]
        rows, columns = (torch.arange(side) - (side - side // 2) for side in (height, width))
        row, column = (
            x.flatten() % self.size for x in torch.meshgrid(rows, columns, indexing="ij")
        )
        image = self.tables.of(torch.zeros_like(row), row, column, batch=1)
        after = torch.arange(max_txt_seq_len) + max(height // 2, width // 2)
        return image, self.tables.of(after, after, after, batch=1)


def _qwen_image(network: Any) -> Predict:
    model, patch = network.model, network.patch

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        packed = F.pixel_unshuffle(x_t, patch)
        assert cond.mask is not None
        tokens = model(
            packed.flatten(2).transpose(1, 2),
            timestep=t,
            encoder_hidden_states=cond.tokens,
            encoder_hidden_states_mask=cond.mask.bool(),
            img_shapes=[[(1, *packed.shape[-2:])]],  # the first is that of all
        ).sample
        return F.pixel_shuffle(network.grid(tokens, x_t), patch)

    return predict


def _z_image(network: Any) -> Predict:
    model, patch = network.model, network.patch
    embedder = model.rope_embedder
    angles = embedder.precompute_freqs_cis(model.axes_dims, model.axes_lens, model.rope_theta)
    tables = Tables([torch.view_as_real(x) for x in angles])

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        time = model.t_embedder((1000 - 1000 * t) / 1000 * model.t_scale).type_as(x_t)
        caption, count = _filled_caption(model, cond)
        place = torch.arange(caption.shape[1])
        full = (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        read = place < full
        turned = tables.of(place + 1, batch=x_t.shape[0])
        for layer in model.context_refiner:
            caption = layer(caption, read, turned)
        image = model.all_x_embedder[f"{patch}-1"](rows_of(x_t, patch))
        number = image.shape[1]
        padding = model.x_pad_token.expand(x_t.shape[0], -number % MULTIPLE, -1)
        rows, columns = (F.pad(x, (0, -number % MULTIPLE)) for x in grid(x_t, patch))
        image = torch.cat([image, padding], 1)
        first = torch.where(torch.arange(image.shape[1]) < number, full + 1, 0)
        of_image = tables.of(first, rows, columns, batch=x_t.shape[0])
        for layer in model.noise_refiner:
            image = layer(image, None, of_image, time)
        both, turned = torch.cat([image, caption], 1), torch.cat([of_image, turned], 1)
        mask = torch.cat([torch.ones_like(image[..., 0], dtype=torch.bool), read], 1)
        for layer in model.layers:
            both = layer(both, mask, turned, time)
        found = model.all_final_layer[f"{patch}-1"](both, c=time)[:, :number]
        return -picture_of(found, x_t, patch)

    return predict


def _filled_caption(model: Any, cond: Cond) -> tuple[Tensor, Tensor]:
    """Z-Image's captions [B, L, D], the learnt token behind each, and their lengths [B, 1]."""
    assert cond.mask is not None
    tokens = F.pad(cond.tokens, (0, 0, 0, -cond.tokens.shape[1] % MULTIPLE))
    count = cond.mask.sum(1, keepdim=True)
    own = torch.arange(tokens.shape[1]) < count
    return torch.where(own[..., None], model.cap_embedder(tokens), model.cap_pad_token), count


def _lumina2(network: Any) -> Predict:
    model, patch = network.model, network.patch
    tables = Tables([torch.view_as_real(x) for x in model.rope_embedder.freqs_cis])

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.mask is not None
        time, caption = model.time_caption_embed(x_t, 1 - t, cond.tokens)
        read = cond.mask.bool()
        turned = tables.of(torch.arange(caption.shape[1]), batch=x_t.shape[0])
        for layer in model.context_refiner:
            caption = layer(caption, read, turned)
        image = model.x_embedder(rows_of(x_t, patch))
        after = cond.mask.long().sum(1, keepdim=True)
        of_image = tables.of(after, *grid(x_t, patch), batch=x_t.shape[0])
        for layer in model.noise_refiner:
            image = layer(image, None, of_image, time)
        both, turned = torch.cat([caption, image], 1), torch.cat([turned, of_image], 1)
        mask = torch.cat([read, torch.ones_like(image[..., 0], dtype=torch.bool)], 1)
        for layer in model.layers:
            both = layer(both, mask, turned, time)
        found = model.norm_out(both, time)[:, caption.shape[1] :]
        return -picture_of(found, x_t, patch)

    return predict
