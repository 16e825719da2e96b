"""Gradients averaged over ranks while the backward pass still runs.

    start(parameters)     before the last backward pass of an update
    backward pass         whenever a bucket of gradients is full, its sum over ranks begins
    finish(parameters)    the remaining sums; afterwards every gradient is the mean

A bucket's gradients are copied into one buffer, of which they become views, so there is no second
copy of all gradients and the memory goes when the gradients go. Gradients that earlier
micro-batches left are in that sum: only the last backward pass communicates.

This does what the Reducer of torch's DistributedDataParallel does, which does not fit two players:
it keeps buffers of all gradients for as long as it lives, also of the player whose turn it is not
and of every head of a pool, and it refuses parameters without a gradient or searches the graph for
them in each iteration.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

MIB = 1024 * 1024
ALIGNED = 64  # numbers: gradients begin at multiples, so that kernels can read them in vectors
ReduceDtype = Literal["float32", "bfloat16"]


class _Bucket:
    """Gradients of one dtype that are summed together.

    Args:
        parameters: whose gradients these are.
        dtype: of the sum; None: that of the gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None):
        self.parameters, self.dtype = parameters, dtype or parameters[0].dtype
        self.missing = len(parameters)  # gradients that this rank's backward pass still owes
        self._views: list[Tensor] = []
        self._work: Any = None
        self._buffer: Tensor

    def launch(self, group: Any) -> None:
        """Begin the sum over ranks. A parameter without a gradient here gets one of zeros."""
        sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in self.parameters]
        device = self.parameters[0].device
        self._buffer = torch.empty(sum(sizes), dtype=self.dtype, device=device)
        parts = self._buffer.split(sizes)
        self._views = [_view(part, p) for part, p in zip(parts, self.parameters, strict=True)]
        for part, parameter in zip(parts, self.parameters, strict=True):
            if part.numel() > parameter.numel():
                part[parameter.numel() :].zero_()
        pairs = list(zip(self._views, self.parameters, strict=True))
        for view, parameter in pairs:
            if parameter.grad is None:
                view.zero_()
        known = [(view, p.grad) for view, p in pairs if p.grad is not None]
        if known:
            torch._foreach_copy_([view for view, _ in known], [gradient for _, gradient in known])
        for view, parameter in pairs:
            if view.dtype == parameter.dtype:
                parameter.grad = view
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._work = dist.all_reduce(self._buffer, group=group, async_op=True)

    def finish(self, world: int) -> None:
        """Wait for the sum, on a GPU without holding up this process, and make it a mean."""
        self._work.wait()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._views[0].dtype != gradients[0].dtype:
            torch._foreach_copy_(gradients, self._views)
            torch._foreach_div_(gradients, world)
        else:
            self._buffer.div_(world)


class GradientAverage:
    """Means of gradients over ranks.

    All ranks must call `start` and `finish` with the same parameters in the same order.

    Args:
        world: number of ranks.
        reduce_dtype: of the sum over ranks.
        bucket_mib: size of a sum in MiB, or that of a larger parameter.
        group: the ranks; None: all.
    """

    def __init__(
        self,
        world: int,
        *,
        reduce_dtype: ReduceDtype = "float32",
        bucket_mib: float = 25.0,
        group: Any = None,
    ):
        self.world, self.group, self._limit = world, group, bucket_mib * MIB
        # None: gradients are summed in their own dtype, most often float32.
        self._dtype = None if reduce_dtype == "float32" else getattr(torch, reduce_dtype)
        self._place: dict[nn.Parameter, int] = {}  # known as used -> when its gradient comes
        self._hooked: set[nn.Parameter] = set()
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._launched = 0
        self._arrived: list[nn.Parameter] = []  # in the order of their gradients
        self._started = self._exact = False

    @property
    def launched(self) -> int:
        """Sums that have begun since `start`."""
        return self._launched

    def start(self, parameters: Sequence[nn.Parameter], *, exact: bool = False) -> None:
        """Sum the gradients of these parameters over ranks during the next backward pass.

        `exact`: each of them gets a gradient on some rank, and no other parameter of the player
        does. Otherwise the ranks ask each other which parameters do. What was used once counts as
        used in every later update, so after the first one nothing is asked, unless there are
        parameters without any use.
        """
        self._started, self._exact, self._arrived = True, exact, []
        for parameter in parameters:
            if parameter not in self._hooked:
                self._hooked.add(parameter)
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        if exact:
            # About the order of a backward pass. That of earlier updates would not survive a
            # resume, and the order of a sum over three or more ranks is seen in its last bits.
            self._plan(list(reversed(parameters)))
            return
        used = [p for p in parameters if p in self._place]
        self._plan(sorted(used, key=self._place.__getitem__))

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over ranks. Parameters that no rank used keep none.

        Without `start`, or for parameters whose use is not known yet, all is summed only now, and
        the ranks ask each other for those with a gradient, which a GPU has to wait for.
        """
        others = [p for p in parameters if p not in self._bucket_of]
        buckets = self._buckets
        self._launch(every=True)
        if self._started and self._exact:
            if any(p.grad is not None for p in others):
                what = "a parameter has a gradient, but its head is not among those of the critics"
                raise RuntimeError(f"{what} of this iteration; set same_heads=False in the method")
        elif others:
            used = self._used_by_any(others)
            if self._started:
                known = len(self._place)
                self._place |= {p: known + i for i, p in enumerate(used)}
            self._plan(used)
            self._launch(every=True)
            buckets = [*buckets, *self._buckets]
        for bucket in buckets:
            bucket.finish(self.world)
        self._plan([])
        self._started, self._arrived = False, []

    def _plan(self, parameters: Sequence[nn.Parameter]) -> None:
        """Buckets of these parameters, whose gradients come in this order."""
        chunks = _chunks(parameters, self._limit)
        self._buckets, self._launched = [_Bucket(chunk, self._dtype) for chunk in chunks], 0
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}

    @torch.no_grad()
    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._started:
            return
        self._arrived.append(parameter)
        bucket = self._bucket_of.get(parameter)
        if bucket is not None:
            bucket.missing -= 1
            self._launch()

    @torch.no_grad()
    def _launch(self, *, every: bool = False) -> None:
        """Begin the sums of full buckets, or of all, in an order that is the same on all ranks."""
        for bucket in self._buckets[self._launched :]:
            if bucket.missing and not every:
                return
            bucket.launch(self.group)
            self._launched += 1

    def _used_by_any(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those that have a gradient on some rank, in the order in which rank 0 got them."""
        place = {p: i for i, p in enumerate(self._arrived)}
        late = len(place)
        used = [p.grad is not None for p in parameters]
        places = [place.get(p, late) for p in parameters]
        kind = {"dtype": torch.int32, "device": parameters[0].device}
        asked = torch.tensor(used, **kind)
        order = torch.tensor(places, **kind)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        dist.broadcast(order, src=0, group=self.group)
        by_any, ordered = torch.stack([asked, order]).tolist()
        found = [i for i, any_rank in enumerate(by_any) if any_rank]
        return [parameters[i] for i in sorted(found, key=ordered.__getitem__)]


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all ranks, in place.

    Lightning's `reduce` starts with a barrier, where the host waits for all that a GPU has queued.
    """
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def start_averaging(
    method: Any, networks: Sequence[nn.Module], draws: Sequence[Any] | None = None
) -> None:
    """Average the gradients of networks from the next backward pass on, where the strategy has
    ranks.

    `draws` are those of the discriminator's micro-batches: of heads that an iteration draws from a
    pool, only those that ran have a gradient. Where each rank may have run others, or other
    networks learn too, nothing starts, and the ranks ask each other after the backward pass.
    """
    start = getattr(method.trainer.strategy, "start_averaging", None)
    if start is None:
        return
    critics = [] if draws is None else [getattr(drawn, "critic", None) for drawn in draws]
    if all(critic is method.heads for critic in critics):
        start([p for network in networks for p in network.parameters() if p.requires_grad])
    elif (
        len(networks) == 1
        and method.same_heads
        and all(hasattr(critic, "used_parameters") for critic in critics)
    ):
        used = {p for critic in critics for p in critic.used_parameters()}
        start([p for p in networks[0].parameters() if p in used], exact=True)


def _chunks(parameters: Sequence[nn.Parameter], limit: float) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, in lists of one dtype and at most `limit` bytes, or of one parameter."""
    chunk: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if chunk and (chunk[0].dtype != parameter.dtype or size + own > limit):
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += own
    if chunk:
        yield chunk


def _view(part: Tensor, like: Tensor) -> Tensor:
    """A part of a flat buffer in the shape and memory format of `like`, for fused optimisers."""
    if like.is_contiguous():
        return part[: like.numel()].view(like.shape)
    strides = torch.empty_like(like, device="meta").stride()
    return part.as_strided(like.shape, strides)
