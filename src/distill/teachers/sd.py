"""Stable Diffusion 1.x and 2.x: a UNet on the variance-preserving process, predicting eps or v, step index 0..999."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from distill.limits import check_zero_snr
from distill.process import Prediction, Process, VariancePreserving
from distill.teachers.attention import Attention
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher
from distill.types import Cond

PREDICTION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class UNet(Network):
    """Taps `down0`, `down1`, ..., `mid`, `up0`, ...: the map each block hands to the next.

    Besides, `in` is the first convolution's, and `down0.0`, `down0.1`, ... are the maps that this block hands to the
    decoder: with `mid` the ten levels that NitroFusion reads of SDXL.
    """

    targets = (  # attention, feed-forward layers and convolutions, as LCM-LoRA and DMD2 have it
        *(
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "proj_in",
            "proj_out",
            "ff.net.0.proj",
            "ff.net.2",
            "time_emb_proj",
        ),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    )

    def __init__(self, model: nn.Module, process: Process, prediction: Prediction):
        super().__init__(model, process, prediction)
        model.set_attn_processor(Attention())

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.model(x_t, self.process.index(t), encoder_hidden_states=cond.tokens).sample

    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        model, widths = self.model, self.model.config.block_out_channels
        taps = {"in": (model.conv_in, widths[0])}
        for i, (block, width) in enumerate(zip(model.down_blocks, widths, strict=True)):
            parts = len(block.resnets) + len(block.downsamplers or ())
            taps |= {f"down{i}.{part}": (block, width) for part in range(parts)} | {
                f"down{i}": (block, width)
            }
        up = {
            f"up{i}": pair
            for i, pair in enumerate(zip(model.up_blocks, reversed(widths), strict=True))
        }
        return {**taps, "mid": (model.mid_block, widths[-1]), **up}

    @property
    def encoder(self) -> list[str]:
        return [name for name in self.tappable() if name in ("in", "mid") or "." in name]

    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        block, _, part = name.partition(".")
        if part:  # a down block returns (what goes down, what goes across)
            return output[1][int(part)].contiguous()
        return (output[0] if isinstance(output, tuple) else output).contiguous()


def end_in_noise(teacher: PipelineTeacher) -> None:
    """Give a teacher on Stable Diffusion's process the schedule that ends in noise alone (arXiv 2305.08891, Alg. 1).

    What is exported of it has that schedule too. Raises ValueError for one that predicts eps.
    """
    check_zero_snr(teacher.prediction)
    scheduler = teacher.pipeline.scheduler
    teacher.network.process = VariancePreserving(scheduler.alphas_cumprod, zero_terminal_snr=True)
    scheduler.register_to_config(rescale_betas_zero_snr=True)


class SD(PipelineTeacher):
    """A `StableDiffusionPipeline` (SD 1.x, 2.x; folder or hub id); `size`, if the data have another than it, theirs.

    `zero_terminal_snr` stretches its schedule so that it ends in noise alone: see `end_in_noise`.
    """

    kind, unused = StableDiffusionPipeline, ("safety_checker", "feature_extractor", "image_encoder")

    def __init__(
        self,
        path: str,
        *,
        size: int | None = None,
        zero_terminal_snr: bool = False,
        **options: Any,
    ):
        super().__init__(path, **options)
        if zero_terminal_snr:
            end_in_noise(self)
        self.latent_shape = self.shape_of(size, "teacher.size")

    def _network(self) -> UNet:
        scheduler = self.pipeline.scheduler
        process = VariancePreserving(scheduler.alphas_cumprod)
        return self._unet(process, PREDICTION[scheduler.config.prediction_type])

    def _unet(self, process: VariancePreserving, prediction: Prediction) -> UNet:
        return UNet(self.pipeline.unet, process, prediction)

    def _encode(self, captions: list[str]) -> Cond:
        alone = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        tokens, _ = self.pipeline.encode_prompt(captions, self.device, **alone)
        # SD has no pooled embedding; CLIP's own is its last hidden state at the end-of-text token.
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1).to(tokens.device)
        return Cond(
            tokens=tokens, pooled=tokens[torch.arange(len(captions), device=tokens.device), end]
        )
