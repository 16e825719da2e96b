"""Diffusion-DPO: its loss by an independent computation, its reference, and its pairs."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from distill.core.process import RectifiedFlow, VariancePreserving
from distill.core.times import Uniform
from distill.core.types import Batch, Cond, Players
from distill.data import source
from distill.data.write import write_preferences
from distill.methods.dpo import DPO, Draws
from distill.sampling import seeded
from distill.sampling.guided import Guided, guided
from families import teacher_at

CUMPROD = torch.linspace(0.9999, 0.98, 1000, dtype=torch.float64).cumprod(0)
FAMILIES = {
    "eps": VariancePreserving(CUMPROD),
    "v": VariancePreserving(CUMPROD),
    "flow": RectifiedFlow(),
}


class Linear:
    """A network whose own prediction is gain * x_t + offset."""

    def __init__(self, kind: str, gain: float, offset: float):
        self.prediction, self.process = kind, FAMILIES[kind]
        self.gain, self.offset = gain, torch.tensor(offset, dtype=torch.float64, requires_grad=True)

    def x0(self, x_t, t, cond):
        predicted = self.gain * x_t + self.offset
        return self.process.to_x0(predicted, x_t, t, self.prediction)

    def embed(self, captions):
        return Cond(torch.zeros(len(captions), 1, 1), null=Cond(torch.zeros(1, 1, 1)))


def levels(kind: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, from the definitions of the families alone."""
    if kind == "flow":
        return 1 - t, t
    table = CUMPROD.numpy()[np.round(t * 1000).astype(int) - 1]
    return np.sqrt(table), np.sqrt(1 - table)


def by_hand(kind, winner, loser, noise, t, student, reference, beta):
    """The loss and its derivative by the student's offset."""
    alpha, sigma = (level[:, None, None, None] for level in levels(kind, t))

    def error(x, network):
        x_t = alpha * x + sigma * noise
        target = {"eps": noise, "v": alpha * noise - sigma * x, "flow": noise - x}[kind]
        miss = network.gain * x_t + float(network.offset.detach()) - target
        return (miss**2).mean((1, 2, 3)), 2 * miss.mean((1, 2, 3))

    (of_w, slope_w), (of_l, slope_l) = (error(x, student) for x in (winner, loser))
    ref_w, ref_l = (error(x, reference)[0] for x in (winner, loser))
    logit = -beta / 2 * ((of_w - ref_w) - (of_l - ref_l))
    loss = np.log1p(np.exp(-logit))
    slope = -1 / (1 + np.exp(logit)) * -beta / 2 * (slope_w - slope_l)
    return loss.mean(), slope.mean(), (logit > 0).mean()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_is_that_of_the_paper(kind):
    student, teacher = Linear(kind, 0.7, 0.05), Linear(kind, 0.6, -0.02)
    random = np.random.default_rng(0)
    winner, loser, noise = random.standard_normal((3, 5, 2, 3, 3))
    t, beta = np.array([0.002, 0.25, 0.5, 0.75, 0.998]), 30.0
    x_w, x_l, eps = map(torch.from_numpy, (winner, loser, noise))
    method = DPO(Players(teacher=teacher, student=student), beta=beta, times=Uniform(0.001, 1.0))
    batch = Batch(x0=x_w, captions=("",) * 5, cond=teacher.embed([""] * 5), loser=x_l)
    draws = Draws(t=torch.from_numpy(t), noise=eps)
    found = method.student_loss(batch, draws, method.student_sample(batch, draws))
    loss = found.terms["dpo"]
    expected, slope, preferred = by_hand(kind, winner, loser, noise, t, student, teacher, beta)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, student.offset)
    assert float(gradient) == pytest.approx(slope, rel=1e-5)
    assert float(found.metrics["pairs/preferred"]) == pytest.approx(preferred)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_other_errors_are_those_of_eps_up_to_a_weight(kind):
    """|v - v'|^2 = |eps - eps'|^2 / alpha^2, and the same of a flow."""
    process, t = FAMILIES[kind], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x, eps, other = torch.randn((3, 3, 1, 2, 2), dtype=torch.float64)
    x_t = process.diffuse(x, eps, t)

    def miss(name):
        pair = (process.from_x0(x0, x_t, t, name) for x0 in (x, other))
        return (next(pair) - next(pair)).square().mean((1, 2, 3))

    torch.testing.assert_close(miss(kind), miss("eps") / process.alpha(t) ** 2)


def test_a_student_that_is_its_reference_has_log_two(teacher):
    method = tiny.dpo(teacher)
    batch = tiny.simple_batch(method)
    draws, sample = tiny.drawn(method, batch)
    found = method.student_loss(batch, draws, sample)
    assert float(found.terms["dpo"].detach()) == pytest.approx(np.log(2), abs=1e-6)
    assert float(found.metrics["pairs/preferred"]) == 0.5
    x_w, x_l = sample.x_t.chunk(2)
    alpha = method.teacher.process.alpha(draws.t).view(-1, 1, 1, 1)
    torch.testing.assert_close(  # one noise for both
        x_w - alpha * batch.x0, x_l - alpha * batch.loser, rtol=1e-4, atol=1e-4
    )


def test_the_reference_of_a_lora_is_its_own_network_and_stays(pipelines, tmp_path):
    base = teacher_at(pipelines("unet"))
    cond, x = base.embed(tiny.CAPTIONS[:2]), torch.randn(2, *base.latent_shape)
    before = base.x0(x, torch.tensor([0.3, 0.8]), cond)
    method = tiny.dpo(base, lora={"rank": 2}, rate=1e-2, options={"beta": 200.0})
    assert method.student.model is method.teacher.network.model
    # Each of 4 pairs again and again: the student learns to prefer these winners.
    data = [{"x0": torch.randn(4, *base.latent_shape), "caption": tiny.CAPTIONS[:4]}] * 12
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    tiny.trainer(tmp_path, 12).fit(method, loader)
    assert torch.equal(base.x0(x, torch.tensor([0.3, 0.8]), cond), before)
    assert method.loop.last_logged["g/dpo"] < 0.6
    assert method.loop.last_logged["pairs/preferred"] > 0.7


def test_data_without_losers_are_refused(teachers):
    method = DPO(
        Players(teacher=teachers("mmdit"), student=teachers("mmdit").network),
        times=Uniform(0.001, 1.0),
    )
    batch = {"x0": torch.zeros(1, *teachers("mmdit").latent_shape), "caption": ["a"]}
    with pytest.raises(ValueError, match=r"pairs of a winner and a loser.*data=preference"):
        method.prepare_batch(batch, torch.Generator())


# -- pairs -----------------------------------------------------------------------------------------


def latents(count=9, shape=(4, 16, 16)):
    random = np.random.default_rng(1)
    return [
        (f"{i:03d}", *random.standard_normal((2, *shape)), tiny.CAPTIONS[i]) for i in range(count)
    ]


@pytest.fixture
def pairs(tmp_path):
    write_preferences(str(tmp_path / "pairs" / "pairs-%06d.tar"), iter(latents()), per_shard=4)
    return tmp_path / "pairs"


def put(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "a") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png(side=16, colour=0) -> bytes:
    Image.new("RGB", (side, side), (colour, 0, 0)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_latents_of_pairs_are_read_as_they_were_written(pairs, caplog):
    data = source.preferences(str(pairs), batch_size=2).dataset
    assert len(data) == 9
    for i, (key, winner, loser, caption) in enumerate(latents()):
        assert (data[i]["key"], data[i]["caption"]) == (key, caption)
        torch.testing.assert_close(data[i]["x0"], torch.from_numpy(winner).half().float())
        torch.testing.assert_close(data[i]["loser_x0"], torch.from_numpy(loser).half().float())
    assert not caplog.records


def test_the_order_goes_on_and_is_divided_among_ranks(pairs):
    data = source.preferences(str(pairs), batch_size=2)

    def keys(steps, **options):
        loader = iter(data.loader(seed=3, **options))
        return [next(loader)["key"] for _ in range(steps)]

    whole = keys(12)
    assert keys(7, start=5) == whole[5:]
    ranks = [keys(6, rank=rank, world=2) for rank in range(2)]
    together = source.preferences(str(pairs), batch_size=4).loader(seed=3)
    both = [next(batches)["key"] for batches in [iter(together)] for _ in range(6)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == both


def test_pictures_of_pairs(tmp_path):
    path = tmp_path / "x.tar"
    put(path, {"1.winner.png": png(32, 255), "1.loser.png": png(16, 10), "1.txt": b"a red"})
    put(
        path, {"2.winner.png": png(16, 9), "2.loser.jpg": png(16, 8), "2.json": b'{"caption": "b"}'}
    )
    data = source.preferences(str(path), batch_size=1, size=16).dataset
    assert data[0]["pixels"].shape == data[0]["loser_pixels"].shape == (3, 16, 16)
    assert data[0]["pixels"][0].min() == 1
    assert data[0]["loser_pixels"][0].max() < -0.9
    assert data[1]["caption"] == "b"


WRONG = {
    "loser": (
        {"1.winner.png": png()},
        r"it has no loser \(loser\.png, .*\), only txt, winner\.png",
    ),
    "winner": ({"1.loser.png": png()}, r"it has no winner "),
    "same": (
        {"1.winner.png": png(), "1.loser.png": png()},
        "its winner and its loser are the same",
    ),
    "damaged": (
        {"1.winner.png": png(), "1.loser.png": png()[:40]},
        r"of its loser: its \.png does not decode",
    ),
    "small": ({"1.winner.png": png(), "1.loser.png": png(2)}, "of its loser: its image is 2 x 2"),
    "mixed": (
        {"1.winner.png": png(), "1.loser.npy": b"x"},
        "one of its pair is latents and the other a picture",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_pair_is_named_in_one_sentence(name, tmp_path):
    files, reason = WRONG[name]
    path = put(tmp_path / "x.tar", {**files, "1.txt": b"a"})
    with pytest.raises(
        ValueError, match=rf"none of its first 1 samples is usable.*{reason}"
    ) as said:
        source.preferences(str(path), batch_size=1, size=16)
    assert "\n" not in str(said.value)


def test_latents_of_other_shapes_are_bad_pairs(tmp_path):
    random = np.random.default_rng(0)
    rows = [("0", *random.standard_normal((2, 4, 8, 8)), "a")]
    rows.append(("1", random.standard_normal((4, 8, 8)), random.standard_normal((4, 8, 4)), "b"))
    rows.append(("2", *random.standard_normal((2, 4, 4, 4)), "c"))
    write_preferences(str(tmp_path / "x-%06d.tar"), iter(rows), per_shard=9)
    data = source.preferences(str(tmp_path), batch_size=1, max_bad_share=1.0).dataset
    assert [data.find(i, most=1)[0] is None for i in range(3)] == [False, True, True]
    (_, first), (_, second) = (data.find(i, most=1)[1][0] for i in (1, 2))
    assert first == "its winner's latents are [4, 8, 8] and its loser's [4, 8, 4]"
    assert second.endswith("[4, 4, 4], and the first pair's [4, 8, 8]")


@pytest.mark.parametrize("first", ["pictures", "latents"])
def test_a_set_has_pairs_of_pictures_or_of_latents(first, tmp_path):
    """Both do not fit into one batch, so the other kind is bad, and `check` counts it."""
    latent = io.BytesIO()
    np.save(latent, np.ones((4, 8, 8), np.float32))
    other = io.BytesIO()
    np.save(other, np.zeros((4, 8, 8), np.float32))
    kinds = {
        "pictures": {"winner.png": png(32, 255), "loser.png": png(32, 10), "txt": b"a"},
        "latents": {"winner.npy": latent.getvalue(), "loser.npy": other.getvalue(), "txt": b"b"},
    }
    second = next(kind for kind in kinds if kind != first)
    for key, kind in enumerate((first, second)):
        files = {f"{key}.{end}": content for end, content in kinds[kind].items()}
        put(tmp_path / "x.tar", files)
    options = {"batch_size": 1, "size": 32, "max_bad_share": 1.0}
    data = source.preferences(str(tmp_path / "x.tar"), **options).dataset
    assert data.find(0, most=1)[0] is not None
    found, ((_, reason),) = data.find(1, most=1)
    assert found is None
    assert reason == f"it is a pair of {second}, and the first of {first}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sampler=guided"], "data: this method learns from pairs of a winner and a loser"),
        (
            ["data=preference", "data.path={pairs}"],
            "sampler: Consistency does not fit a method that keeps the teacher's many steps",
        ),
        (
            ["method=ladd", "data=preference", "data.path={pairs}"],
            "holds pairs of a preference, which this method does not read",
        ),
        (["method=ladd", "sampler=guided"], "does not fit a method that trains few steps"),
        (
            ["sampler=guided", "data=preference", "data.path={pairs}", "method.beta=-1"],
            "method.beta=-1: must be above 0",
        ),
        (
            ["sampler=guided", "data=preference", "data.path=none.tar"],
            "data.path=none.tar: no such file or folder; check the path",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(words, said, command, pairs, pipelines):
    words = ["method=dpo", *(word.format(pairs=pairs) for word in words)]
    path = f"teacher.path={pipelines('mmdit')}"
    code, _, err = command("run", "teacher=shapes", path, *words, "run_dir=run")
    assert code != 0
    assert said in err
    assert not Path("run").exists()


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mmdit", "unet"])
def test_the_guided_sampler_draws_what_the_teacher_draws(family, pipelines):
    teacher = teacher_at(pipelines(family))
    # Else DDIM leaves the noise of its first training step.
    teacher.pipeline.scheduler.register_to_config(set_alpha_to_one=True)
    cond = teacher.embed(tiny.CAPTIONS[:2])
    options = {"shape": teacher.latent_shape, "steps": 5}
    shift = float(teacher.pipeline.scheduler.config.get("shift", 1.0))
    sampler = Guided(guidance=3.0, flow_shift=shift)
    found = sampler(teacher.network, cond, seeded([1, 2]), **options)
    expected = guided(teacher, cond, seeded([1, 2]), guidance=3.0, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_run_leaves_a_lora_and_a_pipeline_of_many_steps(command, pairs, pipelines):
    words = ["method=dpo", "sampler=guided", "student=lora", "student.rank=4", "data=preference"]
    words += [f"data.path={pairs}", "teacher=shapes", f"teacher.path={pipelines('mmdit')}"]
    words += ["~metrics", "debug=smoke", "data.num_workers=0", "sampler.guidance=2.0"]
    words += ["optimizer.student.lr=1e-2", "loop.ema_decay=0", "loop.warmup_steps=0"]
    code, _, err = command("run", *words, "run_dir=run")
    assert code == 0, err
    assert Path("run/lora.safetensors").is_file()
    card = Path("run/student/README.md").read_text(encoding="utf-8")
    assert "many guided steps" in card
    assert "num_inference_steps=28, guidance_scale=2.0" in card
    code, _, err = command("sample", "run=run", "prompt=a red square")
    assert code != 0
    assert "was not distilled to few steps; add guidance" in err
    code, out, err = command("sample", "run=run", "prompt=a red square", "guidance=2", "steps=3")
    assert code == 0, err
    tuned = np.asarray(Image.open(out.split()[0]))
    # The teacher with the LoRA added is the tuned model.
    words = [f"run={pipelines('mmdit')}", "prompt=a red square", "guidance=2", "steps=3"]
    code, out, err = command("sample", *words, "lora=run", "out=added")
    assert code == 0, err
    added = np.asarray(Image.open(out.split()[0]))
    assert np.abs(tuned.astype(int) - added).max() <= 1


def test_lora_students_of_this_method_have_no_second_network(pipelines):
    base = teacher_at(pipelines("mmdit"))
    method = tiny.dpo(base, lora={"rank": 2})
    own = sum(p.numel() for p in method.student.parameters())
    assert own < sum(p.numel() for p in base.network.model.parameters()) / 4
    assert method.student.adapters is not None
