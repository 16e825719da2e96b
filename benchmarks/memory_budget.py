"""What a step of LADD takes on one GPU with the options that save memory, counted on meta tensors.

    python benchmarks/memory_budget.py [names of rows]

Weights, gradients, optimiser states, average and heads are counted by the number of weights.
Activations are the most that tensors have at one time in the passes of a step: the student's and
that of the feature network on its sample, both checkpointed block by block, backward through both,
with adapters and in the dtypes of autocast to bfloat16. Attention counts as in fused kernels.
Workspaces of kernels, the context of CUDA and fragments of the allocator come on top. No weights
are read, and no GPU is needed.

The configurations of Z-Image, FLUX.2 klein and SD3.5 medium are given by hand: Z-Image's are the
defaults of diffusers' class, the others those that its makers published, as far as known here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from memory import GIB, decoding, sdxl
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.discriminators.heads import ConvHeads
from distill.machine import budget, memory
from distill.machine.meta_device import meta_device

DTYPE = torch.bfloat16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SDXL = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
SDXL = (*SDXL, "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


def z_image() -> Any:
    return diffusers.ZImageTransformer2DModel()


def klein() -> Any:
    """FLUX.2 klein 4B, by hand."""
    return diffusers.Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def sd35_medium() -> Any:
    return diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


# -- inputs: 1024x1024 -----------------------------------------------------------------------------


def of_sdxl(net: Any, x: Tensor) -> Tensor:
    added = {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)}
    return net(x, empty(1), empty(1, 77, 2048), added_cond_kwargs=added).sample


def of_sd3(net: Any, x: Tensor) -> Tensor:
    return net(x, empty(1, 333, 4096), empty(1, 2048), empty(1)).sample


def of_klein(net: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    ids = {"img_ids": empty(tokens.shape[1], 4), "txt_ids": empty(512, 4)}
    ids = {key: value.float() for key, value in ids.items()}
    found = net(tokens, empty(1, 512, 7680), empty(1), **ids).sample
    return found.transpose(1, 2).reshape(x.shape)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")


@dataclass(frozen=True)
class Row:
    """A run: its network, how it is called, and the options that matter."""

    make: Callable[[], Any]
    call: Callable[[Any, Tensor], Tensor] | None  # None: its class does not run on meta tensors
    latent: tuple[int, int, int]
    options: str  # as they are typed
    target: int  # GB of the card
    targets: tuple[str, ...] = ATTENTION
    rank: int | None = 64  # None: a full student
    quantize: str | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    loop: Mapping[str, Any] = field(default_factory=dict)


EIGHT = {"_target_": "distill.training.optimizers.adamw8bit"}
LORA = "student=lora student.checkpointing=true optimizer=adamw8bit data.batch_size=1"
PLAIN = "student=lora student.checkpointing=true data.batch_size=1"
ROWS = {
    "SDXL, LoRA, as in lora.md": Row(sdxl, of_sdxl, (4, 128, 128), PLAIN, 24, SDXL),
    "SDXL, LoRA": Row(
        sdxl, of_sdxl, (4, 128, 128), f"{LORA} teacher.quantize=int8 loop.ema_device=cpu", 16,
        SDXL, quantize="int8", optimizer=EIGHT, loop={"ema_device": "cpu"},
    ),
    "Z-Image 6B, LoRA": Row(
        z_image, None, (16, 128, 128), f"{LORA} teacher.quantize=int8", 24,
        (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        quantize="int8", optimizer=EIGHT,
    ),
    "FLUX.2 klein 4B, LoRA": Row(
        klein, of_klein, (128, 64, 64), f"{LORA} teacher.quantize=int8", 24,
        (*ATTENTION, "to_qkv_mlp_proj", "linear_in", "linear_out", "add_q_proj",
         "add_k_proj", "add_v_proj", "to_add_out"),
        quantize="int8", optimizer=EIGHT,
    ),
    "SD3.5 medium, full": Row(
        sd35_medium, of_sd3, (16, 128, 128),
        "student=full student.checkpointing=true data.batch_size=1", 80, rank=None,
    ),
}  # fmt: skip


# -- counting --------------------------------------------------------------------------------------


def activations(row: Row, net: Any) -> int:
    """The most bytes of tensors in a step's two passes with gradient and their backward pass."""
    maps: list[Tensor] = []

    def keep(block: nn.Module, _inputs: object, output: Any) -> None:
        found = output if isinstance(output, Tensor) else output[-1]
        found = found if isinstance(found, Tensor) else output[0]
        maps.append(found)

    def run(block: Any, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    if row.rank:
        scale = {"r": row.rank, "lora_alpha": row.rank}
        net.add_adapter(LoraConfig(**scale, target_modules=list(row.targets)))
    net.enable_gradient_checkpointing(run)
    x = empty(1, *row.latent).requires_grad_(True)

    def step() -> None:
        with torch.enable_grad(), meta_device("cuda"), torch.autocast("meta", dtype=DTYPE):
            sample = row.call(net, x)
            handles = [block.register_forward_hook(keep) for block in blocks(net)]
            row.call(net, sample)
            for handle in handles:
                handle.remove()
            # Heads read each map, in float32 or less, and give as much gradient.
            total = torch.stack([(m * 2).float().square().mean() for m in maps]).sum()
            maps.clear()
            torch.autograd.grad(total, x)  # gradients of weights are counted by their number

    return memory.peak(step)


def by_hand(net: Any) -> int:
    """Of Z-Image, whose class reads values: inputs of blocks twice, and one block computed again.

    A block keeps about 20 times its tokens' width (its norms, queries, keys, values, attention,
    and three maps of the feed-forward layer, 2.7 times as wide).
    """
    tokens = 64 * 64 + 512
    width, count = net.config.dim, net.config.n_layers + 2 * net.config.n_refiner_layers
    return tokens * width * 2 * (2 * count + 3 * 20 + count)


def blocks(net: Any) -> list[nn.Module]:
    if isinstance(net, diffusers.UNet2DConditionModel):
        return [*net.down_blocks, net.mid_block, *net.up_blocks]
    lists = ("transformer_blocks", "single_transformer_blocks", "layers")
    return [block for name in lists for block in getattr(net, name, [])]


def heads_of(net: Any) -> int:
    """Weights of LADD's heads at their default width."""
    if isinstance(net, diffusers.UNet2DConditionModel):
        narrow, middle, wide = net.config.block_out_channels
        found = [narrow, middle, wide, wide, wide, middle, narrow]
    else:
        config = net.config
        width = config.get("dim") or config.num_attention_heads * config.attention_head_dim
        found = [width] * len(blocks(net))
    channels = {f"map{i}": width for i, width in enumerate(found)}
    heads = ConvHeads(channels, pooled=2048, width=256, spectral=False)
    return sum(p.numel() for p in heads.parameters())


def counted(row: Row) -> dict[str, float]:
    """Part -> bytes on the GPU."""
    with torch.device("meta"):
        net = row.make().to(DTYPE).requires_grad_(False).eval()
        heads = heads_of(net)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    number = sum(p.numel() for p in net.parameters())
    trained = budget.adapters(shapes, row.targets, row.rank) if row.rank else number
    on_gpu, _ = budget.trained_bytes(row.optimizer, row.loop)
    state = 0 if row.loop.get("optimizer_device") else budget.state_bytes(row.optimizer)
    largest = max(p.numel() for p in net.parameters())
    return {
        "weights": number / 1e9,
        "trained": trained / 1e9,
        "frozen": number * budget.frozen_bytes(2, row.quantize),
        "student and gradient": 8 * trained,
        "state": trained * state,
        "average": trained * (on_gpu - 8 - state),
        "heads": heads * (8 + budget.state_bytes(row.optimizer)),
        "casts": 2 * (trained + heads),  # of trained weights, which autocast keeps for a step
        "activations": by_hand(net) if row.call is None else activations(row, net),
        "dequantised": 6 * largest if row.quantize else 0,
        "decoding": decoding(16 if row.latent[0] > 4 else 4, 1024, 1),
    }


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    heads = ("weights", "trained", "frozen", "student and gradient", "state", "average", "heads")
    heads = (*heads, "casts", "activations", "dequantised", "decoding")
    print("| GiB |", " | ".join(heads), "| together | card |")
    print("|---" * (len(heads) + 3) + "|", flush=True)
    for name in sys.argv[1:] or ROWS:
        parts = counted(ROWS[name])
        units = {"weights": "B", "trained": "B"}
        cells = [f"{parts[h]:.2f} B" if h in units else f"{parts[h] / GIB:.1f}" for h in heads]
        held = sum(parts[h] for h in heads[2:8])
        most = held + max(parts["activations"] + parts["dequantised"], parts["decoding"])
        print(
            f"| {name} |",
            " | ".join(cells),
            f"| {most / GIB:.1f} | {ROWS[name].target} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
