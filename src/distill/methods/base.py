"""`Distillation`: what every method is to Lightning, and the words in which methods say their
objectives.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from distill.core.ema import Ema
from distill.core.limits import check_space
from distill.core.randomness import Streams
from distill.core.types import EMBEDDED, Batch, Cond, Losses, Maker, Players
from distill.storage.checkpoint_files import check_fits

Phase = Literal["discriminator", "student", "both"]
"""Whose losses a sample is made for: what only the other player asks of it may be left out."""


class Distillation(L.LightningModule):
    """Abstract: a teacher teaches a student, most often against a discriminator. Methods give the
    objectives.

    `draw`, `student_sample` and the two losses need no Trainer: a batch and `randomness.streams()`
    are enough.

    Args:
        players: teacher, student and discriminator.
        real: has the teacher make the real samples, from captions alone.
        loop: `loop.TwoPlayerLoop`, which trains the players; None where nothing is to be trained.
    """

    second_order = False  # whether a loss holds a gradient of the heads: then they cannot be cut up

    def __init__(self, players: Players, *, real: Maker | None = None, loop: Any = None):
        super().__init__()
        features = players.features
        given = "nothing" if features is None else getattr(features, "space", None)
        check_space(getattr(self, "space", None), given)
        self.automatic_optimization = False
        self.strict_loading = False  # frozen networks are not in checkpoints
        self.has_discriminator = players.heads is not None
        # Denoiser, respectively Heads, and nn.Module at once: Python has no type for both
        self.student: Any = players.student
        self.heads: Any = players.heads if players.heads is not None else nn.Identity()
        self._held: tuple[Any, ...] = ()
        self.teacher: Any
        self.features: Any
        self.condition: Any
        self.hold(teacher=players.teacher, features=players.features, condition=players.condition)
        self.real, self.loop = real, loop
        self.sharded = False
        if loop is not None:
            loop.average(self.student)

    def hold(self, **frozen: Any) -> None:
        """Keep frozen parts as attributes that Lightning does not register, save, broadcast or
        train.
        """
        for name, part in frozen.items():
            object.__setattr__(self, name, part)
        self._held = (*self._held, *frozen.values())

    # -- what a method says ------------------------------------------------------------------------

    @abstractmethod
    def draw(self, batch: Batch, streams: Streams) -> Any:
        """All that is random for this batch in this iteration: a frozen record, which the three
        below read.
        """

    @abstractmethod
    def student_sample(self, batch: Batch, draws: Any, phase: Phase = "both") -> Any:
        """The student's sample on this batch, and what the losses need of it, with graph: a frozen
        record.
        """

    def discriminator_loss(self, batch: Batch, draws: Any, sample: Any, turn: int = 0) -> Losses:
        """Terms of the discriminator in its `turn`-th update of the iteration; must not reach the
        student.

        None of them: it does not learn now.
        """
        return Losses({})

    @abstractmethod
    def student_loss(self, batch: Batch, draws: Any, sample: Any) -> Losses:
        """Terms of the student, through the frozen networks."""

    # -- what methods use --------------------------------------------------------------------------

    def critic_features(
        self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[list[Tensor], Cond]:
        """Maps of samples x0 [B, C, H, W] renoised to t [B], and what the heads are conditioned on.

        `generator` is for patches and augmentations, if any.
        """
        x_t = self.teacher.process.diffuse(x0, noise, t)
        return self.features(x_t, t, batch.cond, generator), batch.cond

    def student_input(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, and noise alone at t = 1, where some schedules keep a little of the data."""
        x_t = self.student.process.diffuse(x0, noise, t)
        return torch.where((t == 1).view(-1, 1, 1, 1), noise, x_t)

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Any], generator: torch.Generator) -> Batch:
        """A loader's batch as the methods see it; with `real` the teacher makes the samples,
        whatever the data hold.
        """
        noise, pixels = batch.get("noise"), None
        cached = {name: batch[name].float() for name in EMBEDDED if name in batch}
        captions = tuple(batch["caption"])
        embed = self.teacher.embed
        cond = Cond(**cached, null=embed([""]).null) if cached else embed(batch["caption"])
        if self.real is not None:
            shape = (len(cond), *self.teacher.latent_shape)
            noise = torch.randn(shape, generator=generator, device=self.device)
            x0 = self.real(self.teacher, noise, cond, generator)
        elif "x0" in batch:
            x0 = batch["x0"]
        elif "pixels" in batch:
            pixels = batch["pixels"]
            x0 = self.teacher.encode(pixels)
        else:
            what = "set method.real, which has the teacher make the samples"
            raise ValueError(f"these data are captions alone: {what}")
        return Batch(x0=x0, captions=captions, cond=cond, noise=noise, pixels=pixels)

    # -- Lightning's hooks: the loop trains --------------------------------------------------------

    @property
    def step(self) -> int:
        """Student updates so far."""
        return int(self.loop.step) if self.loop else 0

    @property
    def ema(self) -> Ema:
        """The average of the student."""
        return self.loop.ema  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        for part in self._held:
            if isinstance(part, nn.Module):
                part.to(self.device)

    def configure_model(self) -> None:
        """Where the strategy cuts networks up, have it do so; the average is then of the parts."""
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is None or self.sharded:
            return
        self.sharded = True
        teacher = self.teacher.network.model  # only pipelines are cut up
        shared = self.student.model is teacher  # a LoRA, whose adapters are small and stay whole
        whole_heads = self.second_order or getattr(self.heads, "whole", False)
        cut = [teacher]
        cut += [] if shared else [self.student.model]
        cut += [self.heads] if self.has_discriminator and not whole_heads else []
        for network in cut:
            shard(network, whole=self.student.parameters() if shared else ())
        self.loop.average(self.student)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.loop.optimizers(self)  # type: ignore[no-any-return]

    def on_train_start(self) -> None:
        self.loop.on_train_start(self)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.loop.training_step(self, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distill"] = self.loop.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint["state_dict"], self, "the checkpoint")
        players = 1 + self.has_discriminator
        if len(checkpoint["optimizer_states"]) != players:
            what = f"has {len(checkpoint['optimizer_states'])} optimizers and this method {players}"
            raise ValueError(f"the checkpoint {what}: it is of another one")
        self.loop.load_state_dict(checkpoint["distill"])
