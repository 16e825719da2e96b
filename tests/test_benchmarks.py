"""Benchmarks leave nothing changed behind, and say in a sentence what a system lacks."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import psutil  # noqa: F401  # before a test takes `resource` away
import pytest
import torch

import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Runs a benchmark's file under a name, as `python benchmarks/...` would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "resident", raising=False)

    def run(name: str, run_name: str) -> dict:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / name)])
        return runpy.run_path(str(BENCHMARKS / name), run_name=run_name)

    return run


@pytest.mark.parametrize("name", ["step_memory.py", "decoder_memory.py"])
def test_a_system_without_a_peak_of_memory_is_named(name, benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmark(name, "__main__")
    what = "this system does not tell the peak of memory; use a GPU, Linux or macOS"
    assert ended.value.code == f"{name}: {what}"


def test_the_peak_of_memory_is_in_bytes_on_every_system(benchmark, monkeypatch):
    resource = pytest.importorskip("resource")
    peak = benchmark("resident.py", "resident")["peak"]
    here = peak()
    assert 2**26 < here < 2**42
    monkeypatch.setattr(sys, "platform", "darwin")  # whose count is in bytes already
    assert peak() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_waiting_undoes_what_it_set_if_the_training_fails(benchmark, monkeypatch):
    import distill.run

    modes: list[object] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def fails() -> None:
        assert modes[-1] == "warn"
        raise RuntimeError("no memory")

    monkeypatch.setattr(distill.run, "main", fails)
    count = benchmark("waiting.py", "waiting")["count"]
    before = list(sys.argv)
    with pytest.raises(RuntimeError, match="no memory"):
        count(["method=ladd"])
    assert (sys.argv, modes[-1]) == (before, 0)


@pytest.mark.slow
def test_the_page_on_scale_has_what_its_script_counts(benchmark, capsys):
    benchmark("scale.py", "__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 + 16
    page = (BENCHMARKS.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    assert [line for line in lines if line not in page] == []


def test_costs_of_scale_follow_from_bytes_and_links(benchmark):
    """One rank communicates nothing; two replicas of one node gather as one node does."""
    scale = benchmark("scale.py", "scale")
    net = scale["Counted"](10**9, 1e12, 2**30, 10, 4096, 1024)
    cost, layout = scale["cost"], scale["Layout"]
    alone = cost(net, layout(1, 1), 0.5)
    assert (alone.gathered, alone.reduced) == (0, 0)
    assert alone.compute == pytest.approx(8 * 2 * 1e12 / (989e12 * 0.5))
    one, two = cost(net, layout(8, 8), 0.5), cost(net, layout(16, 8), 0.5)
    assert two.gathered == one.gathered == pytest.approx(5 * (7 / 8 * 2e9 / 450e9 + 7 * 5e-6 * 10))
    between = 2 * 2 * 1e9 / 8 / 2 / 50e9 + 2 * 5e-6 * 10
    assert two.reduced - one.reduced == pytest.approx(between)
    assert two.weights == one.weights < alone.weights


@pytest.mark.parametrize("name", [
    "sd15", "sdxl", "sd3", "sd35_medium", "pixart", "sana", "kolors", "lumina2", "z_image", "klein",
    "chroma", "flux", "wan", "qwen_image",
])  # fmt: skip
def test_networks_of_full_size_have_the_weights_that_their_makers_state(name, benchmark):
    networks = benchmark("networks.py", "networks")
    tensors = networks["on_meta"](name).state_dict().values()  # SD3.5's table of positions too
    number = sum(x.numel() for x in tensors) / 1e9
    assert number == pytest.approx(networks["NETWORKS"][name].billions, rel=0.08)


def test_every_network_of_full_size_has_a_row(benchmark):
    rows = benchmark("full_size_rows.py", "full_size_rows")
    networks = benchmark("networks.py", "networks")
    assert {row.network for row in rows["SPEED"]} == set(networks["NETWORKS"])
    for mode in ("MEMORY", "SPEED"):
        assert len(set(rows[mode])) == len(rows[mode])


# The rows of the table of docs/how_to/memory.md in their order: a network and its options beside
# checkpointing. None is a count with a few states of the optimiser, which the page explains.
INT8 = ("student=lora", "teacher.quantize=int8", "loop.ema_device=cpu")
NF4 = ("student=lora", "teacher.quantize=nf4")
COUNTED = [
    ("sdxl", ("student=lora",)),
    ("sdxl", INT8),
    ("sdxl", (*INT8, "method.distill_weight=1.0")),
    ("sdxl", (*NF4, "loop.ema_device=cpu")),
    None,
    ("sdxl", ("method=nitrofusion", *INT8)),
    ("z_image", ("student=lora",)),
    ("z_image", INT8[:2]),
    ("z_image", NF4),
    ("klein", ("student=lora",)),
    ("klein", INT8[:2]),
    ("sd35_medium", ("student=full",)),
]


@pytest.mark.parametrize(
    "place", tiny.tiered([i for i, row in enumerate(COUNTED) if row], slow=[0, 6])
)
def test_the_page_on_memory_has_what_is_counted_of_full_size(place, benchmark, tmp_path):
    page = (BENCHMARKS.parent / "docs" / "how_to" / "memory.md").read_text(encoding="utf-8")
    table = page.split("| run | options | counted |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == len(COUNTED)
    network, words = COUNTED[place]
    full_size = benchmark("full_size.py", "full_size")
    row = full_size["Row"](network, 1024, 1, (*words, "student.checkpointing=true"))
    counted = full_size["count"](full_size["Plan"](True, 5, ()), row, tmp_path)
    assert rows[place].split("|")[3].strip() == f"{counted:.1f}"


def test_steps_of_full_size_are_measured_with_every_state_of_many_steps(
    benchmark, pipelines, shards, tmp_path
):
    """A head of NitroFusion's pool has no state before it is drawn: in few steps most are not."""
    full_size = benchmark("full_size.py", "full_size")
    found = {}

    class Plan:
        steps = 2

        def settings(self, *_):
            run = ["method=nitrofusion", "student=lora", "data.batch_size=2", "data.num_workers=0"]
            mine = ["teacher=sd3", f"teacher.path={pipelines('mmdit')}", "data=latents"]
            return [*mine, f"data.path={shards}", *run, "trainer.precision=32-true"]

    class States(full_size["States"]):
        def on_train_batch_start(self, trainer, method, *_):
            heads = trainer.optimizers[1]
            found.setdefault("states", len(heads.state))
            found["heads"] = len(method.heads.heads)

    full_size["hold"].__globals__["States"] = States
    full_size["hold"](Plan(), full_size["MEMORY"][0], None, tmp_path)
    assert found["states"] == found["heads"] == 480


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its rows are forks")
@pytest.mark.parametrize(("mode", "words"), [
    ("memory", ["rows=sd35_medium", "steps=2"]),
    ("speed", ["rows=wan", "steps=2"]),
])  # fmt: skip
def test_rows_of_full_size_are_measured_one_by_one(mode, words, tmp_path):
    """A row that fails says why, and the next one runs."""
    script = str(BENCHMARKS / "full_size.py")
    words = [*words, "small", f"out={tmp_path}", "student.checkpointing=false"]
    subprocess.run([sys.executable, script, mode, *words], check=True)
    lines = (tmp_path / f"{mode}.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert len(rows) == {"memory": 1, "speed": 2}[mode]
    assert all("no GPU" in row for row in rows), rows
