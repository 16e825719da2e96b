"""Schedulers that diffusers does not have: FlowScheduler, for UNets that predict a flow, and
ShiftedLCMScheduler, NitroFusion's timestep shift.

    pipe.scheduler = ShiftedLCMScheduler.from_config(...)

    x0 = (x - sigma_tau' eps(x, tau')) / alpha_tau',  tau' = floor(tau shift / 1000)
    x  = alpha_later x0 + sigma_later z    later: the next tau, not shifted

tau are LCM's: 999, 749, 499, 249 for four steps. At pure noise x is then divided by an alpha of .82
(shift 250) and not of .07, so an error of eps is not amplified fifteen times.
"""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,  # noqa: F401  # diffusers looks for its base class in this module
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Adds what Stable Diffusion's pipelines call on a scheduler; steps at 1, 1 - 1/n, ..., 1/n."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        return sample

    def set_timesteps(self, num_inference_steps: int | None = None, *args: Any, **kw: Any) -> None:
        if num_inference_steps is not None and not args and not kw.keys() & {"sigmas", "timesteps"}:
            kw["sigmas"] = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(num_inference_steps, *args, **kw)


class ShiftedLCMScheduler(LCMScheduler):
    """For eps and v networks.

    Its `timesteps` are the shifted ones, which a pipeline passes to the network.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        rescale_betas_zero_snr: bool = False,
        original_inference_steps: int = 4,
        prediction_type: str = "epsilon",
        shifted_timestep: int = 250,
    ):
        betas = {"beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule}
        betas |= {"trained_betas": trained_betas, "rescale_betas_zero_snr": rescale_betas_zero_snr}
        own = {
            "original_inference_steps": original_inference_steps,
            "prediction_type": prediction_type,
        }
        # Without its decorator, which would add LCM's other settings and warn of them on loading.
        LCMScheduler.__init__.__wrapped__(self, num_train_timesteps, **betas, **own)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.unshifted = self.timesteps
        self.timesteps = (
            self.unshifted * self.config.shifted_timestep // self.config.num_train_timesteps
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        self._step_index += 1
        alpha, sigma = self._levels(self.timesteps[self.step_index - 1])
        if self.config.prediction_type == "epsilon":
            x0 = (sample - sigma * model_output) / alpha
        else:
            x0 = alpha * sample - sigma * model_output
        x = x0
        if self.step_index < len(self.timesteps):
            noise = torch.randn(
                x0.shape, generator=generator, device=generator.device if generator else x0.device
            )
            x = self.add_noise(
                x0, noise.to(x0), self.timesteps[self.step_index : self.step_index + 1]
            )
        return LCMSchedulerOutput(prev_sample=x, denoised=x0) if return_dict else (x, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples to the unshifted levels of these shifted timesteps."""
        indices = [
            (self.timesteps == step).nonzero()[0, 0] for step in timesteps.to(self.timesteps.device)
        ]
        return super().add_noise(
            original_samples, noise, self.unshifted[torch.stack(indices)].long()
        )

    def _levels(self, step: Tensor) -> tuple[Tensor, Tensor]:
        alpha_squared = self.alphas_cumprod[int(step)]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
