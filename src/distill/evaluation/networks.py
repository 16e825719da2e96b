"""Frozen feature networks. Each preprocesses pictures as the reference code of its metric does.

    Inception  2,048 pooled features of FID's own Inception  FID, KID
    Dinov2     class token                                   FD-DINOv2 (Stein 2023), manifolds
    OpenClip   normalised embeddings of pictures and texts   CLIP score, HPSv2
    Clip       the same, of a transformers model             CMMD (Jayasumana 2024), PickScore

"Clean" means: resized in float by an antialiased bicubic filter, without keeping the aspect ratio
(clean-fid, Parmar et al. 2022).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from distill.core.tensors import fingerprint
from distill.machine.faults import first_line, quiet_logging
from distill.storage.bounded import check_archive
from distill.storage.hub_settings import NO_CODE, check_folder
from distill.storage.loaded_weights import check_all_loaded, check_finite
from distill.storage.pictures import IMAGENET
from distill.terminal.progress import stage

LAYERS = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "MaxPool_1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "MaxPool_2",
)
LAYERS += (
    *(f"Mixed_{x}" for x in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")),
    "AvgPool",
)


class Describer(ABC):
    """A feature network. `load` reads its weights; `prepare` runs in DataLoader workers."""

    model: nn.Module
    scale = 1.0
    needs: ClassVar[str] = ""  # "captions": `images` also takes the caption of each picture

    def __init__(self, name: str, shown: str):
        # Both are texts of the protocol: the network, and how it preprocesses pictures.
        self.name, self.shown = name, shown

    def load(self) -> None:
        """Read the weights once; download them if they are not here.

        Raises ValueError with the reason if they cannot be read.
        """
        if hasattr(self, "model"):
            return
        try:
            with (
                stage(f"loading {self.name}"),
                quiet_logging(),
                redirect_stderr(StringIO()),
            ):  # open_clip logs every step, and libraries print bars of their own
                self.model = self._read().eval().requires_grad_(False)
            check_finite(self.model, self.name)
        except Exception as error:  # damaged files and downloads raise nearly anything
            advice = "they are fetched at first use: check name and network, or give a local path"
            if isinstance(error, ImportError):
                advice = "pip install 'distill[eval]'"
            what = (
                f"metrics.networks: the weights of {self.name} cannot be read"
                f" ({first_line(error)}); {advice}"
            )
            raise ValueError(f"{what}, or leave out of metrics.measures what needs them") from None

    def __str__(self) -> str:
        """Network, its revision on the hub, a hash of its weights, and its preprocessing."""
        revision = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        # Only the last part of a path: the same network has other paths on other machines.
        name = self.name
        for key in ("path", "pretrained"):
            place = str(getattr(self, key, None)).removeprefix("local-dir:")
            if Path(place).exists():
                name = name.replace(place, Path(place).name)
        return (
            f"{name}{f'@{revision[:12]}' if revision else ''}, weights {fingerprint(self.model)},"
            f" {self.shown}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # DataLoader workers only call `prepare`

    @abstractmethod
    def _read(self) -> nn.Module: ...

    @abstractmethod
    def prepare(self, picture: Image.Image) -> Tensor:
        """An RGB picture of any size -> the input of the network, [3, S, S]."""

    @abstractmethod
    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        """Prepared pictures [B, 3, S, S] -> features [B, D]."""


def clean_resize(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 255]."""
    pixels = pil_to_tensor(picture)[None].float()
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)[0]


def load_complete(kind: Any, path: str) -> nn.Module:
    """A transformers model in float32; ValueError unless its files hold every tensor."""
    check_folder(path, f"metrics: {path}")
    options = {"dtype": torch.float32, "output_loading_info": True, **NO_CODE}
    model, report = kind.from_pretrained(path, **options)
    check_all_loaded(report, path, type(model).__name__)
    return model


class Inception(Describer):
    """`path`: a file of torch-fidelity's weights, which holds only tensors; None downloads it."""

    def __init__(self, path: str | None = None):
        super().__init__(
            f"Inception {path or 'of torch-fidelity'}", "pooled features, 299 x 299 clean bicubic"
        )
        self.path = path

    def _read(self) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if self.path:
            check_archive(Path(self.path))
            torch.load(self.path, weights_only=True)  # refuses code, which torch-fidelity would run
        return FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=self.path
        )

    def prepare(self, picture: Image.Image) -> Tensor:
        return (clean_resize(picture, 299) - 128) / 128

    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        for name in LAYERS:  # its `forward` takes bytes, and resizes them without a filter
            batch = getattr(self.model, name)(batch)
        return batch.flatten(1)


class Dinov2(Describer):
    """`path`: folder or hub id of a transformers DINOv2; its input has `size` pixels a side."""

    def __init__(self, path: str = "facebook/dinov2-large", *, size: int = 224):
        super().__init__(path, f"class token, {size} x {size} clean bicubic")
        self.path, self.size = path, size

    def _read(self) -> nn.Module:
        from transformers import AutoModel

        return load_complete(AutoModel, self.path)

    def prepare(self, picture: Image.Image) -> Tensor:
        return normalize(clean_resize(picture, self.size) / 255, *IMAGENET)

    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        return self.model(batch).last_hidden_state[:, 0]


class TwoTowers(Describer):
    """Embeds pictures and texts as unit vectors.

    `scale` times their scalar product is the logit of the model.
    """

    _known: tuple[Sequence[str], Tensor] | None = None

    @abstractmethod
    def _texts(self, captions: list[str], device: torch.device) -> Tensor: ...

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def texts(self, captions: Sequence[str], device: torch.device, batch: int = 64) -> Tensor:
        """Captions, truncated to the model's length -> [N, D], on the CPU; caches the last call."""
        if self._known is None or self._known[0] != captions:
            self.model.to(device)
            parts = [
                self._texts(list(captions[i : i + batch]), device)
                for i in range(0, len(captions), batch)
            ]
            self._known = captions, F.normalize(torch.cat(parts).float(), dim=1).cpu()
            self.model.to("cpu")
        return self._known[1]


class OpenClip(TwoTowers):
    """`path`: the open_clip name of a model, or local-dir:<folder>.

    `pretrained` is a tag or a file of weights.
    """

    def __init__(self, path: str = "ViT-g-14", *, pretrained: str | None = "laion2b_s12b_b42k"):
        self.path = path
        self.pretrained = None if ":" in path else pretrained  # a local-dir: holds its weights
        super().__init__(
            f"open_clip {path} {self.pretrained or ''}".strip(), "resized and cropped by open_clip"
        )

    def _read(self) -> nn.Module:
        import open_clip

        model, self.transform = open_clip.create_model_from_pretrained(
            self.path, self.pretrained, weights_only=True
        )
        self.tokenizer = open_clip.get_tokenizer(self.path)
        return model

    def prepare(self, picture: Image.Image) -> Tensor:
        return self.transform(picture)

    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        return self.model.encode_image(batch, normalize=True)

    def _texts(self, captions: list[str], device: torch.device) -> Tensor:
        return self.model.encode_text(self.tokenizer(captions).to(device))


class Clip(TwoTowers):
    """`path`: folder or hub id of a transformers CLIP; `processor`: the same of its processor.

    With `whole` the picture is resized clean without a crop, as in CMMD.
    """

    def __init__(self, path: str, *, processor: str | None = None, whole: bool = False):
        super().__init__(
            path, "whole, clean bicubic" if whole else "resized and cropped by its processor"
        )
        self.path, self.processor, self.whole = path, processor or path, whole

    def _read(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        check_folder(self.processor, f"metrics: {self.processor}")
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor, **NO_CODE)
        self.image_processor = AutoImageProcessor.from_pretrained(self.processor, **NO_CODE)
        return load_complete(CLIPModel, self.path)

    def prepare(self, picture: Image.Image) -> Tensor:
        if self.whole:
            pixels = clean_resize(picture, self.image_processor.crop_size["height"]) / 255
            return normalize(
                pixels, self.image_processor.image_mean, self.image_processor.image_std
            )
        return self.image_processor(picture, return_tensors="pt").pixel_values[0]

    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        return F.normalize(self.model.get_image_features(batch).pooler_output, dim=1)

    def _texts(self, captions: list[str], device: torch.device) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = self.tokenizer(captions, **options, return_tensors="pt").to(device)
        return self.model.get_text_features(**tokens).pooler_output
