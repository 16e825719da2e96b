"""Settings in a model's folder by which transformers or diffusers would ask the hub for something
else.

A folder is data: that adapters are of another model, or that its attention is somebody's kernel, is
refused by key before a library reads it. Nothing here imports a library that takes long.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.storage.bounded import mapping_of
from distill.terminal.shown import shown

BASE_OF_ADAPTERS = "base_model_name_or_path"
IMPLEMENTED = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
IMPLEMENTED += ("experts_implementation", "_experts_implementation")
BUILT_IN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
READ = ("config.json", "adapter_config.json", "tokenizer_config.json", "preprocessor_config.json")


def check_hub_settings(said: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for settings by which a library would fetch another model, or code, from the
    hub.
    """
    for key, value in said.items():
        if key == BASE_OF_ADAPTERS and value is not None:
            what = "names another model, which would be read in place of this one"
            raise ValueError(f"{file}: {key}={shown(value, 60)} {what}; take the file away")
        if key in IMPLEMENTED and not _is_built_in(value):
            what = "is code that would be fetched"
            raise ValueError(f"{file}: {key}={shown(value, 60)} {what}; take the key out")
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                check_hub_settings(inner, file)


def check_folder(path: str | Path, where: str) -> None:
    """The same, beginning with `where`, of what a library reads in this folder; nothing for a hub
    id.
    """
    for file in (Path(path) / name for name in READ):
        if not file.is_file():
            continue
        try:
            check_hub_settings(mapping_of(file), file)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _is_built_in(value: Any) -> bool:
    each = value.values() if isinstance(value, Mapping) else [value]
    return all(name is None or name in BUILT_IN for name in each)
