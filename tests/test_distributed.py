"""Two processes and one: the same losses and weights, whole and cut-up checkpoints, any number
going on from any other.

The workers are processes of their own on gloo, forks of one that has imported everything; each
writes what it ended with into a file that the test reads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

import tiny

PLAYERS = ("student", "heads", "fake_score", "ema")


def launcher(forks, work: str = "distributed_worker:main") -> Callable[..., None]:
    """Start so many workers, each of which does this work, and wait for them."""

    def launch(folder: Path, *, processes: int, **options) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        from distill.training.launch import _free_port

        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        asked = {"folder": str(folder), "processes": processes, **options}
        workers = []
        for rank in range(processes):
            own = {
                "LOCAL_RANK": str(rank),
                "RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(processes),
            }
            workers.append(
                forks.begin(
                    work,
                    asked,
                    environment={**os.environ, **shared, "OMP_NUM_THREADS": "1", **own},
                    err=folder / f"said_{rank}.txt",
                )
            )
        for worker in workers:
            slow = "jobs" in options or "compile" in options
            assert worker.wait(timeout=1800 if slow else 240) == 0, worker.said()[-3000:]

    return launch


def trainer_in(launch: Callable[..., None]) -> Callable[..., list[dict]]:
    """Train in so many processes; what each of them ended with."""

    def run(folder: Path, *, processes: int, **options) -> list[dict]:
        launch(folder, processes=processes, **options)
        files = [folder / f"end_{rank}.pt" for rank in range(processes)]
        return [torch.load(file, weights_only=True) for file in files]

    return run


@pytest.fixture(scope="module")
def launch(forks) -> Callable[..., None]:
    return launcher(forks)


@pytest.fixture(scope="module")
def run(launch) -> Callable[..., list[dict]]:
    return trainer_in(launch)


def assert_close(a: dict, b: dict, what: str) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def assert_same_end(one: dict, other: dict) -> None:
    for what in PLAYERS:
        assert_close(one[what], other[what], what)
    assert one["losses"].keys() == other["losses"].keys()
    for name, values in one["losses"].items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(other["losses"][name]), rtol=1e-3, atol=1e-5
        )
    assert one["counts"] == other["counts"]


@pytest.fixture(scope="module")
def parts(pipelines, shards) -> dict[str, str]:
    """What all processes are told, but for the method."""
    folders = {"teacher": str(pipelines("mmdit")), "unet": str(pipelines("unet"))}
    return {**folders, "data": str(shards), "eyes": str(tiny.vit())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run, parts):
    """Method -> what one process ends with by two micro-batches of two: the others' batch, with the
    same noise.
    """

    @functools.cache
    def end(method: str) -> dict:
        return run(
            tmp_path_factory.mktemp("alone"), processes=1, accumulate=2, method=method, **parts
        )[0]

    return end


# LADD's in every run of the tests, the others' among the slow ones: each starts processes.
each_method = pytest.mark.parametrize(
    "method", [m if m == "ladd" else pytest.param(m, marks=pytest.mark.slow) for m in tiny.METHODS]
)


@each_method
def test_training_moves_far_enough_to_tell_runs_apart(method, alone, teachers):
    before = tiny.weights(teachers("mmdit").network)
    moved = max(float((alone(method)["student"][k] - v).abs().max()) for k, v in before.items())
    assert moved > 1e-3


@each_method
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_what_one_gives(strategy, method, alone, run, parts, tmp_path):
    """Local batch norm sees each process's own samples, which are those of one micro-batch of the
    lone process.
    """
    ends = run(tmp_path, processes=2, strategy=strategy, method=method, **parts)
    assert_same_end(ends[0], alone(method))
    assert all(tiny.same(ends[0][what], ends[1][what]) for what in PLAYERS)


# Every documented option of every method that is not its default in `tiny`, several of them in a
# run.
OPTIONS = {
    "ladd_distill": {
        "method": "ladd",
        "options": {"distill_weight": 1.0, "over_heads": "sum"},
        "discriminator_updates": 2,
    },
    "ladd_every_term": {
        "method": "ladd",
        "options": {
            "distill_weight": 1.0,
            "distill": {"guidance": 3.0, "steps": 2},
            "r1_weight": 1e-2,
            "misaligned": 0.5,
            "shared": True,
            "loss": "relativistic",
        },
    },
    "ladd_lora_distill": {
        "method": "ladd",
        "options": {"distill_weight": 1.0, "loss": "non_saturating"},
        "lora": {"rank": 4},
    },
    "add_crop_nfsd": {
        "method": "add",
        "options": {
            "crop": 8,
            "distill": {"kind": "nfsd", "guidance": 2.0},
            "negative": "a blur",
            "over_heads": "mean",
            "r1_every": 2,
        },
        "discriminator_updates": 2,
    },
    "add_latents_sds": {
        "method": "add",
        "options": {
            "distill_space": "latents",
            "distill": {"kind": "sds", "guidance": [1.0, 4.0]},
            "r1_weight": 0.0,
            "loss": "relativistic",
        },
    },
    "add_across_families": {
        "method": "add",
        "options": {"distill": {"guidance": 2.0}},
        "score_teacher": "unet",
    },
    "regression_buckets": {
        "method": "regression",
        "options": {
            "real": {
                "levels": [1.0, 0.5],
                "fresh": False,
                "buckets": [[64, 64], [64, 32], [32, 64]],
                "shares": [1, 2, 1],
            }
        },
    },
    "nitrofusion_unshared": {
        "method": "nitrofusion",
        "options": {
            "shared": False,
            "mixed": True,
            "loss": "relativistic",
            "refine": [0, 0],
            "one_step_prob": 0.0,
        },
        "discriminator_updates": 2,
    },
    "nitrofusion_warm_start": {
        "method": "nitrofusion",
        "options": {
            "warm_start": 2,
            "distill_weight": 1.0,
            "real": {"levels": [1.0, 0.5]},
            "loss": "non_saturating",
            "shared": False,
        },
    },
    "dmd2_four_steps": {
        "method": "dmd2",
        "options": {
            "levels": [1.0, 0.75, 0.5, 0.25],
            "regression_weight": 0.5,
            "real": {"levels": [1.0, 0.5]},
        },
        "discriminator_updates": 2,
    },
    "dmd2_lora_without_heads": {
        "method": "dmd2",
        "options": {"adversarial_weight": 0.0, "discriminator_weight": 0.0},
        "lora": {"rank": 4},
    },
    "consistency_huber": {"method": "consistency", "options": {"huber": 0.00054}},
}
PRECISIONS = ("32-true", "bf16-mixed")
JOBS = {
    f"{name}_{precision}": {**job, "precision": precision}
    for name, job in OPTIONS.items()
    for precision in PRECISIONS
}
FEW = {name: JOBS[name] for name in ("ladd_distill_32-true", "nitrofusion_unshared_32-true")}
# Each second option in one of the precisions; the others nightly.
IN_TURN = {f"{name}_{PRECISIONS[i % 2]}" for i, name in enumerate(list(OPTIONS)[::2])}


@pytest.fixture(scope="module")
def ends(request, tmp_path_factory, launch, parts):
    """How (one process, one under fsdp2, or two) and which jobs -> what each job's processes ended
    with. All jobs that are asked for train in turn.
    """
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    asked = {call.params.get("job") for call in calls if call}

    @functools.cache
    def made(how: str, every: bool) -> Path:
        jobs = {name: job for name, job in JOBS.items() if name in asked} if every else FEW
        folder = tmp_path_factory.mktemp(how)
        options = {"processes": 2, "strategy": how}
        if how.startswith("one"):
            options = {"processes": 1, "accumulate": 2, "strategy": how[4:] or None}
        launch(folder, jobs=jobs, **options, **parts)
        return folder

    def of(how: str, job: str, every: bool) -> list[dict]:
        folder = made(how, every)
        for failed in sorted(folder.glob(f"{job}_*.txt")):
            pytest.fail(failed.read_text(encoding="utf-8")[-2000:])
        files = sorted(folder.glob(f"{job}_*.pt"))
        return [torch.load(file, weights_only=True) for file in files]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "one_fsdp2", "ddp"])
@pytest.mark.parametrize("job", FEW)
def test_processes_agree_where_a_run_had_failed(job, how, ends):
    """LADD's distillation reads the whole teacher after a pass that stopped within it;
    NitroFusion's real noise.
    """
    assert_agree(ends(how, job, False), ends("one", job, False)[0])


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("job", tiny.tiered(JOBS, slow=IN_TURN))
def test_two_processes_give_what_one_gives_with_every_option(job, how, ends, teachers):
    several, one = ends(how, job, True), ends("one", job, True)[0]
    if how == "fsdp2" and JOBS[job]["precision"] == "bf16-mixed":
        before = tiny.weights(teachers("mmdit").network)
        if "lora" in JOBS[job]:
            before = {k: 0.0 * v for k, v in one["student"].items() if "lora_B" in k}
        assert_near(several[0], one, before)
        assert tiny.same(several[0]["student"], several[1]["student"])
    else:
        assert_agree(several, one)


def assert_agree(several: list[dict], one: dict) -> None:
    assert_same_end(several[0], one)
    for other in several[1:]:
        assert all(tiny.same(several[0][what], other[what]) for what in PLAYERS)


def assert_near(end: dict, other: dict, before: dict) -> None:
    """Gathered weights are bfloat16, those of norms too, and lie elsewhere in memory: 2 to 6 % of
    the way that the student has gone, 11 % through a second teacher and its decoder. A change of
    its first weights by one part in a million leaves 2 to 4 %."""
    way = {k: (end["student"][k] - before[k], other["student"][k] - before[k]) for k in before}
    a, b = (torch.cat([pair[i].flatten() for pair in way.values()]) for i in (0, 1))
    assert float((a - b).norm()) < 0.15 * float(b.norm())
    for name, head in end["heads"].items():
        torch.testing.assert_close(head, other["heads"][name], rtol=1e-2, atol=2e-3)
    assert end["losses"].keys() == other["losses"].keys()
    for name in ("g/adv", "g/distill", "g/regression", "g/consistency", "d/adv"):
        values = (torch.tensor(each["losses"].get(name, [])) for each in (end, other))
        torch.testing.assert_close(*values, rtol=0.05, atol=0.02)
    assert end["counts"] == other["counts"]


LADD_FIRST = tiny.tiered(("ladd", "nitrofusion", "dmd2"), slow=["ladd"])


@pytest.mark.parametrize("method", LADD_FIRST)
def test_micro_batches_of_two_processes_are_those_of_one(method, run, parts, tmp_path):
    """Only the last backward pass communicates under ddp; under fsdp2 each one does."""
    options = {"method": method, **parts}
    one = run(tmp_path / "one", processes=1, accumulate=4, **options)[0]
    for how in ("ddp", "fsdp2"):
        ends = run(tmp_path / how, processes=2, accumulate=2, strategy=how, **options)
        assert_agree(ends, one)


@pytest.mark.parametrize("method", LADD_FIRST)
def test_two_processes_train_a_unet_as_one_does(method, pipelines, run, parts, tmp_path):
    """Its units are blocks, and the pass of NitroFusion's features ends in the middle."""
    options = {**parts, "method": method, "family": "unet", "teacher": str(pipelines("unet"))}
    one = run(tmp_path / "one", processes=1, accumulate=2, **options)[0]
    assert_agree(run(tmp_path / "several", processes=2, strategy="fsdp2", **options), one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_reduced", "fsdp2_reduced"])
def test_gradients_summed_in_bfloat16_lead_nearby(strategy, alone, run, parts, teachers, tmp_path):
    ends = run(tmp_path, processes=2, strategy=strategy, method="ladd", **parts)
    assert_near(ends[0], alone("ladd"), tiny.weights(teachers("mmdit").network))
    assert all(tiny.same(ends[0][what], ends[1][what]) for what in PLAYERS)


WAYS_ON = [("ddp", "fsdp2"), ("fsdp2", "one"), ("fsdp2_parts", "ddp"), ("fsdp2_parts", "fsdp2")]


@pytest.mark.parametrize(
    ("first", "then"),
    tiny.tiered(product(("ddp", "fsdp2", "fsdp2_parts"), ("one", "ddp", "fsdp2")), slow=WAYS_ON),
)
def test_any_number_goes_on_from_any_other(first, then, alone, run, parts, tmp_path):
    parts = {**parts, "method": "ladd"}
    run(tmp_path / "first", processes=2, strategy=first, save_at=2, **parts)
    saved = str(tmp_path / "first" / "step_000002.ckpt")
    how = {"processes": 1, "accumulate": 2} if then == "one" else {"processes": 2, "strategy": then}
    assert_same_end(run(tmp_path / "then", resume=saved, **how, **parts)[0], alone("ladd"))


@pytest.mark.slow
@pytest.mark.parametrize("then", ["ddp", "fsdp2"])
def test_two_go_on_from_one(then, alone, run, parts, tmp_path):
    parts = {**parts, "method": "add"}
    run(tmp_path / "first", processes=1, accumulate=2, save_at=2, **parts)
    saved = str(tmp_path / "first" / "step_000002.ckpt")
    ends = run(tmp_path / "then", processes=2, strategy=then, resume=saved, **parts)
    assert_same_end(ends[0], alone("add"))


@pytest.fixture(scope="module")
def four_alone(tmp_path_factory, run, parts):
    """What one process ends with by four micro-batches of two: the batch of four processes."""
    folder = tmp_path_factory.mktemp("four_alone")
    return run(folder, processes=1, accumulate=4, method="ladd", **parts)[0]


@pytest.mark.parametrize(
    "strategy",
    tiny.tiered(["fsdp2_replicas", "fsdp2_replicas_parts"], slow=["fsdp2_replicas_parts"]),
)
def test_four_processes_in_two_replicas_give_what_one_gives(
    strategy, four_alone, run, parts, tmp_path
):
    """Each pair holds everything once; checkpoints in parts have the parts of one pair."""
    parts = {**parts, "method": "ladd"}
    first = run(tmp_path / "first", processes=4, strategy=strategy, save_at=2, **parts)
    assert all(tiny.same(first[0][what], first[3][what]) for what in PLAYERS)
    saved = tmp_path / "first" / "step_000002.ckpt"
    if strategy.endswith("parts"):
        assert sorted(f.name for f in saved.iterdir()) == [
            "00000_of_00002.pt",
            "00001_of_00002.pt",
        ]
    then = {"processes": 4, "strategy": strategy, "resume": str(saved)}
    assert_same_end(run(tmp_path / "then", **then, **parts)[0], four_alone)
    one = {"processes": 1, "accumulate": 4, "resume": str(saved)}
    assert_same_end(run(tmp_path / "one", **one, **parts)[0], four_alone)


@pytest.mark.slow
@each_method
def test_a_bad_gradient_in_one_process_is_left_out_in_both(method, run, parts, tmp_path):
    ends = run(tmp_path, processes=2, strategy="ddp", poison=[1, 1], method=method, **parts)
    assert [end["skipped"] for end in ends] == [1, 1]
    assert all(torch.isfinite(v).all() for end in ends for v in end["student"].values())
    assert tiny.same(ends[0]["student"], ends[1]["student"])
    assert ends[0]["counts"]["step"] == 4


@pytest.mark.parametrize("strategy", tiny.tiered(["ddp", "fsdp2"], quick=["fsdp2"], slow=["ddp"]))
def test_two_processes_train_a_lora_as_one_does(strategy, alone_with_a_lora, run, parts, tmp_path):
    """Under fsdp2 the network is cut up and the adapters are whole; and what is computed again is
    what it was.
    """
    options = {"method": "ladd", "lora": {"rank": 4, "checkpointing": strategy == "fsdp2"}, **parts}
    ends = run(tmp_path, processes=2, strategy=strategy, **options)
    assert_same_end(ends[0], alone_with_a_lora)
    assert all(tiny.same(ends[0][what], ends[1][what]) for what in PLAYERS)
    assert all("lora" in name for name in ends[0]["student"])


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_compiled_blocks(
    strategy, alone, alone_with_a_lora, run, parts, tmp_path
):
    """Blocks are sharded before they are compiled, and taps end passes within the network."""
    options = {"processes": 2, "strategy": strategy, "method": "ladd", "compile": True, **parts}
    assert_same_end(run(tmp_path / "full", **options)[0], alone("ladd"))
    lora = {"rank": 4, "checkpointing": True}
    assert_same_end(run(tmp_path / "lora", lora=lora, **options)[0], alone_with_a_lora)


@pytest.mark.slow
def test_a_lora_goes_on_from_parts(alone_with_a_lora, run, parts, tmp_path):
    options = {"processes": 2, "method": "ladd", "lora": {"rank": 4}, **parts}
    run(tmp_path / "first", strategy="fsdp2_parts", save_at=2, **options)
    saved = str(tmp_path / "first" / "step_000002.ckpt")
    assert_same_end(
        run(tmp_path / "then", strategy="fsdp2", resume=saved, **options)[0], alone_with_a_lora
    )


@pytest.fixture(scope="module")
def alone_with_a_lora(tmp_path_factory, run, parts):
    return run(
        tmp_path_factory.mktemp("lora"),
        processes=1,
        accumulate=2,
        method="ladd",
        lora={"rank": 4},
        **parts,
    )[0]
