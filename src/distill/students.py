"""Students made from a teacher."""

from __future__ import annotations

from distill.teachers.network import Network, PipelineTeacher


def full(teacher: PipelineTeacher) -> Network:
    """A copy of the teacher's network with weights of its own, all of them trainable: the papers' student."""
    return teacher.network.twin()
