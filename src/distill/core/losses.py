"""Adversarial losses of both players, as functions of real and fake logits [B, K], and R1.

    hinge           D: E relu(1 - real) + E relu(1 + fake)       student: -E fake
    non_saturating  D: E softplus(-real) + E softplus(fake)      student:  E softplus(-fake)
    relativistic    D: E softplus(fake - real), pairwise         student:  E softplus(real - fake)

E is the mean over a head's logits, so heads of large and small maps have equal weight. The losses
of the heads are then summed or averaged. ADD and NitroFusion sum; the adversarial term then grows
with the number of heads. With the mean it does not. All reductions are in float32 or above, also
under autocast.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.process import precise
from distill.core.transfers import join
from distill.core.types import Cond, Critic, Logits

JOINT = 2**26  # bytes of maps up to which one call of the heads reads real and fake

HeadLogits = Logits | Tensor  # logits [B, K] of all heads; a plain tensor is of one head
OverHeads = Literal["mean", "sum"]


@dataclass(frozen=True)
class AdversarialLoss:
    """A pair of losses, given by a function of margins for each player.

    A margin is positive where the logit is on the wrong side for that player. For the discriminator
    it is -real and fake, or fake - real in pairs; for the student it is -fake, or real - fake. Both
    functions rise with it.
    """

    name: str
    discriminator_margin: Callable[[Tensor], Tensor]
    student_margin: Callable[[Tensor], Tensor]
    paired: bool = False
    """Whether real and fake logits are compared in pairs, as in RpGAN (arXiv 2501.05441)."""
    over_heads: OverHeads = "mean"

    def discriminator(self, real: HeadLogits, fake: HeadLogits) -> Tensor:
        """(real [B, K], fake [B, K]) -> scalar; a paired loss needs equal shapes."""
        if self.paired:
            return self.fake_term(real, fake)
        real = Logits.of(real)
        real_term = self._reduced(self.discriminator_margin(-precise(real.values)), real)
        return real_term + self.fake_term(real, fake)

    def fake_term(self, real: HeadLogits, fake: HeadLogits) -> Tensor:
        """The discriminator's term of the fake logits; a paired loss compares them with the real
        ones.
        """
        real, fake = Logits.of(real), Logits.of(fake)
        logits = precise(fake.values)
        if not self.paired:
            return self._reduced(self.discriminator_margin(logits), fake)
        if real.values.shape != fake.values.shape:
            shapes = f"real {list(real.values.shape)}, fake {list(fake.values.shape)}"
            raise ValueError(f"{self.name} loss compares pairs, got {shapes}")
        return self._reduced(self.discriminator_margin(logits - precise(real.values)), fake)

    def student(self, fake: HeadLogits, real: HeadLogits | None = None) -> Tensor:
        """(fake [B, K], real [B, K], needed by a paired loss) -> scalar."""
        if not self.paired:
            fake = Logits.of(fake)
            return self._reduced(self.student_margin(-precise(fake.values)), fake)
        if real is None:
            what = "needs the real logits of the same critic; pass real="
            raise ValueError(f"the {self.name} student loss {what}")
        return self.discriminator(fake, real)  # the same loss with real and fake exchanged

    def _reduced(self, losses: Tensor, logits: Logits) -> Tensor:
        return by_head(logits._replace(values=losses), self.over_heads)


def by_head(losses: Logits, over_heads: OverHeads = "mean") -> Tensor:
    """Mean over each head's part of losses [B, K], then the mean or the sum over heads."""
    parts = torch.stack([part.mean() for part in losses.by_head()])
    return parts.sum() if over_heads == "sum" else parts.mean()


LossName = Literal["hinge", "non_saturating", "relativistic"] | AdversarialLoss
LOSSES = (
    AdversarialLoss(
        "hinge", discriminator_margin=lambda x: F.relu(1 + x), student_margin=lambda x: x
    ),
    AdversarialLoss("non_saturating", discriminator_margin=F.softplus, student_margin=F.softplus),
    AdversarialLoss(
        "relativistic", discriminator_margin=F.softplus, student_margin=F.softplus, paired=True
    ),
)


def adversarial(
    loss: LossName | AdversarialLoss, over_heads: OverHeads = "mean"
) -> AdversarialLoss:
    """The loss of this name, hinge, non_saturating or relativistic, or one of your own; with the
    mean or sum over heads.
    """
    if over_heads not in ("mean", "sum"):
        raise ValueError(f"method.over_heads={over_heads}: must be mean or sum")
    known = {each.name: each for each in LOSSES}
    found = known.get(loss) if isinstance(loss, str) else loss
    if not isinstance(found, AdversarialLoss):
        what = f"choose one of {', '.join(known)}, or give a losses.AdversarialLoss"
        raise ValueError(f"unknown adversarial loss {loss!r}; {what}")
    return replace(found, over_heads=over_heads)


class BothLogits(NamedTuple):
    """What the discriminator's losses read."""

    real: HeadLogits  # [B, K]
    fake: HeadLogits  # [B, K]
    inputs: Sequence[Tensor]  # the real features [B, C_k, ...] as the heads read them, for `r1`


def both_logits(
    critic: Critic,
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    cond: Cond,
    t: Tensor,
    *,
    fake_t: Tensor | None = None,
    for_r1: bool = False,
) -> BothLogits:
    """Logits of real and of fake features, which are detached.

    t [B] are the noise levels, and fake_t those of the fake, if other. For R1 the heads read real
    features in float32 or above, also under autocast, as inputs that require grad.

    One call of the heads gives both logits if the critic states by `per_sample` that those of a
    sample do not depend on its batch. This halves the number of operations. Maps of more than
    `JOINT` bytes are not put together: their operations are long, and the copies would take memory.
    """
    fake = [f.detach() for f in fake]
    fake_t = t if fake_t is None else fake_t
    if for_r1:
        inputs = [precise(m.detach()).requires_grad_() for m in real]
        with torch.autocast(inputs[0].device.type, enabled=False):
            of_real = critic(inputs, t, cond)
        return BothLogits(of_real, critic(fake, fake_t, cond), inputs)
    if not _is_per_sample(critic) or sum(f.nbytes for f in fake) > JOINT:
        return BothLogits(critic(list(real), t, cond), critic(fake, fake_t, cond), real)
    twice = torch.arange(len(t), device=t.device).repeat(2)
    maps = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
    logits = Logits.of(critic(maps, join([t, fake_t]), cond.index(twice)))
    of_real, of_fake = (logits._replace(values=part) for part in logits.values.chunk(2))
    return BothLogits(of_real, of_fake, real)


def _is_per_sample(critic: Critic) -> bool:
    """Whether the critic, or exactly its class, states `per_sample`: a subclass that adds, say, a
    batch norm must not inherit the statement.
    """
    states = "per_sample" in {**vars(type(critic)), **getattr(critic, "__dict__", {})}
    return states and bool(critic.per_sample)  # type: ignore[attr-defined]


def r1(logits: HeadLogits, inputs: Sequence[Tensor]) -> Tensor:
    """R1 on the heads' inputs, as in ADD (gamma = 1e-5): sum over maps of E_batch ||d(sum of
    logits) / d(map)||^2.

    The sum over a head's logits is ours: the paper does not say whose gradient it is where a head
    gives a logit for each token. The other terms take the mean over these logits, so with N tokens
    one gamma weighs this penalty N^2 times as much as the gradient of that mean would.

    logits [B, K] of real samples; inputs, the feature maps [B, C_k, ...] they were computed from.
    Both come from `both_logits`: the maps are detached from the feature network and require grad.
    The penalty therefore trains the heads alone, and no second derivative enters the frozen
    network. All is computed outside bfloat16 autocast, because squared gradients are small and
    double backward loses digits. A map that no drawn head reads adds nothing.
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
            "the logits do not depend on these inputs; R1 needs the maps with which the heads were"
            " called"
        )
    return torch.stack(norms).sum()


def weighted_mse(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """E_batch weight mean (x - target)^2, for x, target [B, ...] and weight [B]; None is 1."""
    weight = torch.ones(len(x), device=x.device) if weight is None else weight
    if x.shape != target.shape or weight.shape != x.shape[:1]:
        raise ValueError(f"shapes do not fit: {[list(each.shape) for each in (x, target, weight)]}")
    return (weight * (precise(x) - precise(target)).square().flatten(1).mean(1)).mean()


def pseudo_huber(x: Tensor, target: Tensor, scale: float) -> Tensor:
    """E_batch sqrt(|x - target|^2 + h^2) - h, h = scale sqrt(n), for x, target [B, ...] with n
    values per sample.

    As in arXiv 2310.14189, |.|^2 is a sum and not a mean: for large differences the loss is their
    norm.
    """
    h = scale * math.sqrt(x[0].numel())
    squared = (precise(x) - precise(target)).square().flatten(1).sum(1)
    return ((squared + h**2).sqrt() - h).mean()


def critic_stats(real: HeadLogits, fake: HeadLogits) -> dict[str, Tensor]:
    """Statistics of the discriminator from its logits [B, K]: mean logits, in all and per head, and
    accuracy.

    Accuracy is the share of pairs with the higher real logit; a tie counts half. This holds for
    every loss, also for a relativistic one, whose logits have no fixed zero. The keys are those of
    the log.
    """
    real, fake = Logits.of(real), Logits.of(fake)
    real_values, fake_values = precise(real.values), precise(fake.values)
    ties = (real_values == fake_values).float().mean()
    accuracy = (real_values > fake_values).float().mean() + ties / 2
    stats = {"d/real": real_values.mean(), "d/fake": fake_values.mean(), "d/accuracy": accuracy}
    if len(real.sizes) == 1:
        return stats
    real_heads = real._replace(values=real_values).by_head()
    fake_heads = fake._replace(values=fake_values).by_head()
    for k, (of_real, of_fake) in enumerate(zip(real_heads, fake_heads, strict=True)):
        stats |= {f"d/real_head{k}": of_real.mean(), f"d/fake_head{k}": of_fake.mean()}
    return stats
