"""How ranks share the work: `DataParallel` replicates everything, `FullyShardedDataParallel`
(FSDP2) shards it.

A step with W ranks equals a step of one process with W times the `loop.accumulate`. The data
stream gives the same samples, and noise is drawn for (iteration, rank * accumulate + micro-batch).
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distill.core.limits import check_dtype
from distill.core.tensors import gather, like, local_shards
from distill.storage.atomic import replace_folder, temporary_path
from distill.storage.checkpoint_files import read_checkpoint, write_checkpoint
from distill.teachers.network import ends_at_last_tap

BUCKET = 32 * 1024 * 1024  # values of one reduction: enough to be fast, small beside the model


class DataParallel(DDPStrategy):
    """Replicas on every rank, with gradients averaged once a step.

    There is no DDP wrapper. Two players take turns, and a pool of heads is used in part; a wrapper
    would refuse parameters without gradient, or search for them at every step. A parameter that one
    rank used and another did not has a zero gradient on the latter.
    """

    def __init__(self, *, process_group_backend: str | None = None):
        if sys.platform == "win32":  # Windows has no NCCL; gloo sums on GPUs too
            process_group_backend = process_group_backend or "gloo"
        super().__init__(process_group_backend=process_group_backend)

    def configure_ddp(self) -> None:
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.data, src=0)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        _average_over_ranks(parameters, self.world_size)


def _average_over_ranks(parameters: Sequence[nn.Parameter], world: int) -> None:
    """Replace each gradient by its mean over ranks. Parameters that no rank used keep none."""
    if world == 1 or not parameters:
        return
    used = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    parameters = [p for p, by_any in zip(parameters, used.tolist(), strict=True) if by_any]
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in parameters]):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        flat /= world
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in order, in lists of one dtype with at most BUCKET values each (or one tensor)."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = gradient.numel() + sum(g.numel() for g in bucket)
        if bucket and (bucket[0].dtype != gradient.dtype or size > BUCKET):
            yield bucket
            bucket = []
        bucket.append(gradient)
    yield bucket


class FullyShardedDataParallel(ModelParallelStrategy):
    """Student, teacher and heads sharded along their first dimension (FSDP2), gathered block by
    block.

    Heads under R1 stay unsharded: a second derivative reads weights that FSDP2 has freed by then.
    With sharded_checkpoints every rank writes its shards into a folder, instead of one full file.
    reduce_dtype is the dtype of the gradient's sum over ranks.
    """

    def __init__(
        self,
        *,
        sharded_checkpoints: bool = False,
        reduce_dtype: str = "float32",
        process_group_backend: str | None = None,
    ):
        check_dtype(reduce_dtype, "trainer.strategy.reduce_dtype")
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
        )
        self._sharded_checkpoints = sharded_checkpoints
        self._policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduce_dtype))

    def setup_environment(self) -> None:
        # Lightning's own "auto" would give all ranks the same data.
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def shard(self, module: nn.Module, unsharded: Iterable[nn.Parameter] = ()) -> None:
        """Shard `module` in place: its blocks one by one, then the rest. The parameters `unsharded`
        stay as they are.
        """
        # Resharded after every forward: otherwise the EMA's parameters would not be those that run.
        options = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": self._policy,
            "ignored_params": set(unsharded),
        }
        for block in (*_blocks(module), module):
            fully_shard(block, reshard_after_forward=True, **options)
        ends_at_last_tap(module)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of unsharded parameters; FSDP2 has averaged those of shards."""
        _average_over_ranks([p for p in parameters if not isinstance(p, DTensor)], self.world_size)

    # Full checkpoints equal those of one process, so any number of ranks can resume them.

    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        if self._sharded_checkpoints:
            shard_folder = Path(
                self.broadcast(str(temporary_path(path)))
            )  # of rank 0, for all ranks
            write_checkpoint(
                local_shards(checkpoint),
                shard_folder / f"{self.global_rank:05d}_of_{self.world_size:05d}.pt",
            )
            self.barrier()
            if self.is_global_zero:
                replace_folder(shard_folder, path)
        else:
            state = gather(checkpoint, keep=self.is_global_zero)
            if self.is_global_zero:
                write_checkpoint(state, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(self.broadcast(str(checkpoint_path))))

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        for name, target in self.lightning_module.state_dict().items():
            target.copy_(like(checkpoint["state_dict"][name], target))

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                i: {
                    k: like(v, parameters[i]) if isinstance(v, Tensor) and v.ndim else v
                    for k, v in state.items()
                }
                for i, state in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": moments})


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Items of the outermost module lists: a transformer's blocks, a UNet's stages."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)
