"""Checks of `metrics.networks`, the networks that evaluate pictures, before they are read."""

from pathlib import Path

from omegaconf import DictConfig

from distill.config.compose import shipped
from distill.teachers.loading import locate


def check_networks(metrics: DictConfig) -> None:
    """Check that the networks of the chosen measures exist, or may be on the hub."""
    needed = {metrics.scores[name].get("network") for name in metrics.measures}
    for name in sorted(needed & set(metrics.networks)):
        node = metrics.networks[name]
        for key in ("path", "processor"):
            path = shipped(str(node.get(key) or "")).removeprefix("local-dir:")
            if locate.is_local(path) and not Path(path).exists():
                what = f"no such file or folder{locate.near(path)}; give one, or a name of the hub"
                raise FileNotFoundError(f"metrics.networks.{name}.{key}={node[key]}: {what}")
        weights = Path(shipped(str(node.get("pretrained") or "")))
        is_file = weights.suffix in (".pt", ".pth", ".bin", ".safetensors")
        if is_file and ":" not in str(node.path) and not weights.is_file():
            what = "no such file; download it from its authors, or leave out the measures on it"
            raise FileNotFoundError(f"metrics.networks.{name}.pretrained={weights}: {what}")
