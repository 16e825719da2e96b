"""A teacher whose frozen weights have 8 or 4 bits: gradients are exact for the weights that it
computes with, and nothing that is saved has them.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import tiny
from distill import students
from distill.config.compose import shipped
from distill.core import quantized_weights
from distill.core.quantized_weights import (
    KINDS,
    dequantized,
    quantizable,
    quantize_layer,
    quantized,
    restore_layer,
)
from distill.data import source
from distill.sampling import Consistency
from distill.students.lora import lora, merged
from families import teacher_at
from test_engine import assert_same_state, state

CPU = torch.device("cpu")
LAYERS = {
    "linear": (lambda: nn.Linear(48, 64), (3, 48)),
    "no_bias": (lambda: nn.Linear(33, 37, bias=False), (2, 5, 33)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 32, 3, groups=2, dilation=2), (2, 16, 9, 9)),
    "video": (lambda: nn.Conv3d(8, 24, (1, 2, 2), stride=(1, 2, 2)), (2, 8, 3, 6, 6)),
    "sequence": (lambda: nn.Conv1d(16, 24, 3, padding=1), (2, 16, 9)),
}
LARGEST_ERROR = {"int8": 0.01, "fp8": 0.04, "nf4": 0.12}  # of a normal tensor, as a share of it


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=["nf4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("int8", "fp8"))])
def one_kind(request):
    return request.param


@pytest.fixture
def fresh(family, pipelines):
    """Makes a teacher of its own: what it holds changes."""
    return lambda **options: teacher_at(pipelines(family), **options)


# -- weights and layers ----------------------------------------------------------------------------


def test_rounding_is_small_and_zeros_stay(kind):
    w = torch.randn(40, 7, 5, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    codes, scale = quantized(w, kind)
    found = dequantized(codes, scale, kind, w.shape, torch.float32)
    assert float((found - w).norm() / w.norm()) < LARGEST_ERROR[kind]
    assert not found[3].any()
    assert codes.element_size() == 1
    assert codes.numel() <= w.numel() / (1 if kind != "nf4" else 2) + quantized_weights.BLOCK
    again = dequantized(*quantized(found, kind), kind, w.shape, torch.float32)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)
    if kind == "nf4":  # weights at the levels are kept
        exact = torch.tensor(quantized_weights.LEVELS).repeat(4).view(8, 8)
        same = dequantized(*quantized(exact, kind), kind, exact.shape, torch.float32)
        assert torch.equal(same, exact)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_its_dequantised_weights_both_ways(name, precision, kind):
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    own, hook = layer.weight.clone(), []
    layer.register_forward_hook(lambda *_: hook.append(1))
    kept = quantize_layer(layer, kind)
    weight = layer.weight
    assert not torch.equal(weight, own)
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x, y = x.requires_grad_(), y.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        found = layer(x)
        if isinstance(layer, nn.Linear):
            expected = F.linear(y, weight, layer.bias)
        else:
            expected = layer._conv_forward(y, weight, layer.bias)
    assert torch.equal(found, expected)
    assert hook == [1]
    grad = torch.randn_like(found)
    # Twice differentiable, as the layer is that it stands for.
    (first,) = torch.autograd.grad(found, x, grad.requires_grad_(), create_graph=True)
    (second,) = torch.autograd.grad(expected, y, grad, create_graph=True)
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    of_grad = [torch.autograd.grad(g.square().sum(), grad)[0] for g in (first, second)]
    torch.testing.assert_close(*of_grad)
    restore_layer(layer, kept)
    assert type(layer) is type(make())
    assert torch.equal(layer.weight, own)
    assert list(layer.state_dict()) == ["weight", *(["bias"] if layer.bias is not None else [])]


def test_what_others_read_or_learn_is_left_alone():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    tied = nn.Linear(64, 64)
    network = nn.Sequential(
        tied, nn.Linear(64, 64), Own(64, 64), nn.Linear(64, 64), nn.Linear(8, 8)
    )
    network.append(nn.Embedding(64, 64))
    network[5].weight = tied.weight
    network.requires_grad_(False)
    network[3].weight.requires_grad_(True)
    network.append(nn.Conv2d(16, 16, 3, padding="same").requires_grad_(False))
    assert [name for name, _ in quantizable(network)] == ["1"]


def test_weights_may_be_loaded_into_a_quantised_network(fresh, one_kind):
    teacher, other = fresh(), fresh()
    tiny.shake(other.network.model, 5)
    teacher.network.weights.quantize(one_kind)
    teacher.network.model.load_state_dict(other.network.model.state_dict())
    assert tiny.same(tiny.weights(teacher.network.model), tiny.weights(other.network.model))


# -- the teacher -----------------------------------------------------------------------------------


def rounded(teacher, kind):
    """Give the teacher the weights that its quantised layers would compute with, in float32."""
    for _, layer in quantizable(teacher.network.model):
        codes, scale = quantized(layer.weight, kind)
        dtype = layer.weight.dtype
        layer.weight.data = dequantized(codes, scale, kind, layer.weight.shape, dtype)
    return teacher


def test_a_teacher_is_exact_for_its_dequantised_weights(fresh, family, kind):
    """Its prediction, its features, and the gradient of both with respect to the sample."""
    teacher, reference = fresh(), rounded(fresh(), kind)
    own = tiny.weights(teacher.network.model)
    size = sum(p.numel() for p in teacher.network.model.parameters())
    teacher.quantize = kind
    teacher.hold_quantized(CPU)
    layers = [
        m for m in teacher.network.model.modules()
        if isinstance(m, quantized_weights.QuantizedLayer)
    ]  # fmt: skip
    assert sum(m.shape.numel() for m in layers) > 0.6 * size
    assert not [p for p in teacher.parameters() if p.requires_grad]
    found = []
    for each in (teacher, reference):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((2, *each.latent_shape), generator=generator).requires_grad_()
        t, cond = torch.tensor([1.0, 0.5]), each.embed(tiny.CAPTIONS[:2])
        x0, maps = each.x0(x, t, cond), each.features(x, t, cond, each.encoder)
        loss = x0.square().sum() + sum(m.square().mean() for m in maps)
        found.append([x0, *maps, *torch.autograd.grad(loss, x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    teacher.hold_whole()
    assert tiny.same(tiny.weights(teacher.network.model), own)


def test_a_teacher_in_bfloat16_takes_half(fresh, one_kind):
    teacher = fresh(dtype="bfloat16")
    before = sum(p.nbytes for p in teacher.network.model.parameters())
    x = torch.randn((1, *teacher.latent_shape))
    cond = teacher.embed(["a red circle"])
    teacher.network.weights.quantize(one_kind)
    assert teacher.network.weights.dtype == torch.bfloat16
    tensors = [*teacher.network.model.parameters(), *teacher.network.model.buffers()]
    share = {"int8": 0.75, "fp8": 0.75, "nf4": 0.6}[one_kind]  # tiny layers stay as they are
    assert sum(x.nbytes for x in tensors) < share * before
    assert teacher.x0(x, torch.ones(1), cond).isfinite().all()


# -- training --------------------------------------------------------------------------------------


def trained(
    method, folder, shards, steps, *callbacks, start=0, checkpoint=None, precision="32-true"
):
    running = tiny.trainer(folder, steps, *callbacks, precision=precision)
    loader = source.latents(str(shards), batch_size=2).loader(seed=0, start=start)
    running.fit(method, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return running


class Quantised(L.Callback):
    """Which networks have quantised layers in a step. A LoRA student's base is the teacher."""

    def __init__(self):
        self.parts = set()

    def on_train_batch_end(self, trainer, method, *_):
        networks = {"teacher": method.teacher.network, **method.opponents}
        if method.student.model is not method.teacher.network.model:
            networks["student"] = method.student
        self.parts |= {name for name, network in networks.items() if has_quantised(network)}


def has_quantised(network):
    return any(isinstance(m, quantized_weights.QuantizedLayer) for m in network.modules())


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "adapted",
    [pytest.param(None, id="full", marks=slow), pytest.param({"rank": 4}, id="lora")],
)
@pytest.mark.parametrize(
    ("name", "bits", "precision"),
    [
        ("ladd", "int8", "32-true"),
        pytest.param("ladd", "int8", "bf16-mixed", marks=slow),
        pytest.param("add", "nf4", "32-true", marks=slow),
        pytest.param("nitrofusion", "int8", "32-true", marks=slow),
        pytest.param("dmd2", "nf4", "32-true", marks=slow),
        *(
            pytest.param(name, bits, "32-true", marks=pytest.mark.nightly)
            for name, bits in (("add", "int8"), ("nitrofusion", "nf4"), ("dmd2", "int8"))
        ),
    ],
)
def test_training_is_that_with_dequantised_weights(
    name, bits, precision, adapted, fresh, tmp_path, shards
):
    """Heads on the teacher's features, and its scores, see the quantised weights. A full student
    and a fake score start with the teacher's own, and are not quantised themselves.
    """
    how = {"lora": adapted} if adapted else {}
    options = {"options": {"distill_weight": 1.0}} if name == "ladd" else {}
    found = []
    for quantise in (True, False):
        teacher = fresh(quantize=bits if quantise else None)
        own = tiny.weights(teacher.network.model)
        method = tiny.METHODS[name](teacher, **how, **options)
        if not quantise:
            rounded(teacher, bits)
        log = Quantised()
        running = trained(method, tmp_path, shards, 2, log, precision=precision)
        assert log.parts == ({"teacher"} if quantise else set())
        found.append(state(method, running))
        if quantise:
            after = tiny.weights(teacher.network.model)
            base = {k.replace(".base_layer", ""): v for k, v in after.items() if "lora" not in k}
            assert tiny.same(base, own)
    assert_same_state(*found)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("ladd", "nf4"),
        *(
            pytest.param(name, bits, marks=slow if bits == "int8" else pytest.mark.nightly)
            for name in ("add", "nitrofusion", "dmd2")
            for bits in ("int8", "nf4")
        ),
    ],
)
def test_a_run_with_a_quantised_teacher_goes_on_bit_for_bit(
    name, bits, fresh, family, tmp_path, shards
):
    def method():
        return tiny.METHODS[name](fresh(quantize=bits), lora={"rank": 4})

    whole = method()
    expected = state(whole, trained(whole, tmp_path, shards, 3))
    first, path = method(), tmp_path / "one.ckpt"
    trained(first, tmp_path, shards, 1).save_checkpoint(path)
    names = torch.load(path, weights_only=True)["state_dict"]
    assert not [name for name in names if "codes" in name or "scale" in name]
    second = method()
    running = trained(second, tmp_path, shards, 3, start=1, checkpoint=path)
    assert_same_state(state(second, running), expected)


def test_adapters_are_merged_into_the_unquantised_base(fresh, tmp_path, one_kind):
    students_of = []
    for _ in range(2):
        torch.manual_seed(0)
        base = fresh()
        students_of.append(tiny.shake(lora(base, rank=4), 3))
    plain, student = students_of
    expected = tiny.weights(merged(plain))
    base.network.weights.quantize(one_kind)
    assert tiny.same(tiny.weights(merged(student)), expected)
    base.network.weights.quantize(one_kind)
    scheduler = Consistency().scheduler(student, base)
    folder = students.save_pipeline(student, base, tmp_path / "student", scheduler)
    assert tiny.same(tiny.weights(teacher_at(folder).network.model), expected)


def test_a_copy_to_train_is_of_the_unquantised_weights(fresh, one_kind):
    teacher = fresh()
    own = tiny.weights(teacher.network.model)
    teacher.network.weights.quantize(one_kind)
    student = students.full(teacher)
    assert tiny.same(tiny.weights(student.model), own)
    assert all(p.requires_grad for p in student.parameters())
    assert copy.deepcopy(student) is not None


# -- commands --------------------------------------------------------------------------------------


def test_wrong_kinds_are_one_sentence(command, pipelines):
    teacher = ["teacher=sd3", f"teacher.path={pipelines('mmdit')}", "data=renders"]
    for words, said in {
        ("teacher.quantize=int7",): "teacher.quantize=int7: must be int8 or fp8 or nf4 or null",
        ("teacher.quantize=nf4", "trainer=fsdp2", "trainer.devices=2"): (
            "teacher.quantize=nf4: trainer=fsdp2 shards the weights that this would quantise"
        ),
    }.items():
        code, _, err = command("run", *teacher, *words)
        assert code == 1
        assert said in err
        assert len(err.strip().splitlines()) == 1


PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "memory.md"
COMMANDS = re.findall(r"^python -m distill\.run (.*)$", PAGE.read_text(encoding="utf-8"), re.M)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_of_the_page_run(words, command, tmp_path):
    """And of a LoRA on a quantised base, the student is the unquantised base and its adapters."""
    pytest.importorskip("torchao")
    code, _, err = command("run", *words.split(), "trainer.accelerator=cpu", "~metrics")
    assert code == 0, err
    (student,) = tmp_path.glob("runs/*/student/transformer")
    if "nf4" not in words:
        return
    (part,) = student.glob("*.safetensors")
    base = Path(shipped("shapes:mmdit")) / "transformer"
    found, own = load_file(part), load_file(next(iter(base.glob("*.safetensors"))))
    assert found.keys() == own.keys()
    adapted = [name for name in own if not torch.equal(found[name], own[name].float())]
    assert adapted
    for name in adapted:  # two steps move a weight by far less than the rounding of nf4
        change = (found[name] - own[name].float()).norm() / own[name].float().norm()
        assert float(change) < 0.02


def changed(folder: Path, own: Path) -> dict[str, torch.Tensor]:
    """Weights of a student that differ from those of the teacher, by how much."""
    (file,), (before,) = folder.glob("*.safetensors"), own.glob("*.safetensors")
    found, base = load_file(file), load_file(before)
    assert found.keys() == base.keys()
    apart = {name: x.float() - base[name].float() for name, x in found.items()}
    return {name: x for name, x in apart.items() if x.any()}


RATE = 1e-5  # of the student: far less than what rounding to 4 bits would change


@pytest.mark.slow
def test_a_run_exports_unquantised_weights(command, tmp_path):
    """A student's weights are the teacher's own, moved by no more than Adam's largest steps."""
    words = ["method=add", "teacher=shapes_unet", "teacher.quantize=nf4", "debug=smoke"]
    words += [f"optimizer.student.lr={RATE}", "data.batch_size=2", "run_dir=runs/small"]
    code, _, err = command("run", *words, "~metrics", "callbacks.samples=null")
    assert code == 0, err
    own = Path(shipped("shapes:unet")) / "unet"
    found = changed(tmp_path / "runs" / "small" / "student" / "unet", own)
    assert found
    assert all(float(x.abs().max()) < 5 * RATE for x in found.values())
