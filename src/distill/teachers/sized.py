"""Families whose files do not say the size of the pictures, nor the length of captions."""

from __future__ import annotations

from typing import Any

from distill.teachers.pipeline import PipelineTeacher


class SizedTeacher(PipelineTeacher):
    """
    Args:
        size: side of the pictures in pixels.
        length: largest number of tokens of a caption.
    """

    embedding_options = ("length",)

    def __init__(self, path: str, *, size: int = 1024, length: int = 512, **options: Any):
        self.size, self.length = size, length
        super().__init__(path, **options)
        if size % self.unit:
            raise ValueError(
                f"teacher.size={size}: must be a multiple of {self.unit} for this teacher"
            )

    def family_options(self) -> dict[str, Any]:
        return {"size": self.size, "length": self.length}

    def call_options(self) -> dict[str, Any]:
        return {**super().call_options(), "max_sequence_length": self.length, **self.sides()}

    def _shape(self) -> tuple[int, int, int]:
        side = self.size * self.patch // self.unit
        return self.network.latent_channels, side, side
