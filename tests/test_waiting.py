"""Nothing waits for the device: between logged steps a training reads no value of it.

A pretended device counts the reads (see `pretended`), and what it computes is compared with the
CPU, on which a gradient that is not finite is seen at once.
"""

from __future__ import annotations

import copy
import logging
from functools import partial

import lightning as L
import pytest
import torch

import pretended
import tiny
from distill.core import randomness
from distill.core.process import RectifiedFlow, level_like
from distill.core.score_distillation import ScoreDistillation, ScoreDraws, guided_x0
from distill.core.times import Discrete, LogitNormal
from distill.core.transfers import Later, host_values, send
from distill.core.types import Cond
from distill.teachers.silent_token_attention import set_silent_token_attention, token_weights
from distill.training.callbacks import Alarms, Health, Progress
from distill.training.checkpoints import Checkpoints
from distill.training.csv_logger import CsvLog
from distill.training.loop_settings import Optimizers
from distill.training.updates import Row

BATCHES = [
    {
        "x0": torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(i)),
        "caption": tiny.CAPTIONS[4 * i : 4 * i + 4],
    }
    for i in range(40)
]
TOY = tiny.Toy()
NFSD = {"distill": ScoreDistillation(kind="nfsd", guidance=2.0), "negative": "a blur"}
slow = partial(pytest.param, marks=pytest.mark.slow)  # one of each method is in every run
TRAININGS = [  # method, its options, and its teacher
    slow("ladd", {}, "mmdit"),
    slow("ladd", {}, "sdxl"),
    ("ladd", {"r1_weight": 1e-2, "distill_weight": 1.0, "misaligned": 0.5}, "unet"),
    slow("ladd", {"loss": "relativistic", "shared": True}, "mmdit"),
    slow("add", {}, "unet"),
    ("add", {"crop": 8, "distill": ScoreDistillation(guidance=(1.0, 3.0))}, "mmdit"),
    slow("add", NFSD, "unet"),
    slow("nitrofusion", {}, "mmdit"),
    ("nitrofusion", {"mixed": True, "shared": False}, "unet"),
    slow("nitrofusion", {"refine": [0, 0], "one_step_prob": 0.0}, "sdxl"),
    slow("nitrofusion", {"warm_start": 9, "heads_lead": 7, "pairs_weight": 0.0}, "unet"),
    ("dmd2", {"levels": [1.0, 0.75, 0.5, 0.25]}, "mmdit"),
    slow("dmd2", {}, "sdxl"),
    ("regression", {}, "unet"),
    ("consistency", {}, "mmdit"),
    ("dpo", {}, "unet"),
]

CPU = torch.device("cpu")


@pytest.fixture
def teachers(teachers):
    """Copies, since what the pretended device does to a teacher would reach later tests."""
    return lambda *names, **options: copy.deepcopy(teachers(*names, **options))


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.0, 0.99), eps=1e-3, fused=True)


def method_of(name, teacher, options=None, **settings):
    method = tiny.METHODS[name](teacher, options=options, **settings)
    method.loop.factories = Optimizers(student=fused, discriminator=fused, fake_score=fused)
    return method


def trained(method, folder, steps, *callbacks, on_device=None, start=0, checkpoint=None, every=99):
    """The trainer and, by iteration, what the device has seen; None for a training on the CPU."""
    folder.mkdir(exist_ok=True)
    more = [] if on_device is None else [on_device, *callbacks, on_device.last]
    trainer = tiny.trainer(folder, steps, *(more or callbacks))
    trainer.log_every_n_steps, trainer.loggers = every, [CsvLog(str(folder))]
    loader = torch.utils.data.DataLoader(BATCHES[start:], batch_size=None)
    if method.teacher is TOY:
        loader = tiny.Stream(TOY, 4, start).loader()
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    from families import teacher_at

    return teacher_at(tiny.write_pipeline("sdxl", tmp_path_factory.mktemp("sdxl") / "sdxl"))


def spoil(method, bad, player="student"):
    """Make a player's loss NaN in these iterations."""
    name = f"{player}_loss"
    found = getattr(method, name)

    def loss(*args):
        losses = found(*args)
        if method.loop.iteration not in bad:
            return losses
        terms = {name: value * float("nan") for name, value in losses.terms.items()}
        return type(losses)(terms, losses.metrics)

    setattr(method, name, loss)


# -- reads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "family"), TRAININGS)
def test_an_iteration_reads_nothing_of_the_device(name, options, family, teachers, sdxl, tmp_path):
    teacher = sdxl if family == "sdxl" else teachers(family)
    method, on_device = method_of(name, teacher, options), pretended.OnDevice()
    trained(method, tmp_path, 5, on_device=on_device)
    assert method.step == 5
    assert [dict(seen.reads) for seen in on_device.seen[1:]] == [{}] * 4
    # Tokenizers, whose pipelines copy the ids, and nothing of ours.
    uploads = {place for seen in on_device.seen[1:] for place in seen.uploads}
    assert all("encode_prompt" in pretended.line(place) for place in uploads)


@pytest.mark.slow
def test_accumulation_and_several_updates_read_nothing(teachers, tmp_path):
    settings = {"accumulate": 2, "discriminator_updates": 2, "head_start": 2}
    method = method_of("ladd", teachers("mmdit"), **settings)
    trained(method, tmp_path, 4, on_device=(on_device := pretended.OnDevice()))
    assert [dict(seen.reads) for seen in on_device.seen[1:]] == [{}] * 11


@pytest.mark.slow
def test_the_callbacks_of_a_run_read_at_logged_steps_alone(teachers, tmp_path):
    method, on_device = method_of("ladd", teachers("mmdit")), pretended.OnDevice()
    checkpoints = Checkpoints(every=15)
    checkpoints.folder = tmp_path / "checkpoints"
    callbacks = [Progress(), Health(every=10), Alarms(window=5), checkpoints]
    trained(method, tmp_path, 24, *callbacks, on_device=on_device, every=10)
    reads = [sum(seen.reads.values()) for seen in on_device.seen]
    saved = {14, 23}
    measured = {0, 10, 20}
    assert [i for i, count in enumerate(reads) if count and i not in saved] == sorted(measured)
    assert all(reads[i] <= 1 for i in measured)
    rows = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 3 + 3  # iterations 1, 10 and 20, and what Health has measured


def test_an_optimizer_that_cannot_skip_on_the_device_is_asked_at_every_update(teachers, tmp_path):
    """Exact before fast: without a kernel that skips, the norm is read."""
    method, on_device = method_of("regression", teachers("unet")), pretended.OnDevice()
    method.loop.factories = Optimizers(student=tiny.adam(1e-3), discriminator=tiny.adam(1e-3))
    trained(method, tmp_path, 3, on_device=on_device)
    places = [place for seen in on_device.seen[1:] for place in seen.reads]
    assert len(places) == 2
    assert all("float(norm)" in pretended.line(place) for place in places)


def test_the_pretended_device_sees_every_kind_of_read():
    with pretended.device() as seen:
        x = torch.ones(3, device=pretended.GPU)
        generator = torch.Generator(pretended.GPU)
        assert x.device == (x * 2).device == pretended.GPU
        assert torch.rand(2, generator=generator, device=generator.device).device == pretended.GPU
        for read in (
            lambda: x[0].item(), x.tolist, x.cpu, lambda: bool((x == 1).all()), x.nonzero,
            lambda: float(x.sum()), lambda: int(x.sum()), lambda: x[x > 0], x.unique,
            lambda: x.to("cpu"), lambda: torch.multinomial(x, 1, generator=generator),
            lambda: torch.equal(x, x), x.numpy,
        ):  # fmt: skip
            before = sum(seen.reads.values())
            read()
            assert sum(seen.reads.values()) == before + 1, read
        count = sum(seen.reads.values())
        host = torch.rand(3, generator=torch.Generator())
        assert host.device.type == "cpu"
        assert len(host.tolist()) == 3
        assert x.to("cpu", non_blocking=True).tolist() == [1.0] * 3
        assert sum(seen.reads.values()) == count
        assert not seen.uploads
        torch.tensor([1.0], device=x.device), host.to(x.device), x.new_tensor([2.0])
        assert sum(seen.uploads.values()) == 3


# -- the same numbers ------------------------------------------------------------------------------


class State(L.Callback):
    """What a training holds after every iteration. The average is asked for at the end alone:
    asking settles the iteration.
    """

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(tiny.weights(pl_module.student) | tiny.weights(pl_module.heads))


def results(method, trainer):
    states = [dict(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
    counts = (method.step, trainer.global_step, method.loop.skipped, method.loop.iteration)
    return counts, dict(method.ema.state_dict()), states, method.loop.images_seen


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


BAD = [set(), {0}, {2}, {2, 3}, {1, 4}]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_the_device_skips_what_the_cpu_skips(bad, player, tmp_path):
    found = []
    for on_device in (None, pretended.OnDevice(own_generators=False)):
        method, state = method_of("ladd", TOY, warmup_steps=9), State()
        spoil(method, bad, player)
        folder = tmp_path / str(on_device is None)
        trainer = trained(method, folder, 6, state, on_device=on_device, every=1)
        rows = (folder / "metrics.csv").read_text(encoding="utf-8")
        found.append((rows, state.seen, results(method, trainer)))
    (rows, seen, ends), (late_rows, late_seen, late_ends) = found
    assert ends[0] == (6, 6, len(bad) if player == "student" else 0, len(seen))
    assert equal(seen, late_seen)
    assert equal(ends, late_ends)
    assert rows == late_rows


def test_what_python_skips_itself_is_counted_at_once_there_too(tmp_path):
    """Of an optimiser that cannot skip on the device."""
    found = []
    for on_device in (None, pretended.OnDevice(own_generators=False)):
        method, state = method_of("ladd", TOY, warmup_steps=9), State()
        method.loop.factories = Optimizers(student=tiny.adam(1e-3), discriminator=fused)
        spoil(method, {1, 4})
        trainer = trained(method, tmp_path, 6, state, on_device=on_device)
        found.append((state.seen, results(method, trainer)))
    assert equal(*found)
    assert found[0][1][0] == (6, 6, 2, 8)


def test_a_refreshed_head_starts_anew_with_any_optimizer(tmp_path):
    """Zeros are no new state of NAdam, whose product of momenta starts at one."""
    found = []
    for on_device in (None, pretended.OnDevice(own_generators=False)):
        method = method_of("nitrofusion", TOY, {"refine": [0]}, pool={"refresh": 0.5})
        heads = partial(torch.optim.NAdam, lr=1e-3, foreach=False)
        method.loop.factories = Optimizers(student=fused, discriminator=heads)
        trainer = trained(method, tmp_path / "x", 4, on_device=on_device)
        found.append(results(method, trainer))
    assert equal(*found)
    assert 0 < len(found[0][2][1]) < len(method.heads.heads)


@pytest.mark.parametrize("bad", [set(), {2}], ids=str)
def test_refreshed_heads_keep_their_values_where_the_update_is_skipped(bad, tmp_path):
    found = []
    for on_device in (None, pretended.OnDevice(own_generators=False)):
        options = {"refine": [0]}
        method = method_of("nitrofusion", TOY, options, pool={"refresh": 0.5})
        tiny_state = State()
        spoil(method, bad)
        trainer = trained(method, tmp_path / "x", 4, tiny_state, on_device=on_device)
        counts, average, (student, heads), _ = results(method, trainer)
        # A state that was cleared is one of zeros here, and none on the CPU.
        heads = {k: s for k, s in heads.items() if s["step"]}
        found.append((tiny_state.seen, counts, average, student, heads))
    assert equal(*found)
    assert found[0][1][2] == len(bad)


def test_so_many_in_a_row_end_it_there_too(tmp_path, caplog):
    said = []
    for on_device in (None, pretended.OnDevice(own_generators=False)):
        method = method_of("ladd", TOY, stop_after_bad=3)
        spoil(method, {2, 3, 4, 5, 6})
        before = tiny.weights(method.student)
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(FloatingPointError) as error:
            trained(method, tmp_path / "x", 9, on_device=on_device)
        warned = [r.getMessage().partition(":")[0] for r in caplog.records if "finite" in r.message]
        said.append((str(error.value), warned, tiny.weights(method.student), method.step))
        assert not tiny.same(before, said[-1][2])
    assert said[0][:2] == said[1][:2]
    assert tiny.same(said[0][2], said[1][2])
    assert said[0][1] == ["step 2"] * 3
    assert said[0][3] == 2


class SaveAt(L.Callback):
    """Saves after an iteration, as a user's callback does."""

    def __init__(self, iteration, path):
        self.iteration, self.path = iteration, path

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.loop.iteration == self.iteration:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_all_ranks_act_on_a_signal_in_the_same_iteration(tmp_path):
    """Also where one of them, in a callback of the user, has read a newer row than the others."""

    class Signal(L.Callback):
        def __init__(self, asks):
            self.asks, self.signalled = asks, []

        def on_train_batch_end(self, trainer, pl_module, *_):
            loop = pl_module.loop
            if self.asks:
                assert loop.ema
            loop.own_signal = 15 * (loop.iteration == 2)
            self.signalled.append(loop.signalled)

    found = []
    for asks in (False, True):
        seen = Signal(asks)
        trained(method_of("ladd", TOY), tmp_path, 6, seen, on_device=pretended.OnDevice())
        found.append(seen.signalled)
    assert found == [[False, False, False, True, False, False]] * 2


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_training_draws_as_the_uninterrupted_one(stop, tmp_path):
    """Also right after a skipped update, while draws still count it."""
    levels = Discrete([1.0, 0.25], [1.0, 0.0], warmup_odds=[0.0, 1.0], warmup_steps=4)

    def made():
        method = method_of("ladd", TOY)
        method.levels = levels
        spoil(method, {3})
        return method

    whole, path = made(), tmp_path / "some.ckpt"
    device = pretended.OnDevice(own_generators=False)
    uninterrupted = results(whole, trained(whole, tmp_path, 7, on_device=device))
    half, device = made(), pretended.OnDevice(own_generators=False)
    trained(half, tmp_path, 7, SaveAt(stop, path), on_device=device)
    rest, device = made(), pretended.OnDevice(own_generators=False)
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == saved["distill"]["iteration"] - saved["distill"]["skipped"]
    trainer = trained(rest, tmp_path, 7, on_device=device, start=stop, checkpoint=str(path))
    assert equal(results(rest, trainer), uninterrupted)
    assert tiny.same(tiny.weights(rest.student), tiny.weights(whole.student))


# -- the parts -------------------------------------------------------------------------------------


def test_levels_are_known_on_the_host_and_alike_on_every_rank():
    times, x = LogitNormal(), torch.zeros(5, 1)
    expected = times.sample(5, 0, torch.Generator().manual_seed(3))
    assert torch.equal(
        randomness.levels_like(x, times, 0, torch.Generator().manual_seed(3)), expected
    )
    same = randomness.levels_like(x, times, 0, torch.Generator().manual_seed(3), one=True)
    assert torch.equal(same, times.sample(1, 0, torch.Generator().manual_seed(3)).expand(5))
    with pretended.device() as seen:
        generator, on_device = torch.Generator(pretended.GPU).manual_seed(3), x * 1
        t = randomness.levels_like(on_device, times, 0, generator, convert=lambda t: t / 2)
        other = randomness.levels_like(
            on_device, times, 0, generator, "renoise", convert=lambda t: t / 2
        )
        assert t.device == pretended.GPU
        assert host_values(t).device.type == "cpu"
        assert torch.equal(host_values(t) * 1, t.to("cpu", non_blocking=True))
        assert host_values(t * 1) is None
        assert not torch.equal(host_values(t), host_values(other))
        assert randomness.uniform(3, generator, "a") == randomness.uniform(3, generator, "a")
        assert randomness.uniform(3, generator, "a") != randomness.uniform(3, generator, "b")
        assert randomness.seed_of(generator, "a") != randomness.seed_of(generator, "b")
        assert not seen.reads
        assert not seen.uploads


def test_numbers_for_decisions_are_those_of_a_generator_of_the_cpu():
    """What runs on a CPU drew so far."""
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    assert randomness.uniform(3, first, "a") == torch.rand(3, generator=second).tolist()
    assert randomness.seed_of(first) == int(torch.randint(2**62, (), generator=second))
    assert randomness.on_host(first, "b") is first


def test_a_level_without_data_is_named_on_a_device_too():
    process, x = RectifiedFlow(), torch.zeros(2, 1)
    with pretended.device() as seen:
        x_t = x * 1
        with pytest.raises(ValueError, match="alpha"):
            process.to_x0(x_t, x_t, level_like(x_t, 1.0), "eps")
        assert not seen.reads
        assert not seen.uploads


def test_what_is_on_the_cpu_is_neither_sent_nor_copied():
    x = torch.arange(3.0)
    assert send(x, torch.device("cpu")) is x
    assert host_values(x) is x
    assert Later(x).read() == [0.0, 1.0, 2.0]


def with_another(values):
    """The mean over two ranks; of the other the values are twice ours, and its user pressed
    Ctrl-C.
    """
    other = values * 2
    other[-1] = 1.0
    return (values + other) / 2


@pytest.mark.parametrize("ranks", [None, with_another], ids=["one", "two"])
def test_a_row_brings_the_values_and_the_news_of_a_signal(ranks):
    current = {"d/real": torch.tensor(2.0), "d/lr": 0.1, "g/adv": torch.tensor(4.0)}
    applied = [("d", torch.tensor(True)), ("g", torch.tensor(False))]
    row = Row.of(current, applied, CPU, None, 0, step=3, updated=True)
    assert row.read() == ({"d/real": 2.0, "d/lr": as32(0.1), "g/adv": 4.0}, [True, False], False)
    assert row.is_assumed
    assert not row.is_known_bad
    row = Row.of(current, [("g", False)], CPU, ranks, 0, step=3, updated=True)
    more = 1.5 if ranks else 1.0
    expected = {"d/real": 2 * more, "d/lr": as32(0.1), "g/adv": 4 * more}
    assert row.read() == (expected, [False], ranks is not None)
    assert row.is_known_bad
    row = Row.of({}, [("g", True)], CPU, None, 15, step=3, updated=True)
    assert row.read() == ({}, [True], True)


def test_a_row_is_on_the_device_though_all_its_values_are_on_the_host():
    """There alone can some backends reduce it: NCCL knows no CPU."""
    places = []

    def average(values):
        places.append(values.device)
        return with_another(values)

    with pretended.device():
        current = {"d/lr": 0.5, "d/grad_norm": torch.tensor(0.0)}
        row = Row.of(current, [("d", True)], pretended.GPU, average, 0, step=3, updated=False)
        assert row.late
    assert places == [pretended.GPU]


def as32(number):
    return torch.tensor(number).item()


def test_no_guidance_is_known_from_the_configuration(teachers):
    teacher, x = teachers("unet"), torch.zeros(2, 4, 16, 16)
    for guidance in (1.0, (1.0, 1.0)):
        draws = ScoreDistillation(guidance=guidance).draw(x, torch.Generator())
        assert isinstance(draws, ScoreDraws)
        assert draws.scale == 1.0
    scale = ScoreDistillation(guidance=2.0).draw(x, torch.Generator()).scale
    assert torch.equal(scale, torch.full((2, 1, 1, 1), 2.0))
    cond, t = teacher.embed(["a", "b"]), torch.full((2,), 0.5)
    alone = guided_x0(teacher, x, t, Cond(cond.tokens, pooled=cond.pooled), 1.0)  # has no null
    torch.testing.assert_close(alone, guided_x0(teacher, x, t, cond, torch.ones(2, 1, 1, 1)))


def test_a_mask_of_ones_is_known_without_a_read(teachers):
    processor = set_silent_token_attention(teachers("mmdit").network.model)
    ones = torch.ones(2, 3)
    with token_weights(processor, ones, 4):
        assert processor.bias is None
    with pretended.device() as seen:
        mask = ones * 1
        with token_weights(processor, mask, 4, all_ones=True):
            assert processor.bias is None
        with token_weights(processor, mask, 4):  # not known: weights like any others
            assert processor.bias.shape == (2, 1, 1, 7)
        assert not seen.reads
    known = Cond(torch.zeros(2, 3, 1), mask=ones, all_ones=True)
    weighted = Cond(torch.zeros(2, 3, 1), mask=ones * 2)
    assert Cond.cat([known, known.index(torch.tensor([1]))]).all_ones
    assert not Cond.cat([known, weighted]).all_ones


@pytest.mark.parametrize(("mask", "ones"), [([[1.0, 1.0]], True), ([[1.0, 256.0]], False)])
def test_a_cached_mask_is_looked_at_before_it_leaves_the_host(mask, ones, teachers):
    method = tiny.ladd(teachers("mmdit"))
    cond = method.teacher.embed(["a"])
    batch = {"x0": torch.zeros(1, 4, 16, 16), "caption": ["a"], "mask": torch.tensor(mask)}
    batch |= {"tokens": cond.tokens[:, :2], "pooled": cond.pooled}
    found = method.on_before_batch_transfer(batch, 0)
    assert method.loop.prepare_batch(method, found).cond.all_ones == ones
