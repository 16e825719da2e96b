"""A user's own autoencoder in place of the pipeline's (`teacher.vae`), as fine-tunes
recommend one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import snapshot_download
from torch import nn

from distill.storage.bounded import mapping_of
from distill.teachers.families import Family
from distill.teachers.loading.locate import autoencoder_in, home_of
from distill.teachers.loading.reading import download, dtype_of, read_network
from distill.teachers.loading.settings import cell_of

KEY = "teacher.vae"
# Files of a repository that diffusers reads, without copies of the weights in other formats.
PATTERNS = [
    f"{place}{name}"
    for place in ("", "vae/")
    for name in ("config.json", "diffusion_pytorch_model*.safetensors*")
]


class Autoencoder:
    """The autoencoder at `path` for a pipeline of `family`.

    `path` is a folder or hub id of an autoencoder, or of a pipeline with one. Attributes: `home`,
    the folder of its files; `config`; `scale`, side of a latent in pixels. Raises FileNotFoundError
    if there is none, and ValueError for one of another class.
    """

    def __init__(self, path: str, family: Family, *, dtype: str, use_safetensors: bool):
        folder = Path(path)
        if not folder.exists():
            folder = Path(download(KEY, path, snapshot_download, allow_patterns=PATTERNS))
        self.path, self.home = path, autoencoder_in(folder, path)
        self.config = mapping_of(self.home / "config.json")
        found, expected = self.config.get("_class_name"), family.autoencoder
        if found != expected:
            what = f"is a {found}, and a {family.kind_name()} wants an {expected}"
            raise ValueError(f"{KEY}={path}: {what}; give one of its kind")
        self._read: dict[str, Any] = {"dtype": dtype_of(dtype), "variant": None}
        self._read["use_safetensors"] = use_safetensors or None
        self.scale = cell_of(self.config, f"{KEY}={path}")

    def read(self) -> nn.Module:
        """The network, with all tensors from the files."""
        kind = getattr(diffusers, self.config["_class_name"])
        place = self.home.absolute()
        return read_network(kind, str(place.parent), place.name, key=KEY, **self._read)

    def put_on(self, pipeline: Any, *, later: bool) -> None:
        """Make it the pipeline's own, at once, or `later`, when its deferred parts are loaded."""
        pipeline.vae_scale_factor = self.scale
        if later:
            reads: dict[str, Callable[[], nn.Module]] = pipeline.deferred
            reads["vae"] = self.read
        else:
            pipeline.register_modules(vae=self.read())

    def check(self, channels: int) -> None:
        """Raise ValueError unless its latents have this number of channels, the
        denoiser's input.
        """
        own = self.config.get("latent_channels") or self.config.get("z_dim")
        if own != channels:
            what = f"its latents have {own} channels and this teacher's have {channels}"
            raise ValueError(f"{KEY}={self.path}: {what}; give one made for it")


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Within this context an autoencoder decodes in tiles, if `wanted` and supported."""
    if not wanted or not hasattr(vae, "enable_tiling") or vae.use_tiling:
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def scale_of(folder: Path | None) -> int:
    """Side of a latent in pixels, from the configuration of an autoencoder that is not loaded."""
    file = Path(home_of(folder, "vae"), "vae", "config.json") if folder else None
    return cell_of(mapping_of(file) if file else {}, f"teacher.path={folder}")
