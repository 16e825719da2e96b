"""Training of the reader of `shapes`, on renders with known attributes and on the autoencoder's
reconstructions of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.sampling import to_bytes
from distill.terminal.progress import track
from distill.worlds.shapes.judge import fresh_renders, judging_prompts
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import Work, pixels, render_all
from distill.worlds.shapes.reader import SLOTS, Reader, targets
from distill.worlds.shapes.world import sample

JUDGING_SEED = 5  # not a seed of the evaluation of students


def train(work: Work) -> dict[str, Any]:
    """Train on scenes of the data, their reconstructions (every third step), and new scenes.

    Every fifth new scene has a pair that the data never show. Scores: accuracy on new renders and
    on their reconstructions.
    """
    asked, seed = work.asked["reader_scenes"], work.data["seed"]
    vae, fit = work.vae, work.fit("reader")
    shared = min(asked["shared"], work.data["count"])
    parts = track(work.latents[:shared].split(256), "reader: copying pictures", unit="batch")
    copies = torch.cat([to_bytes(vae.decode(part.float()).sample) for part in parts])
    scenes = [sample(seed, i)[1] for i in range(shared)]
    scenes += [sample(seed + 1, i, held_out=i % 5 == 0)[1] for i in range(asked["fresh"])]
    truth, pictures = targets(scenes), render_all(scenes)
    three = torch.tensor([len(s.things) == 3 for s in scenes])
    for slot in range(SLOTS):
        truth[f"size{slot}"][three] = -1  # three things have one size, which no caption states
    torch.manual_seed(fit.seed)
    reader = Reader()

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        use_copies = len(copies) and step % 3 == 0
        source, index = (copies, index % len(copies)) if use_copies else (pictures, index)
        x = pixels(source[index])
        noise = 0.08 * torch.rand((), generator=generator)
        answers = reader((x + noise * torch.randn(x.shape, generator=generator)).to(DEVICE))
        known = {question: answer[index].to(DEVICE) for question, answer in truth.items()}
        losses = [
            F.cross_entropy(v.float(), known[k], ignore_index=-1, reduction="sum")
            for k, v in answers.items()
        ]
        return {"ce": torch.stack(losses).sum() / len(index)}

    fit(reader, objective, samples=len(pictures)).save(work.models / "reader")
    prompts = judging_prompts(5 * work.asked["scoring"]["prompts"], seed=JUDGING_SEED)
    judge, shares = work.judge, {}
    renders = fresh_renders(prompts, seed=JUDGING_SEED)
    copied = torch.cat(
        [vae.decode(vae.encode(x).latent_dist.mode()).sample for x in renders.split(100)]
    )
    for name, x in (("renders", renders), ("copies", copied)):
        scores = judge.accuracy(judge.read(x)[1], prompts)
        shares[name] = {
            k: round(v, 4) for k, v in scores.items() if v == v
        }  # nan: no prompt says any
    return {"seconds": fit.seconds, **shares}
