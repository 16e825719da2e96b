"""The folder of the configuration: in the package of a wheel, or at the top of a checkout."""

from pathlib import Path


def _find(package: Path) -> str:
    """The folder with `config.yaml` of this copy of the package, absolute as Hydra needs it."""
    places = [package / "conf"]
    if package.parent.name == "src":
        places.append(package.parents[1] / "conf")
    for place in places:
        if (place / "config.yaml").is_file():
            return str(place)
    raise FileNotFoundError(
        f"no config.yaml in {' or '.join(map(str, places))}: this copy of distill is incomplete; "
        "install it again with pip, or from a full checkout with `pip install -e .`"
    )


CONF_DIR: str = _find(Path(__file__).resolve().parents[1])
