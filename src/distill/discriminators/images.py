"""ADD's feature network: a frozen vision transformer on pixels, tapped at five depths.

map_k = (patch tokens + class token) after the patch embedding and after blocks 2, 5, 8, 11 of 12
(the readout of StyleGAN-T)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from distill.core.half_weights import HalfWeights
from distill.core.randomness import uniform
from distill.core.types import Cond
from distill.machine.faults import first_line
from distill.machine.meta_device import is_shapes_only
from distill.storage.hub_settings import NO_CODE, check_folder
from distill.storage.loaded_weights import check_all_loaded, check_finite
from distill.storage.pictures import IMAGENET

DEPTHS = (3 / 12, 6 / 12, 9 / 12, 12 / 12)  # blocks 2, 5, 8, 11 of twelve, as shares of the depth
UNUSED = r"(^|\.)pooler\."  # DINO's files have none, and it is never run


class ImageFeatures(nn.Module):
    """Feature maps of a ViT (DINOv2, DINO, CLIP). Gradient flows to the pixels; the weights are
    frozen.

    Args:
        path: folder or hub id of a transformers model.
        size: side in pixels of the network's input; 518 is DINOv2's own, 224 costs a fifth.
        taps: blocks after which to tap, counted from 0; -1 is the patch embedding. None: as above,
            scaled to the depth.
        mean, std: normalisation of pixels in [0, 1].
        crop: probability, per batch, of a random square crop of side `size` of a larger image.
        augment: StyleGAN-T's colour, translation and cutout on every image.
        random_weights: a seed; the network keeps its shape and gets untrained weights of this seed,
            as a control for Table 1a. None: the weights of `path`.
    """

    space = "pixels"

    def __init__(
        self,
        path: str,
        *,
        size: int = 518,
        taps: Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        crop: float = 0.0,
        augment: bool = False,
        random_weights: int | None = None,
    ):
        super().__init__()
        model = _read(path)
        if random_weights is not None:
            model = untrained(model, random_weights)
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self._weights = HalfWeights(self.model)
        depth = self.model.config.num_hidden_layers
        scaled = dict.fromkeys(
            round(d * depth) - 1 for d in DEPTHS
        )  # of three blocks, two coincide
        self.taps = [-1, *scaled] if taps is None else list(taps)
        if not self.taps or len(set(self.taps)) < len(self.taps):
            what = "must name at least one block, and each only once"
            raise ValueError(f"discriminator.features.taps={self.taps}: {what}")
        if any(not -1 <= k < depth for k in self.taps):
            raise ValueError(
                f"discriminator.features.taps={self.taps}: this network has blocks 0 to {depth - 1}"
            )
        smallest = getattr(self.model.config, "patch_size", 1)
        if size < smallest:
            what = f"the network's patches have {smallest} pixels a side; use at least {smallest}"
            raise ValueError(f"discriminator.features.size={size}: {what}")
        self.size, self.crop, self.augment = size, crop, augment
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> ImageFeatures:
        return self  # frozen: stays in eval mode

    def hold_half(self, **how: Any) -> None:
        """Hold the weights in bfloat16 where autocast would cast them; see `core.half_weights`."""
        self._weights.halve(**how)

    def hold_whole(self) -> None:
        """Undo `hold_half`."""
        self._weights.restore()

    @property
    def width(self) -> int:
        """Width of the class token."""
        return self.model.config.hidden_size

    @property
    def channels(self) -> Mapping[str, int]:
        return {f"tap{k}": self.width for k in self.taps}

    def __call__(
        self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] -> maps [B, C, N], one per tap; t and cond are ignored."""
        hidden = self._run(self.prepare(x, generator), output_hidden_states=True).hidden_states
        tokens = [hidden[k + 1] for k in self.taps]  # entry 0 is the embedding
        return [(h[:, 1:] + h[:, :1]).transpose(1, 2) for h in tokens]

    def describe(self, x: Tensor) -> Tensor:
        """c_img: the last class token [B, C] of pixels [B, 3, H, W]."""
        with torch.no_grad():
            return self._run(self.prepare(x)).last_hidden_state[:, 0]

    def prepare(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Network input: augmented where configured, resized and normalised; differentiable.

        The antialiased bilinear resize is ours. ADD does not say; StyleGAN-T averages over areas.
        """
        if generator is not None and self.augment:
            x = diff_augment(x, generator)
        x = (x + 1) / 2
        if generator is not None and self.crop and min(x.shape[-2:]) > self.size:
            coin, top, left = uniform(3, generator, "crop")
            if coin < self.crop:
                i, j = (
                    int(u * (n - self.size + 1))
                    for u, n in zip((top, left), x.shape[-2:], strict=True)
                )
                x = x[..., i : i + self.size, j : j + self.size]
        if tuple(x.shape[-2:]) != (self.size, self.size):
            x = F.interpolate(
                x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return (x - self.mean) / self.std

    def _run(self, x: Tensor, **options: Any) -> Any:
        self._weights.fit(x)
        native = (
            x.shape[-1] == self.model.config.image_size or self.model.config.model_type == "dinov2"
        )
        return self.model(x, **options, **({} if native else {"interpolate_pos_encoding": True}))


def _read(path: str) -> Any:
    """The network at this path. Raises ValueError for one that cannot be read."""
    where = f"discriminator.features.path={path}"
    check_folder(path, where)
    try:
        if is_shapes_only():
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(path, local_files_only=True, **NO_CODE)
                return AutoModel.from_config(config)
        model, report = AutoModel.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **NO_CODE
        )
    except (OSError, ValueError, ImportError) as error:  # not downloaded, damaged, no ViT
        advice = "give a folder of a transformers ViT, or check the hub id and the network"
        raise ValueError(f"{where}: cannot be read ({first_line(error)}); {advice}") from None
    check_all_loaded(report, where, type(model).__name__, spare=UNUSED)
    check_finite(model, where)
    return model


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """A network of the same class and configuration, with its initial weights of this seed.

    Global random numbers are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(model.config)


def diff_augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """DiffAugment's colour, translation (1/8) and cutout (1/5) on pixels [B, 3, H, W] in [-1, 1].

    Differentiable.
    """
    n, _, height, width = x.shape
    u = torch.rand(7, n, generator=generator, device=generator.device)
    u = u.to(x.device).view(7, n, 1, 1, 1)
    x = x + u[0] - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * u[1]) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (u[2] + 0.5) + mean
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    sides = zip(u[3:5], (height, width), strict=True)
    shift_y, shift_x = (((2 * d.view(n, 1) - 1) * side / 8).round().long() for d, side in sides)
    y, z = rows + shift_y, columns + shift_x  # [B, H], [B, W]: source of each pixel
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((z >= 0) & (z < width))[
        :, None, None, :
    ]
    batch = torch.arange(n, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[
        batch, y.clamp(0, height - 1)[:, :, None], z.clamp(0, width - 1)[:, None]
    ]
    x = moved.permute(0, 3, 1, 2) * inside
    top, left = (u[5].view(n, 1) * height, u[6].view(n, 1) * width)
    cut_y = (rows - top).abs() < height / 10
    cut_x = (columns - left).abs() < width / 10
    return x * ~(cut_y[:, None, :, None] & cut_x[:, None, None, :])
