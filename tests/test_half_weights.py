"""Frozen weights in bfloat16: the numbers of autocast, and a way back to every bit."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import families
import tiny
from distill.core.half_weights import HalfWeights
from distill.core.types import Cond
from distill.data import source


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone().view(torch.int32) for name, x in model.state_dict().items()}


def frozen_bits(teacher: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x for name, x in bits(teacher.network).items() if "lora" not in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_weights_return_bit_by_bit():
    """Also where rounding to bfloat16 is a tie, up or down, and beyond its largest number."""
    layer = nn.Linear(64, 64).requires_grad_(False)
    exponents = torch.randint(-120, 120, (64, 64), generator=torch.Generator().manual_seed(0))
    layer.weight.copy_(layer.weight * 2.0**exponents)
    ties = torch.arange(0x3F80_8000, 0x3F80_8000 + 64 * 0x1_0000, 0x1_0000, dtype=torch.int32)
    layer.weight[0], layer.weight[1] = ties.view(torch.float32), -ties.view(torch.float32)
    layer.weight[2, :4] = torch.tensor([0.0, -0.0, torch.finfo(torch.float32).max, float("inf")])
    before, held = bits(layer), HalfWeights(layer)
    held.halve()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert held.dtype == torch.float32
    held.restore()
    assert same(bits(layer), before)


def test_only_frozen_layers_that_autocast_casts_are_halved():
    model = nn.ModuleDict(
        {
            "frozen": nn.Linear(2, 2),
            "trained": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
            "words": nn.Embedding(2, 2),
            "tied": nn.Linear(2, 2, bias=False),
            "broken": nn.Linear(2, 2),
        }
    ).requires_grad_(False)
    model.trained.requires_grad_(True)
    model.tied.weight = model.words.weight  # an embedding stays in float32
    model.broken.weight.fill_(float("nan"))
    HalfWeights(model).halve()
    halved = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert halved == {"frozen.weight", "frozen.bias", "broken.bias"}


@pytest.mark.parametrize("family", families.marked())
def test_passes_equal_those_of_autocast(family, tmp_path):
    """Prediction, maps at all taps, and the gradient of the latents."""
    teacher = families.teacher_at(
        families.write(family, tmp_path), **families.FAMILIES[family].options
    )
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.3, 0.8])
    cond = teacher.embed(["a cat", "two dogs"])
    before, expected = bits(teacher.network), outputs(teacher, x, t, cond)
    whole = sum(p.nbytes for p in teacher.network.parameters())
    teacher.hold_half()
    held = sum(p.nbytes for p in teacher.network.parameters())
    assert held < 0.6 * whole
    for one, other in zip(outputs(teacher, x, t, cond), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    embedded = teacher.embed(["a cat", "two dogs"])
    assert torch.equal(embedded.tokens, cond.tokens)
    teacher.hold_whole()
    assert same(bits(teacher.network), before)


def outputs(
    teacher: families.Any, x: torch.Tensor, t: torch.Tensor, cond: Cond
) -> list[torch.Tensor]:
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = teacher.x0(x, t, cond)
        maps = teacher.features(x, t, cond, list(teacher.channels))
    total = sum(y.float().square().mean() for y in (prediction, *maps))
    return [prediction.detach(), *(m.detach() for m in maps), *torch.autograd.grad(total, x)]


def test_a_pass_without_autocast_restores_the_weights_and_says_so_once(tmp_path, caplog):
    teacher = families.teacher_at(families.write("sd15", tmp_path))
    x, t = torch.randn(1, *teacher.latent_shape), torch.tensor([0.5])
    cond, before = teacher.embed(["a cat"]), bits(teacher.network)
    with torch.no_grad():
        expected = teacher.x0(x, t, cond)
        teacher.hold_half()
        # Kernels may sum in another order where memory is aligned otherwise.
        for _ in range(2):
            torch.testing.assert_close(teacher.x0(x, t, cond), expected)
    assert same(bits(teacher.network), before)
    (said,) = caplog.messages
    assert said.startswith("a pass of a frozen UNet2DConditionModel without autocast needs its")
    assert said.endswith("run such passes under torch.autocast")


def test_copies_and_merged_students_have_the_float32_weights(tmp_path):
    from distill.students.lora import lora, merged

    teacher = families.teacher_at(families.write("sd15", tmp_path))
    weights = copy.deepcopy(teacher.network.model.state_dict())
    teacher.hold_half()
    student = teacher.network.trainable_copy()
    assert all(torch.equal(x, weights[name]) for name, x in student.model.state_dict().items())
    adapted = lora(teacher, rank=2)
    teacher.hold_half()
    result = merged(adapted).state_dict()  # B is 0: the adapters add nothing
    assert all(torch.equal(x, weights[name]) for name, x in result.items())


@pytest.mark.parametrize("size", [tiny.SIDE, 2 * tiny.SIDE])
def test_maps_of_pictures_equal_those_of_autocast(size):
    eyes = tiny.eyes()
    before, x = bits(eyes), torch.rand(2, 3, size, size) * 2 - 1

    def maps() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [*eyes(x, None, None), eyes.describe(x)]

    expected = maps()
    eyes.hold_half()
    assert eyes.model.encoder.layer[0].mlp.fc1.weight.dtype == torch.bfloat16
    for one, other in zip(maps(), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    eyes.hold_whole()
    assert same(bits(eyes), before)


class Dtypes(L.Callback):
    """The dtypes of the frozen layers at every step."""

    def __init__(self) -> None:
        self.seen: list[set[torch.dtype]] = []

    def on_train_batch_end(self, trainer: L.Trainer, method: L.LightningModule, *_: object) -> None:
        networks = [method.teacher.network.model, getattr(method.feature_network, "model", None)]
        layers = [m for n in networks if n for m in n.modules() if type(m) is nn.Linear]
        self.seen.append({m.weight.dtype for m in layers if not m.weight.requires_grad})


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny.ladd, {}), (tiny.ladd, {"lora": {"rank": 2}}), (tiny.add, {})],
    ids=["ladd", "lora", "add"],
)
def test_training_gives_the_same_student_and_leaves_the_teacher(
    make, options, precision, pipelines, shards, tmp_path
):
    """Held in half, or cast in every pass: the same bits. In float32 nothing is cast."""
    students = []
    for hold in (True, False):
        teacher, log = families.teacher_at(pipelines("unet")), Dtypes()
        method = make(teacher, **options)
        before = frozen_bits(teacher)
        if not hold:
            for network in method._frozen_networks("hold_half"):
                network.hold_half = lambda **_: None
        trainer = tiny.trainer(tmp_path / str(hold), 2, log, precision=precision)
        trainer.fit(method, source.latents(str(shards), batch_size=2).loader(seed=0))
        half = hold and precision == "bf16-mixed"
        assert log.seen == 2 * [{torch.bfloat16 if half else torch.float32}]
        assert same(frozen_bits(teacher), before)
        students.append(tiny.weights(method.student))
    assert tiny.same(*students)


def fit(method, folder, shards, *callbacks, precision="bf16-mixed") -> None:
    loader = source.latents(str(shards), batch_size=2).loader(seed=0)
    tiny.trainer(folder, 2, *callbacks, precision=precision).fit(method, loader)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_a_training_restores_the_weights(error, pipelines, shards, tmp_path):
    teacher = families.teacher_at(pipelines("unet"))
    method, before, log = tiny.ladd(teacher), frozen_bits(teacher), Dtypes()

    class Fails(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            raise error

    with pytest.raises((error, SystemExit)):
        fit(method, tmp_path, shards, log, Fails())
    assert log.seen == [{torch.bfloat16}]
    assert same(frozen_bits(teacher), before)


def test_a_device_never_holds_all_frozen_weights_in_float32(pipelines, shards, tmp_path):
    """They are halved on their way to it: doctor counts two bytes a weight."""
    teacher = families.teacher_at(pipelines("unet"))
    method, moved = tiny.ladd(teacher), []
    move = teacher.to

    def to(*where: object) -> nn.Module:
        moved.append({m.weight.dtype for m in teacher.network.modules() if type(m) is nn.Linear})
        return move(*where)

    teacher.to = to
    fit(method, tmp_path, shards)
    assert moved[0] == {torch.bfloat16}


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Full(TorchDispatchMode):
    """A pretended device with room for a dozen of the sums that join weights."""

    left = 12.0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int32:
            self.left -= 1
            if self.left < 0:
                raise FULL
        return result


@pytest.mark.parametrize("again", [False, True])
def test_a_device_that_is_full_gets_no_weights_back_and_the_run_goes_on(
    again, pipelines, monkeypatch, caplog
):
    """They are joined on the host, and stay there if the device has no room for them."""
    teacher = families.teacher_at(pipelines("unet"))
    model, before, moves = teacher.network.model, bits(teacher.network), []
    teacher.hold_half()
    move, device = model.to, Full()

    def to(where: object) -> nn.Module:
        moves.append(where)
        device.left = math.inf  # from here on it is the host that computes
        if len(moves) == 2 and not again:
            raise FULL
        return move(where)

    monkeypatch.setattr(model, "to", to)
    with device:
        teacher.hold_whole()
    assert same(bits(teacher.network), before)
    assert moves == ["cpu", torch.device("cpu"), *([] if again else ["cpu"])]
    said = [m for m in caplog.messages if m.endswith("it stays on the CPU")]
    assert len(said) == (0 if again else 1)


def test_weights_that_are_loaded_meanwhile_are_kept(tmp_path):
    """Whole or into a part of the model."""
    teacher = families.teacher_at(families.write("sd15", tmp_path))
    model = teacher.network.model
    other = {name: x + 0.123456 for name, x in model.state_dict().items()}
    for part in ("", "mid_block"):
        within = {k.removeprefix(f"{part}."): x for k, x in other.items() if k.startswith(part)}
        teacher.hold_half()
        model.get_submodule(part).load_state_dict(within)
        teacher.hold_whole()
        found = model.get_submodule(part).state_dict()
        assert all(torch.equal(x, within[name]) for name, x in found.items())
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


def test_the_layout_of_weights_stays(tmp_path):
    teacher = families.teacher_at(families.write("sd15", tmp_path))
    before = bits(teacher.network)
    teacher.network.lay_out(torch.channels_last)
    weight = teacher.network.model.conv_in.weight
    for hold in (teacher.hold_half, teacher.hold_whole):
        hold()
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    assert same(bits(teacher.network), before)


@pytest.mark.parametrize("under_autocast", [False, True])
def test_the_empty_caption_is_embedded_in_float32_at_any_call(under_autocast, tmp_path):
    """It is kept for calls with and without autocast."""
    folder = families.write("sd15", tmp_path)
    expected = families.teacher_at(folder).embed(["a cat"]).null
    teacher = families.teacher_at(folder)
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        found = teacher.embed(["a cat"]).null
        negative = teacher.embed_negative("")
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(negative.tokens, expected.tokens)
