"""Checks before a shard job: its folder, and whether it was started with the same settings."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distill.config import paths, trust
from distill.config.compose import changes, check_counts
from distill.config.validate import check_keys, check_teacher
from distill.data.named import BEGUN, shards_in
from distill.storage import fingerprints as content
from distill.storage.formats import is_hidden
from distill.storage.locks import check_free

# Keys that may change when a shard job is resumed.
FREE = ("out", "devices", "data.num_workers", "data.max_bad_share", "data.cache_")


def check_shard_job(cfg: DictConfig) -> None:
    """Checks that all commands that write shards share."""
    counts = {"devices": 1, "per_shard": 1, "seed": 0, "steps": 1, "batch_size": 1, "count": 1}
    check_counts(cfg, counts)
    check_keys(cfg)
    check_teacher(cfg.teacher)
    check_free(Path(cfg.out), "out")
    refuse_another(cfg, Path(cfg.out))


def refuse_another(cfg: DictConfig, folder: Path) -> None:
    """Raise ValueError if the folder holds shards of other settings, naming these."""
    settings_file = folder / BEGUN
    is_ours = settings_file.is_file()
    others = [path for path in folder.glob("*.tar") if not is_hidden(path.name)]
    if not (shards_in(folder) if is_ours else others):
        return
    if not is_ours:
        raise ValueError(
            f"out={folder} holds shards that were not made by this command; choose another out="
        )
    settings = trust.data(settings_file)
    trust.check_targets(settings)  # also keys that are not compared
    before = OmegaConf.create(settings)
    said = {
        key: text
        for key, text in changes(before, cfg).items()
        if not (
            paths.is_path(key)
            and content.same_path(*(OmegaConf.select(c, key) for c in (before, cfg)))
        )
    }
    if cfg.get("precision") == "auto":  # a resumed job keeps its precision
        said.pop("precision", None)
    if different := [text for key, text in said.items() if not key.startswith(FREE)]:
        raise ValueError(
            f"out={folder} was started with other settings: {'; '.join(different)}; choose another"
            " out="
        )
