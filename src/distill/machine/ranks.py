"""Rank and world size from the launcher's environment, before torch.distributed is initialised."""

import os


def rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def world_size() -> int:
    """The number of processes that the launcher has started; 1 without a launcher."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1
