"""Compiled blocks, matmul precision and channels-last UNets: the same training, other kernels."""

import copy
import logging
import re

import lightning as L
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn

import distill
import families
import tiny
from distill.data import source
from distill.methods.base import Distillation
from distill.students.lora import lora
from distill.training.speed import (
    CompiledBlocks,
    Speed,
    blocks_of,
    cannot_compile,
    repeated_blocks,
)

EAGER = "aot_eager"  # graphs and their derivatives without a C++ compiler


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled(L.Callback):
    """As `Speed`, by another backend; counts the graphs, in all and up to each step."""

    def __init__(self, backend: str = EAGER) -> None:
        self.blocks, self.backend, self.graphs = CompiledBlocks(), backend, 0
        self.after: list[int] = []

    def on_fit_start(self, trainer: L.Trainer, method: Distillation) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            self.graphs += 1
            return lookup_backend(self.backend)(graph, inputs)

        self.blocks.add(blocks_of(method), counting)

    def on_train_batch_end(self, *_: object) -> None:
        self.after.append(self.graphs)

    def teardown(self, *_: object, **__: object) -> None:
        self.blocks.undo()


def trained(
    method: Distillation, folder, shards, *callbacks: L.Callback, steps: int = 2, start: int = 0
) -> L.Trainer:
    trainer = tiny.trainer(folder, start + steps, *callbacks)
    loader = source.latents(str(shards), batch_size=2).loader(seed=0, start=start)
    checkpoint = folder / "state.ckpt" if start else None
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True if start else None)
    return trainer


def close(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert list(one.state_dict()) == list(theirs)
    for name, x in one.state_dict().items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-4)


COMPILED = {
    "full": ("mmdit", tiny.ladd, {}),
    "r1": ("mmdit", tiny.ladd, {"options": {"r1_weight": 1e-2}}),
    "lora_checkpointing": ("mmdit", tiny.ladd, {"lora": {"rank": 2, "checkpointing": True}}),
    "unet_add": ("unet", tiny.add, {}),
    "unet_dmd2": ("unet", tiny.dmd2, {}),
}


@pytest.mark.parametrize("what", tiny.tiered(COMPILED, slow=("lora_checkpointing", "unet_add")))
def test_compiled_blocks_train_as_the_others(what, pipelines, shards, tmp_path):
    family, make, options = COMPILED[what]
    methods = []
    for name in ("eager", "compiled"):
        method, log = make(families.teacher_at(pipelines(family)), **options), Compiled()
        keys = list(method.state_dict())
        trained(method, tmp_path / name, shards, *([log] if name == "compiled" else []))
        assert list(method.state_dict()) == keys
        fake_score = [] if method.fake_score is None else [method.fake_score.network]
        for network in (method.student, *fake_score):
            assert not [m for m in network.model.modules() if "forward" in vars(m)]
        methods.append(method)
    assert log.graphs > 0
    close(methods[1].student, methods[0].student)
    close(methods[1].heads, methods[0].heads)


@pytest.mark.slow
def test_graphs_do_not_grow_with_the_steps(pipelines, shards, tmp_path):
    """The hooks of the taps are new in every pass, and must not be compiled again."""
    method, log = tiny.ladd(families.teacher_at(pipelines("mmdit"))), Compiled()
    trained(method, tmp_path, shards, log, steps=4)
    assert log.after[1] == log.after[-1]


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_runs_resume_with_and_without(first, pipelines, shards, tmp_path):
    """A checkpoint holds the same names, and the average's swap reaches compiled blocks."""
    teacher = families.teacher_at(pipelines("mmdit"))
    whole, log = tiny.ladd(teacher), Compiled()
    trained(whole, tmp_path / "whole", shards, steps=3)
    begun = tiny.ladd(teacher)
    trainer = trained(begun, tmp_path, shards, *([log] if first else []), steps=2)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    resumed = tiny.ladd(teacher)
    trained(resumed, tmp_path, shards, *([] if first else [log]), steps=1, start=2)
    close(resumed.student, whole.student)
    for name, x in resumed.ema.state_dict().items():
        torch.testing.assert_close(x, whole.ema.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_swapped_average_reaches_compiled_blocks(pipelines):
    method = tiny.ladd(families.teacher_at(pipelines("mmdit")))
    batch, blocks = tiny.simple_batch(method), CompiledBlocks()
    x, t = torch.randn_like(batch.x0), torch.tensor([0.4, 0.9])
    tiny.shake(method.student, 5)

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            own = method.student.x0(x, t, batch.cond)
            with method.ema.swap():
                return [own, method.student.x0(x, t, batch.cond)]

    expected = results()
    assert not torch.allclose(*expected, atol=1e-2)
    blocks.add(blocks_of(method), EAGER)
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    blocks.undo()


@pytest.mark.parametrize("family", families.marked())
def test_every_family_has_blocks(family, tmp_path):
    teacher = families.teacher_at(
        families.write(family, tmp_path), **families.FAMILIES[family].options
    )
    kinds = {type(block).__name__ for block in repeated_blocks(teacher.network.model)}
    assert kinds
    assert all("Block" in kind for kind in kinds)


def test_export_of_a_compiled_lora_has_the_same_names(pipelines, tmp_path):
    from distill.students.lora import merged

    teacher = families.teacher_at(pipelines("mmdit"))
    names = list(copy.deepcopy(teacher.network.model).state_dict())
    student, blocks = lora(teacher, rank=2), CompiledBlocks()
    blocks.add(iter(repeated_blocks(student.model)), EAGER)
    assert list(merged(student).state_dict()) == names
    blocks.undo()


def test_blocks_compile_with_the_compiler_of_this_machine(pipelines):
    """By torch's own backend: a block of the student, forward and backward."""
    if reason := cannot_compile(torch.device("cpu")):
        pytest.skip(reason)
    teacher = families.teacher_at(pipelines("mmdit"))
    network, blocks = teacher.network.trainable_copy(), CompiledBlocks()
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.3, 0.8])
    cond, results = teacher.embed(["a cat", "two dogs"]), []
    for compiled in (False, True):
        blocks.add(iter(repeated_blocks(network.model)[:1] if compiled else []))
        network.x0(x, t, cond).square().mean().backward()
        results.append({name: p.grad for name, p in network.named_parameters()})
        network.zero_grad(set_to_none=True)
    blocks.undo()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_a_run_goes_on(pipelines, shards, tmp_path, caplog, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    teacher = families.teacher_at(pipelines("mmdit"))
    eager, method = tiny.ladd(teacher), tiny.ladd(teacher)
    trained(eager, tmp_path / "eager", shards)
    with caplog.at_level(logging.WARNING):
        trained(method, tmp_path / "compiled", shards, Speed(compile="blocks"))
    said = [r.getMessage() for r in caplog.records if "cannot compile" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("trainer.compile=blocks: this machine cannot compile, and the run")
    assert tiny.same(tiny.weights(method.student), tiny.weights(eager.student))


class Failing(L.Callback):
    """As `Speed`, by a compiler that fails at the graph of this number, or at its derivative."""

    def __init__(self, number: int, part: str) -> None:
        self.blocks, self.number, self.part, self.graphs = CompiledBlocks(), number, part, 0

    def on_fit_start(self, trainer: L.Trainer, method: Distillation) -> None:
        from torch._dynamo.backends.common import aot_autograd

        def forward(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            self.graphs += 1
            return self._fail_or(graph, "forward")

        def backward(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            return self._fail_or(graph, "backward")

        self.blocks.add(blocks_of(method), aot_autograd(fw_compiler=forward, bw_compiler=backward))

    def _fail_or(self, graph: torch.fx.GraphModule, part: str) -> object:
        if part == self.part and self.graphs >= self.number:
            raise RuntimeError("no such instruction")
        return make_boxed_func(graph.forward)

    def teardown(self, *_: object, **__: object) -> None:
        self.blocks.undo()


@pytest.mark.parametrize(
    ("part", "number", "checkpointing"),
    [
        ("backward", 0, False),
        pytest.param("forward", 0, False, marks=pytest.mark.slow),
        pytest.param("forward", 4, True, marks=pytest.mark.slow),
        pytest.param("backward", 4, True, marks=pytest.mark.slow),
    ],
)
def test_a_block_that_cannot_be_compiled_runs_without(
    part, number, checkpointing, pipelines, shards, tmp_path, caplog
):
    """All of them, or those after some that were: checkpointing computes each again as it was."""
    methods: list[Distillation] = []
    lora = {"lora": {"rank": 2, "checkpointing": True}} if checkpointing else {}
    for name, callbacks in (("eager", []), ("compiled", [Failing(number, part)])):
        teacher = families.teacher_at(pipelines("mmdit"))
        methods.append(tiny.ladd(teacher, **lora))
        trained(methods[-1], tmp_path / name, shards, *callbacks)
    said = [m for m in caplog.messages if m.startswith("trainer.compile: ")]
    what = "cannot be compiled, and the run goes on without (no such instruction)"
    assert said == [f"trainer.compile: JointTransformerBlock {what}"]
    close(methods[1].student, methods[0].student)
    close(methods[1].heads, methods[0].heads)


def test_errors_of_a_block_itself_are_raised(pipelines):
    teacher = families.teacher_at(pipelines("mmdit"))
    network, blocks = teacher.network, CompiledBlocks()
    blocks.add(iter(repeated_blocks(network.model)), EAGER)
    with pytest.raises(RuntimeError, match="shape"):
        repeated_blocks(network.model)[0](
            torch.ones(1, 2, 3), torch.ones(1, 2, 5), torch.ones(1, 7)
        )
    blocks.undo()


def test_nothing_compiled_stays_for_the_next_training(pipelines):
    """Jobs of a sweep share a process, and classes of blocks their graphs."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as autograd
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as graphs_of

    teacher, blocks = families.teacher_at(pipelines("mmdit")), CompiledBlocks()
    settings = [(dynamo, "recompile_limit"), (autograd, "force_non_lazy_backward_lowering")]
    before = [getattr(*setting) for setting in settings]
    block = repeated_blocks(teacher.network.model)[0]
    x, t = torch.randn(1, *teacher.latent_shape), torch.tensor([0.3])
    blocks.add(iter([block]), EAGER)
    with torch.no_grad():
        teacher.x0(x, t, teacher.embed(["a cat"]))
    assert graphs_of(type(block).forward.__code__)
    blocks.undo()
    assert not graphs_of(type(block).forward.__code__)
    assert [getattr(*setting) for setting in settings] == before


@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_channels_last_gives_the_same_numbers(family, pipelines):
    teacher = families.teacher_at(pipelines(family))
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.3, 0.8])
    cond, layouts = teacher.embed(["a cat", "two dogs"]), []
    hook = teacher.network.model.mid_block.resnets[0].conv1.register_forward_hook(
        lambda _module, _inputs, out: layouts.append(
            out.is_contiguous(memory_format=torch.channels_last)
        )
    )
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher.network.lay_out(layout)
        results.append([teacher.x0(x, t, cond), *teacher.features(x, t, cond, ["down0", "up0"])])
    hook.remove()
    teacher.network.lay_out(torch.contiguous_format)
    assert layouts == [False, False, True, True]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_settings_last_as_long_as_the_training(pipelines, shards, tmp_path):
    teacher = families.teacher_at(pipelines("unet"))
    method, before = tiny.ladd(teacher), torch.get_float32_matmul_precision()
    seen, networks = [], (method.student.model, teacher.network.model)

    def layout(model: nn.Module) -> bool:
        return model.mid_block.resnets[0].conv1.weight.is_contiguous()

    class Look(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            seen.append((torch.get_float32_matmul_precision(), *map(layout, networks)))

    trained(method, tmp_path, shards, Speed(matmul="high", channels_last=True), Look(), steps=1)
    assert seen == [("high", True, False)]  # the student's weights stay contiguous
    assert torch.get_float32_matmul_precision() == before
    assert all(p.is_contiguous() for model in networks for p in model.parameters())


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("trainer.compile=all", "trainer.compile=all: must be blocks or null"),
        ("trainer.compile=true", "trainer.compile=True: must be blocks or null"),
        ("trainer.matmul=low", "trainer.matmul=low: must be highest or high or medium or null"),
        ("trainer.channels_last=3", "trainer.channels_last=3: must be true or false"),
    ],
)
def test_wrong_values_are_refused(word, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        distill.compose(word)


def test_a_trainer_gets_the_callback_only_if_something_is_set():
    plain = distill.arguments(distill.compose(), "trainer")
    assert not {"callbacks", "compile", "matmul", "channels_last"} & set(plain)
    faster = distill.arguments(distill.compose("trainer.matmul=high"), "trainer")
    (callback,) = faster["callbacks"]
    assert (callback.compile, callback.matmul, callback.channels_last) == (None, "high", False)
