"""What tests of training and sampling are made of: tiny random diffusers pipelines, and a toy world
in closed form.
"""

from __future__ import annotations

import atexit
import copy
import functools
import io
import shutil
import tarfile
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from distill.core.process import RectifiedFlow
from distill.core.score_distillation import ScoreDistillation, TeacherSamples
from distill.core.times import Discrete, LogitNormal, Uniform
from distill.core.types import Cond, Players
from distill.discriminators.fake_score import Classifiers, FakeScore
from distill.discriminators.heads import ConvHeads
from distill.discriminators.images import ImageFeatures
from distill.discriminators.pool import Pool
from distill.discriminators.projection import Projection
from distill.discriminators.stylegan_t import StyleGANTHeads
from distill.discriminators.teacher_features import TASKS, TeacherFeatures
from distill.methods.add import ADD
from distill.methods.base import Distillation
from distill.methods.consistency import ConsistencyDistillation
from distill.methods.dmd2 import DMD2
from distill.methods.dpo import DPO
from distill.methods.ladd import LADD
from distill.methods.nitrofusion import NitroFusion
from distill.methods.regression import Regression
from distill.training.loop import TwoPlayerLoop
from distill.training.loop_settings import LoopSettings, Optimizers
from distill.worlds.shapes.world import sample

SIDE, LENGTH = 64, 32  # pixels of a picture, tokens of a caption
CAPTIONS = [sample(7, i)[0].caption for i in range(200)]


def shake(module: nn.Module, seed: int, std: float = 0.05) -> nn.Module:
    """Add noise to every parameter: fresh diffusion networks are zero at their ends, and would hide
    mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


def write_pipeline(family: str, folder: Path) -> Path:
    """An untrained pipeline of the layout that `pretrain` writes, in half precision as the shipped
    ones.
    """
    from distill.worlds.shapes.pretraining import assemble, diffusion, text, vae

    torch.manual_seed(0)
    tokenizer = text.train_tokenizer(CAPTIONS, length=LENGTH, vocab_size=600)
    clip = text.build(tokenizer, SIDE).eval()
    autoencoder = shake(vae.build(SIDE), 1, std=0.02)
    # Each family writes its own scale and, where its pipeline knows one, its own shift.
    autoencoder.register_to_config(
        scaling_factor=0.8, shift_factor=0.1 if family == "mmdit" else None
    )
    if family == "sdxl":
        write_sdxl(autoencoder, clip, tokenizer, folder)
    elif family == "mmdit":
        assemble.save_sd3(
            shake(diffusion.build_mmdit(16, text.WIDTH), 2), autoencoder, clip, tokenizer, folder
        )
    else:
        assemble.save_sd(
            shake(diffusion.build_unet(16, text.WIDTH), 2), autoencoder, clip, tokenizer, folder
        )
    return folder


def sdxl_unet(width: int, pooled: int) -> diffusers.UNet2DConditionModel:
    """It is told of text [L, width], of a pooled one [pooled], and of the size."""
    net = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + pooled,
    )
    return shake(net, 2)


def write_sdxl(vae: Any, clip: Any, tokenizer: Any, folder: Path) -> None:
    """Two text encoders, of which the second pools, and a UNet that is told of both."""
    from distill.worlds.shapes.pretraining import assemble

    width, pooled = clip.config.text_config.hidden_size, clip.config.projection_dim
    texts = {
        "text_encoder": assemble.half_of(clip, transformers.CLIPTextModel, "text"),
        "text_encoder_2": assemble.half_of(clip, transformers.CLIPTextModelWithProjection, "text"),
        **{"tokenizer": tokenizer, "tokenizer_2": tokenizer, "force_zeros_for_empty_prompt": True},
    }
    scheduler = diffusers.DDIMScheduler(**assemble.SCHEDULE)
    whole = diffusers.StableDiffusionXLPipeline(
        unet=sdxl_unet(2 * width, pooled),
        vae=vae,
        scheduler=scheduler,
        add_watermarker=False,
        **texts,
    )
    assemble.save_half(whole, folder)


def write_pictures(folder: Path, count: int) -> Path:
    """Numbered pictures of noise, 64 pixels a side, with captions beside them."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(CAPTIONS[i], encoding="utf-8")
    return folder


def put_tar(path: Path | str, files: dict[str, str | bytes], mode: str = "w") -> str:
    """A tar with these files; returns its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(folder: Path, count: int = 24) -> Path:
    from distill.data.write import write_latents

    random = np.random.default_rng(3)
    latents = ((f"{i:04d}", random.standard_normal((4, 16, 16)), CAPTIONS[i]) for i in range(count))
    write_latents(str(folder / "latents-%06d.tar"), latents, per_shard=count)
    return folder


def tiered(
    values: Iterable[Any], *, quick: Container[Any] = (), slow: Container[Any] = ()
) -> list[Any]:
    """Values for `parametrize`: the quick ones for every run of the tests, the slow ones, and all
    others nightly. A tuple holds several arguments.
    """
    import pytest

    def mark(value: Any) -> Any:
        if value in quick:
            return ()
        return pytest.mark.slow if value in slow else pytest.mark.nightly

    several = ((value if isinstance(value, tuple) else (value,), mark(value)) for value in values)
    return [pytest.param(*arguments, marks=marks) for arguments, marks in several]


def on_either(names: Iterable[str]) -> list[Any]:
    """(name, family) for `parametrize`: each on one of two families in every run of the tests, on
    the other among the slow ones.
    """
    import pytest

    return [
        pytest.param(
            name, family, id=f"{family}-{name}", marks=[pytest.mark.slow] if (i + j) % 2 else []
        )
        for i, name in enumerate(names)
        for j, family in enumerate(("mmdit", "unet"))
    ]


# -- the toy world ---------------------------------------------------------------------------------


class Toy(nn.Module):
    """A teacher that is exact: x0 = z m + r n with z = -1 or 1 at even odds, on the rectified flow.

    x_t = a z m + sqrt(a^2 r^2 + s^2) n',
    hence  E[z | x_t] = tanh(a <x_t, m> / (a^2 r^2 + s^2))  and
    E[x0 | x_t] = E[z] m + a r^2 / (a^2 r^2 + s^2) (x_t - a E[z] m).  At t = 1 this is 0: halfway
    between the modes.
    """

    shape = (2, 4, 4)
    spread = 0.1
    channels = {"first": 16, "second": 16}
    prediction = "flow"
    blocks = encoder = ("first", "second")
    latent_shape, patch, image_channels = shape, 1, 0

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.process = RectifiedFlow()
        mode = torch.randn(self.shape, generator=generator)
        self.register_buffer("mode", mode / mode.square().mean().sqrt())
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        for convolution in (self.first, self.second):
            nn.init.normal_(
                convolution.weight, std=(convolution.in_channels * 9) ** -0.5, generator=generator
            )
            nn.init.zeros_(convolution.bias)
        self.requires_grad_(False)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        a, s = (level(t).view(-1, 1, 1, 1) for level in (self.process.alpha, self.process.sigma))
        variance = (a * self.spread) ** 2 + s**2
        z = torch.tanh(a * (x_t * self.mode).sum((1, 2, 3), keepdim=True) / variance)
        return z * self.mode + a * self.spread**2 / variance * (x_t - a * z * self.mode)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        first = nn.functional.leaky_relu(self.first(x_t), 0.2)
        maps = {"first": first, "second": nn.functional.leaky_relu(self.second(first), 0.2)}
        return [maps[name] for name in taps]

    def image_of(self, batch: dict[str, Any]) -> None:
        return None

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def of_patch(self, cond: Cond, whole: Sequence[int], corner: Sequence[int]) -> Cond:
        return cond

    def embed(self, captions: Sequence[str]) -> Cond:
        null = Cond(torch.zeros(1, 1, 1))
        return Cond(torch.zeros(len(captions), 1, 1), null=null)

    def data(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randint(2, (n, 1, 1, 1), generator=generator) * 2.0 - 1
        return z * self.mode + self.spread * torch.randn((n, *self.shape), generator=generator)

    def distance(self, x: Tensor) -> Tensor:
        """Root mean square distance of each sample [B, 2, 4, 4] to the mode that is
        nearer -> [B].
        """
        both = torch.stack([(x - z * self.mode).square().mean((1, 2, 3)).sqrt() for z in (-1, 1)])
        return both.min(dim=0).values


class ToyStudent(nn.Module):
    """The toy's own estimate plus a small network that starts at zero: a copy of the teacher, free
    to leave it.
    """

    def __init__(self, toy: Toy, width: int = 64) -> None:
        super().__init__()
        self._toy = (toy,)
        self.process = toy.process
        size = toy.mode.numel()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        change = self.out(self.net(torch.cat([x_t.flatten(1), t[:, None]], dim=1)))
        return self._toy[0].x0(x_t, t, cond) + change.view_as(x_t)


def toy_batches(toy: Toy, size: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """Endless; batch number i depends on i alone."""
    while True:
        generator = torch.Generator().manual_seed(1000 + start)
        yield {"x0": toy.data(size, generator), "caption": [""] * size}
        start += 1


class Stream(torch.utils.data.IterableDataset):
    """An iterator as a data set of ready batches, as the package's own loader is one."""

    def __init__(self, toy: Toy, size: int, start: int = 0) -> None:
        self.toy, self.size, self.start = toy, size, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return toy_batches(self.toy, self.size, self.start)

    def loader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self, batch_size=None)


# -- methods and trainers --------------------------------------------------------------------------


def adam(lr: float, eps: float = 1e-8) -> Any:
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=lr, betas=(0.0, 0.99), weight_decay=0.0, eps=eps
    )


def loop(
    *,
    seed: int = 0,
    rate: float = 1e-3,
    eps: float = 1e-8,
    critic_rate: float = 2e-3,
    critic_eps: float = 1e-8,
    **settings: Any,
) -> TwoPlayerLoop:
    critic = adam(critic_rate, critic_eps)
    optimizers = Optimizers(student=adam(rate, eps), discriminator=critic, fake_score=critic)
    return TwoPlayerLoop(optimizers, LoopSettings(**settings), seed=seed)


def parts(
    teacher: Any, *, seed: int = 0, lora: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """What every method is handed, alike for equal arguments; with `lora`, its options, a student
    on the teacher.
    """
    torch.manual_seed(seed)
    features = TeacherFeatures(teacher)
    pooled = teacher.embed([""]).pooled
    heads = ConvHeads(
        features.channels, pooled=0 if pooled is None else pooled.shape[1], width=16, spectral=False
    )
    if lora:
        from distill.students.lora import lora as adapted

        student = adapted(teacher, **lora)
    else:
        student = (
            ToyStudent(teacher) if isinstance(teacher, Toy) else teacher.network.trainable_copy()
        )
    return {
        "teacher": teacher,
        "student": student,
        "features": features,
        "heads": heads,
        "loop": loop(seed=seed, **options),
    }


class ToyFakeScore(nn.Module):
    """A copy of the toy that is free to leave it, with the toy's features, which learn too."""

    space, prediction, channels = "a fake score", "flow", Toy.channels

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.process, self.score = toy.process, ToyStudent(toy)
        self.first, self.second = copy.deepcopy([toy.first, toy.second])
        self.requires_grad_(True)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.score.x0(x_t, t, cond)

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        return Toy.features(self, x, t, cond, list(self.channels))


def dmd2(teacher: Any, *, options: dict[str, Any] | None = None, **loop_settings: Any) -> DMD2:
    given = parts(teacher, **loop_settings)
    is_toy = isinstance(teacher, Toy)
    given["features"] = features = ToyFakeScore(teacher) if is_toy else FakeScore(teacher)
    torch.manual_seed(given["loop"].seed)
    given["heads"] = Classifiers(features.channels, width=16, layers=1)
    times = {"matching": Uniform(0.02, 0.98)}
    times |= {name: Uniform(0.001, 1.0) for name in ("denoising", "renoise")}
    own = {"levels": [1.0, 0.5], "guidance": 1.0 if is_toy else 2.0} | (options or {})
    return assembled(DMD2, given, **times, **own)


def assembled(kind: type[Distillation], given: dict[str, Any], **options: Any) -> Any:
    """A method of these parts and the options of its own."""
    loop = given.pop("loop")
    return kind(Players(**given), loop=loop, **options)


def ladd(teacher: Any, *, options: dict[str, Any] | None = None, **loop_settings: Any) -> LADD:
    return assembled(
        LADD,
        parts(teacher, **loop_settings),
        levels=Discrete([1.0, 0.75, 0.5, 0.25], [0.7, 0.1, 0.1, 0.1]),
        renoise=LogitNormal(-0.5, 1.0),
        **(options or {}),
    )


class ToyImages:
    """The toy's own maps as those of an image network: tokens, and their mean for a class token.

    Bounded, as a network with norms is: batch norm in the heads forgets scales, and a sample might
    grow without end.
    """

    space, width = "pixels", 16

    def __init__(self, toy: Toy) -> None:
        self.toy, self.channels = toy, toy.channels

    def __call__(
        self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        return [m.flatten(2).tanh() for m in self.toy.features(x, t, cond, list(self.channels))]

    def describe(self, x: Tensor) -> Tensor:
        return self.toy.features(x, x[:, 0], None, ["second"])[0].tanh().mean((2, 3))


@functools.cache
def vit() -> Path:
    """The folder of a random DINOv2; the same for every process of a session, and whole whenever it
    can be seen.
    """
    torch.manual_seed(4)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    folder = Path(tempfile.mkdtemp(prefix="distill-vit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shake(Dinov2Model(Dinov2Config(**shape)), 4).save_pretrained(folder)
    return folder


def eyes(**options: Any) -> ImageFeatures:
    return ImageFeatures(str(vit()), size=SIDE, mean=[0.5] * 3, std=[0.5] * 3, **options)


def add(
    teacher: Any,
    *,
    options: dict[str, Any] | None = None,
    score_teacher: Any = None,
    **loop_settings: Any,
) -> ADD:
    given = parts(teacher, **loop_settings)
    given["score_teacher"] = score_teacher
    given["features"] = features = ToyImages(teacher) if isinstance(teacher, Toy) else eyes()
    text = None if isinstance(teacher, Toy) else "teacher"
    given["condition"] = condition = Projection(teacher, features, text=text)
    torch.manual_seed(given["loop"].seed)
    widths = {"pooled": condition.pooled_width, "image": condition.image_width}
    given["heads"] = StyleGANTHeads(features.channels, **widths)
    levels = Discrete([1.0, 0.75, 0.5, 0.25], [0.25] * 4)
    own = {"levels": levels, "distill": ScoreDistillation()} | (options or {})
    return assembled(ADD, given, **own)


def nitrofusion(
    teacher: Any,
    *,
    options: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    **loop_settings: Any,
) -> NitroFusion:
    # A head drawn for the first time moves by the signs of its gradient, those that are rounding
    # errors among them: with this eps these do not count, and runs that differ in rounding alone
    # stay together.
    given = parts(teacher, **{"critic_eps": 1e-3} | loop_settings)
    given["features"] = features = TeacherFeatures(teacher, taps="encoder", tasks=TASKS)
    torch.manual_seed(given["loop"].seed)
    levels = [0.01, 0.25, 0.5, 0.75]
    own = {"size": 150, "levels": levels, "width": 16, "refresh": 0.02} | (pool or {})
    given["heads"] = Pool(features.channels, **own)
    own = {"levels": [[1.0], [1.0, 0.5]], "refine": [0, 2]} | (options or {})
    return assembled(NitroFusion, given, renoise=Discrete(levels, [0.25] * 4), **own)


def regression(
    teacher: Any, *, options: dict[str, Any] | None = None, **loop_settings: Any
) -> Regression:
    """On pairs that the teacher makes as it goes: no noise is known of the data here."""
    given = alone(parts(teacher, **loop_settings))
    levels = Discrete([1.0, 0.75, 0.5, 0.25], [0.7, 0.1, 0.1, 0.1])
    pairs = TeacherSamples(levels=[1.0, 0.75, 0.5, 0.25], fresh=False)
    return assembled(Regression, given, **{"levels": levels, "real": pairs} | (options or {}))


def consistency(
    teacher: Any, *, options: dict[str, Any] | None = None, **loop_settings: Any
) -> ConsistencyDistillation:
    given = alone(parts(teacher, **loop_settings))
    return assembled(
        ConsistencyDistillation, given, **{"steps": 4, "guidance": 2.0} | (options or {})
    )


class PairedDPO(DPO):
    """On data that hold no losers: each latent is preferred to its negative."""

    def prepare_batch(self, batch: dict[str, Any], *generators: torch.Generator) -> Any:
        return super().prepare_batch({"loser_x0": -batch["x0"], **batch}, *generators)


def dpo(teacher: Any, *, options: dict[str, Any] | None = None, **loop_settings: Any) -> DPO:
    given = alone(parts(teacher, **loop_settings))
    own = {"beta": 5000.0, "times": Uniform(0.001, 1.0)} | (options or {})
    return assembled(PairedDPO, given, **own)


def alone(given: dict[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in given.items() if key not in ("features", "heads")}


GAMES = {"ladd": ladd, "add": add, "nitrofusion": nitrofusion, "dmd2": dmd2}
METHODS = {**GAMES, "regression": regression, "consistency": consistency, "dpo": dpo}


def trainer(
    folder: Path, steps: int, *callbacks: L.Callback, precision: Any = "32-true"
) -> L.Trainer:
    return L.Trainer(
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def critic(method: Distillation) -> Any:
    """The heads of this iteration."""
    return method.heads.draw(method.loop.streams(method).common("heads"))


def drawn(method: Distillation, batch: Any, micro: int = 0) -> tuple[Any, Any]:
    """What the method draws for this batch, as that micro-batch, and what both players need of the
    sample.
    """
    draws = method.draw(batch, method.loop.streams(method, micro))
    return draws, method.student_sample(batch, draws)


def simple_batch(method: Distillation, size: int = 2, seed: int = 0) -> Any:
    """A batch of random latents as the method sees it."""
    teacher = method.teacher
    shape = teacher.shape if isinstance(teacher, Toy) else teacher.latent_shape
    x0 = torch.randn((size, *shape), generator=torch.Generator().manual_seed(seed))
    return method.loop.prepare_batch(method, {"x0": x0, "caption": CAPTIONS[:size]})
