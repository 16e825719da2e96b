"""Pictures on the way: whose captions they are of, what they are drawn with, and what they need to
be read.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.io import decode_image, read_file
from torchvision.utils import make_grid

import tiny
from distill.data.source import latents
from distill.sampling import Consistency, seeded, to_bytes
from distill.training.callbacks import Health, Samples, default_count


def drawn(folder, teacher, shards, **options):
    """A run of one step with the callback -> the method, and what the first picture shows."""
    folder.mkdir()
    method = tiny.ladd(teacher)
    loader = latents(str(shards), batch_size=2).loader(seed=0)
    tiny.trainer(folder, 1, Samples(**options)).fit(method, loader)
    captions = (folder / "samples" / "captions.txt").read_text(encoding="utf-8").splitlines()
    return captions, decode_image(read_file(str(folder / "samples" / "step_000000.png")))


def expected(teacher, captions):
    """The grid of the student as it begins, one step each, seeds 0, 1, ..."""
    network = teacher.network.trainable_copy()
    how = {"shape": teacher.latent_shape, "steps": 1}
    x0 = Consistency()(network, teacher.embed(captions), seeded(range(len(captions))), **how)
    with torch.no_grad():
        return make_grid(to_bytes(teacher.decode(x0)), nrow=8)


def test_they_are_of_the_users_prompts(teacher, shards, tmp_path):
    prompts = ["a red star", "a blue cross on black", "a red star"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
    for name, given in (("list", prompts), ("file", str(tmp_path / "prompts.txt"))):
        captions, picture = drawn(tmp_path / name, teacher, shards, prompts=given)
        assert captions == prompts
        assert (picture.int() - expected(teacher, prompts).int()).abs().max() <= 1


def test_they_are_of_captions_all_over_the_data(teacher, shards, tmp_path):
    """Twenty-four samples: every sixth of them."""
    captions, picture = drawn(tmp_path / "run", teacher, shards, count=4)
    assert captions == [tiny.CAPTIONS[i] for i in (0, 6, 12, 18)]
    assert (picture.int() - expected(teacher, captions).int()).abs().max() <= 1
    data = latents(str(shards), batch_size=2).dataset
    told = [item["caption"] for item in data.some(1000)]
    assert told == list(dict.fromkeys(tiny.CAPTIONS[:24]))


def test_large_pictures_are_fewer():
    sizes = [(64, 64), (512, 512), (512, 768), (832, 1216), (1024, 1024), (2048, 2048)]
    assert [default_count(*size) for size in sizes] == [16, 16, 8, 4, 4, 4]


def test_health_keeps_no_large_copy_of_a_large_student():
    """256 of SDXL's tensors would be 1.5 GiB; those of a small student stay the same ones."""

    class Stub:
        def __init__(self, width):
            with torch.device("meta"):
                layers = [torch.nn.Linear(width, width, bias=False) for _ in range(300)]
            self.student = torch.nn.Sequential(*layers)

    small, large = Stub(8), Stub(4096)
    chosen = Health()._chosen_parameters(small)
    assert [id(p) for p in chosen] == [id(p) for p in list(small.student.parameters())[::2]]
    kept = Health()._chosen_parameters(large)
    assert 0 < sum(p.numel() for p in kept) <= 2**26
    assert len(kept) == 3


@pytest.mark.parametrize("count", [0, "many"])
def test_a_count_is_a_number(count, command):
    code, _, err = command("run", f"callbacks.samples.count={count}")
    assert code == 1
    assert f"callbacks.samples.count={count}: must be a whole number, 1 or more" in err


def test_pictures_that_are_not_finite_later_are_not_written(teacher, shards, tmp_path, caplog):
    """The run goes on: its weights may be whole, and one picture beyond what a dtype holds."""

    class Overflowing(Samples):
        def _generate(self, trainer, pl_module, indices):
            x0 = super()._generate(trainer, pl_module, indices)
            return x0 * (float("inf") if pl_module.step else 1)

    loader = latents(str(shards), batch_size=2).loader(seed=0)
    tiny.trainer(tmp_path, 1, Overflowing(count=2)).fit(tiny.ladd(teacher), loader)
    assert [file.name for file in (tmp_path / "samples").glob("*.png")] == ["step_000000.png"]
    assert "step 1: samples/step_000001.png: 2 of 2 hold values that are not" in caplog.text
