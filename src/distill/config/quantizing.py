"""Check that frozen weights can be quantised here. Nothing here imports torch at the top."""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

KEYS = ("teacher", "score_teacher")


def quantized_keys(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Dotted key and kind of each teacher whose weights are to be quantised."""
    for group in KEYS:
        node = cfg.get(group)
        if isinstance(node, DictConfig) and node.get("quantize"):
            yield f"{group}.quantize", str(node.quantize)


def check_quantize(cfg: DictConfig) -> None:
    """Check that the strategy fits: sharded weights cannot be quantised."""
    sharded = "FullySharded" in str(OmegaConf.select(cfg, "trainer.strategy._target_"))
    for key, kind in quantized_keys(cfg):
        if sharded:
            what = "trainer=fsdp2 shards the weights that this would quantise"
            raise ValueError(f"{key}={kind}: {what}; use trainer=ddp, or null")


def check_on_device(cfg: DictConfig) -> None:
    """Check that the device knows the numbers. Imports torch if something is to be quantised."""
    for key, kind in quantized_keys(cfg):
        from distill.machine.hardware import device

        name = device(cfg.trainer.get("accelerator") or "auto").type
        if kind == "fp8" and name == "mps":
            raise ValueError(f"{key}={kind}: Apple's GPUs have no float8; use int8 or nf4")
