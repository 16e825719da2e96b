"""Frozen networks that describe pictures, each shown them as the code of its metric does.

    Inception  2,048 pooled features of FID's own Inception  FID, KID
    Dinov2     class token                                   FD-DINOv2 (Stein 2023), manifolds
    OpenClip   embeddings of pictures and texts, length 1    CLIP score, HPSv2
    Clip       the same of a transformers model              CMMD (Jayasumana 2024), PickScore

"Clean" is resized as floats by an antialiased bicubic filter, the shape given up (clean-fid, Parmar
et al. 2022).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from distill.core.tensors import fingerprint
from distill.machine.faults import first_line, silent
from distill.storage.bounded import check_archive
from distill.storage.elsewhere import check_folder
from distill.storage.pictures import IMAGENET
from distill.storage.unread import refuse_broken, refuse_unread
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
    """Costs nothing until `load`; then `prepare`, which a loader's workers do, and `images`."""

    model: nn.Module
    scale = 1.0

    def __init__(self, name: str, shown: str):
        self.name, self.shown = name, shown  # in words

    def load(self) -> None:
        """Read the weights once, fetching them if need be.

        Raises ValueError that says what stood in the way.
        """
        if hasattr(self, "model"):
            return
        try:
            with (
                stage(f"loading {self.name}"),
                silent(),
                redirect_stderr(StringIO()),
            ):  # open_clip tells every step of it; loading bars
                self.model = self._read().eval().requires_grad_(False)
            refuse_broken(self.model, self.name)
        except Exception as error:  # damaged files, hubs and networks raise nearly anything
            advice = "they are fetched at first use: check name and network, or give a local path"
            if isinstance(error, ImportError):
                advice = "pip install 'distill[eval]'"
            what = (
                f"metrics.networks: the weights of {self.name} cannot be read"
                f" ({first_line(error)}); {advice}"
            )
            raise ValueError(f"{what}, or leave out of metrics.measures what needs them") from None

    def __str__(self) -> str:
        """Network, revision of a hub's, a hash of its weights, and how it is shown pictures."""
        revision = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        # A folder's own name: the same network lies elsewhere on another machine.
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
        return {**self.__dict__, "model": None}  # workers prepare pictures only

    @abstractmethod
    def _read(self) -> nn.Module: ...

    @abstractmethod
    def prepare(self, picture: Image.Image) -> Tensor:
        """An RGB picture of any size -> what the network reads, [3, S, S]."""

    @abstractmethod
    def images(self, batch: Tensor) -> Tensor:
        """Prepared pictures [B, 3, S, S] -> features [B, D]."""


def clean(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 255]."""
    pixels = pil_to_tensor(picture)[None].float()
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)[0]


def _whole(kind: Any, path: str) -> nn.Module:
    """A transformers model with every one of its tensors from the files, in float32."""
    check_folder(path, f"metrics: {path}")
    model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    refuse_unread(report, path, type(model).__name__)
    return model


class Inception(Describer):
    """`path`: a file of torch-fidelity's weights, of tensors alone; None fetches it."""

    def __init__(self, path: str | None = None):
        super().__init__(
            f"Inception {path or 'of torch-fidelity'}", "pooled features, 299 x 299 clean bicubic"
        )
        self.path = path

    def _read(self) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if self.path:
            check_archive(Path(self.path))
            torch.load(self.path, weights_only=True)  # refuses code, which the next line would run
        return FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=self.path
        )

    def prepare(self, picture: Image.Image) -> Tensor:
        return (clean(picture, 299) - 128) / 128

    def images(self, batch: Tensor) -> Tensor:
        for name in LAYERS:  # its own forward takes bytes, and resizes them without a filter
            batch = getattr(self.model, name)(batch)
        return batch.flatten(1)


class Dinov2(Describer):
    """`path`: folder or hub id of a transformers DINOv2, shown pictures of `size` pixels a side."""

    def __init__(self, path: str = "facebook/dinov2-large", *, size: int = 224):
        super().__init__(path, f"class token, {size} x {size} clean bicubic")
        self.path, self.size = path, size

    def _read(self) -> nn.Module:
        from transformers import AutoModel

        return _whole(AutoModel, self.path)

    def prepare(self, picture: Image.Image) -> Tensor:
        return normalize(clean(picture, self.size) / 255, *IMAGENET)

    def images(self, batch: Tensor) -> Tensor:
        return self.model(batch).last_hidden_state[:, 0]


class TwoTowers(Describer):
    """Pictures and texts as vectors of length 1, of which `scale` times the scalar product is the
    model's own score.
    """

    _known: tuple[Sequence[str], Tensor] | None = None

    @abstractmethod
    def _texts(self, captions: list[str], device: torch.device) -> Tensor: ...

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def texts(self, captions: Sequence[str], device: torch.device, batch: int = 64) -> Tensor:
        """Captions, cut to what it reads -> [N, D], on the CPU; the same ones are known the second
        time.
        """
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
    """A model by its open_clip name, or local-dir:<folder>; `pretrained` is a tag or a file of
    weights.
    """

    def __init__(self, path: str = "ViT-g-14", *, pretrained: str | None = "laion2b_s12b_b42k"):
        self.path, self.pretrained = (
            path,
            None if ":" in path else pretrained,
        )  # such a folder brings its own
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

    def images(self, batch: Tensor) -> Tensor:
        return self.model.encode_image(batch, normalize=True)

    def _texts(self, captions: list[str], device: torch.device) -> Tensor:
        return self.model.encode_text(self.tokenizer(captions).to(device))


class Clip(TwoTowers):
    """`path`: folder or hub id of a transformers CLIP, `processor` where that is elsewhere.

    With `whole` the picture is resized clean, so that nothing of it is cut off, as CMMD has it.
    """

    def __init__(self, path: str, *, processor: str | None = None, whole: bool = False):
        super().__init__(
            path, "whole, clean bicubic" if whole else "resized and cropped by its processor"
        )
        self.path, self.processor, self.whole = path, processor or path, whole

    def _read(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        check_folder(self.processor, f"metrics: {self.processor}")
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)
        self.eyes = AutoImageProcessor.from_pretrained(self.processor)
        return _whole(CLIPModel, self.path)

    def prepare(self, picture: Image.Image) -> Tensor:
        if self.whole:
            pixels = clean(picture, self.eyes.crop_size["height"]) / 255
            return normalize(pixels, self.eyes.image_mean, self.eyes.image_std)
        return self.eyes(picture, return_tensors="pt").pixel_values[0]

    def images(self, batch: Tensor) -> Tensor:
        return F.normalize(self.model.get_image_features(batch).pooler_output, dim=1)

    def _texts(self, captions: list[str], device: torch.device) -> Tensor:
        most = self.model.config.text_config.max_position_embeddings
        cut = {"padding": "max_length", "truncation": True, "max_length": most}
        return self.model.get_text_features(
            **self.tokenizer(captions, **cut, return_tensors="pt").to(device)
        ).pooler_output
