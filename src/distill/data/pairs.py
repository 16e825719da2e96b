"""Pairs of a preference: of two pictures of one caption, the winner is preferred to the loser.

A sample is `<key>.winner.png`, `<key>.loser.png` (or another format of pictures) and a caption,
`<key>.txt` or `.json`; or latents, `<key>.winner.npy` and `<key>.loser.npy`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.core.limits import check_samples
from distill.data import decode, raw
from distill.data.bad import BadSample, none_usable
from distill.data.datasets import Samples, Size
from distill.data.kinds import SIDES, is_latents, refuse_folder, side_of, without_side
from distill.data.shards import Shards


class Pairs(Samples):
    """Items with `x0` and `loser_x0`, float32 [C, h, w], for latents, or `pixels` and
    `loser_pixels`, [3, H, W] in [-1, 1], for pictures.

    Pictures are cropped and resized to `size`, pixels a side, or to those of `buckets`. Raises
    ValueError if the first samples are all bad, for a folder of pictures, and for pictures without
    a size.
    """

    shape = None  # of latents
    key: str | None = None  # x0 or pixels, as in the first pair

    def __init__(self, path: str, *, size: int | None = None, **options: Any):
        check_samples(None, 0.0, options.get("buckets"))
        self.size = size
        super().__init__(path, **options)
        first, skipped = self.find(0)
        if first is None:
            raise none_usable(path, dict(skipped))
        self.key = "x0" if "x0" in first else "pixels"
        if self.key == "x0":
            self.shape = tuple(first["x0"].shape)
        elif size is None and not self.buckets:
            raise without_side(path)

    def open(self, path: str) -> Shards:
        found = Shards(path, parts=SIDES, cache=self.cache)
        if found.of_folder:
            refuse_folder(path)
        return found

    def size_of(self, sample: dict) -> Size:
        winner = side_of(sample, SIDES[0])
        return raw.latent_size(winner) if is_latents(winner) else raw.image_size(winner)

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        winner, loser = (side_of(sample, name) for name in SIDES)
        latents = is_latents(winner)
        if latents != is_latents(loser):
            raise BadSample(sample, "one of its pair is latents and the other a picture")
        key = "x0" if latents else "pixels"
        if self.key not in (None, key):
            kinds = ("latents", "pictures") if latents else ("pictures", "latents")
            raise BadSample(sample, f"it is a pair of {kinds[0]}, and the first of {kinds[1]}")
        found = {
            f"{prefix}{key}": self._decoded(part, name, bucket)
            for prefix, part, name in (("", winner, SIDES[0]), ("loser_", loser, SIDES[1]))
        }
        x, other = found.values()
        if x.shape != other.shape or (latents and self.shape not in (None, tuple(x.shape))):
            what = f"its winner's latents are {list(x.shape)} and its loser's {list(other.shape)}"
            wanted = "" if x.shape != other.shape else f", and the first pair's {list(self.shape)}"
            raise BadSample(sample, what + wanted)
        if x.equal(other):
            raise BadSample(sample, "its winner and its loser are the same")
        return found

    def _decoded(self, part: dict, name: str, bucket: Size | None) -> Tensor:
        """Latents or pixels of one of a pair."""
        try:
            if is_latents(part):
                return decode.latent(part)
            return decode.image(part, *(bucket or (self.size or raw.image_size(part)[0],)))
        except BadSample as error:
            raise BadSample(part, f"of its {name}: {error.reason}") from None
