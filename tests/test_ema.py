"""Averages of weights: the recursion itself, its precision, and swaps that leave no trace."""

import copy
import itertools

import pytest
import torch
from torch import nn

from distill.core.ema import Ema


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, x in model.state_dict().items():
        assert torch.equal(
            x.view(torch.uint8) if x.ndim else x,
            before[name].view(torch.uint8) if x.ndim else before[name],
        )


@pytest.mark.parametrize(("decay", "warmup_steps"), [(0.9, 10), (0.999, 10), (0.5, 0), (0.9, 100)])
def test_average_follows_the_recursion(decay, warmup_steps):
    model = make_model()
    ema = Ema(model, decay=decay, warmup_steps=warmup_steps)
    expected = {
        name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad
    }
    for step in range(60):
        move(model, step)
        ema.update(step)
        d = min(decay, (1 + step) / (warmup_steps + step)) if warmup_steps else decay
        for name, p in model.named_parameters():
            if name in expected:
                expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    assert ema.state_dict().keys() == expected.keys()
    for name, average in ema.state_dict().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_constant_target_is_approached_in_closed_form():
    p = nn.Parameter(torch.zeros(3))
    ema = Ema(nn.ParameterDict({"p": p}), decay=0.9, warmup_steps=0)
    with torch.no_grad():
        p.fill_(1)
    for step in range(25):
        ema.update(step)
    torch.testing.assert_close(ema.state_dict()["p"], torch.full((3,), 1 - 0.9**25))


def test_warmup_starts_low_and_ends_at_the_decay():
    ema = Ema(make_model(), decay=0.99)
    assert [ema.decay_at(step) for step in (0, 8, 890, 10**6)] == pytest.approx(
        [0.1, 0.5, 0.99, 0.99]
    )
    assert Ema(make_model(), decay=0.99, warmup_steps=0).decay_at(0) == 0.99
    assert Ema(make_model(), decay=0.99, warmup_steps=1).decay_at(0) == 0.99


def test_bfloat16_parameters_have_an_average_that_moves():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema(nn.ParameterDict({"p": p}), decay=0.9999, warmup_steps=0)
    with torch.no_grad():
        p.fill_(2)
    for step in range(10):
        ema.update(step)
    average = ema.state_dict()["p"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((4,), 2 - 0.9999**10), rtol=1e-6, atol=0)
    # Ten such moves kept in bfloat16 would have left it where it was.
    kept = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(10):
        kept.lerp_(p.detach(), 1e-4)
    assert torch.equal(kept, torch.ones(4, dtype=torch.bfloat16))


def test_only_trainable_parameters_are_averaged():
    model = make_model()
    assert set(Ema(model).state_dict()) == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}
    ema = Ema(model)
    for p in model.parameters():
        p.requires_grad_(
            False
        )  # as when the other player trains; it is the state at construction that counts
    move(model, 0)
    before = ema.state_dict()["2.bias"].clone()
    ema.update(0)
    assert not torch.equal(before, ema.state_dict()["2.bias"])
    with pytest.raises(ValueError, match="nothing to average"):
        Ema(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_swap_shows_the_average_and_restores_every_bit(dtype):
    model = make_model(dtype)
    ema = Ema(model, decay=0.9)
    for step in range(3):
        move(model, step)
        ema.update(step)
    with torch.no_grad():
        model[2].bias[0] = float("nan")  # a restored NaN is still the same NaN
        model[2].bias[1] = -0.0
    before, tensors = bits(model), [p.data_ptr() for p in model.parameters()]
    with ema.swap():
        for name, average in ema.state_dict().items():
            assert torch.equal(model.get_parameter(name), average.to(dtype))
        assert torch.equal(model[0].bias, before["0.bias"])
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert_same_bits(model, before)
    assert tensors == [p.data_ptr() for p in model.parameters()]


def peak(work) -> int:
    """Bytes that `work` takes from the CPU's allocator at once, as torch's profiler records
    them.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]
    return max(0, *itertools.accumulate(sizes))


def test_swap_takes_the_memory_of_one_tensor():
    """Not of a copy of the weights, which are gigabytes: 9.6 GiB of SDXL's."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    ema = Ema(model)
    move(model, 0)
    before, largest = bits(model), 4 * 256 * 256

    def twice():
        for _ in range(2):
            with ema.swap(), ema.swap():  # one within another changes nothing
                assert not torch.equal(model[0].weight, before["0.weight"])

    assert largest <= peak(twice) < 1.5 * largest
    assert_same_bits(model, before)


def test_swap_restores_after_an_error():
    model = make_model()
    ema = Ema(model)
    move(model, 0)
    before = bits(model)
    with pytest.raises(KeyError, match="sampling failed"), ema.swap():
        raise KeyError("sampling failed")
    assert_same_bits(model, before)


def test_resumed_average_continues_bit_by_bit(tmp_path):
    model = make_model()
    ema = Ema(model)
    for step in range(3):
        move(model, step)
        ema.update(step)
    torch.save({"ema": ema.state_dict(), "model": model.state_dict()}, tmp_path / "checkpoint.pt")
    twin = make_model()
    resumed = Ema(twin)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["ema"])
    for step in range(3, 6):
        for m, e in ((model, ema), (twin, resumed)):
            move(m, step)
            e.update(step)
    for name, average in ema.state_dict().items():
        assert torch.equal(average, resumed.state_dict()[name])


def test_loading_is_strict_about_names_and_shapes():
    ema = Ema(make_model())
    good = copy.deepcopy(ema.state_dict())
    before = copy.deepcopy(ema.state_dict())
    for change, message in (
        (lambda s: s.pop("1.bias"), "it lacks 1.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "has an unknown extra"),
        (lambda s: s.update({"2.bias": torch.zeros(9)}), r"2.bias is \[9\] in it and \[2\] here"),
        (lambda s: s.clear(), "and 2 more"),
    ):
        bad = {name: x + 1 for name, x in good.items()}
        change(bad)
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(bad)
        assert all(
            torch.equal(x, before[name]) for name, x in ema.state_dict().items()
        )  # refused as a whole


def test_impossible_settings_are_refused():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must lie in"):
            Ema(make_model(), decay=decay)
    with pytest.raises(ValueError, match="warmup_steps"):
        Ema(make_model(), warmup_steps=-1)
