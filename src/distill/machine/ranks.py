"""Which of a command's processes this one is, as its launcher says, before anything distributed has
begun.
"""

import os


def rank() -> int:
    """The number of this process, 0 for the first and for one that no launcher has started."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def world_size() -> int:
    """How many processes a launcher has started, of which this is one; 1 without a launcher."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1
