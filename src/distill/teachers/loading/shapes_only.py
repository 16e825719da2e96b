"""Networks by their configuration alone, and single tensors of a folder."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from distill.storage.bounded import check_header


def without_weights(network: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network of this configuration on meta tensors; of its files config.json alone is read."""
    with torch.device("meta"):
        if issubclass(network, transformers.PreTrainedModel):
            config = network.config_class.from_pretrained(folder)
            model = network._from_config(config)
        else:
            model = network.from_config(network.load_config(folder))
    # Not the model's own `to`, which warns of modules to keep in float32. Tables that NumPy made
    # are on the CPU.
    return nn.Module.to(model, device="meta", dtype=dtype).eval()


def stored(folder: Path, name: str) -> Tensor | None:
    """One tensor of the safetensors files of a folder, or None."""
    for file in sorted(folder.glob("*.safetensors")):
        check_header(file)
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                found: Tensor = opened.get_tensor(name)
                return found
    return None
