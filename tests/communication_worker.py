"""One of two gloo processes of `test_communication.py`: averages gradients and shards networks, and
writes what it saw.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.sd import UNet
from distill.training.averaging import GradientAverage
from distill.training.sharding import shard, units

WIDTH, LAYERS = 64, 6
LAYER_MIB = (WIDTH + 1) * WIDTH * 4 / 2**20


class Collectives(TorchDispatchMode):
    """Names of the collectives that run in this context, in order."""

    def __enter__(self) -> Collectives:
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        if name.startswith("c10d::"):
            self.names.append(name.removeprefix("c10d::"))
        return function(*arguments, **(keywords or {}))


# -- gradients averaged ----------------------------------------------------------------------------


class Player(nn.Module):
    """Layers in a row, a convolution in channels-last, and two layers that a pass may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.convolution = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.sometimes, self.never = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, sometimes: bool = False) -> Tensor:
        x = self.rows(x).tanh()
        x = x + self.sometimes(x) if sometimes else x
        return (x * self.convolution(x.reshape(-1, 4, 4, 4)).mean()).square().sum()


def inputs(seed: int, rank: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(10 * seed + rank))


def expected(seeds: list[int], *, sometimes: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Mean over both ranks of the sums over these passes, as one process computes it."""
    player = Player()
    for rank in (0, 1):
        for seed in seeds:
            player(inputs(seed, rank), sometimes=rank in sometimes).backward()
    return {name: p.grad / 2 for name, p in player.named_parameters() if p.grad is not None}


def gradients(player: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in player.named_parameters() if p.grad is not None}


def close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-5) -> bool:
    """The same names, and differences of at most this share of a tensor's largest number."""
    return a.keys() == b.keys() and all(
        float((a[k] - b[k]).abs().max()) <= rtol * float(b[k].abs().max()) for k in a
    )


def update(player: Player, average: GradientAverage, rank: int, seeds: list[int], **options: Any):
    """Gradients of an update with a micro-batch for each seed; sums begun after each pass."""
    sometimes, exact = options.get("sometimes", ()), options.get("exact")
    parameters, begun = list(player.parameters()), []
    player.zero_grad(set_to_none=True)
    for seed in seeds:
        loss = player(inputs(seed, rank), sometimes=rank in sometimes)
        if seed == seeds[-1]:
            average.start(exact or parameters, exact=exact is not None)
        loss.backward()
        begun.append(average.launched)
    average.finish(parameters)
    return begun


def averaged(rank: int) -> dict[str, Any]:
    player, average = Player(), GradientAverage(2, bucket_mib=1.5 * LAYER_MIB)
    first_layer, at_first_layer = player.rows[0], []
    first_layer.weight.register_hook(lambda _: at_first_layer.append(average.launched))
    saw: dict[str, Any] = {}
    saw["asked first"] = update(player, average, rank, [1])
    saw["first"] = close(gradients(player), expected([1]))
    saw["then"] = update(player, average, rank, [2])
    saw["second"] = close(gradients(player), expected([2]))
    saw["before the first layer"] = at_first_layer
    shared = {p.grad.untyped_storage().data_ptr() for p in player.rows.parameters()}
    saw["buffers"] = len(shared)
    conv = player.convolution.weight
    saw["strides"] = conv.grad.stride() == conv.stride() != conv.contiguous().stride()
    with Collectives() as mode:
        saw["accumulated passes"] = update(player, average, rank, [3, 4])
    saw["sums of two micro-batches"] = mode.names
    saw["accumulated"] = close(gradients(player), expected([3, 4]))
    update(player, average, rank, [5], sometimes=(1,))
    saw["one rank alone"] = close(gradients(player), expected([5], sometimes=(1,)))
    saw["never"] = player.never.weight.grad is None
    return saw


def averaged_otherwise(rank: int) -> dict[str, Any]:
    """Known beforehand; not known at all; in bfloat16."""
    saw: dict[str, Any] = {}
    player, average = Player(), GradientAverage(2, bucket_mib=1.5 * LAYER_MIB)
    used = [*player.rows.parameters(), *player.convolution.parameters()]
    with Collectives() as mode:
        saw["exact passes"] = update(player, average, rank, [1], exact=used)
    saw["exact sums"] = mode.names
    saw["exact"] = close(gradients(player), expected([1]))
    try:
        update(player, average, rank, [1], exact=used, sometimes=(0, 1))
        saw["beyond"] = ""
    except RuntimeError as error:
        saw["beyond"] = str(error)
    player, average = Player(), GradientAverage(2)
    player(inputs(1, rank), sometimes=rank == 0).backward()
    average.finish(list(player.parameters()))
    saw["unstarted"] = close(gradients(player), expected([1], sometimes=(0,)))
    player, average = Player(), GradientAverage(2, reduce_dtype="bfloat16", bucket_mib=LAYER_MIB)
    for seed in (1, 2):
        update(player, average, rank, [seed])
    saw["bfloat16"] = close(gradients(player), expected([2]), rtol=2**-7)
    saw["rounded"] = not close(gradients(player), expected([2]), rtol=2**-12)
    saw["dtypes"] = sorted({str(g.dtype) for g in gradients(player).values()})
    return saw


# -- networks sharded ------------------------------------------------------------------------------


def network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at numbers that bfloat16 has
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return UNet(model, RectifiedFlow(), "flow").eval()


def sharded(policy: MixedPrecisionPolicy | None = None, *, trained: bool = False) -> UNet:
    found = network().requires_grad_(trained)
    mesh = init_device_mesh("cpu", (2,))
    shard(found.model, mesh, policy or MixedPrecisionPolicy())
    return found


def noised(rank: int) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    return x, torch.tensor([0.999, 0.4]), Cond(torch.randn(2, 3, 8, generator=generator))


def mean_square(maps: list[Tensor]) -> Tensor:
    return torch.stack([m.square().mean() for m in maps]).sum()


def gathers(run: Any) -> int:
    with Collectives() as mode:
        run()
    return sum("allgather" in name for name in mode.names)


def passes(rank: int, *, whole_first: bool) -> dict[str, Any]:
    """Gathers of passes to the middle block of a frozen network, and whether results are right."""
    plain, cut, saw = network().requires_grad_(False), sharded(), {}
    x, t, cond = noised(rank)
    if whole_first:
        with torch.no_grad():
            saw["whole"] = gathers(lambda: cut.x0(x, t, cond))
    maps: list[Tensor] = []
    saw["features"] = gathers(lambda: maps.extend(cut.features(x, t, cond, ["down0", "mid"])))
    truth = plain.features(x, t, cond, ["down0", "mid"])
    saw["maps"] = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, truth, strict=True))
    found: list[Tensor] = []
    saw["backward"] = gathers(lambda: found.extend(torch.autograd.grad(mean_square(maps), [x])))
    (right,) = torch.autograd.grad(mean_square(truth), [x])
    saw["gradient"] = torch.allclose(found[0], right, atol=1e-6)
    with torch.no_grad():
        saw["again"] = gathers(lambda: cut.features(x, t, cond, ["mid"]))
        saw["x0"] = torch.allclose(cut.x0(x, t, cond), plain.x0(x, t, cond), atol=1e-5)
    saw["freed"] = all(isinstance(p, DTensor) for p in cut.model.parameters())
    return saw


def trained(rank: int) -> dict[str, Any]:
    """A trained network: what is kept for the backward pass, and new weights after it."""
    plain, cut, saw = network(), sharded(trained=True), {}
    x, t, cond = noised(rank)
    names = [name for name, _ in cut.model.named_parameters()]
    cut.x0(x, t, cond).square().mean().backward()  # the first pass
    cut.model.zero_grad()
    loss = cut.x0(x, t, cond).square().mean()
    kept = [n for n, p in cut.model.named_parameters() if not isinstance(p, DTensor)]
    saw["kept"] = sorted({".".join(name.split(".")[:4]) for name in kept})
    loss.backward()
    saw["freed after backward"] = all(isinstance(p, DTensor) for p in cut.model.parameters())
    for r in (0, 1):
        (plain.x0(*noised(r)).square().mean() / 2).backward()
    right = {n: p.grad for n, p in plain.model.named_parameters()}
    found = {n: p.grad.full_tensor() for n, p in cut.model.named_parameters()}
    saw["gradients"] = all(torch.allclose(found[n], right[n], atol=1e-6) for n in names)
    with torch.no_grad():
        cut.x0(x, t, cond)
        for model in (cut.model, plain.model):
            for parameter in model.parameters():
                parameter.mul_(0.9)
        saw["new weights"] = torch.allclose(cut.x0(x, t, cond), plain.x0(x, t, cond), atol=1e-5)
    return saw


def in_bfloat16(rank: int) -> dict[str, Any]:
    """Weights gathered in bfloat16, under autocast as in training."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    plain, cut = network(), sharded(policy, trained=True)
    x, t, cond = noised(rank)
    with torch.no_grad():
        exact = plain.x0(x, t, cond)
        with torch.autocast("cpu", torch.bfloat16):
            usual, gathered = plain.x0(x, t, cond), cut.x0(x, t, cond)
    scale = float(exact.abs().mean())
    return {
        "usual": float((usual - exact).abs().mean()) / scale,
        "gathered": float((gathered - exact).abs().mean()) / scale,
        "shards": sorted({str(p.dtype) for p in cut.model.parameters()}),
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = network().model
    names = {module: name for name, module in found.named_modules()}
    saw = {
        "averaged": averaged(rank),
        "otherwise": averaged_otherwise(rank),
        "units": [names[unit] for unit in units(found)],
        "features first": passes(rank, whole_first=False),
        "whole first": passes(rank, whole_first=True),
        "trained": trained(rank),
        "bfloat16": in_bfloat16(rank),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(saw), encoding="utf-8")
    dist.destroy_process_group()
