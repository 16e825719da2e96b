"""The training loop of two players: phases, accumulation, clipping, counters. All methods use it.

One iteration: draw all random numbers -> the student's sample and its features, with graph ->
discriminator phase on the detached features -> student phase on the same features -> EMA -> refresh
of the heads. A *step* is one update of the student; `max_steps`, schedules, EMA and logs count
steps. The optional head start trains the discriminator alone for some iterations before step 0.

With accumulation the student's sample is computed again in each phase and for every discriminator
update. It is the same each time, because its random numbers are drawn beforehand.

In logs `g/` is the generator, that is the student, and `d/` is the discriminator.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.core import randomness
from distill.core.ema import Ema
from distill.core.limits import after_divergence
from distill.core.randomness import Streams
from distill.core.types import Batch, Losses
from distill.training.averaging import start_averaging
from distill.training.loop_settings import LoopSettings, Optimizers

MicroBatch = tuple[Batch, Any]  # a batch, and the random numbers that its method drew for it
log = logging.getLogger("distill.training")


class TwoPlayerLoop:
    """Trains the student of a method, against its discriminator where it has one.

    Args:
        optimizers: make the optimisers.
        settings: schedule of the learning rates, numbers of updates, clipping, EMA.
        seed: of all random numbers in training.
    """

    def __init__(
        self, optimizers: Optimizers, settings: LoopSettings | None = None, *, seed: int = 0
    ) -> None:
        self.factories, self.settings, self.seed = optimizers, settings or LoopSettings(), seed
        self.iteration, self.images_seen = 0, 0
        self.skipped = 0  # student updates skipped for a gradient that is not finite
        self.updated = False  # whether the last iteration updated the student
        self.last_logged: dict[str, float] = {}  # values of the last iteration
        self.ema: Ema  # of the student
        self.current: dict[str, Tensor | float] = {}  # values of this iteration, so far
        self._bad_in_a_row = 0  # iterations with a skipped update
        self._pending: list[Batch] = []
        self._peaks: list[list[float]] = []

    @property
    def step(self) -> int:
        """Student updates so far."""
        return max(0, self.iteration - self.settings.head_start - self.skipped)

    def start_ema(self, student: nn.Module) -> None:
        """Start a new EMA from the present weights."""
        self.ema = Ema(student, decay=self.settings.ema_decay)

    def streams(self, method: Any, micro: int = 0) -> Streams:
        """Generators for this iteration's micro-batch."""
        return randomness.streams(
            seed=self.seed,
            iteration=self.iteration,
            step=self.step,
            position=self._position(method, micro),
            updates=self.settings.discriminator_updates,
            device=method.device,
        )

    def prepare_batch(self, method: Any, batch: Mapping[str, Any]) -> Batch:
        """A loader's batch with embeddings and latents; the teacher's samples use the next
        micro-batch's generator.
        """
        place = self._position(method, len(self._pending))
        key = (self.seed, self.iteration, place, randomness.TEACHER_SAMPLES)
        generator = randomness.generator(*key, device=method.device)
        return cast(Batch, method.prepare_batch(batch, generator))

    # -- an iteration ------------------------------------------------------------------------------

    def training_step(self, method: Any, batch: Mapping[str, Any]) -> None:
        """Take a batch; after `accumulate` batches, update the players."""
        self._pending.append(self.prepare_batch(method, batch))
        self.updated = False
        if len(self._pending) < self.settings.accumulate:
            return
        batches, self._pending = self._pending, []
        self.current = {}
        in_head_start = self.iteration < self.settings.head_start
        micro_batches = [
            (b, method.draw(b, self.streams(method, i))) for i, b in enumerate(batches)
        ]
        applied = self._update_players(method, micro_batches, in_head_start)
        self.updated = not in_head_start and applied[-1]
        self.iteration += 1
        self.skipped += not in_head_start and not self.updated
        self._bad_in_a_row = 0 if all(applied) else self._bad_in_a_row + 1
        self.images_seen += sum(len(b) for b in batches) * method.trainer.world_size
        self._log_iteration(method)
        if self._bad_in_a_row >= self.settings.stop_after_bad:
            self._stop_diverged(method)

    def _update_players(
        self, method: Any, micro_batches: list[MicroBatch], in_head_start: bool
    ) -> list[bool]:
        """Whether each update was applied, the student's last; in the head start it is
        not updated.
        """
        samples: list[Any] = []
        if self.settings.accumulate == 1:  # with several, memory holds one sample at a time
            with torch.set_grad_enabled(not in_head_start):
                phase = "discriminator" if in_head_start else "both"
                samples = [method.student_sample(*micro_batches[0], phase)]
        student_optimizer, *head_optimizers = self.optimizers_of(method)
        updates = range(self.settings.discriminator_updates if head_optimizers else 0)
        applied = [
            self.update_discriminator(method, micro_batches, samples, head_optimizers[0], update)
            for update in updates
        ]
        # Gradients are released at once. Until the next update they would only take memory, through
        # the peak of the activations.
        for optimizer in head_optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not in_head_start:
            updated = self.update_student(method, micro_batches, samples, student_optimizer)
            applied.append(updated)
            student_optimizer.zero_grad(set_to_none=True)
        return applied

    def update_discriminator(
        self,
        method: Any,
        micro_batches: list[MicroBatch],
        samples: list[Any],
        optimizer: Any,
        update: int,
    ) -> bool:
        self.current = {}  # of several updates the last one is logged
        method.heads.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        for batch, draws in micro_batches:
            with torch.no_grad():
                again = None if samples else method.student_sample(batch, draws, "discriminator")
            sample = samples[0] if samples else again
            losses = method.discriminator_loss(batch, draws, sample, update)
            if losses.terms and batch is micro_batches[-1][0]:
                start_averaging(method, method.heads, [drawn for _, drawn in micro_batches])
            self.backward(method, "d", losses)
        limit = self.settings.clip_discriminator
        return self.clip_and_step(method, "d", method.heads, optimizer, limit)

    def update_student(
        self, method: Any, micro_batches: list[MicroBatch], samples: list[Any], optimizer: Any
    ) -> bool:
        # skips weight gradients of the heads, which are not needed
        method.heads.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        for batch, draws in micro_batches:
            sample = samples[0] if samples else method.student_sample(batch, draws, "student")
            losses = method.student_loss(batch, draws, sample)
            if losses.terms and batch is micro_batches[-1][0]:
                start_averaging(method, method.student)
            self.backward(method, "g", losses)
        limit = self.settings.clip_student
        updated = self.clip_and_step(method, "g", method.student, optimizer, limit)
        method.heads.requires_grad_(True)
        if updated:
            self.ema.update(self.step)
            self._refresh(method)
        return updated

    def _refresh(self, method: Any) -> None:
        """Re-initialise heads where the discriminator does so, and clear their optimiser state."""
        if not method.has_discriminator:
            return
        _, head_optimizer = self.optimizers_of(method)
        generator = randomness.common(self.seed, self.iteration, method.device, "refresh")
        for parameter in method.heads.refresh(generator):
            head_optimizer.optimizer.state.pop(parameter, None)

    def backward(self, method: Any, player: str, losses: Losses) -> None:
        count = self.settings.accumulate
        for name, value in losses.metrics.items():
            self.current[name] = self.current.get(name, 0.0) + value.detach() / count
        if not losses.terms:
            return
        total = torch.stack(list(losses.terms.values())).sum() / count
        # float32 operations stay in float32 in the backward pass
        with torch.autocast(method.device.type, enabled=False):
            method.manual_backward(total)
        for name, value in losses.terms.items():
            key = f"{player}/{name}"
            self.current[key] = self.current.get(key, 0.0) + value.detach() / count

    def clip_and_step(
        self, method: Any, player: str, module: nn.Module, optimizer: Any, limit: float
    ) -> bool:
        """Average gradients over ranks, clip, step. If the gradient is not finite, no rank is
        updated.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        average_gradients = getattr(method.trainer.strategy, "average_gradients", None)
        if average_gradients:
            average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # The discriminator's warm-up counts iterations, however many updates one has.
        updates = self.iteration if player == "d" else self.step
        share = self.settings.rate(self.step, method.trainer.max_steps, updates)
        self.current[f"{player}/grad_norm"] = norm
        self.current[f"{player}/lr"] = optimizer.param_groups[0]["initial_lr"] * share
        if not math.isfinite(norm):
            terms = {k: float(v) for k, v in self.current.items() if k.startswith(f"{player}/")}
            if method.global_rank == 0:  # the same on all ranks
                what = "step %d: a gradient is not finite, the update is skipped: %s"
                log.warning(what, self.step, terms)
            return False
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        optimizer.step()
        return True

    def _stop_diverged(self, method: Any) -> None:
        count, trainer = self._bad_in_a_row, method.trainer
        players = ["student", "discriminator"] if method.has_discriminator else ["student"]
        rates = [f"optimizer.{player}.lr" for player in players]
        folder, precision = Path(trainer.default_root_dir), str(trainer.precision)
        advice = after_divergence(folder, precision, rates)
        what = f"{count} iterations in a row had a gradient that is not finite"
        raise FloatingPointError(f"{what}, up to step {self.step}; {advice}")

    # -- logging -----------------------------------------------------------------------------------

    def _log_iteration(self, method: Any) -> None:
        counts = ("step", "iteration", "images_seen", "skipped")
        self.current |= {name: getattr(self, name) for name in counts}
        self.last_logged = self._reduced_log(method)
        every = max(1, method.trainer.log_every_n_steps)
        if self.iteration % every and self.iteration != 1:  # the first row comes at once
            return
        for logger in method.loggers:
            # log_dict would repeat values that only some iterations have
            values = {k: v for k, v in self.last_logged.items() if k != "step"}
            logger.log_metrics(values, step=self.step)

    def _reduced_log(self, method: Any) -> dict[str, float]:
        """The logged values as floats, averaged over ranks, with one transfer for all."""
        kind = {"dtype": torch.float32, "device": method.device}
        values = torch.stack([torch.as_tensor(v, **kind) for v in self.current.values()])
        if method.trainer.world_size > 1:
            values = method.trainer.strategy.reduce(values, reduce_op="mean")
        return dict(zip(self.current, values.tolist(), strict=True))

    # -- optimisers --------------------------------------------------------------------------------

    def optimizers(self, method: Any) -> list[torch.optim.Optimizer]:
        """The student's optimiser, and that of the heads where there are any."""
        made = [self.factories.student(method.student.parameters())]
        if method.has_discriminator:
            made.append(self.factories.discriminator(method.heads.parameters()))
        for optimizer in made:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
        return made

    def on_train_start(self, method: Any) -> None:
        """Restore the configured peak learning rates, which a loaded checkpoint replaces."""
        for optimizer, peaks in zip(self.optimizers_of(method), self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["initial_lr"] = peak

    def optimizers_of(self, method: Any) -> list[Any]:
        """Lightning's optimisers, the student's first; only that one advances `global_step`.

        Lightning counts every optimiser's step (Lightning-AI/pytorch-lightning#17958). Its loop
        re-assigns these two hooks each batch, so they are replaced each time. Delete this when the
        issue is closed.
        """
        found, profiler = method.optimizers(), method.trainer.profiler
        wrapped: list[Any] = found if method.has_discriminator else [found]
        for head_optimizer in wrapped[1:]:
            head_optimizer._on_before_step = lambda: profiler.start("optimizer_step")
            head_optimizer._on_after_step = lambda: profiler.stop("optimizer_step")
        return wrapped

    def _position(self, method: Any, micro: int) -> int:
        """Position of a micro-batch among those of all ranks, in the order of the data."""
        world = method.trainer.world_size if method._trainer else 1
        return micro * world + cast(int, method.global_rank)

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        counts = ("iteration", "images_seen", "skipped")
        return {**{name: getattr(self, name) for name in counts}, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.images_seen = state["iteration"], state["images_seen"]
        self.skipped = state["skipped"]
        self.ema.load_state_dict(state["ema"])
