"""What a user's own package brings, as the pages show it: by a trust list and a folder of options,
without a fork.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs" / "how_to"
SMOKE = ("debug=smoke", "~metrics", "data.num_workers=0", "callbacks.samples.every=100")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module of the user's, and trust it."""

    def write(name: str, page: str) -> None:
        (code,) = blocks(page, "python")
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("DISTILL_TRUST", name)

    return write


def test_the_method_of_the_page_trains_and_is_checked(own, command, pipelines, shards, tmp_path):
    own("mymethods", "add_a_method.md")
    folder = tmp_path / "mine" / "method"
    folder.mkdir(parents=True)
    (option,) = blocks("add_a_method.md", "yaml")
    (folder / "least_squares.yaml").write_text(option, encoding="utf-8")
    words = ["--config-dir", tmp_path / "mine", "method=least_squares", *SMOKE]
    words += [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}"]
    code, _, said = command("run", *words, "run_dir=run")
    assert code == 0, said
    rows = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert {"g/adv", "d/adv", "d/real", "d/fake"} <= set(rows[0].split(","))
    said = command("run", *words, "+method.real_tarket=2", "run_dir=other")[2]
    assert "real_tarket: mymethods.LeastSquares takes no such key" in said
    assert "did you mean real_target?" in said
    said = command("run", *words, "discriminator=dino", "run_dir=other")[2]
    assert "method needs a discriminator of latents" in said
    assert not (tmp_path / "other").exists()


def test_the_heads_of_the_page_come_in_by_the_command_line(
    own, command, pipelines, shards, tmp_path
):
    own("myheads", "add_heads.md")
    target = "+discriminator.heads._target_=myheads.MeanHeads"
    words = ["~discriminator.heads", target, "+discriminator.heads._partial_=true", *SMOKE]
    words += [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "run_dir=run"]
    code, _, said = command("run", *words)
    assert code == 0, said
    assert (tmp_path / "run" / "student").is_dir()
