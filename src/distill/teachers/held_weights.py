"""How a teacher holds the weights of its denoiser while a student is trained."""

from typing import Any

import torch

from distill.core.quantized_weights import Kind


def follow(part: Any, device: torch.device) -> None:
    """Move a network, if there is one, to a device where it is not yet.

    `to` alone takes 10 ms for an autoencoder that is there, and a step asks for it many times.
    """
    if part is not None and next(part.parameters()).device != device:
        part.to(device)


class HeldWeights:
    """Part of a teacher: `network` is its denoiser, `quantize` what becomes of its weights."""

    network: Any
    quantize: Kind | None

    def hold_half(self, **how: Any) -> None:
        """Hold the denoiser's weights in bfloat16 where autocast casts them (`half_weights`)."""
        self.network.weights.halve(**how)

    def hold_quantized(self, device: torch.device) -> None:
        """Quantise the denoiser's frozen weights on their way to the device, as `quantize` says."""
        if self.quantize:
            self.network.weights.quantize(self.quantize, device=device)

    def hold_whole(self) -> None:
        """Undo `hold_half` and `hold_quantized`."""
        self.network.weights.restore()
