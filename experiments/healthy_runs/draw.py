"""The curves of the committed runs on `shapes`, to hold one's own against: draws `curves.png`
beside this file.

    python experiments/healthy_runs/draw.py [runs/mine ...]

A run folder given besides is drawn in black over the method that it was made by; the picture is
then in the last one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from distill.report.curves import read, smoothed

HERE = Path(__file__).parent
METHODS = {"ladd": "LADD", "add": "ADD", "nitrofusion": "NitroFusion"}
# Title, columns with their colours, scale.
PANELS = (
    ("Student's losses", {"g/adv": "C0", "g/distill": "C1", "g/regression": "C2"}, "linear"),
    ("Discriminator's loss", {"d/adv": "C0"}, "linear"),
    ("Logits, real less fake", {"gap": "C0"}, "linear"),
    ("Gradient norms before clipping", {"g/grad_norm": "C0", "d/grad_norm": "C1"}, "log"),
    ("Update-to-weight ratio", {"g/update_ratio": "C0"}, "log"),
)


def curves(path: Path) -> dict[str, np.ndarray]:
    """Each column of a metrics.csv as steps and values, [2, N]; `gap` is d/real less d/fake, if
    they are there.
    """
    found, _ = read(path)
    if {"d/real", "d/fake"} <= found.keys():  # each lacks the steps at which it was not finite
        steps, i, j = np.intersect1d(found["d/real"][0], found["d/fake"][0], return_indices=True)
        found["gap"] = np.stack([steps, found["d/real"][1][i] - found["d/fake"][1][j]])
    return found


def main() -> None:
    own = {}
    for folder in map(Path, sys.argv[1:]):
        method = (
            json.loads((folder / "run.json").read_text(encoding="utf-8")).get("method", "").lower()
        )
        if method not in METHODS:
            raise SystemExit(
                f"{folder}: {method or 'not trained yet'}; the curves are of {', '.join(METHODS)}"
            )
        own[method] = curves(folder / "metrics.csv")
    figure, axes = plt.subplots(
        len(PANELS), len(METHODS), figsize=(11, 2.1 * len(PANELS)), sharex="col"
    )
    for column, (method, name) in zip(axes.T, METHODS.items(), strict=True):
        reference = curves(HERE.parent / f"{method}_shapes" / "metrics.csv")
        column[0].set_title(name)
        for axis, (title, keys, scale) in zip(column, PANELS, strict=True):
            for key, color in keys.items():
                for found, look in ((reference, color), (own.get(method, {}), "black")):
                    if key in found:
                        steps, values = found[key]
                        axis.plot(steps, values, look, alpha=0.2, linewidth=0.7)
                        label = key if look == color and len(keys) > 1 else None
                        axis.plot(steps, smoothed(values), look, linewidth=1.3, label=label)
            axis.set_yscale(scale)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
            if len(keys) > 1 and method == "nitrofusion":
                axis.legend(fontsize=7, frameon=False)
            if method == "ladd":
                axis.set_ylabel(title, fontsize=8)
        column[-1].set_xlabel("student steps", fontsize=8)
    figure.tight_layout()
    out = (Path(sys.argv[-1]) if own else HERE) / "curves.png"
    figure.savefig(out, dpi=90)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
