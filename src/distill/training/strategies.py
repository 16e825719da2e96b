"""How ranks share the work: `DataParallel` replicates everything, `FullyShardedDataParallel`
(FSDP2) shards it.

A step with W ranks equals a step of one process with W times the `loop.accumulate`. The data
stream gives the same samples, and noise is drawn for (iteration, rank * accumulate + micro-batch).
"""

import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from distill.core.limits import check_reduction, check_replicas
from distill.core.tensors import gather, like, local_shards
from distill.storage.atomic import replace_folder, temporary_path
from distill.storage.checkpoint_files import read_checkpoint, write_checkpoint
from distill.training.averaging import GradientAverage, ReduceDtype
from distill.training.sharding import shard


class DataParallel(DDPStrategy):
    """Replicas on every rank, with gradients averaged in the last backward pass of an update.

    There is no DDP wrapper (see `averaging`). A parameter that one rank used and another did not
    has a zero gradient on the latter.

    Args:
        reduce_dtype: of the gradients' sum over ranks, float32 or bfloat16.
        bucket_mib: gradients that are summed together, in MiB.
    """

    def __init__(
        self,
        *,
        reduce_dtype: ReduceDtype = "float32",
        bucket_mib: float = 25.0,
        process_group_backend: str | None = None,
    ):
        check_reduction(reduce_dtype, bucket_mib)
        if sys.platform == "win32":  # Windows has no NCCL; gloo sums on GPUs too
            process_group_backend = process_group_backend or "gloo"
        super().__init__(process_group_backend=process_group_backend)
        self._options: dict[str, Any] = {"reduce_dtype": reduce_dtype, "bucket_mib": bucket_mib}

    def configure_ddp(self) -> None:
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.data, src=0)

    @cached_property
    def _average(self) -> GradientAverage:
        return GradientAverage(self.world_size, **self._options)

    def start_averaging(self, parameters: Sequence[nn.Parameter], *, exact: bool = False) -> None:
        """Average gradients from the next backward pass on; see `GradientAverage.start`."""
        if self.world_size > 1:
            self._average.start(parameters, exact=exact)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Finish what `start_averaging` began; without it, average now."""
        if self.world_size > 1:
            self._average.finish(parameters)


class FullyShardedDataParallel(ModelParallelStrategy):
    """Student, teacher and heads sharded along their first dimension (FSDP2), gathered block by
    block; see `sharding`.

    In bf16-mixed the weights of student and teacher are gathered as bfloat16: what autocast would
    make of them in most layers, at half the traffic; those of norms are rounded too. Shards,
    optimiser and EMA stay float32, and so do heads. Heads under R1 stay unsharded: a second
    derivative reads weights that FSDP2 has freed by then. Gradients are averaged in every
    micro-batch: to keep them to the last one, each rank would hold all of them.

    Args:
        sharded_checkpoints: every rank writes its shards into a folder; False: one full file.
        reduce_dtype: of the gradients' sum over ranks, float32 or bfloat16.
        replicas: groups of ranks that hold everything once each (HSDP). Weights are gathered inside
            a group, and gradients are summed between groups. Ranks of a group are neighbours, so
            with as many replicas as nodes nothing is gathered over the network.
    """

    def __init__(
        self,
        *,
        sharded_checkpoints: bool = False,
        reduce_dtype: ReduceDtype = "float32",
        replicas: int = 1,
        process_group_backend: str | None = None,
    ):
        check_reduction(reduce_dtype)
        check_replicas(replicas)
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
        )
        self._sharded_checkpoints, self._reduce_dtype = sharded_checkpoints, reduce_dtype
        self._replicas = replicas
        self._whole: set[nn.Parameter] = set()  # trained parameters that are not sharded

    def setup_environment(self) -> None:
        # Lightning's own "auto" would give all ranks the same data.
        self._data_parallel_size = self.num_processes * self.num_nodes
        check_replicas(self._replicas, self._data_parallel_size)
        super().setup_environment()

    @property
    def _shards(self) -> int:
        """The ranks that hold everything once."""
        return self.world_size // self._replicas

    @cached_property
    def _mesh(self) -> Any:
        """Of the ranks: [ranks], or with replicas [replicas, ranks of each]."""
        if self._replicas == 1:
            return self.device_mesh["data_parallel"]
        names = ("replicas", "shards")
        shape = (self._replicas, self._shards)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def shard(
        self,
        module: nn.Module,
        unsharded: Iterable[nn.Parameter] = (),
        *,
        gather_in_float32: bool = False,
    ) -> None:
        """Shard `module` in place: its blocks one by one, then the rest. The parameters `unsharded`
        stay as they are.
        """
        autocast = self.precision_plugin.precision == "bf16-mixed" and not gather_in_float32
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if autocast else None,
            reduce_dtype=getattr(torch, self._reduce_dtype),
            cast_forward_inputs=False,  # bfloat16 knows no step 999 of 1,000
        )
        shard(module, self._mesh, policy, unsharded)

    def setup_optimizers(self, trainer: Any) -> None:
        # Now, when no unit is gathered: gathered parameters look like those that are not sharded.
        parameters = self.lightning_module.parameters()
        self._whole = {p for p in parameters if not isinstance(p, DTensor)}
        super().setup_optimizers(trainer)

    @cached_property
    def _average(self) -> GradientAverage:
        group = self.device_mesh["data_parallel"].get_group()
        return GradientAverage(self.world_size, reduce_dtype=self._reduce_dtype, group=group)

    def start_averaging(self, parameters: Sequence[nn.Parameter], *, exact: bool = False) -> None:
        """Average gradients of unsharded parameters; FSDP2 averages those of shards by itself."""
        if self.world_size > 1:
            self._average.start([p for p in parameters if p in self._whole], exact=exact)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Finish what `start_averaging` began; without it, average now."""
        if self.world_size > 1:
            self._average.finish([p for p in parameters if p in self._whole])

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
            replica, shard_rank = divmod(self.global_rank, self._shards)
            # Replicas hold the same; each writes some, so that more machines write.
            if replica == shard_rank % self._replicas:
                part = f"{shard_rank:05d}_of_{self._shards:05d}.pt"
                write_checkpoint(local_shards(checkpoint), shard_folder / part)
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
