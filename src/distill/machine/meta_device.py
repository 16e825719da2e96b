"""A device without values: passes and updates of real networks on meta tensors, to count memory.

    with meta_device("cuda"), counter:
        ...                           # tensors on torch.device("meta")

It stands for a CPU or for a GPU. Autocast to bfloat16 works on it, with that device's lists of
operations and with the cache of cast weights. Attention keeps for the backward pass what a fused
kernel keeps. A read of a value gives 1, or True: nothing that is counted may depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

Kind = Literal["cpu", "cuda"]
META = torch.device("meta")
_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)
_stands_for: ContextVar[str] = ContextVar("stands_for", default="meta")


def kind_of(x: Tensor) -> str:
    """The type of the device of x; of a meta tensor that of the device that it stands for."""
    kind = x.device.type
    return _stands_for.get() if kind == "meta" else kind


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this context networks are built on meta tensors, and no weights are read."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def is_shapes_only() -> bool:
    return _shapes_only.get()


@contextmanager
def meta_device(kind: Kind) -> Iterator[None]:
    """Within this context torch.device("meta") stands for a device of this kind."""
    mode = _MetaDevice(kind)
    state = mode.autocast
    replaced = {
        "autocast": _switch(torch.autocast, state),
        "is_autocast_enabled": _asked(torch.is_autocast_enabled, lambda: state.enabled),
        "get_autocast_dtype": _asked(torch.get_autocast_dtype, lambda: state.dtype),
    }
    with ExitStack() as stack:
        for name, value in replaced.items():  # torch knows no autocast of meta tensors
            stack.enter_context(patch.object(torch, name, value))
        stack.enter_context(patch.object(torch.amp, "autocast", replaced["autocast"]))
        available = _asked(torch.amp.is_autocast_available, lambda: True)
        stack.enter_context(patch.object(torch.amp, "is_autocast_available", available))
        engine = torch.autograd._engine_run_backward
        again = _within(mode, engine)
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", again))
        stack.enter_context(mode)
        token = _stands_for.set(kind)
        try:
            yield
        finally:
            _stands_for.reset(token)


def _within(mode: TorchFunctionMode, engine: Any) -> Callable[..., Any]:
    """The engine of backward passes, which leave modes, in this mode: passes that it computes again
    count in the same way.
    """

    def run(*args: Any, **options: Any) -> Any:
        if mode in _get_current_function_mode_stack():
            return engine(*args, **options)
        with mode:
            return engine(*args, **options)

    return run


class _MetaDevice(TorchFunctionMode):
    """What functions of torch do with meta tensors."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.precise = PRECISE if kind == "cuda" else PRECISE_ON_CPU
        self.autocast = _State()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in READS and _is_meta(args[0]):
            return READS[func](args[0])
        if func in TO_HOST and _is_meta(args[0]) and _to_host(args, given):
            return torch.zeros(args[0].shape, dtype=_dtype_of(args, given))
        if self.autocast.enabled and (func in COARSE or func in self.precise):
            dtype = self.autocast.dtype if func in COARSE else torch.float32
            args = tuple(self.autocast.cast(x, dtype) for x in args)
            given = {name: self.autocast.cast(x, dtype) for name, x in given.items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **given)
        if func is Tensor.__getitem__ and _is_meta(args[0]):
            args = _all_of(*args)
        return func(*args, **given)


# -- autocast --------------------------------------------------------------------------------------

COARSE = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, F.prelu, F.scaled_dot_product_attention,
    torch.matmul, torch.bmm, torch.mm, torch.mv, torch.addmm, torch.addmv, torch.addbmm,
    torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.mm, Tensor.mv,
    Tensor.addmm, Tensor.addbmm, Tensor.baddbmm,
}  # fmt: skip
PRECISE_ON_CPU = {F.mse_loss, F.binary_cross_entropy, F.grid_sample, torch.prod, Tensor.prod}
NAMES = (
    "acos asin cosh cumprod cumsum dist erfinv exp expm1 log log10 log1p log2 norm pow prod "
    "reciprocal renorm rsqrt sinh softmax log_softmax sum tan __pow__ __rpow__"
)
PRECISE = PRECISE_ON_CPU | {
    F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, F.softplus, F.softmin,
    F.cosine_similarity, F.normalize, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
    F.soft_margin_loss, F.cross_entropy, F.nll_loss, torch.cdist,
    *(getattr(place, name) for name in NAMES.split() for place in (torch, Tensor)
      if hasattr(place, name)),
}  # fmt: skip


class _State:
    """Whether autocast is on, and the casts of trained weights that it keeps until it ends."""

    def __init__(self) -> None:
        self.enabled, self.dtype, self.depth = False, torch.bfloat16, 0
        self.kept: dict[int, Tensor] = {}

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(self.cast(each, dtype) for each in x)
        floats = isinstance(x, Tensor) and x.is_meta and x.is_floating_point()
        if not floats or x.dtype == dtype or x.dtype == torch.float64:
            return x
        if not (x.requires_grad and x.is_leaf and dtype == self.dtype and x.dtype == torch.float32):
            return x.to(dtype)
        if id(x) not in self.kept or not torch.is_grad_enabled():
            made = x.to(dtype)
            if not made.requires_grad:  # made without gradient, it would serve no later pass
                return made
            self.kept[id(x)] = made
        return self.kept[id(x)]


def _switch(original: Any, state: _State) -> Callable[..., Any]:
    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        if device_type != "meta":
            return original(device_type, *args, **options)
        return _Autocast(state, *args, **options)

    return autocast


class _Autocast:
    """`torch.autocast` of the meta device."""

    def __init__(
        self,
        state: _State,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self._state, self._wanted = state, (enabled, dtype or state.dtype)

    def __enter__(self) -> None:
        state = self._state
        self._before = (state.enabled, state.dtype)
        state.enabled, state.dtype = self._wanted
        state.depth += 1

    def __exit__(self, *_: object) -> None:
        state = self._state
        state.enabled, state.dtype = self._before
        state.depth -= 1
        if not state.depth:
            state.kept.clear()


def _asked(original: Any, answer: Callable[[], Any]) -> Callable[..., Any]:
    return lambda kind=None: answer() if kind == "meta" else original(*([kind] if kind else []))


# -- attention -------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The kernel's result has positions before heads, so that these are joined without a copy.
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1])
        found = query.new_empty(shape).transpose(-2, -3)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, found, sums)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    if query.dim() < 3:
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    found: Tensor = _Attention.apply(query, key, value)
    return found


# -- reads -----------------------------------------------------------------------------------------

READS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.item: lambda x: 1 if not x.is_floating_point() else 1.0,
    Tensor.tolist: lambda x: torch.ones(x.shape, dtype=x.dtype).tolist(),
    Tensor.__bool__: lambda _: True,
    Tensor.__float__: lambda _: 1.0,
    Tensor.__int__: lambda _: 1,
    Tensor.__index__: lambda _: 1,
    torch.equal: lambda _: False,
}
TO_HOST = {Tensor.to, Tensor.cpu}


def _all_of(x: Tensor, index: Any) -> tuple[Tensor, Any]:
    """A mask or a bound without values takes all: x and an index without that mask or bound."""
    if isinstance(index, slice) and any(map(_is_meta, (index.start, index.stop))):
        return x, slice(None)
    if isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool:
        return x.flatten(0, index.dim() - 1) if index.dim() else x[None], ...
    return x, index


def _is_meta(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta


def _to_host(args: Any, given: Any) -> bool:
    if len(args) == 1 and not given:  # Tensor.cpu
        return True
    wanted = [*args[1:], given.get("device")]
    return any(x == "cpu" or (isinstance(x, torch.device) and x.type == "cpu") for x in wanted)


def _dtype_of(args: Any, given: Any) -> torch.dtype:
    named = [x for x in (*args[1:], given.get("dtype")) if isinstance(x, torch.dtype)]
    found: torch.dtype = named[0] if named else args[0].dtype
    return found
