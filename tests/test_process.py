"""Identities of the noise processes, and agreement with the schedulers of diffusers."""

import diffusers
import pytest
import torch

from distill.core.process import Process, RectifiedFlow, VariancePreserving

PREDICTIONS = ["eps", "v", "x0", "flow"]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion_table() -> torch.Tensor:
    return torch.cumprod(
        1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
    )


PROCESSES = {
    "flow": RectifiedFlow(),
    "flow-shift-3": RectifiedFlow(3.0),
    "vp": VariancePreserving(stable_diffusion_table()),
    "vp-zero-snr": VariancePreserving(stable_diffusion_table(), zero_terminal_snr=True),
}


@pytest.fixture(params=PROCESSES.values(), ids=PROCESSES.keys())
def process(request) -> Process:
    return request.param


def draw(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and eps."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x0, eps


def predict(
    prediction: str, x0: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
):
    """What an ideal network of each kind says, written out from the definitions."""
    return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 3, 3), (7, 2, 2, 3, 3)], ids=["2d", "4d", "5d"])
def test_round_trips(process, prediction, shape):
    x0, eps = draw(*shape)
    t = torch.tensor([0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.998], dtype=torch.float64)
    column = [-1] + [1] * (len(shape) - 1)
    alpha, sigma = process.alpha(t).view(column), process.sigma(t).view(column)
    x_t = process.diffuse(x0, eps, t)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * eps, rtol=0, atol=1e-14)
    pred = predict(prediction, x0, eps, alpha, sigma)
    torch.testing.assert_close(process.to_x0(pred, x_t, t, prediction), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.from_x0(x0, x_t, t, prediction), pred, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.from_x0(x0, x_t, t, "eps"), eps, rtol=0, atol=1e-11)
    # Not only for consistent triples: the two maps are inverse to each other for any prediction.
    other = torch.randn_like(x0)
    back = process.from_x0(process.to_x0(other, x_t, t, prediction), x_t, t, prediction)
    torch.testing.assert_close(back, other, rtol=0, atol=1e-10)


def test_levels_run_from_data_to_noise(process):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha.shape == sigma.shape == t.shape
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert process.ends_in_noise == bool(alpha[-1] == 0)
    if process.ends_in_noise:
        assert sigma[-1] == 1


@pytest.mark.parametrize("shift", [0.37, 1.0, 1.7, 3.0, 3.1, 6.0])
def test_rectified_flow_closed_form(shift):
    process = RectifiedFlow(shift)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(
        process.sigma(t), shift * t / (1 + (shift - 1) * t), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        process.alpha(t) + process.sigma(t), torch.ones_like(t), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("shift", [hundredths / 100 for hundredths in range(10, 800, 13)])
def test_rectified_flow_reaches_both_ends_exactly(shift):
    """The textbook form of sigma misses 1 by a rounding for some shifts, and then alpha(1) is not
    0.
    """
    process = RectifiedFlow(shift)
    ends = torch.tensor([0.0, 1.0])
    assert process.sigma(ends).tolist() == [0, 1]
    assert process.alpha(ends).tolist() == [1, 0]


def test_unshifted_flow_is_t_itself():
    t = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RectifiedFlow().sigma(t), t)
    assert torch.equal(RectifiedFlow().alpha(t), 1 - t)


def test_variance_is_preserved_and_interpolation_is_linear_in_alpha():
    process = PROCESSES["vp"]
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14
    )
    root = stable_diffusion_table().sqrt()
    between = torch.tensor(
        [0.25 / 1000, (41 + 0.25) / 1000, (999 + 0.75) / 1000], dtype=torch.float64
    )
    expected = [
        0.75 + 0.25 * root[0],
        0.75 * root[40] + 0.25 * root[41],
        0.25 * root[998] + 0.75 * root[999],
    ]
    torch.testing.assert_close(process.alpha(between), torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [4, 1000, 1024, 4000])
def test_time_names_training_steps_exactly(steps):
    table = torch.linspace(0.999, 0.003, steps, dtype=torch.float64)
    process = VariancePreserving(table)
    index = torch.arange(steps)
    t = process.time(index)
    assert t.dtype == torch.float32
    assert t[-1] == 1
    assert torch.equal(process.index(t), index)
    assert process.index(torch.tensor([0.0, 0.4 / steps])).tolist() == [0, 0]
    # Equal, not close: float32 rounding of t must not leak into the levels.
    assert torch.equal(process.alpha(t), table.sqrt().float())
    assert torch.equal(process.sigma(t), (1 - table.sqrt() ** 2).sqrt().float())


def test_index_is_the_nearest_step():
    process = PROCESSES["vp"]
    t = torch.tensor([0.2504, 0.2506, 0.9996], dtype=torch.float32)
    assert process.index(t).tolist() == [249, 250, 999]


def test_ddpm_scheduler_agrees_on_noising_and_velocity():
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, **STABLE_DIFFUSION)
    process = VariancePreserving(scheduler.alphas_cumprod)
    x0, eps = draw(6, 4, 3, 3, dtype=torch.float32)
    index = torch.tensor([0, 1, 250, 499, 750, 999])
    t = process.time(index)
    x_t = process.diffuse(x0, eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, index), rtol=0, atol=1e-5)
    velocity = scheduler.get_velocity(x0, eps, index)
    torch.testing.assert_close(process.from_x0(x0, x_t, t, "v"), velocity, rtol=0, atol=2e-4)
    torch.testing.assert_close(process.to_x0(velocity, x_t, t, "v"), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("prediction", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
def test_ddim_scheduler_agrees_on_the_clean_estimate(prediction, theirs, zero_snr):
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        prediction_type=theirs,
        clip_sample=False,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        **STABLE_DIFFUSION,
    )
    scheduler.set_timesteps(4)
    process = VariancePreserving(stable_diffusion_table(), zero_terminal_snr=zero_snr)
    x_t, pred = draw(1, 4, 3, 3, seed=1, dtype=torch.float32)
    for index in scheduler.timesteps.tolist():
        if prediction == "eps" and zero_snr and index == 999:
            continue  # x0 is undefined there; diffusers divides by zero
        step = scheduler.step(pred, index, x_t)
        ours = process.to_x0(pred, x_t, process.time(torch.tensor([index])), prediction)
        torch.testing.assert_close(ours, step.pred_original_sample, rtol=1e-4, atol=1e-5)


def test_ddpm_table_with_zero_terminal_snr_agrees():
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, **STABLE_DIFFUSION)
    process = VariancePreserving(stable_diffusion_table(), zero_terminal_snr=True)
    alpha = process.alpha(process.time(torch.arange(1000)))
    torch.testing.assert_close(alpha, scheduler.alphas_cumprod.sqrt(), rtol=0, atol=1e-5)
    assert alpha[-1] == 0
    torch.testing.assert_close(
        alpha[0], stable_diffusion_table()[0].sqrt().float(), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_scheduler_agrees(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    process = RectifiedFlow(shift)
    unshifted = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(process.sigma(unshifted), scheduler.sigmas, rtol=0, atol=1e-6)
    x0, eps = draw(3, 4, 3, 3, dtype=torch.float32)
    chosen = torch.tensor([0, 400, 990])
    noised = scheduler.scale_noise(x0, scheduler.timesteps[chosen], eps)
    torch.testing.assert_close(
        process.diffuse(x0, eps, unshifted[chosen]), noised, rtol=0, atol=1e-5
    )


def test_flow_match_euler_steps_reach_what_x0_says():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1)
    x_1, flow = draw(2, 4, 3, 3, dtype=torch.float32)
    stepped = scheduler.step(flow, scheduler.timesteps[0], x_1).prev_sample
    ours = RectifiedFlow(3.0).to_x0(flow, x_1, torch.ones(2), "flow")
    torch.testing.assert_close(ours, stepped, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(process, dtype):
    x0, eps = draw(5, 2, 4, 4, dtype=dtype)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    x_t = process.diffuse(x0, eps, t)
    assert x_t.dtype == dtype
    assert torch.equal(x_t, process.diffuse(x0.float(), eps.float(), t).to(dtype))
    for prediction in PREDICTIONS:
        x = process.to_x0(eps, x_t, t, prediction)
        assert x.dtype == dtype
        assert torch.equal(x, process.to_x0(eps.float(), x_t.float(), t, prediction).to(dtype))


def test_gradient_flows_through_the_solve():
    process = RectifiedFlow()
    x_t, pred = (x.requires_grad_() for x in draw(2, 3))
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    process.to_x0(pred, x_t, t, "flow").sum().backward()
    torch.testing.assert_close(x_t.grad, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(pred.grad, -t[:, None].expand(2, 3))


@pytest.mark.parametrize("name", ["flow", "flow-shift-3", "vp-zero-snr"])
def test_eps_at_pure_noise_is_refused_and_the_rest_is_fine(name):
    process = PROCESSES[name]
    x_t, pred = draw(2, 3)
    t = torch.tensor([0.5, 1.0])
    with pytest.raises(ValueError, match="use a v, flow or x0 prediction"):
        process.to_x0(pred, x_t, t, "eps")
    for prediction in ("v", "flow", "x0"):
        assert process.to_x0(pred, x_t, t, prediction).isfinite().all()


def test_eps_at_the_last_step_of_stable_diffusion_is_fine():
    x0, eps = draw(1, 3)
    x_t = PROCESSES["vp"].diffuse(x0, eps, torch.ones(1))
    torch.testing.assert_close(
        PROCESSES["vp"].to_x0(eps, x_t, torch.ones(1), "eps"), x0, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_noise_cannot_be_told_from_clean_data(process, prediction):
    x0, _ = draw(2, 3)
    with pytest.raises(ValueError, match="no noise where sigma"):
        process.from_x0(x0, x0, torch.tensor([0.5, 0.0]), prediction)
    assert torch.equal(process.from_x0(x0, x0, torch.tensor([0.5, 0.0]), "x0"), x0)


def test_times_that_are_no_times_are_refused(process):
    x0, eps = draw(2, 3)
    with pytest.raises(ValueError, match="step indices"):
        process.diffuse(x0, eps, torch.tensor([1, 999]))
    with pytest.raises(ValueError, match="in \\[0, 1\\], got values from 1 to 999"):
        process.diffuse(x0, eps, torch.tensor([1.0, 999.0]))
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        process.sigma(torch.tensor([float("nan")]))
    for t in (torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 1), 0.5)):
        with pytest.raises(ValueError, match="t must have shape \\[2\\]"):
            process.diffuse(x0, eps, t)
    with pytest.raises(ValueError, match="one of eps, v, x0, flow, got 'epsilon'"):
        process.to_x0(eps, x0, torch.full((2,), 0.5), "epsilon")


def test_tables_that_are_no_tables_are_refused():
    with pytest.raises(ValueError, match="not the betas"):
        VariancePreserving(torch.linspace(0.001, 0.012, 10))
    with pytest.raises(ValueError, match="at least two"):
        VariancePreserving([0.5])
    with pytest.raises(ValueError, match="shift must be positive"):
        RectifiedFlow(0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_time_names_the_same_ratio_on_the_rectified_flow(shift: float) -> None:
    tau = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    process = RectifiedFlow(shift)
    t = process.from_flow_time(tau)
    torch.testing.assert_close(process.sigma(t) / process.alpha(t), tau / (1 - tau))


def test_flow_time_names_the_same_ratio_on_the_sd_schedule() -> None:
    """papers.md states the pairs flow .25/.5/.73/.9 = DDPM 95/354/647/914; beyond .936 the schedule
    ends.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    process = VariancePreserving((1 - betas).cumprod(0))
    tau = torch.tensor([0.25, 0.5, 0.73, 0.9], dtype=torch.float64)
    t = process.from_flow_time(tau)
    torch.testing.assert_close(process.sigma(t) / process.alpha(t), tau / (1 - tau))
    torch.testing.assert_close(
        process.index(t), torch.tensor([95, 354, 647, 914]), atol=1, rtol=0
    )  # .73 is rounded
    assert process.from_flow_time(torch.tensor([0.99, 1.0])).tolist() == [1.0, 1.0]
