"""Callbacks of training: progress, health metrics, alarms and sample pictures."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from distill.core.limits import at_once
from distill.core.tensors import full_tensor
from distill.core.types import EMBEDDED, FILL, Cond, mask_is_ones
from distill.data.lines import Lines
from distill.machine.hardware import autocast
from distill.methods.base import Distillation
from distill.sampling import Consistency, check_finite, seeded
from distill.sampling.guided import Guided
from distill.storage.atomic import write_atomic
from distill.storage.pictures import grid_of, write_png
from distill.terminal.progress import Bar
from distill.training.beside import BackgroundWriter
from distill.training.trackers import logged

log = logging.getLogger("distill.health")
ALARMS = "alarms.jsonl"  # in the folder of the run
TEACHER_STEPS = 28  # ours, as in distill.synthesize: of students that keep their teacher's steps
SHOWN_LOSSES = ("g/adv", "g/regression", "g/consistency", "g/dpo", "d/adv", "d/real", "d/fake")
PROMPTS_KEY = "callbacks.samples.prompts"
MAX_COPIED = 2**26  # ours: values copied to measure an update, 256 MiB in float32
CRITIC_STATS = ("d/accuracy", "d/real", "d/fake")


class Progress(L.Callback):
    """Shows student steps, their speed, the time left and the losses, as a bar or as lines."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        counted = {"done": trainer.global_step, "images": pl_module.loop.images_seen}
        self.bar = Bar("training", trainer.max_steps, rate="images", **counted)
        self.bar.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        values, iteration = pl_module.loop.last_logged, pl_module.loop.iteration
        losses = " ".join(f"{k} {values[k]:.2f}" for k in SHOWN_LOSSES if k in values)
        head_start, place = pl_module.loop.settings.head_start, None
        if iteration <= head_start:
            place = f"head start, iteration {iteration} of {head_start}"
        images = pl_module.loop.images_seen
        self.bar.update(trainer.global_step, images=images, said=losses, place=place)

    def on_train_end(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        self.bar.__exit__(None, None, None)

    def on_exception(
        self, trainer: L.Trainer, pl_module: Distillation, exception: BaseException
    ) -> None:
        if hasattr(self, "bar"):
            self.bar.__exit__(type(exception), exception, None)


class Health(L.Callback):
    """Logs images per second, and |update| / |weight| of the student, which should be near 1e-3
    (Karpathy's rule).
    """

    def __init__(self, every: int = 10):
        self.every = every
        self._before: list[Tensor] = []
        self._last: tuple[float, int] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if (
            pl_module.step % self.every == 0
            and pl_module.loop.iteration >= pl_module.loop.settings.head_start
            and not self._before
        ):
            self._before = [p.detach().clone() for p in self._chosen_parameters(pl_module)]

    def _chosen_parameters(self, pl_module: Distillation) -> list[Tensor]:
        """At most 256 of the student's tensors with at most MAX_COPIED values, evenly chosen, for
        copies.
        """
        every = list(pl_module.student.parameters())
        some = every[:: len(every) // 257 + 1]
        while len(some) > 1 and sum(p.numel() for p in some) > MAX_COPIED:
            some = some[::2]
        return some

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if not (self._before and pl_module.loop.due(1)):
            return
        change = torch._foreach_sub(
            self._before, [p.detach() for p in self._chosen_parameters(pl_module)]
        )
        norms = [
            full_tensor(torch.stack(torch._foreach_norm(x)).norm()) for x in (change, self._before)
        ]
        change_norm, weight_norm = torch.stack(norms).tolist()
        now = (time.monotonic(), pl_module.loop.images_seen)
        values = {"g/update_ratio": change_norm / weight_norm}
        if self._last:
            values["images_per_second"] = (now[1] - self._last[1]) / (now[0] - self._last[0])
        self._before, self._last = [], now
        # Not through `self.log`, which would repeat this callback's last values on every later row.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.step)


class Alarms(L.Callback):
    """Warns when the discriminator has become useless, by its mean statistics over `window` steps.

    Each alarm is a warning in the log and a line {step, alarm} of `alarms.jsonl` in the run folder,
    which the report shows.
    """

    def __init__(self, window: int = 50):
        self.window = window
        self._stats: list[list[float]] = []
        self._last: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._stats, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stats, self._last = list(state["seen"]), state["last"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        """Keep the alarms up to the resumed checkpoint. The file exists even without alarms."""
        self.path = Path(trainer.default_root_dir) / ALARMS
        if trainer.is_global_zero:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
            write_atomic(
                self.path, b"".join(line for line in lines if _is_up_to(line, pl_module.step))
            )

        self._speaks, self._has_r1 = trainer.is_global_zero, hasattr(pl_module, "r1_weight")
        if self._note not in pl_module.loop.listeners:
            pl_module.loop.listeners.append(self._note)

    def _note(self, values: dict[str, float], step: int, updated: bool) -> None:
        """Take the values of an iteration, which on a GPU are read during the next one."""
        if updated and all(k in values for k in CRITIC_STATS):
            self._stats.append([values[k] for k in CRITIC_STATS])
        if len(self._stats) == self.window:
            means = torch.tensor(self._stats).mean(0).tolist()
            message = alarm(*means, r1=self._has_r1)
            if message and message != self._last and self._speaks:
                self._report(step, message)
            self._stats, self._last = [], message

    def _report(self, step: int, message: str) -> None:
        log.warning("step %d: %s", step, message)
        line = json.dumps({"step": step, "alarm": message}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether this line is a complete alarm of a step up to `step`."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # incomplete after a power cut


def alarm(accuracy: float, real: float, fake: float, r1: bool = True) -> str | None:
    """What is wrong with a discriminator of this accuracy and these mean logits, and a remedy; else
    None.

    `r1`: whether the method has a gradient penalty that can be raised.
    """
    if max(abs(real), abs(fake)) > 20:
        more = ", or raise method.r1_weight" if r1 else ""
        return f"the discriminator's logits diverge: lower optimizer.discriminator.lr{more}"
    if accuracy > 0.98:
        return (
            "the discriminator is saturated (accuracy above 0.98): lower"
            " optimizer.discriminator.lr, or give it noisier samples"
        )
    if abs(real - fake) < 0.02:
        return (
            "the discriminator is not learning (equal real and fake logits): raise"
            " optimizer.discriminator.lr or loop.head_start"
        )
    if accuracy < 0.4:
        return (
            "the discriminator has collapsed (accuracy below 0.4): raise optimizer.discriminator.lr"
        )
    return None


class Samples(L.Callback):
    """One-step pictures of the EMA student for fixed prompts, every `every` steps. They have the
    teacher's size; of one that edits or fills, that of the first picture of the data.

    They are generated in batches of `limits.at_once`, in the precision of the run. Data with cached
    embeddings need no text encoder. Pictures with values that are not finite are not written.
    Before the first step that raises ValueError, because the teacher's weights or dtype are wrong;
    later it gives a warning.

    Args:
        prompts: a list, or a text file with one prompt a line; None: captions of evenly spaced
            samples of the data.
        column: of prompts in a table.
        count: number of prompts; None: 16, fewer for pictures above 512x512, but at least 4.
    """

    def __init__(
        self,
        every: int = 100,
        prompts: str | Sequence[str] | None = None,
        count: int | None = None,
        column: str | None = None,
    ):
        self.every, self.count = every, count
        self.writer: BackgroundWriter | None = None  # None: training waits for the files
        named = isinstance(prompts, str)
        self.prompts = Lines(prompts, PROMPTS_KEY, column).lines if named else list(prompts or ())
        self._cond: Cond | None = None  # of the prompts, on the CPU

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        self.folder = Path(trainer.default_root_dir) / "samples"
        self._set_shape(pl_module.teacher, pl_module.teacher.latent_shape)
        if not self.prompts:
            self._prompts_from_data(trainer.train_dataloader.dataset, pl_module.teacher)
        if pl_module.teacher.image_channels:
            self._images_from_data(trainer.train_dataloader, pl_module.teacher)
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            write_atomic(self.folder / "captions.txt", ("\n".join(self.prompts) + "\n").encode())
        problem = trainer.strategy.broadcast(
            self._write_pictures(trainer, pl_module)
        )  # all ranks stop
        if problem and pl_module.step == 0:
            raise ValueError(problem)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if pl_module.loop.due(self.every, trainer.max_steps):
            self._write_pictures(trainer, pl_module)

    def _prompts_from_data(self, data: Any, teacher: Any) -> None:
        """Take the prompts from the data, and their embeddings where these are cached."""
        items = data.some(self.count or default_count(*self.sides))
        self.prompts = [item["caption"] for item in items]
        # Embeddings that are stored; those of `embed_once` are in the precision of the steps.
        names = [name for name in EMBEDDED if name in items[0] and getattr(data, "null", None)]
        cached = {name: torch.stack([item[name] for item in items]).float() for name in names}
        if cached:
            known = {"null": teacher.embed([""]).null.to("cpu"), "all_ones": mask_is_ones(cached)}
            self._cond = Cond(**cached, **known)

    @torch.no_grad()
    def _images_from_data(self, loader: Any, teacher: Any) -> None:
        """Take what the teacher reads beside a sample from as many pictures of the data, and their
        masks from the places of the order that they would have as the first ones.
        """
        found = loader.dataset.some(len(self.prompts))
        pictures = [name for name in ("pixels", "source", "image") if name in found[0]]
        of_size = found[0][pictures[0]].shape  # of several buckets, the first sample's
        places = [i for i, item in enumerate(found) if item[pictures[0]].shape == of_size]
        batch = {
            name: torch.stack([found[i][name] for i in places]).to(teacher.device)
            for name in pictures
        }
        if loader.masks is not None:
            drawn = loader.masks(0, places, batch["pixels"].shape[-2:])
            batch[FILL] = drawn.to(teacher.device)
        cond = (self._cond or teacher.embed(self.prompts)).index(torch.tensor(places))
        self.prompts = [self.prompts[i] for i in places]
        self._cond = replace(cond, image=teacher.image_of(batch)).to("cpu")
        self._set_shape(teacher, (*teacher.latent_shape[:-2], *self._cond.image.shape[-2:]))

    def _set_shape(self, teacher: Any, shape: Sequence[int]) -> None:
        """The shape of the latents of one picture, and its sides."""
        height, width = teacher.sides_of(shape)
        self.shape = tuple(shape)
        self.sides = (height, width * getattr(teacher, "frames", 1))

    @torch.no_grad()
    def _write_pictures(self, trainer: L.Trainer, pl_module: Distillation) -> str | None:
        """Generate the pictures, and write them on rank 0; returns what is wrong with them, or
        None.
        """
        path, teacher = self.folder / f"step_{pl_module.step:06d}.png", pl_module.teacher
        # All ranks must run sharded networks, so rank 0 decides for all of them.
        if trainer.strategy.broadcast(path.exists()) or not (
            pl_module.sharded or trainer.is_global_zero
        ):
            return None
        self._cond = self._cond or teacher.embed(self.prompts).to("cpu")
        pictures = []
        with pl_module.ema.swap():
            for indices in torch.arange(len(self.prompts)).split(at_once(*self.sides)):
                x0 = self._generate(trainer, pl_module, indices)
                if trainer.is_global_zero:
                    pictures.append(teacher.pictures(x0).clamp(-1, 1).cpu())
        teacher.release()  # text encoders that were loaded for this alone
        if not trainer.is_global_zero:
            return None
        images = torch.cat(pictures)
        try:
            check_finite(images, f"samples/{path.name}")
        except ValueError as error:
            if pl_module.step > 0:
                log.warning("step %d: %s", pl_module.step, error)
            return str(error)
        grid = grid_of((images + 1) / 2, nrow=8)
        logged.picture(trainer.loggers, "samples", grid, pl_module.step)
        if self.writer is None:
            write_png(grid, path)
        else:
            self.writer.submit(write_png, grid, path)
        return None

    def _generate(self, trainer: L.Trainer, pl_module: Distillation, indices: Tensor) -> Tensor:
        """Latents of the student for the prompts at these indices; prompt i has seed i."""
        teacher = pl_module.teacher
        assert self._cond is not None
        cond = self._cond.index(indices).to(teacher.device)
        many = pl_module.many_steps
        sampler = Guided() if many else Consistency()
        how = {"shape": self.shape, "steps": TEACHER_STEPS if many else 1}
        with autocast(str(trainer.precision), teacher.device.type):
            return sampler(pl_module.student, cond, seeded(indices.tolist()), **how)


def default_count(height: int, width: int) -> int:
    """Default number of sample pictures of this size: 16 up to 512x512, 4 of 1024x1024."""
    return max(4, at_once(height, width, 4) * 4)
