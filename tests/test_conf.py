"""The configuration fits the code: each target exists and takes its keys, each choice composes,
none is shadowed.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import OmegaConf

import distill.config.compose  # noqa: F401  registers the resolvers of the configuration
from distill.training.speed import Speed

CONF = Path(__file__).parents[1] / "conf"
PREFIXES = ("distill.", "torch.", "lightning.")  # what a config file may name
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
BESIDE = {"lightning.Trainer": Speed}  # what takes further keys of its node
INTERPOLATIONS = ("hydra:", "now:", "oc.env:")  # from outside the configuration; across nodes never

FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
ROOTS = [name for name in FILES if "/" not in name]  # config.yaml, and those of other commands
CHOICES = [name.removesuffix(".yaml") for name in FILES if "/" in name]
EXPERIMENTS = [name for name in CHOICES if name.startswith("experiment/")]
needs_conf = pytest.mark.skipif(
    not (CONF / "config.yaml").is_file(), reason="conf/config.yaml is not written yet"
)


def load(name: str) -> Any:
    """A file as Hydra reads it: YAML alone takes 3e-4 for a string."""
    return OmegaConf.to_container(OmegaConf.load(CONF / name), resolve=False)


def nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree, the branches too, with its dotted path."""
    yield path, tree
    pairs = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in pairs:
        yield from nodes(value, f"{path}.{key}".lstrip("."))


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_what_its_makers_took_off_the_hub(name):
    gone = ("stabilityai/stable-diffusion-2", "runwayml/")
    assert not [prefix for prefix in gone if prefix in (CONF / name).read_text(encoding="utf-8")]


def check_targets(tree: Any, *, whole: bool) -> int:
    """Bind the keys of every node with a `_target_` to its signature.

    A `whole` tree must bring all that it needs.
    """
    count = 0
    for path, node in nodes(tree):
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        target = node["_target_"]
        assert target.startswith(PREFIXES), f"{path}: {target} starts with none of {PREFIXES}"
        unknown = {key for key in node if key.startswith("_") and key.endswith("_")} - RESERVED
        assert not unknown, f"{path}: {unknown} mean nothing to Hydra"
        signature = inspect.signature(get_object(target))
        ours = inspect.signature(BESIDE[target]).parameters if target in BESIDE else ()
        kwargs = {key: node[key] for key in node if key not in {*RESERVED, "defaults", *ours}}
        bind = signature.bind if whole and not node.get("_partial_") else signature.bind_partial
        try:
            bind(*node.get("_args_", ()), **kwargs)
        except TypeError as error:
            raise AssertionError(
                f"{path}: {target}{signature} does not fit {sorted(kwargs)}: {error}"
            ) from error
        count += 1
    return count


def fill_ins(overrides: list[str], root: str = "config.yaml") -> list[str]:
    """A choice for each group that the root leaves open, as a user must make it too."""
    entries = [entry for entry in load(root).get("defaults", []) if isinstance(entry, dict)]
    opened = [
        str(group).split()[-1]
        for entry in entries
        for group, option in entry.items()
        if option == "???"
    ]
    chosen = {override.lstrip("+").partition("=")[0] for override in overrides}
    first = {
        group: Path(next(n for n in CHOICES if n.rpartition("/")[0] == group)).name
        for group in opened
    }
    return [f"{group}={option}" for group, option in first.items() if group not in chosen]


def composed(*overrides: str, root: str = "config.yaml") -> dict[str, Any]:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(root, overrides=list(overrides)), resolve=False)


def composed_with(choice: str) -> dict[str, Any]:
    """The configuration with one file chosen: instead of the root's choice, or besides it where the
    root has none.
    """
    group, _, option = choice.rpartition("/")
    if group == "experiment":
        return composed(f"experiment={option}")
    override = f"{group}={option}"
    if option == "paper":
        return composed(override)
    if group == "heads":  # chosen by the discriminator and the teacher, whose names it bears
        chosen = next(d for d in ("teacher_features", "pool", "dino") if option.startswith(d))
        return composed(f"discriminator={chosen}", f"teacher={option.removeprefix(f'{chosen}_')}")
    # What belongs to one method goes with it: a recipe by its name, a discriminator by the method's
    # defaults.
    methods = [path.stem for path in (CONF / "method").glob("*.yaml")]
    own = [m for m in methods if group == "recipe" and option.startswith(f"{m}_")]
    own += [
        m
        for m in methods
        if group == "discriminator" and option in str(load(f"method/{m}.yaml")["defaults"])
    ]
    try:
        return composed(override, *(f"method={m}" for m in own[:1]), *fill_ins([override]))
    except ConfigCompositionException as error:
        if "+" + override not in str(error):
            raise
        return composed("+" + override, *fill_ins([override]))


@needs_conf
def test_the_package_finds_this_configuration():
    from distill.config.location import CONF_DIR

    assert Path(CONF_DIR).is_absolute()
    assert Path(CONF_DIR).samefile(CONF)


@needs_conf
def test_a_missing_configuration_is_named(tmp_path):
    from distill.config.location import _find

    package = tmp_path / "src" / "distill"
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml in .*install it again"):
        _find(package)
    for place in (
        tmp_path / "conf",
        package / "conf",
    ):  # the second is a wheel's, and comes first once it is there
        place.mkdir(parents=True)
        (place / "config.yaml").touch()
        assert _find(package) == str(place)


@pytest.mark.parametrize(
    "name", [name for name in FILES if not name.startswith("hydra/")]
)  # those are plugins' own
def test_targets_of_a_file_take_its_keys(name):
    check_targets(load(name), whole=False)


@pytest.mark.parametrize("name", FILES)
def test_a_file_reaches_into_no_other_node(name):
    for path, value in nodes(load(name)):
        if path.startswith(
            "defaults"
        ):  # choosing a file by the names of two others (recipe) reads no value
            continue
        for inner in re.findall(r"\$\{([^}]*)", value) if isinstance(value, str) else ():
            assert inner.startswith(INTERPOLATIONS), (
                f"{name}, {path}: ${{{inner}}} is none of {INTERPOLATIONS}"
            )


@needs_conf
def test_nitrofusion_starts_from_few_step_weights_where_there_are_some():
    few = composed("method=nitrofusion")
    assert few["teacher"]["path"] == "shapes:student"
    assert few["method"]["warm_start"] == 0
    assert few["method"]["real"]["levels"] == [1.0, 0.75, 0.5, 0.25]
    for name in ("unet", "small", "large"):
        teacher = composed(f"teacher=shapes_{name}")["teacher"]
        many = composed("method=nitrofusion", f"teacher=shapes_{name}")
        assert many["teacher"] == teacher
        assert many["method"]["warm_start"] > 0
        assert many["method"]["real"] is None
    own = composed("method=nitrofusion", "teacher.path=mine")
    assert own["teacher"]["path"] == "mine"


@needs_conf
@pytest.mark.parametrize("method", [path.stem for path in (CONF / "method").glob("*.yaml")])
def test_both_teachers_of_a_world_share_its_recipe(method):
    one, other = (
        composed(f"method={method}", f"teacher={teacher}") for teacher in ("shapes", "shapes_unet")
    )
    if method != "nitrofusion":  # the UNet has no few-step weights to start from
        assert one.pop("teacher") != other.pop("teacher")
        assert one == other
    assert (
        one["trainer"]["max_steps"]
        < composed(f"method={method}", "teacher=sd35_large")["trainer"]["max_steps"]
    )


@needs_conf
@pytest.mark.parametrize("root", ROOTS)
def test_root_comes_first_so_that_every_choice_beats_it(root):
    assert load(root).get("defaults", ["_self_"])[0] == "_self_"


@needs_conf
def test_the_root_composes_and_has_targets():
    assert check_targets(composed(*fill_ins([])), whole=True) > 0


@needs_conf
@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes(root):
    check_targets(composed(*fill_ins([], root), root=root), whole=True)


@needs_conf
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_its_targets_get_what_they_need(choice):
    assert check_targets(composed_with(choice), whole=True) > 0


@needs_conf
@pytest.mark.parametrize("choice", EXPERIMENTS)
def test_every_value_of_an_experiment_survives(choice):
    config = dict(nodes(composed_with(choice)))
    for path, value in nodes(
        {key: value for key, value in load(f"{choice}.yaml").items() if key != "defaults"}
    ):
        if not isinstance(value, dict) and path and not path.startswith("hydra."):
            assert config[path] == value, (
                f"{choice}: {path} is {config[path]!r}, the experiment says {value!r}"
            )


def sweeps() -> Iterator[tuple[str, list[str]]]:
    """Each sweep that an experiment's head gives as a command, with its overrides as they are
    typed, and its own.
    """
    for choice in EXPERIMENTS:
        text = (CONF / f"{choice}.yaml").read_text(encoding="utf-8").replace(" \\\n#", "")
        params = (
            OmegaConf.select(OmegaConf.create(load(f"{choice}.yaml")), "hydra.sweeper.params") or {}
        )
        for i, command in enumerate(
            re.findall(r"^#     python -m distill\.run -m (.*)$", text, re.M)
        ):
            typed = shlex.split(command)
            own = [
                f"{k}={v}"
                for k, v in params.items()
                if not any(t.startswith(f"{k}=") for t in typed)
            ]
            yield f"{choice}:{i}", [*typed, *own]


@needs_conf
@pytest.mark.parametrize(
    ("name", "overrides"), [pytest.param(*found, id=found[0]) for found in sweeps()]
)
def test_every_value_of_a_sweep_composes(name, overrides):
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
    swept = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        for o in parsed
        if o.is_sweep_override()
    ]
    assert [f"seed={seed}" for seed in (0, 1, 2)] in swept
    for values in swept:
        for value in values:
            config = composed(*fixed, *(v[0] for v in swept if v is not values), value)
            assert check_targets(config, whole=True) > 0


@needs_conf
def test_an_experiment_beats_the_root(tmp_path):
    """Written here, so that it holds before the first experiment is: each plain value of the root
    gives way.
    """
    plain = {
        key: value
        for key, value in load("config.yaml").items()
        if isinstance(value, int | float | str | None)
    }
    assert plain, "the root has no plain value, not even a seed"
    probe = tmp_path / "experiment" / "probe.yaml"
    probe.parent.mkdir()
    probe.write_text(
        "# @package _global_\n" + OmegaConf.to_yaml(dict.fromkeys(plain, "probe")), encoding="utf-8"
    )
    config = composed(f"hydra.searchpath=[file://{tmp_path}]", "experiment=probe", *fill_ins([]))
    assert {key: config[key] for key in plain} == dict.fromkeys(plain, "probe")


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_target_": "torch.optim.AdamW", "_partial_": True, "lrr": 1e-3}, "lrr"),
        ({"_target_": "torch.optim.AdamW", "lr": 1e-3}, "params"),
        ({"_target_": "os.system", "command": "true"}, "starts with none"),
        ({"_target_": "torch.optim.AdamW", "_partail_": True}, "_partail_"),
        ([{"deep": {"_target_": "torch.optim.AdamW", "_partial_": True, "lrr": 1e-3}}], "0.deep"),
    ],
)
def test_a_wrong_node_is_caught(node, expected):
    with pytest.raises(AssertionError, match=expected):
        check_targets(node, whole=True)


def test_a_right_node_passes():
    assert (
        check_targets(
            {"a": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}}, whole=True
        )
        == 1
    )
