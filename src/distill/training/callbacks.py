"""What happens beside training: student steps are counted, health numbers, alarms, pictures on the
way.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from distill.core.limits import at_once
from distill.core.tensors import full_tensor
from distill.core.types import EMBEDDED, Cond
from distill.data.lines import Lines
from distill.machine.hardware import autocast
from distill.methods.base import Distillation
from distill.sampling import Consistency, check_finite, seeded
from distill.storage.atomic import write_atomic
from distill.storage.pictures import write_grid
from distill.terminal.progress import Bar

log = logging.getLogger("distill.health")
ALARMS = "alarms.jsonl"  # in the folder of the run
SAID = ("g/adv", "g/regression", "g/consistency", "d/adv", "d/real", "d/fake")
PROMPTS_KEY = "callbacks.samples.prompts"
MOST = 2**26  # ours: numbers in the copy that tells how far a student moves, 256 MiB in float32
HEALTH = ("d/accuracy", "d/real", "d/fake")


class Progress(L.Callback):
    """Counts student steps and says their speed, the time left and the losses: a bar or lines."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        counted = {"done": trainer.global_step, "images": pl_module.loop.images_seen}
        self.bar = Bar("training", trainer.max_steps, rate="images", **counted)
        self.bar.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        values, iteration = pl_module.loop.numbers, pl_module.loop.iteration
        losses = " ".join(f"{k} {values[k]:.2f}" for k in SAID if k in values)
        lead, place = pl_module.loop.engine.head_start, None
        if iteration <= lead:
            place = f"head start, iteration {iteration} of {lead}"
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
    """Logs images per second, and |change| / |weight| of the student, which should stay near 1e-3
    (Karpathy's rule).
    """

    def __init__(self, every: int = 10):
        self.every = every
        self._before: list[Tensor] = []
        self._last: tuple[float, int] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if (
            pl_module.step % self.every == 0
            and pl_module.loop.iteration >= pl_module.loop.engine.head_start
            and not self._before
        ):
            self._before = [p.detach().clone() for p in self._some(pl_module)]

    def _some(self, pl_module: Distillation) -> list[Tensor]:
        """At most 256 of the student's tensors, and MOST numbers, evenly chosen: they are
        copied.
        """
        every = list(pl_module.student.parameters())
        some = every[:: len(every) // 257 + 1]
        while len(some) > 1 and sum(p.numel() for p in some) > MOST:
            some = some[::2]
        return some

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if not (self._before and pl_module.loop.updated):
            return
        change = torch._foreach_sub(self._before, [p.detach() for p in self._some(pl_module)])
        moved, size = (
            float(full_tensor(torch.stack(torch._foreach_norm(x)).norm()))
            for x in (change, self._before)
        )
        now = (time.monotonic(), pl_module.loop.images_seen)
        values = {"g/update_ratio": moved / size}
        if self._last:
            values["images_per_second"] = (now[1] - self._last[1]) / (now[0] - self._last[0])
        self._before, self._last = [], now
        # Straight to the loggers: through `self.log` this callback's last values would be repeated
        # on every later row.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=pl_module.step)


class Alarms(L.Callback):
    """Says in words when the discriminator has become useless, by the mean over `window` steps.

    Each alarm is a warning, and a line {step, alarm} of `alarms.jsonl` in the run folder, which the
    report shows.
    """

    def __init__(self, window: int = 50):
        self.window = window
        self._seen: list[list[float]] = []
        self._last: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._last = list(state["seen"]), state["last"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        """Keep the alarms up to the checkpoint that is gone on from; the file is there even if none
        is raised.
        """
        self.path = Path(trainer.default_root_dir) / ALARMS
        if trainer.is_global_zero:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
            write_atomic(
                self.path, b"".join(line for line in lines if _until(line, pl_module.step))
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        values = pl_module.loop.numbers
        if pl_module.loop.updated and all(k in values for k in HEALTH):
            self._seen.append([values[k] for k in HEALTH])
        if len(self._seen) == self.window:
            means = torch.tensor(self._seen).mean(0).tolist()
            said = alarm(*means, r1=hasattr(pl_module, "r1_weight"))
            if said and said != self._last and trainer.is_global_zero:
                self._raise(pl_module.step, said)
            self._seen, self._last = [], said

    def _raise(self, step: int, said: str) -> None:
        log.warning("step %d: %s", step, said)
        line = json.dumps({"step": step, "alarm": said}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def _until(line: bytes, step: int) -> bool:
    """Whether this line of alarms is whole and of no later step."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # torn by a power cut


def alarm(accuracy: float, real: float, fake: float, r1: bool = True) -> str | None:
    """What is wrong with a discriminator of this accuracy and these mean logits, and what helps;
    None if nothing is.

    `r1`: whether its method has a gradient penalty to be raised.
    """
    if max(abs(real), abs(fake)) > 20:
        more = ", or raise method.r1_weight" if r1 else ""
        return f"the discriminator's logits run away: lower optimizer.discriminator.lr{more}"
    if accuracy > 0.98:
        return (
            "the discriminator is saturated (right nearly always): lower its rate, or let it look"
            " at noisier samples"
        )
    if abs(real - fake) < 0.02:
        return (
            "the discriminator is not learning (real and fake score alike): raise its rate or"
            " optimizer.head_start"
        )
    if accuracy < 0.4:
        return (
            "the discriminator has collapsed (wrong more often than right): raise"
            " optimizer.discriminator.lr"
        )
    return None


class Samples(L.Callback):
    """One-step pictures of the averaged student for fixed prompts, every `every` steps.

    A few are drawn at a time, as `limits.at_once` says for their size, in the run's own precision.
    Where the data hold embeddings, their captions need no text encoder. Those that are not finite
    are not written: before the first step ValueError says so, for then it is the teacher's weights
    or their dtype, and later a warning.

    Args:
        prompts: a list, or a text file with one a line; None: captions of the data, from evenly
            spaced places.
        count: how many of these; None: 16, and fewer of pictures above 512x512, but 4 at least.
    """

    def __init__(
        self,
        every: int = 100,
        prompts: str | Sequence[str] | None = None,
        count: int | None = None,
    ):
        self.every, self.count = every, count
        named = isinstance(prompts, str)
        self.prompts = Lines(prompts, PROMPTS_KEY).lines if named else list(prompts or ())
        self._cond: Cond | None = None  # of the prompts, on the CPU

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        self.folder = Path(trainer.default_root_dir) / "samples"
        self.sides = pl_module.teacher.sides_of(pl_module.teacher.latent_shape)
        if not self.prompts:
            self._ask(trainer.train_dataloader.dataset, pl_module.teacher)
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            write_atomic(self.folder / "captions.txt", ("\n".join(self.prompts) + "\n").encode())
        wrong = trainer.strategy.broadcast(self._draw(trainer, pl_module))  # all processes stop
        if wrong and pl_module.step == 0:
            raise ValueError(wrong)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if pl_module.loop.updated and (
            pl_module.step % self.every == 0 or pl_module.step == trainer.max_steps
        ):
            self._draw(trainer, pl_module)

    def _ask(self, data: Any, teacher: Any) -> None:
        """Take the prompts from the data, and what they embed as where that is kept there."""
        items = data.some(self.count or pictures_shown(*self.sides))
        self.prompts = [item["caption"] for item in items]
        kept = [name for name in EMBEDDED if name in items[0]]
        cached = {name: torch.stack([item[name] for item in items]).float() for name in kept}
        if cached:
            self._cond = Cond(**cached, null=teacher.embed([""]).null.to("cpu"))

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, pl_module: Distillation) -> str | None:
        """Write the pictures, if this process is the one that does; what is wrong with them, if
        anything is.
        """
        path, teacher = self.folder / f"step_{pl_module.step:06d}.png", pl_module.teacher
        # Where networks are cut up all processes must run them, hence all ask the first one whether
        # to.
        if trainer.strategy.broadcast(path.exists()) or not (
            pl_module.sharded or trainer.is_global_zero
        ):
            return None
        self._cond = self._cond or teacher.embed(self.prompts).to("cpu")
        pictures = []
        with pl_module.ema.swap():
            for places in torch.arange(len(self.prompts)).split(at_once(*self.sides)):
                x0 = self._latents(trainer, pl_module, places)
                if trainer.is_global_zero:
                    pictures.append(teacher.pictures(x0).clamp(-1, 1).cpu())
        teacher.release()  # what a run on cached embeddings has read for this alone
        if not trainer.is_global_zero:
            return None
        drawn = torch.cat(pictures)
        try:
            check_finite(drawn, f"samples/{path.name}")
        except ValueError as error:
            if pl_module.step > 0:
                log.warning("step %d: %s", pl_module.step, error)
            return str(error)
        write_grid((drawn + 1) / 2, path, nrow=8)
        return None

    def _latents(self, trainer: L.Trainer, pl_module: Distillation, places: Tensor) -> Tensor:
        """The student's, of the prompts at these places; prompt i has seed i."""
        teacher = pl_module.teacher
        assert self._cond is not None
        cond = self._cond.index(places).to(teacher.device)
        how = {"shape": teacher.latent_shape, "steps": 1}
        with autocast(str(trainer.precision), teacher.device.type):
            return Consistency()(pl_module.student, cond, seeded(places.tolist()), **how)


def pictures_shown(height: int, width: int) -> int:
    """How many pictures of so many pixels show how a run goes, if nobody says: 16 up to 512x512, 4
    of 1024x1024.
    """
    return max(4, at_once(height, width, 4) * 4)
