"""Where the configuration lies: beside the code in an installed wheel, at the top of the repository
in a checkout.
"""

from pathlib import Path


def _find(package: Path) -> str:
    """The folder with `config.yaml` that belongs to this copy of the package, absolute: Hydra wants
    it so.
    """
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
