"""`Distillation`: everything about a training step that is not the method.

One iteration: all that is random is drawn -> student's sample and its features (with graph) -> discriminator phase on
the detached features -> student phase on the same ones -> average -> refresh of the heads. A *step* is one student
update; `max_steps`, schedules, averages and logs count steps. The optional head start trains the discriminator alone
for some iterations before step 0.

Every random number comes from a generator seeded by (seed, iteration, rank, micro-batch), so a resumed run draws what
the uninterrupted one would have drawn. They are drawn first, into a frozen record of the method: with accumulation the
student's sample is made again in either phase and for every update of the discriminator, and is the same each time.
"""

import logging
import math
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from distill.ema import Ema
from distill.engine import Parts
from distill.files import check_fits
from distill.limits import after_divergence
from distill.types import (
    EMBEDDED,
    Batch,
    Cond,
    Critic,
    Features,
    Maker,
    Streams,
    Teacher,
    Terms,
)

Players = Literal["discriminator", "student", "both"]
Micro = tuple[Batch, Any]  # a micro-batch, and what its method has drawn for it
log = logging.getLogger("distill.training")


class Distillation(L.LightningModule):
    """Abstract: a teacher teaches a student, most often against a discriminator. Methods give the objectives."""

    second_order = False  # whether a loss holds a gradient of the heads: then they cannot be cut up

    def __init__(self, parts: Parts, real: Maker | None = None):
        """`real` has the teacher make the samples, whatever the data hold."""
        super().__init__()
        self.student: (
            Any  # Denoiser, respectively Heads, and nn.Module at once: Python has no type for both
        )
        self.heads: Any
        self.automatic_optimization = False
        self.strict_loading = False  # frozen networks are not in checkpoints
        heads, engine = parts.heads, parts.engine
        self.alone = heads is None  # nobody judges: the discriminator's phase is left out
        self.student, self.heads = parts.student, nn.Identity() if heads is None else heads
        # In a tuple: never registered, saved, broadcast or trained.
        self._frozen: tuple[Any, ...] = (parts.teacher, parts.features, parts.condition)
        self.engine, self.real, self.seed = engine, real, parts.seed
        self.ema = Ema(self.student, decay=engine.ema_decay)
        self.iteration, self.images_seen = 0, 0
        self.skipped, self._bad_in_a_row = (
            0,
            0,
        )  # student updates left out; iterations with any left out
        self.updated = False  # whether the last iteration moved the student
        self.numbers: dict[str, float] = {}  # what the last iteration recorded
        self._pending: list[Batch] = []
        self.sharded = False

    # -- what a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def draw(self, batch: Batch, streams: Streams) -> Any:
        """All that is random for this batch in this iteration: a frozen record, which the three below read."""

    @abstractmethod
    def fake(self, batch: Batch, draws: Any, players: Players = "both") -> Any:
        """The student's sample on this batch, and what these players need of it, with graph: a frozen record."""

    def discriminator_loss(self, batch: Batch, draws: Any, fake: Any, turn: int = 0) -> Terms:
        """Weighted terms of the discriminator in its `turn`-th update of the iteration; must not reach the student.

        None of them: it does not learn now.
        """
        return {}

    @abstractmethod
    def student_loss(self, batch: Batch, draws: Any, fake: Any) -> Terms:
        """Weighted terms of the student, through the frozen networks."""

    # -- what methods use --------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> Teacher:
        return cast(Teacher, self._frozen[0])

    @property
    def features(self) -> Features:
        return cast(Features, self._frozen[1])

    @property
    def condition(self) -> Any:
        """What tells the heads of a sample, where that is not the teacher's own embedding."""
        return self._frozen[2]

    def critic(self) -> Critic:
        """The heads of this iteration: the same ones on every rank and for both players."""
        return cast(Critic, self.heads.draw(self.common("heads")))

    def streams(self, micro: int = 0) -> Streams:
        """What this iteration's random numbers of a micro-batch are drawn from."""
        updates = range(self.engine.discriminator_updates)
        return Streams(
            sample=self._generator(micro),
            discriminator=tuple(self._generator(micro, stream=1 + turn) for turn in updates),
            student=self._generator(micro, stream=0),
        )

    def common(self, purpose: str) -> torch.Generator:
        """Randomness of this iteration, the same on every rank and whenever it is asked for by this name."""
        return self._generator(0, stream=-3 - zlib.crc32(purpose.encode()))

    def see(self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch) -> tuple[list[Tensor], Cond]:
        """Maps of samples x0 [B, C, H, W], re-noised to t [B], and what the heads are told of them."""
        x_t = self.teacher.process.diffuse(x0, noise, t)
        return self.features(x_t, t, batch.cond, self.common("features")), batch.cond

    def begin(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the student is shown: x_t, and noise alone at t = 1, where some schedules keep a little of the data."""
        return torch.where(
            (t == 1).view(-1, 1, 1, 1), noise, self.student.process.diffuse(x0, noise, t)
        )

    @property
    def step(self) -> int:
        """Student updates so far."""
        return max(0, self.iteration - self.engine.head_start - self.skipped)

    def record(self, **values: Tensor | float) -> None:
        """Log values of a micro-batch beside the losses: their means over those of an update."""
        for name, value in values.items():
            part = value.detach() if isinstance(value, Tensor) else value
            self._log[name] = self._log.get(name, 0.0) + part / self.engine.accumulate

    # -- the loop ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        for part in self._frozen:
            if isinstance(part, nn.Module):
                part.to(self.device)

    def configure_model(self) -> None:
        """Where the strategy cuts networks up, have it do so; the average is then of the parts."""
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is None or self.sharded:
            return
        self.sharded = True
        teacher: Any = self.teacher  # only pipelines are cut up
        whole = self.alone or self.second_order or getattr(self.heads, "whole", False)
        shared = (
            self.student.model is teacher.network.model
        )  # a LoRA, whose adapters are small and stay whole
        others = [*([] if shared else [self.student.model]), *([] if whole else [self.heads])]
        for network in (teacher.network.model, *others):
            shard(network, whole=self.student.parameters() if shared else ())
        self.ema = Ema(self.student, decay=self.engine.ema_decay)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = [self.engine.student(self.student.parameters())]
        players += [] if self.alone else [self.engine.discriminator(self.heads.parameters())]
        for optimizer in players:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in players]
        return players

    def on_train_start(self) -> None:
        for optimizer, peaks in zip(self._players(), self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["initial_lr"] = (
                    peak  # a checkpoint brings its own, but the configuration has the last word
                )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._pending.append(self._embedded(batch))
        self.updated = False
        if len(self._pending) < self.engine.accumulate:
            return
        batches, self._pending = self._pending, []
        self._log: dict[str, Tensor | float] = {}
        student, *critics = self._players()
        leading = self.iteration < self.engine.head_start
        micros = [(batch, self.draw(batch, self.streams(i))) for i, batch in enumerate(batches)]
        fakes = []  # of several batches they are made again, alike, in either phase: one at a time is what fits
        if self.engine.accumulate == 1:
            with torch.set_grad_enabled(not leading):
                fakes = [self.fake(*micros[0], "discriminator" if leading else "both")]
        turns = range(self.engine.discriminator_updates if critics else 0)
        moved = [self._update_discriminator(micros, fakes, critics[0], turn) for turn in turns]
        self.updated = not leading and self._update_student(micros, fakes, student)
        self.iteration += 1
        self.skipped += not leading and not self.updated
        self._bad_in_a_row = (
            0 if all(moved) and (self.updated or leading) else self._bad_in_a_row + 1
        )
        self.images_seen += sum(len(b) for b in batches) * self.trainer.world_size
        self._log |= {
            "step": self.step,
            "iteration": self.iteration,
            "images_seen": self.images_seen,
            "skipped": self.skipped,
        }
        self.numbers = self._numbers()
        every = max(1, cast(Any, self.trainer).log_every_n_steps)
        if (
            self.iteration % every == 0 or self.iteration == 1
        ):  # at once something, if steps are slow
            for (
                logger
            ) in self.loggers:  # log_dict would say again and again what only some iterations have
                logger.log_metrics(
                    {k: v for k, v in self.numbers.items() if k != "step"}, step=self.step
                )
        if self._bad_in_a_row >= self.engine.stop_after_bad:
            what = f"{self._bad_in_a_row} iterations in a row had a gradient that is not finite, up to step {self.step}"
            trainer, players = (
                cast(Any, self.trainer),
                ["student", "discriminator"][: 2 - self.alone],
            )
            rates = [f"optimizer.{player}.lr" for player in players]
            folder, precision = Path(trainer.default_root_dir), str(trainer.precision)
            raise FloatingPointError(f"{what}; {after_divergence(folder, precision, rates)}")

    def _update_discriminator(
        self, micros: list[Micro], fakes: list[Any], optimizer: Any, turn: int
    ) -> bool:
        self._log = {}  # of several updates, the last one's numbers
        self.heads.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        for batch, draws in micros:
            with torch.no_grad():
                fake = fakes[0] if fakes else self.fake(batch, draws, "discriminator")
            self._backward("d", self.discriminator_loss(batch, draws, fake, turn))
        return self._clip_and_step("d", self.heads, optimizer, self.engine.clip_discriminator)

    def _update_student(self, micros: list[Micro], fakes: list[Any], optimizer: Any) -> bool:
        self.heads.requires_grad_(False)  # their weight gradients would be computed and thrown away
        optimizer.zero_grad(set_to_none=True)
        for batch, draws in micros:
            fake = fakes[0] if fakes else self.fake(batch, draws, "student")
            self._backward("g", self.student_loss(batch, draws, fake))
        updated = self._clip_and_step("g", self.student, optimizer, self.engine.clip_student)
        self.heads.requires_grad_(True)
        if updated:
            self.ema.update(self.step)
            for parameter in () if self.alone else self.heads.refresh(self.common("refresh")):
                self._players()[1].optimizer.state.pop(parameter, None)
        return updated

    def _backward(self, player: str, terms: Terms) -> None:
        if not terms:
            return
        total = torch.stack(list(terms.values())).sum() / self.engine.accumulate
        with torch.autocast(self.device.type, enabled=False):  # what ran in float32 goes back in it
            self.manual_backward(total)
        for name, value in terms.items():
            key = f"{player}/{name}"
            self._log[key] = self._log.get(key, 0.0) + value.detach() / self.engine.accumulate

    def _clip_and_step(self, player: str, module: nn.Module, optimizer: Any, limit: float) -> bool:
        """Average over processes, clip, step; nothing happens, in any process, if the gradient is not finite."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if average := getattr(self.trainer.strategy, "average_gradients", None):
            average(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        rate = self.engine.rate(
            self.step, self.trainer.max_steps, self.iteration if player == "d" else self.step
        )
        self._log[f"{player}/grad_norm"] = norm
        self._log[f"{player}/lr"] = optimizer.param_groups[0]["initial_lr"] * rate
        if not math.isfinite(norm):
            terms = {k: float(v) for k, v in self._log.items() if k.startswith(f"{player}/")}
            if self.global_rank == 0:  # alike in all processes
                what = "step %d: a gradient is not finite and its update is left out: %s"
                log.warning(what, self.step, terms)
            return False
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        optimizer.step()
        return True

    def _numbers(self) -> dict[str, float]:
        """What was recorded, as floats, averaged over processes; one transfer for all of it."""
        values = torch.stack(
            [
                torch.as_tensor(v, dtype=torch.float32, device=self.device)
                for v in self._log.values()
            ]
        )
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        return dict(zip(self._log, values.tolist(), strict=True))

    def _players(self) -> list[Any]:
        """The optimisers, the student's first; only that one advances `global_step`.

        Lightning counts every optimiser's step (Lightning-AI/pytorch-lightning#17958); its loop re-assigns these two
        hooks each batch, so they are replaced each time. Delete this when the issue is closed.
        """
        found, profiler = cast(Any, self.optimizers()), cast(Any, self.trainer).profiler
        players: list[Any] = [found] if self.alone else found
        for discriminator in players[1:]:
            discriminator._on_before_step = lambda: profiler.start("optimizer_step")
            discriminator._on_after_step = lambda: profiler.stop("optimizer_step")
        return players

    def _generator(self, micro: int, stream: int = -2) -> torch.Generator:
        """Randomness of (seed, iteration, micro-batch, stream); streams below -2 are the same on every rank."""
        world = self.trainer.world_size if self._trainer else 1
        place = 0 if stream < -2 else micro * world + self.global_rank  # as the data are dealt out
        key = (self.seed, self.iteration, place, stream + 2)
        mixed = 0
        for part in key:  # a counter-based stream: splitmix-style mixing of the key into 63 bits
            mixed = (
                mixed * 0x9E3779B97F4A7C15 + part * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB
            ) % 2**63
            mixed ^= mixed >> 29
        return torch.Generator(self.device).manual_seed(mixed)

    @torch.no_grad()
    def _embedded(self, batch: Mapping[str, Any]) -> Batch:
        """A loader's batch as the methods see it; with `real` the teacher makes the samples, whatever the data hold."""
        noise, pixels = batch.get("noise"), None
        cached = {name: batch[name].float() for name in EMBEDDED if name in batch}
        embed = self.teacher.embed
        cond = Cond(**cached, null=embed([""]).null) if cached else embed(batch["caption"])
        if self.real is not None:
            generator = self._generator(len(self._pending), stream=-1)
            shape = (len(cond), *self.teacher.latent_shape)
            noise = torch.randn(shape, generator=generator, device=self.device)
            x0 = self.real(self.teacher, noise, cond, generator)
        elif "x0" in batch:
            x0 = batch["x0"]
        elif "pixels" in batch:
            pixels = batch["pixels"]
            x0 = self.teacher.encode(pixels)
        else:
            raise ValueError(
                "these data are captions alone: set method.real, which has the teacher make the samples"
            )
        captions = tuple(batch["caption"])
        return Batch(x0=x0, captions=captions, cond=cond, noise=noise, pixels=pixels)

    # -- what is kept ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        counts = {
            "iteration": self.iteration,
            "images_seen": self.images_seen,
            "skipped": self.skipped,
        }
        checkpoint["distill"] = {**counts, "ema": self.ema.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint["state_dict"], self, "the checkpoint")
        players = 1 if self.alone else 2
        if len(checkpoint["optimizer_states"]) != players:
            what = f"has {len(checkpoint['optimizer_states'])} optimizers and this method {players}"
            raise ValueError(f"the checkpoint {what}: it is of another one")
        kept = checkpoint["distill"]
        self.iteration, self.images_seen, self.skipped = (
            kept["iteration"],
            kept["images_seen"],
            kept["skipped"],
        )
        self.ema.load_state_dict(kept["ema"])
