"""The training step that all methods share: what counts as a step, accumulation, clipping,
averages, exact resume.
"""

from __future__ import annotations

import math
import os
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

import tiny
from distill.config.build import unsharded_models
from distill.core import randomness
from distill.data import source
from distill.storage import checkpoint_files
from distill.training.callbacks import Health
from distill.training.checkpoints import Checkpoints
from distill.training.csv_logger import CsvLog
from distill.training.loop_settings import LoopSettings, Optimizers

toy = tiny.Toy()
METHODS = [pytest.param(make, id=name) for name, make in tiny.METHODS.items()]


def fitted(method, folder, steps, *, size=4, start=0, checkpoint=None, callbacks=()):
    """The trainer, after training on the toy's stream from batch `start` on."""
    running = tiny.trainer(folder, steps, *callbacks)
    loader = tiny.Stream(toy, size, start).loader()
    running.fit(method, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return running


class EachIteration(L.Callback):
    """Copies of what the method holds after every iteration."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        average = {name: value.clone() for name, value in pl_module.ema.state_dict().items()}
        self.seen.append(
            {
                "iteration": pl_module.loop.iteration,
                "step": pl_module.step,
                "global_step": trainer.global_step,
                "student": tiny.weights(pl_module.student),
                "heads": tiny.weights(pl_module.heads),
                "ema": average,
            }
        )


def test_a_step_is_a_student_update(tmp_path):
    method, log = tiny.ladd(toy, discriminator_updates=2, head_start=3), EachIteration()
    updates = {"d": 0, "g": 0}
    update = method.loop.clip_and_step

    def counting(owner, player, *args):
        updates[player] += 1
        return update(owner, player, *args)

    method.loop.clip_and_step = counting
    running = fitted(method, tmp_path, 4, callbacks=[log])
    assert [seen["step"] for seen in log.seen] == [0, 0, 0, 1, 2, 3, 4]
    assert [seen["global_step"] for seen in log.seen] == [0, 0, 0, 1, 2, 3, 4]
    assert updates == {"d": 14, "g": 4}
    assert (running.global_step, method.step, method.loop.iteration, method.loop.images_seen) == (
        4,
        4,
        7,
        28,
    )


def test_head_start_trains_the_heads_alone(tmp_path):
    method, log = tiny.ladd(toy, head_start=3), EachIteration()
    student, heads, average = (
        tiny.weights(method.student),
        tiny.weights(method.heads),
        dict(method.ema.state_dict()),
    )
    average = {name: value.clone() for name, value in average.items()}
    fitted(method, tmp_path, 2, callbacks=[log])
    for seen in log.seen[:3]:
        assert tiny.same(seen["student"], student)
        assert tiny.same(seen["ema"], average)
        assert not tiny.same(seen["heads"], heads)
    assert not tiny.same(log.seen[3]["student"], student)
    assert not tiny.same(log.seen[3]["ema"], average)


def test_what_is_logged_is_that_of_the_last_update(tmp_path):
    """Two updates at rate 0 log what one does, and not their sum."""

    def logged(**options):
        method = tiny.ladd(toy)
        still = {
            name: lambda p: torch.optim.SGD(p, lr=0.0) for name in ("student", "discriminator")
        }
        method.loop.factories = Optimizers(**still)
        method.loop.settings = LoopSettings(**options)
        fitted(method, tmp_path, 1)
        return method.loop.last_logged["d/adv"]

    assert logged(discriminator_updates=2) == pytest.approx(
        logged(), rel=0.2
    )  # real samples get noise of their own


def test_average_moves_once_a_step_by_its_formula(tmp_path):
    method, log = tiny.ladd(toy, ema_decay=0.5, discriminator_updates=2), EachIteration()
    average = {name: value.clone() for name, value in method.ema.state_dict().items()}
    fitted(method, tmp_path, 4, callbacks=[log])
    for seen in log.seen:
        decay = method.ema.decay_at(
            seen["step"] - 1
        )  # the average counts from 0 and is moved after the update
        average = {
            name: decay * value + (1 - decay) * seen["student"][name]
            for name, value in average.items()
        }
        for name, value in average.items():
            torch.testing.assert_close(seen["ema"][name], value, rtol=1e-5, atol=1e-7)


def test_accumulated_gradient_is_the_mean_over_micro_batches(tmp_path):
    """Noise is drawn per micro-batch, so the reference is computed here, phase by phase, with the
    same generators.
    """
    method = tiny.ladd(toy, accumulate=2, clip_student=1e9, clip_discriminator=1e9)
    seen = {}
    update = method.loop.clip_and_step

    def spy(owner, player, module, optimizer, limit):
        seen[player] = [p.grad.clone() for p in module.parameters()]
        return update(owner, player, module, optimizer, limit)

    method.loop.clip_and_step = spy
    fitted(method, tmp_path, 1)

    reference = tiny.ladd(toy, accumulate=2)
    stream = tiny.toy_batches(toy, 4)
    batches = [reference.loop.prepare_batch(reference, next(stream)) for _ in range(2)]

    def mean_gradient(module, losses):
        grads = []
        for loss in losses:
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
        return [(a + b) / 2 for a, b in zip(*grads, strict=True)]

    def drawn(i):
        return tiny.drawn(reference, batches[i], i)

    losses = [reference.discriminator_loss(batches[i], *drawn(i)).terms for i in range(2)]
    of_heads = mean_gradient(reference.heads, [sum(terms.values()) for terms in losses])
    torch.testing.assert_close(seen["d"], of_heads, rtol=1e-4, atol=1e-7)
    reference.heads.load_state_dict(
        method.heads.state_dict()
    )  # the student meets the heads after their update
    losses = [reference.student_loss(batches[i], *drawn(i)).terms for i in range(2)]
    of_student = mean_gradient(reference.student, [sum(terms.values()) for terms in losses])
    assert any(g.abs().max() > 1e-4 for g in of_student)
    torch.testing.assert_close(seen["g"], of_student, rtol=1e-4, atol=1e-7)
    assert (method.step, method.loop.images_seen) == (1, 8)


def test_micro_batches_do_not_share_their_noise():
    method = tiny.ladd(toy, accumulate=2)
    drawn = [
        torch.randn(8, generator=method.loop.streams(method, micro).sample) for micro in (0, 1, 0)
    ]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    keys = ((7, 0, 0, stream) for stream in (-2, -1, 0, 1, 2))
    streams = [torch.randn(8, generator=randomness.generator(*key)) for key in keys]
    method.loop.iteration = 1
    streams.append(torch.randn(8, generator=randomness.generator(7, 1, 0, randomness.SAMPLE)))
    assert len({tuple(x.tolist()) for x in streams}) == 6


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_clipping_is_by_the_norm_of_all_gradients(player, tmp_path):
    """With plain SGD at rate 1 the change of the weights is the clipped gradient itself."""
    limit = 1e-4

    def change(**clip):
        method = tiny.ladd(toy)
        rates = {"student": 0.0, "discriminator": 0.0} | {player: 1.0}
        sgd = {
            name: lambda p, rate=rate: torch.optim.SGD(p, lr=rate) for name, rate in rates.items()
        }
        options = {"clip_student": 1e9, "clip_discriminator": 1e9} | clip
        method.loop.factories = Optimizers(**sgd)
        method.loop.settings = LoopSettings(**options)
        module = method.student if player == "student" else method.heads
        before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        fitted(method, tmp_path, 1)
        return torch.nn.utils.parameters_to_vector(module.parameters()).detach() - before

    free, clipped = change(), change(**{f"clip_{player}": limit})
    assert free.norm() > 10 * limit
    assert clipped.norm().item() == pytest.approx(limit, rel=1e-2)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({}, 0, 1.0),
        ({}, 99, 1.0),
        ({"warmup_steps": 10}, 0, 0.1),
        ({"warmup_steps": 10}, 4, 0.5),
        ({"warmup_steps": 10}, 9, 1.0),
        ({"warmup_steps": 10}, 50, 1.0),
        ({"schedule": "cosine"}, 0, 1.0),
        ({"schedule": "cosine"}, 50, 0.5),
        ({"schedule": "cosine"}, 25, (1 + math.sqrt(0.5)) / 2),
        ({"schedule": "cosine"}, 100, 0.0),
        ({"schedule": "cosine", "final_rate": 0.2}, 50, 0.6),
        ({"schedule": "cosine", "final_rate": 0.2}, 100, 0.2),
        ({"schedule": "cosine", "final_rate": 0.2}, 500, 0.2),
        ({"schedule": "cosine", "warmup_steps": 100}, 50, 0.51 * 0.5),
    ],
)
def test_rate_in_closed_form(options, step, expected):
    assert LoopSettings(**options).rate(step, 100, step) == pytest.approx(expected, abs=1e-9)


def test_the_discriminator_warms_up_in_its_head_start(tmp_path):
    method, rates = (
        tiny.ladd(toy, critic_rate=4e-3, head_start=3, warmup_steps=4),
        {"g": [], "d": []},
    )
    update = method.loop.clip_and_step
    method.loop.clip_and_step = lambda owner, player, module, optimizer, limit: (
        update(owner, player, module, optimizer, limit),
        rates[player].append(optimizer.param_groups[0]["lr"]),
    )[0]
    fitted(method, tmp_path, 2)
    assert rates["d"] == pytest.approx([4e-3 * share for share in (0.25, 0.5, 0.75, 1, 1)])
    assert rates["g"] == pytest.approx([1e-3 * share for share in (0.25, 0.5)])


def test_only_the_last_of_accumulated_batches_moves_the_student(tmp_path):
    """What callbacks do at a step they do once, and the change that they measure is that of the
    whole update.
    """
    method, told, ratios = tiny.ladd(toy, accumulate=3), [], []

    class Told(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            told.append((pl_module.step, pl_module.loop.updated))

    class Logger(DummyLogger):
        def log_metrics(self, metrics, step):
            ratios.extend(
                (step, value) for key, value in metrics.items() if key == "g/update_ratio"
            )

    running = tiny.trainer(tmp_path, 4, Health(every=2), Told())
    running.loggers = [Logger()]
    running.fit(method, tiny.Stream(toy, 4).loader())
    assert told == [(i // 3, i % 3 == 0) for i in range(1, 13)]
    assert [step for step, _ in ratios] == [1, 3]
    assert all(ratio > 1e-6 for _, ratio in ratios)


def test_rate_reaches_both_optimisers(tmp_path):
    method = tiny.ladd(
        toy, rate=1e-3, critic_rate=4e-3, schedule="cosine", final_rate=0.1, warmup_steps=2
    )
    rates = []
    update = method.loop.clip_and_step

    def spy(owner, player, module, optimizer, limit):
        updated = update(owner, player, module, optimizer, limit)
        rates.append((player, optimizer.param_groups[0]["lr"]))
        return updated

    method.loop.clip_and_step = spy
    fitted(method, tmp_path, 4)
    shares = [method.loop.settings.rate(step, 4, step) for step in range(4)]
    assert [rate for player, rate in rates if player == "g"] == pytest.approx(
        [1e-3 * share for share in shares]
    )
    assert [rate for player, rate in rates if player == "d"] == pytest.approx(
        [4e-3 * share for share in shares]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "loop.schedule=linear"),
        ({"accumulate": 0}, "loop.accumulate=0"),
        ({"discriminator_updates": 0}, "loop.discriminator_updates=0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoopSettings(**options)


# -- checkpoints and resume ------------------------------------------------------------------------


@pytest.mark.parametrize("make", METHODS)
def test_checkpoint_holds_the_players_alone_and_no_code(make, teacher, tmp_path, shards):
    method = make(teacher)
    running = tiny.trainer(tmp_path, 1)
    running.fit(method, source.latents(str(shards), batch_size=2).loader(seed=0))
    path = tmp_path / "one.ckpt"
    running.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)
    expected = {f"student.{name}" for name in method.student.state_dict()}
    expected |= {f"heads.{name}" for name in method.heads.state_dict()}
    fake_score = method.fake_score or torch.nn.Identity()
    expected |= {f"fake_score.{name}" for name in fake_score.state_dict()}
    assert set(kept["state_dict"]) == expected
    # the names that checkpoints of all versions have: without them old runs would not go on
    assert set(kept["distill"]) == {"iteration", "images_seen", "skipped", "ema"}
    assert set(kept["distill"]["ema"]) == {name for name, _ in method.student.named_parameters()}
    assert len(kept["optimizer_states"]) == 1 + len(method.opponents)
    students = sum(p.numel() for p in method.student.parameters())
    opponents = [*method.heads.parameters(), *fake_score.parameters()]
    heads = sum(p.numel() for p in opponents)
    numbers = 4 * students + 3 * heads  # weights and two moments each, and the student's average
    numbers += sum(b.numel() for b in method.heads.buffers())
    assert path.stat().st_size < 1.1 * 4 * numbers + 300_000


def state(method, running):
    """All that training carries on."""
    optimizers = [o.state_dict() for o in running.strategy.optimizers]
    return {
        "student": tiny.weights(method.student),
        "heads": tiny.weights(method.heads),
        "fake_score": tiny.weights(method.fake_score or torch.nn.Identity()),
        "ema": method.ema.state_dict(),
        "optimizers": [
            {
                f"{i}.{name}": torch.as_tensor(value)
                for i, s in o["state"].items()
                for name, value in s.items()
            }
            for o in optimizers
        ],
        "rates": [group["lr"] for o in optimizers for group in o["param_groups"]],
        "counts": (
            method.loop.iteration,
            method.step,
            method.loop.images_seen,
            running.global_step,
        ),
    }


def assert_same_state(a, b):
    for name in ("student", "heads", "fake_score", "ema"):
        assert tiny.same(a[name], b[name]), name
    for one, other in zip(a["optimizers"], b["optimizers"], strict=True):
        assert len(one) > 0
        assert tiny.same(one, other)
    assert a["rates"] == b["rates"]
    assert a["counts"] == b["counts"]


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_start": 2, "discriminator_updates": 2},
        {"accumulate": 2, "schedule": "cosine", "warmup_steps": 4},
    ],
    ids=["plain", "head_start", "accumulate"],
)
def test_resumed_run_is_the_uninterrupted_one(make, options, tmp_path):
    whole = make(toy, **options)
    expected = state(whole, fitted(whole, tmp_path, 6))

    class Killed(L.Callback):
        """Saves after step 3 and stops, as a run that is killed then: its schedule still reaches to
        step 6.
        """

        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.step == 3:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                trainer.should_stop = True

    fitted(make(toy, **options), tmp_path, 6, callbacks=[Killed()])
    torch.manual_seed(12345)  # the rest must not depend on the global state
    kept = torch.load(tmp_path / "killed.ckpt", weights_only=True)["distill"]
    resumed = make(toy, seed=0, **options)
    tiny.shake(resumed.student, 99)  # what the checkpoint does not bring back would show
    tiny.shake(resumed.heads, 98)
    start = kept["iteration"] * options.get("accumulate", 1)
    running = fitted(resumed, tmp_path, 6, start=start, checkpoint=tmp_path / "killed.ckpt")
    assert_same_state(state(resumed, running), expected)


@pytest.mark.parametrize(("name", "family"), tiny.on_either(tiny.METHODS))
def test_resumed_run_on_a_pipeline_is_the_uninterrupted_one(name, teacher, tmp_path, shards):
    make = tiny.METHODS[name]
    data = source.latents(str(shards), batch_size=2)
    whole = make(teacher)
    running = tiny.trainer(tmp_path, 6)
    running.fit(whole, data.loader(seed=0))
    expected = state(whole, running)

    first = make(teacher)
    running = tiny.trainer(tmp_path, 3)
    running.fit(first, data.loader(seed=0))
    path = tmp_path / "three.ckpt"
    running.save_checkpoint(path)
    assert not tiny.same(tiny.weights(first.student), expected["student"])

    second = make(teacher)
    running = tiny.trainer(tmp_path, 6)
    running.fit(second, data.loader(seed=0, start=3), ckpt_path=path, weights_only=True)
    assert_same_state(state(second, running), expected)


def test_another_seed_is_another_run(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        method = tiny.ladd(toy)
        method.loop.seed = seed
        fitted(method, tmp_path, 2)
        runs.append(tiny.weights(method.student))
    assert tiny.same(runs[0], runs[1])
    assert not tiny.same(runs[0], runs[2])


def test_what_comes_after_training_is_where_the_teacher_is():
    """Lightning takes what it has trained back to the CPU, and a network that was cut up is made
    anew there.
    """

    class Part(torch.nn.Module):
        device = torch.device("meta")

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

    method = SimpleNamespace(teacher=Part(), student=Part(), sharded=False)
    for part in unsharded_models(None, method, {}):
        assert part.weight.is_meta


def test_what_was_logged_before_a_checkpoint_is_written_with_it(tmp_path):
    """A killed run goes on behind it, and would not log it again."""
    logger, checkpoints = CsvLog(str(tmp_path)), Checkpoints(every=3)
    checkpoints.folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        logger.log_metrics({"g/adv": 0.5}, step)
    loop = SimpleNamespace(due=lambda every, last: True, settle=lambda: None, last_logged={})
    method = SimpleNamespace(step=3, loop=loop)
    saved = {
        "loggers": [logger],
        "save_checkpoint": lambda path: checkpoint_files.write_checkpoint({}, path),
        "is_global_zero": True,
        "strategy": SimpleNamespace(checkpoint_io=None),
    }
    trainer = SimpleNamespace(
        world_size=1, should_stop=False, max_steps=9, callback_metrics={}, **saved
    )
    checkpoints.on_train_batch_end(trainer, method)
    assert (checkpoints.folder / "step_000003.ckpt").exists()
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines() == [
        "step,g/adv",
        "1,0.5",
        "2,0.5",
        "3,0.5",
    ]


def test_processes_tell_each_other_of_a_signal_on_their_own_device(tmp_path):
    """NCCL knows no tensor of the CPU."""
    told = []

    class Strategy:
        def reduce(self, tensor, reduce_op):
            told.append((tensor.device.type, reduce_op))
            return torch.zeros(())

    trainer = SimpleNamespace(world_size=2, strategy=Strategy(), should_stop=False, max_steps=9)
    loop = SimpleNamespace(due=lambda every, last: False, signalled=False)
    method = SimpleNamespace(device=torch.device("meta"), loop=loop)
    checkpoints = Checkpoints()
    checkpoints._save = lambda *_: told.append("saved")
    checkpoints.on_train_batch_end(trainer, method)
    assert told == []  # until a row of values brings the news, nobody asks
    loop.signalled = True
    checkpoints.on_train_batch_end(trainer, method)
    assert told == [("meta", "max"), "saved"]
    assert not loop.signalled


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_training_does_not_stop_by_the_signal_of_the_first(tmp_path):
    """Neither alone nor with other ranks, which learn of it from the rows of the loop."""
    method, checkpoints, steps = tiny.ladd(tiny.Toy()), Checkpoints(), []
    checkpoints.folder = tmp_path / "checkpoints"

    class Stop(L.Callback):
        def on_train_batch_start(self, *_):
            if method.step == 1:
                signal.raise_signal(signal.SIGTERM)

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            steps.append((method.step, method.loop.own_signal))

    loader = tiny.Stream(method.teacher, 4).loader()
    tiny.trainer(tmp_path, 4, Stop(), checkpoints).fit(method, loader)
    assert (method.step, checkpoints.stopped_by) == (2, signal.SIGTERM)
    tiny.trainer(tmp_path, 3, Count(), checkpoints).fit(method, loader)
    assert steps == [(2, 0), (3, 0), (4, 0)]
    assert checkpoints.stopped_by is None
