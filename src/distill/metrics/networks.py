"""Frozen networks that describe pictures, each shown them as the code of its metric does.

    Inception   2,048 pooled features of FID's own Inception     FID, KID
    Dinov2      class token                                      FD-DINOv2 (Stein et al. 2023), precision and recall
    OpenClip    embeddings of pictures and texts, length 1       CLIP score
    Clip        the same of a transformers model                 CMMD (Jayasumana et al. 2024), PickScore, HPSv2

"Clean" means resized as floats by an antialiased bicubic filter, the shape given up (clean-fid, Parmar et al. 2022).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from distill.files import fingerprint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# FID's features are what the last of these gives.
LAYERS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2")
LAYERS += (
    *(f"Mixed_5{x}" for x in "bcd"),
    *(f"Mixed_6{x}" for x in "abcde"),
    *(f"Mixed_7{x}" for x in "abc"),
    "AvgPool",
)


class Describer(ABC):
    """Costs nothing until `load`ed; then `prepare`, which loader workers do, and `images`."""

    dino: ClassVar[bool] = False  # what an ADD discriminator sees too
    model: nn.Module | None = None
    shown: str  # how, in words

    def __init__(self, path: str | None):
        self.path = path

    def load(self) -> None:
        """Read the weights, fetching them if need be. Raises ValueError that says what stood in the way."""
        try:
            with redirect_stderr(StringIO()):  # loading bars
                self.model = self._read().eval().requires_grad_(False)
        except ImportError:
            raise ValueError("FID's Inception comes with torch-fidelity: pip install 'distill[eval]'") from None
        except Exception as error:  # damaged files, hubs and networks raise nearly anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            what = f"metrics.networks: the weights of {self.name} cannot be read ({reason})"
            advice = "they are fetched at first use: check name and network, or give a local path"
            raise ValueError(f"{what}; {advice}, or leave out of metrics.measures what needs them") from None

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.path or 'of torch-fidelity'}"

    @property
    def about(self) -> str:
        """What the features are: network, revision of a hub's, a hash of its weights, and how it is shown pictures."""
        revision = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        return f"{self.name}{f'@{revision[:12]}' if revision else ''}, weights {fingerprint(self.model)}, {self.shown}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # workers of a loader prepare pictures only

    @abstractmethod
    def _read(self) -> nn.Module: ...

    @abstractmethod
    def prepare(self, picture: Image.Image) -> Tensor:
        """An RGB picture of any size -> what the network reads, [3, S, S]."""

    @abstractmethod
    def images(self, batch: Tensor) -> Tensor:
        """Prepared pictures [B, 3, S, S] -> features [B, D] in float32."""


def clean(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 255]."""
    pixels = pil_to_tensor(picture)[None].float()
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)[0]


class Inception(Describer):
    """`path`: a file of torch-fidelity's weights, tensors alone; None fetches it. Pictures of 299 pixels, clean."""

    shown = "pooled features, 299 x 299 clean bicubic"

    def __init__(self, path: str | None = None):
        super().__init__(path)

    def _read(self) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if self.path:
            torch.load(self.path, weights_only=True)  # refuses code, which the next line would run
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=self.path)

    def prepare(self, picture: Image.Image) -> Tensor:
        return (clean(picture, 299) - 128) / 128

    def images(self, batch: Tensor) -> Tensor:
        for name in LAYERS:  # its own forward takes bytes, and resizes them without a filter
            batch = getattr(self.model, name)(batch)
        return batch.flatten(1)


class Dinov2(Describer):
    """`path`: folder or hub id of a transformers DINOv2. Pictures of `size` pixels, clean, normalised as ImageNet's."""

    dino = True

    def __init__(self, path: str = "facebook/dinov2-large", *, size: int = 224):
        super().__init__(path)
        self.size, self.shown = size, f"class token, {size} x {size} clean bicubic"

    def _read(self) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.path, dtype=torch.float32)

    def prepare(self, picture: Image.Image) -> Tensor:
        return normalised(clean(picture, self.size) / 255, *IMAGENET)

    def images(self, batch: Tensor) -> Tensor:
        return self.model(batch).last_hidden_state[:, 0]


class TwoTowers(Describer):
    """Pictures and texts as vectors of length 1, of which `scale` times the scalar product is the model's own score."""

    _known: tuple[Sequence[str], Tensor] | None = None

    @abstractmethod
    def _texts(self, captions: list[str], device: torch.device) -> Tensor: ...

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def texts(self, captions: Sequence[str], device: torch.device, batch: int = 64) -> Tensor:
        """Captions, cut to what it reads -> [N, D] in float32, on the CPU; the same ones are known the second time."""
        if self._known is None or self._known[0] != captions:
            self.model.to(device)
            parts = [list(captions[i : i + batch]) for i in range(0, len(captions), batch)]
            found = torch.cat([F.normalize(self._texts(part, device), dim=1).cpu() for part in parts])
            self.model.to("cpu")
            self._known = captions, found
        return self._known[1]


class OpenClip(TwoTowers):
    """A model by its open_clip name, or local-dir:<folder>; `pretrained` a tag or a file of weights, HPSv2's also."""

    shown = "resized and cropped as open_clip does"

    def __init__(self, path: str = "ViT-g-14", *, pretrained: str | None = "laion2b_s12b_b42k"):
        super().__init__(path)
        self.pretrained = None if path.startswith(("local-dir:", "hf-hub:")) else pretrained

    @property
    def name(self) -> str:
        return " ".join(["open_clip", self.path, self.pretrained or ""]).strip()

    def _read(self) -> nn.Module:
        import open_clip

        model, self.prepare = open_clip.create_model_from_pretrained(self.path, self.pretrained, weights_only=True)
        self.tokenizer = open_clip.get_tokenizer(self.path)
        return model

    def prepare(self, picture: Image.Image) -> Tensor:
        raise AttributeError("not loaded yet")

    def images(self, batch: Tensor) -> Tensor:
        return self.model.encode_image(batch, normalize=True).float()

    def _texts(self, captions: list[str], device: torch.device) -> Tensor:
        return self.model.encode_text(self.tokenizer(captions).to(device)).float()


class Clip(TwoTowers):
    """`path`: folder or hub id of a transformers CLIP, `processor` where that is elsewhere.

    With `whole` the picture is resized clean, so that nothing of it is cut off, as CMMD has it.
    """

    def __init__(self, path: str, *, processor: str | None = None, whole: bool = False):
        super().__init__(path)
        self.processor, self.whole = processor or path, whole
        self.shown = "all of it, clean bicubic" if whole else "resized and cropped by its processor"

    def _read(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)
        self.eyes = AutoImageProcessor.from_pretrained(self.processor)
        return CLIPModel.from_pretrained(self.path, dtype=torch.float32)

    def prepare(self, picture: Image.Image) -> Tensor:
        if self.whole:
            return normalised(
                clean(picture, self.eyes.crop_size["height"]) / 255, self.eyes.image_mean, self.eyes.image_std
            )
        return torch.as_tensor(self.eyes(picture, return_tensors="pt").pixel_values[0])

    def images(self, batch: Tensor) -> Tensor:
        return F.normalize(self.model.get_image_features(batch).pooler_output, dim=1)

    def _texts(self, captions: list[str], device: torch.device) -> Tensor:
        most = self.model.config.text_config.max_position_embeddings
        cut = {"padding": "max_length", "truncation": True, "max_length": most}
        return self.model.get_text_features(
            **self.tokenizer(captions, **cut, return_tensors="pt").to(device)
        ).pooler_output


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
