"""`Distillation`: the LightningModule that every method extends, and the interface of a method's
objectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from distill.core.ema import Ema
from distill.core.limits import NO_SAMPLES, check_score_teacher, check_space
from distill.core.process import column, level_like
from distill.core.randomness import Streams
from distill.core.types import (
    EMBEDDED,
    Batch,
    Cond,
    Losses,
    Players,
    TeacherSampler,
    mask_is_ones,
)
from distill.storage.checkpoint_files import check_fits

MASK_IS_ONES = "mask_is_ones"  # key of a batch on its way to a device
Phase = Literal["discriminator", "student", "both"]
"""Which player's loss will read the sample; `student_sample` may skip what only the other needs."""


class Loop(Protocol):
    """What trains the players of a method, as `training.loop.TwoPlayerLoop` does."""

    @property
    def ema(self) -> Ema:
        """The average of the student."""

    @property
    def step(self) -> int:
        """Student updates so far."""

    def start_ema(self, student: Any) -> None:
        """Start a new EMA from the present weights."""

    def settle(self) -> None:
        """Read what is still on its way from the device."""

    def optimizers(self, method: Any) -> list[torch.optim.Optimizer]:
        """The student's optimiser, then those of its opponents, in their order."""

    def on_train_start(self, method: Any) -> None:
        """Called once, after a checkpoint was loaded."""

    def training_step(self, method: Any, batch: Mapping[str, Any]) -> None:
        """Take a batch of the loader. Update the players when an update is due."""

    def state_dict(self) -> dict[str, Any]:
        """Counters and EMA."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Distillation(L.LightningModule, ABC):
    """Abstract base of the methods: a teacher teaches a student, most often against a
    discriminator. A subclass without `draw`, `student_sample` or `student_loss` cannot be built.

    `draw`, `student_sample` and the two losses need no Trainer. A batch and `randomness.streams()`
    are enough.

    Args:
        players: teacher, student and discriminator.
        real: generates the real samples by the teacher, from captions alone; None: the data hold
            them.
        loop: trains the players; None where nothing is trained.
    """

    takes_score_teacher = False  # whether a teacher of another family can score its samples
    second_order = False  # whether a loss differentiates the heads twice: FSDP2 cannot shard those
    same_heads = False  # whether heads of a pool run at the same levels t on every rank
    many_steps = False  # whether its student samples in many guided steps, as its teacher does
    takes_generator = False  # whether it can train a GAN's generator, which knows pure noise alone
    of_pairs = False  # whether its data are pairs of a winner and a loser

    def __init__(
        self, players: Players, *, real: TeacherSampler | None = None, loop: Loop | None = None
    ):
        super().__init__()
        if players.score_teacher is not None:
            check_score_teacher(type(self).__name__, self.takes_score_teacher)
        network = players.features
        given = "nothing" if network is None else getattr(network, "space", None)
        check_space(getattr(self, "space", None), given)
        self.automatic_optimization = False
        self.strict_loading = False  # frozen networks are not in checkpoints
        self.has_discriminator = players.heads is not None
        # Both a Denoiser (or Heads) and an nn.Module: Python has no type for an intersection.
        self.student: Any = players.student
        self.fake_score: Any = None  # a trained Denoiser of the student's samples, in DMD2
        self.heads: Any = players.heads if players.heads is not None else nn.Identity()
        self._frozen_parts: tuple[Any, ...] = ()
        self.teacher: Any
        self.feature_network: Any  # maps a picture or a latent to the features that heads read
        self.condition: Any
        self.score_teacher: Any = None  # of another family, for ADD's distillation term
        if players.score_teacher is not None:
            self.register_frozen(score_teacher=players.score_teacher)
        self.register_frozen(
            teacher=players.teacher,
            feature_network=players.features,
            condition=players.condition,
        )
        self.teacher_samples: Any = real
        self._sampled_shapes: dict[Any, tuple[int, ...]] = {  # by the sizes of its pictures
            tuple(size): self.teacher.shape_of(list(size), "method.real.buckets")
            for size in getattr(real, "buckets", None) or ()
        }
        self.loop = loop
        self.sharded = False
        if loop is not None:
            loop.start_ema(self.student)

    def register_frozen(self, **frozen: Any) -> None:
        """Set frozen parts as attributes. Lightning does not register, save, broadcast or train
        them.
        """
        for name, part in frozen.items():
            object.__setattr__(self, name, part)
        self._frozen_parts = (*self._frozen_parts, *frozen.values())

    @property
    def opponents(self) -> dict[str, Any]:
        """The networks that learn in the discriminator phase, by the letter of their logged values:
        the heads, d, and the fake score, f.
        """
        found = {"d": self.heads} if self.has_discriminator else {}
        return found if self.fake_score is None else {**found, "f": self.fake_score}

    # -- what a method defines ---------------------------------------------------------------------

    @abstractmethod
    def draw(self, batch: Batch, streams: Streams) -> Any:
        """Everything decided before this iteration's forward passes on this batch: random numbers,
        the heads and weights of the iteration. A frozen record, which the three functions below
        read.
        """

    @abstractmethod
    def student_sample(self, batch: Batch, draws: Any, phase: Phase = "both") -> Any:
        """The student's sample on this batch with its graph, and what both losses read: a frozen
        record.
        """

    def discriminator_loss(self, batch: Batch, draws: Any, sample: Any, update: int = 0) -> Losses:
        """Loss terms of the discriminator in its `update`-th update of the iteration.

        No gradient may reach the student. Without terms the discriminator is not trained in this
        iteration.
        """
        return Losses({})

    @abstractmethod
    def student_loss(self, batch: Batch, draws: Any, sample: Any) -> Losses:
        """Loss terms of the student; the gradient flows through the frozen networks."""

    # -- what methods use --------------------------------------------------------------------------

    def critic_features(
        self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[list[Tensor], Cond]:
        """Feature maps of x0 [B, C, H, W] renoised to t [B], and the conditioning of the heads.

        `generator` draws the feature network's patches and augmentations.
        """
        x_t = self.teacher.process.diffuse(x0, noise, t)
        return self.feature_network(x_t, t, batch.cond, generator), batch.cond

    @torch.no_grad()
    def earlier_steps(
        self, x_T: Tensor, levels: Sequence[float], noises: Sequence[Tensor], cond: Cond
    ) -> Tensor:
        """x_t at the last of `levels`, after the student's own sampling steps at the others, with
        fresh noise between them.

        x_T [B, C, H, W] is the noise at the first level, `noises` are those between the levels.
        """
        x_t = x_T
        for (now, later), noise in zip(pairwise(levels), noises, strict=True):
            x0 = self.student.x0(x_t, level_like(x_t, now), cond)
            x_t = self.student.process.diffuse(x0, noise, level_like(x0, later))
        return x_t

    def student_input(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t; at t = 1 pure noise, where some schedules would keep a little of the data."""
        x_t = self.student.process.diffuse(x0, noise, t)
        return torch.where(column(t == 1, x_t), noise, x_t)

    @staticmethod
    def noise_of(batch: Batch, key: str) -> Tensor:
        """The noise that the teacher's samples began as; ValueError, naming what needs it, if the
        data do not tell.
        """
        if batch.noise is None:
            what = "needs the noise of each sample: data.seeded=true, or make it 0"
            raise ValueError(f"{key} {what}")
        return batch.noise

    def on_before_batch_transfer(
        self, batch: Mapping[str, Any], dataloader_idx: int
    ) -> Mapping[str, Any]:
        """Note what Python must know of the batch, while it is still on the host."""
        return {**batch, MASK_IS_ONES: mask_is_ones(batch)}

    @torch.no_grad()
    def prepare_batch(
        self,
        batch: Mapping[str, Any],
        generator: torch.Generator,
        common: torch.Generator | None = None,
    ) -> Batch:
        """A batch of the loader, made ready for the losses: captions embedded, pictures encoded.

        With `real` the teacher generates x0, even where the data hold samples; `common`, the same
        on every rank, draws its size.
        """
        noise, pixels = batch.get("noise"), None
        cached: dict[str, Any] = {name: batch[name].float() for name in EMBEDDED if name in batch}
        captions = tuple(batch["caption"])
        embed = self.teacher.embed
        if cached:
            cached |= {"null": embed([""]).null, "all_ones": batch.get(MASK_IS_ONES, False)}
        cond = Cond(**cached) if cached else embed(batch["caption"])
        if (image := self.teacher.image_of(batch)) is not None:
            cond = replace(cond, image=image)
        if self.teacher_samples is not None:
            shape = (len(cond), *self._sampled_shape(common))
            noise = torch.randn(shape, generator=generator, device=self.device)
            x0 = self.teacher_samples(self.teacher, noise, cond, generator)
        elif "x0" in batch:
            x0 = batch["x0"]
        elif "pixels" in batch:
            pixels = batch["pixels"]
            x0 = self.teacher.encode(pixels)
        else:
            raise ValueError(NO_SAMPLES)
        return Batch(x0=x0, captions=captions, cond=cond, noise=noise, pixels=pixels)

    def _sampled_shape(self, common: torch.Generator | None) -> tuple[int, ...]:
        """(C, H, W) of the samples that the teacher generates for the next batch."""
        if not self._sampled_shapes or common is None:
            return tuple(self.teacher.latent_shape)
        return self._sampled_shapes[self.teacher_samples.size(common)]

    # -- Lightning's hooks: the loop trains --------------------------------------------------------

    @property
    def _training_loop(self) -> Loop:
        """Raises ValueError for a method that was built without a loop."""
        if self.loop is None:
            raise ValueError(f"{type(self).__name__} has no loop to train it; give it loop=")
        return self.loop

    @property
    def step(self) -> int:
        """Student updates so far."""
        return self.loop.step if self.loop else 0

    @property
    def ema(self) -> Ema:
        """The EMA of the student."""
        return self._training_loop.ema

    def setup(self, stage: str) -> None:
        for network in self._frozen_networks("hold_quantized"):
            network.hold_quantized(self.device)
        if self.trainer.precision == "bf16-mixed":
            sharded = hasattr(self.trainer.strategy, "shard")  # such a teacher is read again
            for network in self._frozen_networks("hold_half"):
                for_good = sharded and network is self.teacher
                network.hold_half(for_good=for_good, device=self.device)
        for part in self._frozen_parts:
            if isinstance(part, nn.Module):
                part.to(self.device)

    def teardown(self, stage: str) -> None:
        """Give frozen networks the weights back that they had."""
        for network in self._frozen_networks("hold_whole"):
            network.hold_whole()

    def configure_callbacks(self) -> list[L.Callback]:
        return [_RestoreOnException()]

    def _frozen_networks(self, able: str) -> list[Any]:
        """The frozen modules with a function of this name, each once."""
        parts = [part for part in self._frozen_parts if isinstance(part, nn.Module)]
        modules = {id(m): m for part in parts for m in part.modules() if hasattr(m, able)}
        return list(modules.values())

    def configure_model(self) -> None:
        """Shard the networks where the strategy does so; the EMA is then of the shards."""
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is None or self.sharded:
            return
        self.sharded = True
        teacher = self.teacher.network.model  # only pipelines are sharded
        is_lora = self.student.model is teacher  # its adapters are small and stay unsharded
        unsharded_heads = self.second_order or getattr(self.heads, "unsharded", False)
        for network in [teacher] if is_lora else [teacher, self.student.model]:
            shard(network, unsharded=self.student.parameters() if is_lora else ())
        if self.fake_score is not None:
            shard(self.fake_score.network.model)
        if self.has_discriminator and not unsharded_heads:
            # Heads turn autocast off for what bfloat16 is too coarse for.
            shard(self.heads, gather_in_float32=True)
        self._training_loop.start_ema(self.student)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self._training_loop.optimizers(self)

    def on_train_start(self) -> None:
        self._training_loop.on_train_start(self)

    def on_train_end(self) -> None:
        self._training_loop.settle()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._training_loop.training_step(self, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distill"] = self._training_loop.state_dict()
        # Lightning counted before this hook. If the loop has only now learned that an update was
        # skipped, that count is one too high.
        checkpoint["global_step"] = self.trainer.global_step
        if "loops" in checkpoint:  # of a checkpoint that can be resumed
            connector = self.trainer._checkpoint_connector
            checkpoint["loops"] = connector._get_loops_state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint["state_dict"], self, "the checkpoint")
        expected = 1 + len(self.opponents)
        found = len(checkpoint["optimizer_states"])
        if found != expected:
            what = f"has {found} optimizers and this method {expected}"
            raise ValueError(f"the checkpoint {what}: it is of another one")
        self._training_loop.load_state_dict(checkpoint["distill"])


class _RestoreOnException(L.Callback):
    """Tears a method down when its training fails: Lightning does so only for callbacks."""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        with suppress(RuntimeError):  # of a broken device; the first exception is the one to report
            pl_module.teardown("fit")
