"""Does LADD learn? One step of the toy's teacher lands halfway between two modes; LADD must move it to the modes.

Signs and detachments are easy to get wrong and still give finite losses; with the student's sign flipped this fails.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from distill.losses import hinge_student
from distill.sampling import consistency, seeded

STEPS, BATCH = 300, 64
toy = tiny.Toy()


def one_step(student, n: int = 512) -> torch.Tensor:
    return consistency(student, toy.embed([""] * n), seeded(range(n)), shape=toy.shape, steps=1)


def distance(student) -> float:
    """Mean distance of one-step samples to the nearer mode; the modes' own size is 1."""
    return float(toy.distance(one_step(student)).mean())


def trained(folder, *, sign: float = 1.0, **options):
    method = tiny.ladd(toy, rate=2e-3, critic_rate=5e-3, ema_decay=0.9, **options)
    method.adversarial = replace(method.adversarial, student=lambda fake, real=None: sign * hinge_student(fake, real))
    tiny.trainer(folder, STEPS).fit(method, tiny.Stream(toy, BATCH).loader())
    return method
