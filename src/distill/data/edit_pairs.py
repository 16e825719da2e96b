"""Edit pairs by index: a source picture, a target picture, and the instruction between them."""

from torch import Tensor

from distill.data import decode, raw
from distill.data.datasets import ImageShards, Size
from distill.data.kinds import PARTS, check_pairs
from distill.data.shards import Shards


class EditPairs(ImageShards):
    """Edit pairs from shards: `pixels`, the target, and `source`, both in [-1, 1], of one size; the
    caption is the instruction.

    Files are `<key>.source.png`, `<key>.target.png` and `<key>.txt`; other picture formats and
    captions as for `ImageShards`. Raises ValueError as it does, or if no sample is a pair.
    """

    def open(self, path: str) -> Shards:
        return Shards(path, parts=PARTS, cache=self.cache)

    def check_pictures(self, path: str) -> None:
        check_pairs(path, self.shards.index)

    def size_of(self, sample: dict) -> Size:
        return raw.image_size(sample, "target")

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        source, target = (raw.image_size(sample, part) for part in PARTS)
        raw.check_same_size(sample, source, target)
        sides = bucket or (self.size,)
        pictures = (decode.image(sample, *sides, part=part) for part in PARTS)
        return dict(zip(("source", "pixels"), pictures, strict=True))
