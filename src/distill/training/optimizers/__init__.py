"""Optimisers beside those of torch: with a small state, with a learning rate of their own, for
matrices. Each function is a `_target_` of the groups `optimizer` and `optimizer_of`: its signature
is what a configuration is checked by, before the library is imported.

Their libraries are extras, and imported only where they are used. What such an optimiser may have
beside what one of torch has, the loop finds here:

    set_rate(group, rate)           the learning rate, where it is a tensor too
    forget(optimizer, parameter)    a parameter starts anew, as one that was never updated
    evaluated(optimizer)            what the weights are outside training, where they are others
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Parameters = Iterable[nn.Parameter]


def adamw8bit(
    params: Parameters,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    block_size: int = 256,
    compile: bool = True,
) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (Dettmers et al., arXiv 2110.02861), by torchao.

    Each block of `block_size` values shares a scale in float32. Tensors with fewer than 4,096
    values, or with another number than whole blocks, keep moments in their own dtype. On a GPU the
    step is compiled, unless `compile` is false.
    """
    from distill.training.optimizers.eight_bit import AdamW8bit

    return AdamW8bit(
        params,
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        block_size=block_size,
        compile=compile,
    )


def adamw8bit_bnb(
    params: Parameters,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    paged: bool = False,
) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits, by bitsandbytes, on a GPU.

    With `paged` the driver moves the moments to the CPU where memory is short.
    """
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if paged else AdamW8bit
    return kind(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)


def adafactor(
    params: Parameters,
    *,
    lr: float,
    beta1: float | None = None,
    decay_rate: float = -0.8,
    clip_threshold: float = 1.0,
    eps: Sequence[float] = (1e-30, 1e-3),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235) at a given learning rate, by transformers.

    Of a matrix [M, N] it holds M + N numbers. `beta1` adds a mean of the updates, of the size of
    the weights. The mean of squares has the decay 1 - step ** `decay_rate`.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        params,
        lr=lr,
        beta1=beta1,
        decay_rate=decay_rate,
        clip_threshold=clip_threshold,
        eps=tuple(eps),
        weight_decay=weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def prodigy(
    params: Parameters,
    *,
    lr: float = 1.0,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float | None = None,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    slice_p: int = 1,
) -> torch.optim.Optimizer:
    """AdamW that estimates its learning rate (Prodigy, arXiv 2306.06101), by prodigyopt.

    Args:
        lr: what the estimate is multiplied by; the schedule of the loop multiplies it too.
        d0: the first estimate. d_coef: a factor of later ones.
        growth_rate: most growth of the estimate in a step; None: any.
        slice_p: the estimate reads every so many values of a tensor, and stores only those.
    """
    from distill.training.optimizers.found_rate import Prodigy

    return Prodigy(
        params,
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        d0=d0,
        d_coef=d_coef,
        growth_rate=float("inf") if growth_rate is None else growth_rate,
        use_bias_correction=use_bias_correction,
        safeguard_warmup=safeguard_warmup,
        slice_p=slice_p,
    )


def schedule_free(
    params: Parameters,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    per_tensor: bool = False,
) -> torch.optim.Optimizer:
    """AdamW without a schedule (arXiv 2405.15682), by schedulefree.

    Training moves y, the weights at which gradients are taken; what is averaged, evaluated and
    exported is x, the mean of its iterates.

    Args:
        r, weight_lr_power: weight of step k in the mean: k ** r * rate ** weight_lr_power.
        per_tensor: each tensor has a mean and a step count of its own, for networks whose parts
            learn in different iterations, as heads of a pool do.

    Raises ValueError for a first beta of 0, with which x cannot be told from y.
    """
    from distill.training.optimizers.averaged import ScheduleFree

    if not betas[0] > 0:
        what = "schedule_free interpolates by the first, which must be above 0; 0.9 is usual"
        raise ValueError(f"betas={list(betas)}: {what}")
    return ScheduleFree(
        params,
        lr=lr,
        betas=tuple(betas),
        eps=eps,
        weight_decay=weight_decay,
        r=r,
        weight_lr_power=weight_lr_power,
        per_tensor=per_tensor,
    )


def muon(
    params: Parameters,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Muon for matrices, and AdamW for all other parameters, both of torch.

    With `match_rms_adamw` (arXiv 2502.16982) an update of a matrix is as large as one of AdamW, so
    both have one learning rate. `betas` and `eps` are AdamW's, `momentum` and `ns_steps` Muon's.
    """
    from distill.training.optimizers.matrices import MuonAndAdamW

    return MuonAndAdamW(
        params,
        matrices={
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        },
        others={"betas": tuple(betas), "eps": eps},
        lr=lr,
        weight_decay=weight_decay,
    )


# -- what the loop asks ----------------------------------------------------------------------------


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group of parameters; in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def forget(optimizer: Any, parameter: nn.Parameter) -> None:
    """Clear what the optimiser knows of this parameter, whose values are new."""
    own = getattr(optimizer, "forget", None)
    if own is None:
        optimizer.state.pop(parameter, None)
    else:
        own(parameter)


def evaluated(optimizer: Any) -> Callable[[Tensor], Tensor] | None:
    """Parameter -> its values outside training; None for an optimiser that trains these."""
    return getattr(optimizer, "evaluated", None)


def grouped(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters as groups of parameters, which optimisers take too."""
    found = list(params)
    if found and isinstance(found[0], Mapping):
        return [dict(group) for group in found]
    return [{"params": found}]
