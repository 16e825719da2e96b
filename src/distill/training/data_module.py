"""The data of a run as Lightning's trainer takes them, in one process or several."""

from typing import Any

import lightning as L

from distill.data.source import Loader, Source


class DataModule(L.LightningDataModule):
    """Batches of a source in the order of a run: `trainer.fit(method, DataModule(source, seed=0))`.

    Each process has its own part of a step. From a checkpoint the order goes on where that stopped.

    Args:
        source: the data set, and how many samples a process reads at a time.
        seed: of the order.
    """

    def __init__(self, source: Source, *, seed: int) -> None:
        super().__init__()
        self.source, self.seed = source, seed

    def train_dataloader(self) -> Loader:
        """The endless stream from the iteration on that the method has come to."""
        trainer: Any = self.trainer
        loop = trainer.lightning_module.loop
        start = loop.iteration * loop.settings.accumulate
        place = {"rank": trainer.global_rank, "world": trainer.world_size}
        return self.source.loader(seed=self.seed, start=start, **place)
