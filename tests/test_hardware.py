"""The precision that is chosen for a machine, by its instructions and by a product in both."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from distill.machine import hardware
from distill.machine.hardware import Precision, autocast, best_precision, check_precision, precision

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU is what is asked about")


@pytest.fixture
def machine(monkeypatch):
    """A CPU with these flags, on which a product in bfloat16 takes so many times as long."""

    def imitate(flags: tuple[str, ...], cost: float) -> None:
        monkeypatch.setattr(hardware, "bf16_flags", lambda: flags)
        monkeypatch.setattr(hardware, "bf16_cost", lambda kind="cpu": cost)
        monkeypatch.setattr(hardware, "cpu_model", lambda: "A CPU")

    return imitate


@pytest.mark.parametrize(
    ("flags", "cost", "name", "reason"),
    [
        (("avx512_bf16",), 0.4, "bf16-mixed", "A CPU has avx512_bf16, a product in bfloat16 takes"),
        (("amx_bf16",), 0.1, "bf16-mixed", "A CPU has amx_bf16"),
        (("bf16",), 0.6, "bf16-mixed", "A CPU has bf16"),
        ((), 0.4, "32-true", "A CPU has no instructions for bfloat16"),
        (("avx512_bf16",), 70.0, "32-true", "A CPU: a product in bfloat16 takes 70 times as long"),
    ],
)
def test_precision_follows_flags_and_a_product(machine, flags, cost, name, reason):
    machine(flags, cost)
    best = best_precision("cpu")
    assert best.name == name
    assert best.reason.startswith(reason)


@pytest.mark.parametrize(
    ("version", "name"), [((7, 0), "32-true"), ((7, 5), "32-true"), ((8, 0), "bf16-mixed")]
)
def test_cuda_has_bfloat16_from_capability_8(monkeypatch, version, name):
    monkeypatch.setattr(hardware, "device", lambda accelerator: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    assert best_precision().name == name


def test_bf16_by_name_where_it_is_emulated_is_warned_of_with_the_factor(machine, caplog):
    machine((), 70.0)
    chosen = precision("bf16-mixed", "cpu", key="trainer.precision")
    assert chosen == Precision("bf16-mixed", "trainer.precision says so")
    assert "takes 70 times as long as in float32" in caplog.text
    assert "trainer.precision=auto or 32-true is faster here" in caplog.text


def test_bf16_by_name_where_it_is_fast_is_not_warned_of(machine, caplog):
    machine(("avx512_bf16",), 0.4)
    assert precision("bf16-mixed", "cpu").name == "bf16-mixed"
    assert not caplog.text


@pytest.mark.parametrize("asked", ["16-mixed", "bf16-true", "16-true", "64-true", 16, None, "fast"])
def test_other_precisions_are_refused_in_a_sentence(asked):
    with pytest.raises(ValueError, match=rf"trainer.precision={asked}: .*use auto, bf16-mixed or"):
        check_precision(asked, "trainer.precision")


@pytest.mark.parametrize("name", ["bf16-mixed", "32-true"])
def test_autocast_makes_products_in_the_precision_of_its_name(name):
    x = torch.ones(4, 4)
    with autocast(name, "cpu"):
        dtype = (x @ x).dtype
    assert dtype == (torch.bfloat16 if name == "bf16-mixed" else torch.float32)


def test_emulation_is_found_by_the_product_alone():
    """The flags of this machine with kernels that do not use them: as torch runs on older CPUs."""
    code = "from distill.machine.hardware import bf16_cost, best_precision as best; "
    code += "print(bf16_cost(), best('cpu').name)"
    limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        env={**os.environ, **limited},
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    cost, name = done.stdout.split()
    assert float(cost) > 5
    assert name == "32-true"


@pytest.mark.parametrize(("quiet_after", "cost"), [(0, 0.5), (40, 0.5), (math.inf, 3.0)])
def test_a_busy_machine_does_not_make_bfloat16_slow(monkeypatch, quiet_after, cost):
    """Other work may disturb every early product in bfloat16: the same command must still get the
    same precision. What stays slow is slow.
    """
    made = []

    def seconds(x: torch.Tensor) -> float:
        made.append(x.dtype)
        time.sleep(1e-3)
        disturbed = x.dtype == torch.bfloat16 and len(made) < quiet_after
        return (3.0 if disturbed else 0.5) if x.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(hardware, "_product_seconds", seconds)
    began = time.perf_counter()
    assert hardware.bf16_cost.__wrapped__() == cost
    assert time.perf_counter() - began < hardware.PATIENCE + 0.5
    assert made[:4] == [torch.bfloat16, torch.float32] * 2


@NO_CUDA
def test_the_best_precision_is_not_slower_than_the_other():
    """Read off the machine that runs this test, whichever it is."""
    cost, best = hardware.bf16_cost(), best_precision("cpu")
    assert best.name == ("bf16-mixed" if cost < 2 and hardware.bf16_flags() else "32-true")
    assert hardware.cores() >= 1
    assert hardware.cpu_model()
    assert hardware.capability().startswith(("AVX", "DEFAULT", "SVE", "NO"))


@pytest.mark.slow
@NO_CUDA
def test_a_run_says_and_keeps_its_precision(command, machine, tmp_path):
    """`auto` is settled once: printed, and in run.json with the CPU.

    On other hardware it goes on in its own.
    """
    folder = tmp_path / "run"
    machine(("avx512_bf16",), 0.4)
    code, out, err = command("run", "debug=smoke", "~metrics", f"run_dir={folder}")
    assert code == 0, err
    assert out.count("precision: bf16-mixed (A CPU has avx512_bf16") == 1
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["precision"]["name"] == "bf16-mixed"
    assert facts["cpu"] == f"A CPU, {hardware.capability()}"
    assert "precision: bf16-mixed\n" in (folder / "config.yaml").read_text(encoding="utf-8")

    machine((), 70.0)
    more = ("trainer.max_steps=3", f"resume={folder}")
    code, out, err = command("run", *more)
    assert code == 0, err
    assert "precision: bf16-mixed, as the run began; 32-true is faster here (A CPU has no" in out
    assert "trainer.precision=32-true changes it" in out
    assert (out + err).count("takes 70 times as long as in float32") == 1
    assert "precision: bf16-mixed\n" in (folder / "config.yaml").read_text(encoding="utf-8")

    code, out, err = command("run", "trainer.max_steps=4", "trainer.precision=auto", more[1])
    assert code == 0, err
    assert "precision: 32-true" in out
