"""Several processes, started by the command itself, by torchrun or by SLURM; sweeps; and the search
over keys.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf

import tiny
from distill import search
from distill.config import compose
from distill.storage import checkpoint_files
from distill.training import launch

TWO = ["trainer=ddp", "trainer.devices=2"]


def smoke(pipelines, shards, *more):
    fixed = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "data.batch_size=2"]
    return ["debug=smoke", *fixed, "callbacks.samples.every=2", "~metrics", *more]


def start(command, folder, **environment):
    known = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM", "RANK", "LOCAL_RANK", "WORLD_SIZE"))
    }
    known |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=known,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def student_of(folder):
    return torch.load(folder / "checkpoints" / "step_000002.ckpt", weights_only=True)["state_dict"]


def assert_run(folder, *, seed=0):
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["steps"], facts["images_seen"]) == ("finished", 2, 8)
    assert OmegaConf.load(folder / "config.yaml").seed == seed
    assert {"student", "report.html", "metrics.csv"} <= {p.name for p in folder.iterdir()}
    log = (folder / "run.log").read_text(encoding="utf-8").splitlines()
    assert log[0].startswith("== ")
    assert [log.count(line) for line in ("training: 2 steps", "saving the student")] == [1, 1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True),  # srun --pty bash
        ({"SLURM_PROCID": "0"}, True),  # a script without srun
    ],
)
def test_processes_are_started_unless_someone_else_did(environment, expected, monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.needed(2, 1) is expected
    assert launch.needed(1, 1) is False


@pytest.mark.parametrize(("accelerator", "expected"), [("cpu", 1), ("auto", 8), ("gpu", 8)])
def test_auto_is_what_lightning_makes_of_it(accelerator, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    trainer = {"devices": "auto", "accelerator": accelerator}
    assert compose.processes(OmegaConf.create({"trainer": trainer})) == expected
    if accelerator == "cpu":
        from lightning import Trainer

        assert Trainer(**trainer, logger=False, enable_checkpointing=False).num_devices == expected


def test_several_nodes_need_a_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="trainer.num_nodes=2: start the command by torchrun"):
        launch.needed(4, 2)


def test_workers_in_the_one_task_of_slurm_are_not_taken_for_it(tmp_path, monkeypatch):
    for name, value in {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
    }.items():
        monkeypatch.setenv(name, value)
    script = (
        "import json, os, sys\n"
        "with open(os.path.join(sys.argv[1], os.environ['RANK']), 'w') as file:\n"
        "    json.dump(dict(os.environ), file)\n"
    )
    popen, own = subprocess.Popen, [sys.executable, "-c", script, str(tmp_path)]
    monkeypatch.setattr(launch.subprocess, "Popen", lambda _, **kw: popen(own, **kw))
    assert launch.launch(tmp_path, 2) == 0
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text(encoding="utf-8"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", found)
            assert (compose.rank(), compose.world_size()) == (rank, 2)
            assert not SLURMEnvironment.detect()
        assert found["SLURM_JOB_ID"] == "7"


def test_a_worker_that_fails_ends_the_others_and_the_code_is_its_own(tmp_path, monkeypatch):
    """Rank 1 fails at once, while rank 0 would wait for a minute."""
    script = "import os,sys,time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    popen = subprocess.Popen
    monkeypatch.setattr(launch, "GRACE", 0.5)
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda _, **kw: popen([sys.executable, "-c", script], **kw)
    )
    assert launch.launch(tmp_path, 2) in (7, -9)


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_that_fails_keeps_what_it_has_trained(trained, command, monkeypatch, tmp_path):
    """Before the first checkpoint too; where nothing was trained, no empty run stays behind."""

    def fails(folder, processes, **_):
        if trained:
            (folder / "metrics.csv").write_text("step,g/adv\n240,0.5\n", encoding="utf-8")
        return 1

    monkeypatch.setattr(launch, "launch", fails)
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert command("run", "debug=smoke", *TWO, f"run_dir={tmp_path / 'run'}")[0] == 1
    left = {p.name for p in (tmp_path / "run").glob("*")}
    assert left == ({"config.yaml", "run.json", "run.log", "metrics.csv"} if trained else set())


@pytest.fixture
def job(command, monkeypatch, tmp_path):
    """A command in a job of SLURM, without any training -> (exit code, stderr, step from which it
    goes on).
    """
    monkeypatch.setattr("distill.config.build.build_training", lambda _: None)
    monkeypatch.setattr("distill.config.build.check", lambda _: None)
    began = []

    def trained(cfg, folder, parts):
        began.append((str(folder), cfg.resume))
        (folder / "metrics.csv").touch()  # it has come to a step
        return 0

    monkeypatch.setattr("distill.run.train", trained)

    def call(*arguments, **environment):
        for name, value in {
            "JOB_ID": "7",
            "JOB_NAME": "x",
            "PROCID": "0",
            "NTASKS": "1",
            **environment,
        }.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        began.clear()
        code, _, err = command("run", *arguments)
        return code, err, list(began)

    return call


@pytest.mark.slow
def test_a_second_run_in_a_job_of_slurm_is_refused(job):
    folder = "runs/slurm_7_ladd_shapes"
    assert job() == (0, "", [(folder, None)])
    what = "choose another run_dir= or remove it, since it has no checkpoint to resume from"
    said = f"run_dir={folder} holds a run already; {what}"
    assert job()[:2] == (1, f"distill: {said}\n")
    assert job(PROCID="1", NTASKS="2")[0] == 0  # the first process has made it a moment ago
    assert job("name=other")[2] == [("runs/slurm_7_other", None)]
    assert job("-m", "seed=0,1")[2] == [(f"{folder}_0", None), (f"{folder}_1", None)]
    first, second = (job(JOB_NAME="bash")[2][0][0] for _ in range(2))  # srun --pty bash
    assert first != second
    assert "slurm" not in first + second


@pytest.mark.parametrize("arguments", [[], ["run_dir=mine", "experiment=ladd_long_shapes"]])
def test_a_requeued_job_goes_on_by_itself(arguments, job, tmp_path):
    folder = "mine" if arguments else "runs/slurm_7_ladd_shapes"
    assert job(*arguments, RESTART_COUNT="0")[2] == [(folder, None)]
    assert job(*arguments, RESTART_COUNT="1")[2] == [
        (folder, None)
    ]  # ended before its first checkpoint: anew
    state = {"distill": {"iteration": 1}, "about": {"config": {}}}
    checkpoint_files.write_checkpoint(state, tmp_path / folder / "checkpoints" / "step_000001.ckpt")
    assert job(*arguments, RESTART_COUNT="2")[2] == [(folder, folder)]
    assert job(*arguments, RESTART_COUNT="0")[0] == 1


@pytest.mark.nightly
def test_the_jobs_of_a_sweep_run_once_each_on_two_processes(pipelines, shards, tmp_path):
    command = ["distill.run", "-m", "seed=0,1", *smoke(pipelines, shards, *TWO)]
    process = start(command, tmp_path)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for seed, folder in enumerate(folders):
        assert_run(folder, seed=seed)
    assert not tiny.same(student_of(folders[0]), student_of(folders[1]))


@pytest.mark.slow
def test_torchrun_and_slurm_give_what_the_command_gives(pipelines, shards, tmp_path):
    own = start(["distill.run", *smoke(pipelines, shards, *TWO, "run_dir=own")], tmp_path)
    assert own.wait(timeout=300) == 0
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distill.run"]
    by_torchrun = start([*torchrun, *smoke(pipelines, shards, *TWO, "run_dir=torchrun")], tmp_path)
    assert by_torchrun.wait(timeout=300) == 0
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "distil",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = ["distill.run", *smoke(pipelines, shards, *TWO, "name=job")]
    tasks = [
        start(command, tmp_path, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i in range(2)
    ]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0]
    said = [process.stdout.read().splitlines() for process in (own, by_torchrun, *tasks)]
    # The first of their processes speaks, and no other.
    assert [lines.count("training: 2 steps") for lines in said] == [1, 1, 1, 0]
    folders = [tmp_path / "own", tmp_path / "torchrun", tmp_path / "runs" / "slurm_4711_job"]
    for folder in folders:
        assert_run(folder)
        assert tiny.same(student_of(folder), student_of(folders[0]))


def test_torchrun_without_a_run_folder_is_refused(command, monkeypatch, pipelines, shards):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, err = command("run", *smoke(pipelines, shards, *TWO))
    assert code == 1
    assert "distill: run_dir=null: processes of torchrun do not share a new folder" in err


@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm", "ray"])
def test_launchers_of_hydra_compose_with_ours(launcher):
    """They are plugins: `pip install hydra-submitit-launcher`, `hydra-ray-launcher`."""
    pytest.importorskip(
        {"r": "hydra_plugins.hydra_ray_launcher"}.get(
            launcher[0], "hydra_plugins.hydra_submitit_launcher"
        )
    )
    from hydra import compose, initialize_config_dir

    from distill.config.location import CONF_DIR

    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[f"hydra/launcher={launcher}", "method=ladd"],
            return_hydra_config=True,
        )
    assert launcher.split("_")[0] in cfg.hydra.launcher._target_


# -- search ----------------------------------------------------------------------------------------


class Trial:
    """Answers with the low end of everything."""

    def suggest_float(self, key, low, high, log):
        return low + (1000 if log else 0)

    def suggest_int(self, key, low, high):
        return low

    def suggest_categorical(self, key, values):
        return values[0]


def test_a_space_is_read():
    space = ["a.b=log(1, 10)", "c=uniform(-1,1)", "d=int(2,8)", "e=choice(hinge,relativistic)"]
    assert search.suggest(Trial(), space) == ["a.b=1001.0", "c=-1.0", "d=2", "e=hinge"]


def test_choices_are_as_a_configuration_has_them():
    *_, values = search.parsed("x=choice(true, null, 1e-5, hinge, [global], [global, local])")
    assert values == ["true", "null", "1e-05", "hinge", '["global"]', '["global","local"]']


def test_the_first_trial_has_what_the_run_has_anyway():
    keys = {
        "optimizer.student.lr": ("log(1e-4,1e-3)", 3e-4),
        "discriminator.features.taps": ("choice(encoder,blocks)", "blocks"),
        "discriminator.heads.spectral": ("choice(true,false)", "false"),
        "loop.discriminator_updates": ("int(1,3)", 2),
        "student.init": ("choice(random)", None),  # not among them
        "method.distill_weight": ("log(100,200)", None),
    }
    found = search._first_parameters(
        ["experiment=ladd_long_shapes"], [f"{key}={text}" for key, (text, _) in keys.items()]
    )
    assert found == {key: value for key, (_, value) in keys.items() if value is not None}


@pytest.mark.parametrize(
    "bad", ["a", "a=choice([b)", "a=log(1)", "a=uniform(1,2,3)", "a=any(1,2)", "a=import os(1,2)"]
)
def test_a_space_that_does_not_parse_is_named(bad):
    with pytest.raises(ValueError, match="space: "):
        search.suggest(Trial(), [bad])


def test_the_score_is_judged_or_logged(tmp_path):
    rows = [
        {"who": "teacher", "steps": 1, "frechet": 9.0},
        {"who": "student", "steps": 1, "frechet": 4.0},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    (tmp_path / "metrics.csv").write_text(
        "step,g/adv,other\n1,0.5,\n2,0.25,\n3,,1\n", encoding="utf-8"
    )
    assert search.score(tmp_path, "frechet", 1) == 4.0
    assert search.score(tmp_path, "g/adv", 1) == 0.25
    with pytest.raises(ValueError, match="metric=none"):
        search.score(tmp_path, "none", 1)


@pytest.fixture
def trials(command, monkeypatch, tmp_path):
    """A search whose trials are judged at once, by the rate they have: -> what it said, and the
    rates so far.
    """
    pytest.importorskip("optuna")
    rates = []

    def run(words, **_):
        rates.append(
            float(next(word for word in words if word.startswith("a.b=")).removeprefix("a.b="))
        )
        folder = Path(
            next(word for word in words if word.startswith("run_dir=")).removeprefix("run_dir=")
        )
        folder.mkdir(parents=True)
        row = {"who": "student", "steps": 1, "rate": rates[-1], "broken": math.nan}
        (folder / "evaluation.json").write_text(json.dumps({"rows": [row]}), encoding="utf-8")
        (folder / "metrics.csv").write_text("step\n1\n", encoding="utf-8")
        return SimpleNamespace(returncode=0, stderr=b"")

    monkeypatch.setattr("distill.search.subprocess.run", run)
    monkeypatch.setattr("distill.search._first_parameters", lambda *_: {"a.b": 0.25})

    def call(metric, count):
        words = [
            "space=['a.b=uniform(0,1)']",
            f"metric={metric}",
            f"trials={count}",
            "run=[]",
            "out=found",
        ]
        code, _, err = command("search", *words)
        return code, err, list(rates)

    return call


def test_a_misspelt_metric_is_said_and_may_be_corrected(trials):
    code, said, _ = trials("rates", 2)
    assert code == 1
    assert said.startswith("distill: metric=rates: ")
    code, _, rates = trials("rate", 2)
    assert code == 0
    assert rates[:2] == [0.25, 0.25]  # the run's own values are tried first all the same
    assert len(rates) == 3


def test_trials_without_a_finite_value_count(trials):
    code, said, rates = trials("broken", 3)
    assert (code, len(rates)) == (1, 3)
    assert said == "distill: metric=broken: none of the trials has a finite value of it\n"


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped(command, pipelines, shards, tmp_path):
    pytest.importorskip("optuna")
    run = json.dumps(smoke(pipelines, shards)).replace(" ", "")
    options = [
        f"run={run}",
        "space=['optimizer.student.lr=log(1e-6,1e-4)','optimizer.discriminator.lr=log(1e-4,1e-2)']",
        "metric=g/adv",
        "out=found",
    ]
    assert command("search", *options, "trials=1")[0] == 0
    plain = OmegaConf.load(tmp_path / "found/trial_000/config.yaml").optimizer.discriminator.lr
    assert plain == 2e-3  # begun with what it has anyway
    code, out, _ = command("search", *options, "trials=2")
    assert code == 0
    assert "trial 1: g/adv" in out
    assert "trial 0" not in out.replace("best: trial 0", "")
    rates = [
        OmegaConf.load(tmp_path / f"found/trial_00{i}/config.yaml").optimizer.student.lr
        for i in range(2)
    ]
    assert rates[0] != rates[1]
    assert all(1e-6 <= rate <= 1e-4 for rate in rates)
    rows = list(csv.DictReader((tmp_path / "found" / "trials.csv").open(encoding="utf-8")))
    assert sorted(float(row["optimizer.student.lr"]) for row in rows) == pytest.approx(
        sorted(rates)
    )
    assert float(rows[0]["value"]) >= float(
        rows[1]["value"]
    )  # g/adv is to be as large as can be, by default
    code, _, said = command(
        "search", *options[:2], "metric=d/adv", "out=found", "direction=minimize", "trials=3"
    )
    assert code == 1
    assert "out=found holds trials of another metric, direction; choose another out=" in said
