"""Scenes of `shapes` as raw samples: rendered pictures with captions, by number."""

import hashlib
from typing import Any

from distill.worlds.shapes.edits import sample_edit
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import sample


class Scenes:
    """Scene i of a seed is the same on every machine; it is rendered on access.

    Args:
        count: number of scenes.
        seed: of the scenes.
    """

    def __init__(self, count: int, seed: int = 0):
        if count < 1:
            raise ValueError(f"data.reader.count={count}: must be at least 1")
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def digest(self) -> str:
        return hashlib.sha256(f"{self.count} scenes of {self.seed}".encode()).hexdigest()

    def read(self, i: int, at_most: int = -1) -> dict[str, Any]:
        """A raw sample: its caption as `txt`, its picture, uint8 [64, 64, 3], as `array`."""
        prompt, scene = sample(self.seed, i)
        said = {"__url__": "shapes", "__key__": f"{i:06d}", "txt": prompt.caption.encode()}
        return {**said, "array": render([scene])[0]}


class Edits(Scenes):
    """Edit i of a seed, in the same way: an instruction, and the pictures before and after it."""

    def digest(self) -> str:
        return hashlib.sha256(f"{self.count} edits of {self.seed}".encode()).hexdigest()

    def read(self, i: int, at_most: int = -1) -> dict[str, Any]:
        """A raw sample: the instruction as `txt`, the target as `array`, the source as `source`;
        both uint8 [64, 64, 3].
        """
        edit = sample_edit(self.seed, i)
        source, target = render([edit.source, edit.target])
        said = {"__url__": "shapes", "__key__": f"{i:06d}", "txt": edit.instruction.encode()}
        return {**said, "array": target, "source": source}
