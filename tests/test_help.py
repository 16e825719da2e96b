"""The command line explains itself: help pages from the YAML's own comments, a list of commands,
recipes to copy.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distill import cli, recipes
from distill.commandline import comments, page
from distill.config.compose import dotted
from distill.config.location import CONF_DIR

WITH_CONFIG = [name for name in cli.COMMANDS if name not in cli.NO_CONFIG]
CONF = Path(CONF_DIR)


def plain(text: str) -> str:
    """Without the line breaks of columns."""
    return " ".join(text.split())


@pytest.mark.parametrize("name", WITH_CONFIG)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_a_page_has_every_key_with_its_default(name, flag, command):
    code, out, err = command(name, flag)
    assert (code, err) == (0, "")
    with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
        tree = OmegaConf.to_container(compose(cli.config_of(name)), resolve=False)
    for key, value in dotted(tree).items():
        if not (isinstance(value, dict) and value) and not key.rpartition(".")[2].startswith("_"):
            assert f"\n  {key}={'' if value == '???' else page.written(value)}" in out
    assert f"python -m distill.{name} " in out.splitlines()[0]
    assert out.count(f"    python -m distill.{name}") >= 2, "two examples at least"
    assert "--config-dir" in out


def test_a_page_says_what_stands_beside_a_key(command):
    out = plain(command("sample", "--help")[1])
    assert 'prompts=null several: a list ["one","two"], or a text file with one a line' in out
    assert "run= (must be given) a run folder, a diffusers pipeline folder, or a hub id" in out


def test_a_page_knows_groups_and_follows_what_is_chosen(command):
    out = command("run", "--help")[1]
    assert "method: how the student learns; it also chooses the discriminator" in out
    assert "  * ladd                    LADD, arXiv 2403.12015\n" in out
    assert "    add                     ADD, arXiv 2311.17042\n" in out
    assert "method=ladd: LADD, arXiv 2403.12015" in out
    assert "method.r1_every" not in out
    other = command("run", "method=add", "seed=7", "loop.warmup_steps=3", "-h")[1]
    assert "  * add                     ADD, arXiv 2311.17042\n" in other
    assert "  method.r1_every=4 " in other
    assert "  seed=7 " in other
    assert "  loop.warmup_steps=3 " in other
    assert "discriminator=dino: ADD: heads on a frozen DINOv2" in other


def test_a_page_says_which_file_has_changed_a_value_and_why(command):
    out = plain(command("run", "teacher=shapes", "--help")[1])
    said = "only the discriminator learns [recipe/ladd_shapes: after these the heads are right"
    assert said in out
    assert "[" not in plain(command("sample", "--help")[1]).partition("steps=1")[2][:20]


def test_a_page_of_a_wrong_choice_names_the_nearest(command):
    code, _, err = command("run", "method=lad", "--help")
    assert code == 1
    assert "did you mean ladd?" in err


def test_the_comments_of_a_file_are_found_wherever_they_stand(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# @package _global_\n# A file. More of it.\n#\n# End.\n"
        "defaults:\n  - override /method: add # the method\n"
        "a: 1 # one\n"
        "# above\n# and above\nb: 'a # b' # beside\n"
        "c: # a node\n  d: {e: 1, f: 2} # in braces\n  g: |\n    # no comment\n    text\n"
        "h:\n  - 1 # no key's\n"
        "i: [1, # first\n  2] # last\n"
        "\n# of nothing\n\nj: 3\n",
        encoding="utf-8",
    )
    found = comments.read(file)
    assert found.header == ["A file. More of it.", "", "End."]
    assert found.summary == "A file"
    assert found.keys == {
        "defaults.method": "the method",
        "a": "one",
        "b": "above and above beside",
        "c": "a node",
        "c.d": "in braces",
        "i": "last",
    }


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_option_of_a_group_says_what_it_is_in_a_line(file):
    if file.parent != CONF:
        assert 0 < len(comments.summary(file)) <= 130, comments.summary(file)


# -- distill, and its commands ---------------------------------------------------------------------


def distill(*words: str, cwd: Path, module: str = "distill") -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", module, *words]
    return subprocess.run(
        line, cwd=cwd, capture_output=True, text=True, timeout=300, encoding="utf-8"
    )


def test_python_m_distill_is_distill(tmp_path):
    for words in ([], ["--help"]):
        done = distill(*words, cwd=tmp_path)
        assert done.returncode == 0
        assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    assert distill("--version", cwd=tmp_path).stdout.startswith("distill ")
    wrong = distill("smaple", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "distill: no command 'smaple'; did you mean 'sample'?" in wrong.stderr
    page = distill("sample", "--help", cwd=tmp_path).stdout
    assert page == distill("--help", cwd=tmp_path, module="distill.sample").stdout


@pytest.mark.parametrize("name", cli.NO_CONFIG)
def test_commands_without_a_configuration_have_a_page_too(name, command):
    code, out, _ = command(name, "--help")
    assert code == 0
    examples = [line for line in out.splitlines() if line.startswith("    ")]
    assert sum("distill" in line for line in examples) >= 2


# -- recipes ---------------------------------------------------------------------------------------


def shown(*words: str) -> dict:
    """What `--cfg job` prints, as a tree."""
    line = [sys.executable, "-m", "distill.run", *words, "--cfg", "job"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return OmegaConf.to_container(OmegaConf.create(done.stdout), resolve=False)


def test_recipes_lists_every_experiment_in_a_line(command):
    code, out, _ = command("recipes")
    assert code == 0
    for file in (CONF / "experiment").rglob("*.yaml"):
        name = file.relative_to(CONF / "experiment").with_suffix("").as_posix()
        assert f"\n  {name} " in out
    assert "  sd3_turbo                       LADD on Stable Diffusion 3 medium, 1024x1024\n" in out


@pytest.mark.parametrize("name", recipes.names())
def test_a_copy_composes_to_what_its_original_does(name, tmp_path):
    file = recipes.copy(name, str(tmp_path / "conf"))
    assert file.read_text(encoding="utf-8").startswith("# @package _global_\n")
    own = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
        trees = [
            OmegaConf.to_container(compose("config", overrides=words), resolve=False)
            for words in ([own, f"experiment={name}_mine"], [f"experiment={name}"])
        ]
    assert trees[0].pop("name").endswith("_mine")
    trees[1].pop("name")
    assert trees[0] == trees[1]


def test_a_copy_is_found_edited_and_never_overwritten(command, tmp_path):
    code, out, _ = command("recipes", "copy", "ladd_long_shapes", "as=mine")
    assert code == 0
    assert "python -m distill.run --config-dir conf experiment=mine" in out
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    before = file.read_text(encoding="utf-8")
    assert "name: mine\n" in before
    assert "#     python -m distill.run --config-dir conf experiment=mine\n" in before
    edited = before.replace("head_start: 100", "head_start: 7")
    file.write_text(edited, encoding="utf-8")
    tree = shown("--config-dir", "conf", "experiment=mine")
    assert (tree["name"], tree["loop"]["head_start"]) == ("mine", 7)
    code, _, err = command("recipes", "copy", "ladd_long_shapes", "as=mine")
    assert code == 1
    assert err.startswith("distill: conf/experiment/mine.yaml: ")
    assert file.read_text(encoding="utf-8") == edited
    page = command("run", "--config-dir", "conf", "experiment=mine", "--help")[1]
    assert "  * mine " in page
    assert "  loop.head_start=7 " in page


def test_a_copied_recipe_is_chosen_by_name(command, tmp_path):
    code, out, _ = command("recipes", "copy", "add_shapes", "as=my_add")
    assert code == 0
    said = "python -m distill.run --config-dir conf method=add recipe=my_add"
    assert said in out
    file = tmp_path / "conf" / "recipe" / "my_add.yaml"
    text = file.read_text(encoding="utf-8")
    words = said.split()[3:]
    assert shown(*words) == shown("method=add")
    file.write_text(text.replace("head_start: 50", "head_start: 7"), encoding="utf-8")
    assert shown(*words)["loop"]["head_start"] == 7


# -- the recipe ------------------------------------------------------------------------------------


def test_a_recipe_of_ones_own_method_is_found_by_its_name(tmp_path):
    """As <method>_shapes in a folder of the user's; without it the method has the paper's."""
    folder = tmp_path / "conf"
    (folder / "method").mkdir(parents=True)
    text = "defaults: [ladd]\n"
    (folder / "method" / "mine.yaml").write_text(text, encoding="utf-8")
    words = ["--config-dir", str(folder), "method=mine"]
    assert shown(*words)["method"]["loss"] == "hinge"
    (folder / "recipe").mkdir()
    text = "# @package _global_\nmethod:\n  loss: relativistic\n"
    (folder / "recipe" / "mine_shapes.yaml").write_text(text, encoding="utf-8")
    assert shown(*words)["method"]["loss"] == "relativistic"
    assert shown(*words, "recipe=paper")["method"]["loss"] == "hinge"


def test_the_papers_values_are_a_choice(command):
    """With recipe=paper and heads=paper a teacher changes nothing but itself."""
    words = ["method=ladd", "recipe=paper", "heads=paper"]
    ours, theirs = shown(*words, "teacher=shapes"), shown(*words, "teacher=sd3")
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different == {"teacher"}
    code, _, err = command("run", "recipe=lad_shapes", "--cfg", "job")
    assert code == 1
    assert "recipe=lad_shapes: no such option (did you mean ladd_shapes?)" in err


FORMER = {
    "optimizer" + ".head_start=3": "loop.head_start",
    "method" + ".keep=1": "method.one_step_prob",
}


def test_a_key_that_was_renamed_is_named(command):
    for word, now in FORMER.items():
        code, _, err = command("run", "method=nitrofusion", word)
        assert code == 1
        assert f"is now called {now}; write that" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("copy add_shape", "copy add_shape: no such recipe (did you mean add_shapes?)"),
        ("copy add_shapes as=sd3_turbo", "as=sd3_turbo: a shipped recipe has this name"),
        ("copy add_shapes as=../x", "as=../x: must be letters"),
        ("copy", "copy: use `distill recipes copy NAME [to=conf] [as=NAME]`"),
        ("cop add_shapes", "cop add_shapes: use `distill recipes copy"),
    ],
)
def test_a_wrong_copy_is_refused_in_a_sentence(words, said, command, tmp_path):
    code, _, err = command("recipes", *words.split())
    assert code == 1
    assert err.startswith(f"distill: {said}")
    assert list(tmp_path.iterdir()) == []
