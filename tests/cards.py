"""A student's card read as its user reads it: its code is run as it stands there, in plain
diffusers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

FENCE = re.compile(r"```python\n(.*?)```", re.S)


def code(folder: Path) -> str:
    """The one piece of code in the card of this folder."""
    (found,) = FENCE.findall((folder / "README.md").read_text(encoding="utf-8"))
    return found


def drawn(
    folder: Path, prompt: str, *, steps: int, seed: int, source: Path | None = None, **filled: Any
) -> torch.Tensor:
    """The picture of the card's code, [H, W, 3] in [0, 1], or its video [F, H, W, 3]: nothing is
    changed but what a user fills in. An editor edits the picture in the file `source`; `filled` are
    the names that the code takes as given.
    """
    text = code(folder)
    places = {
        '"<this folder>"': repr(str(folder)),
        '"a prompt"': repr(prompt),
        "manual_seed(0)": f"manual_seed({seed})",
    }
    if source is not None:
        places['"<a picture>"'] = repr(str(source))
    for theirs, ours in places.items():
        assert text.count(theirs) == 1, (theirs, text)
        text = text.replace(theirs, ours)
    text, count = re.subn(r"^steps = \d$", f"steps = {steps}", text, flags=re.M)
    assert count == 1
    exec(compile(text, str(folder / "README.md"), "exec"), filled)
    if "video" in filled:
        return torch.from_numpy(filled["video"]).float()
    return torch.from_numpy(np.asarray(filled["picture"]) / 255).float()
