"""When checkpoints are written: every so many steps, at the end, and when a signal stops
the run, after the current iteration; of several processes on a GPU after the next one.
"""

import difflib
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from distill.machine import signals
from distill.machine.signals import mark_handled, set_handlers
from distill.methods.base import Distillation
from distill.storage.atomic import duplicate, remove, remove_leftovers
from distill.storage.checkpoint_files import read_checkpoint, write_checkpoint
from distill.storage.checkpoint_names import steps_in
from distill.terminal import console
from distill.training.beside import BackgroundWriter
from distill.training.run_metadata import RunMetadata

log = logging.getLogger(__name__)
CONNECTOR = "checkpoint_connector"  # Lightning's module that loads a checkpoint


class AtomicIO(TorchCheckpointIO):
    """Lightning's checkpoint reading and writing, by our functions.

    `writer` writes while training goes on. It is None for callers that need the file at once, as
    Lightning's own callbacks do.
    """

    writer: BackgroundWriter | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if self.writer is None:
            write_checkpoint(checkpoint, Path(path))
        else:
            self.writer.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))


@contextmanager
def naming_checkpoint(path: Path | None) -> Iterator[None]:
    """Errors of Lightning while it loads this checkpoint become a ValueError that names it.

    None: no checkpoint is loaded.
    """
    try:
        yield
    except (OSError, signals.Stopped):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if path is None or not any(Path(frame.filename).stem == CONNECTOR for frame in frames):
            raise
        said = " ".join(str(error).split()).removeprefix("the checkpoint ")
        if str(path) in said:
            raise
        if not isinstance(error, ValueError):  # a damaged state
            console.log_failure(error)
            said = f"its state cannot be loaded ({type(error).__name__}: {said[:200]})"
        raise ValueError(f"resume={path}: {said}; name another checkpoint of this run") from None


class Checkpoints(L.Callback):
    """Saves every `every` student steps, at the end, and when a signal stops the run.

    The newest `keep` checkpoints stay (0: all), and one every `archive` steps (0: none). best.ckpt
    is the one with the best logged value `best`: its minimum or maximum, by `best_is`.

    With `background` the state is copied to memory and written by a thread while training goes on.
    Where the copy would take more than half of the free memory, and for sharded networks, training
    waits until the checkpoint is written.
    """

    def __init__(
        self,
        every: int = 250,
        keep: int = 2,
        archive: int = 0,
        best: str | None = None,
        best_is: Literal["min", "max"] = "min",
        background: bool = True,
    ):
        if every < 1 or keep < 0 or best_is not in ("min", "max"):
            raise ValueError(
                f"callbacks.checkpoint: every={every} and keep={keep} must be positive, best_is min"
                " or max"
            )
        self.every, self.keep, self.archive = every, keep, archive
        self.best, self.best_is = best, best_is
        self.writer = BackgroundWriter() if background else None
        self.folder, self.about = Path("checkpoints"), {}
        self.logger_runs: Callable[[], dict[str, Any]] = dict  # ids of the loggers' runs, by key
        self.stopped_by: signal.Signals | None = None
        self._best: float | None = None
        self._best_checked = best is None  # whether `best` was logged, or its absence reported
        self._handlers: dict[int, Any] = {}
        self._loop: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = state["best"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        # Lightning's own handlers stop at any point and communicate inside a signal handler.
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        seconds = RunMetadata(self.folder.parent).train_seconds()
        more = {"train_seconds": seconds, "loggers": self.logger_runs()}
        checkpoint["about"] = {**self.about, **more}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
            self._move_later_files(pl_module.step)
        for logger in trainer.loggers:
            if hasattr(logger, "resume_at"):  # rows after the checkpoint are logged again
                logger.resume_at(pl_module.step, pl_module.loop.iteration)
        self._loop = pl_module.loop
        # Of an earlier fit, and before the handlers: a signal from here on counts.
        self.stopped_by, self._loop.own_signal, self._loop.signalled = None, 0, False
        self._handlers = set_handlers(self._on_signal)

    def _move_later_files(self, step: int) -> None:
        """Move checkpoints and pictures of later steps away when a run resumes from an earlier
        step.

        A later resume must not find them. Pictures without a checkpoint, left by a kill, are
        removed: they are generated again.
        """
        kept = steps_in(self.folder, ".ckpt"), steps_in(self.folder.parent / "samples", ".png")
        checkpoints, pictures = ([found[at] for at in found if at > step] for found in kept)
        if not checkpoints:
            for path in pictures:
                path.unlink(missing_ok=True)
            return
        aside = self.folder / "abandoned" / time.strftime("%Y-%m-%d_%H-%M-%S")
        later = [*checkpoints, *pictures]
        for path in later:
            aside.mkdir(parents=True, exist_ok=True)
            path.replace(aside / path.name)
        what = f"{len(later)} checkpoints and pictures of later steps are now in {aside}"
        print(f"resuming from step {step}: {what}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.writer is not None:
            self.writer.finish()  # before the handlers go: a signal must not interrupt it
        if trainer.world_size > 1:  # one rank may have got a signal that no row has brought yet
            self.stopped_by = self._of_all(trainer, pl_module)
        self._restore_handlers()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        try:
            if self.writer is not None:
                self.writer.finish()
        except Exception as error:  # the other exception is the one that ends the run
            log.warning("%s", error)
        finally:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, number: int, _frame: Any) -> None:
        mark_handled(number)  # a second signal ends the run at once, without a checkpoint
        self.stopped_by = signal.Signals(number)
        self._loop.own_signal = number

    def _of_all(self, trainer: L.Trainer, pl_module: Any) -> signal.Signals | None:
        """The signal that any rank has received. All ranks must call this."""
        own = torch.tensor(float(self.stopped_by or 0), device=pl_module.device)
        number = trainer.strategy.reduce(own, reduce_op="max")
        return signal.Signals(int(number)) if number else None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        if self.writer is not None:
            self.writer.check()
        self._best_checked = (
            self._best_checked or self.best in trainer.callback_metrics | pl_module.loop.last_logged
        )
        stop = self.stopped_by is not None
        if trainer.world_size > 1:
            # One rank got the signal; all must save together. A row of values, which is averaged
            # over the ranks anyway, has brought the news: asking at every batch would wait.
            stop, pl_module.loop.signalled = pl_module.loop.signalled, False
            self.stopped_by = self._of_all(trainer, pl_module) if stop else self.stopped_by
        trainer.should_stop |= stop
        if pl_module.loop.due(self.every, trainer.max_steps) or stop:
            self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        pl_module.loop.settle()
        step, known = pl_module.step, trainer.callback_metrics | pl_module.loop.last_logged
        path = self.folder / f"step_{step:06d}.ckpt"
        for logger in trainer.loggers:  # first: rows before the checkpoint are not logged again
            logger.save()
        beside = self._write(trainer, path)
        if not trainer.is_global_zero:
            return
        self._best_checked = self._best_checked or self.best in known
        if not self._best_checked and step:
            self._best_checked = True
            close = difflib.get_close_matches(str(self.best), list(known), n=1)
            near = f" (did you mean {close[0]}?)" if close else ""
            what = "no value of this name was logged so far, and there is no best.ckpt"
            log.warning("callbacks.checkpoint.best=%s: %s%s", self.best, what, near)
        value, sign = known.get(self.best), 1 if self.best_is == "min" else -1
        is_best = value is not None and (self._best is None or sign * value < sign * self._best)
        if is_best:
            self._best = float(value)
        if beside is None:
            self._arrange(path, is_best)
        else:
            beside.submit(self._arrange, path, is_best)

    def _write(self, trainer: L.Trainer, path: Path) -> BackgroundWriter | None:
        """Write a checkpoint; returns the writer if that is not finished yet."""
        files = trainer.strategy.checkpoint_io
        if self.writer is None or not isinstance(files, AtomicIO):
            trainer.save_checkpoint(path)
            return None
        files.writer = self.writer
        try:
            trainer.save_checkpoint(path)
        finally:
            files.writer = None
        return self.writer

    def _arrange(self, path: Path, is_best: bool) -> None:
        """Duplicate the complete checkpoint `path` if it is the best, and remove old ones."""
        if is_best:
            duplicate(path, self.folder / "best.ckpt")
        steps = steps_in(self.folder, ".ckpt")
        for old in list(steps)[: -self.keep] if self.keep else ():
            if not (self.archive and old % self.archive == 0):
                remove(steps[old])
