"""What holds for every family: a run that goes on ends with the same bits, two processes train as
one does, and neither depends on what saves memory.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import contracts
import tiny
from contracts import ROUNDED, End, resumed, words_of
from families import TRAINED
from test_distributed import launcher

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
QUICK = ("zimage", "flux2_klein")  # each takes half a second a run; a UNet takes a second
slow = pytest.mark.slow


def table():
    """(family, options): each family with a quantised LoRA, and with one of the other rows."""
    others = [name for name in MEMORY if name != ADAPTERS]
    for i, family in enumerate(TRAINED):
        for options in (ADAPTERS, others[i % len(others)]):
            marks = () if family in QUICK and options == ADAPTERS else slow
            yield pytest.param(family, options, marks=marks)


def each(quick=()):
    marked = (pytest.param(f, marks=() if f in quick else slow) for f in TRAINED)
    return pytest.mark.parametrize("family", list(marked))


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


# -- two processes ---------------------------------------------------------------------------------

HOW = {  # processes, and their options beside those of the one
    "one": (1, ["loop.accumulate=2"]),
    "one_lora": (1, ["loop.accumulate=2", *LORA, "teacher.quantize=nf4"]),
    "fsdp2": (2, ["trainer=fsdp2", "trainer.devices=2", "student.checkpointing=true"]),
    "ddp_lora": (2, ["trainer=ddp", "trainer.devices=2", *LORA, "teacher.quantize=nf4"]),
}


@pytest.fixture(scope="module")
def ends(request, tmp_path_factory, forks, family_folders):
    """How, and a family -> what its processes ended with; all families asked for train in turn."""
    launch = launcher(forks, "contracts:main")
    named = (getattr(item, "callspec", None) for item in request.session.items)
    asked = {call.params["family"] for call in named if call and "alone" in call.params}

    @functools.cache
    def made(how: str) -> Path:
        folder, (processes, more) = tmp_path_factory.mktemp(how), HOW[how]
        given = [*ROUNDED, *more]
        jobs = {f: words_of(f, family_folders(f), *given) for f in TRAINED if f in asked}
        launch(folder, processes=processes, jobs=jobs)
        return folder

    def of(how: str, family: str) -> list[End]:
        folder = made(how)
        for failed in sorted(folder.glob(f"{family}_[01].txt")):
            pytest.fail(failed.read_text(encoding="utf-8")[-2000:])
        files = sorted(folder.glob(f"{family}_[01].pt"))
        return [End(**torch.load(file, weights_only=True)) for file in files]

    return of


@each()
@pytest.mark.parametrize(("how", "alone"), [("fsdp2", "one"), ("ddp_lora", "one_lora")])
def test_two_processes_train_as_one_does(how, alone, family, ends):
    (one,), several = ends(alone, family), ends(how, family)
    assert len(several) == HOW[how][0]
    assert contracts.apart(one, several[0]) < 5e-3
    assert tiny.same(several[0].student, several[1].student)
    for name, x in one.heads.items():
        torch.testing.assert_close(several[0].heads[name], x, rtol=1e-3, atol=1e-5)
    assert [end.step for end in several] == [contracts.STEPS] * 2
