"""Weights of a student in 8 bits, by torchao, as plain diffusers reads them.

    int8   a scale for each row of a weight
    fp8    e4m3, a scale for each row

Only the linear layers of the denoiser are quantised. They compute in bfloat16, and so must the
pipeline. An opened pipeline needs torchao too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from distill.machine.faults import first_line, quiet_logging
from distill.storage.bounded import mapping_of
from distill.students import save_denoiser
from distill.teachers.loading.locate import denoiser_part
from distill.terminal.progress import stage

DTYPE = "bfloat16"


def quantised(folder: Path, weights: str) -> Any:
    """The denoiser of the pipeline in this folder, with quantised weights, `int8` or `fp8`.

    Raises ValueError where torchao or diffusers cannot.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    how = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[weights]()
    part = folder / denoiser_part(folder)
    kind = getattr(diffusers, str(mapping_of(part / "config.json").get("_class_name")))
    settings = diffusers.TorchAoConfig(how)
    try:
        with stage(f"quantising the weights, {weights}"), quiet_logging():
            return kind.from_pretrained(
                part, quantization_config=settings, dtype=getattr(torch, DTYPE)
            )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        what = f"torchao cannot quantise a {kind.__name__} ({first_line(error, 120)})"
        raise ValueError(f"weights={weights}: {what}; leave it out") from None


def quantise_denoiser(folder: Path, weights: str) -> None:
    """Write the denoiser of the pipeline in this folder with quantised weights."""
    save_denoiser(quantised(folder, weights), folder)
