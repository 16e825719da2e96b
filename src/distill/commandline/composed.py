"""A command's configuration as Hydra composes it, with its files.

Imports Hydra, and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import SearchPathException
from hydra.types import RunMode
from omegaconf import OmegaConf

from distill.commandline.comments import Comments, read, summary
from distill.config.compose import options_of
from distill.config.location import CONF_DIR


@dataclass(frozen=True)
class Part:
    """A file of the configuration: its path, the package of its keys, and the chosen option."""

    file: Path
    package: str
    choice: str  # `method/ladd`, or the command's own `config`

    @property
    def group(self) -> str:
        return self.choice.rpartition("/")[0]

    @property
    def comments(self) -> Comments:
        return read(self.file)

    def dotted(self, key: str) -> str:
        """A key of the file as one of the whole configuration."""
        return f"{self.package}.{key}" if self.package else key


@dataclass(frozen=True)
class Composed:
    """The configuration `name` with these overrides; `folder` is that of `--config-dir`.

    Raises exceptions of Hydra if it cannot be composed. Sweeps are left out.
    """

    name: str
    overrides: tuple[str, ...] = ()
    folder: str | None = None

    @cached_property
    def folders(self) -> list[Path]:
        """The folders of configuration files, the user's first."""
        return [*([Path(self.folder).absolute()] if self.folder else []), Path(CONF_DIR)]

    @cached_property
    def loader(self) -> ConfigLoaderImpl:
        Plugins.instance()
        path = create_config_search_path(CONF_DIR)
        if self.folder:
            if not self.folders[0].is_dir():
                raise SearchPathException(f"--config-dir {self.folder}: there is no such folder")
            path.prepend("command-line", f"file://{self.folders[0]}")
        return ConfigLoaderImpl(path)

    @cached_property
    def single(self) -> list[str]:
        """The overrides without sweeps."""
        parsed = OverridesParser.create(self.loader).parse_overrides(list(self.overrides))
        return [one.input_line for one in parsed if not one.is_sweep_override()]

    @cached_property
    def tree(self) -> dict[str, Any]:
        """Plain containers with unresolved interpolations, without the key `hydra`."""
        with options_of(self.loader):
            cfg = self.loader.load_configuration(self.name, self.single, RunMode.RUN)
        tree: Any = OmegaConf.to_container(cfg, resolve=False)
        return {key: value for key, value in tree.items() if key != "hydra"}

    @cached_property
    def parts(self) -> list[Part]:
        """The files in the order of merging: the last file with a key decides its value."""
        with options_of(self.loader):
            found = self.loader.compute_defaults_list(self.name, self.single, RunMode.RUN)
        return [
            Part(file, (default.package or "").replace("_global_", ""), default.config_path)
            for default in found.defaults
            if default.config_path
            and (default.package or "").partition(".")[0] != "hydra"
            and (file := self.file(f"{default.config_path.lstrip('/')}.yaml"))
        ]

    def file(self, name: str) -> Path | None:
        """The file of this name in the first folder that has it."""
        return next((p / name for p in self.folders if (p / name).is_file()), None)

    @cached_property
    def chosen(self) -> dict[str, str]:
        """Group -> the option that is chosen."""
        return {part.group: part.file.stem for part in self.parts if part.group}

    @cached_property
    def groups(self) -> list[str]:
        """The groups of the command's defaults list, and those that another option chose."""
        listed = self.parts_of_root()
        return list(dict.fromkeys([*listed, *self.chosen]))

    def parts_of_root(self) -> list[str]:
        """The groups that the command's own file lists."""
        file = self.file(f"{self.name}.yaml")
        keys = OmegaConf.load(file).get("defaults", []) if file else []
        named = [str(key) for entry in keys if hasattr(entry, "keys") for key in entry]
        return [
            key.removeprefix("optional ")
            for key in named
            if not key.startswith("override") and "hydra" not in key
        ]

    def options(self, group: str) -> dict[str, str]:
        """Option -> first sentence of its header, for a group and its subfolders."""
        found: dict[str, str] = {}
        for folder in reversed(self.folders):
            for file in sorted((folder / group).rglob("*.yaml")):
                found[file.relative_to(folder / group).with_suffix("").as_posix()] = summary(file)
        return dict(sorted(found.items()))
