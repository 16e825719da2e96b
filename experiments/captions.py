"""Write the captions of the shipped latents of `shapes`, in their order, one a line.

    python experiments/captions.py captions.txt [count]

`distill.synthesize prompts=captions.txt seed=0` then generates sample i from the caption and the
noise of the shipped sample i: only the teacher is another.
"""

import sys
from pathlib import Path

from distill.config.compose import shipped
from distill.data.datasets import LatentShards


def main(out: Path, count: int | None = None) -> None:
    """Write the first `count` captions; None: all."""
    data = LatentShards(shipped("shapes:latents"), seeded=True, limit=count)
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = (data[i]["caption"] for i in range(len(data)))
    out.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
