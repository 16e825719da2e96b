"""The data of a run as a LightningDataModule, for one process or several."""

from typing import Any

import lightning as L

from distill.data.source import Loader, Source
from distill.training.captions import embed_before


class DataModule(L.LightningDataModule):
    """Batches of a source in the order of a run: `trainer.fit(method, DataModule(source, seed=0))`.

    With `data.embed_once` the captions of latents are embedded before the first batch. In each step
    every process reads a different part of the data. After a checkpoint is loaded, the
    order continues where the checkpoint was saved.

    Args:
        source: the data set, and its batch size per process.
        seed: seed of the order.
    """

    def __init__(self, source: Source, *, seed: int) -> None:
        super().__init__()
        self.source, self.seed = source, seed

    def train_dataloader(self) -> Loader:
        """Endless batches, from the present iteration of the method on."""
        trainer: Any = self.trainer
        method = trainer.lightning_module
        embed_before(self.source.dataset, method)
        loop = method.loop
        start = loop.iteration * loop.settings.accumulate
        ranks = {"rank": trainer.global_rank, "world": trainer.world_size}
        return self.source.loader(seed=self.seed, start=start, **ranks)
