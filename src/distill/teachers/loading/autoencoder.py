"""An autoencoder of one's own in a pipeline's place, as fine-tunes name one beside their weights
(`teacher.vae`).
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
from distill.teachers.loading.locate import autoencoder_in
from distill.teachers.loading.reading import dtype_of, fetched, home_of, whole
from distill.teachers.loading.settings import cell_of

KEY = "teacher.vae"
# Of a repository what diffusers reads, and not the same weights in other layouts.
PATTERNS = [
    f"{place}{name}"
    for place in ("", "vae/")
    for name in ("config.json", "diffusion_pytorch_model*.safetensors*")
]


class Autoencoder:
    """The autoencoder at `path`, a folder or hub id of one or of a pipeline with one, for a
    pipeline of `family`.

    Its attributes: `home`, the folder with its files; `config`; `scale`, pixels a side per latent.
    Raises FileNotFoundError where there is none, and ValueError for one of another class.
    """

    def __init__(self, path: str, family: Family, *, dtype: str, use_safetensors: bool):
        folder = Path(path)
        if not folder.exists():
            folder = Path(fetched(KEY, path, snapshot_download, allow_patterns=PATTERNS))
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
        """The network, with every one of its tensors from the files."""
        kind = getattr(diffusers, self.config["_class_name"])
        place = self.home.absolute()
        return whole(kind, str(place.parent), place.name, key=KEY, **self._read)

    def put_on(self, pipeline: Any, *, later: bool) -> None:
        """Make it the pipeline's: at once, or once its parts that were deferred are asked for."""
        pipeline.vae_scale_factor = self.scale
        if later:
            reads: dict[str, Callable[[], nn.Module]] = pipeline.deferred
            reads["vae"] = self.read
        else:
            pipeline.register_modules(vae=self.read())

    def check(self, channels: int) -> None:
        """Raise ValueError unless its latents have so many channels, those that the denoiser
        reads.
        """
        if (own := self.config.get("latent_channels")) != channels:
            what = f"its latents have {own} channels and this teacher's have {channels}"
            raise ValueError(f"{KEY}={self.path}: {what}; give one made for it")


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Within, an autoencoder decodes in tiles if that is wanted, and it can; one that does so
    already goes on.
    """
    if not wanted or not hasattr(vae, "enable_tiling") or vae.use_tiling:
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def scale_of(folder: Path | None) -> int:
    """Pixels a side per latent, from the configuration of an autoencoder that is not read."""
    file = Path(home_of(folder, "vae"), "vae", "config.json") if folder else None
    return cell_of(mapping_of(file) if file else {}, f"teacher.path={folder}")
