"""Evaluate an inpainting model on `shapes`: masked renders of prompts are filled.

The baseline is what users do with an ordinary model: its samples are blended with the picture at
every step (`blend`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core import distances
from distill.core.types import FILL, Cond, Denoiser
from distill.evaluation import kinds, results
from distill.evaluation.shapes import Shapes, evaluated_samplers, generate_pictures, masked
from distill.sampling import FewSteps
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import Bar
from distill.worlds.shapes.judge import Judge, as_saved, judging_prompts

FIXED_PROTOCOL = {
    "student guidance": "none",
    "feature network": "reader of shapes; its maps for the distance to what was masked",
    "reference": "fresh renders of the same prompts; known pixels are pasted back for distances",
}


@dataclass(frozen=True, kw_only=True)
class FilledShapes(Shapes):
    """The protocol of `Shapes` for pictures that are filled under drawn masks.

    prompt_accuracy: of the whole picture as it was made. known_error: mean difference from the
    given picture outside the mask, in [0, 1]. frechet, fill_distance: with the known pixels pasted
    back, so of the filled part alone. diversity: over fillings of one masked picture.

    Args:
        blend: the models are of text to image, and fill by blending; else they are inpainting
            models.
    """

    any_size: ClassVar[bool] = False
    blend: bool = False

    def _check_kind(self, teacher: PipelineTeacher) -> None:
        kinds.check_fills(teacher, self.blend)

    def fixed(self) -> dict[str, Any]:
        # Not `blend`: it is how a model fills, and results of both are compared.
        return FIXED_PROTOCOL

    def samplers(
        self, student: Denoiser, teacher: PipelineTeacher, sampler: FewSteps | None
    ) -> Iterator[tuple[str, int, Callable[..., Tensor]]]:
        shape = teacher.latent_shape
        if self.blend:
            student, teacher = Blended(student), Blended(teacher)
        return evaluated_samplers(self, student, teacher, sampler, shape)

    def _evaluate(
        self, judge: Judge, teacher: PipelineTeacher, sample: Callable[..., Tensor], bar: Bar
    ) -> tuple[dict, Tensor]:
        row, pictures = super()._evaluate(judge, teacher, sample, bar)
        prompts = judging_prompts(self.prompts, seed=self.seed)
        given = masked(prompts, range(len(prompts)))
        scores, outcomes = fill_scores(judge, pictures, given["pixels"], given[FILL])
        pasted = pasted_back(pictures, given["pixels"], given[FILL])
        real = judge.reference(prompts, seed=self.seed).features
        features = judge.read(pasted)[0]
        scores["frechet"] = distances.frechet(features, real)
        outcomes["frechet"] = distances.frechet_by_sample(features, real, paired=True)
        known = row[results.OUTCOMES] | results.packed(outcomes)
        return {**row, **scores, results.OUTCOMES: known}, pictures

    def generate(self, teacher: PipelineTeacher, *args: Any) -> Tensor:
        if not self.blend:
            return generate_pictures(teacher, *args)
        return generate_pictures(teacher, *args, image_of=partial(mask_and_picture, teacher))


# -- scores ----------------------------------------------------------------------------------------


def pasted_back(pictures: Tensor, given: Tensor, fill: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] inside the mask [N, 1, H, W], the given ones outside."""
    return torch.where(fill >= 0.5, pictures, given)


def fill_scores(
    judge: Judge, pictures: Tensor, given: Tensor, fill: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """`known_error` and `fill_distance` of pictures [N, 3, 64, 64] in [-1, 1]: means, and the
    numbers of every picture [N].

    fill_distance follows LPIPS (Zhang et al. 2018), with the maps of the reader and without learned
    weights: the squared distance of unit vectors of channels, at each place under the mask, summed
    over maps. One caption allows many fillings, so it is not 0 for a right one.
    """
    pictures, given = as_saved(pictures), as_saved(given)
    hidden = (fill >= 0.5).float()
    error = (pictures - given).abs().mean(1, keepdim=True) / 2
    found = {"known_error": _mean_under(error, 1 - hidden)}
    pasted = pasted_back(pictures, given, fill)
    found["fill_distance"] = torch.cat(
        [
            _map_distance(judge, *parts)
            for parts in zip(*(x.split(64) for x in (pasted, given, hidden)), strict=True)
        ]
    )
    return {name: values.mean().item() for name, values in found.items()}, found


@torch.no_grad()
def _map_distance(judge: Judge, pictures: Tensor, given: Tensor, hidden: Tensor) -> Tensor:
    """The distance of each picture [N]."""
    distance = torch.zeros(len(pictures), dtype=torch.float64)
    for a, b in zip(judge.reader.maps(pictures), judge.reader.maps(given), strict=True):
        difference = (F.normalize(a) - F.normalize(b)).square().sum(1, keepdim=True)
        distance += _mean_under(difference, F.interpolate(hidden, size=a.shape[-2:], mode="area"))
    return distance


def _mean_under(values: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean [N] of values [N, 1, H, W] over places."""
    total = weight.double().flatten(1).sum(1)
    return (values * weight).double().flatten(1).sum(1) / total.clamp(min=1e-9)


# -- the baseline ----------------------------------------------------------------------------------


def mask_and_picture(teacher: PipelineTeacher, batch: Mapping[str, Tensor]) -> Tensor:
    """What `Blended` reads: the mask at the latents' size, then the whole picture's latents, [B,
    1 + C, h, w], as diffusers' inpainting pipelines do for models of text to image.
    """
    known = teacher.encode(batch["pixels"])
    return torch.cat([F.interpolate(batch[FILL], size=known.shape[-2:]), known], 1)


class Blended:
    """A denoiser of text to image whose x0 prediction is the given picture outside the mask.

    Its Cond has `mask_and_picture` as image.
    """

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.image is not None
        fill, known = cond.image[:, :1], cond.image[:, 1:]
        return torch.lerp(known, self._model.x0(x_t, t, replace(cond, image=None)), fill)
