"""What two of the ablations read: real pictures, and students of fewer blocks than their teacher.

    python experiments/ladd_ablations/prepare.py out [pictures]

Leaves `out/real`, shards of as many renders as there are shipped latents, and `out/blocks_4`, `_3`
and `_2`, the shipped pipeline with so many of its five blocks: evenly chosen, the last one always
among them, which ends the text's half.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from distill.config.compose import shipped
from distill.data.write import write_images
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import sample

SEED = 3  # of scenes that neither training nor judging of the models has seen


def scenes(count: int) -> Iterator[tuple[str, np.ndarray, str, dict[str, Any]]]:
    for i in range(count):
        prompt, scene = sample(SEED, i)
        yield f"{i:06d}", render([scene])[0], prompt.caption, {}


def fewer(folder: str, blocks: int, out: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    whole = pipeline.transformer
    kept = np.linspace(0, len(whole.transformer_blocks) - 1, blocks).round().astype(int).tolist()
    part = SD3Transformer2DModel.from_config({**whole.config, "num_layers": blocks})
    weights = {
        k: v for k, v in whole.state_dict().items() if not k.startswith("transformer_blocks.")
    }
    for place, block in enumerate(kept):
        own = whole.transformer_blocks[block].state_dict()
        weights |= {f"transformer_blocks.{place}.{k}": v for k, v in own.items()}
    part.load_state_dict(weights)
    pipeline.register_modules(transformer=part)
    pipeline.save_pretrained(out)


def main(out: Path, count: int = 4096) -> None:
    (out / "real").mkdir(parents=True, exist_ok=True)
    write_images(str(out / "real" / "pictures-%06d.tar"), scenes(count), per_shard=1024)
    for blocks in (4, 3, 2):
        fewer(shipped("shapes:mmdit"), blocks, out / f"blocks_{blocks}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
