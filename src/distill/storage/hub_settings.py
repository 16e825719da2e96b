"""Refuse settings in a model's folder that would make a library download from the hub.

Adapters may name another base model, and the attention may name a kernel on the hub. Such keys are
refused before transformers or diffusers read the folder. Nothing here imports a slow library.
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
# For every `from_pretrained` of transformers that may find code named in a folder (auto_map): left
# out, it asks at the terminal whether to run it.
NO_CODE = {"trust_remote_code": False}


def check_hub_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for settings that make a library download another model or code."""
    for key, value in settings.items():
        if key == BASE_OF_ADAPTERS and value is not None:
            what = "names another model, which would be read in place of this one"
            raise ValueError(f"{file}: {key}={shown(value, 60)} {what}; remove the file")
        if key in IMPLEMENTED and not _is_built_in(value):
            what = "is code that would be downloaded"
            raise ValueError(f"{file}: {key}={shown(value, 60)} {what}; remove the key")
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                check_hub_settings(inner, file)


def check_folder(path: str | Path, where: str) -> None:
    """Check the settings in this folder; errors start with `where`. Does nothing for a hub id."""
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
