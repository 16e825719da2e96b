"""Methods without a discriminator: what they learn from, in closed form, and that a run of them is
like any other.
"""

from __future__ import annotations

import csv
import json

import pytest
import torch

import tiny
from distill.core.types import Batch

toy = tiny.Toy()


def watched(method) -> list[tuple]:
    """What the student is asked from now on: x_t, t, and whether with graph."""
    asked, of = [], method.student.x0
    method.student.x0 = lambda x_t, t, cond: (
        asked.append((x_t, t, torch.is_grad_enabled())) or of(x_t, t, cond)
    )
    return asked


def test_regression_repeats_pairs_at_t_1_and_denoises_below():
    method = tiny.regression(toy)
    batch = tiny.simple_batch(method, 64)
    asked = watched(method)
    draws, fake = tiny.drawn(method, batch)
    ((x_t, t, grad),) = asked
    pure = t == 1
    assert grad
    assert 0 < int(pure.sum()) < 64
    assert torch.equal(x_t[pure], batch.noise[pure])
    levels = t.view(-1, 1, 1, 1)
    eps = ((x_t - (1 - levels) * batch.x0) / levels)[~pure]
    assert not torch.allclose(
        eps, batch.noise[~pure], atol=0.1
    )  # what it was made from is not what it is shown
    assert float(eps.std()) == pytest.approx(1, abs=0.1)
    terms = method.student_loss(batch, draws, fake).terms
    torch.testing.assert_close(terms["regression"], (fake.x0_hat - batch.x0).square().mean())


def test_regression_wants_the_noise():
    method = tiny.regression(toy, options={"real": None})
    with pytest.raises(
        ValueError, match=r"needs the noise of each sample: data\.seeded=true, or method\.real"
    ):
        tiny.drawn(method, tiny.simple_batch(method))


def test_consistency_looks_one_guided_step_of_euler_ahead(teachers):
    """On a rectified flow x_s = x_t + (s - t) v, with v = (x_t - x0') / t and x0' guided by
    hand.
    """
    teacher = teachers("mmdit")
    method = tiny.consistency(teacher, options={"steps": 2, "guidance": 3.0})
    tiny.shake(method.student, 3)
    batch = tiny.simple_batch(method, 8)
    asked = watched(method)
    draws, fake = tiny.drawn(method, batch)
    (x_s, s, with_graph), (x_t, t, grad) = asked
    assert (with_graph, grad) == (False, True)
    assert set(t.tolist()) == {0.5, 1.0}
    torch.testing.assert_close(s, t - 0.5)
    assert not fake.target.requires_grad
    with torch.no_grad():
        told, empty = teacher.x0(x_t, t, batch.cond), teacher.x0(x_t, t, batch.cond.unconditional())
        guided = empty + 3 * (told - empty)
        speed = (x_t - guided) / t.view(-1, 1, 1, 1)
        torch.testing.assert_close(
            x_s, x_t + (s - t).view(-1, 1, 1, 1) * speed, rtol=1e-4, atol=1e-4
        )
        last = s == 0
        torch.testing.assert_close(fake.target[last], guided[last], rtol=1e-4, atol=1e-4)
        ahead = method.student.x0(x_s, s, batch.cond)
    torch.testing.assert_close(fake.target[~last], ahead[~last], rtol=1e-4, atol=1e-4)
    terms = method.student_loss(batch, draws, fake).terms
    torch.testing.assert_close(terms["consistency"], (fake.x0_hat - fake.target).square().mean())


def test_the_exact_solution_of_the_path_is_consistent():
    """A student that knows where the teacher's path ends has next to no loss; the teacher's own
    estimate has much.
    """
    method = tiny.consistency(toy, options={"steps": 200, "guidance": 1.0})
    x0, cond = toy.data(256, torch.Generator().manual_seed(0)), toy.embed([""] * 256)
    batch = Batch(x0=x0, captions=("",) * 256, cond=cond)

    def solved(x_t, t, cond):
        for left in torch.linspace(1, 0, 401)[:-1]:
            speed = (x_t - toy.x0(x_t, (t * left).clamp(min=1e-6), cond)) / (t * left).clamp(
                min=1e-6
            ).view(-1, 1, 1, 1)
            x_t = x_t - (t / 400).view(-1, 1, 1, 1) * speed
        return x_t

    def loss(student):
        method.student.x0 = student
        return float(method.student_loss(batch, *tiny.drawn(method, batch)).terms["consistency"])

    with torch.no_grad():
        assert loss(solved) < 0.2 * loss(toy.x0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["method=consistency"],
        ["method=consistency", "teacher=shapes_unet"],
        ["method=regression", "data.seeded=true"],
    ],
    ids=["consistency", "unet", "regression"],
)
def test_a_run_without_a_discriminator_is_like_any_other(
    arguments, command, pipelines, shards, tmp_path
):
    family = "unet" if "teacher=shapes_unet" in arguments else "mmdit"
    where = [
        f"teacher.path={pipelines(family)}",
        f"data.path={shards}",
        f"run_dir={tmp_path / 'run'}",
    ]
    code, _, err = command("run", "debug=smoke", *arguments, *where)
    assert code == 0, err
    name = f"g/{arguments[0].partition('=')[2]}"
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    assert [float(row["step"]) for row in rows] == [1, 2]
    assert not [key for key in rows[0] if key.startswith("d/")]
    assert all(float(row["g/grad_norm"]) > 0 for row in rows)
    judged = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["who"], row["steps"]) for row in judged if row["who"] == "student"] == [
        ("student", 1),
        ("student", 2),
    ]
    assert (tmp_path / "run" / "report.html").is_file()
    code, _, err = command("inspect", f"run={tmp_path / 'run'}")
    assert (code, err) == (
        1,
        f"distill: run={tmp_path / 'run'}: was trained without a discriminator; name another run\n",
    )
