"""Memory, communication and time of LADD on large teachers over many GPUs, by counting.

    python benchmarks/scale.py [networks=sd35_large,qwen_image] [gpus=8,64,1024] [share=0.197]

Nothing is measured on a cluster. Counted from the real network classes on the meta device, at
1024x1024 and in bfloat16: parameters, the operations of a pass (torch's counter), and what autograd
keeps of a block (hooks on saved tensors). Measured in training steps on one GPU: how many
operations a second they reach, REACHED; `share=` puts another share of the peak in its place. Taken
from data sheets or assumed, and marked: peak and bandwidths. Everything else follows by the
formulas below; docs/scale.md has the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

GIB, GB = 2**30, 1e9
PER_NODE = 8

# -- the hardware: H100 SXM, 8 a node -----------------------------------------------------------

PEAK = 989e12  # operations a second, dense bfloat16: data sheet
INSIDE = 450 * GB  # bytes a second and direction of a GPU inside a node, NVLink 4: data sheet
BETWEEN = 50 * GB  # the same between nodes, a 400 Gbit/s adapter for each GPU: data sheet
HOP = 5e-6  # seconds that a collective's ring needs for each of its ranks; assumed
DISK = 2 * GB  # bytes a second that a node writes to shared storage; assumed

# Operations of its passes that a whole training step reaches in a second. Measured on one H200,
# whose peak is the same, with torch 2.11: in the row of Z-Image of `full_size.py speed` (6 B, a
# LoRA, four pictures of 512x512, no checkpointing) they were 25 % of what that card's own product
# of matrices makes, 779 TFLOP/s. The row stands in docs/understand/results.md.
REACHED = 0.25 * 779e12

# -- the run ---------------------------------------------------------------------------------------

BATCH = 2  # samples of a GPU in a micro-batch
HEAD_WIDTH = 256  # channels of LADD's heads, our default
TRAINED = 4 + 4 + 4 + 4  # bytes of a trained parameter: weight, two moments, average
# Passes through the network in a step with one update of the discriminator, in forward passes.
# Student: forward, forward again (checkpointing), backward 2. Frozen network: fake forward and
# again, backward to its input 1, real forward.
STUDENT_PASSES, FROZEN_PASSES = 4, 4
# How often weights are gathered: student forward, backward; frozen network fake, backward, real.
STUDENT_GATHERS, FROZEN_GATHERS = 2, 3


@dataclass(frozen=True)
class Counted:
    """A network at 1024x1024, for one sample: parameters, operations of a forward pass, bytes that
    autograd keeps of one block, blocks, image tokens and their width.
    """

    parameters: int
    operations: float
    block_bytes: int
    blocks: int
    tokens: int
    width: int


Inputs = dict[str, Tensor | list[tuple[int, int, int]] | None]


def sd35_large() -> tuple[nn.Module, Inputs, Sequence[nn.Module]]:
    """SD3.5-large's published sizes, with 333 text tokens."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=38,
        num_attention_heads=38,
        attention_head_dim=64,
        caption_projection_dim=38 * 64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    inputs: Inputs = {
        "hidden_states": torch.empty(1, 16, 128, 128),
        "encoder_hidden_states": torch.empty(1, 333, 4096),
        "pooled_projections": torch.empty(1, 2048),
        "timestep": torch.empty(1),
    }
    return net, inputs, net.transformer_blocks


def qwen_image() -> tuple[nn.Module, Inputs, Sequence[nn.Module]]:
    """Qwen-Image's published sizes, which are the class's defaults, with 128 text tokens."""
    net = diffusers.QwenImageTransformer2DModel()
    inputs: Inputs = {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 128, 3584),
        "encoder_hidden_states_mask": None,
        "timestep": torch.empty(1),
        "img_shapes": [(1, 64, 64)],
    }
    return net, inputs, net.transformer_blocks


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Inputs, Sequence[nn.Module]]]] = {
    "sd35_large": sd35_large,
    "qwen_image": qwen_image,
}


def counted(name: str) -> Counted:
    """Count a network; no number of it is computed."""
    with torch.device("meta"):
        net, inputs, blocks = NETWORKS[name]()
        net.to(torch.bfloat16)
        given = {k: _half(x) for k, x in inputs.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(**given)
        kept = _kept_by(net, blocks[1], given)
    parameters = sum(p.numel() for p in net.parameters())
    width = net.config.num_attention_heads * net.config.attention_head_dim
    operations = float(counter.get_total_flops())
    return Counted(parameters, operations, kept, len(blocks), 4096, width)


def _half(x: object) -> object:
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x


def _kept_by(net: nn.Module, block: nn.Module, inputs: dict[str, object]) -> int:
    """Bytes of the tensors that autograd keeps in one block. Weights are not counted, nor are the
    squares of attention, which the meta device has and flash attention never makes.
    """
    weights = {id(p) for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        square = x.ndim > 2 and x.shape[-1] == x.shape[-2]
        if id(x) not in weights and not square:
            kept[id(x.untyped_storage())] = x
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)

    def enter(*_: object) -> None:
        hooks.__enter__()

    def leave(*_: object) -> None:
        hooks.__exit__(None, None, None)

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    net(**inputs)
    for handle in handles:
        handle.remove()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@dataclass(frozen=True)
class Layout:
    """Ranks: all of them, and how many hold everything once."""

    ranks: int
    shards: int

    @property
    def bandwidth(self) -> float:
        """Of a gather. Each node receives everything once, through all of its adapters."""
        return INSIDE if self.shards <= PER_NODE else min(INSIDE, PER_NODE * BETWEEN)

    @property
    def name(self) -> str:
        return (
            "FSDP2" if self.shards == self.ranks else f"HSDP, {self.ranks // self.shards} replicas"
        )


@dataclass(frozen=True)
class Cost:
    """Of one rank. memory in bytes; compute, gather and reduce in seconds a step."""

    weights: float
    activations: float
    compute: float
    gathered: float
    reduced: float

    @property
    def memory(self) -> float:
        return self.weights + self.activations

    @property
    def hidden(self) -> float:
        """The step if all communication runs beside compute."""
        return max(self.compute, self.gathered + self.reduced)

    @property
    def exposed(self) -> float:
        """The step if none does."""
        return self.compute + self.gathered + self.reduced


def cost(net: Counted, layout: Layout, share: float, batch: int = BATCH) -> Cost:
    """The step of one rank, without accumulation."""
    p, n = net.parameters, layout.shards
    # Sharded: what is trained, its gradient in float32, the frozen network in bfloat16. On top two
    # gathered blocks of each network: the present and the next.
    block = p / net.blocks
    weights = p * (TRAINED + 4 + 2) / n + 2 * 2 * 2 * block
    stream = net.tokens * net.width * 2 * batch  # bytes of the image tokens between two blocks
    # Checkpointing keeps each block's input, of both networks, and all of one block; the heads
    # keep the maps of fake and real.
    activations = 2 * net.blocks * stream + net.block_bytes * batch + 2 * net.blocks * stream
    operations = (STUDENT_PASSES + FROZEN_PASSES) * net.operations * batch
    # A ring moves all weights, or all gradients in bfloat16, past every rank, block by block.
    ring = (n - 1) / n * 2 * p / layout.bandwidth + (n - 1) * HOP * net.blocks
    # Between replicas it sums the shards in two rounds, each rank by its own adapter.
    replicas = layout.ranks // n
    summed = 2 * 2 * p / n * (replicas - 1) / replicas / BETWEEN
    summed += 2 * (replicas - 1) * HOP * net.blocks
    gathers = (STUDENT_GATHERS + FROZEN_GATHERS) * ring
    return Cost(weights, activations, operations / (PEAK * share), gathers, ring + summed)


def layouts(ranks: int) -> list[Layout]:
    """All ranks as one, and replicas of one, two and eight nodes where there are as many."""
    shards = [ranks, *(n for n in (PER_NODE, 2 * PER_NODE, 8 * PER_NODE) if n < ranks)]
    return [Layout(ranks, n) for n in shards]


def checkpoint(net: Counted, layout: Layout) -> tuple[float, float, float]:
    """Bytes of a checkpoint, and seconds to write it in parts and by one node."""
    size = net.parameters * TRAINED
    # Replicas write different parts, so as many nodes write as there are parts or nodes.
    nodes = min(layout.shards, max(1, layout.ranks // PER_NODE))
    return size, size / (nodes * DISK), size / DISK


def row(name: str, net: Counted, layout: Layout, share: float) -> str:
    found = cost(net, layout, share)
    size, parts, whole = checkpoint(net, layout)
    cells = [
        name,
        str(layout.ranks),
        layout.name,
        f"{found.weights / GIB:.0f} + {found.activations / GIB:.0f} GiB",
        f"{found.compute:.2f} s",
        f"{found.gathered:.2f} s",
        f"{found.reduced:.2f} s",
        f"{found.hidden:.2f} to {found.exposed:.2f} s",
        f"{layout.ranks * BATCH / found.exposed:,.0f}",
        f"{size / GB:.0f} GB, {parts:.0f} or {whole:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


HEADS = (
    "network", "GPUs", "layout", "memory of a GPU", "compute", "gathers", "gradients", "step",
    "pictures a second, at least", "checkpoint; in parts, by one node",
)  # fmt: skip


def main(words: Sequence[str]) -> None:
    given = {"networks": ",".join(NETWORKS), "gpus": "8,64,1024", "share": f"{REACHED / PEAK:.3f}"}
    given |= dict(word.split("=", 1) for word in words)
    share = float(given["share"])
    nets = {name: counted(name) for name in given["networks"].split(",")}
    print("| network | parameters | operations of a pass | kept by a block | blocks |")
    print("|---|---|---|---|---|")
    for name, net in nets.items():
        sizes = f"{net.parameters / 1e9:.2f} B | {net.operations / 1e12:.1f} T"
        print(f"| {name} | {sizes} | {net.block_bytes / 2**20:,.0f} MiB | {net.blocks} |")
    print(f"\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for name, net in nets.items():
        for ranks in map(int, given["gpus"].split(",")):
            for layout in layouts(ranks):
                print(row(name, net, layout, share))
    for name, net in nets.items():
        batch = breakeven(net, Layout(1024, 1024), share)
        print(
            f"\n{name}, 1,024 GPUs, FSDP2: compute takes as long as communication at {batch} a GPU"
        )


def breakeven(net: Counted, layout: Layout, share: float) -> int:
    """The smallest micro-batch whose compute takes as long as the communication."""
    one = cost(net, layout, share, batch=1)
    return max(1, -int(-(one.gathered + one.reduced) // one.compute))


if __name__ == "__main__":
    main(sys.argv[1:])
