"""The rows of full_size.py, in order of importance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A run.

    words: its options beside the network and the size, as they are typed.
    need: GB of a card that are kept for it while others run; more than it should take.
    card: GB of the card that it is meant for; its allocator may not hold more.
    frames: of a video.
    """

    network: str
    side: int
    batch: int
    words: tuple[str, ...]
    need: float = 80.0
    card: float | None = None
    frames: int = 21

    @property
    def options(self) -> str:
        return " ".join(self.words)

    @property
    def sides(self) -> str:
        return f"832x480, {self.frames} frames" if self.network == "wan" else str(self.side)

    @property
    def label(self) -> str:
        return f"{self.network}, {self.sides}, batch {self.batch}: {self.options}"


LORA = ("student=lora",)
SAVING = (*LORA, "student.checkpointing=true")
HOST = "loop.ema_device=cpu"


def quantised(kind: str, *more: str) -> tuple[str, ...]:
    return (*SAVING, f"teacher.quantize={kind}", *more)


def small(network: str, words: tuple[str, ...], need: float, card: float | None = None) -> Row:
    """One picture of 1024 x 1024 a step."""
    return Row(network, 1024, 1, words, need, card)


TERM = "method.distill_weight=1.0"  # the distillation term: passes of the teacher
MEMORY = (
    small("sdxl", quantised("int8", HOST), 16, 16),
    small("z_image", quantised("int8"), 24, 24),
    small("klein", quantised("int8"), 24, 24),
    small("sd35_medium", ("student=full", "student.checkpointing=true"), 72, 80),
    # the same in bfloat16, and in 4 bits: what quantising costs and brings
    small("sdxl", SAVING, 20),
    small("z_image", SAVING, 32),
    small("klein", SAVING, 26),
    small("z_image", quantised("nf4"), 24, 24),
    small("sdxl", quantised("nf4", HOST), 16, 16),
    small("z_image", quantised("fp8"), 24, 24),
    # other terms and methods
    small("sdxl", quantised("int8", HOST, TERM), 16, 16),
    small("sdxl", ("method=nitrofusion", *quantised("int8", HOST)), 24, 24),
    small("sdxl", (*SAVING, TERM), 24, 24),
    small("sdxl", ("method=dmd2", *quantised("int8", HOST)), 72),  # with a whole fake score
)
MAIN = ("z_image", "klein", "sdxl", "sd35_medium")
LIGHT = ("sd15", "sana", "pixart", "lumina2", "kolors", "sd3")
HEAVY = ("chroma", "flux", "qwen_image")  # with too much to keep of a pass


def speed(network: str, side: int, *more: str) -> Row:
    """A LoRA on as many image tokens at both sizes."""
    words = SAVING if network in HEAVY else LORA
    return Row(network, side, 4 if side == 512 else 1, (*words, *more))


SPEED = (
    *(speed(network, side) for network in MAIN for side in (512, 1024)),
    *(speed(network, 512) for network in LIGHT),
    Row("wan", 0, 1, SAVING),
    *(speed(network, 512, "trainer.compile=blocks") for network in MAIN),
    *(speed(network, 512) for network in HEAVY),
    Row("wan", 0, 1, SAVING, frames=81),
    *(speed(network, 1024) for network in (*LIGHT[1:], *HEAVY)),
)
