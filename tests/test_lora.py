"""A LoRA student: student, teacher and feature network are one network, and each pass has the
adapters as it should.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoPipelineForText2Image

import tiny
from distill import students
from distill.data import source
from distill.sampling import Consistency
from distill.students.lora import layers, lora, merged
from families import teacher_at
from test_engine import assert_same_state, state
from test_methods import METHODS, untouched, with_gradient

T = torch.tensor([1.0, 0.5])


@pytest.fixture
def fresh(family, pipelines):
    """Makes a teacher of its own for every student: the adapters are put into it."""
    return lambda **options: teacher_at(pipelines(family), **options)


def base_weights(teacher):
    """The teacher's own tensors, by the names they have without adapters."""
    found = tiny.weights(teacher.network.model)
    return {k.replace(".base_layer", ""): v for k, v in found.items() if "lora" not in k}


def inputs(teacher):
    cond = teacher.embed(tiny.CAPTIONS[:2])
    return (
        torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1)),
        T,
        cond,
    )


# -- one network in three roles --------------------------------------------------------------------


def test_a_student_is_its_adapters_and_begins_as_the_teacher(fresh, teacher):
    base = fresh()
    student, x = lora(base, rank=4), inputs(teacher)
    assert student.model is base.network.model
    names = [name for name, _ in student.named_parameters()]
    assert set(names) == set(student.state_dict())
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    own = {id(p) for p in student.parameters()}
    assert [p for p in base.parameters() if p.requires_grad and id(p) not in own] == []
    with torch.no_grad():
        expected = teacher.x0(*x)
        assert torch.equal(student.x0(*x), expected)
        tiny.shake(student, 3)
        assert torch.equal(base.x0(*x), expected)  # the adapters are on within the student alone
        assert not torch.allclose(student.x0(*x), expected, atol=1e-2)
        maps = teacher.features(*x, teacher.blocks)
        assert all(
            torch.equal(a, b) for a, b in zip(base.features(*x, base.blocks), maps, strict=True)
        )
        assert torch.equal(base.x0(*x), expected)


def test_an_error_inside_a_pass_turns_the_adapters_off_again(fresh):
    base = fresh()
    student, x = tiny.shake(lora(base, rank=4), 3), inputs(base)
    before = base.x0(*x)
    with pytest.raises(ValueError, match="no such taps"):
        student.features(*x, ["nowhere"])
    with pytest.raises(RuntimeError):
        student.x0(x[0][:, :1], *x[1:])
    assert torch.equal(base.x0(*x), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_two_networks(checkpointing, fresh, teacher):
    """The reference is a student with weights of its own, and a teacher of its own; B A of it by
    the chain rule.
    """
    base = fresh()
    student = tiny.shake(lora(base, rank=4, checkpointing=checkpointing), 3)
    apart = teacher.network.with_model(merged(student)).requires_grad_(True)
    x_t, t, cond = inputs(teacher)

    def backward(denoiser, of):
        x0 = denoiser.x0(x_t, t, cond)
        of.x0(x_t, t, cond)  # a pass of the teacher between the student's and its backward pass
        sum(m.square().mean() for m in of.features(x0, t, cond, of.blocks)).backward()

    backward(student, base)
    backward(apart, teacher)
    found, weights = layers(student.model), dict(apart.model.named_parameters())
    assert len(found) > 10
    for name, layer in found.items():
        gradient = weights[f"{name}.weight"].grad
        a, b = (side["default"].weight for side in (layer.lora_A, layer.lora_B))
        gradient = torch.zeros_like(weights[f"{name}.weight"]) if gradient is None else gradient
        expected = b.flatten(1).T @ gradient.flatten(1)
        none = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(
            none.flatten(1),
            expected,
            rtol=2e-3,
            atol=1e-5 * float(1 + expected.detach().abs().max()),
        )
    assert untouched_base(base)


def untouched_base(teacher):
    return all(p.grad is None for name, p in teacher.named_parameters() if "lora" not in name)


def test_blocks_are_computed_again_as_they_were(fresh):
    """And the test can tell: without what is held, the second computation is that of another
    network.
    """
    base = fresh()
    student = tiny.shake(lora(base, rank=4, checkpointing=True), 3)
    x_t, t, cond = inputs(base)

    def gradient():
        student.zero_grad()
        student.x0(x_t, t, cond).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    right = gradient()
    student.context_savers.clear()
    try:
        wrong = gradient()
    except torch.utils.checkpoint.CheckpointError:  # other tensors were saved than the first time
        return
    assert not torch.allclose(wrong, right, rtol=1e-2)


def test_a_full_student_may_compute_its_activations_again(teacher):
    x_t, t, cond = inputs(teacher)

    def gradient(**options):
        student = students.full(teacher, **options)
        student.x0(x_t, t, cond).square().mean().backward()
        assert student.model.is_gradient_checkpointing == bool(options)
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    plain = gradient()
    assert tiny.same(gradient(checkpointing=True), plain)
    assert not teacher.network.model.is_gradient_checkpointing


def test_the_frozen_network_may_be_half(fresh):
    base = fresh(dtype="bfloat16")
    student, x = lora(base, rank=4), inputs(base)
    assert base.network.model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in student.parameters())
    student.x0(*x).square().mean().backward()
    assert with_gradient(student) > 0
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in student.parameters())


def test_layers_rank_and_scale_are_chosen(fresh, family):
    student = lora(fresh(), rank=2, alpha=6, targets=["to_q", "to_v"], init="gaussian")
    found = layers(student.model)
    assert {name.rpartition(".")[2] for name in found} == {"to_q", "to_v"}
    assert all(
        layer.scaling["default"] == 3 and layer.r["default"] == 2 for layer in found.values()
    )
    for options, what in (
        ({"rank": 0}, r"student\.rank=0"),
        ({"init": "pissa"}, r"student\.init=pissa"),
        ({"targets": []}, r"student\.targets=\[\]: names no layer, so nothing would be trained"),
        ({"targets": ["nowhere"]}, r"student\.targets=\['nowhere'\]: cannot be adapted"),
        ({"shift": 0}, r"student\.shift=0"),
    ):
        with pytest.raises(ValueError, match=what):
            lora(fresh(), **options)


# -- in training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), tiny.on_either(METHODS))
def test_gradients_go_where_they_should(name, fresh):
    make, options, *_ = METHODS[name]
    method = make(fresh(), options=options, lora={"rank": 4})
    batch = tiny.simple_batch(method)
    draws, fake = tiny.drawn(method, batch)
    assert fake.x0_hat.requires_grad
    if method.has_discriminator:
        sum(method.discriminator_loss(batch, draws, fake).terms.values()).backward()
        assert untouched(method.student)
        assert with_gradient(method.heads) > 0
        method.heads.zero_grad()
    method.heads.requires_grad_(False)
    sum(method.student_loss(batch, draws, fake).terms.values()).backward()
    assert with_gradient(method.student) >= 0.4 * len(
        list(method.student.parameters())
    )  # of A none, as B is 0
    assert untouched(method.heads)
    assert untouched_base(method.teacher)


@pytest.mark.parametrize(
    "name", [m if m == "ladd" else pytest.param(m, marks=pytest.mark.slow) for m in tiny.METHODS]
)
def test_training_moves_the_adapters_alone_and_goes_on_where_it_stopped(
    name, fresh, tmp_path, shards
):
    def method():
        return tiny.METHODS[name](fresh(), lora={"rank": 4})

    def trained(method, steps, start=0, checkpoint=None):
        running = tiny.trainer(tmp_path, steps)
        loader = source.latents(str(shards), batch_size=2).loader(seed=0, start=start)
        running.fit(method, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return running

    whole = method()
    before, adapters = base_weights(whole.teacher), tiny.weights(whole.student)
    expected = state(whole, trained(whole, 4))
    assert tiny.same(base_weights(whole.teacher), before)
    assert not any(
        torch.equal(adapters[k], v)
        for k, v in expected["student"].items()
        if "lora_B" in k and v.any()
    )
    first, path = method(), tmp_path / "two.ckpt"
    trained(first, 2).save_checkpoint(path)
    kept = torch.load(path, weights_only=True)
    names = {f"student.{name}" for name in expected["student"]}
    assert {k for k in kept["state_dict"] if k.startswith("student.")} == names
    assert set(kept["distill"]["ema"]) == set(expected["student"])
    assert kept["optimizer_states"][0]["param_groups"][0]["params"] == list(range(len(names)))
    second = method()
    tiny.shake(second.student, 99)
    assert_same_state(state(second, trained(second, 4, start=2, checkpoint=path)), expected)


def test_what_is_left_behind_is_an_ordinary_pipeline(family, fresh, tmp_path):
    base = fresh()
    student = tiny.shake(lora(base, rank=4), 3)
    folder = students.save_pipeline(
        student, base, tmp_path / "student", Consistency().scheduler(student, base)
    )
    loaded, x = teacher_at(folder), inputs(base)
    names = {
        k.replace(".base_layer", "") for k in tiny.weights(base.network.model) if "lora" not in k
    }
    assert set(tiny.weights(loaded.network.model)) == names
    with torch.no_grad():
        expected = student.x0(*x)
        torch.testing.assert_close(
            loaded.x0(*x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
    AutoPipelineForText2Image.from_pretrained(folder)
