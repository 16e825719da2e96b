"""Stable Diffusion 1.x and 2.x: a UNet on the variance-preserving process, predicting eps or v,
step index 0..999.

Fine-tunes that predict a flow use the rectified flow, with network time 1000 t.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.core.limits import check_zero_snr
from distill.core.process import Prediction, Process, RectifiedFlow, VariancePreserving
from distill.core.transfers import send
from distill.core.types import Cond
from distill.teachers.attention import Attention
from distill.teachers.loading.settings import prediction_of
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher

# Width of a caption token, which differs between SD 1 and SD 2 -> `lora_base`.
VERSIONS = {768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", "stable-diffusion-v2-512")}
SKIPPING = (
    "With transformers 5.6 and later diffusers' pipeline of Stable Diffusion fails over"
    " `clip_skip`: take an earlier transformers, or `distill.sample`."
)


def trained_on(scheduler: Any) -> tuple[Process, Prediction]:
    """The noise process and the prediction type of a pipeline's scheduler."""
    name = type(scheduler).__name__
    prediction = prediction_of({**scheduler.config, "_class_name": name}, "teacher")
    if prediction == "flow":
        return RectifiedFlow(), prediction
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        what = f"its scheduler is a {name}, which has no table of alphas_cumprod"
        raise ValueError(f"teacher: {what}; give a pipeline with DDIMScheduler or the like")
    return VariancePreserving(table), prediction


def step_of(process: Process, t: Tensor) -> Tensor:
    """The network time for t [B]: the index of a training step, or 1000 t for a flow."""
    return process.index(t) if isinstance(process, VariancePreserving) else 1000 * t


class UNet(Network):
    """Taps `down0`, `down1`, ..., `mid` where there is one, `up0`, ...: the output of each block.

    `in` is the output of the first convolution. `down0.0`, `down0.1`, ... are the skip connections
    of a block; with `mid` they are the ten levels that NitroFusion reads of SDXL.
    """

    targets = (  # attention, feed-forward layers and convolutions, as in LCM-LoRA and DMD2
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

    @property
    def image_channels(self) -> int:
        return max(0, self.model.config.in_channels - self.model.config.out_channels)

    @property
    def caption_width(self) -> int | None:
        config = self.model.config
        width = config.get("encoder_hid_dim") or config.cross_attention_dim
        return width if isinstance(width, int) else None  # blocks may differ

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        step = step_of(self.process, t)
        return self.model(x_t, step, encoder_hidden_states=cond.tokens).sample

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Hold the frozen convolutions in this layout; their maps then have it too.

        Trained weights stay: fused optimisers pair weights, gradients and moments by memory, and
        moments of a checkpoint may have another layout. Sharded weights have none.
        """
        for module in self.model.modules():
            weight = module.weight if type(module) is nn.Conv2d else None
            if weight is None or weight.requires_grad or isinstance(weight, DTensor):
                continue
            weight.data = weight.data.contiguous(memory_format=memory_format)

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
        # Some small UNets have no middle block (BK-SDM, Segmind-Vega).
        middle = {"mid": (model.mid_block, widths[-1])} if model.mid_block is not None else {}
        return {**taps, **middle, **up}

    @property
    def encoder(self) -> list[str]:
        return [name for name in self.tappable() if name in ("in", "mid") or "." in name]

    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        block, _, part = name.partition(".")
        if part:  # a down block returns (its output, its skip connections)
            return output[1][int(part)].contiguous()
        return (output[0] if isinstance(output, tuple) else output).contiguous()


def end_in_noise(teacher: PipelineTeacher) -> None:
    """Give a teacher on Stable Diffusion's process a schedule with zero terminal SNR (arXiv
    2305.08891, Alg. 1).

    Exported students have that schedule too. Raises ValueError for a teacher that predicts eps.
    """
    check_zero_snr(teacher.prediction)
    scheduler = teacher.pipeline.scheduler
    teacher.network.process = VariancePreserving(scheduler.alphas_cumprod, zero_terminal_snr=True)
    scheduler.register_to_config(rescale_betas_zero_snr=True)


class SD(PipelineTeacher):
    """A `StableDiffusionPipeline` (SD 1.x, 2.x; folder or hub id).

    `size` is the side of the pictures, if it differs from that of the pipeline. With `clip_skip`,
    captions are embedded that many layers earlier than by default, as diffusers counts.
    `zero_terminal_snr`: see `end_in_noise`.
    """

    kind = StableDiffusionPipeline
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    usual_unit = 8
    padded = ("tokenizer",)
    embedding_options = ("clip_skip",)
    single_file = "pipeline"

    def __init__(
        self,
        path: str,
        *,
        size: int | None = None,
        clip_skip: int | None = None,
        zero_terminal_snr: bool = False,
        **options: Any,
    ):
        self.clip_skip = clip_skip
        super().__init__(path, **options)
        _check_skip(clip_skip, self._layers() if clip_skip is not None else 0)
        if zero_terminal_snr:
            end_in_noise(self)
        self.latent_shape = self.shape_of(size, "teacher.size")

    def family_options(self) -> dict[str, Any]:
        return {"clip_skip": self.clip_skip} if self.clip_skip else {}

    def call_options(self) -> dict[str, Any]:
        return {**super().call_options(), **self.family_options()}

    @classmethod
    def remarks(cls, call: Mapping[str, Any]) -> list[str]:
        return [SKIPPING] if "clip_skip" in call else []

    @classmethod
    def lora_base(cls, denoiser: Mapping[str, Any], predicts_v: bool) -> tuple[str, str] | None:
        base = VERSIONS.get(denoiser["cross_attention_dim"])
        if base is None or not predicts_v:
            return base
        return f"{base[0]}_v", base[1].replace("-512", "-768-v")

    def _layers(self) -> int:
        """Layers of the smallest loaded text encoder; 0 where none is loaded."""
        names = ("text_encoder", "text_encoder_2")
        parts = [getattr(self.pipeline, name, None) for name in names]
        return min((part.config.num_hidden_layers for part in parts if part is not None), default=0)

    def _network(self) -> UNet:
        return self._unet(*trained_on(self.pipeline.scheduler))

    def _unet(self, process: Process, prediction: Prediction) -> UNet:
        return UNet(self.pipeline.unet, process, prediction)

    def _encode(self, captions: list[str]) -> Cond:
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        if self.clip_skip is None:
            tokens = self._tokens(captions)
        else:
            tokens = self._skipped(send(ids, self.device))
        # SD has no pooled embedding; CLIP pools its last hidden state at the end-of-text token.
        end = send((ids == tokenizer.eos_token_id).int().argmax(dim=1), tokens.device)
        return Cond(
            tokens=tokens, pooled=tokens[torch.arange(len(captions), device=tokens.device), end]
        )

    def _tokens(self, captions: list[str]) -> Tensor:
        """Tokens [B, L, D] of the last layer, by the pipeline itself."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return self.pipeline.encode_prompt(captions, self.device, **options)[0]

    def _skipped(self, ids: Tensor) -> Tensor:
        """Tokens [B, L, D] of an earlier layer, as in the pipeline, which fails with transformers
        5.6.
        """
        encoder = self.pipeline.text_encoder
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-(self.clip_skip + 1)]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)


def _check_skip(skip: int | None, layers: int) -> None:
    """Raise ValueError for more layers than a text encoder has; pipelines accept any number."""
    if skip is not None and not (type(skip) is int and skip > 0 and (not layers or skip < layers)):
        what = f"must be null, or from 1 to {layers - 1}" if layers else "must be null or 1 or more"
        raise ValueError(f"teacher.clip_skip={skip}: {what} for this teacher")
