"""Captions that are embedded once, before training, and not again in every step."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from distill.data.datasets import LatentShards
from distill.machine.hardware import memory_available
from distill.methods.base import Distillation
from distill.storage.bounded import format_bytes
from distill.terminal.progress import track

log = logging.getLogger(__name__)
USES = 2  # ours: times that a run must read each caption, so that embedding it first saves time
SHARE = 0.25  # ours: the share of the available memory that embeddings may take


def embed_before(data: Any, method: Distillation) -> None:
    """Have data with `embed_once` embed their captions before the first batch is read."""
    if isinstance(data, LatentShards) and data.embed_once:
        data.embed_by(partial(_embed, method))


def _embed(method: Distillation, data: LatentShards, size: int) -> None:
    """Embed all captions if the run reads each at least USES times, in batches of `size`.

    Size and precision are those of the steps, so that the values are those of the steps. The
    batches do not depend on where a run resumes.
    """
    if method._trainer is None:  # a batch is read without training
        return
    trainer, loop = method.trainer, cast(Any, method.loop)
    read = trainer.max_steps * loop.settings.accumulate * size * trainer.world_size
    if 0 <= read < USES * len(data):  # below 0: the steps have no end
        return
    here = trainer.world_size // trainer.num_nodes
    with trainer.precision_plugin.train_step_context():
        captions = data.captions()
        rows = embedded(method.teacher, captions, size, ranks=here)
    if rows is not None:
        data.add_embeddings(captions, rows)
        if hasattr(method.teacher, "release"):
            method.teacher.release()  # text encoders that were loaded for this alone


@torch.no_grad()
def embedded(
    teacher: Any, captions: list[str], size: int, *, ranks: int = 1
) -> dict[str, Tensor] | None:
    """The tensors of the captions' Cond on the CPU, rows [N, ...], embedded `size` at a time.

    None if they would take more than SHARE of the available memory, of which each of the `ranks` of
    this machine has a part. The last batch is filled with the first captions: arithmetic may depend
    on the size of a batch.
    """
    rows: dict[str, Tensor] = {}
    starts = range(0, len(captions), size)
    for start in track(starts, "embedding the captions", unit="batch"):
        batch = captions[start : start + size]
        filled = [*batch, *(captions * size)[: size - len(batch)]]
        tensors = teacher.embed(filled).tensors()
        if not rows:
            needed = ranks * len(captions) * sum(x[0].nbytes for x in tensors.values())
            if needed > SHARE * memory_available():
                what = "captions are embedded in every step: those of the data would take"
                log.warning("data.embed_once: %s %s of memory", what, format_bytes(needed))
                return None
            rows = {name: _rows_like(x, len(captions)) for name, x in tensors.items()}
        for name, x in tensors.items():
            rows[name][start : start + len(batch)] = x[: len(batch)]
    return rows


def _rows_like(x: Tensor, count: int) -> Tensor:
    """Room on the CPU for `count` rows of x. Filled in place, rows exist only once."""
    return torch.empty((count, *x.shape[1:]), dtype=x.dtype)
