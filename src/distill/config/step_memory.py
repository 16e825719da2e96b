"""Memory of a training step, counted on meta tensors before any weights are read.

The networks of a configuration are built from their config.json files, and one iteration of the
real loop runs on tensors without values: the count is of what that iteration holds. The cache of
the allocator, its fragments, workspaces of kernels and the context of CUDA come on top.
"""

import gc
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from distill.config import build
from distill.config.compose import make, shipped
from distill.config.models import teacher_of
from distill.config.sources import LATENTS, PREFERENCES, PROMPTS
from distill.core.types import EMBEDDED, FILL
from distill.data.datasets import LatentShards
from distill.data.named import expand
from distill.data.pairs import Pairs
from distill.data.write import EDIT_PAIRS
from distill.machine import budget
from distill.machine.memory import Counter
from distill.machine.meta_device import META, Kind, meta_device, shapes_only

CAPTION = "a photograph of a red fox in the snow at dawn, its breath a small cloud before it"
LATER = 10**7  # an iteration after all starts
OPTIMIZER_OF = {"g": "student", "d": "discriminator", "f": "fake_score"}  # of each player


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training.

    held: part -> what it holds between steps on the device. peak: the most on the device within a
    step, with what is held. host: what averages and optimisers hold on the host instead.
    """

    held: dict[str, int]
    peak: int
    host: int = 0

    @property
    def within(self) -> int:
        """What a step adds to what is held."""
        return self.peak - sum(self.held.values())


def of_step(cfg: DictConfig, kind: Kind) -> StepMemory:
    """The memory of a training step of this configuration on a device of this kind.

    `trainer.precision` must be settled. Raises what building and running the networks raises.
    """
    half = cfg.trainer.precision == "bf16-mixed"
    with shapes_only(), meta_device(kind):
        teacher = teacher_of(cfg)
        teacher._warned = True  # of captions that are too long, as CAPTION may be
        batch = _batch(cfg, teacher)
        method = _method(cfg, teacher)
        if set(batch) & set(EMBEDDED):
            _drop_text_encoders(teacher)
        before = _bytes(_frozen(method))
        _hold(method, half)
        players = _Players(method, cfg, kind)
        # After the head start and all warm starts, in an iteration in which R1 is due.
        method.loop.iteration = LATER * int(getattr(method, "r1_every", 1))
        counter = Counter("meta")
        held = {name: counter.hold(of) for name, of in _parts(method, players, batch).items()}
        gc.collect()
        with torch.autocast("meta") if half else nullcontext(), counter:
            for i in range(method.loop.settings.accumulate):  # the last of them updates
                method.training_step({key: _again(x) for key, x in batch.items()}, i)
        freed = before - _bytes(_frozen(method))
    waiting = players.host + _beside(method, before, freed, half)
    if kind != "cpu":
        return StepMemory(held, counter.most, waiting)
    held["waiting on the host"] = waiting
    return StepMemory(held, counter.most + waiting)


def _beside(method: Any, before: int, freed: int, half: bool) -> int:
    """Bytes of the frozen weights, or of what rounding took, that wait on the CPU to be restored.

    Of halved weights half of their size; of quantised ones all that they were.
    """
    networks = method._frozen_networks("hold_quantized")
    originals = 0
    for network in networks:
        layers = [m for m in network.network.model.modules() if hasattr(m, "codes")]
        width = {layer: layer.dtype.itemsize for layer in layers}
        codes = sum(m.codes.nbytes + m.scale.nbytes for m in layers)
        own = sum(m.shape.numel() * width[m] for m in layers)
        originals += own
        freed -= own - codes
    return originals + (freed if half else 0)


# -- building --------------------------------------------------------------------------------------


def _method(cfg: DictConfig, teacher: Any) -> Any:
    """The method on meta tensors, with its loop."""
    # Outside of the device: its noise schedule has values, which are read.
    other = build.score_teacher_of(cfg)
    with torch.device("meta"):
        student = build.student_of(cfg, teacher)
        players = build.players_of(cfg, teacher, student, other)
        method = make(cfg.method, "method")(players, loop=build.loop_of(cfg))
    method._device = META
    return method


def _hold(method: Any, half: bool) -> None:
    """Hold frozen weights as `Distillation.setup` does."""
    for network in method._frozen_networks("hold_quantized"):
        network.hold_quantized(META)
    for network in method._frozen_networks("hold_half") if half else ():
        network.hold_half(device=META)


def _batch(cfg: DictConfig, teacher: Any) -> dict[str, Any]:
    """A batch as the loader gives it, on meta tensors."""
    data, count = cfg.data, int(cfg.data.batch_size)
    batch: dict[str, Any] = {"caption": [CAPTION] * count}
    kind = data.get("_target_")
    if kind == LATENTS:
        shards = LatentShards(expand(shipped(str(data.path)))[0], limit=1)
        shape = _largest(data.get("buckets") or shards.made.get("buckets")) or shards.shape[-2:]
        batch["x0"] = empty(count, *shards.shape[:-2], *shape)
        batch |= {key: empty(count, *x.shape[1:]) for key, x in shards.null.items()}
        if shards.made.get("what") == EDIT_PAIRS:
            beside = shards.find(0)[0]["image"]  # the constructor has read it
            batch["image"] = empty(count, *beside.shape[:-2], *shape)
        if data.get("seeded"):
            batch["noise"] = torch.empty_like(batch["x0"])
        if data.get("embed_once") and not shards.null:
            batch |= teacher.embed(batch["caption"]).tensors()
    elif kind == PREFERENCES and (shape := _latents_of_pairs(data)):
        batch |= {key: empty(count, *shape) for key in ("x0", "loser_x0")}
    elif kind != PROMPTS:
        cells = teacher.unit // teacher.patch
        sides = _largest(data.get("buckets")) or [data.get("size") or 0] * 2
        if not all(sides):
            sides = [side * cells for side in teacher.latent_shape[-2:]]
        frames = [teacher.frames] if len(teacher.latent_shape) > 3 else []  # of a video
        batch["pixels"] = empty(count, 3, *frames, *sides)
        if teacher.image == "source":
            batch["source"] = torch.empty_like(batch["pixels"])
        if kind == PREFERENCES or data.get("pairs"):
            batch["loser_pixels"] = torch.empty_like(batch["pixels"])
        if data.get("masks"):
            batch[FILL] = empty(count, 1, *sides)
        if data.get("seeded"):
            batch["noise"] = empty(count, *teacher.latent_shape)
    return batch


def _latents_of_pairs(data: DictConfig) -> tuple[int, ...] | None:
    """Shape of the largest latents of these pairs; None for pairs of pictures."""
    shape = Pairs(shipped(str(data.path)), size=data.get("size") or 1, limit=1).shape
    bucket = _largest(data.get("buckets"))
    return shape and (*shape[:-2], *(bucket or shape[-2:]))


def _again(x: Any) -> Any:
    """Another tensor of the same shape, as the next batch has it."""
    return torch.empty_like(x) if isinstance(x, Tensor) else x


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


def _largest(buckets: Any) -> list[int] | None:
    """Height and width of the largest of these [width, height]."""
    if not buckets:
        return None
    return list(reversed(max(buckets, key=lambda b: b[0] * b[1])))


def _drop_text_encoders(teacher: Any) -> None:
    """Data with embedded captions need none."""
    for name in [n for n in teacher.pipeline.components if n.startswith("text_encoder")]:
        setattr(teacher.pipeline, name, None)
    teacher._encoders = nn.ModuleList(teacher._encoding_parts())


# -- what is held ----------------------------------------------------------------------------------


def _parts(method: Any, players: "_Players", batch: dict[str, Any]) -> dict[str, Iterable[Tensor]]:
    """Part -> its tensors. A tensor counts for the first part that has it."""
    pipeline = method.teacher.pipeline.components
    encoders = {n: m for n, m in pipeline.items() if isinstance(m, nn.Module)}
    texts = [m for name, m in encoders.items() if name.startswith("text_encoder")]
    average = [] if players.ema_on_host else method.loop._ema.state_dict().values()
    return {
        "student": _tensors([method.student.adapters or method.student]),
        "heads": _tensors([method.heads]),
        "fake score": _tensors([method.fake_score] if method.fake_score is not None else []),
        "average": average,
        "optimiser states": players.states,
        "frozen denoiser": _tensors([method.teacher.network.model]),
        "text encoders": _tensors(texts),
        "autoencoder": _tensors([encoders["vae"]] if "vae" in encoders else []),
        "score teacher": _tensors([method.score_teacher] if method.score_teacher else []),
        "other frozen networks": _tensors(_frozen(method)),
        "batch": [x for x in batch.values() if isinstance(x, Tensor)],
    }


def _frozen(method: Any) -> list[nn.Module]:
    return [part for part in method._frozen_parts if isinstance(part, nn.Module)]


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    every = (x for m in modules for x in (*m.parameters(), *m.buffers()))
    return [x for x in every if x.is_meta]


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(x.nbytes for x in {id(x): x for x in _tensors(modules)}.values())


# -- what the loop needs of a trainer --------------------------------------------------------------


class _Players:
    """Stands for Lightning's trainer and its optimisers: their states are held, nothing moves."""

    def __init__(self, method: Any, cfg: DictConfig, kind: Kind) -> None:
        settings = method.loop.settings
        on_host = bool(settings.optimizer_device)
        self.ema_on_host = bool(settings.ema_device) and kind != "cpu"
        self.states: list[Tensor] = []
        self.host = 0
        found: list[_Updates] = []
        for player, network in {"g": method.student, **method.opponents}.items():
            weights = [p for p in network.parameters() if p.requires_grad]
            node = cfg.optimizer[OPTIMIZER_OF[player]]
            count = sum(p.numel() for p in weights)
            state = int(count * budget.state_bytes(node))
            if on_host:
                self.host += state + 8 * count
            else:
                self.states.append(torch.empty(state, dtype=torch.uint8, device=META))
            more = 0 if on_host else int(count * budget.step_bytes(node, kind))
            found.append(_Updates(weights, more))
        if self.ema_on_host:
            self.host += sum(x.nbytes for x in method.loop._ema.state_dict().values())
        self.world_size, self.global_rank, self.max_steps = 1, 0, -1
        self.log_every_n_steps, self.loggers = 1, []
        nothing = lambda *_: None  # noqa: E731
        self.profiler = SimpleNamespace(start=nothing, stop=nothing)
        self.strategy = SimpleNamespace(
            _lightning_optimizers=found, backward=lambda loss, *_: loss.backward()
        )
        method._trainer = self


class _Updates:
    """An optimiser whose step takes its memory and changes nothing."""

    def __init__(self, weights: list[nn.Parameter], more: int) -> None:
        self.param_groups = [{"params": weights, "lr": 1.0, "initial_lr": 1.0}]
        self.state: dict[Any, Any] = {}
        self.optimizer = self
        self._more = more

    def step(self) -> None:
        torch.empty(self._more, dtype=torch.uint8, device=META)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None
