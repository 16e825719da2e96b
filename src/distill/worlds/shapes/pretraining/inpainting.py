"""The stage `unet_inpaint`: `unet`, fine-tuned to fill masked parts of pictures.

As Stable Diffusion's inpainting models were made: the first convolution gets five input channels
more, with weights of 0, for the mask and the latents of the picture without the masked part. So the
network starts as the text-to-image model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from distill.config.compose import shipped
from distill.data.masks import Masks
from distill.teachers.attention import Attention
from distill.teachers.inpaint import SDInpaint
from distill.worlds.shapes.pretraining.asked import teaching_stage
from distill.worlds.shapes.pretraining.assemble import save_sd_inpaint
from distill.worlds.shapes.pretraining.diffusion import encode_captions, judge, noise_loss
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import Work, pixels

STAGE = "unet_inpaint"


def widened(source: UNet2DConditionModel, added: int) -> UNet2DConditionModel:
    """The same network, which also reads `added` channels, as yet without effect."""
    channels = source.config.in_channels
    net = UNet2DConditionModel.from_config({**source.config, "in_channels": channels + added})
    weights = source.float().state_dict()
    first = torch.zeros_like(net.conv_in.weight)
    first[:, :channels] = weights["conv_in.weight"]
    net.load_state_dict({**weights, "conv_in.weight": first})
    net.set_attn_processor(Attention())
    return net


def _source(work: Work) -> UNet2DConditionModel:
    options = work.asked["networks"][STAGE]
    place = str(options["taught_by"])
    if teaching_stage(work.asked, STAGE):
        place = str(work.models / place)
    return UNet2DConditionModel.from_pretrained(shipped(place), subfolder="unet")


class Surroundings:
    """The image channels of pictures under masks that are drawn anew in every step."""

    def __init__(self, vae: nn.Module, pictures: Tensor, seed: int):
        self.vae, self.pictures, self.seed, self.masks = vae.to(DEVICE), pictures, seed, Masks()

    @torch.no_grad()
    def __call__(self, step: int, index: Tensor) -> Tensor:
        """The mask and the masked picture's latents [B, 1 + C, h, w] of samples `index`."""
        shown = pixels(self.pictures[index]).to(DEVICE)
        places = range(step * len(index), (step + 1) * len(index))
        fill = self.masks(self.seed, places, shown.shape[-2:]).to(DEVICE)
        around = self.vae.encode(shown * (1 - fill)).latent_dist.mode()
        return torch.cat([F.interpolate(fill, size=around.shape[-2:]), around], 1)


def train(work: Work) -> dict[str, Any]:
    clip = CLIPModel.from_pretrained(work.train / "clip").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(work.train / "tokenizer")
    captions = encode_captions(clip, tokenizer, work.captions, layer=-1)
    latents, fit, vae = work.latents, work.fit(STAGE), work.vae
    net = widened(_source(work), added=1 + latents.shape[1])
    loss, surroundings = noise_loss(net), Surroundings(vae, work.pictures, fit.seed)

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x0 = latents[index].float()
        eps = torch.randn(x0.shape, generator=generator)
        text = captions.draw(index, generator)
        beside = surroundings(step, index)
        return {"mse": loss(x0.to(DEVICE), eps.to(DEVICE), *text, generator, beside)}

    fit(net, objective, samples=len(latents))
    save_sd_inpaint(net, vae.cpu(), clip, tokenizer, work.models / STAGE)
    if work.of_shapes:
        judge(work, STAGE, SDInpaint(str(work.models / STAGE)))
    return {"seconds": fit.seconds}
