"""The training loop of two players: phases, accumulation, clipping, counters. All methods use it.

The student's opponents learn in the discriminator phase, by one backward pass: the heads, and in
DMD2 a fake score with an optimiser of its own.

One iteration: draw all random numbers -> the student's sample and its features, with graph ->
discriminator phase on the detached features -> student phase on the same features -> EMA -> refresh
of the heads. A *step* is one update of the student; `max_steps`, schedules, EMA and logs count
steps. The optional head start trains the discriminator alone for some iterations before step 0.

With accumulation the student's sample is computed again in each phase and for every discriminator
update. It is the same each time, because its random numbers are drawn beforehand.

Nothing here waits for a device. The values of an iteration, and whether its updates were skipped,
are read in the next one, before its own updates (`settle`). Until then the update counts as
applied: what is drawn in the next iteration takes it so. On a CPU they are read at once.

In logs `g/` is the generator, that is the student, `d/` is the discriminator, and `f/` is the
fake score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.core import randomness
from distill.core.ema import Ema
from distill.core.limits import after_divergence
from distill.core.randomness import Streams
from distill.core.types import Batch, Losses
from distill.training import optimizers as kinds
from distill.training.averaging import mean_over_ranks, start_averaging
from distill.training.loop_settings import LoopSettings, Optimizers
from distill.training.optimizers.on_host import OnHost
from distill.training.updates import Applied, Row, refresh_heads, step_if_finite

MicroBatch = tuple[Batch, Any]  # a batch, and the random numbers that its method drew for it
Listener = Callable[[dict[str, float], int, bool], None]  # values, step, whether it was an update
OPTIMIZER_OF = {"g": "student", "d": "discriminator", "f": "fake_score"}  # of each player
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
        self.updated = False  # whether the last iteration updated the student, as far as known
        self.last_logged: dict[str, float] = {}  # values of the last iteration that was read
        self.listeners: list[Listener] = []  # called with every row that is read
        self.current: dict[str, Tensor | float] = {}  # values of this iteration, so far
        self.own_signal = 0  # number of the signal that this process has received
        # Whether a process has, by the last row that all have read for certain: one rank alone may
        # have read a newer one, and all must act on the news in the same iteration.
        self.signalled = False
        self._news = False  # by the last row that this rank has read
        self._ema: Ema  # of the student
        self._waiting: tuple[Any, Row] | None = None  # the method and what is still to be read
        self._ahead = 0  # skipped updates that the draws of the next iteration still count
        self._bad_in_a_row = 0  # iterations with a skipped update
        self._pending: list[Batch] = []
        self._peaks: list[list[float]] = []

    @property
    def step(self) -> int:
        """Student updates so far."""
        return max(0, self.iteration - self.settings.head_start - self.skipped)

    @property
    def ema(self) -> Ema:
        """The average of the student, up to its last update."""
        self.settle()
        return self._ema

    def start_ema(self, student: nn.Module) -> None:
        """Start a new EMA from the present weights."""
        self._ema = Ema(student, self.settings.ema_decay, device=self.settings.ema_device)

    def due(self, every: int, last: int | None = None) -> bool:
        """Whether the last iteration made an update whose number is `last` or divisible by `every`.

        Where it seems so, the iteration is settled first, so `step` is then certain.
        """
        if self.updated and (self.step % every == 0 or self.step == last):
            self.settle()
            return self.updated
        return False

    def streams(self, method: Any, micro: int = 0) -> Streams:
        """Generators for this iteration's micro-batch."""
        return randomness.streams(
            seed=self.seed,
            iteration=self.iteration,
            step=self.step + self._ahead,
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
        # One size an iteration, on every rank, as batches of buckets have.
        common = randomness.common(self.seed, self.iteration, "cpu", "bucket")
        return cast(Batch, method.prepare_batch(batch, generator, common))

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
        self.updated = not in_head_start
        self.signalled = self._news
        average = mean_over_ranks if method.trainer.world_size > 1 else None
        about = {"step": self.step, "updated": self.updated, "device": method.device}
        row = Row.of(self.current, applied, average=average, signal=self.own_signal, **about)
        self._waiting = (method, row)
        self.iteration += 1
        self.images_seen += sum(len(b) for b in batches) * method.trainer.world_size
        if row.is_known_bad or not row.late or 0 < method.trainer.max_steps <= self.step:
            self.settle()
            self.signalled = self._news

    def settle(self) -> None:
        """Read what is still to be read of the last iteration: count its update, move the average,
        log its values. Raises FloatingPointError after too many skipped updates.
        """
        if self._waiting is None:
            return
        (method, row), self._waiting = self._waiting, None
        values, applied, self._news = row.read()
        if row.updated and not applied[-1]:
            self.skipped, self.updated = self.skipped + 1, False
            if row.is_assumed:
                self._ahead = 1
                _uncount(method.trainer)
        elif row.updated:
            optimizer = self.optimizers_of(method)[0].optimizer
            self._ema.update(row.step, kinds.evaluated(optimizer))
        self._bad_in_a_row = 0 if all(applied) else self._bad_in_a_row + 1
        for player, is_applied in zip(row.players, applied, strict=True):
            if not is_applied and method.global_rank == 0:  # the same on all ranks
                terms = {k: v for k, v in values.items() if k.startswith(f"{player}/")}
                what = "step %d: a gradient is not finite, the update is skipped: %s"
                log.warning(what, row.step, terms)
        self._log(method, values, row.updated and applied[-1])
        if self._bad_in_a_row >= self.settings.stop_after_bad:
            self._stop_diverged(method)

    def _update_players(
        self, method: Any, micro_batches: list[MicroBatch], in_head_start: bool
    ) -> list[tuple[str, Applied]]:
        """The player of each update, and whether it was applied; the student's is the last. In the
        head start it is not updated.
        """
        samples: list[Any] = []
        if self.settings.accumulate == 1:  # with several, memory holds one sample at a time
            with torch.set_grad_enabled(not in_head_start):
                phase = "discriminator" if in_head_start else "both"
                samples = [method.student_sample(*micro_batches[0], phase)]
        student_optimizer, *optimizers = self.optimizers_of(method)
        updates = range(self.settings.discriminator_updates if optimizers else 0)
        applied: list[tuple[str, Applied]] = []
        for update in updates:
            more = (micro_batches, samples, optimizers, update)
            applied += self.update_discriminator(method, *more)
        # Gradients are released at once. Until the next update they would only take memory, through
        # the peak of the activations.
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not in_head_start:
            updated = self.update_student(method, micro_batches, samples, student_optimizer)
            applied.append(("g", updated))
            student_optimizer.zero_grad(set_to_none=True)
        return applied

    def update_discriminator(
        self,
        method: Any,
        micro_batches: list[MicroBatch],
        samples: list[Any],
        optimizers: Sequence[Any],
        update: int,
    ) -> list[tuple[str, Applied]]:
        """The opponents of the student, and whether the update of each was applied."""
        self.current = {}  # of several updates the last one is logged
        opponents = method.opponents
        for network, optimizer in zip(opponents.values(), optimizers, strict=True):
            network.requires_grad_(True)
            optimizer.zero_grad(set_to_none=True)
        for batch, draws in micro_batches:
            with torch.no_grad():
                again = None if samples else method.student_sample(batch, draws, "discriminator")
            sample = samples[0] if samples else again
            losses = method.discriminator_loss(batch, draws, sample, update)
            if losses.terms and batch is micro_batches[-1][0]:
                drawn = [draws for _, draws in micro_batches]
                start_averaging(method, list(opponents.values()), drawn)
            self.backward(method, "d", losses)
        limit, pairs = self.settings.clip_discriminator, zip(opponents, optimizers, strict=True)
        self.average_gradients(method, list(opponents.values()))
        return [
            (name, self.clip_and_step(method, name, opponents[name], optimizer, limit))
            for name, optimizer in pairs
        ]

    def update_student(
        self, method: Any, micro_batches: list[MicroBatch], samples: list[Any], optimizer: Any
    ) -> Applied:
        opponents = method.opponents.values()
        for network in opponents:  # skips their weight gradients, which are not needed
            network.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        for batch, draws in micro_batches:
            sample = samples[0] if samples else method.student_sample(batch, draws, "student")
            losses = method.student_loss(batch, draws, sample)
            if losses.terms and batch is micro_batches[-1][0]:
                start_averaging(method, [method.student])
            self.backward(method, "g", losses)
        limit = self.settings.clip_student
        self.average_gradients(method, [method.student])
        updated = self.clip_and_step(method, "g", method.student, optimizer, limit)
        for network in opponents:
            network.requires_grad_(True)
        if method.has_discriminator:
            _, head_optimizer, *_ = self.optimizers_of(method)
            generator = randomness.common(self.seed, self.iteration, method.device, "refresh")
            refresh_heads(method.heads, generator, head_optimizer.optimizer, updated)
        return updated

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

    def average_gradients(self, method: Any, networks: Sequence[nn.Module]) -> None:
        """Average gradients over ranks, of all networks that learned in one backward pass."""
        self.settle()  # the work of this iteration is queued, so waiting for the last one is free
        self._ahead = 0
        average = getattr(method.trainer.strategy, "average_gradients", None)
        if average:
            average([p for network in networks for p in network.parameters() if p.requires_grad])

    def clip_and_step(
        self, method: Any, player: str, module: nn.Module, optimizer: Any, limit: float
    ) -> Applied:
        """Clip averaged gradients, and step. If the gradient is not finite, no rank is updated."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # An opponent's warm-up counts iterations, however many updates one has.
        updates = self.step if player == "g" else self.iteration
        share = self.settings.rate(self.step, method.trainer.max_steps, updates)
        self.current[f"{player}/grad_norm"] = norm
        self.current[f"{player}/lr"] = optimizer.param_groups[0]["initial_lr"] * share
        for group in optimizer.param_groups:
            kinds.set_rate(group, group["initial_lr"] * share)
        return step_if_finite(optimizer, parameters, norm, limit)

    def _stop_diverged(self, method: Any) -> None:
        count, trainer = self._bad_in_a_row, method.trainer
        players = ("g", *method.opponents)
        rates = [f"optimizer.{OPTIMIZER_OF[player]}.lr" for player in players]
        folder, precision = Path(trainer.default_root_dir), str(trainer.precision)
        advice = after_divergence(folder, precision, rates)
        what = f"{count} iterations in a row had a gradient that is not finite"
        raise FloatingPointError(f"{what}, up to step {self.step}; {advice}")

    # -- logging -----------------------------------------------------------------------------------

    def _log(self, method: Any, values: dict[str, float], updated: bool) -> None:
        counts = ("step", "iteration", "images_seen", "skipped")
        self.last_logged = {**values, **{name: float(getattr(self, name)) for name in counts}}
        for listener in self.listeners:
            listener(self.last_logged, self.step, updated)
        every = max(1, method.trainer.log_every_n_steps)
        if self.iteration % every and self.iteration != 1:  # the first row comes at once
            return
        for logger in method.loggers:
            # log_dict would repeat values that only some iterations have
            values = {k: v for k, v in self.last_logged.items() if k != "step"}
            logger.log_metrics(values, step=self.step)

    # -- optimisers --------------------------------------------------------------------------------

    def optimizers(self, method: Any) -> list[torch.optim.Optimizer]:
        """The student's optimiser, and those of its opponents. Raises ValueError for a fake score
        without one.
        """
        made = []
        for player, network in {"g": method.student, **method.opponents}.items():
            factory = getattr(self.factories, OPTIMIZER_OF[player])
            if factory is None:
                what = "this method trains a fake score; give it an optimiser"
                raise ValueError(f"optimizer.{OPTIMIZER_OF[player]}: {what}")
            build = partial(OnHost, factory) if self.settings.optimizer_device else factory
            made.append(build(network.parameters()))
        self._peaks = [[float(group["lr"]) for group in each.param_groups] for each in made]
        for optimizer, peaks in zip(made, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["initial_lr"] = peak
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
        wrapped: list[Any] = found if isinstance(found, list) else [found]
        for optimizer in wrapped[1:]:
            optimizer._on_before_step = lambda: profiler.start("optimizer_step")
            optimizer._on_after_step = lambda: profiler.stop("optimizer_step")
        return wrapped

    def _position(self, method: Any, micro: int) -> int:
        """Position of a micro-batch among those of all ranks, in the order of the data."""
        world = method.trainer.world_size if method._trainer else 1
        return micro * world + cast(int, method.global_rank)

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        counts = {name: getattr(self, name) for name in ("iteration", "images_seen", "skipped")}
        ahead = {"ahead": self._ahead} if self._ahead else {}
        return {**counts, **ahead, "ema": self._ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.images_seen = state["iteration"], state["images_seen"]
        self.skipped, self._ahead = state["skipped"], state.get("ahead", 0)
        self._ema.load_state_dict(state["ema"])


def _uncount(trainer: Any) -> None:
    """Take back the student's last step, which Lightning has counted, from `global_step`."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for tracker in (progress.total, progress.current):
        tracker.ready -= 1
        tracker.completed -= 1
