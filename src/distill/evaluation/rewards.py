"""Networks that rate a picture by one number, as people would.

    Aesthetic    LAION's improved predictor: an MLP on the normalised embedding of CLIP ViT-L/14
    ImageReward  BLIP (ViT-L, and a BERT that attends to the picture) and an MLP (Xu et al. 2023)

Both are read from the files of their authors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from distill.evaluation.networks import Describer, load_complete
from distill.storage.bounded import mapping_of
from distill.storage.hub_settings import NO_CODE, check_folder
from distill.storage.loaded_weights import check_all_loaded, tensors_of

WIDTHS = (1024, 128, 64, 16, 1)  # of both MLPs, which have no activations
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _mlp(width: int) -> nn.Sequential:
    """Linear layers under their authors' names, 0, 2, 4, 6 and 7; between them dropouts."""
    pairs = zip((width, *WIDTHS), WIDTHS, strict=False)
    first, second, third, fourth, last = (nn.Linear(*pair) for pair in pairs)
    rest = (nn.Identity() for _ in range(3))
    return nn.Sequential(first, next(rest), second, next(rest), third, next(rest), fourth, last)


def _prepared(picture: Image.Image, side: int) -> Tensor:
    """[3, side, side], as OpenAI's code prepares pictures for CLIP: resized by Pillow, cropped."""
    steps = (
        transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(side),
        transforms.ToTensor(),
        transforms.Normalize(*CLIP_PIXELS),
    )
    return transforms.Compose(steps)(picture)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Load all tensors in float32; ValueError unless the file holds exactly those of the model."""
    known = model.state_dict()
    other = [n for n, x in tensors.items() if n in known and known[n].shape != x.shape]
    found = {
        "missing_keys": sorted(known.keys() - tensors.keys()),
        "unexpected_keys": sorted(tensors.keys() - known.keys()),
        "mismatched_keys": other,
    }
    check_all_loaded(found, str(file), type(model).__name__)
    model.load_state_dict({name: x.float() for name, x in tensors.items()})


class Aesthetic(Describer):
    """A score of each picture, mostly between 1 and 10, as people rated photographs.

    `path`: folder or hub id of a transformers CLIP ViT-L/14; `pretrained`: the file of the MLP.
    """

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        *,
        pretrained: str = "sac+logos+ava1-l14-linearMSE.pth",
    ):
        super().__init__(f"{path} {pretrained}", "resized bicubic, centred square")
        self.path, self.pretrained = path, pretrained

    def _read(self) -> nn.Module:
        from transformers import CLIPModel

        file = Path(self.pretrained)
        tensors = {n.removeprefix("layers."): x for n, x in tensors_of(file).items()}
        clip = load_complete(CLIPModel, self.path)
        self.side = clip.config.vision_config.image_size
        mlp = _mlp(clip.config.projection_dim)
        _load(mlp, tensors, file)
        return nn.ModuleDict({"clip": clip, "mlp": mlp})

    def prepare(self, picture: Image.Image) -> Tensor:
        return _prepared(picture, self.side)

    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        """Prepared pictures [B, 3, S, S] -> scores [B, 1]."""
        embedded = self.model["clip"].get_image_features(batch).pooler_output
        return self.model["mlp"](F.normalize(embedded, dim=1))


# ImageReward.pt's names -> those of transformers' BLIP, in this order.
RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\.encoder\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
)
# Of BLIP's pretraining, and a list of numbers: neither is used.
UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")


class ImageReward(Describer):
    """The reward of each picture for its caption: (MLP - .167) / 1.033, so that its authors' data
    have mean 0 and deviation 1.

    `path`: a folder with ImageReward.pt and med_config.json, or a hub id; `processor`: the same of
    its BERT.
    """

    needs: ClassVar[str] = "captions"
    FILE, CONFIG = "ImageReward.pt", "med_config.json"
    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    TOKENS = 35  # of a caption; the rest is cut off
    HEAD = 64  # channels of a head of BLIP's vision transformers

    def __init__(
        self, path: str = "THUDM/ImageReward", *, processor: str = "google-bert/bert-base-uncased"
    ):
        super().__init__(path, "resized bicubic, centred square")
        self.path, self.processor = path, processor

    def _file(self, name: str) -> Path:
        if Path(self.path).is_dir():
            return Path(self.path) / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.path, name))

    def _read(self) -> nn.Module:
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        file, settings = self._file(self.FILE), mapping_of(self._file(self.CONFIG))
        tensors = {
            _renamed(name): x for name, x in tensors_of(file).items() if not UNUSED.search(name)
        }
        check_folder(self.processor, f"metrics: {self.processor}")
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor, **NO_CODE)
        # as BLIP does; the vocabulary of the file has both
        self.tokenizer.add_special_tokens(
            {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}
        )
        vision = _vision_config(tensors, self.HEAD, file)
        text = _text_config(settings, self._file(self.CONFIG))
        self.side, text.encoder_hidden_size = vision.image_size, vision.hidden_size
        parts = {
            "vision": BlipVisionModel(vision),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "mlp": _mlp(text.hidden_size),
        }
        model = nn.ModuleDict(parts)
        _load(model, tensors, file)
        return model

    def prepare(self, picture: Image.Image) -> Tensor:
        return _prepared(picture, self.side)

    def images(self, batch: Tensor, *captions: Sequence[str]) -> Tensor:
        """Prepared pictures [B, 3, S, S] and a caption of each -> rewards [B, 1]."""
        (said,) = captions
        options = {"padding": "max_length", "truncation": True, "max_length": self.TOKENS}
        tokens = self.tokenizer(list(said), **options, return_tensors="pt").to(batch.device)
        seen = self.model["vision"](batch).last_hidden_state
        read = self.model["text"](
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
        )
        return (self.model["mlp"](read.last_hidden_state[:, 0]) - self.MEAN) / self.STD


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


SIZED_BY = (  # the tensors that tell the sizes of the vision transformer, and their dimensions
    ("vision.embeddings.patch_embedding.weight", 4),
    ("vision.embeddings.position_embedding", 3),
    ("vision.encoder.layers.0.mlp.fc1.weight", 2),
)


def _vision_config(tensors: Mapping[str, Tensor], head: int, file: Path) -> Any:
    """The sizes of the vision transformer, which stand in no file, by its tensors.

    Raises ValueError, naming the file, for one without them.
    """
    from transformers import BlipVisionConfig

    if lacks := [n for n, size in SIZED_BY if n not in tensors or tensors[n].dim() != size]:
        what = f"is no checkpoint of ImageReward (it lacks {lacks[0]})"
        raise ValueError(f"{file}: {what}; give the folder of its authors' file")
    patch = tensors["vision.embeddings.patch_embedding.weight"]
    positions = tensors["vision.embeddings.position_embedding"].shape[1] - 1
    width, side = patch.shape[0], patch.shape[-1]
    layers = {n.split(".")[3] for n in tensors if n.startswith("vision.encoder.layers.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // head,
        patch_size=side,
        image_size=side * round(positions**0.5),
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # BLIP's; transformers' default is 1e-5
    )


def _text_config(settings: Mapping[str, Any], file: Path) -> Any:
    from transformers import BlipTextConfig

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    keys += ("num_attention_heads", "max_position_embeddings", "layer_norm_eps", "pad_token_id")
    if lacks := [key for key in keys if key not in settings]:
        what = f"is no settings of ImageReward's BERT (it lacks {lacks[0]})"
        raise ValueError(f"{file}: {what}; give the folder of its authors' file")
    # a decoder, for its cross-attention; it attends in both directions all the same
    return BlipTextConfig(**{key: settings[key] for key in keys}, is_decoder=True)
