"""What holds for every family: a run that goes on ends with the same bits, two processes train as
one does, and neither depends on what saves memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import contracts
import tiny
from contracts import EVERY_STEP, ROUNDED, End, resumed, train, words_of
from distill.training.speed import cannot_compile
from families import TRAINED, training
from test_distributed import launcher
from test_speed import Compiled

LORA = ["student=lora", "student.rank=2"]
ADAPTERS = "lora_nf4_checkpointing_bf16"  # LoRAs of large models are trained with all of these
MEMORY = {
    ADAPTERS: [
        *(*LORA, "teacher.quantize=nf4", "student.checkpointing=true"),
        *("trainer.precision=bf16-mixed", "teacher.dtype=bfloat16"),
    ],
    "adamw8bit_int8_checkpointing": [
        *("optimizer=adamw8bit", "teacher.quantize=int8", "student.checkpointing=true"),
    ],
    "adafactor_fp8_bf16": [
        *("optimizer=adafactor", "teacher.quantize=fp8", "trainer.precision=bf16-mixed"),
    ],
    "prodigy_on_the_cpu": [
        *("optimizer=prodigy", "loop.ema_device=cpu", "loop.optimizer_device=cpu"),
    ],
    "schedule_free_bf16_teacher": [
        *("optimizer=schedule_free", "trainer.precision=bf16-mixed", "teacher.dtype=bfloat16"),
    ],
    "muon_on_the_cpu": ["optimizer=muon", "loop.optimizer_device=cpu"],
}
NEEDS = {"adamw8bit": "torchao", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
COMPILED = ("sd35", "pixart", "zimage")  # the others, which take up to a minute each, nightly


def table():
    """(family, options): each family with a quantised LoRA, and with one of the other rows."""
    others = [name for name in MEMORY if name != ADAPTERS]
    for i, family in enumerate(TRAINED):
        for options in (ADAPTERS, others[i % len(others)]):
            marks = () if (family, options) == ("zimage", ADAPTERS) else training(family)
            yield pytest.param(family, options, marks=marks)


@pytest.mark.parametrize(("family", "options"), table())
def test_a_resumed_run_ends_with_the_same_bits(family, options, family_folders, tmp_path):
    for name, package in NEEDS.items():
        if options.startswith(name):
            pytest.importorskip(package)
    words = words_of(family, family_folders(family), *MEMORY[options])
    whole, again = resumed(words, tmp_path)
    assert tiny.same(again.student, whole.student)
    assert tiny.same(again.heads, whole.heads)
    assert again.step == whole.step == contracts.STEPS
    assert not tiny.same(whole.student, whole.began)
    assert all(x.isfinite().all() for x in whole.student.values())


# -- compiled blocks -------------------------------------------------------------------------------

# Captions of one length in a batch, and of several, have a graph each; both occur by then.
LATE_GRAPHS = {"zimage": 5, "qwenimage": 5}  # steps up to the last one without a new graph


@pytest.mark.parametrize("family", tiny.tiered(TRAINED, slow=COMPILED))
def test_compiled_blocks_train_as_they_do_uncompiled(family, family_folders, tmp_path, caplog):
    """Each block is one graph, and after the first step there is no new one. By torch's tracing
    alone: its compilers take minutes.
    """
    steps = LATE_GRAPHS.get(family, contracts.STEPS)
    options = [*ROUNDED, *MEMORY[ADAPTERS], *EVERY_STEP, f"trainer.max_steps={steps}"]
    words = words_of(family, family_folders(family), *options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, log = train(words, tmp_path / "plain"), Compiled("eager")
    compiled = train(words, tmp_path / "compiled", log)
    assert contracts.apart(plain, compiled) < 1e-4
    assert log.after[-2] == log.after[-1] > 0
    assert not sum(torch._dynamo.utils.counters["graph_break"].values())
    assert not [said for said in caplog.messages if said.startswith("trainer.compile")]
    max((tmp_path / "compiled" / "checkpoints").glob("*.ckpt")).unlink()
    again = train(words, tmp_path / "compiled", goes_on=True)  # without
    assert contracts.apart(plain, again) < 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["wan"])  # it has the fewest graphs
def test_a_run_with_compile_goes_on_as_one_without(family, family_folders, tmp_path, caplog):
    """By torch's default compiler, as a run has it."""
    if reason := cannot_compile(torch.device("cpu")):
        pytest.skip(reason)
    options = [*ROUNDED, *LORA, "student.checkpointing=true"]
    words = words_of(family, family_folders(family), *options)
    torch._dynamo.reset()
    plain = train(words, tmp_path / "plain")
    whole, again = resumed([*words, "trainer.compile=blocks"], tmp_path / "compiled")
    assert contracts.apart(plain, whole) < 5e-3
    assert contracts.apart(whole, again) < 5e-3
    assert not [said for said in caplog.messages if said.startswith("trainer.compile")]


# -- two processes ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class How:
    """How a job is done.

    words: its options. processes: how many do it. method: of the run. resumed: whether others take
    its last step. compiled: whether its blocks are compiled.
    """

    words: Sequence[str]
    processes: int = 2
    method: str = "ladd"
    resumed: bool = False
    compiled: bool = False


ONE = {"processes": 1}
BATCHES = "loop.accumulate=2"  # of the one process: those of two
FSDP2 = ("trainer=fsdp2", "trainer.devices=2")
DDP = ("trainer=ddp", "trainer.devices=2")
NF4 = (*LORA, "teacher.quantize=nf4")
# What is averaged is then the optimiser's own mean.
MEAN = ("optimizer=schedule_free", "loop.ema_decay=0")
PLAYERS = (
    *("optimizer_of@optimizer.student=schedule_free", "loop.ema_decay=0"),
    *("optimizer_of@optimizer.discriminator=adamw",),
)
FAKE_SCORE = ("fake_score@optimizer.fake_score=schedule_free",)
HALF = (
    *(*FSDP2, "student.checkpointing=true"),
    *("trainer.precision=bf16-mixed", "teacher.dtype=bfloat16"),
)
HOW = {
    "one": How(**ONE, words=[BATCHES]),
    "one_lora": How(**ONE, words=[BATCHES, *NF4]),
    "fsdp2": How(words=[*FSDP2, "student.checkpointing=true"]),
    "ddp_lora": How(words=[*DDP, *NF4]),
    "one_mean": How(**ONE, words=[BATCHES, *MEAN]),
    "fsdp2_mean": How(words=[*FSDP2, *MEAN]),
    "fsdp2_mean_resumed": How(words=[*FSDP2, *MEAN], resumed=True),
    "one_players": How(**ONE, words=[BATCHES, *PLAYERS]),
    "fsdp2_players": How(words=[*FSDP2, *PLAYERS]),
    "one_pool": How(**ONE, words=[BATCHES, *MEAN], method="nitrofusion"),
    "fsdp2_pool": How(words=[*FSDP2, *MEAN], method="nitrofusion"),
    "one_fake_score": How(**ONE, words=[BATCHES, *FAKE_SCORE], method="dmd2"),
    "fsdp2_fake_score": How(words=[*FSDP2, *FAKE_SCORE], method="dmd2"),
    "half": How(words=[*HALF]),
    "half_compiled": How(words=[*HALF], compiled=True),
    "half_lora": How(words=[*HALF, *LORA]),
    "half_lora_compiled": How(words=[*HALF, *LORA], compiled=True),
}


@pytest.fixture(scope="module")
def ends(request, tmp_path_factory, forks, family_folders):
    """How, and a family -> what its processes ended with; all families asked for train in turn."""
    launch = launcher(forks, "contracts:main")
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    asked = [call.params for call in calls if call and "alone" in call.params]

    @functools.cache
    def made(name: str) -> Path:
        folder, how = tmp_path_factory.mktemp(name), HOW[name]
        wanted = {call["family"] for call in asked if name in (call["how"], call["alone"])}
        options = [*ROUNDED, *how.words]
        jobs = {
            family: words_of(family, family_folders(family), *options, method=how.method)
            for family in TRAINED
            if family in wanted
        }
        more = {"resumed": how.resumed, "compiled": how.compiled}
        launch(folder, processes=how.processes, jobs=jobs, **more)
        return folder

    def of(name: str, family: str) -> list[End]:
        folder = made(name)
        for failed in sorted(folder.glob(f"{family}_[01].txt")):
            pytest.fail(failed.read_text(encoding="utf-8")[-2000:])
        files = sorted(folder.glob(f"{family}_[01].pt"))
        return [End(**torch.load(file, weights_only=True)) for file in files]

    return of


def assert_as_one(several, one, *, within=5e-3):
    """Each process has the student of the one, and all have the same."""
    assert contracts.apart(one, several[0]) < within
    assert tiny.same(several[0].student, several[1].student)
    for name, x in one.heads.items():
        torch.testing.assert_close(several[0].heads[name], x, rtol=1e-3, atol=1e-5)
    assert [end.step for end in several] == [contracts.STEPS] * 2


LORAS = ("sdxl", "flux", "zimage", "qwenimage")  # by ddp; the others nightly


def ways():
    """(how, alone, family): each family cut up, and LoRAs on whole quantised networks."""
    for family in TRAINED:
        yield pytest.param("fsdp2", "one", family, marks=training(family))
        mark = pytest.mark.slow if family in LORAS else pytest.mark.nightly
        yield pytest.param("ddp_lora", "one_lora", family, marks=mark)


@pytest.mark.parametrize(("how", "alone", "family"), ways())
def test_two_processes_train_as_one_does(how, alone, family, ends):
    assert HOW[how].processes == 2
    assert_as_one(ends(how, family), ends(alone, family)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd35"])
@pytest.mark.parametrize(
    ("how", "alone"), [("fsdp2_mean", "one_mean"), ("fsdp2_mean_resumed", "one_mean")]
)
def test_two_processes_have_the_mean_of_schedule_free(how, alone, family, ends):
    """What is averaged, and so evaluated and exported, is the same on every rank, and also in a run
    that goes on.
    """
    pytest.importorskip("schedulefree")
    assert_as_one(ends(how, family), ends(alone, family)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd35"])
@pytest.mark.parametrize(
    ("how", "alone"),
    [(f"fsdp2_{name}", f"one_{name}") for name in ("players", "pool", "fake_score")],
)
def test_each_player_has_its_optimizer_in_two_processes(how, alone, family, ends):
    pytest.importorskip("schedulefree")
    assert_as_one(ends(how, family), ends(alone, family)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd35"])
@pytest.mark.parametrize(
    ("how", "alone"), [("half_compiled", "half"), ("half_lora_compiled", "half_lora")]
)
def test_two_processes_compile_checkpointed_blocks_in_bfloat16(how, alone, family, ends):
    several = ends(alone, family)
    assert tiny.same(several[0].student, several[1].student)
    assert_as_one(ends(how, family), several[0], within=2e-2)  # bfloat16 rounds
