"""Every optimiser trains, resumes bit for bit, starts a refreshed head anew, and exports the right
weights.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pretended
import tiny
from distill.storage.checkpoint_files import read_checkpoint, write_checkpoint
from distill.training import optimizers
from distill.training.loop_settings import LoopSettings, Optimizers
from distill.training.optimizers.on_host import OnHost
from test_engine import fitted

TOY = tiny.Toy()
BETAS = {"betas": (0.0, 0.99), "eps": 1e-3}
FUSED = partial(torch.optim.AdamW, lr=1e-3, fused=True, **BETAS)
KINDS = {
    "adamw8bit": partial(optimizers.adamw8bit, lr=1e-3, compile=False, **BETAS),
    "adafactor": partial(optimizers.adafactor, lr=1e-3),
    "prodigy": partial(optimizers.prodigy, d0=1e-3, weight_decay=0.01, **BETAS),
    "schedule_free": partial(optimizers.schedule_free, lr=1e-3, betas=(0.9, 0.99)),
    "muon": partial(optimizers.muon, lr=1e-3, **BETAS),
}
NEEDS = {"adamw8bit": "torchao", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
PER_TENSOR = partial(optimizers.schedule_free, lr=1e-3, betas=(0.9, 0.99), per_tensor=True)
MORE = {"heads_of_their_own_count": PER_TENSOR, "adamw": FUSED}


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(NEEDS.get(request.param, "torch"))
    return KINDS[request.param]


@pytest.fixture(params=[*KINDS, *MORE])
def any_kind(request):
    pytest.importorskip(NEEDS.get(request.param, "schedulefree"))
    return {**KINDS, **MORE}[request.param]


def method_of(make, student, heads=None, **settings):
    method = make(TOY)
    heads = heads or student
    method.loop.factories = Optimizers(student=student, discriminator=heads, fake_score=heads)
    method.loop.settings = LoopSettings(**settings)
    method.loop.start_ema(method.student)
    return method


def flat(tree):
    """Every leaf of nested dictionaries and lists, by its path."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {f"{k}.{path}": x for k, v in items for path, x in flat(v).items()}
    return {"": tree}


def held(method, trainer):
    """All that a training goes on from."""
    weights = {**tiny.weights(method.student), **tiny.weights(method.heads)}
    states = flat([o.state_dict() for o in trainer.strategy.optimizers])
    return {**weights, **flat(dict(method.ema.state_dict())), **states}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [k for k, x in a.items() if not equal(x, b[k])]


def equal(x, y):
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# -- training and resuming -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [pytest.param(tiny.ladd, marks=pytest.mark.slow), tiny.nitrofusion]
)
def test_a_run_goes_on_bit_for_bit_with_every_optimizer(make, any_kind, tmp_path):
    whole = method_of(make, any_kind)
    before = tiny.weights(whole.student)
    expected = held(whole, fitted(whole, tmp_path, 4))
    assert not tiny.same(before, tiny.weights(whole.student))
    assert all(x.isfinite().all() for x in whole.student.state_dict().values())
    first, path = method_of(make, any_kind), tmp_path / "two.ckpt"
    write_checkpoint(fitted(first, tmp_path, 2)._checkpoint_connector.dump_checkpoint(), path)
    second = method_of(make, any_kind)
    tiny.shake(second.student, 99)
    running = fitted(second, tmp_path, 4, start=2, checkpoint=path)
    assert_equal(held(second, running), expected)


def test_a_checkpoint_with_any_optimizer_holds_plain_tensors(any_kind, tmp_path):
    """So that it is read where the optimiser's package is not."""
    method, path = method_of(tiny.ladd, any_kind), tmp_path / "two.ckpt"
    write_checkpoint(fitted(method, tmp_path, 2)._checkpoint_connector.dump_checkpoint(), path)
    kept = flat(read_checkpoint(path)["optimizer_states"])
    assert {type(x) for x in kept.values()} <= {torch.Tensor, int, float, bool, str, type(None)}


def test_eight_bits_take_a_quarter_and_move_weights_nearly_as_adamw_does(tmp_path):
    pytest.importorskip("torchao")
    sizes, found = {}, {}
    for name, student in {"adamw8bit": KINDS["adamw8bit"], "adamw": FUSED}.items():
        method = method_of(tiny.ladd, student, FUSED)
        trainer = fitted(method, tmp_path, 4)
        (state,) = (s for s in trainer.optimizers[0].state_dict()["state"].values()
                    if flat(s)[_first(s)].shape == (64, 64))  # fmt: skip
        values = [x for x in flat(state).values() if isinstance(x, torch.Tensor) and x.ndim]
        sizes[name] = sum(x.numel() * x.element_size() for x in values)
        found[name] = torch.cat([p.flatten() for p in method.student.parameters()]).detach()
    assert sizes["adamw8bit"] < 0.27 * sizes["adamw"]
    start = torch.cat([p.flatten() for p in method_of(tiny.ladd, FUSED).student.parameters()])
    moved = (found["adamw"] - start).norm()
    assert (found["adamw8bit"] - found["adamw"]).norm() < 0.1 * moved


def _first(state):
    """The path of a moment of a state."""
    return next(k for k in flat(state) if k.startswith("exp_avg_sq"))


@pytest.mark.parametrize("student", ["adamw8bit", "muon", "prodigy"])
def test_student_and_discriminator_have_optimizers_of_their_own(student, tmp_path):
    pytest.importorskip(NEEDS.get(student, "torch"))
    for pair in ((KINDS[student], FUSED), (FUSED, KINDS[student])):
        method = method_of(tiny.nitrofusion, *pair)
        before = {**tiny.weights(method.student), **tiny.weights(method.heads)}
        fitted(method, tmp_path, 3)
        after = {**tiny.weights(method.student), **tiny.weights(method.heads)}
        assert not tiny.same(before, after)
        assert all(x.isfinite().all() for x in after.values())


# -- refreshed heads -------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])
def test_a_refreshed_head_starts_anew(any_kind, on_device, tmp_path):
    """Also where the student's optimiser is a fused Adam, whose update the device decides."""
    method = tiny.nitrofusion(TOY, pool={"refresh": 1.0, "size": 20})
    method.loop.factories = Optimizers(student=FUSED, discriminator=any_kind)
    more = [pretended.OnDevice(own_generators=False)] if on_device else []
    more += [m.last for m in more]
    heads = fitted(method, tmp_path, 3, callbacks=more).strategy.optimizers[1]
    state = heads.state_dict()["state"]
    left = [x for s in state.values() for x in flat(s).values()]
    assert all(float(torch.as_tensor(x).float().abs().sum()) == 0 for x in left)
    if any_kind is PER_TENSOR:
        assert {group["k"] for group in heads.param_groups} == {0}


def test_a_head_that_is_not_refreshed_keeps_its_state(any_kind, tmp_path):
    method = tiny.nitrofusion(TOY, pool={"refresh": 0.0, "size": 20})
    method.loop.factories = Optimizers(student=FUSED, discriminator=any_kind)
    trainer = fitted(method, tmp_path, 3)
    state = trainer.strategy.optimizers[1].state
    assert any(state.get(p) for p in method.heads.parameters())


# -- what is evaluated -----------------------------------------------------------------------------


def test_what_schedule_free_evaluates_is_its_own_mean(tmp_path):
    """With a decay of 0 the average is x, and x as the package computes it."""
    schedulefree = pytest.importorskip("schedulefree")
    method = method_of(tiny.ladd, KINDS["schedule_free"], ema_decay=0.0)
    trainer = fitted(method, tmp_path, 5)
    ours = trainer.strategy.optimizers[0]
    theirs = schedulefree.AdamWScheduleFree(method.student.parameters(), lr=1e-3, betas=(0.9, 0.99))
    theirs.load_state_dict(ours.state_dict())
    average, trained = dict(method.ema.state_dict()), tiny.weights(method.student)
    theirs.eval()
    assert not tiny.same(trained, tiny.weights(method.student))
    for name, value in tiny.weights(method.student).items():
        torch.testing.assert_close(average[name], value)
    with method.ema.swap():
        assert tiny.same(tiny.weights(method.student), average)


def test_looking_at_the_average_does_not_change_the_training(tmp_path):
    pytest.importorskip("schedulefree")
    found = []
    for looks in (False, True):
        method = method_of(tiny.ladd, KINDS["schedule_free"])

        class Looks(tiny.L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_, looks=looks):
                if looks:
                    with pl_module.ema.swap():
                        pass

        trainer = fitted(method, tmp_path, 4, callbacks=[Looks()])
        found.append(held(method, trainer))
    assert_equal(*found)


def test_schedule_free_needs_a_first_beta():
    pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match=r"betas=\[0.0, 0.99\].*above 0; 0.9 is usual"):
        optimizers.schedule_free(nn.Linear(2, 2).parameters(), lr=1e-3, betas=[0.0, 0.99])


def test_muon_turns_matrices_alone():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8))
    made = KINDS["muon"](network.parameters())
    network(torch.randn(64, 2, 4, 4)).square().sum().backward()
    before = tiny.weights(network)
    made.step()
    after = tiny.weights(network)
    change = (after["2.weight"] - before["2.weight"]) / 1e-3
    # An orthogonal update: its singular values are near each other, and 0.2 sqrt(16) in size.
    values = torch.linalg.svdvals(change)
    assert float(values.max() / values.min()) < 2.5
    assert float(values.mean()) == pytest.approx(0.2 * 4, rel=0.3)
    state = made.state_dict()["state"]
    assert sorted(len(s) for s in state.values()) == [1, 3, 3, 3]


# -- on the CPU ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.ladd, tiny.nitrofusion])
def test_a_state_on_the_cpu_gives_the_same_training(make, any_kind, tmp_path):
    found = []
    for where in (None, "cpu"):
        method = method_of(make, any_kind, optimizer_device=where, ema_device=where)
        found.append(held(method, fitted(method, tmp_path, 3)))
    assert_equal(*found)


def test_a_state_on_the_cpu_is_resumed(tmp_path):
    settings = {"optimizer_device": "cpu", "ema_device": "cpu"}
    whole = method_of(tiny.nitrofusion, FUSED, **settings)
    expected = held(whole, fitted(whole, tmp_path, 4))
    first, path = method_of(tiny.nitrofusion, FUSED, **settings), tmp_path / "two.ckpt"
    fitted(first, tmp_path, 2).save_checkpoint(path)
    second = method_of(tiny.nitrofusion, FUSED, **settings)
    running = fitted(second, tmp_path, 4, start=2, checkpoint=path)
    assert_equal(held(second, running), expected)


def test_nothing_of_the_state_is_where_lightning_moves_it_to_the_device():
    weight = nn.Parameter(torch.ones(64, 64))
    made = OnHost(FUSED, [weight])
    weight.square().sum().backward()
    made.step()
    assert not torch.equal(weight, torch.ones(64, 64))
    assert not made.state
    (copied,) = made.param_groups[0]["params"]
    assert copied.data_ptr() != weight.data_ptr()
    assert torch.equal(copied, weight)
    made.zero_grad()
    assert weight.grad is None


# -- commands --------------------------------------------------------------------------------------


def test_recipes_leave_other_optimizers_what_is_theirs(command, tmp_path):
    """A recipe's rates and betas are AdamW's."""
    pytest.importorskip("prodigyopt")
    run = ["run", "method=regression", "trainer.max_steps=0", "run_dir=made"]  # refused, at the end
    code, out, err = command(*run, "optimizer=adafactor")
    assert "trainer.max_steps=0" in err
    assert "takes no such key" not in err
    code, out, err = command(*run, "optimizer=prodigy")
    assert "optimizer.student.lr: 1.0, since 0.0003 is a rate of AdamW" in out + err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["optimizer=adamw8bit_bnb", "trainer.accelerator=cpu"],
            "use optimizer=adamw8bit, which is torchao's",
        ),
        (
            ["optimizer=muon", "trainer=fsdp2", "trainer.devices=2"],
            "optimizer.student: muon reads whole tensors, and trainer=fsdp2 shards them",
        ),
        (
            ["optimizer=schedule_free", "optimizer.student.betas=[0.0,0.99]"],
            "optimizer.student.betas=[0.0, 0.99]: schedule_free weighs its mean by the first",
        ),
        (
            ["loop.ema_device=cpu", "trainer=fsdp2", "trainer.devices=2"],
            "loop.ema_device=cpu: trainer=fsdp2 shards what this would move",
        ),
        (["loop.optimizer_device=gpu"], "loop.optimizer_device=gpu: must be cpu or null"),
        (["optimizer_of@optimizer.student=adamm"], "no such option (did you mean adamw?)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(words, said, command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: name == "bitsandbytes" or find(name, *a)
    )
    code, _, err = command("run", *words)
    assert code == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("adamw", "betas=[0.9]", "betas=[0.9]: must be two numbers"),
        ("adafactor", "eps=[1e-30]", "eps=[1e-30]: must be two numbers"),
        ("adafactor", "clip_threshold=0", "clip_threshold=0: must be above 0"),
        ("adafactor", "beta1=2", "beta1=2: must be from 0 to below 1"),
        ("adafactor", "decay_rate=0.8", "decay_rate=0.8: must be below 0"),
        ("adamw8bit", "block_size=0", "block_size=0: must be 1 or more"),
        ("prodigy", "eps=-1", "eps=-1: must be 0 or more"),
        ("prodigy", "d0=0", "d0=0: must be above 0"),
        ("prodigy", "growth_rate=0.5", "growth_rate=0.5: must be 1 or more, or null"),
        ("prodigy", "slice_p=0", "slice_p=0: must be 1 or more"),
        ("muon", "momentum=-1", "momentum=-1: must be from 0 to below 1"),
        ("muon", "ns_steps=200", "ns_steps=200: must be from 1 to 99"),
    ],
)
def test_a_number_that_an_optimizer_cannot_use_is_named(option, value, said, command):
    if option in NEEDS:
        pytest.importorskip(NEEDS[option])
    code, _, err = command(
        "run", f"optimizer={option}", f"optimizer.student.{value}", "run_dir=made"
    )
    assert code == 1
    assert err.strip() == f"distill: optimizer.student.{said}"
    assert not Path("made").exists()


@pytest.mark.parametrize(("option", "package"), [*NEEDS.items(), ("adamw8bit_bnb", "bitsandbytes")])
def test_an_absent_package_is_named_with_the_line_of_pip(option, package, command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    code, _, err = command("run", f"optimizer={option}", "run_dir=made")
    assert code == 1
    assert f"needs {package}, which is not installed; pip install 'distill[" in err
    assert len(err.strip().splitlines()) == 1
