"""Autoencoder and text encoder of an earlier pipeline, instead of stages that train them."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.config.compose import shipped
from distill.storage.atomic import atomic_folder
from distill.worlds.shapes.pretraining.work import Work


def folder(work: Work) -> Path | None:
    """The pipeline folder of `parts`; None where nothing is copied."""
    return None if work.asked["parts"] is None else Path(shipped(work.asked["parts"]))


def take_vae(work: Work, source: Path) -> dict[str, Any]:
    """Copy the autoencoder, in float32, to the result of stage `vae`."""
    with atomic_folder(work.train / "vae") as part:
        AutoencoderKL.from_pretrained(source, subfolder="vae").save_pretrained(part)
    return {"taken_from": work.asked["parts"]}


def take_text(work: Work, source: Path) -> dict[str, Any]:
    """Copy tokenizer and text encoder to the result of stage `clip`.

    Its image half is random: a pipeline has none.
    """
    encoder = CLIPTextModelWithProjection.from_pretrained(source, subfolder="text_encoder")
    config = encoder.config.to_dict()
    vision = {
        key: config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    }
    size = {"image_size": work.data["size"], "patch_size": work.data["size"] // 8}
    clip = CLIPModel(
        CLIPConfig(
            text_config=config, vision_config=vision | size, projection_dim=config["projection_dim"]
        )
    )
    own = clip.state_dict()
    named = {name: f"text_model.{name}" for name in encoder.state_dict()}
    taken = {name if name in own else named[name]: x for name, x in encoder.state_dict().items()}
    clip.load_state_dict(own | taken)
    with atomic_folder(work.train / "clip") as part:
        clip.save_pretrained(part)
    with atomic_folder(work.train / "tokenizer") as part:
        CLIPTokenizer.from_pretrained(source, subfolder="tokenizer").save_pretrained(part)
    return {"taken_from": work.asked["parts"]}
