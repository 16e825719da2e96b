"""All that is random in an iteration is drawn first: accumulation, several updates and both players
meet the same.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tiny
from distill.core.score_distillation import ScoreDistillation, TeacherSamples

toy = tiny.Toy()
EVERY = {"distill": ScoreDistillation(guidance=[1.0, 3.0]), "distill_weight": 1.0}
CASES = {  # name -> how to make it, its options
    "ladd": (tiny.ladd, {}),
    "ladd_shared": (tiny.ladd, {"shared": True}),
    "ladd_relativistic": (tiny.ladd, {"loss": "relativistic", **EVERY}),
    "ladd_shared_relativistic": (tiny.ladd, {"shared": True, "loss": "relativistic"}),
    "ladd_every_term": (tiny.ladd, {"r1_weight": 1e-2, "misaligned": 0.5, **EVERY}),
    "add": (tiny.add, {}),
    "add_crop": (tiny.add, {"crop": 2, "loss": "relativistic", "r1_every": 2, **EVERY}),
    "nitrofusion": (tiny.nitrofusion, {"shared": False}),
    "nitrofusion_shared": (tiny.nitrofusion, {"shared": True, "loss": "relativistic"}),
    "nitrofusion_relativistic": (
        tiny.nitrofusion,
        {
            "shared": False,
            "loss": "relativistic",
            "mixed": True,
            "refine": [0, 0],
            "one_step_prob": 0.0,
        },
    ),
    "nitrofusion_warm_start": (
        tiny.nitrofusion,
        {"shared": False, "warm_start": 2, "real": TeacherSamples(levels=[1.0, 0.5]), **EVERY},
    ),
    "dmd2": (tiny.dmd2, {"levels": [1.0, 0.75, 0.5, 0.25]}),
    "dmd2_regression": (
        tiny.dmd2,
        {"regression_weight": 0.5, "real": TeacherSamples(levels=[1.0, 0.5])},
    ),
    "regression": (tiny.regression, {}),
    "consistency": (tiny.consistency, {}),
    "dpo": (tiny.dpo, {}),
}


class Once:
    """Makes every student sample once, for both players and all updates, as a run without
    accumulation does.
    """

    def __init__(self, method):
        self.make, self.made = method.student_sample, {}

    def __call__(self, batch, draws, phase="both"):
        if id(draws) not in self.made:
            with torch.enable_grad():
                self.made[id(draws)] = draws, self.make(batch, draws)
        return self.made[id(draws)][1]


def trained(name, folder, *, updates, once=False, **options):
    make, own = CASES[name]
    method = make(toy, options=own, discriminator_updates=updates, accumulate=2, **options)
    for module in method.heads.modules():  # spectral norm counts passes
        module.training = False
    if once:
        method.student_sample = Once(method)
    tiny.trainer(folder, 3).fit(method, tiny.Stream(toy, 4).loader())
    return method


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_what_is_made_again_is_what_it_was(name, updates, tmp_path):
    again = trained(name, tmp_path, updates=updates)
    once = trained(name, tmp_path, updates=updates, once=True)
    assert tiny.same(tiny.weights(again.student), tiny.weights(once.student))
    assert tiny.same(tiny.weights(again.heads), tiny.weights(once.heads))
    before = tiny.weights(CASES[name][0](toy, options=CASES[name][1]).student)
    assert not tiny.same(before, tiny.weights(again.student))


def tensors(record) -> list[torch.Tensor]:
    """All tensors of a record, however deep."""
    if isinstance(record, torch.Tensor):
        return [record]
    if dataclasses.is_dataclass(record):
        record = [getattr(record, field.name) for field in dataclasses.fields(record)]
    inner = record.values() if isinstance(record, dict) else record
    return [t for part in inner for t in tensors(part)] if isinstance(inner, list | tuple) else []


@pytest.mark.parametrize("name", CASES)
def test_both_records_are_frozen_and_a_player_gets_what_both_get(name):
    make, own = CASES[name]
    method = make(toy, options=own, discriminator_updates=2)
    batch = tiny.simple_batch(method, 4)
    draws, fake = tiny.drawn(method, batch)
    for record in (draws, fake):
        assert type(record).__dataclass_params__.frozen
        assert not any(isinstance(value, dict) for value in vars(record).values())
    for players in ("discriminator", "student"):
        state = torch.get_rng_state()
        alone = method.student_sample(batch, draws, players)
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn any more
        for field in dataclasses.fields(fake):
            if part := tensors(getattr(alone, field.name)):
                pairs = zip(part, tensors(getattr(fake, field.name)), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", [name for name in CASES if name != "regression"])
def test_iterations_micro_batches_and_ranks_draw_other_numbers(name):
    make, own = CASES[name]
    method = make(toy, options=own, discriminator_updates=2)
    batch = tiny.simple_batch(method, 4)
    first, again, other = (
        tensors([method.draw(batch, method.loop.streams(method, i))]) for i in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # Levels may repeat, and those that all ranks share do; noise is another's.
    noise = [i for i, x in enumerate(first) if x.ndim == 4 and x.shape[1:] == toy.shape]
    noise = [i for i in noise if batch.noise is None or not torch.equal(first[i], batch.noise)]
    assert noise
    assert not any(torch.equal(first[i], other[i]) for i in noise)


def test_each_update_of_the_discriminator_reads_unshared_real_samples_anew():
    """LADD's, under noise of their own in every update; NitroFusion's once an iteration, as t*
    is.
    """
    ladd = tiny.ladd(toy, discriminator_updates=2)
    batch = tiny.simple_batch(ladd, 4)
    draws, _ = tiny.drawn(ladd, batch)
    looks = [draws.renoising, *draws.real_renoising]
    assert len(looks) == 3
    assert not any(torch.equal(looks[i].noise, looks[i - 1].noise) for i in range(3))
    shared = tiny.ladd(toy, options={"shared": True}, discriminator_updates=2)
    draws, _ = tiny.drawn(shared, batch)
    assert draws.real_renoising == (draws.renoising, draws.renoising)
    nitro = tiny.nitrofusion(toy, options={"shared": False}, discriminator_updates=2)
    draws, _ = tiny.drawn(nitro, batch)
    assert not torch.equal(draws.noise, draws.real_noise)


def test_features_change_real_and_fake_pictures_alike_whenever_they_are_asked(teachers):
    method = tiny.add(teachers("mmdit"))
    method.feature_network.augment = True
    batch = tiny.simple_batch(method, 2)
    draws, fake = tiny.drawn(method, batch)
    again = method.student_sample(batch, draws, "student")
    assert all(
        torch.equal(a, b) for a, b in zip(fake.fake_features, again.fake_features, strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(fake.real_features, again.real_features, strict=True)
    )
    assert draws.augment_seeds[0] != draws.augment_seeds[1]
