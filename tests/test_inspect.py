"""What the discriminator sees: verdicts by head and level against plain loops, attention against
finite differences.
"""

from __future__ import annotations

import csv
import itertools

import pytest
import torch

import tiny
from distill.core.process import noise_like
from distill.core.types import Batch
from distill.report.inspection import Inspection, inspect_heads, write_inspection

LEVELS = [0.2, 0.5, 0.8]


def seen_by(name, teachers):
    torch.manual_seed(0)
    teacher = teachers("mmdit")
    method = tiny.METHODS[name](teacher)
    x0 = torch.randn(6, *teacher.latent_shape)
    captions = tuple(f"thing {i}" for i in range(6))
    batch = Batch(x0=x0, captions=captions, cond=teacher.embed(captions))
    return method, batch, inspect_heads(method, batch, LEVELS, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["ladd", "add", "nitrofusion", "dmd2"])
def test_every_head_is_asked_about_real_and_fake_at_every_level(name, teachers):
    method, batch, seen = seen_by(name, teachers)
    assert seen.real.shape == seen.fake.shape == (3, len(seen.heads), 6)
    noise = noise_like(batch.x0, torch.Generator().manual_seed(5))
    with torch.no_grad():
        x0_hat = method.student.x0(noise, torch.ones(6), batch.cond)
        t, streams = torch.full((6,), 0.5), method.loop.streams(method)
        maps, cond = method.critic_features(x0_hat, t, noise, batch, streams.patch_generator())
        logits = tiny.critic(method)(maps, t, cond).by_head()
    assert len(logits) == len(seen.heads)
    for head, expected in enumerate(logits):
        torch.testing.assert_close(seen.fake[1, head], expected.mean(1))


def test_attention_is_the_slope_of_a_head():
    torch.manual_seed(0)
    teacher = tiny.Toy()
    method, cond = tiny.ladd(teacher), teacher.embed(["a"] * 6)
    batch = Batch(x0=torch.randn(6, *teacher.shape), captions=("a",) * 6, cond=cond)
    seen = inspect_heads(method, batch, LEVELS, torch.Generator().manual_seed(5))
    noise, t = noise_like(batch.x0, torch.Generator().manual_seed(5)), torch.full((6,), LEVELS[1])
    critic = tiny.critic(method)
    with torch.no_grad():
        x0_hat = method.student.x0(noise, torch.ones(6), cond)

        def logit(x):
            features = method.loop.streams(method).patch_generator()
            maps, cond = method.critic_features(x, t, noise, batch, features)
            return critic(maps, t, cond).by_head()[0].mean(1)[0]

        slopes = torch.zeros(4, 4)
        for channel, row, column in itertools.product(*map(range, x0_hat.shape[1:])):
            step = torch.zeros_like(x0_hat)
            step[0, channel, row, column] = 1e-2
            slopes[row, column] += ((logit(x0_hat + step) - logit(x0_hat - step)) / 2e-2).abs()
    found = seen.attention[0, 0]
    torch.testing.assert_close(found / found.max(), slopes / slopes.max(), rtol=0.05, atol=0.02)


def test_rows_and_agreement_by_hand(tmp_path):
    real = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]])
    fake = torch.tensor([[[0.0, 2.0, 4.0], [1.0, 0.0, 1.0]]])
    looks = torch.rand(2, 3, 4, 4)
    seen = Inspection([0.5], ["a", "b"], real, fake, torch.rand(3, 3, 8, 8), [0, 1], looks)
    rows = list(seen.rows())
    assert [row["right"] for row in rows] == [pytest.approx(0.5), pytest.approx(1 / 3, abs=1e-4)]
    assert [row["gap"] for row in rows] == [pytest.approx(0.0), pytest.approx(-1 / 3, abs=1e-4)]
    a, b = (torch.cat([real[0, i], fake[0, i]]) for i in (0, 1))
    assert float(seen.agreement()[0, 1]) == pytest.approx(
        float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=1e-6
    )
    page = write_inspection(seen, tmp_path, "a run").read_text(encoding="utf-8")
    assert "tell real from fake 42% of the time; the best, a at t = 0.5, 50%." in page
    assert len(list(csv.DictReader((tmp_path / "heads.csv").open(encoding="utf-8")))) == 2


def test_the_command_reads_a_run(command, pipelines, shards, tmp_path):
    given = [
        f"teacher.path={pipelines('mmdit')}",
        f"data.path={shards}",
        f"run_dir={tmp_path / 'run'}",
    ]
    code, _, err = command("run", "debug=smoke", "~metrics", *given)
    assert code == 0, err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, said, err = command(
        "inspect", f"run={tmp_path / 'run'}", "samples=4", "levels=[0.5]", f"out={tmp_path / 'in'}"
    )
    assert code == 0, err
    assert said.splitlines()[-1] == f"wrote {tmp_path / 'in' / 'inspect.html'}"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    code, _, err = command("inspect", f"run={tmp_path}")
    assert (code, err) == (
        1,
        f"distill: run={tmp_path}: not a run folder (it has no config.yaml)\n",
    )
