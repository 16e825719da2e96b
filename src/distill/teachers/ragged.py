"""Captions of unequal lengths: embedded token lists as one padded record, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.transfers import host_values
from distill.core.types import Cond


class Ragged(ABC):
    """Part of a teacher whose pipeline cuts each caption to its own length."""

    @abstractmethod
    def of_ids(self, ids: Tensor, mask: Tensor) -> Cond:
        """What `embed` gives for padded token ids [B, L] and their mask, for an exporter: no shape
        depends on their values.
        """


def padded(captions: Sequence[Tensor], length: int) -> Cond:
    """Tokens [L_i, D] of each caption -> tokens [B, length, D], zeros behind them, and their mask
    [B, length].
    """
    tokens = torch.stack([F.pad(x, (0, 0, 0, length - len(x))) for x in captions])
    counts = torch.tensor([len(x) for x in captions], device=tokens.device)
    mask = torch.arange(length, device=tokens.device) < counts[:, None]
    return Cond(tokens=tokens, mask=mask.long())


def counts(cond: Cond) -> list[int]:
    """Number of tokens of each caption. The mask is read, and a device waited for, unless its
    values are known on the host.
    """
    if cond.mask is None:
        return [cond.tokens.shape[1]] * len(cond)
    known = host_values(cond.mask)
    found: list[int] = (cond.mask if known is None else known).sum(1).int().tolist()
    return found


def tokens_of(cond: Cond) -> list[Tensor]:
    """The tokens [L_i, D] of each caption, without padding."""
    return [x[:n] for x, n in zip(cond.tokens, counts(cond), strict=True)]


def filled(tokens: Tensor, mask: Tensor, length: int) -> Cond:
    """As `padded`, of tokens [B, L, D] that have padding behind them, of any number."""
    tokens, mask = (tokens * mask[..., None])[:, :length], mask[:, :length].long()
    behind = length - tokens.shape[1]
    return Cond(tokens=F.pad(tokens, (0, 0, 0, behind)), mask=F.pad(mask, (0, behind)))
