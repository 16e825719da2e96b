"""Losses of both players, as functions of logits [B, K] for real and fake samples, and the
penalties on the critic.

    hinge           D: E relu(1 - real) + E relu(1 + fake)       student: -E fake
    non_saturating  D: E softplus(-real) + E softplus(fake)      student:  E softplus(-fake)
    relativistic    D: E softplus(-(real - fake)), one by one   student:  E softplus(-(fake - real))

E is the mean over a head's logits, so that a head of a large map counts no more than one of the
whole, and then the sum or the mean over heads. The papers of ADD and NitroFusion sum, which makes
the adversarial term grow with the number of heads against every other; with the mean it does not.
Everything is reduced in float32 at least, whatever autocast made of the logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.process import precise
from distill.core.types import Cond, Critic, Logits

Answer = Logits | Tensor  # of a critic: logits [B, K]; a plain tensor is that of one head
OverHeads = Literal["mean", "sum"]


@dataclass(frozen=True)
class AdversarialLoss:
    """One game, by its margin losses: what the discriminator minimises of wrong margins, and the
    student of its own.
    """

    name: str
    wrong: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor]
    paired: bool = False
    """Whether real and fake are compared sample by sample, as RpGAN does (arXiv 2501.05441)."""
    over_heads: OverHeads = "mean"

    def discriminator(self, real: Answer, fake: Answer) -> Tensor:
        """(real [B, K], fake [B, K]) -> scalar; paired logits must have one shape."""
        if self.paired:
            return self.fake_term(real, fake)
        real = Logits.of(real)
        own = self._reduced(self.wrong(-precise(real.values)), real)
        return own + self.fake_term(real, fake)

    def fake_term(self, real: Answer, fake: Answer) -> Tensor:
        """The discriminator's term of fakes alone, which a paired game holds against the real
        ones.
        """
        real, fake = Logits.of(real), Logits.of(fake)
        logits = precise(fake.values)
        if not self.paired:
            return self._reduced(self.wrong(logits), fake)
        if real.values.shape != fake.values.shape:
            shapes = f"real {list(real.values.shape)}, fake {list(fake.values.shape)}"
            raise ValueError(f"{self.name} loss compares pairs, got {shapes}")
        return self._reduced(self.wrong(logits - precise(real.values)), fake)

    def student(self, fake: Answer, real: Answer | None = None) -> Tensor:
        """(fake [B, K], real [B, K], which a paired game needs) -> scalar."""
        if not self.paired:
            fake = Logits.of(fake)
            return self._reduced(self.own(-precise(fake.values)), fake)
        if real is None:
            what = "needs the real logits of the same critic; pass real="
            raise ValueError(f"the {self.name} student loss {what}")
        return self.discriminator(fake, real)  # the same with the players exchanged

    def _reduced(self, losses: Tensor, logits: Logits) -> Tensor:
        return by_head(logits._replace(values=losses), self.over_heads)


def by_head(losses: Logits, over_heads: OverHeads = "mean") -> Tensor:
    """Mean over each head's part of losses [B, K], then the mean or the sum over heads."""
    parts = torch.stack([part.mean() for part in losses.by_head()])
    return parts.sum() if over_heads == "sum" else parts.mean()


Game = Literal["hinge", "non_saturating", "relativistic"] | AdversarialLoss
GAMES = (
    AdversarialLoss("hinge", wrong=lambda x: F.relu(1 + x), own=lambda x: x),
    AdversarialLoss("non_saturating", wrong=F.softplus, own=F.softplus),
    AdversarialLoss("relativistic", wrong=F.softplus, own=F.softplus, paired=True),
)


def adversarial(game: Game, over_heads: OverHeads = "mean") -> AdversarialLoss:
    """The game of this name, hinge, non_saturating or relativistic, or one of one's own; its losses
    a mean over heads, or their sum.
    """
    if over_heads not in ("mean", "sum"):
        raise ValueError(f"method.over_heads={over_heads}: must be mean or sum")
    known = {each.name: each for each in GAMES}
    found = known.get(game) if isinstance(game, str) else game
    if not isinstance(found, AdversarialLoss):
        what = f"choose one of {', '.join(known)}, or give a losses.AdversarialLoss"
        raise ValueError(f"unknown adversarial loss {game!r}; {what}")
    return replace(found, over_heads=over_heads)


def real_logits(
    critic: Critic, maps: Sequence[Tensor], t: Tensor, cond: Cond, *, for_r1: bool
) -> tuple[Answer, Sequence[Tensor]]:
    """Real maps -> their logits [B, K], and the inputs that `r1` wants.

    For R1 the heads run in float32 at least, whatever autocast says, on inputs that require grad.
    """
    if not for_r1:
        return critic(list(maps), t, cond), maps
    inputs = [precise(m.detach()).requires_grad_() for m in maps]
    with torch.autocast(inputs[0].device.type, enabled=False):
        return critic(inputs, t, cond), inputs


def r1(logits: Answer, inputs: Sequence[Tensor]) -> Tensor:
    """R1 on head inputs: sum over maps of E_batch || d(sum of logits) / d(map) ||^2, the form of
    ADD (gamma = 1e-5).

    logits [B, K] of real samples; inputs, the maps [B, C_k, ...] they were computed from, detached
    from the extractor and then made to require grad, so that the penalty trains the heads alone and
    its second derivative never enters the frozen network. Both come from `real_logits`, outside
    bfloat16 autocast, and so is the derivative here: squared gradients are small and double
    backward loses digits. A map that no drawn head reads adds nothing.
    """
    if not inputs or not all(x.requires_grad for x in inputs):
        raise ValueError(
            "R1 needs inputs with gradient: detach the maps, requires_grad_(), then call the heads"
        )
    total = precise(Logits.of(logits).values).sum()
    with torch.autocast(total.device.type, enabled=False):
        gradients = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    norms = [precise(g).square().flatten(1).sum(1).mean() for g in gradients if g is not None]
    if not norms:
        raise ValueError(
            "the logits do not depend on these inputs; R1 needs the very maps the heads were called"
            " with"
        )
    return torch.stack(norms).sum()


def weighted_mse(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """E_batch weight * mean (x - target)^2, for x, target [B, ...] and weight [B], 1 unless
    given.
    """
    weight = torch.ones(len(x), device=x.device) if weight is None else weight
    if x.shape != target.shape or weight.shape != x.shape[:1]:
        raise ValueError(f"shapes do not fit: {[list(each.shape) for each in (x, target, weight)]}")
    return (weight * (precise(x) - precise(target)).square().flatten(1).mean(1)).mean()


def pseudo_huber(x: Tensor, target: Tensor, scale: float) -> Tensor:
    """E_batch sqrt(|x - target|^2 + h^2) - h with h = scale sqrt(n), for x, target [B, ...] of n
    numbers a sample.

    As arXiv 2310.14189 has it, sums and not means: for large differences it is their norm.
    """
    h = scale * math.sqrt(x[0].numel())
    away = (precise(x) - precise(target)).square().flatten(1).sum(1)
    return ((away + h**2).sqrt() - h).mean()


def critic_stats(real: Answer, fake: Answer) -> dict[str, Tensor]:
    """Health of the discriminator from its logits [B, K]: their means, in all and per head, and how
    often it is right.

    It is right about a pair whose real one has the higher logit, a tie counting half: that says the
    same of every loss, while a relativistic one leaves it open where zero lies. The keys are those
    of the log.
    """
    real, fake = Logits.of(real), Logits.of(fake)
    above, below = precise(real.values), precise(fake.values)
    right = (above > below).float().mean() + (above == below).float().mean() / 2
    found = {"d/real": above.mean(), "d/fake": below.mean(), "d/accuracy": right}
    if len(real.sizes) == 1:
        return found
    heads = (real._replace(values=above).by_head(), fake._replace(values=below).by_head())
    for k, (a, b) in enumerate(zip(*heads, strict=True)):
        found |= {f"d/real_head{k}": a.mean(), f"d/fake_head{k}": b.mean()}
    return found
